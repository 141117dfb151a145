"""The settings of a merge sweep, and the speed of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.evaluate.results import Distortion, Setting, SpeedAtSetting
from mlip_cli.evaluate.statistics import Interval
from mlip_cli.profiling.flops import image_gflops
from mlip_cli.profiling.timing import measure_interleaved, peak_memory
from mlip_cli.runs.loading import LoadedRun, MergedEncoder
from mlip_cli.terminal.panel import progress


@dataclass(frozen=True)
class Point:
    """One setting of the sweep."""

    method: str | None
    """None for the unmerged model."""
    rate: float
    """As asked for. The plan has the true rate."""
    encoder: MergedEncoder

    @property
    def setting(self) -> Setting:
        """The point in results."""
        return Setting(method=self.method, rate=self.rate, true_rate=self.encoder.plan.rate)


def sweep_points(loaded: LoadedRun, rates: Sequence[float], methods: Sequence[str]) -> list[Point]:
    """Rate 0 once, then each method at each other rate, ascending. Without a method, `merge_plan` chooses.

    Raises:
        UsageError: no plan reaches a rate.
    """
    wanted = sorted({rate for rate in rates if rate > 0})
    return [
        Point(None, 0.0, loaded.at_rate(0.0)),
        *(
            Point(method, rate, loaded.at_rate(rate, method))
            for method in dict.fromkeys(methods or [loaded.model.merge_plan(0.0).method])
            for rate in wanted
        ),
    ]


@torch.inference_mode()
def speeds(loaded: LoadedRun, points: Sequence[Point], *, batch_size: int, rounds: int) -> list[SpeedAtSetting]:
    """Operations by formula, and times measured side by side on noise: merging costs the same for any picture."""
    size = loaded.model.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator).to(loaded.device)
    functions = {str(i): partial(point.encoder.encode_image, images) for i, point in enumerate(points)}
    with progress(rounds * len(points), "timing") as bar:
        timings = measure_interleaved(
            functions, rounds, device=loaded.device, after_call=lambda: bar.advance(bar.task_ids[0])
        )
    gflops = [sum(image_gflops(loaded.model, point.encoder.plan).values()) for point in points]
    return [
        SpeedAtSetting(
            **vars(point.setting),
            tokens_per_block=point.encoder.plan.tokens,
            gflops=own,
            speedup=timing.speedup,
            speedup_interval=Interval(*timing.speedup_interval),
            expected_speedup=gflops[0] / own,
            measured_over_expected=timing.speedup / (gflops[0] / own),
            images_per_s=batch_size / timing.median_s,
            seconds=timing.seconds,
            peak_memory=peak_memory(function, device=loaded.device),
        )
        for point, own, timing, function in zip(points, gflops, timings.values(), functions.values(), strict=True)
    ]


@torch.inference_mode()
def distortions(loaded: LoadedRun, points: Sequence[Point], images: Tensor, *, batch_size: int) -> list[Distortion]:
    """How far each point that merges moves the features of (n, 3, S, S) uint8 images; the first point merges none."""

    def features(point: Point) -> Tensor:
        encoded = [point.encoder.encode_image(batch.to(loaded.device)).float() for batch in images.split(batch_size)]
        return F.normalize(torch.cat(encoded), dim=-1)

    unmerged = features(points[0])
    found = []
    for point in points[1:]:
        distances = 1 - (features(point) * unmerged).sum(-1)
        mean, p95 = distances.mean().item(), distances.quantile(0.95).item()
        found.append(Distortion(**vars(point.setting), n=len(images), mean=mean, p95=p95))
    return found
