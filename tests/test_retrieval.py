"""Image-text retrieval equals clip-benchmark's where there are no ties, and counts ties against the model."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_retrieval as reference
from models_for_tests import small_recipe
from shards_for_tests import make_dataset
from torch import Tensor

from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.errors import RunError
from mlip_cli.evaluate.retrieval import (
    InBatch,
    image_text_ranks,
    image_text_retrieval,
    images_of_texts,
    in_batch,
    modality_gap,
    rank_of_first_right,
    ranks,
)
from mlip_cli.evaluate.validation import validation_pairs


class Lookup:
    """Features that are given: images and texts are numbers."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self.images, self.texts = images, texts

    def encode_image(self, numbers: Tensor) -> Tensor:
        return self.images[numbers]

    def encode_text(self, numbers: Tensor) -> Tensor:
        return self.texts[numbers]


def test_equals_clip_benchmark_with_several_captions_an_image() -> None:
    torch.manual_seed(0)
    num_images, each = 60, 5
    images = F.normalize(torch.randn(num_images, 8), dim=1)
    texts = F.normalize(images.repeat_interleave(each, 0) + 0.4 * torch.randn(num_images * each, 8), dim=1)
    captions = [list(range(each * i, each * (i + 1))) for i in range(num_images)]

    def batches() -> Iterator[tuple[Tensor, list[list[str]]]]:
        for start in range(0, num_images, 16):
            stop = min(num_images, start + 16)
            yield torch.arange(start, stop), [[str(t) for t in captions[i]] for i in range(start, stop)]

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([int(text) for text in texts])

    expected = reference.evaluate(
        Lookup(images, texts), batches(), tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ours = image_text_retrieval(images, texts, captions)
    for k in (1, 5, 10):
        assert ours["image_to_text"][f"r{k}"] == pytest.approx(expected[f"text_retrieval_recall@{k}"])
        assert ours["text_to_image"][f"r{k}"] == pytest.approx(expected[f"image_retrieval_recall@{k}"])
    for way, found in image_text_ranks(images, texts, captions).items():
        assert [right == "1" for right in found.right()["r5"]] == (found.ranks < 5).tolist()
        assert found.right()["r5"].count("1") == round(ours[way]["r5"] * ours[way]["n"])
    assert 0.2 < ours["image_to_text"]["r1"] < 0.9  # neither trivial nor hopeless
    assert ours["text_to_image"]["r5_chance"] == pytest.approx(5 / 60)


def test_equal_features_find_nothing() -> None:
    same = F.normalize(torch.ones(20, 4), dim=1)
    scores = image_text_retrieval(same, same, [[i] for i in range(20)])
    assert scores["image_to_text"]["r10"] == scores["text_to_image"]["r10"] == 0.0


def test_rank_counts_wrong_candidates_only() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.8, 0.1], [0.9, 0.8, 0.8, 0.1]])
    right = torch.tensor([[False, True, False, True], [True, True, False, False]])
    assert rank_of_first_right(scores, right).tolist() == [2, 0]


def test_a_nan_score_never_ranks_first() -> None:
    nan = float("nan")
    scores = torch.tensor([[nan, 0.5, 0.1], [0.9, nan, 0.1], [nan, nan, nan]])
    right = torch.tensor([[True, False, False], [True, False, False], [False, False, True]])
    assert rank_of_first_right(scores, right).tolist() == [2, 1, 2]


def test_features_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    make_dataset(tmp_path / "pairs", n=6)
    recipe = small_recipe(data={"validation": [str(tmp_path / "pairs")]})
    pairs = validation_pairs(recipe, Tokenizer(16), device="cpu")
    assert pairs is not None
    encoder = SimpleNamespace(
        encode_image=lambda images: torch.where(torch.arange(len(images))[:, None] < 3, torch.nan, torch.ones(1, 4)),
        encode_text=lambda ids: torch.ones(len(ids), 4),
    )
    with pytest.raises(RunError) as error:
        pairs.features(encoder)  # type: ignore[arg-type]
    assert str(error.value) == (
        "validation: 3 of 6 image features are not finite; the weights of this checkpoint are damaged; "
        "name an earlier one"
    )


def test_a_shared_text_is_right_for_each_of_its_images() -> None:
    images = F.normalize(torch.eye(3) + 0.1, dim=1)
    texts = images[[0, 2]]
    scores = image_text_retrieval(images, texts, [[0], [0, 1], [1]])
    assert scores["image_to_text"]["r1"] == 1.0
    assert scores["text_to_image"]["n"] == 2


def test_captions_of_a_picture_are_drawn_together() -> None:
    """Five captions a picture that all find it or all do not tell no more than one."""
    torch.manual_seed(0)
    images = F.normalize(torch.randn(40, 6), dim=1)
    own = F.normalize(images + 0.5 * torch.randn(40, 6), dim=1)
    alone = image_text_retrieval(images, own, [[i] for i in range(40)])["text_to_image"]
    captions = [list(range(5 * i, 5 * i + 5)) for i in range(40)]
    five = image_text_retrieval(images, own.repeat_interleave(5, 0), captions)["text_to_image"]
    assert (five["r1"], five["n"]) == (alone["r1"], 200)
    widths = [found["r1_interval"].high - found["r1_interval"].low for found in (five, alone)]
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    queries, gallery = F.normalize(torch.randn(50, 6), dim=1), F.normalize(torch.randn(70, 6), dim=1)
    right = [[i, (3 * i) % 70] for i in range(50)]
    assert torch.equal(ranks(queries, gallery, right), ranks(queries, gallery, right, chunk=7))


def test_each_text_gets_the_images_that_name_it() -> None:
    assert images_of_texts([[0, 2], [2], []], 4) == [[0], [], [0, 1], []]


def test_pairs_of_a_batch_find_each_other_as_a_loop_says() -> None:
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(23, 6), dim=1), F.normalize(torch.randn(15, 6), dim=1)
    texts[3] = images[4]
    captions = [[i % 15, (i + 1) % 15] for i in range(23)]
    found = in_batch(images, texts, captions, batch_size=5)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    hits, right = [], 0
    for chosen in (order[start : start + 5] for start in (0, 5, 10, 15)):
        own = [captions[image][0] for image in chosen]
        for row, image in enumerate(chosen):
            scores = [float(images[image] @ texts[text]) for text in own]
            hits.append(own[scores.index(max(scores))] in captions[image])
            scores = [float(images[other] @ texts[own[row]]) for other in chosen]
            hits.append(own[row] in captions[chosen[scores.index(max(scores))]])
            right += sum(text in captions[image] for text in own)
    assert found.acc1 == pytest.approx(sum(hits) / len(hits))
    assert 0.1 < found.acc1 < 0.9
    assert found.chance == pytest.approx(right / (4 * 25))
    assert found.batch_size == 5


def test_a_batch_larger_than_the_pairs_is_all_of_them() -> None:
    same = F.normalize(torch.eye(4) + 0.1, dim=1)
    own = [[i] for i in range(4)]
    assert in_batch(same, same, own, batch_size=64) == InBatch(acc1=1.0, chance=0.25, batch_size=4)


def test_the_modality_gap_is_the_distance_of_the_means() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    assert modality_gap(images, texts, [[0, 1], [0]]) == pytest.approx(0.5**0.5)
    assert modality_gap(images, texts, [[1], [1]]) == pytest.approx((0.5**2 + 1.5**2) ** 0.5)
