"""`mlip merge-sweep`: one checkpoint at several merge rates, its speed and its accuracy beside the unmerged model's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_cli import __version__
from mlip_cli.commands.costs import image_gflops
from mlip_cli.commands.loading import LoadedRun, MergedEncoder, load_run
from mlip_cli.commands.memory import batch_named
from mlip_cli.commands.report import rebuild
from mlip_cli.commands.sweep_datasets import FAILURES, SweepDataset, find_datasets
from mlip_cli.commands.sweep_pictures import write_merge_pictures
from mlip_cli.commands.sweep_points import Point, check_methods, sweep_points
from mlip_cli.commands.sweep_tables import show
from mlip_cli.errors import RunError, interrupted_as
from mlip_cli.files import write_json
from mlip_cli.output import plural, print_json, progress, say
from mlip_cli.profiling import Timing, device_name, measure_interleaved, peak_memory
from mlip_cli.run_folder import now


def merge_sweep(
    run: str | None,
    *,
    rates: Sequence[float],
    methods: Sequence[str],
    datasets: Sequence[str],
    data_root: Path | None,
    batch_size: int,
    rounds: int,
    num_pictures: int,
    device: str,
    as_json: bool,
) -> None:
    """Sweep all methods and rates, the unmerged model first; print the result and keep it in RUN/, with merge pictures.

    Raises:
        UsageError: an unknown method, no data set of those named, or a rate that no plan reaches, before anything is
            measured.
        RunError: the device has no memory for the batch; or some data sets could not be measured, and all else is
            printed and kept all the same.
    """
    check_methods(methods)
    with interrupted_as("interrupted; nothing was written"):
        loaded = load_run(run, device=device)
        points = sweep_points(loaded, rates, methods)
        found, failures = find_datasets(loaded, datasets, root=data_root, batch_size=batch_size)
        settings = plural(len(points) - 1, "setting")
        say(f"{loaded.label}, step {loaded.step}: {settings} beside rate 0, {plural(rounds, 'timed round')}")
        measured_at = now()
        with batch_named("--batch-size", batch_size):
            timed = speeds(loaded, points, batch_size=batch_size, rounds=rounds)
        scores, measuring_failures = all_scores(found, points)
        failures |= measuring_failures
        result = {
            "kind": "merge_sweep",
            "measured_at": measured_at,
            "mlip_version": __version__,
            **what_and_where(loaded),
            "batch_size": batch_size,
            "rounds": rounds,
            "points": timed,
            "datasets": scores,
            "failed": [{"dataset": name, "error": str(error)} for name, error in failures.items()],
        }
    path = loaded.run.evals / f"merge_sweep_{loaded.checkpoint.name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)  # first of all: the reader of a pipe may have left
    if as_json:
        print_json(result)
    else:
        show(result)
    say(f"written to {path}")
    if num_pictures and len(points) > 1:
        write_merge_pictures(loaded, points, found, num_pictures=num_pictures)
    rebuild(loaded.run)
    if failures:
        reasons = "; ".join(str(error) for error in failures.values())
        wanted = plural(len(failures) + len(scores), "data set")
        raise RunError(f"{len(failures)} of {wanted} could not be measured: {reasons}")


def what_and_where(loaded: LoadedRun) -> dict[str, Any]:
    """The checkpoint that is measured, and the machine that measures."""
    return {
        "run": loaded.label,
        "checkpoint": loaded.checkpoint.name,
        "step": loaded.step,
        "image_size": loaded.model.image_size,
        "device": str(loaded.device),
        "device_name": device_name(loaded.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def all_scores(
    datasets: Sequence[SweepDataset], points: Sequence[Point]
) -> tuple[list[dict[str, Any]], dict[str, Exception]]:
    """Scores on each data set, and what went wrong with the others."""
    scores: list[dict[str, Any]] = []
    failures: dict[str, Exception] = {}
    for dataset in datasets:
        try:
            scores.append(dataset.measure(points))
        except FAILURES as error:
            failures[dataset.name] = error
    return scores, failures


def speeds(loaded: LoadedRun, points: Sequence[Point], *, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Operations by formula and time side by side, on pictures of noise: no rule of merging works less for them."""
    size = loaded.model.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator).to(loaded.device)
    functions = {str(i): encode(point.encoder, images) for i, point in enumerate(points)}
    with progress(rounds * len(points), "timing") as bar:
        timings = measure_interleaved(
            functions, rounds, device=loaded.device, after_call=lambda: bar.advance(bar.task_ids[0])
        )
    whole = sum(image_gflops(loaded.model, points[0].encoder.plan).values())
    return [
        {
            **point.setting,
            "tokens_per_block": point.encoder.plan.tokens,
            **cost(sum(image_gflops(loaded.model, point.encoder.plan).values()), whole, timing),
            "images_per_s": batch_size / timing.median_s,
            "seconds": timing.seconds,
            "peak_memory": vars(peak_memory(function, device=loaded.device)),
        }
        for point, timing, function in zip(points, timings.values(), functions.values(), strict=True)
    ]


def encode(encoder: MergedEncoder, images: Tensor) -> Callable[[], object]:
    """A forward pass of the image tower."""

    def forward() -> None:
        with torch.inference_mode():
            encoder.encode_image(images)

    return forward


def cost(gflops: float, unmerged_gflops: float, timing: Timing) -> dict[str, Any]:
    """Speed-up as measured and as the operations promise."""
    expected = unmerged_gflops / gflops
    return {
        "gflops": gflops,
        "speedup": timing.speedup,
        "speedup_interval": timing.speedup_interval,
        "expected_speedup": expected,
        "measured_over_expected": timing.speedup / expected,
    }
