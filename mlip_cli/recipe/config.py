"""The recipe as a tree of frozen models. Every field documents itself; `recipe/load.py` fills the tree from YAML."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mlip_cli.paths import is_elsewhere, read_dataset_name, read_path
from mlip_cli.recipe.init_source import read_init

LOSS_NAMES = (
    *("spatial_global", "spatial_words", "spatial_token"),
    *("frequency_global", "frequency_words", "frequency_token"),
    "align",
)
FREQUENCY_LOSSES = ("frequency_global", "frequency_words", "frequency_token", "align")
"""Losses that read what the spectral blocks make."""

VOCAB_SIZE = 49_408
"""Size of CLIP's byte-pair vocabulary; the last two ids are BOS and EOS."""

Size = Annotated[int, Field(gt=0, le=65_536)]
"""Pixels, or numbers in a vector."""
Blocks = Annotated[int, Field(gt=0, le=256)]
"""Blocks of a tower, heads, and places among blocks."""
Samples = Annotated[int, Field(gt=0, le=2**24)]
"""Samples that are in memory at once."""
Count = Annotated[int, Field(gt=0, le=10**9)]
"""Steps, passes, checkpoints."""
PositiveFloat = Annotated[float, Field(gt=0)]
AreaShare = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Pixel = tuple[Share, Share, Share]
"""Red, green and blue."""
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
Projection = Literal["linear", "with_bias", "none"]
Resize = Literal["crop", "squash"]
Clean = Literal["whitespace", "lower", "canonicalize"]


class Section(BaseModel):
    """A section of the recipe. It refuses unknown keys, converts no values, and never changes after loading."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


LocalPath = Annotated[str, AfterValidator(read_path)]
AnyPath = Annotated[str, AfterValidator(lambda path: path if is_elsewhere(path) else read_path(path))]
"""A path, a URL or a stream; `checks` knows which of them fits where."""


class Source(Section):
    """One folder of training data."""

    path: Annotated[AnyPath, Field(min_length=1)]
    """Folder that `mlip prepare-data` wrote, relative to the current folder, or its URL, such as s3://bucket/folder."""
    weight: PositiveFloat | None = None
    """Share of this folder in every batch, relative to the other weights. null: in proportion to its size."""
    format: Literal["shards", "webdataset"] = "shards"
    """shards: what `mlip prepare-data` wrote. webdataset: tars of any origin, as a folder or a pattern like
    tars/{0000..0099}.tar. Their captions are KEY.txt, a caption a line, or `captions` or `caption` in KEY.json.
    mlip indexes each tar once, in `data.cache`."""
    caption_column: Annotated[str, Field(min_length=1)] | None = None
    """For webdataset: the key of KEY.json that holds the caption, such as re_caption, or, with a dot, the field of a
    text, such as long.txt. null: as above."""
    image_column: Annotated[str, Field(min_length=1)] | None = None
    """For webdataset: the field of the picture, such as input.jpg, where a sample has several. null: the only one."""


def _as_sources(value: Any) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": v} if isinstance(v, str) else v for v in values) if value is not None else None


_SOURCES = tuple[Source, ...]
_SOURCES_INPUT = str | Source | list[str | Source]
_SOURCES_IN_WORDS = "a folder, a list of folders or a list of {path, weight}"

Sources = Annotated[
    _SOURCES,
    BeforeValidator(_as_sources, json_schema_input_type=_SOURCES_INPUT),
    Field(json_schema_extra={"x-expected": _SOURCES_IN_WORDS}),
]
OptionalSources = Annotated[
    Annotated[_SOURCES, Field(min_length=1)] | None,
    BeforeValidator(_as_sources, json_schema_input_type=_SOURCES_INPUT | None),
    Field(json_schema_extra={"x-expected": f"{_SOURCES_IN_WORDS}, or null"}),
]


class Augment(Section):
    """Random changes of training pictures, drawn from (seed, epoch, sample id)."""

    crop_scale: tuple[AreaShare, AreaShare] | None = (0.5, 1.0)
    """Smallest and largest share of the picture's area in a random crop. null: the centre crop of evaluation."""
    flip: bool = False
    """Mirror half of the pictures. Leave it off if captions say left or right."""
    color_jitter: Annotated[float, Field(gt=0, le=1)] | None = None
    """Largest relative change of brightness, contrast and saturation. null: no change."""


