"""Evaluation by several ranks: real gloo processes give what one process gives, to the bit, and end together."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from shards_for_tests import make_dataset

from mlip_cli.evaluate.together import EvaluationStopped, on_all_ranks, slice_of


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3, 5, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_slices_are_all_batches_once_in_order(num_batches: int, world_size: int) -> None:
    slices = [slice_of(num_batches, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [number for own in slices for number in own] == list(range(num_batches))
    assert {len(own) for own in slices} <= {num_batches // world_size, -(-num_batches // world_size)}


def test_one_process_works_on_all_batches_and_raises_its_own_errors() -> None:
    assert on_all_ranks(lambda numbers: (10 * number for number in numbers), num_batches=3) == [0, 10, 20]
    with pytest.raises(EvaluationStopped):
        on_all_ranks(stopped_after_two, num_batches=3)


def stopped_after_two(numbers: range) -> Iterator[int]:
    yield from numbers[:2]
    raise EvaluationStopped


WORKER = """
import os, sys, torch
from torch.distributed import TCPStore
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from models_for_tests import small_model, small_recipe, small_training
from mlip_cli.evaluate import evaluators
from mlip_cli.evaluate import validation
from mlip_cli.evaluate.evaluators import training_evaluators
from mlip_cli.commands.training import measure
from mlip_cli.evaluate.validation import validation_pairs
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.distributed import process_group, rank, world_size
from mlip_cli.terminal.panel import TrainingPanel
from mlip_cli.errors import RunError
from mlip_cli.evaluate import retrieval
from mlip_cli.evaluate.zeroshot import text_features
from mlip_cli.terminal.output import start_logging

validation.BATCH_SIZE = evaluators.BATCH_SIZE = retrieval.CHUNK = 4
CPU = torch.device("cpu")
tokenizer = Tokenizer(16)


def recipe(*folders):
    return small_recipe(data={{"validation": list(folders)}}, evaluate={{"zeroshot": ["folder:classes"]}})


def found_by_this_rank():
    start_logging()
    panel = TrainingPanel(9, is_live=False)
    model = small_model(recipe("a"), dtype=torch.float32)
    training = small_training(model)
    pairs = validation_pairs(recipe("a", "b"), tokenizer, device=CPU)
    measured = training_evaluators(recipe("a", "b"), tokenizer, pairs, device=CPU)
    images, texts = pairs.features(model)
    ways = retrieval.image_text_ranks(images, texts, pairs.own_texts)
    many = text_features(
        [str(n) for n in range(11)], tokenize=tokenizer.encode, encode_text=model.encode_text, device="cpu",
        batch_size=2,
    )
    asked = []

    def is_stopping():
        asked.append(rank())
        return rank() == world_size() - 1 and len(asked) == 2

    found = {{
        "images": images,
        "texts": texts,
        "many": many,
        **{{way: own.ranks for way, own in ways.items()}},
        "measures": measure(training, measured, panel, 4, lambda: False),
        "stopped": measure(training, measured, panel, 6, is_stopping),
        "again": measure(training, measured, panel, 8, lambda: False),
    }}
    pairs = validation_pairs(recipe("a", "damaged"), tokenizer, device=CPU)
    try:
        measure(training, training_evaluators(recipe("a", "damaged"), tokenizer, pairs, device=CPU), panel, 9, bool)
    except RunError as error:
        found["error"] = str(error)
    return found


for ranks in (1, 2, 3):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a port that is free, as torchrun's
    os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks)}}
    os.environ |= {{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}}
    children = []
    for number in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ["RANK"] = str(number)
            with process_group(CPU):
                torch.save(found_by_this_rank(), f"{{ranks}}.{{number}}.pt")
            os._exit(0)
        children.append(child)
    ends = [os.waitpid(child, 0)[1] for child in children]
    assert ends == [0] * ranks, ends
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each of 1, 2 and 3 ranks found among 17 + 5 pictures and 9 in class folders, in batches of 4 at most.

    The last picture of a third data set cannot be read: only the last rank has it.
    """
    folder = tmp_path_factory.mktemp("together")
    make_dataset(folder / "a", n=17)
    for name in ("b", "damaged"):
        make_dataset(folder / name, n=5, seed=1, image_format="png")
    tar = folder / "damaged" / "train-000000.tar"
    content = tar.read_bytes()
    at = content.rindex(b"IDAT")
    tar.write_bytes(content[:at] + bytes(40) + content[at + 40 :])
    for name in ("red", "blue", "green"):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 32 + number), name).save(folder / "classes" / name / f"{number}.png")
    script = folder / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=280,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("none of its numbers are written") == 3, "rank 0 says it"
    assert done.stderr.count("step 8: folder:classes: mean recall") == 3
    return {
        ranks: [torch.load(folder / f"{ranks}.{rank}.pt", weights_only=True) for rank in range(ranks)]
        for ranks in (1, 2, 3)
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_find_what_one_process_finds_to_the_bit(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    [alone] = found[1]
    assert alone["images"].shape == (22, 16)
    assert {"validation_image_to_text_r1", "folder_classes_acc1"} <= alone["measures"].keys()
    for own in found[ranks]:
        assert own["measures"] == own["again"] == alone["measures"]
        for name in ("images", "texts", "many", "image_to_text", "text_to_image"):
            assert torch.equal(own[name], alone[name]), name


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_signal_to_one_rank_stops_the_evaluation_on_all(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    assert [own["stopped"] for own in found[ranks]] == [None] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_an_error_on_one_rank_ends_all_with_its_words(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    [words] = {own["error"] for own in found[ranks]}
    assert words.startswith("damaged/train-000000.tar: sample 01-000004: ")
