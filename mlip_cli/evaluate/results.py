"""Results of evaluations as RUN/evals/ has them: zero-shot scores and merge sweeps. No torch.

Scores and shares are fractions in [0, 1]; intervals are 95 % intervals; times are seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from mlip_cli.data.sources.listing import PassedOver
from mlip_cli.evaluate.statistics import Interval, paired
from mlip_cli.profiling.result import PeakMemory
from mlip_cli.runs.result_files import Result

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
"""Of retrieval, in words."""


@dataclass(frozen=True)
class Share:
    """A recall at k."""

    value: float
    interval: Interval
    chance: float


@dataclass(frozen=True, kw_only=True)
class Recalls:
    """Recall at 1, 5 and (for retrieval) 10."""

    n: int
    """Queries."""
    num_candidates: int
    r1: float
    r1_interval: Interval
    r1_chance: float
    r5: float
    r5_interval: Interval
    r5_chance: float
    r10: float | None = None
    r10_interval: Interval | None = None
    r10_chance: float | None = None

    def at(self, k: int) -> Share:
        """Recall at `k`, one of those that were measured."""
        return Share(*(getattr(self, f"r{k}{what}") for what in ("", "_interval", "_chance")))


@dataclass(frozen=True)
class ClassRecall:
    """Recall of one class."""

    class_: Annotated[str, Field(alias="class")]
    n: int
    recall: float | None
    """None for a class without pictures."""


@dataclass(frozen=True, kw_only=True)
class ZeroshotScores:
    """How well one kind of image feature classifies."""

    acc1: float
    acc1_interval: Interval
    acc5: float | None
    """None where there are fewer than five classes."""
    acc5_interval: Interval | None
    mean_per_class_recall: float
    mean_per_class_recall_interval: Interval
    per_class: Sequence[ClassRecall]
    names: Recalls | None = None
    """Image to text, where the data set has a name for each picture."""
    pictures: Recalls | None = None
    """Text to image, likewise: a picture of each name."""

    @property
    def asks_names_alone(self) -> bool:
        """Whether each name is a class: then the recalls say everything."""
        return self.names is not None and self.names.num_candidates == len(self.per_class)


@dataclass(frozen=True, kw_only=True)
class AllFeaturesScores(ZeroshotScores):
    """Scores of the spatial feature, which `encode_image` gives, and with a frequency head of the others."""

    frequency: ZeroshotScores | None = None
    spatial_plus_frequency: ZeroshotScores | None = None
    """Of the sum of the normalised features."""


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same samples."""

    difference: float
    won: int
    """Samples that only this model gets right."""
    lost: int
    """Samples that only the other one gets right."""
    p: float
    """Of McNemar's exact test, or of its counterpart for clusters (`statistics.paired`)."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedResult(Result):
    """One checkpoint at one merge rate on one data set."""

    protocol: int
    dataset: str
    data_fingerprint: str
    checkpoint: str
    checkpoint_sha256: str
    """Of its weights."""
    merge_rate: float | None
    """As asked for; None for the recipe's."""
    batch_size: int
    device: str
    """As asked for."""
    step: int
    true_merge_rate: float
    merge_method: str | None
    """None where nothing is merged."""
    tokens: Sequence[int]
    """Patch tokens in each block."""
    image_size: int
    device_type: str
    precision: str = "fp32"
    """In which the model computed. Earlier versions knew fp32 alone, and did not write it."""
    n: int
    """Pictures."""
    right: dict[str, str]
    """For paired tests: by measure, a character (0 or 1) a query."""

    @property
    def data(self) -> tuple[str, str]:
        """The data set, and the fingerprint of its data."""
        return self.dataset, self.data_fingerprint

    def clusters(self, measure: str) -> Sequence[int] | None:
        """The cluster of each query of a measure (see `statistics.paired`); None: the queries are independent."""
        return None

    def test_against(self, first: Self, measure: str) -> PairedTest:
        """This result beside another one on the same data."""
        return PairedTest(**paired(first.right[measure], self.right[measure], self.clusters(measure)))


