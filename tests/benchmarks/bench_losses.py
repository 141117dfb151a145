"""What the losses cost: four terms against one, exact FILIP against the naive form, the sigmoid loss in chunks.

    make bench                    or, alone:    python tests/benchmarks/bench_losses.py

Four against one: with a ViT-S/16 at 224 px, the parts that only the losses need, which are the token heads, the
projection of the frequency feature and the losses themselves, forward and backward, from given tower outputs. Their
time with four terms less that with one, over the time of a whole plain CLIP step (forward, loss and backward). What
the frequency branch costs is none of it: it is a column of its own, the whole step of four terms less all of this.

Everything that is compared runs in turn in one process; ratios are medians inside rounds. Memory is that of tensors at
most, by PyTorch's allocator, the inputs not counted.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mlip_cli.devices import device_name
from mlip_cli.losses.contrastive import CHUNK_LOGITS, sigmoid_loss
from mlip_cli.losses.features import features_of
from mlip_cli.losses.filip import CHUNK_SIMILARITIES_ELSEWHERE, filip_scores, filip_words
from mlip_cli.losses.objective import Objective
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import CLIP
from mlip_cli.profiling.timing import measure_interleaved
from mlip_cli.recipe.config import Frequency, GlobalLoss, Losses, Model, Text, TokenLoss, Vision
from mlip_cli.terminal.output import print_lines, print_table
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.types import VOCAB_SIZE, Batch, Encoded

CPU = torch.device("cpu")
BATCH_SIZE, NUM_TOKENS, ROUNDS = 32, 16, 5
PATCHES, WORDS, TOKEN_DIM = 64, 16, 128
ONE = Losses()
FOUR = {
    kind: Losses(
        frequency_global=GlobalLoss(), spatial_token=TokenLoss(kind=kind), frequency_token=TokenLoss(kind=kind)
    )
    for kind in ("sparc", "filip")
}
MIB, GIB = 2**20, 2**30


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of the tensors that `function` makes, at most at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def vit_s_16(losses: Losses) -> CLIP:
    """Towers of the small size, with a frequency branch of two blocks where a loss asks for it."""
    kinds = {
        name: term.kind for name in losses.model_fields_set | {"spatial_global"} if (term := getattr(losses, name))
    }
    config = Model(
        vision=Vision(timm="vit_small_patch16_224"),
        text=Text(width=384, depth=12, num_heads=6, context_length=NUM_TOKENS),
        frequency=Frequency(width=384, depth=2) if "frequency_global" in kinds else None,
    )
    torch.manual_seed(0)
    model = CLIP(config, image_size=224, losses=kinds, global_batch_size=BATCH_SIZE)
    set_fused_attention(model, False)
    return model.train()


def noise_batch() -> Batch:
    """Captions of all lengths that fit."""
    images = torch.randint(256, (BATCH_SIZE, 3, 224, 224), dtype=torch.uint8)
    token_ids = torch.randint(1, VOCAB_SIZE - 2, (BATCH_SIZE, NUM_TOKENS))
    ends = torch.arange(BATCH_SIZE) % (NUM_TOKENS - 3) + 3
    token_ids[:, 0] = VOCAB_SIZE - 2
    token_ids[torch.arange(BATCH_SIZE), ends] = VOCAB_SIZE - 1
    return Batch(images, token_ids, keys=("",) * BATCH_SIZE)


def whole_step(model: CLIP, losses: Losses, batch: Batch) -> Callable[[], object]:
    """Forward, losses and backward."""
    precision = Precision.named("fp32", CPU)
    plan = model.training_plan
    return lambda: add_gradients(model, Objective(losses), batch, precision=precision, micro_batch_size=None, plan=plan)


def only_for_losses(model: CLIP, losses: Losses, batch: Batch) -> Callable[[], object]:
    """Heads that exist for losses alone, losses, and the way back to what the towers gave."""
    heads = {f"{name}_tokens": head for name, head in model.token_projections.items()}
    heads["image_tokens"] = heads.pop("spatial_tokens", None)  # type: ignore[arg-type]
    heads["frequency_features"] = model.frequency_projection  # type: ignore[assignment]
    heads = {name: head for name, head in heads.items() if head is not None}
    inputs: dict[str, Tensor] = {}
    hooks = [
        head.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
        for name, head in heads.items()
    ]
    encoded: Encoded = model(batch, model.training_plan)
    for hook in hooks:
        hook.remove()
    objective = Objective(losses)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    towers = {name: getattr(encoded, name).detach().requires_grad_() for name in ("image_features", "text_features")}
    scales = {name: scale.detach().requires_grad_() for name, scale in encoded.scales.items()}

    def run() -> None:
        own = {name: heads[name](leaf) for name, leaf in leaves.items()}
        given = replace(encoded, **towers, **own, scales=scales)
        terms = objective.batch_terms(features_of(given, token_losses=objective.batch_token_losses))
        terms |= objective.sample_terms(given, objective.count_captions(given.text_mask))
        objective.total(terms).backward()
        model.zero_grad(set_to_none=True)

    return run


def test_four_terms_against_one() -> None:
    batch, rows = noise_batch(), []
    one = vit_s_16(ONE)
    for kind, losses in FOUR.items():
        four = vit_s_16(losses)
        functions = {
            "step of one": whole_step(one, ONE, batch),
            "step of four": whole_step(four, losses, batch),
            "losses of one": only_for_losses(one, ONE, batch),
            "losses of four": only_for_losses(four, losses, batch),
        }
        timings = measure_interleaved(functions, ROUNDS)
        seconds = {name: timing.seconds for name, timing in timings.items()}
        rounds = list(zip(*seconds.values(), strict=True))
        extra = median((losses4 - losses1) / step1 for step1, _, losses1, losses4 in rounds)
        branch = median((step4 - losses4 - step1 + losses1) / step1 for step1, step4, losses1, losses4 in rounds)
        medians = [f"{median(values):.3f}" for values in seconds.values()]
        rows.append([kind, *medians, f"{extra:.1%}", f"{branch:.1%}"])
    columns = ["token loss", *(f"{name} s" for name in functions), "(four - one) / step of one", "frequency branch"]
    print_table(columns, rows)
    print_lines(
        f"ViT-S/16 at 224 px, batch of {BATCH_SIZE}, {NUM_TOKENS} text tokens, fp32, {device_name(CPU)}, "
        f"{torch.get_num_threads()} threads; aim for the last but one column: 3 % or less"
    )


def token_inputs(pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    patches = torch.randn(pairs, PATCHES, TOKEN_DIM).requires_grad_()
    words = torch.randn(pairs, WORDS, TOKEN_DIM).requires_grad_()
    mask = torch.arange(WORDS)[None] < torch.randint(3, WORDS + 1, (pairs, 1))
    return patches, torch.ones(pairs, PATCHES), words, mask


def exact(patches: Tensor, sizes: Tensor, words: Tensor, mask: Tensor) -> None:
    image_scores, text_scores = filip_scores(patches, sizes, *filip_words(words, mask))
    (image_scores + text_scores).logsumexp(1).sum().backward()


def naive(patches: Tensor, sizes: Tensor, words: Tensor, mask: Tensor) -> None:
    similarity = torch.einsum("ipd,jld->ijpl", F.normalize(patches, dim=-1), F.normalize(words, dim=-1))
    image_scores = similarity.masked_fill(~mask[None, :, None], -torch.inf).max(3).values.mean(-1)
    text_scores = (similarity.max(2).values * mask).sum(-1) / mask.sum(-1)
    (image_scores + text_scores).logsumexp(1).sum().backward()


def filip_bytes(pairs: int, patches: int, words: int) -> tuple[float, float]:
    """What the exact and the naive form need by formula, in fp32.

    The exact form: the places of the maxima, four scores a pair, tokens normalised and their gradients (four times
    their size), a chunk's similarities and a quarter more for its maxima with 64-bit places. The naive form:
    similarities four times, as they are, masked, and both gradients.
    """
    places = pairs * pairs * (patches + words) * (1 if max(patches, words) <= 256 else 2)
    tokens = 4 * 4 * pairs * (patches + words) * TOKEN_DIM
    chunk = 1.25 * 4 * max(CHUNK_SIMILARITIES_ELSEWHERE, pairs * patches * words)
    return places + 4 * 4 * pairs * pairs + tokens + chunk, 4 * 4 * pairs * pairs * patches * words


def test_exact_filip_against_the_naive_form() -> None:
    rows = []
    for pairs in (64, 256):
        inputs = token_inputs(pairs)
        functions = {"naive": partial(naive, *inputs), "exact": partial(exact, *inputs)}
        timings = measure_interleaved(functions, ROUNDS)
        by_formula = dict(zip(("exact", "naive"), filip_bytes(pairs, PATCHES, WORDS), strict=True))
        for name, timing in timings.items():
            rows.append(
                [
                    f"{pairs}",
                    name,
                    f"{timing.median_s:.3f}",
                    f"{timing.speedup:.2f} ({timing.speedup_interval[0]:.2f}-{timing.speedup_interval[1]:.2f})",
                    f"{peak_bytes(functions[name]) / MIB:.0f}",
                    f"{by_formula[name] / MIB:.0f}",
                ]
            )
    print_table(["pairs", "form", "s", "x naive (95 %)", "MiB measured", "MiB by formula"], rows)
    larger = [
        [f"{pairs}", f"{patches} x {words}", *(f"{b / GIB:.2f}" for b in filip_bytes(pairs, patches, words))]
        for pairs, patches, words in ((1024, 64, 16), (4096, 98, 32), (4096, 196, 77))
    ]
    print_table(["pairs", "patches x words", "exact GiB by formula", "naive GiB by formula"], larger)
    print_lines(f"{TOKEN_DIM} dimensions, fp32, forward and backward, {torch.get_num_threads()} threads")


def test_sigmoid_loss_in_chunks() -> None:
    rows = []
    for pairs in (1024, 4096):
        images, texts = (F.normalize(torch.randn(pairs, 512), dim=-1).requires_grad_() for _ in range(2))
        scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)

        def run(
            chunk: int,
            images: Tensor = images,
            texts: Tensor = texts,
            scale: Tensor = scale,
            bias: Tensor = bias,
        ) -> None:
            sigmoid_loss(images, texts, scale, bias, offset=0, chunk_logits=chunk).backward()

        functions = {"at once": partial(run, pairs * pairs), "in chunks": partial(run, CHUNK_LOGITS)}
        for name, timing in measure_interleaved(functions, ROUNDS).items():
            low, high = timing.speedup_interval
            rows.append(
                [
                    f"{pairs}",
                    name,
                    f"{timing.median_s:.3f}",
                    f"{timing.speedup:.2f} ({low:.2f}-{high:.2f})",
                    f"{peak_bytes(functions[name]) / MIB:.0f}",
                ]
            )
    print_table(["pairs", "form", "s", "x at once (95 %)", "MiB measured"], rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    test_four_terms_against_one()
    test_exact_filip_against_the_naive_form()
    test_sigmoid_loss_in_chunks()
