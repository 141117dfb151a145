"""Blocks that are skipped, computed twice or compiled: the same losses and gradients as plain ones."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from forks_for_tests import own_group
from killed_for_tests import Forked
from models_for_tests import small_batch, small_model, small_recipe, with_lengths
from test_gradients import CPU, gradients, relative_error
from test_packing import web_lengths
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

from mlip_cli.distributed import full, process_group, rank, unwrap, wrap
from mlip_cli.losses.objective import Objective
from mlip_cli.model import blocks, packing
from mlip_cli.model.blocks import MOST_COMPILED_FORMS, Compiled
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.checks import check
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.train.setup import compile_facts, compiles


def gradients_of(
    model: CLIP, recipe: Recipe, *, micro_batch_size: int | None = None, plan: MergePlan | None = None
) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    precision, objective = Precision.named("fp32", CPU), Objective(recipe.losses)
    add_gradients(
        model,
        objective,
        small_batch(),
        precision=precision,
        micro_batch_size=micro_batch_size,
        plan=plan or model.training_plan,
    )
    return gradients(model)


def dropping() -> Recipe:
    recipe = small_recipe(model={"text": {"width": 32, "depth": 2, "num_heads": 2, "dropout": 0.2}})
    vision = recipe.model.vision.model_copy(update={"drop_path": 0.4})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"vision": vision})})


def test_blocks_are_skipped_more_often_the_higher_they_stand_and_never_in_evaluation() -> None:
    model = small_model(dropping())
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.vision.trunk.blocks]
    assert rates == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    images = small_batch().images
    assert torch.equal(model.eval().encode_image(images, model.plan), model.encode_image(images, model.plan))
    assert not torch.equal(model.train().encode_image(images, model.plan), model.encode_image(images, model.plan))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_recomputed_activations_give_the_same_gradient(micro_batch_size: int | None) -> None:
    """With dropout and skipped blocks, which have to be drawn again as they were."""
    recipe = dropping()
    plain = gradients_of(small_model(recipe), recipe, micro_batch_size=micro_batch_size)
    model = small_model(recipe)
    model.set_grad_checkpointing()
    inside = 0

    def count(module: torch.nn.Module, inputs: object) -> None:
        nonlocal inside
        inside += 1

    for block in [*model.vision.trunk.blocks, *model.text.blocks]:
        block.mlp.register_forward_pre_hook(count)
    again = gradients_of(model, recipe, micro_batch_size=micro_batch_size)
    assert relative_error(again, plain) < 1e-12
    passes = {None: 2, 3: 3 * 3}[micro_batch_size]  # of each of three parts: once without graph, twice with it
    assert inside == passes * 6


def test_a_locked_tower_has_nothing_to_skip() -> None:
    recipe = dropping()
    model = recipe.model.model_copy(update={"init": "run", "freeze": "image"})
    assert check(recipe.model_copy(update={"model": model})) == [
        ("model.vision.drop_path", "0.4 has no effect in a frozen tower; set it to 0")
    ]


SHALLOW: dict[str, Any] = {
    "vision": {"patch_size": 8, "width": 32, "depth": 3, "num_heads": 2},
    "text": {"width": 32, "depth": 1, "num_heads": 2, "context_length": 16},
}
"""Few blocks, as compiling takes seconds for each form of each kind of block."""


@pytest.fixture
def config_of_compile() -> Iterator[None]:
    """What `Compiled` sets for the whole process is put back."""
    with torch._dynamo.config.patch(
        {
            "recompile_limit": 8,
            "accumulated_recompile_limit": 256,
            "fail_on_recompile_limit_hit": False,
            "optimize_ddp": True,
        }
    ):
        torch.compiler.reset()
        yield
        torch.compiler.reset()


def compiled_blocks(model: CLIP, backend: Any) -> Compiled:
    return Compiled(fixed=model.picture_blocks(), varying=model.text.blocks, backend=backend)


@pytest.mark.slow
def test_compiled_blocks_have_forms_for_every_rate_of_drop_path(
    config_of_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a tower of 3 blocks each drops at a rate of its own; the batch is cut, and tokens merge or not."""
    monkeypatch.setattr(blocks, "MOST_COMPILED_FORMS", 10)
    recipe = small_recipe(model=SHALLOW | {"vision": SHALLOW["vision"] | {"drop_path": 0.4}})
    model = small_model(recipe)
    compiled = compiled_blocks(model, "eager")
    model.train()
    for plan in (model.plan, model.merge_plan(0.0)):
        gradients_of(model, recipe, micro_batch_size=3, plan=plan)
    assert compiled.failure is None


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradient_at_every_length_of_text(config_of_compile: None) -> None:
    """By graphs and autograd as compiled code has them; what writes the machine's code is left to torch's own tests."""
    recipe = small_recipe(model=SHALLOW)
    plain, compiled = (small_model(recipe) for _ in range(2))
    names = list(compiled.state_dict())
    counters = torch._dynamo.utils.counters
    counters.clear()
    state = compiled_blocks(compiled, "aot_eager")
    assert list(compiled.state_dict()) == names
    expected = gradients_of(plain, recipe, micro_batch_size=3)
    assert relative_error(gradients_of(compiled, recipe, micro_batch_size=3), expected) < 1e-10
    with torch.no_grad():
        for length in (8, 10, 12, 16):
            token_ids = small_batch(length=length).token_ids
            torch.testing.assert_close(compiled.encode_text(token_ids), plain.encode_text(token_ids))
    assert not counters["graph_break"]
    assert state.failure is None
    assert 0 < counters["stats"]["unique_graphs"] < MOST_COMPILED_FORMS / 2


def broken(graph: torch.fx.GraphModule, inputs: object) -> Any:
    """A compiler that fails."""
    raise RuntimeError("no room for\nmore code")


