"""The exact words for every mistake in a recipe."""
# ruff: noqa: E501 - messages are written out whole

import json
import re
from pathlib import Path

import pytest
from recipes_for_tests import SMALL, write

from mlip_cli import __version__
from mlip_cli.errors import RecipeError, UsageError
from mlip_cli.recipe.load import find_recipe, load_recipe, recipe_schema
from mlip_cli.recipe.schema import is_section, node_at, paths
from mlip_cli.recipe.shipped import recipe_names

STREAM = "a stream can only be read from its start, so a run could not shuffle it or resume in its middle; save it as tars and name these, or prepare them (mlip prepare-data TARS OUT)"
NOT_HERE = "a URL or a stream, and a path of this machine is needed; copy the data to a disk"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mistakes(source: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return str(caught.value).splitlines()


def test_mistakes_of_single_keys_are_reported_together() -> None:
    write(
        "bad.yaml",
        """
seed: yes
data:
  train: [5, {path: x, wieght: 2}]
  batch_sise: 3
  image_size: 64
  image_size: 65
  validation: []
  augment: {crop_scale: [0.5], flip: no, color_jitter: 1.5}
model:
  vision: {width: 1.0, patch_size: -8}
  frequency: {depth: a}
optim:
losses: {spatial_token: {kind: flip}, spatial_globl: null}
train: {lr: 3, precision: fp8}
merging: {rate: 1}
optim.lr: 4
""",
    )
    assert mistakes("bad.yaml", "evaluate.zeroshot=openmoji", "model.merging.at=[2, 0]") == [
        "bad.yaml:1: seed: expected a whole number of at least 0 and below 4294967296, not 'yes'",
        "bad.yaml:3: data.train[0]: expected text or a section with the keys path, weight, format, caption_column, image_column, not 5",
        "bad.yaml:3: unknown key data.train[1].wieght; did you mean data.train[1].weight?",
        "bad.yaml:4: unknown key data.batch_sise; did you mean train.global_batch_size?",
        "bad.yaml:6: duplicate key data.image_size; first in line 5",
        "bad.yaml:7: data.validation: expected a folder, a list of folders or a list of {path, weight}, or null, not []",
        "bad.yaml:8: data.augment.crop_scale: expected a list of 2 numbers above 0 and at most 1, or null, not [0.5]",
        "bad.yaml:8: data.augment.flip: expected true or false, not 'no'",
        "bad.yaml:8: data.augment.color_jitter: expected a number above 0 and at most 1 or null, not 1.5",
        "bad.yaml:10: model.vision.patch_size: expected a whole number above 0 and at most 65536 or null, not -8",
        "bad.yaml:10: model.vision.width: expected a whole number above 0 and at most 65536 or null, not 1.0",
        "bad.yaml:11: model.frequency.depth: expected a whole number above 0 and at most 256, not 'a'",
        "bad.yaml:12: optim: cannot be null or empty; its keys: lr, betas, eps, weight_decay, warmup_steps, layer_decay, clip_grad_norm, ema_horizon",
        "bad.yaml:13: losses.spatial_token.kind: expected one of pooled, filip, sparc, not 'flip'",
        "bad.yaml:13: unknown key losses.spatial_globl; did you mean losses.spatial_global?",
        "bad.yaml:14: train.global_batch_size is missing",
        "bad.yaml:14: train.precision: expected one of auto, bf16, fp32, fp16, not 'fp8'",
        "bad.yaml:14: unknown key train.lr; did you mean optim.lr?",
        "bad.yaml:15: unknown key merging; did you mean model.merging?",
        "bad.yaml:16: unknown key optim.lr; dots are for the command line, in a file write lr under optim",
        "command line: evaluate.zeroshot=openmoji: expected a list of text, not 'openmoji'",
        "command line: model.merging.at=[2, 0]: model.merging.at[1]: expected a whole number above 0 and at most 256, not 0",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.lr=fast"], ["optim.lr=fast: expected a number above 0, not 'fast'"]),
        (["optim.lr=.inf"], ["optim.lr=.inf: expected a number above 0, not Infinity"]),
        (["train.steps=1e3"], ["train.steps=1e3: expected a whole number above 0 and at most 1000000000 or null, not 1000.0"]),
        (["train.steps=true"], ["train.steps=true: expected a whole number above 0 and at most 1000000000 or null, not true"]),
        (["optim.lr="], ["optim.lr=: no value after =; optim.lr=null removes one, and a value that begins with # needs quotes"]),
        (["log.wandb=#a"], ["log.wandb=#a: no value after =; log.wandb=null removes one, and a value that begins with # needs quotes"]),
        (["optim.lr"], ["optim.lr: expected key=value, as in optim.lr=1e-3"]),
        (["=3"], ["=3: expected a key before =, as in optim.lr=1e-3"]),
        (["optim..lr=3"], ["optim..lr=3: expected a key before =, as in optim.lr=1e-3"]),
        (["optim.lr=1", "optim.lr=2"], ["optim.lr=2: optim.lr is given twice"]),
        (["extends=x.yaml"], ["extends=x.yaml: extends works in a recipe file only"]),
        (["data.train=[a"], ["data.train=[a: not YAML: expected ',' or ']', but got '<stream end>'"]),
        (["seed=!!int 3"], ["seed=!!int 3: anchors, aliases and tags (&, *, !) are not part of recipes"]),
        (["model.init=open_clip:B"], ["model.init=open_clip:B: expected open_clip:ARCH:FILE, as in open_clip:ViT-B-32-quickgelu:weights.safetensors, not open_clip:B"]),
        (["model=null"], ["model=null: cannot be null or empty; its keys: embed_dim, token_dim, vision, text, frequency, merging, init, freeze"]),
        (["data.augment={flip: 3}"], ["data.augment={flip: 3}: data.augment.flip: expected true or false, not 3"]),
        (["data.train=null"], ["data.train=null: expected a folder, a list of folders or a list of {path, weight}, not null"]),
        (["optim.learning_rate=1"], ["optim.learning_rate=1: unknown key optim.learning_rate; known here: lr, betas, eps, weight_decay, warmup_steps, layer_decay, clip_grad_norm, ema_horizon"]),
        (["use_merging=true"], ["use_merging=true: unknown key use_merging; did you mean model.merging?"]),
        (["seed.x=1"], ["seed.x=1: seed: expected a whole number of at least 0 and below 4294967296, not a section"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(overrides: list[str], expected: list[str]) -> None:
    assert mistakes(write("x.yaml", SMALL), *overrides) == [f"command line: {text}" for text in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", "x.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\nb: \0\n", "x.yaml:2: not YAML: special characters are not allowed"),
        ("- a\n- b\n", "x.yaml:1: expected a recipe: lines of `section:` and `key: value`"),
        ("a: &x 1\nb: *x\n", "x.yaml:1: anchors, aliases and tags (&, *, !) are not part of recipes"),
        (
            "a: 1\n---\nb: 2\n",
            "x.yaml:2: not YAML: expected a single document in the stream, but found another document",
        ),
        ("extends: no.yaml\n", "x.yaml:1: extends: no file no.yaml; the path is relative to this recipe's folder"),
        ("extends: [a]\n", 'x.yaml:1: extends: expected the path of a recipe, not ["a"]'),
        (
            "seed: 1\nextends: x.yaml\n",
            "x.yaml:2: extends: these recipes extend each other in a circle: x.yaml -> x.yaml",
        ),
    ],
)
def test_mistakes_that_make_a_file_unreadable(text: str, expected: str) -> None:
    assert mistakes(write("x.yaml", text))[0] == expected


def test_merge_keys_are_refused() -> None:
    assert mistakes(write("x.yaml", SMALL + "optim:\n  <<: {lr: 1}\n")) == [
        "x.yaml:6: merge keys (<<) are not part of recipes; use extends"
    ]


def test_text_that_is_not_utf_8() -> None:
    write("x.yaml", "")
    Path("x.yaml").write_bytes(b"seed: \xff\n")
    assert mistakes("x.yaml") == ["x.yaml:1: not UTF-8 text"]


GIVE_MODEL = "; give model.init=RUN or model.init=open_clip:ARCH:FILE, whose model is then trained, or describe a model"


def test_a_recipe_without_a_model_says_what_to_give() -> None:
    [line] = mistakes("finetune")
    assert re.fullmatch(r".*finetune\.yaml:\d+: (.*)", line)[1] == f"model is missing{GIVE_MODEL}"
    text = SMALL.replace("vision: {patch_size: 8, width: 32, depth: 2, num_heads: 2}", "embed_dim: 8")
    assert mistakes(write("x.yaml", text)) == [f"x.yaml:2: model.vision is missing{GIVE_MODEL}"]
    assert mistakes("x.yaml", "model.init=runs/a") == [
        "x.yaml:2: model.vision is missing; mlip pretrain alone takes it from model.init"
    ]


def test_an_empty_recipe_says_what_is_missing() -> None:
    assert mistakes(write("x.yaml", "# nothing\n")) == [
        "x.yaml:1: data is missing",
        f"x.yaml:1: model is missing{GIVE_MODEL}",
        "x.yaml:1: train is missing",
    ]


def test_a_circle_of_files_is_reported_where_it_closes() -> None:
    write("a.yaml", SMALL + "extends: sub/b.yaml\n")
    write("sub/b.yaml", "seed: 1\nextends: ../a.yaml\n")
    assert mistakes("a.yaml") == [
        "sub/b.yaml:2: extends: these recipes extend each other in a circle: a.yaml -> sub/b.yaml -> a.yaml"
    ]


def test_a_mistake_in_a_parent_is_reported_in_the_parent() -> None:
    write("parent.yaml", SMALL + "optim: {lr: -1}\n")
    assert mistakes(write("x.yaml", "extends: parent.yaml\nseed: a\n")) == [
        "parent.yaml:5: optim.lr: expected a number above 0, not -1",
        "x.yaml:2: seed: expected a whole number of at least 0 and below 4294967296, not 'a'",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=null"], "train.steps=null: neither train.steps nor train.epochs is given; give one of them"),
        (["train={steps: 5, epochs: 3}"], "train={steps: 5, epochs: 3}: train.epochs: 3 and train.steps 5 are both given; set one of them to null"),
        (["train.micro_batch_size=8"], "train.micro_batch_size=8: 8 is more than train.global_batch_size 4; set it to null"),
        (["train={precision: fp16, device: cpu}"], "train={precision: fp16, device: cpu}: train.precision: fp16 needs train.device cuda, not cpu; use bf16 or fp32"),
        (["data.train=[{path: a, caption_column: b}]"], "data.train=[{path: a, caption_column: b}]: a has a caption_column or image_column, which need format: webdataset"),
        (["data.train=[{path: a, weight: 1}, b]"], "data.train=[{path: a, weight: 1}, b]: b has no weight but other folders do; give all of them a weight, or none"),
        (["data.train=[a, a]"], "data.train=[a, a]: a is listed twice"),
        (["data.train=[a, ./a/]"], "data.train=[a, ./a/]: ./a/ is listed twice, also as a"),
        (["evaluate.zeroshot=[folder:b/../a, folder:./a]"], "evaluate.zeroshot=[folder:b/../a, folder:./a]: folder:a is listed twice"),
        (["data.train=pipe:curl -s x"], f"data.train=pipe:curl -s x: pipe:curl -s x: {STREAM}"),
        (["data.train={path: https://host/0.tar, format: webdataset}"], f"data.train={{path: https://host/0.tar, format: webdataset}}: https://host/0.tar: {STREAM}"),
        (["data.validation=s3:bucket/x"], "data.validation=s3:bucket/x: s3:bucket/x: a URL begins with s3://"),
        (["data.validation={path: a, weight: 1}"], "data.validation={path: a, weight: 1}: weights work in data.train only; list the folders without weights"),
        (["data.augment.crop_scale=[0.9, 0.5]"], "data.augment.crop_scale=[0.9, 0.5]: [0.9, 0.5] is not in ascending order"),
        (["data.image_size=36"], "data.image_size=36: 36 is not a multiple of model.vision.patch_size 8; use 32 or 40"),
        (["data.image_size=4"], "data.image_size=4: 4 is not a multiple of model.vision.patch_size 8; use 8"),
        (["model.vision={timm: vit_x, width: 32}"], "model.vision={timm: vit_x, width: 32}: model.vision.timm: vit_x defines the tower, and so does width; set one of the two to null"),
        (["model.vision.num_heads=3"], "model.vision.num_heads=3: 3 heads do not divide width 32"),
        (["model.text.num_heads=7"], "model.text.num_heads=7: 7 heads do not divide width 512"),
        (["model.merging.at=[]"], "model.merging.at=[]: no block given; name some, or set model.merging to null"),
        (["model.merging.at=[2, 2]"], "model.merging.at=[2, 2]: [2, 2] does not ascend; name each block once, the first one first"),
        (["model.merging.at=[1, 2]"], "model.merging.at=[1, 2]: [1, 2] starts too early; the first place for guided is 2"),
        (["model.merging.at=[2, 3]"], "model.merging.at=[2, 3]: [2, 3] goes beyond the tower's depth 2; the last block is 2"),
        (["model.merging.rate=0.7"], "model.merging.rate=0.7: merge rate 0.7: the merge before block 2 would take 16 tokens to 5, and one merge removes at most half; lower the rate"),
        (["model.merging.rate=0.01"], "model.merging.rate=0.01: merge rate 0.01: removes none of 16 tokens; use 0, or at least 0.063"),
        (["model.merging={method: tome, guidance: inverse}"], "model.merging={method: tome, guidance: inverse}: model.merging.guidance: inverse has no effect with method tome; set it to mixed"),
        (["model.merging={method: tome, strength: 1.0}"], "model.merging={method: tome, strength: 1.0}: model.merging.strength: 1.0 has no effect with method tome; set it to 2.0"),
        (["model={init: runs/a, freeze: text, text: {dropout: 0.1}}"], "model={init: runs/a, freeze: text, text: {dropout: 0.1}}: model.text.dropout: 0.1 has no effect in a frozen tower; set it to 0"),
        (["model.frequency={placement: stem, width: 8, depth: 1}", "losses.frequency_token={}"], "model.frequency={placement: stem, width: 8, depth: 1}: model.frequency.width: 8, but the blocks of a stem are as wide as the tower; use 32"),
        (["model.frequency={placement: stem, width: 32}", "losses.frequency_token={}"], "model.frequency={placement: stem, width: 32}: model.frequency.depth: 2 leaves no attention block in a tower of 2 blocks; use less"),
        (["model={vision: {depth: 1}, merging: {}}"], "model={vision: {depth: 1}, merging: {}}: model.merging.at: [2] goes beyond the tower's depth 1; set model.merging to null"),
        (["losses.frequency_token={}"], "losses.frequency_token={}: it needs model.frequency, which is null; give that, or set this loss to null"),
        (["model.frequency={placement: branch}"], "model.frequency={placement: branch}: no loss trains it; give losses.frequency_global or losses.align, or set it to null"),
    ],
)  # fmt: skip
def test_mistakes_between_keys(overrides: list[str], expected: str) -> None:
    assert mistakes(write("x.yaml", SMALL), *overrides) == [f"command line: {expected}"]


def test_mistakes_between_keys_are_reported_together_with_their_lines() -> None:
    write(
        "x.yaml",
        """
data:
  train: [{path: a, weight: 1.0}]
  image_size: 60
model:
  vision: {patch_size: 8, width: 32}
losses:
  spatial_global: null
train:
  epochs: 3
  global_batch_size: 4
""",
    )
    assert mistakes("x.yaml") == [
        "x.yaml:2: data.train: weighted folders have no common epoch; replace train.epochs by train.steps",
        "x.yaml:3: data.image_size: 60 is not a multiple of model.vision.patch_size 8; use 56 or 64",
        "x.yaml:5: model.vision: depth, num_heads missing; give all of patch_size, width, depth, num_heads, or timm alone",
        "x.yaml:7: losses.spatial_global: it alone trains the feature that evaluation uses, but is null; give it a kind",
    ]


def test_mistakes_between_keys_wait_for_those_of_single_keys() -> None:
    assert mistakes(write("x.yaml", SMALL), "train.epochs=3", "seed=-1") == [
        "command line: seed=-1: expected a whole number of at least 0 and below 4294967296, not -1"
    ]


def test_a_run_of_another_version_names_it() -> None:
    write("runs/old/recipe.yaml", SMALL + "old_key: 3\n")
    write("runs/old/run.json", '{"mlip_version": "0.0.1"}')
    assert mistakes("runs/old/recipe.yaml")[-1] == (
        f"runs/old/recipe.yaml: made by mlip 0.0.1, this is mlip {__version__}; use that version, or start a new run"
    )
    write("runs/old/run.json", json.dumps({"mlip_version": __version__}))
    assert len(mistakes("runs/old/recipe.yaml")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("opnmoji", "opnmoji: no such file and no shipped recipe; did you mean openmoji? shipped: "),
        ("mine/a.yaml", "mine/a.yaml: no such file and no shipped recipe; shipped: "),
        ("siglip", "siglip: no such file and no shipped recipe; did you mean baselines/siglip? shipped: "),
        ("runs/r", "runs/r: a folder, not a recipe; did you mean runs/r/recipe.yaml?"),
    ],
)
def test_a_missing_recipe_is_named(source: str, message: str) -> None:
    write("runs/r/recipe.yaml", SMALL)
    with pytest.raises(UsageError) as caught:
        find_recipe(source)
    assert str(caught.value) in (message, message + ", ".join(recipe_names()))


@pytest.mark.slow
def test_every_key_of_a_recipe_says_what_it_expects() -> None:
    """Any wrong value at any key gives one line that names the key (a mapping is wrong at every leaf)."""
    schema = recipe_schema()
    for path, node in paths(schema):
        if path != "extends" and not is_section(schema, node) and path not in ("data.train", "data.validation"):
            found = mistakes("smoke", f"{path}={{x: 1}}")
            lines = [line for line in found if not line.endswith(" is missing")]  # keys of the same new section
            assert len(lines) == 1
            assert lines[0].startswith(f"command line: {path}={{x: 1}}: expected ")
            assert lines[0].endswith(", not a section")
        assert node_at(schema, path.split(".")) is not None


HALF = "holds half of a character; write the character itself"
DEEP = "more than 20 levels of nesting"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" * 5000, f"x.yaml:1: {DEEP}"),
        ("{a: " * 5000, f"x.yaml:1: {DEEP}"),
        ("- " * 5000, f"x.yaml:1: {DEEP}"),
        ('seed: "\\ud800"\n', rf"x.yaml:1: '\ud800' {HALF}"),
        ('"\\ud800": 1\n', rf"x.yaml:1: '\ud800' {HALF}"),
        ('seed: "\\UFFFFFFFF"\n', "x.yaml:1: not YAML: a number in it is too large: Python int too large to convert to C int"),
        ('"a\\nb": 1\n', r"x.yaml:1: unknown key a\nb; known here: extends, seed, data, model, losses, optim, train, evaluate, log"),
        ('"a\\eb": 1\n', r"x.yaml:1: unknown key a\x1bb; known here: extends, seed, data, model, losses, optim, train, evaluate, log"),
        ('extends: "a\\0b"\n', r"x.yaml:1: extends: a\x00b: a name with control characters; rename it"),
        (f"extends: {'x' * 300}\n", f"x.yaml:1: extends: {'x' * 60}...: too long for a path, 300 characters; shorten it"),
        ("extends: ~nobody-here/x\n", "x.yaml:1: extends: ~nobody-here/x: there is no user nobody-here; correct it, or write ./~nobody-here/x for a file or folder of this name"),
        ("extends: ''\n", "x.yaml:1: extends: an empty path; write . for the current folder"),
        ("#" * 300_000, "x.yaml:1: more than 256 KiB, not a recipe"),
        (f"seed: {'9' * 5000}\n", f"x.yaml:1: seed: expected a whole number of at least 0 and below 4294967296, not '{'9' * 56}..."),
    ],
)  # fmt: skip
def test_hostile_files(text: str, expected: str) -> None:
    assert expected in mistakes(write("x.yaml", text))


@pytest.mark.parametrize("key", ["train.steps", "train.global_batch_size", "model.vision.width", "data.num_workers", "log.every_steps", "optim.warmup_steps", "optim.ema_horizon", "model.merging.at", "train.keep.last"])  # fmt: skip
def test_whole_numbers_have_upper_bounds(key: str) -> None:
    value = [2, 10**30] if key == "model.merging.at" else 10**30
    [mistake] = mistakes(write("x.yaml", SMALL), f"{key}={value}")
    assert mistake.startswith(f"command line: {key}={value}: ")
    assert " and at most " in mistake


def test_a_damaged_stamp_beside_a_recipe_hides_no_mistake() -> None:
    write("runs/old/recipe.yaml", SMALL + "old_key: 3\n")
    write("runs/old/run.json", "[")
    key, stamp = mistakes("runs/old/recipe.yaml")
    assert key.startswith("runs/old/recipe.yaml:")
    assert stamp.startswith("runs/old/run.json: damaged (")
