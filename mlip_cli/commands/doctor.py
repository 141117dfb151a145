"""`mlip doctor`: find what would stop or slow mlip on this machine, and name a fix."""

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import GIB
from mlip_cli.machine import usable_cores
from mlip_cli.paths import read_variable
from mlip_cli.recipe.load import load_without_weights
from mlip_cli.recipe.shipped import recipe_names, recipes_folder
from mlip_cli.runs.folder import RUNS
from mlip_cli.terminal.output import plural, print_json, print_lines, print_table, say, size_in_words

DISTRIBUTION = "mlip-cli"
OLDEST_PYTHON = (3, 11)
LOW_DISK_GIB, NO_DISK_GIB = 10, 1
FEW_FILES = 8192
"""mlip raises the soft limit itself. So many let a process keep 3,584 shards open."""
SLOW_BF16 = 0.8


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str | None = None


def doctor(*, as_json: bool) -> None:
    """Run all checks and print them.

    Raises:
        RunError: a check failed.
    """
    say("checking this machine; PyTorch takes some seconds to load")
    checks = [check for examine in EXAMINATIONS for check in examine()]
    failed = [check.name for check in checks if check.status == "fail"]
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        print_table(["", "check", "found"], [[check.status, check.name, check.found] for check in checks])
        fixes = [f"{check.status}  {check.name}: {check.fix}" for check in checks if check.fix]
        if fixes:
            print_lines("\n" + "\n".join(fixes))
    if failed:
        raise RunError(f"doctor: {', '.join(failed)} failed; see the fixes above")


def python() -> Iterator[Check]:
    """The interpreter and the machine."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        yield Check("Python", "fail", found, f"install Python {needed} or newer")
    else:
        yield Check("Python", "ok", found)


def packages() -> Iterator[Check]:
    """Installed versions against the versions that mlip and torchvision require. Nothing is imported."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "warn", f"{DISTRIBUTION} is on the path but not installed", "pip install -e .")
        return
    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    pinned = [r for r in map(Requirement, _requires("torchvision")) if r.name == "torch"]
    problems = [problem for requirement in [*needed, *pinned] if (problem := _unmet(requirement))]
    if problems:
        cure = f"pip install --upgrade {' '.join(repr(str(r)) for r in needed if _unmet(r))}".strip()
        if not any(map(_unmet, needed)):
            cure = "install torch and torchvision together, of the same release"
        yield Check("packages", "fail", "; ".join(problems), cure)
    else:
        shown = ", ".join(f"{r.name} {importlib.metadata.version(r.name)}" for r in needed[:4])
        yield Check("packages", "ok", f"{len(needed)} as required, including {shown}")


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _unmet(requirement: Requirement) -> str | None:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {version} is not {requirement.specifier}"


def torch_build() -> Iterator[Check]:
    """PyTorch: whether it starts, its devices, and the speed of bf16."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", "fail", f"does not start: {error}", "install it again for this machine: pytorch.org")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    cpu = torch.backends.cpu.get_cpu_capability()
    yield Check("torch", "ok", f"{torch.__version__}, {build}, {cpu}, {torch.get_num_threads()} threads")
    yield _devices()
    yield _bf16()
    yield _compiler()


def _devices() -> Check:
    import torch

    if torch.cuda.is_available():
        found = []
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            found.append(f"{torch.cuda.get_device_name(i)} ({free / GIB:.0f} of {total / GIB:.0f} GiB free)")
        return Check("devices", "ok", ", ".join(found))
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        fix = "install a CUDA build of torch: pytorch.org"
        return Check("devices", "warn", "an NVIDIA driver, but torch is a CPU build", fix)
    if shutil.which("nvidia-smi"):
        fix = "run nvidia-smi; the driver may be too old for this torch's CUDA"
        return Check("devices", "warn", "an NVIDIA driver, but torch sees no GPU", fix)
    if torch.backends.mps.is_available():
        return Check("devices", "warn", "cpu, mps", "mps is untested; train.device=cpu is the safe choice")
    return Check(
        "devices", "ok", f"cpu with {plural(usable_cores(), 'usable core')}: enough for the demo and the tests"
    )


def _compiler() -> Check:
    """The compiler that train.compile needs on this machine's best device."""
    import torch

    from mlip_cli.devices import find_compiler

    wanted, found = find_compiler("cuda" if torch.cuda.is_available() else "cpu")
    if found is None:
        fix = "apt install g++; without one, leave train.compile at false"
        return Check("compiler", "warn", f"no {wanted}, for train.compile", fix)
    return Check("compiler", "ok", f"{found}, for train.compile")


