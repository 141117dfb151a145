"""ONNX: one graph for pictures and one for captions, which onnxruntime runs without mlip and without PyTorch.

Merging stays in the graph. The number of tokens in each block is fixed when it is written, and the batch is free.
"""

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from mlip_cli import __version__
from mlip_cli.errors import RunError, UsageError
from mlip_cli.export.check import BOUND
from mlip_cli.files import write_json
from mlip_cli.recipe.config import VOCAB_SIZE
from mlip_cli.runs.loading import LoadedRun, MergedEncoder

IMAGE, TEXT, DESCRIPTION, TOKENIZER = "image.onnx", "text.onnx", "onnx.json", "tokenizer.json"
PIXELS, IMAGE_FEATURES = "pixels", "image_features"
TOKEN_IDS, TEXT_FEATURES = "token_ids", "text_features"

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20
"""Version of ONNX's operators: the first with GELU."""

MOST_IN_ONE_FILE = 3 * 2**29
"""Bytes of weights. A graph with more keeps them in a file beside it, because one file holds 2 GiB at most."""

BATCHES = (1, 3, 8)
"""Pictures and texts of the check; each graph must take every size."""


def check_packages() -> None:
    """Check that all packages for ONNX are installed, without importing them.

    Raises:
        UsageError: one of them is not.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(f'ONNX: {", ".join(missing)} {verb} not installed; pip install "mlip-cli[onnx]"')


class ImageGraph(nn.Module):
    """Pixels (B, 3, H, W) uint8 -> spatial features of unit length (B, E)."""

    def __init__(self, encoder: MergedEncoder) -> None:
        super().__init__()
        self.model, self.plan = encoder.model, encoder.plan

    def forward(self, pixels: Tensor) -> Tensor:
        return normalize(self.model.encode_image(pixels, self.plan).float(), dim=-1)


class TextGraph(nn.Module):
    """Token ids (B, context_length) -> features of unit length (B, E)."""

    def __init__(self, encoder: MergedEncoder) -> None:
        super().__init__()
        self.model = encoder.model

    def forward(self, token_ids: Tensor) -> Tensor:
        return normalize(self.model.encode_text(token_ids).float(), dim=-1)


def write_onnx(loaded: LoadedRun, encoder: MergedEncoder, folder: Path) -> list[str]:
    """Write image.onnx, text.onnx and onnx.json into `folder`; return a line about each thing that they do not hold.

    `loaded` is on the CPU, and `folder` exists.

    Raises:
        UsageError: a package is missing, or the plan drops patches at random.
    """
    check_packages()
    assert loaded.device.type == "cpu", loaded.device
    if encoder.plan.drops:
        raise UsageError("ONNX: drops of random patches belong to training; export with --merge-rate 0")
    size, length = loaded.model.image_size, loaded.model.context_length
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    _write_graph(ImageGraph(encoder), pixels, folder / IMAGE, names=(PIXELS, IMAGE_FEATURES))
    token_ids = torch.zeros(2, length, dtype=torch.int64)
    _write_graph(TextGraph(encoder), token_ids, folder / TEXT, names=(TOKEN_IDS, TEXT_FEATURES))
    tokenizer = loaded.recipe.model.text.tokenizer
    if tokenizer is not None:
        shutil.copyfile(tokenizer.file, folder / TOKENIZER)
    write_json(folder / DESCRIPTION, _description(loaded, encoder))
    return _not_held(loaded, encoder)


def _write_graph(graph: nn.Module, example: Tensor, path: Path, *, names: tuple[str, str]) -> None:
    """Write a graph of one input and one output whose first dimension is free."""
    with _quiet():
        program = torch.onnx.export(
            graph.eval(),
            (example,),
            dynamo=True,
            input_names=[names[0]],
            output_names=[names[1]],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # PyTorch notes the source files of this machine there
    num_bytes = sum(own.const_value.nbytes for own in program.model.graph.initializers.values() if own.const_value)
    program.save(path, external_data=num_bytes > MOST_IN_ONE_FILE)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ONNX for operations of merging that PyTorch does not translate, with the same results, ties included."""
    from onnxscript import opset20 as op

    def sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        """TopK of all: ONNX lets the lower index come first among equals, as a stable sort does."""
        length = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
        return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)

    def unstable_sort(values: Any, dim: int = -1, descending: bool = False) -> Any:
        return sort(values, dim=dim, descending=descending)

    def searchsorted(ordered: Any, values: Any, *, right: bool = False, **_: Any) -> Any:
        """How many of `ordered` are less than each value, or with `right` not above it."""
        ordered = op.Unsqueeze(ordered, op.Constant(value_ints=[-2]))
        values = op.Unsqueeze(values, op.Constant(value_ints=[-1]))
        is_below = op.LessOrEqual(ordered, values) if right else op.Less(ordered, values)
        return op.ReduceSum(op.Cast(is_below, to=INT64), op.Constant(value_ints=[-1]), keepdims=0)

    aten = torch.ops.aten
    return {
        aten.sort.stable: sort,
        aten.sort.default: unstable_sort,
        aten.searchsorted.Tensor: searchsorted,
    }