class Cache(Section):
    """Local copies of the shards that lie at URLs."""

    folder: LocalPath | None = None
    """Folder on a local disk. null: `mlip` in $XDG_CACHE_HOME, or in ~/.cache if that is not set."""
    gib: PositiveFloat = 100.0
    """Most that the cache holds, in GiB. All data of a run must fit. mlip deletes no copies: it names those that you
    may delete."""


def _above_zero(pixel: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(pixel):
        raise ValueError("the model divides by it; use numbers above 0")
    return pixel


class Data(Section):
    """The data, and how pictures and captions become a batch."""

    train: Sources
    """Data to train on: a folder, a list of folders, or a list of {path, weight, format}. []: none, in a run whose
    weights came from elsewhere."""
    validation: OptionalSources = None
    """Data for image-text retrieval during training, in the same form as `train`. null: no retrieval."""
    image_size: Size = 224
    """Height and width of the model's input, in pixels."""
    resize: Resize = "crop"
    """How a whole picture becomes square. crop: its short side is resized, and its centre cut out. squash: both sides
    are resized, as SigLIP was trained."""
    pixel_mean: Pixel = (0.48145466, 0.4578275, 0.40821073)
    """Mean of red, green and blue in [0, 1], which the model subtracts. Default: as published with CLIP."""
    pixel_std: Annotated[Pixel, AfterValidator(_above_zero)] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of red, green and blue, by which the model divides. Default: as published with CLIP."""
    captions: Literal["first", "sample"] = "sample"
    """first: always the first caption. sample: drawn by weight, from (seed, epoch, id)."""
    captions_per_image: Annotated[int, Field(gt=0, le=64)] = 1
    """Captions of a picture in a batch. Losses are means over them. A picture with fewer captions repeats them; no
    caption comes twice before all came once."""
    augment: Augment = Augment()
    """Random changes of training pictures."""
    num_workers: Annotated[int, Field(ge=0, le=1_024)] | None = None
    """Loader processes for each rank. null: mlip chooses from cores and ranks, and prints the number."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Training stops when more than this share of the last 10,000 samples cannot be read. While fewer were read, chance
    has room: at most 10, or three standard deviations above this share, whichever is more."""
    cache: Cache = Cache()
    """The cache for shards at URLs."""


class Vision(Section):
    """The image tower: a timm ViT, by name or by its sizes."""

    timm: str | None = None
    """Name of a timm VisionTransformer, with random weights. null: the four sizes below define the tower."""
    patch_size: Size | None = None
    """Side of a square patch in pixels."""
    width: Size | None = None
    """Width of the tokens."""
    depth: Blocks | None = None
    """Number of transformer blocks."""
    num_heads: Blocks | None = None
    """Attention heads in each block. The number must divide `width`."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the MLPs relative to `width`."""
    activation: Activation = "gelu"
    """Activation of the MLPs. OpenAI's CLIP weights were trained with quick_gelu."""
    norm_eps: PositiveFloat = 1e-6
    """Small term in the norms. CLIP has 1e-5, timm's towers 1e-6."""
    pre_norm: bool = False
    """A norm in front of the first block, as in CLIP; the patch embedding then has no bias."""
    layer_scale: PositiveFloat | None = None
    """Initial factor of what each block adds, which is learned. null: no such factor."""
    pool: Literal["mean", "mean_then_norm", "map"] | None = None
    """Source of the picture's feature. mean: the mean of the patch tokens after the last norm. mean_then_norm: the norm
    of their mean, beside a class token (CLIPA). map: a query that attends to them (SigLIP). null: the way of the
    architecture, which for a tower given by sizes is a class token. mean and map have no class token."""
    projection: Projection = "linear"
    """From the tower to the joint space: a matrix, a matrix and a bias, or nothing if both are equally wide."""
    init: Annotated[str, AfterValidator(read_path)] | None = None
    """Trained weights of the image tower alone that a new run starts from: a file of timm's weights of this tower, such
    as DINOv2's or AugReg's. null: none."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: probability of skipping the last block, falling linearly to 0 at the first."""


class TokenizerFile(Section):
    """A tokenizer of Hugging Face's `tokenizers`, in place of CLIP's byte-pair encoding. The text tower then always
    reads `context_length` tokens, and no loss over words or tokens can be used."""

    file: LocalPath
    """The file tokenizer.json. A run keeps a copy."""
    pad_id: Annotated[int, Field(ge=0, lt=2**20)]
    """Token behind the end of a caption."""
    zero_id: Annotated[int, Field(ge=0, lt=2**20)] | None = None
    """Token that is replaced by 0, as CLIPA does with the separator. null: none."""
    clean: Clean = "whitespace"
    """Cleaning of a caption before that: of white space; also to lower case; also of punctuation (SigLIP)."""


class Text(Section):
    """The text tower: a transformer of timm blocks, causal over CLIP's BPE tokens by default."""

    width: Size = 512
    """Width of the tokens."""
    depth: Blocks = 12
    """Number of transformer blocks."""
    num_heads: Blocks = 8
    """Attention heads in each block. The number must divide `width`."""
    context_length: Annotated[int, Field(ge=4, le=1024)] = 77
    """Most tokens of a caption, BOS and EOS included. Longer captions are cut."""
    vocab_size: Annotated[int, Field(gt=2, le=2**20)] = VOCAB_SIZE
    """Number of token ids. Another than CLIP's needs a `tokenizer`."""
    tokenizer: TokenizerFile | None = None
    """Tokenizer. null: CLIP's byte-pair encoding."""
    mlp_ratio: PositiveFloat = 4.0
    """Width of the MLPs relative to `width`."""
    activation: Activation = "gelu"
    """Activation of the MLPs. OpenAI's CLIP weights were trained with quick_gelu."""
    norm_eps: PositiveFloat = 1e-5
    """Small term in the norms."""
    causal: bool = True
    """A token attends to itself and to those before it. false: to all, with a `tokenizer` or pool last."""
    pool: Literal["eos", "last"] = "eos"
    """Source of the caption's feature: the token at the end of the caption, or the last of `context_length`."""
    eos_id: Annotated[int, Field(ge=0, lt=2**20)] | None = None
    """Token that ends a caption. null: the largest id, as in CLIP's vocabulary."""
    projection: Projection = "linear"
    """From the tower to the joint space: a matrix, a matrix and a bias, or nothing if both are equally wide."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability after the attention and the MLP of each block."""


class Frequency(Section):
    """Spectral blocks (global filters): the first stage of the image tower, or a branch beside it."""

    placement: Literal["stem", "branch"] = "stem"
    """stem: the first `depth` blocks of the tower are spectral, and the attention blocks continue from their tokens.
    branch: beside the tower, which stays a plain ViT. A branch on `dct` teaches the text tower alone; with
    losses.align it teaches the image tower too."""
    input: Literal["tokens", "dct"] = "dct"
    """tokens: the tower's patch tokens with positions; a stem always reads these. dct: an orthonormal block DCT of each
    patch's pixels."""
    width: Size | None = None
    """Width of a branch. With input `tokens`, a width other than the tower's adds a linear layer. null: the tower's
    width; a stem has no other."""
    depth: Blocks = 2
    """Number of spectral blocks."""

    @model_validator(mode="before")
    @classmethod
    def _input_of_a_stem(cls, given: Any) -> Any:
        """A stem reads tokens, so a recipe need not say so."""
        is_stem = isinstance(given, dict) and given.get("placement", "stem") == "stem"
        return {"input": "tokens"} | given if is_stem else given


class Merging(Section):
    """Token merging in the image tower."""

    rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Fraction of the patch tokens that are gone at the end of the tower."""
    method: Literal["guided", "tome", "random_drop"] = "guided"
    """guided: the merges that change least, where a change of an important token counts more. tome: the merges of the
    most similar tokens. random_drop: training drops random patches and evaluation sees all of them (FLIP)."""
    guidance: Literal["mixed", "spatial", "frequency", "inverse"] = "mixed"
    """Source of a token's importance in guided merging: both domains, one of them, or 1 - mixed as a control."""
    strength: PositiveFloat = 2.0
    """How much more a change of the most important token counts than one of the least important, in guided merging."""
    at: tuple[Blocks, ...] | None = None
    """Blocks before which tokens merge, counted from 1. null: a third of the tower's blocks, four or more, from the
    earliest possible one on; for random_drop, that one alone."""
    active: tuple[Share, Share] = (0.0, 1.0)
    """First and last share of the training steps in which tokens merge. No tokens merge before or after."""


class Model(Section):
    """Towers, frequency stage or branch, token merging, and the weights that they start from."""

    embed_dim: Size = 512
    """Width of the joint space of images and texts."""
    token_dim: Size = 128
    """Width of the joint space of patches and words. Token losses use it."""
    vision: Vision
    """The image tower."""
    text: Text = Text()
    """The text tower."""
    frequency: Frequency | None = None
    """The frequency stage of the image tower, or a branch beside it. null: neither."""
    merging: Merging | None = None
    """Token merging. null: no merging."""
    init: Annotated[str, AfterValidator(read_init)] | None = None
    """Weights that a new run starts from: a run folder, a checkpoint, open_clip:ARCH:FILE, or a folder of OpenCLIP or
    Hugging Face. A recipe without `model.vision` takes model, losses and pixels from that run too. null: random
    weights."""
    freeze: Literal["image", "text"] | None = None
    """Tower that keeps the weights of `init`, with its projection into the joint space. With `vision.init` the image
    tower alone: its projection, which is new, trains (LiT, Zhai et al., CVPR 2022). null: both towers train."""


class GlobalLoss(Section):
    """A loss between one vector for each picture and one for each caption."""

    kind: Literal["infonce", "sigmoid"] = "infonce"
    """infonce: symmetric cross-entropy over the global batch (CLIP). sigmoid: a binary loss for every pair (SigLIP)."""
    weight: PositiveFloat = 1.0
    """Factor in the total."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of infonce's target that is spread evenly over the batch."""


class WordsLoss(Section):
    """A loss between one vector for each picture and the words of its captions: which words of the batch are in them
    (after SuperCLIP, Zhao et al. 2025)."""

    weight: PositiveFloat = 1.0
    """Factor in the total."""


class TokenLoss(Section):
    """A loss between patches and words."""

    kind: Literal["pooled", "filip", "sparc"] = "pooled"
    """pooled: for all pairs of the global batch, the patches that a caption attends to against that caption (after
    FLAIR, Xiao et al., CVPR 2025). filip: for all pairs of the global batch, each patch's best word and each word's
    best patch (Yao et al., ICLR 2022). sparc: each word against the patches it attends to, inside each pair (Bica et
    al., ICML 2024); the words alone can lower it, whatever the picture shows."""
    weight: PositiveFloat = 1.0
    """Factor in the total."""


class Losses(Section):
    """The weighted sum that training minimises. Each term is null or a section with a weight."""

    spatial_global: GlobalLoss | None = GlobalLoss()
    """Image feature of the spatial tower against the text feature."""
    spatial_words: WordsLoss | None = None
    """Mean of the spatial patch tokens against the words of the batch."""
    spatial_token: TokenLoss | None = None
    """Spatial patch tokens against words."""
    frequency_global: GlobalLoss | None = None
    """Mean of the frequency tokens against the text feature."""
    frequency_words: WordsLoss | None = None
    """Mean of the frequency tokens against the words of the batch."""
    frequency_token: TokenLoss | None = None
    """Frequency tokens against words."""
    align: GlobalLoss | None = None
    """Image feature of the spatial tower against the feature of the branch, which then reads another crop of the
    picture. It needs model.frequency.placement branch."""
    positives: Literal["pair", "concept"] = "pair"
    """pair: a picture matches only its own caption. concept: in losses over the batch, pictures of one concept also
    match each other's captions. The concept is `concept` in the sample's meta, or else the first drawn caption."""

    @property
    def read_labels(self) -> bool:
        """Whether a batch needs the concept of each picture."""
        return self.positives == "concept"

    @property
    def read_other_crop(self) -> bool:
        """Whether a batch needs another crop of each picture."""
        return self.align is not None


class Optim(Section):
    """AdamW with linear warm-up and cosine decay to zero."""

    lr: PositiveFloat = 5e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Small term that keeps AdamW's division finite."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    """Decoupled weight decay. It skips vectors, positions, class token, filters and scales."""
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 2000
    """Steps of linear warm-up."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Lowers the learning rate by this factor block by block towards the input. Use it with `model.init`."""
    clip_grad_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient. null: no clipping. The norm is logged either way."""
    ema_horizon: Annotated[int, Field(gt=0, le=10**12)] | None = None
    """Samples over which weights are averaged exponentially. Evaluations and model.safetensors use the averaged
    weights; the raw weights needed to resume are saved beside them. null: no averaging."""


class CheckpointEvery(Section):
    """When to save, besides the last step: by steps or by time, whichever comes first."""

    steps: Count | None = None
    """Steps between checkpoints. null: not by steps."""
    minutes: PositiveFloat | None = 15.0
    """Minutes between checkpoints. null: not by time."""


class Keep(Section):
    """Which checkpoints stay on disk."""

    last: Count = 3
    """Number of newest checkpoints to keep."""
    best: Count | None = None
    """Number of best checkpoints to keep as well, by evaluate.best_metric. null: none."""
    every_steps: Count | None = None
    """Also keep checkpoints whose step is a multiple of this. null: none."""


class Train(Section):
    """How long training runs, on what device, and how it uses memory."""

    steps: Count | None = None
    """Length in steps. Give exactly one of `steps` and `epochs`."""
    epochs: Count | None = None
    """Length in passes over the data. Give exactly one of `steps` and `epochs`."""
    global_batch_size: Samples
    """Samples in a step, over all ranks."""
    micro_batch_size: Annotated[
        Samples | Literal["auto"] | None,
        Field(json_schema_extra={"x-expected": "a whole number above 0 and at most 16777216, auto or null"}),
    ] = None
    """Samples in one forward pass. The gradient stays that of the whole batch; only dropout, drop path and random_drop
    draw other numbers. null: the rank's share. auto: on CUDA the first of the share, its half, its quarter, ... that
    fits."""
    precision: Literal["auto", "bf16", "fp32", "fp16"] = "auto"
    """Autocast type of the towers, in training and its evaluations; losses are always at least fp32. On GPUs fp32 is
    fp32, without TF32, and takes several times as long as bf16. fp16 needs CUDA. auto: bf16 on CUDA GPUs and CPUs with
    units for it (Ampere or newer; AVX-512 BF16 or AMX), else fp32. A run keeps what it began with."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: the first that is present of cuda, mps (untested) and cpu."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share the model. ddp: each rank holds all of it. fsdp: each rank holds a part of parameters,
    gradients and optimiser state, and gathers a block when it computes it. Checkpoints are whole files either way."""
    grad_checkpointing: bool = False
    """Compute the activations inside the blocks a second time for the gradient: less memory, about a third more
    time."""
    compile: Annotated[bool | Literal["auto"], Field(json_schema_extra={"x-expected": "true, false or auto"})] = "auto"
    """Compile the blocks with torch.compile. Compiling costs a minute or more at the start, and time at each new number
    of tokens; steps are faster afterwards. auto: on CUDA, if there is a compiler."""
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

    every_steps: Count | None = None
    """Steps between evaluations. The last step is always evaluated. null: only the last step."""
    at_start: bool = False
    """Also evaluate before the first step, as step 0: then the run says what training gained and lost."""
    zeroshot: tuple[Annotated[str, AfterValidator(read_dataset_name)], ...] = ()
    """Data sets of `mlip eval-zeroshot` to measure at each evaluation."""
    best_metric: str | None = None
    """Name in metrics.jsonl of the measure by which train.keep.best compares checkpoints; larger is better. null:
    none."""


class Log(Section):
    """What is written while training."""

    every_steps: Count = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write the metrics to RUN/tensorboard. It needs pip install "mlip-cli[tensorboard]"."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Weights & Biases project that also receives the metrics. It needs pip install "mlip-cli[wandb]". Without a
    network they go to RUN/wandb, for `wandb sync`. null: none."""


class Recipe(Section):
    """One run: data, model, losses, optimiser, length."""

    extends: str | None = None
    """Recipe that this one changes, relative to this file."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, order, augmentation and caption choice."""
    data: Data
    """The data."""
    model: Model
    """The architecture."""
    losses: Losses = Losses()
    """The losses."""
    optim: Optim = Optim()
    """The optimiser."""
    train: Train
    """Length, device and memory."""
    evaluate: Evaluate = Evaluate()
    """What is measured during training."""
    log: Log = Log()
    """What is logged."""

    def in_precision(self, name: str) -> "Recipe":
        """A copy with another `train.precision`."""
        return self.model_copy(update={"train": self.train.model_copy(update={"precision": name})})