BROKEN_BACKWARD = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=broken)
"""It fails for the backward pass, which by itself would be compiled when it is needed first."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "forms", "why"),
    [
        (broken, 64, "RuntimeError: no room for"),
        (BROKEN_BACKWARD, 64, "RuntimeError: no room for"),
        ("eager", 1, "a kind of block has more than 1 forms"),
    ],
    ids=["a compiler that fails", "of the backward pass", "too many"],
)
def test_blocks_that_cannot_be_compiled_run_as_they_are(
    config_of_compile: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    backend: Any,
    forms: int,
    why: str,
) -> None:
    """With one warning, and the same gradient."""
    monkeypatch.setattr(blocks, "MOST_COMPILED_FORMS", forms)
    recipe = small_recipe(model=SHALLOW)
    plain, compiled = (small_model(recipe) for _ in range(2))
    compiled_blocks(compiled, backend)
    for size in (None, 3):
        expected = gradients_of(plain, recipe, micro_batch_size=size)
        assert relative_error(gradients_of(compiled, recipe, micro_batch_size=size), expected) < 1e-12
    [line] = [record.message for record in caplog.records if record.name == "mlip_cli"]
    assert line == f"train.compile: the blocks run without compiling from here on: {why}"


def test_auto_compiles_on_cuda_with_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    recipe = small_recipe()
    assert recipe.train.compile == "auto"
    monkeypatch.setenv("CC", "cc1")
    monkeypatch.setenv("PATH", str(tmp_path))
    needs = "train.compile auto: nothing is compiled, which needs a C compiler, cc1; apt install g++"
    assert (compiles(recipe, cuda), compile_facts(recipe, cuda)) == (False, [needs])
    (tmp_path / "cc1").touch(mode=0o755)
    assert compiles(recipe, cuda)
    assert "a minute or more" in compile_facts(recipe, cuda)[0]
    assert (compiles(recipe, cpu), compile_facts(recipe, cpu)) == (False, [])
    for wanted in (False, True):
        asked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": wanted})})
        for device in (cpu, cuda):
            assert compiles(asked, device) is wanted
            told = ["train.compile true: the first steps compile the blocks, which takes a minute or more"]
            assert compile_facts(asked, device) == (told if wanted else [])


def gradients_of_ranks(lengths: Sequence[int], environment: dict[str, str], out: str) -> None:
    """Body of one forked rank: gradients by compiled blocks under DDP (a bucket for each parameter) and FSDP, and by
    plain ones."""
    own_group()
    os.environ.update(environment)
    torch.set_num_threads(1)
    recipe, counters, graphs = small_recipe(model=SHALLOW), torch._dynamo.utils.counters, 0

    def counting(*given: Any, **named: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return aot_eager(*given, **named)

    with process_group(CPU):
        models = []
        for is_compiled, parallel in ((True, "ddp"), (True, "fsdp"), (False, "ddp")):
            model = small_model(recipe).train()
            if is_compiled:
                compiled_blocks(model, counting)
            sharded = parallel == "fsdp"
            small_buckets = partial(DistributedDataParallel, bucket_cap_mb=0.001)
            models.append(wrap(model, CPU, parallel="fsdp", units=model.blocks()) if sharded else small_buckets(model))
        errors = []
        for length, micro in product(lengths, (None, 2)):
            batch = small_batch(length=length, words=[1, 2, 3, 4, 5, 6, 1, 2]).split(4)[rank()]
            found = []
            for model in models:
                model.zero_grad()
                plan = unwrap(model).training_plan
                add_gradients(
                    model, Objective(recipe.losses), batch,
                    precision=Precision.named("fp32", CPU), micro_batch_size=micro, plan=plan,
                )  # fmt: skip
                found.append({name: full(gradient) for name, gradient in gradients(unwrap(model)).items()})
            errors += [relative_error(compiled, found[-1]) for compiled in found[:-1]]
        if rank() == 0:
            torch.save({"errors": errors, "graphs": graphs, "forms": counters["stats"]["unique_graphs"]}, out)


@pytest.mark.slow
def test_compiled_blocks_of_two_ranks_give_the_same_gradient(config_of_compile: None, tmp_path: Path) -> None:
    """At several lengths, by micro-batches too. Every form is one graph: small buckets of gradients cut none."""
    out = tmp_path / "found.pt"
    with Forked((8, 12, 16), out, ranks=2, body=gradients_of_ranks) as forked:
        assert forked.join() == [0, 0], forked.said()
    found = torch.load(out, weights_only=True)
    assert max(found["errors"]) < 1e-10
    assert 0 < found["graphs"] == found["forms"]


@pytest.mark.slow
def test_compiled_blocks_have_few_forms_for_all_groups_of_captions(
    config_of_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WIDTHS", (4, 6, 8, 10, 12))
    recipe = small_recipe()
    plain, compiled = (small_model(recipe) for _ in range(2))
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled_blocks(compiled, "aot_eager")
    groups = set()
    for seed in range(25):
        words = [min(12, max(1, length // 3)) for length in web_lengths(32, seed)]
        batch = with_lengths(small_batch(32, length=16, seed=seed, words=words))
        groups.add(plain.text.groups(batch.text_lengths, 16))
        found, expected = (_text_gradient(model, batch.token_ids, batch.text_lengths) for model in (compiled, plain))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(groups) > 10
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 8


def _text_gradient(model: CLIP, ids: torch.Tensor, lengths: tuple[int, ...] | None) -> torch.Tensor:
    own = model.text.packing(ids, lengths)
    pooled = model.text.pool(model.text(ids, own), ids, own)
    return torch.autograd.grad(pooled.square().sum(), model.text.positional_embedding)[0]
