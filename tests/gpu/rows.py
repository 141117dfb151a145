"""What a row of the GPU check is: its sizes, what it expects, what it found."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Scale:
    """The device and the sizes of all rows. A rehearsal runs the same rows on a CPU, where only mistakes show."""

    device_type: str
    overrides: tuple[str, ...]
    """Of every recipe."""
    peer: Mapping[str, Mapping[str, int]]
    """Changes of OpenCLIP's ViT-B-16, by section."""
    compiler: str
    """The backend of torch.compile."""
    compile_s: float
    """When compiling took so many seconds, the models that are left stay out: other rows are waiting."""
    batch_size: int
    small_batch_size: int
    """Where the GPU may wait for Python."""
    steps: int
    """Steps that are timed together."""
    rounds: int
    heads: int
    tokens: tuple[int, ...]
    """Sequence lengths of attention without a mask over later tokens."""
    text_tokens: int
    """Sequence length of causal attention."""
    grid: int
    """Patches a side."""
    width: int
    filip: tuple[int, int, int, int]
    """Pictures of a rank, captions of all ranks, patches, words."""
    copied: int
    """Pictures of 224 pixels a side in a copy."""
    load: int
    """Rows of the matrices that keep the device busy meanwhile."""
    matrix: int
    """Rows of the matrices whose product is compared with fp64."""
    samples: int
    """Of OpenMoji, for the commands."""
    deadline: float = 0.0
    """When the check has to be over, by `time.time`; the check sets it."""

    @property
    def device(self) -> torch.device:
        """The first one of its type."""
        return torch.device(self.device_type, 0) if self.device_type == "cuda" else torch.device(self.device_type)

    @property
    def seconds_left(self) -> float:
        """Until the check has to be over."""
        return self.deadline - time.time()


GPU = Scale(
    device_type="cuda",
    overrides=(),
    peer={},
    compiler="inductor",
    compile_s=75,
    batch_size=512,
    small_batch_size=64,
    steps=3,
    rounds=5,
    heads=12,
    tokens=(197, 144, 104, 50),
    text_tokens=77,
    grid=14,
    width=768,
    filip=(512, 4_096, 196, 77),
    copied=512,
    load=8_192,
    matrix=2_048,
    samples=200,
)

REHEARSAL = Scale(
    device_type="cpu",
    overrides=(
        "data.image_size=32",
        "model.embed_dim=16",
        "model.token_dim=12",
        "model.vision.timm=null",
        "model.vision.patch_size=8",
        "model.vision.width=32",
        "model.vision.depth=4",
        "model.vision.num_heads=2",
        "model.text.width=32",
        "model.text.depth=2",
        "model.text.num_heads=2",
    ),
    peer={
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"vocab_size": 200, "width": 32, "heads": 2, "layers": 2},
    },
    compiler="aot_eager",
    compile_s=1,
    batch_size=8,
    small_batch_size=4,
    steps=2,
    rounds=1,
    heads=2,
    tokens=(9,),
    text_tokens=7,
    grid=4,
    width=8,
    filip=(3, 6, 5, 4),
    copied=2,
    load=64,
    matrix=64,
    samples=48,
)


@dataclass(frozen=True)
class Found:
    """What a row found."""

    words: str
    """The most important of it, for the table."""
    _: KW_ONLY
    statements: Mapping[str, bool] = field(default_factory=dict)
    """What was expected, in a sentence -> whether it is so; none if the row only measures."""
    speeds: Mapping[str, bool] = field(default_factory=dict)
    """The same of what holds on a GPU at full size alone, so that a rehearsal does not judge it."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Numbers and words that can be written as JSON."""
    lines: Sequence[Mapping[str, Any]] = ()
    """A table: its lines, column -> value."""


@dataclass(frozen=True)
class Row:
    """A part of the check, run in a process of its own."""

    name: str
    expected: str
    """A sentence or a bound."""
    run: Callable[[Scale], Found]
    """A function of a module, so that another process finds it."""
    usual_s: float
    """On one data centre GPU; a row begins only while so many seconds are left."""
    _: KW_ONLY
    only_on_cuda: str | None = None
    """What of it a rehearsal leaves out, because a CPU has no such thing."""
    is_quiet: bool = False
    """A warning of any library is not as expected."""


def milliseconds(seconds: float) -> float:
    """For tables."""
    return round(1000 * seconds, 3)
