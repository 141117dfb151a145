"""Recipes: what they mean, where their values come from, and how they are written down."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipes_for_tests import SMALL, write

from mlip_cli.recipe.config import LOSS_NAMES, Losses, TokenLoss
from mlip_cli.recipe.load import (
    absolute_paths,
    differences,
    find_recipe,
    load_recipe,
    load_without_weights,
    recipe_schema,
    recipe_yaml,
    schema_text,
)
from mlip_cli.recipe.schema import paths
from mlip_cli.recipe.shipped import recipe_names, recipes_folder
from mlip_cli.recipe.tree import parse


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Shipped recipes

WORDS_AND_FREQUENCY = ("spatial_words", "frequency_global", "frequency_words")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_and_comes_back_equal(name: str) -> None:
    loaded = load_without_weights(name)
    assert loaded.name == name.rpartition("/")[2]
    assert loaded.recipe.extends is None
    again = load_recipe(write("again.yaml", recipe_yaml(loaded.recipe)))
    assert again.recipe == loaded.recipe
    assert differences(loaded.recipe, again.recipe) == []
    assert load_recipe(write("with_origins.yaml", recipe_yaml(loaded.recipe, loaded.origins))).recipe == loaded.recipe


def test_these_recipes_are_shipped() -> None:
    baselines = [f"baselines/{name}" for name in ["clip", "clip_strong", "clip_tome", "filip", "flip", "siglip"]]
    others = "cc12m cc3m finetune laptop openmoji openmoji_clip single_gpu smoke yfcc15m_v1 yfcc15m_v2"
    assert recipe_names() == [*baselines, *others.split()]


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_names_its_schema_first_and_its_command(name: str) -> None:
    lines = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    schema = "../schema.json" if "/" in name else "schema.json"
    assert lines[0] == f"# yaml-language-server: $schema={schema}"
    header = "\n".join(line for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])
    assert f"pretrain recipes/{name}.yaml" in header
    assert "# Hardware: " in header
    assert "not run by us; " in header or name in ("laptop", "openmoji", "openmoji_clip", "smoke")


def test_a_baseline_differs_from_the_clip_baseline_in_its_own_idea_alone() -> None:
    clip = load_recipe("baselines/clip").recipe

    def changed(name: str) -> list[str]:
        return [path for path, _, _ in differences(clip, load_recipe(f"baselines/{name}").recipe)]

    assert changed("siglip") == ["losses.spatial_global.kind"]
    assert changed("filip") == ["losses.spatial_token"]
    assert changed("flip") == changed("clip_tome") == ["model.merging"]
    assert changed("clip_strong") == [
        "data.augment.crop_scale",
        "data.augment.color_jitter",
        "model.text.dropout",
        "losses.spatial_global.label_smoothing",
    ]
    mlip = load_recipe("cc12m").recipe
    parts = ["model.vision.pool", "model.frequency", "model.merging", *(f"losses.{x}" for x in WORDS_AND_FREQUENCY)]
    assert [path for path, _, _ in differences(clip, mlip)] == parts


def test_the_clip_recipe_is_the_mlip_recipe_without_its_parts() -> None:
    changed = [path for path, _, _ in differences(load_recipe("openmoji").recipe, load_recipe("openmoji_clip").recipe)]
    assert changed == [
        "model.frequency",
        "model.merging",
        *(f"losses.{name}" for name in WORDS_AND_FREQUENCY),
    ]


def test_the_schema_file_equals_the_models() -> None:
    assert (recipes_folder() / "schema.json").read_text(encoding="utf-8") == schema_text(), "run make schema"


def test_the_schema_documents_every_key() -> None:
    schema = recipe_schema()
    assert [path for path, node in paths(schema) if "description" not in node] == []
    assert '"required"' not in schema_text(), "extends may supply what a recipe lacks"


def test_the_losses_are_those_of_the_table() -> None:
    assert tuple(Losses.model_fields) == (*LOSS_NAMES, "positives")


@pytest.mark.slow
def test_loading_a_recipe_loads_no_torch() -> None:
    code = (
        "import json, sys; from mlip_cli.recipe.load import load_recipe; "
        "load_recipe('smoke'); print(json.dumps([*sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=recipes_folder().parent, capture_output=True, text=True, check=True
    )
    assert set(json.loads(done.stdout)).isdisjoint(["torch", "numpy", "timm", "open_clip"])


# Layers: defaults < extends < file < command line


def test_values_and_their_origins() -> None:
    write("base/parent.yaml", SMALL + "optim: {lr: 1e-3, betas: [0.8, 0.9]}\n")
    write("child.yaml", "extends: base/parent.yaml\noptim:\n  betas: [0.9, 0.95]\n")
    loaded = load_recipe("child.yaml", ["train.steps=7", "model.text={width: 16, num_heads: 2}"])
    recipe = loaded.recipe
    assert (recipe.optim.lr, recipe.optim.betas, recipe.train.steps) == (1e-3, (0.9, 0.95), 7)
    assert (recipe.model.text.width, recipe.model.text.depth) == (16, 12)
    assert {
        key: loaded.origins[key] for key in ("optim.lr", "optim.betas", "train.steps", "model.text.width", "seed")
    } == {
        "optim.lr": "base/parent.yaml:5",
        "optim.betas": "child.yaml:3",
        "train.steps": "command line",
        "model.text.width": "command line",
        "seed": "default",
    }


def test_null_removes_and_a_mapping_brings_back() -> None:
    write("parent.yaml", SMALL + "losses: {spatial_token: {kind: sparc, weight: 0.5}}\n")
    write("child.yaml", "extends: parent.yaml\nlosses: {spatial_token: null}\n")
    assert load_recipe("child.yaml").recipe.losses.spatial_token is None
    assert load_recipe("child.yaml", ["losses.spatial_token.weight=2.0"]).recipe.losses.spatial_token == TokenLoss(
        weight=2
    )
    write("grandchild.yaml", "extends: child.yaml\nlosses: {spatial_token: {weight: 0.1}}\n")
    assert load_recipe("grandchild.yaml").recipe.losses.spatial_token == TokenLoss(weight=0.1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", [("a", None)]),
        ("[a, b]", [("a", None), ("b", None)]),
        ("[{path: a, weight: 2}, {path: b, weight: 0.5}]", [("a", 2.0), ("b", 0.5)]),
        ("{path: a}", [("a", None)]),
    ],
)
def test_data_folders_in_all_their_forms(text: str, value: list[tuple[str, float | None]]) -> None:
    recipe = load_recipe(write("x.yaml", SMALL), [f"data.train={text}"]).recipe
    assert [(source.path, source.weight) for source in recipe.data.train] == value
    assert load_recipe(write("again.yaml", recipe_yaml(recipe))).recipe == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("+12", 12),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("12_000", "12_000"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-02", "2024-01-02"),
        ("True", True),
        ("~", None),
        ("-.inf", float("-inf")),
        ("'1'", "1"),
        ("1.0.0", "1.0.0"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse(text, "x").value
    assert read == value
    assert type(read) is type(value)


def test_what_is_written_is_read_alike_by_yaml_1_1() -> None:
    names = [
        "no",
        "12:30",
        "1e3",
        "a: b",
        "#x",
        "ünï 🦊",
        " ",
        "it's",
        'q"uote',
        "new\nline",
        "null",
        "[x",
        "@x",
        "é\x85",
    ]
    overrides = [f"evaluate.zeroshot={json.dumps(names)}", "optim.eps=1e-8", "optim.lr=1e-300"]
    recipe = load_recipe(write("x.yaml", SMALL), overrides).recipe
    assert recipe.evaluate.zeroshot == tuple(names)
    text = recipe_yaml(recipe)
    assert load_recipe(write("again.yaml", text)).recipe == recipe
    other = yaml.safe_load(text)
    assert other["evaluate"]["zeroshot"] == names
    assert (other["optim"]["eps"], other["optim"]["lr"]) == (1e-8, 1e-300)


def test_paths_become_absolute(tmp_path: Path) -> None:
    recipe = load_recipe(
        write("x.yaml", SMALL), ["data.train=[{path: a, weight: 2}]", "data.validation=b", "model.init=runs/c"]
    ).recipe
    moved = absolute_paths(recipe)
    assert [(s.path, s.weight) for s in moved.data.train] == [(str(tmp_path / "a"), 2.0)]
    assert moved.data.validation is not None
    assert moved.data.validation[0].path == str(tmp_path / "b")
    assert moved.model.init == str(tmp_path / "runs" / "c")
    assert absolute_paths(moved) == moved
    assert absolute_paths(load_recipe("x.yaml").recipe).model.init is None
    foreign = absolute_paths(load_recipe("x.yaml", ["model.init=open_clip:ViT-B-32:w/a:b.pt"]).recipe)
    assert foreign.model.init == f"open_clip:ViT-B-32:{tmp_path}/w/a:b.pt"
    assert absolute_paths(foreign) == foreign


def test_differences_name_leaves_and_whole_sections() -> None:
    write("x.yaml", SMALL)
    old = load_recipe("x.yaml").recipe
    new = load_recipe("x.yaml", ["optim.lr=0.1", "model.merging={at: [2]}"]).recipe
    assert differences(old, new) == [
        (
            "model.merging",
            None,
            load_recipe("x.yaml", ["model.merging={at: [2]}"]).recipe.model.merging.model_dump(mode="json"),
        ),
        ("optim.lr", 5e-4, 0.1),
    ]


def test_a_recipe_is_found_by_path_then_by_name() -> None:
    write("smoke", SMALL)
    assert find_recipe("smoke") == Path("smoke")
    assert find_recipe("recipes/smoke.yaml") == recipes_folder() / "smoke.yaml"
    assert find_recipe("./recipes/smoke.yaml") == recipes_folder() / "smoke.yaml"
    assert find_recipe("baselines/flip") == find_recipe("recipes/baselines/flip.yaml")
    assert find_recipe("baselines/flip") == recipes_folder() / "baselines" / "flip.yaml"
    assert find_recipe("smoke.yaml") == recipes_folder() / "smoke.yaml"


EPOCHS_WIN = "train.epochs: 3 replaces train.steps of x.yaml:4, which is null now"


@pytest.mark.parametrize(
    ("overrides", "nulls", "notes"),
    [
        (["train.epochs=3"], ["train.steps"], [EPOCHS_WIN]),
        (
            ["train={epochs: 3}"],
            ["train.steps"],
            ["train.epochs: 3 replaces train.steps of x.yaml:4, which is null now"],
        ),
        (["train.epochs=3", "train.steps=null"], ["train.steps"], []),
        (["train.epochs=null"], ["train.epochs"], []),
        (
            ["model.vision.timm=vit_tiny_patch16_224"],
            [f"model.vision.{size}" for size in ("patch_size", "width", "depth", "num_heads")],
            [
                f"model.vision.timm: vit_tiny_patch16_224 replaces model.vision.{size} of x.yaml:3, which is null now"
                for size in ("patch_size", "width", "depth", "num_heads")
            ],
        ),
        (
            ["model.frequency=null"],
            ["model.frequency", "losses.frequency_global"],
            ["model.frequency: null replaces losses.frequency_global of x.yaml:2, which is null now"],
        ),
    ],
)
def test_a_later_layer_wins_over_keys_that_exclude_its_own(
    overrides: list[str], nulls: list[str], notes: list[str]
) -> None:
    branch = "losses: {frequency_global: {}}\nmodel: {frequency: {width: 8}}\n"
    write("parent.yaml", SMALL)
    with_branch = "model.frequency" in nulls
    write("x.yaml", "extends: parent.yaml\n" + branch if with_branch else SMALL)
    loaded = load_recipe("x.yaml", overrides)
    tree = loaded.recipe.model_dump()
    for name in nulls:
        value: Any = tree
        for part in name.split("."):
            value = value[part]
        assert value is None, name
        assert loaded.origins[name] in ("command line", "default")
    assert [*loaded.notes] == notes


def test_a_file_wins_over_its_parent_in_the_same_way() -> None:
    write("parent.yaml", SMALL)
    write("child.yaml", "extends: parent.yaml\ntrain: {epochs: 2}\n")
    loaded = load_recipe("child.yaml")
    assert (loaded.recipe.train.steps, loaded.recipe.train.epochs) == (None, 2)
    assert loaded.origins["train.steps"] == "child.yaml:2"
    assert loaded.notes == ("train.epochs: 2 replaces train.steps of parent.yaml:4, which is null now",)