def _bf16() -> Check:
    """Time a matrix product in fp32 and bf16, in turn."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 4096 if device == "cuda" else 768  # a smaller product takes a GPU less time than its start
    x = torch.randn(side, side, device=device)
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(7):
        for dtype, measured in seconds.items():
            y = x.to(dtype)
            start = time.perf_counter()
            (y @ y).sum().item()
            measured.append(time.perf_counter() - start)
    gain = min(seconds[torch.float32]) / min(seconds[torch.bfloat16])
    found = f"a matrix product takes 1/{gain:.1f} of fp32's time on {device}"
    if gain < SLOW_BF16:
        found = f"a matrix product takes {1 / gain:.1f}x fp32's time on {device}"
        return Check("bf16", "warn", found, "train.precision=fp32 is faster here")
    return Check("bf16", "ok", found)


def disk() -> Iterator[Check]:
    """Free space and write permission in the current folder."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free / GIB
    found = f"{free:.1f} GiB free in {here}"
    if not os.access(here, os.W_OK):
        yield Check("disk", "fail", f"{here} cannot be written to", "work in a folder of your own")
    elif free < NO_DISK_GIB:
        yield Check("disk", "fail", found, "free some space: checkpoints and shards do not fit")
    elif free < LOW_DISK_GIB:
        yield Check("disk", "warn", found, "enough for the demo; a run of ViT-B/16 keeps several GiB of checkpoints")
    else:
        yield Check("disk", "ok", found)


def shared_memory() -> Iterator[Check]:
    """/dev/shm, through which loader processes hand over batches: what all GPUs of this machine together take of it, at
    most, with as many loader processes as mlip chooses. macOS has none."""
    from mlip_cli.data.workers import ITEM_BYTES, Need, cure, default_num_workers, free_shared_memory

    free = free_shared_memory()
    if free is None:
        return
    ranks = _num_gpus() or 1
    need = Need(ranks, default_num_workers(ranks), ITEM_BYTES)
    found = f"{size_in_words(free)} free, a training on this machine needs up to {need}"
    yield Check("/dev/shm", *(("ok", found) if need.num_bytes <= free else ("warn", found, cure(need, free))))


def _num_gpus() -> int:
    try:
        import torch
    except (ImportError, OSError):  # another check says so
        return 0
    return torch.cuda.device_count()


def open_files() -> Iterator[Check]:
    """The number of files that a process may open, once mlip has raised the soft limit."""
    from mlip_cli.data.dataset import shards_that_fit

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        yield Check("open files", "ok", "any number in a process")
    elif hard < FEW_FILES:
        fix = f"ask the administrator for a hard limit of {FEW_FILES:,}, if your data has more shards"
        kept = shards_that_fit(hard)
        yield Check("open files", "warn", f"at most {hard:,} in a process, so {kept:,} shards stay open", fix)
    else:
        yield Check("open files", "ok", f"at most {hard:,} in a process")


def data() -> Iterator[Check]:
    """The first sample of every prepared data set under data/ and $MLIP_DATA."""
    roots = {"data": Path("data")}
    try:
        if own := read_variable("MLIP_DATA"):
            roots["$MLIP_DATA"] = Path(own)
    except UsageError as error:
        yield Check("$MLIP_DATA", "fail", str(error), "set it to a folder")
    for name, root in roots.items():
        if not root.is_dir():
            fix = (
                "mlip prepare-data openmoji data/openmoji makes the demo's data"
                if name == "data"
                else "set it to a folder"
            )
            yield Check(name, "warn" if name == "data" else "fail", f"{root}: no such folder", fix)
            continue
        cards = sorted([*root.glob("dataset.json"), *root.glob("*/dataset.json"), *root.glob("*/*/dataset.json")])
        if not cards:
            yield Check(name, "ok", f"{root}: readable, it holds no data set prepared by mlip")
        for card in cards:
            yield _readable(name, card.parent)


def _readable(name: str, folder: Path) -> Check:
    from mlip_cli.data.open import open_prepared

    try:
        dataset = open_prepared(folder)
        dataset.read(0)
    except (UsageError, RunError, OSError) as error:
        return Check(name, "fail", str(error), "prepare it again with mlip prepare-data, or remove the folder")
    return Check(name, "ok", f"{folder}: {plural(dataset.num_samples, 'sample')}")


def recipes() -> Iterator[Check]:
    """Whether all shipped recipes are present and valid."""
    names = recipe_names()
    if not names:
        fix = f"install {DISTRIBUTION} again; its recipes are missing"
        yield Check("recipes", "fail", f"no recipe in {recipes_folder()}", fix)
        return
    try:
        for name in names:
            load_without_weights(str(recipes_folder() / f"{name}.yaml"))
    except UsageError as error:
        yield Check("recipes", "fail", str(error), "restore the shipped recipes")
        return
    yield Check("recipes", "ok", f"{len(names)} in {recipes_folder()}: {', '.join(names)}")


def runs() -> Iterator[Check]:
    """The number of runs in runs/, if there are any."""
    found = sorted(RUNS.glob("*/recipe.yaml"))
    if found:
        yield Check("runs", "ok", f"{len(found)} in {RUNS.resolve()}")


EXAMINATIONS: tuple[Callable[[], Iterator[Check]], ...] = (
    python,
    packages,
    torch_build,
    disk,
    shared_memory,
    open_files,
    data,
    recipes,
    runs,
)
