"""Evaluation by several ranks: real gloo processes give what one process gives, to the bit, and end together."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from forks_for_tests import own_group
from killed_for_tests import Forked
from models_for_tests import small_model, small_recipe, small_training
from PIL import Image
from shards_for_tests import give_checksums, make_dataset

from mlip_cli.commands.training import measure
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.distributed import process_group, rank, world_size
from mlip_cli.errors import RunError
from mlip_cli.evaluate import evaluators, retrieval, validation
from mlip_cli.evaluate.evaluators import training_evaluators
from mlip_cli.evaluate.together import EvaluationStopped, on_all_ranks, slice_of
from mlip_cli.evaluate.validation import validation_pairs
from mlip_cli.evaluate.zeroshot import text_features
from mlip_cli.recipe.config import Recipe
from mlip_cli.terminal.output import start_logging
from mlip_cli.terminal.panel import TrainingPanel

CPU = torch.device("cpu")


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


def recipe_of(*folders: str) -> Recipe:
    return small_recipe(data={"validation": list(folders)}, evaluate={"zeroshot": ["folder:classes"]})


def evaluated(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: what this rank finds in the folder `arguments` names, saved there."""
    [folder] = arguments
    own_group()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    validation.BATCH_SIZE = evaluators.BATCH_SIZE = retrieval.CHUNK = 4
    start_logging()
    with process_group(CPU):
        torch.save(found_by_this_rank(), f"{world_size()}.{rank()}.pt")


def found_by_this_rank() -> dict[str, Any]:
    tokenizer, panel = Tokenizer(16), TrainingPanel(9, is_live=False)
    model = small_model(recipe_of("a"), dtype=torch.float32)
    training = small_training(model)
    pairs = validation_pairs(recipe_of("a", "b"), tokenizer, device=CPU)
    measured = training_evaluators(recipe_of("a", "b"), tokenizer, pairs, device=CPU)
    assert pairs is not None
    with training.as_measured() as encoder:
        images, texts = pairs.features(encoder)
    ways = retrieval.image_text_ranks(images, texts, pairs.own_texts)
    numbers = [str(number) for number in range(11)]
    encode = {"tokenize": tokenizer.encode, "encode_text": model.encode_text, "device": CPU}
    asked: list[int] = []

    def is_stopping() -> bool:
        asked.append(rank())
        return rank() == world_size() - 1 and len(asked) == 2

    found = {
        "images": images,
        "texts": texts,
        "numbers": text_features(numbers, **encode, batch_size=2),  # type: ignore[arg-type]
        **{way: own.ranks for way, own in ways.items()},
        "measures": measure(training, measured, panel, 4, lambda: False),
        "stopped": measure(training, measured, panel, 6, is_stopping),
        "again": measure(training, measured, panel, 8, lambda: False),
    }
    pairs = validation_pairs(recipe_of("a", "damaged"), tokenizer, device=CPU)
    measured = training_evaluators(recipe_of("a", "damaged"), tokenizer, pairs, device=CPU)
    with pytest.raises(RunError) as error:
        measure(training, measured, panel, 9, lambda: False)
    return {**found, "error": str(error.value)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What one process and each of three ranks found among 17 + 5 pictures and 9 in class folders, in batches of 4.

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
    give_checksums(tar)  # a picture that was damaged before it was prepared
    for name in ("red", "blue", "green"):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 32 + number), name).save(folder / "classes" / name / f"{number}.png")
    for ranks in (1, 3):
        with Forked([str(folder)], folder / f"words_{ranks}", ranks=ranks, body=evaluated) as evaluation:
            assert evaluation.join() == [0] * ranks, evaluation.said()
        said = evaluation.said()
        assert said.count("its measures are not written") == 1, "rank 0 says it"
        assert said.count("step 8: folder:classes: mean recall") == 1
    return {
        ranks: [torch.load(folder / f"{ranks}.{rank}.pt", weights_only=True) for rank in range(ranks)]
        for ranks in (1, 3)
    }


@pytest.mark.slow
def test_three_ranks_give_the_result_of_one_process_to_the_bit(found: dict[int, list[dict[str, Any]]]) -> None:
    [alone] = found[1]
    assert alone["images"].shape == (22, 16)
    assert {"validation_image_to_text_r1", "folder_classes_acc1"} <= alone["measures"].keys()
    for own in found[3]:
        assert own["measures"] == own["again"] == alone["measures"]
        for name in ("images", "texts", "numbers", "image_to_text", "text_to_image"):
            assert torch.equal(own[name], alone[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_signal_to_one_rank_stops_the_evaluation_on_all(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    assert [own["stopped"] for own in found[ranks]] == [None] * ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_an_error_on_one_rank_ends_all_with_its_message(found: dict[int, list[dict[str, Any]]], ranks: int) -> None:
    [words] = {own["error"] for own in found[ranks]}
    assert words.startswith("damaged/train-000000.tar: sample 01-000004: ")
