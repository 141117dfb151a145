"""The result of `mlip profile` as RUN/evals/ has it. No torch. Times are in seconds, shares are of the whole step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mlip_cli.runs.result_files import Result


@dataclass(frozen=True, kw_only=True)
class Gflops:
    """Operations of a forward pass, of one image or one text."""

    image_tower: float
    image_tower_by_part: dict[str, float]
    image_tower_unmerged: float
    image_tower_unmerged_by_part: dict[str, float]
    frequency_branch: float
    token_heads: float
    text_tower: float
    text_tower_at_context_length: float


@dataclass(frozen=True, kw_only=True)
class ProfiledMerging:
    """The merge plan of the model."""

    method: str
    rate: float
    """The true one."""
    before_blocks: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class PartSpeed:
    """A part of the work, timed alone."""

    part: str
    median_s: float
    per_s: float
    """Images or texts a second."""
    speedup: float | None
    """Times as fast as the image tower at rate 0; None for other parts."""
    speedup_interval: tuple[float, float] | None
    seconds: Sequence[float]
    """One measurement a round."""


@dataclass(frozen=True, kw_only=True)
class StepPart:
    """A part of a training step."""

    part: str
    group: str
    seconds: float
    share: float
    in_step: bool
    """False for what loader processes do while the step runs: it adds nothing to the step."""


@dataclass(frozen=True, kw_only=True)
class Unaccounted:
    """Time of a step that no part accounts for."""

    seconds: float
    share: float
    outside_s: float
    """Outside of all parts."""


@dataclass(frozen=True, kw_only=True)
class LoaderFacts:
    """Time of the loader for its samples."""

    num_samples: int
    bad_samples: int
    sample_seconds: dict[str, float]
    """Of one process, by part."""
    loader_processes: int
    """Of one rank."""
    loader_images_per_s: float
    ranks: int = 1
    """Ranks that share the cores of the machine."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The bottleneck of training."""

    part: str
    why: str


@dataclass(frozen=True, kw_only=True)
class LossOfPictures:
    """A token loss of a trained model on one training batch."""

    loss: str
    pairs: int
    right: float
    """With the picture of each caption."""
    other: float
    """With the picture of another caption: where this is no higher, the loss does not look at the picture."""


@dataclass(frozen=True, kw_only=True)
class MatmulSpeed:
    """Large products of square matrices."""

    precision: str
    shape: Sequence[int]
    tflops: float
    median_s: float


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Most memory held at any moment."""

    gib: float
    measured: str
    """What exactly was measured."""


@dataclass(frozen=True, kw_only=True)
class StepMemory(PeakMemory):
    """Peak memory of a training step."""

    what: str


@dataclass(frozen=True, kw_only=True)
class ProfileResult(Result):
    """Parameters, operations, speeds and memory of a model, and the time of each part of its training step."""

    KIND: ClassVar[str] = "profile"

    target: str
    device: str
    device_name: str
    torch: str
    threads: int
    precision: str
    compiled: bool = False
    image_size: int
    batch_size: int
    rounds: int
    context_length: int
    caption_tokens: int
    caption_tokens_from: str
    caption_tokens_in_step: float | None = None
    """Mean over the captions of a step, with the padding of their groups; None in results of earlier versions."""
    parameters: dict[str, int]
    merging: ProfiledMerging | None
    tokens_per_block: Sequence[int]
    """Patch tokens."""
    prefix_tokens: int
    gflops: Gflops
    speed: Sequence[PartSpeed]
    micro_batch_size: int | None
    step_s: float
    """Of the step without clocks."""
    clocks_cost: float
    """Share that the clocks add to the step."""
    whole_s: float
    """Of the step with clocks, and of loading where it waits for that."""
    breakdown: Sequence[StepPart]
    unaccounted: Unaccounted
    data: LoaderFacts | None
    """None without data."""
    limit: Limit
    step_gflops: float
    step_tflops: float
    """A second."""
    matmul_peak_tflops: float
    """A second, of large products in the same precision."""
    mfu: float
    """Model FLOPs utilisation: step_tflops / matmul_peak_tflops."""
    matmul: Sequence[MatmulSpeed]
    float32_matmul_precision: str
    peak_memory: StepMemory
    token_losses: Sequence[LossOfPictures] = ()
    """Empty without data, for random weights, and in results of earlier versions."""