@dataclass(frozen=True, kw_only=True)
class ZeroshotResult(AllFeaturesScores, EvaluatedResult):
    """Classification by text alone."""

    KIND: ClassVar[str] = "zeroshot"

    num_classes: int
    num_classes_seen: int
    """Classes with a picture."""
    chance: float
    majority_share: float
    """Share of the most frequent class."""
    predicted: str
    """Number of the class that each picture got, with spaces between them."""
    images_per_s: float
    timed_batches: int
    passed_over: PassedOver = field(default_factory=PassedOver)
    """Files of the data set that were not read."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a merge sweep."""

    method: str | None
    """None for the unmerged model."""
    rate: float
    """As asked for."""
    true_rate: float

    @property
    def key(self) -> tuple[str | None, float]:
        """Unique among the settings of a sweep."""
        return self.method, self.rate

    @property
    def words(self) -> tuple[str, str]:
        """The method and the rate asked for, as tables show them."""
        return self.method or "none", f"{self.rate:g}"


@dataclass(frozen=True, kw_only=True)
class SpeedAtSetting(Setting):
    """Operations and time of the image tower."""

    tokens_per_block: Sequence[int]
    gflops: float
    speedup: float
    """Times as fast as the unmerged model."""
    speedup_interval: Interval
    expected_speedup: float
    """By operations."""
    measured_over_expected: float
    images_per_s: float
    seconds: Sequence[float]
    """One measurement a round."""
    peak_memory: PeakMemory


@dataclass(frozen=True, kw_only=True)
class ZeroshotAtSetting(Setting, AllFeaturesScores):
    """Zero-shot scores."""

    num_classes_seen: int
    agreement: float
    """Share of pictures that get the same class from the unmerged model."""
    paired: dict[str, PairedTest]
    """Against the unmerged model, by measure."""


@dataclass(frozen=True, kw_only=True)
class RetrievalAtSetting(Setting):
    """Retrieval scores."""

    image_to_text: Recalls
    text_to_image: Recalls
    paired: dict[str, PairedTest]
    """Against the unmerged model: image_to_text_r1 and so on."""

    @property
    def recalls(self) -> dict[str, Recalls]:
        """By direction."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}


@dataclass(frozen=True, kw_only=True)
class Distortion(Setting):
    """How far merging moves image features: 1 - cosine to the unmerged feature of the same picture, in [0, 2]."""

    n: int
    """Pictures, drawn at random."""
    mean: float
    p95: float
    """95th percentile."""


@dataclass(frozen=True, kw_only=True)
class SweptData:
    """A data set of a sweep."""

    dataset: str
    fingerprint: str
    n: int
    """Pictures."""
    distortion: Sequence[Distortion] = ()
    """At every setting that merges. Empty in results of earlier versions."""

    @property
    def data(self) -> tuple[str, str]:
        """The data set, and the fingerprint of its data."""
        return self.dataset, self.fingerprint


@dataclass(frozen=True, kw_only=True)
class ZeroshotSweep(SweptData):
    """Zero-shot scores at every setting, the unmerged model first."""

    task: Literal["zeroshot"] = "zeroshot"
    num_classes: int
    chance: float
    majority_share: float
    points: Sequence[ZeroshotAtSetting]
    passed_over: PassedOver = field(default_factory=PassedOver)
    """Files of the data set that were not read."""


@dataclass(frozen=True, kw_only=True)
class RetrievalSweep(SweptData):
    """Retrieval scores at every setting, the unmerged model first."""

    task: Literal["retrieval"] = "retrieval"
    num_texts: int
    points: Sequence[RetrievalAtSetting]


@dataclass(frozen=True)
class FailedData:
    """A data set that could not be measured."""

    dataset: str
    error: str


@dataclass(frozen=True, kw_only=True)
class SweepResult(Result):
    """One checkpoint at several merge rates, the unmerged model first."""

    KIND: ClassVar[str] = "merge_sweep"

    run: str
    checkpoint: str
    step: int
    image_size: int
    device: str
    device_name: str
    threads: int
    torch: str
    precision: str = "fp32"
    """As in EvaluatedResult."""
    batch_size: int
    rounds: int
    points: Sequence[SpeedAtSetting]
    datasets: Sequence[Annotated[ZeroshotSweep | RetrievalSweep, Field(discriminator="task")]]
    failed: Sequence[FailedData] = ()

    @property
    def file_name(self) -> str:
        """Of its file: a sweep replaces that of the same checkpoint in the same precision."""
        precision = "" if self.precision == "fp32" else f"_{self.precision}"
        return f"merge_sweep_{self.checkpoint}{precision}.json"
