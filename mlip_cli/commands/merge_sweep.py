"""`mlip merge-sweep`: one checkpoint at several merge rates, its speed and its accuracy beside the unmerged model's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mlip_cli.commands.costs import image_gflops
from mlip_cli.commands.evaluators import measure_runs
from mlip_cli.commands.loading import LoadedRun, MergedEncoder, at_rate, load_run
from mlip_cli.commands.profile import device_name
from mlip_cli.commands.sweep_tables import show
from mlip_cli.config import Merging
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.benchmarks import Benchmark, data_root, find_benchmark
from mlip_cli.evaluate.statistics import paired
from mlip_cli.files import write_json
from mlip_cli.output import print_json, progress, say
from mlip_cli.profiling import Timing, measure_interleaved, peak_memory

METHODS: tuple[str, ...] = get_args(Merging.model_fields["method"].annotation)


@dataclass(frozen=True)
class Point:
    """One setting of the sweep."""

    method: str | None
    """None for the unmerged model."""
    rate: float
    """As asked for; the plan's is the true one."""
    encoder: MergedEncoder


def merge_sweep(
    run: str | None,
    *,
    rates: Sequence[float],
    methods: Sequence[str],
    datasets: Sequence[str],
    data_root: Path | None,
    batch_size: int,
    rounds: int,
    device: str,
    as_json: bool,
) -> None:
    """Sweep all methods and rates, the unmerged model first; print the result and keep it in RUN/evals/.

    Raises:
        UsageError: an unknown method or data set, or a rate that no plan reaches, before anything is measured.
    """
    check_methods(methods)
    loaded = load_run(run, device=device)
    points = sweep_points(loaded, rates, methods)
    benchmarks = find_benchmarks(loaded, datasets, data_root)
    say(f"{loaded.label}, step {loaded.step}: {len(points) - 1} settings beside rate 0, {rounds} timed rounds")
    result = {
        "run": loaded.label,
        "checkpoint": loaded.checkpoint.name,
        "step": loaded.step,
        "device": str(loaded.device),
        "device_name": device_name(loaded.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "image_size": loaded.model.image_size,
        "batch_size": batch_size,
        "rounds": rounds,
        "points": speeds(loaded, points, batch_size=batch_size, rounds=rounds),
        "datasets": [accuracies(loaded, points, benchmark, batch_size) for benchmark in benchmarks],
    }
    if as_json:
        print_json(result)
    else:
        show(result)
    path = loaded.run.evals / f"merge_sweep_{loaded.checkpoint.name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    say(f"written to {path}")


def check_methods(methods: Sequence[str]) -> None:
    """Refuse a method that does not exist."""
    for method in methods:
        if method not in METHODS:
            raise UsageError(f"--methods {method}: no such method; there are {', '.join(METHODS)}")


def sweep_points(loaded: LoadedRun, rates: Sequence[float], methods: Sequence[str]) -> list[Point]:
    """Rate 0 once, then each method at each other rate, ascending; no method named: the recipe's.

    Raises:
        UsageError: no plan reaches a rate.
    """
    model = loaded.model
    wanted = sorted({rate for rate in rates if rate > 0})
    return [
        Point(None, 0.0, at_rate(model, 0.0)),
        *(
            Point(method, rate, at_rate(model, rate, method))
            for method in dict.fromkeys(methods or [model.merge_plan(0.0).method])
            for rate in wanted
        ),
    ]


def find_benchmarks(loaded: LoadedRun, names: Sequence[str], root: Path | None) -> list[Benchmark]:
    """The data sets named, else those that the run's recipe evaluates on."""
    names = list(dict.fromkeys(names)) or list(loaded.recipe.evaluate.zeroshot)
    if not names:
        say("no accuracy: the recipe's evaluate.zeroshot is empty; name data sets with --dataset")
    return [find_benchmark(name, root=data_root(root)) for name in names]


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
            **setting(point),
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


def setting(point: Point) -> dict[str, Any]:
    """What names a point in the result."""
    return {"method": point.method, "rate": point.rate, "true_rate": point.encoder.plan.rate}


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


def accuracies(loaded: LoadedRun, points: Sequence[Point], benchmark: Benchmark, batch_size: int) -> dict[str, Any]:
    """Scores of all points on one data set, each beside the unmerged model on the same pictures."""
    [scores] = measure_runs(benchmark, [(loaded, [point.encoder for point in points])], batch_size=batch_size)
    unmerged = scores[0]
    shared = ("n", "num_classes", "chance", "majority_share")
    elsewhere = {*shared, "right", "predicted", "images_per_s", "timed_batches"}
    return {
        "dataset": benchmark.name,
        "fingerprint": benchmark.fingerprint,
        **{name: unmerged[name] for name in shared},
        "points": [
            {
                **setting(point),
                **{name: value for name, value in own.items() if name not in elsewhere},
                "agreement": agreement(unmerged["predicted"], own["predicted"]),
                "paired": {
                    measure: paired(unmerged["right"][measure], own["right"][measure]) for measure in own["right"]
                },
            }
            for point, own in zip(points, scores, strict=True)
        ],
    }


def agreement(unmerged: str, merged: str) -> float:
    """Share of pictures that get the same class from both, right or wrong."""
    pairs = list(zip(unmerged.split(), merged.split(), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)
