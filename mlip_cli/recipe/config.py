"""The recipe as a tree of frozen models. Every field documents itself; `recipe.py` fills the tree from YAML."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LOSS_NAMES = ("spatial_global", "spatial_token", "frequency_global", "frequency_token")

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
AreaShare = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the recipe: no unknown keys, no coercion, no change after loading."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Source(Section):
    """A folder of shards that takes part in training."""

    path: Annotated[str, Field(min_length=1)]
    """Folder with dataset.json, as written by `mlip prepare-data`, relative to the current folder; or its URL, such as
    s3://bucket/folder."""
    weight: PositiveFloat | None = None
    """Share of this folder in every batch, relative to the other weights; null: in proportion to its size."""
    format: Literal["shards", "webdataset"] = "shards"
    """webdataset: tars that mlip did not write, as a folder or a pattern like tars/{0000..0099}.tar; an index is made
    in `data.cache` when they are read first."""


def _as_sources(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": v} if isinstance(v, str) else v for v in values) if value is not None else None


_SOURCES = Annotated[tuple[Source, ...], Field(min_length=1)]
_SOURCES_INPUT = str | Source | list[str | Source]
_SOURCES_IN_WORDS = "a folder, a list of folders or a list of {path, weight}"

Sources = Annotated[
    _SOURCES,
    BeforeValidator(_as_sources, json_schema_input_type=_SOURCES_INPUT),
    Field(json_schema_extra={"x-expected": _SOURCES_IN_WORDS}),
]
OptionalSources = Annotated[
    _SOURCES | None,
    BeforeValidator(_as_sources, json_schema_input_type=_SOURCES_INPUT | None),
    Field(json_schema_extra={"x-expected": f"{_SOURCES_IN_WORDS}, or null"}),
]


class Augment(Section):
    """Random changes of training pictures, drawn from (seed, epoch, sample id)."""

    crop_scale: tuple[AreaShare, AreaShare] | None = (0.5, 1.0)
    """Smallest and largest share of the picture's area in a random crop; null: the centre crop of evaluation."""
    flip: bool = False
    """Mirror half of the pictures (not for data whose captions say left or right)."""
    color_jitter: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest relative change of brightness, contrast and saturation; null: none."""


class Cache(Section):
    """Copies of the shards that lie at URLs, on this machine."""

    folder: str | None = None
    """On this machine's own disk; null: mlip in $XDG_CACHE_HOME, which is ~/.cache where it is not set."""
    gib: PositiveFloat = 100.0
    """Most that it holds; all data of a run must fit. mlip deletes no copies: it names those that you may delete."""


class Data(Section):
    """What is read, and how pictures and captions become a batch."""

    train: Sources
    """Shards to train on: a folder, a list of folders, or a list of {path, weight}."""
    validation: OptionalSources = None
    """Shards for image-text retrieval during training, given like `train`; null: none."""
    image_size: Positive = 224
    """Height and width of the model's input in pixels."""
    captions: Literal["first", "sample"] = "sample"
    """first: always the first caption. sample: drawn by weight, from (seed, epoch, id)."""
    augment: Augment = Augment()
    """Random changes of training pictures."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Loader processes per rank; null: from cores and ranks, printed."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Training stops when more than this share of the last 10,000 samples could not be read."""
    cache: Cache = Cache()
    """Copies of the shards that lie at URLs."""


class Vision(Section):
    """The image tower: a timm ViT, by name or by its sizes."""

    timm: str | None = None
    """Name of a timm VisionTransformer (randomly initialised); null: the four sizes below."""
    patch_size: Positive | None = None
    """Side of a square patch in pixels."""
    width: Positive | None = None
    """Width of the tokens."""
    depth: Positive | None = None
    """Number of transformer blocks."""
    num_heads: Positive | None = None
    """Attention heads per block; divides width."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of pictures that skip the last block in training, less for each block below it, 0 for the first."""


class Text(Section):
    """The text tower: a causal transformer of timm blocks over CLIP's BPE tokens."""

    width: Positive = 512
    """Width of the tokens."""
    depth: Positive = 12
    """Number of transformer blocks."""
    num_heads: Positive = 8
    """Attention heads per block; divides width."""
    context_length: Annotated[int, Field(ge=4, le=1024)] = 77
    """Most tokens of a caption, BOS and EOS included; longer captions are cut."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Of the MLPs; quick_gelu is what weights of OpenAI's CLIP were trained with."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that training zeroes behind the attention and the MLP of each block."""


class Frequency(Section):
    """The frequency branch: spectral blocks (global filters) beside the spatial tower."""

    placement: Literal["branch", "stem"] = "branch"
    """branch: beside the tower, for supervision; the plain ViT that remains without it loads in every other tool. stem:
    the first `depth` blocks of the tower are spectral, and its attention blocks go on from their tokens."""
    input: Literal["tokens", "dct"] = "dct"
    """tokens: the tower's patch tokens with positions, all that a stem reads. dct: an orthonormal block DCT of each
    patch's pixels."""
    width: Positive
    """Width of the branch; with input `tokens` another width than the tower's costs a linear layer."""
    depth: Positive = 2
    """Number of spectral blocks."""

    @model_validator(mode="before")
    @classmethod
    def _input_of_a_stem(cls, given: Any) -> Any:
        """Nothing else is possible there, so it need not be said."""
        return {"input": "tokens"} | given if isinstance(given, dict) and given.get("placement") == "stem" else given


class Merging(Section):
    """Token merging in the image tower."""

    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Fraction of the patch tokens that is gone at the end of the tower."""
    method: Literal["guided", "tome", "random_drop"] = "guided"
    """guided: merges spare tokens that matter. tome: bipartite soft matching by similarity alone. random_drop: training
    drops random patches, evaluation sees all (FLIP)."""
    guidance: Literal["mixed", "spatial", "frequency", "inverse"] = "mixed"
    """What says which tokens matter to guided merging: both domains, one of them, or (as a control) 1 - mixed."""
    strength: PositiveFloat = 0.25
    """How much guidance in [0, 1] weighs against a cosine similarity in guided merging."""
    at: tuple[Positive, ...] | None = None
    """Blocks before which tokens merge, counted from 1; null: two places in the first half of the tower, for
    random_drop the first block."""
    active: tuple[Share, Share] = (0.0, 1.0)
    """Part of the training in which tokens merge, as shares of its steps; before and after it none do."""


class Model(Section):
    """The architecture."""

    embed_dim: Positive = 512
    """Width of the joint space of images and texts."""
    token_dim: Positive = 128
    """Width of the joint space of patches and words, used by the token losses."""
    vision: Vision
    """The image tower."""
    text: Text = Text()
    """The text tower."""
    frequency: Frequency | None = None
    """The frequency branch; null: none."""
    merging: Merging | None = None
    """Token merging; null: none."""
    init: str | None = None
    """Start from weights (a new run): a run folder, a checkpoint, or open_clip:ARCH:FILE; null: random."""
    freeze: Literal["image", "text"] | None = None
    """Tower that stays as `init` made it, with its projection into the joint space; null: none."""


class GlobalLoss(Section):
    """One vector a picture against one vector a caption."""

    kind: Literal["infonce", "sigmoid"] = "infonce"
    """infonce: symmetric cross-entropy over the global batch (CLIP). sigmoid: every pair on its own (SigLIP)."""
    weight: PositiveFloat = 1.0
    """Factor in the total."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that infonce spreads evenly over the batch."""


class TokenLoss(Section):
    """Patches against words."""

    kind: Literal["sparc", "filip"] = "sparc"
    """sparc: each word against the patches it attends to, inside each pair (Bica et al. 2024). filip: for all pairs of
    the global batch, each patch's best word and each word's best patch (Yao et al., ICLR 2022)."""
    weight: PositiveFloat = 1.0
    """Factor in the total."""


class Losses(Section):
    """The weighted sum that is minimised: two domains x two levels, each term null or {kind, weight}."""

    spatial_global: GlobalLoss | None = GlobalLoss()
    """Image feature of the spatial tower against the text feature."""
    spatial_token: TokenLoss | None = None
    """Spatial patch tokens against words."""
    frequency_global: GlobalLoss | None = None
    """Feature of the frequency branch against the text feature."""
    frequency_token: TokenLoss | None = None
    """Tokens of the frequency branch against words."""
    positives: Literal["pair", "concept"] = "pair"
    """pair: a picture belongs to its own caption alone. concept: pictures of one concept (`concept` of the data's meta,
    else an equal caption) belong to each other's captions too, in losses over the batch."""


class Optim(Section):
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Term that keeps the division finite."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    """Decoupled weight decay; not on vectors, positions, class token, filters and scales."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps of linear warm-up."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate for each block below a tower's last one, for training on from `model.init`."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient; null: no clipping (the norm is logged either way)."""
    ema_horizon: Positive | None = None
    """Samples over which weights are averaged (exponentially; all of them in the beginning): the average is what is
    evaluated and what a checkpoint's model.safetensors holds; null: no average."""


class CheckpointEvery(Section):
    """When to save, besides the last step; whichever comes first."""

    steps: Positive | None = None
    """Every so many steps; null: not by steps."""
    minutes: PositiveFloat | None = 15.0
    """Every so many minutes; null: not by time."""


class Keep(Section):
    """Which checkpoints stay on disk."""

    last: Positive = 3
    """The newest ones."""
    best: Positive | None = None
    """Also the best ones by evaluate.best_metric; null: none."""
    every_steps: Positive | None = None
    """Also those whose step is a multiple of this; null: none."""


class Train(Section):
    """How long, how large, on what."""

    steps: Positive | None = None
    """Length in steps; exactly one of steps and epochs."""
    epochs: Positive | None = None
    """Length in passes over the data."""
    global_batch_size: Positive
    """Samples per step over all ranks."""
    micro_batch_size: Annotated[
        Positive | Literal["auto"] | None, Field(json_schema_extra={"x-expected": "a number, auto or null"})
    ] = None
    """Samples a forward pass, gradient of the whole batch (what is dropped at random differs); null: a rank's share.
    auto: on CUDA the largest half, quarter, ... of the share that fits into memory, elsewhere the share."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Autocast type of the towers; losses are always at least fp32. fp16 needs CUDA."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: cuda, mps (untested), cpu, in this order."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several ranks. ddp: each holds the whole model. fsdp: each holds its part of parameters, gradients and
    optimiser state, and gathers a block when it computes it."""
    grad_checkpointing: bool = False
    """Keep no activations inside the towers' blocks and compute them again for the gradient: less memory, about a
    third more time."""
    compile: bool = False
    """Compile the blocks with torch.compile: minutes at the start, quicker steps afterwards."""
    checkpoint_every: CheckpointEvery = CheckpointEvery()
    """When to save."""
    keep: Keep = Keep()
    """Which checkpoints stay."""

    @property
    def given_micro_batch_size(self) -> int | None:
        """The number in `micro_batch_size`, if it is one."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else None


class Evaluate(Section):
    """Measures during training."""

    every_steps: Positive | None = None
    """Steps between evaluations (the last step is always one); null: only at the end."""
    zeroshot: tuple[str, ...] = ()
    """Data sets of `mlip eval-zeroshot` to measure each time."""
    best_metric: str | None = None
    """Measure by which train.keep.best compares checkpoints, by its name in metrics.jsonl, larger is better; null:
    none."""


class Log(Section):
    """What is written while training."""

    every_steps: Positive = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write the same to RUN/tensorboard (pip install "mlip-cli[tensorboard]")."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project of Weights & Biases that gets the same (pip install "mlip-cli[wandb]"); null: none."""


class Recipe(Section):
    """A whole run: data, model, losses, optimiser, length."""

    extends: str | None = None
    """Another recipe that this one changes, relative to this file."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, order, augmentation and caption choice."""
    data: Data
    """What is read."""
    model: Model
    """What is trained."""
    losses: Losses = Losses()
    """What is minimised."""
    optim: Optim = Optim()
    """How it is minimised."""
    train: Train
    """How long and on what."""
    evaluate: Evaluate = Evaluate()
    """What is measured meanwhile."""
    log: Log = Log()
    """What is written."""
