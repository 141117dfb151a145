"""What the losses cost: token losses beside a step, exact FILIP against the naive form, the sigmoid loss in chunks.

    make bench                    or, alone:    python tests/benchmarks/bench_losses.py

Everything that is compared runs in turn in one process; ratios are medians inside rounds. Memory is that of tensors at
most, by PyTorch's allocator, the inputs not counted.
"""

import json
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mlip_cli.devices import device_name
from mlip_cli.losses.contrastive import CHUNK_LOGITS, cross_entropy, sigmoid_loss
from mlip_cli.losses.filip import CHUNK_SIMILARITIES_ELSEWHERE, filip_scores, filip_words
from mlip_cli.losses.objective import Objective
from mlip_cli.losses.pooled import caption_queries, pooled_scores
from mlip_cli.losses.words import count_captions, words_sum
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import build_model
from mlip_cli.model.text import word_mask
from mlip_cli.profiling.timing import measure_interleaved
from mlip_cli.recipe.config import VOCAB_SIZE, Recipe
from mlip_cli.terminal.output import print_lines, print_table
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.train.noise import noise_batch

CPU = torch.device("cpu")
PAIRS, PATCHES, WORDS, TOKEN_DIM, ROUNDS = 256, 64, 16, 128, 5
MIB, GIB = 2**20, 2**30
RECIPE = {
    "data": {"train": "unused", "image_size": 64},
    "model": {
        "embed_dim": 128,
        "vision": {"patch_size": 8, "width": 128, "depth": 6, "num_heads": 2},
        "text": {"width": 128, "depth": 4, "num_heads": 2, "context_length": WORDS},
    },
    "train": {"steps": 1, "global_batch_size": PAIRS},
}
"""Plain CLIP with 64 patches: beside so small a tower losses cost the most."""


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes of the tensors that `function` makes, at most at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def whole_step(recipe: Recipe, pairs: int) -> Callable[[], object]:
    """Forward, loss and backward."""
    model = build_model(recipe).train()
    set_fused_attention(model, False)
    batch = noise_batch(recipe, batch_size=pairs, num_tokens=WORDS, device=CPU)
    objective, plan, precision = Objective(recipe.losses), model.training_plan, Precision.named("fp32", CPU)

    def run() -> None:
        add_gradients(model, objective, batch, precision=precision, micro_batch_size=None, plan=plan)
        model.zero_grad(set_to_none=True)

    return run


def words(pairs: int) -> Callable[[], object]:
    """The loss over the words of one domain, from its mean token on; captions draw from as many words as pairs."""
    token_ids = torch.randint(1, 3 * pairs, (pairs, WORDS))
    token_ids[:, 0], token_ids[:, -1] = VOCAB_SIZE - 2, VOCAB_SIZE - 1
    head, embeddings = torch.nn.Linear(TOKEN_DIM, TOKEN_DIM, bias=False), torch.nn.Embedding(3 * pairs, TOKEN_DIM)
    tokens = torch.randn(pairs, PATCHES, TOKEN_DIM).requires_grad_()

    def run() -> None:
        mask = word_mask(token_ids)
        counts = count_captions(token_ids, mask)
        vocabulary = embeddings(counts.word_ids)
        loss = words_sum(head(tokens.mean(1)), vocabulary, token_ids, mask, torch.tensor([14.0]), counts)
        (loss / counts.with_words).backward()

    return run


def over_batch(kind: str, pairs: int) -> Callable[[], object]:
    """A token loss over the batch of one domain, with its heads."""
    patches, sizes, text_tokens, mask = token_inputs(pairs)
    heads = [torch.nn.Linear(TOKEN_DIM, TOKEN_DIM, bias=False) for _ in range(2)]
    scale = torch.tensor([14.0])

    def run() -> None:
        own, texts = heads[0](patches), heads[1](text_tokens)
        if kind == "pooled":
            scores = pooled_scores(own, sizes, caption_queries(texts, mask), scale)
            loss = sum(cross_entropy(scale * x, offset=0) for x in (scores, scores.T))
        else:
            both = filip_scores(own, sizes, *filip_words(texts, mask))
            loss = sum(cross_entropy(scale * x, offset=0) for x in (both[0], both[1].T))
        loss.backward()

    return run


def test_token_losses_beside_a_step() -> None:
    """What one domain's loss adds, as a share of the step of plain CLIP; and how it grows with the batch."""
    recipe = Recipe.model_validate_json(json.dumps(RECIPE))
    makers = {"words": words, "pooled": partial(over_batch, "pooled"), "filip": partial(over_batch, "filip")}
    rows = []
    for pairs in (PAIRS, 4 * PAIRS):
        step = whole_step(recipe, pairs)
        functions = {"step": step} | {name: make(pairs) for name, make in makers.items()}
        timings = measure_interleaved(functions, ROUNDS)
        for name in makers:
            shares = [own / whole for own, whole in zip(timings[name].seconds, timings["step"].seconds, strict=True)]
            low, high = min(shares), max(shares)
            share = f"{median(shares):.1%} ({low:.1%}-{high:.1%})"
            memory, of_step = (peak_bytes(functions[which]) / MIB for which in (name, "step"))
            rows.append([f"{pairs}", name, share, f"{memory:.0f}", f"{of_step:.0f}"])
    print_table(["pairs", "loss", "of the step's time (range)", "MiB", "MiB of the step"], rows)
    print_lines(
        f"{PATCHES} patches, {WORDS} words, {TOKEN_DIM} dimensions, fp32, {device_name(CPU)}, "
        f"{torch.get_num_threads()} threads; words grow with the pairs times their words, pooled and filip with the "
        "square of the pairs: per step, 4 times as many pairs have 4 times the share"
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


LARGE = (64, 4096, 49, 77)
"""Pictures of a rank, captions of all ranks, patches, words."""
LARGE_ROUNDS = 3


def test_filip_at_the_size_of_a_large_batch() -> None:
    """Tokens of fp32 and of bf16, whose products run on the units for half precision; seconds are those of a core."""
    pictures, captions, num_patches, num_words = LARGE
    patches, words = torch.randn(pictures, num_patches, TOKEN_DIM), torch.randn(captions, num_words, TOKEN_DIM)
    sizes, mask = torch.ones(pictures, num_patches), torch.ones(captions, num_words, dtype=torch.bool)
    functions = {
        str(dtype).removeprefix("torch."): partial(
            exact, patches.to(dtype).requires_grad_(), sizes, words.to(dtype).requires_grad_(), mask
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    timings = measure_interleaved(functions, LARGE_ROUNDS)
    held = pictures * captions * num_patches * num_words * 4 / GIB
    rows = [
        [name, f"{timing.median_s:.1f}", f"{timing.speedup:.2f}", f"{peak_bytes(functions[name]) / GIB:.2f}"]
        for name, timing in timings.items()
    ]
    print_table(["tokens", "s", "x fp32", "peak GiB"], rows)
    print_lines(f"{pictures} x {captions}, {num_patches} patches, {num_words} words: {held:.1f} GiB of similarities")


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
    test_token_losses_beside_a_step()
    test_exact_filip_against_the_naive_form()
    test_sigmoid_loss_in_chunks()