INT64 = 7
"""ONNX's number of the type."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes about its own work."""
    logger = logging.getLogger("onnxscript")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _description(loaded: LoadedRun, encoder: MergedEncoder) -> dict[str, Any]:
    """What a program must know to feed the graphs and to read their features."""
    model, data, text = loaded.model, loaded.recipe.data, loaded.recipe.model.text
    loss = loaded.recipe.losses.spatial_global
    scale, bias = (kind.get("spatial_global") for kind in (model.log_scales, model.logit_biases))
    own = text.tokenizer
    return {
        "mlip_version": __version__,
        "embed_dim": loaded.recipe.model.embed_dim,
        "image_size": model.image_size,
        "resize": data.resize,
        "interpolation": "bicubic, antialiased",
        "pixels": "uint8, red green blue, (batch, 3, height, width); the graph normalises them",
        "context_length": model.context_length,
        "tokenizer": "CLIP's byte-pair encoding: BOS, caption, EOS, zeros"
        if own is None
        else {"file": TOKENIZER, **own.model_dump(exclude={"file"})},
        "loss": None if loss is None else loss.kind,
        "logit_scale": None if scale is None else scale.exp().item(),
        "logit_bias": None if bias is None else bias.item(),
        "merge_rate": encoder.plan.rate,
        "merge_method": encoder.plan.method if encoder.plan.at else None,
        "tokens_per_block": list(encoder.plan.tokens),
    }


def _not_held(loaded: LoadedRun, encoder: MergedEncoder) -> list[str]:
    model, plan = loaded.model, encoder.plan
    lines = [f"resizing of pictures and the tokenizer are not in the graphs; {DESCRIPTION} says what they expect"]
    if model.frequency_projection is not None:
        lines.append(f"the frequency feature is not in {IMAGE}, which gives the spatial one")
    if model.token_projections:
        lines.append("features of single patches and words, which only losses read, are left out")
    if plan.at:
        lines.append(
            f"{IMAGE} always merges ({plan.method}, rate {plan.rate:.3f}); another rate takes another export. Where "
            "two merges cost nearly the same, onnxruntime may choose the other one, because it rounds otherwise"
        )
    return lines


@torch.no_grad()
def check_onnx(loaded: LoadedRun, encoder: MergedEncoder, folder: Path) -> float:
    """The largest difference of a number in the features of onnxruntime to those of the model, on random input.

    Where tokens merge, half of the pictures may differ by more than `BOUND`, for two merges may cost nearly the same.

    Raises:
        RunError: a difference above `BOUND`, or a graph that does not run.
    """
    check_packages()
    generator = torch.Generator().manual_seed(0)
    ids = VOCAB_SIZE if loaded.recipe.model.text.tokenizer is None else loaded.recipe.model.text.vocab_size
    images: list[Tensor] = []
    texts: list[Tensor] = []
    image_graph, text_graph = _session(folder / IMAGE), _session(folder / TEXT)
    for n in BATCHES:
        pixels = random_pictures(n, loaded.model.image_size, generator)
        token_ids = torch.randint(1, ids, (n, loaded.model.context_length), generator=generator)
        for graph, run, given, found in (
            (ImageGraph(encoder), image_graph, pixels, images),
            (TextGraph(encoder), text_graph, token_ids, texts),
        ):
            found.append((graph(given) - run(given)).abs().amax(-1))
    of_images, of_texts = torch.cat(images), torch.cat(texts)
    measured = {IMAGE: of_images.median() if encoder.plan.at else of_images.max(), TEXT: of_texts.max()}
    for name, difference in measured.items():
        if not difference <= BOUND:  # NaN too
            raise RunError(
                f"{folder / name}: onnxruntime's features differ from the model's by {difference:.1e}, more than "
                f"{BOUND:g}; try other versions of onnxruntime and torch"
            )
    return max(of_images.max().item(), of_texts.max().item())


def random_pictures(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Noise on patches of one colour, and between them patches of one colour alone: (n, 3, size, size) uint8."""
    cells = torch.randint(0, 256, (n, 3, 4, 4), generator=generator).float()
    flat = interpolate(cells, size=size)
    noise = torch.randint(-64, 65, flat.shape, generator=generator)
    noisy = interpolate(torch.randint(0, 2, (n, 1, 4, 4), generator=generator).float(), size=size)
    return (flat + noise * noisy).clamp(0, 255).to(torch.uint8)


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    """A graph as a function, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises another type for every kind of fault
        raise RunError(f"{path}: onnxruntime cannot read it ({str(error).splitlines()[0]})") from error
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])
