"""The device that computes: its choice, its name, its memory, and waiting for it."""

import ctypes
import os
import platform
import resource
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from mlip_cli.errors import RunError, UsageError
from mlip_cli.files import GIB
from mlip_cli.terminal.output import plural

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
"""Number types of the towers, by the words of `train.precision`."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)

_FULL_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "Failed to CUDA calloc")
"""Words of full memory in errors that have no class of their own: of a CPU, of cuBLAS and of NCCL."""


def keep_freed_memory(keep: bool = True) -> None:
    """Keep freed memory in the process, or go back to glibc's default; other C libraries stay as they are.

    By default glibc returns large blocks at once, and the kernel zeroes new pages (tests/benchmarks/bench_heap.py).
    A process that keeps freed memory holds its peak.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0 if keep else 65_536)
        libc.mallopt(_TRIM_THRESHOLD, -1 if keep else 128 * 1024)


def is_full_memory(error: RuntimeError) -> bool:
    """Whether PyTorch or a library below it found no memory on a device."""
    is_told = any(words in str(error) for words in _FULL_MEMORY) and not isinstance(error, RunError)
    return isinstance(error, torch.OutOfMemoryError) or is_told


@contextmanager
def full_memory_named(place: str, what: str, cure: str) -> Iterator[None]:
    """Turn PyTorch's error about full memory into one line: `place`, what does not fit, the cure.

    Raises:
        RunError: the block needed more memory than there is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_full_memory(error):
            raise
        raise RunError(f"{place}: the device has no memory for {what}; {cure}") from error


def batch_named(setting: str, size: int, *, note: str = "") -> AbstractContextManager[None]:
    """`full_memory_named` for `setting`, which sends `size` samples through the model at once."""
    if size == 1:
        return full_memory_named(setting, "one sample alone", "take a smaller model or smaller pictures")
    return full_memory_named(setting, f"{size:,} samples at once", f"set it to {size // 2:,} or less{note}")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision for the block; nothing for fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def check_precision(name: str | None, device: torch.device, *, setting: str = "precision") -> None:
    """Check a precision that `setting` asks for.

    Raises:
        UsageError: the device does not compute in it.
    """
    if name == "fp16" and device.type != "cuda":
        raise UsageError(f"{setting} fp16: needs CUDA, and the device is {device.type} here; take bf16 or fp32")


def has_units_for_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 as fast as fp32 or faster; a CPU without units takes a hundred times as long.

    PyTorch before 2.11 does not tell what a CPU has, and without oneDNN no version uses the units: no, then.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(unit, False) for unit in ("amx_bf16", "avx512_bf16", "bf16"))


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda`, `mps` or `cpu` -> the device of this rank, which then computes fp32 as fp32.

    For a CPU it also calls `keep_freed_memory`.

    Raises:
        UsageError: PyTorch does not see the device, or a machine has fewer GPUs than ranks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(name, True):
        raise UsageError(f"device {name}: PyTorch does not see one; use cpu, and ask mlip doctor why")
    if name == "auto":
        name = next((device for device, is_there in present.items() if is_there), "cpu")
    if name == "cpu":
        keep_freed_memory()
    _keep_fp32()
    if name == "cuda":
        number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= count:
            raise UsageError(
                f"device cuda: this machine has {plural(count, 'GPU')} and no GPU for its rank {number}; start {count}"
            )
        return torch.device("cuda", number)
    return torch.device(name)


def _keep_fp32() -> None:
    """Give convolutions and matrix products one precision in fp32: by default cuDNN alone rounds to TF32.

    These are PyTorch's older names of the settings. Its compiler reads them, and fails where the newer ones were set.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def find_compiler(device: str) -> tuple[str, str | None]:
    """The compiler that torch.compile calls for a device, as in `C++ compiler, g++`, and where it lies, or None.

    $CXX or $CC may name it.
    """
    if device == "cuda":
        language, command = "C", os.environ.get("CC") or "gcc"
    else:
        language, command = "C++", os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    program = shlex.split(command)[:1]
    return f"{language} compiler, {command}", shutil.which(program[0]) if program else None


def check_compiler(device: torch.device, setting: str, *, otherwise: str) -> None:
    """See that there is a compiler, which `setting` needs.

    Raises:
        UsageError: there is none; the message ends with `otherwise`, another cure than to install one.
    """
    wanted, found = find_compiler(device.type)
    if found is None:
        raise UsageError(f"{setting}: needs a {wanted}; apt install g++, or {otherwise}")


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work, so that a clock measures the work and not its queueing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the instruction set that PyTorch uses on the CPU; for other devices their type."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type


def peak_gib(device: torch.device) -> float:
    """Peak of the device's memory in GiB; on a CPU the peak of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def fetched(x: Tensor) -> Callable[[], int]:
    """Copy a 0-d integer from the device; what is returned waits for it, and not for later work of the device."""
    if x.device.type != "cuda":
        return lambda: int(x)
    value = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    value.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(value)

    return read
