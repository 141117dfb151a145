"""Zero-shot classification equals clip-benchmark's own functions on the same model."""

from collections.abc import Sequence

import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification as reference
from torch import Tensor, nn

from mlip_cli.errors import RunError
from mlip_cli.evaluate.zeroshot import class_embeddings, classification, normalized, similarities, top_classes

TEMPLATES = ["a photo of a {c}.", "{c}", "the {c} in the picture"]


class LinearEncoder(nn.Module):
    """The smallest real two-tower model: a linear map of pixels, and the mean of letter embeddings."""

    def __init__(self, size: int = 8, embed_dim: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(3 * size * size, embed_dim)
        self.letters = nn.Embedding(256, embed_dim)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images.float().flatten(1) / 255)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        return self.letters(token_ids).mean(dim=1)


def tokenize(texts: Sequence[str]) -> Tensor:
    return torch.tensor([list(text.encode()[:32].ljust(32)) for text in texts])


@pytest.mark.parametrize("num_classes", [3, 5, 11])
def test_equals_clip_benchmark(num_classes: int) -> None:
    model, names = LinearEncoder(), [f"class {i * i}" for i in range(num_classes)]
    random = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (203, 3, 8, 8), dtype=torch.uint8, generator=random)
    labels = torch.randint(0, num_classes - 1, (203,), generator=random)  # the last class has no picture
    batches = list(zip(images.split(32), labels.split(32), strict=True))

    classifier = reference.zero_shot_classifier(model, tokenize, names, TEMPLATES, "cpu", amp=False)
    logits, target = reference.run_classification(model, classifier, batches, "cpu", amp=False)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        recall = reference.balanced_accuracy_score(target, logits.argmax(1))

    classes = class_embeddings(names, TEMPLATES, tokenize=tokenize, encode_text=model.encode_text, device="cpu")
    torch.testing.assert_close(classes.T, classifier, rtol=0, atol=1e-6)
    with torch.no_grad():
        top = torch.cat([top_classes(normalized(model.encode_image(x), "image"), classes) for x, _ in batches])
    assert torch.equal(top, logits.topk(min(5, num_classes), 1).indices)
    ours = classification(top, labels, names)
    right = logits.argsort(dim=1, descending=True) == target[:, None]  # what `accuracy` counts before numpy 2.4
    assert ours["acc1"] == pytest.approx(right[:, :1].any(1).float().mean().item(), abs=1e-7)
    if num_classes < 5:
        assert ours["acc5"] is None
    else:
        assert ours["acc5"] == pytest.approx(right[:, :5].any(1).float().mean().item(), abs=1e-7)
    assert ours["mean_per_class_recall"] == pytest.approx(recall)


def test_embeddings_do_not_depend_on_the_text_batch() -> None:
    model, names = LinearEncoder(), [str(i) for i in range(150)]
    whole = class_embeddings(names, TEMPLATES, tokenize=tokenize, encode_text=model.encode_text, device="cpu")
    alone = class_embeddings(names[140:], TEMPLATES, tokenize=tokenize, encode_text=model.encode_text, device="cpu")
    torch.testing.assert_close(whole[140:], alone)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(150))


def test_scores_are_keyed_by_index_when_names_repeat() -> None:
    top = torch.tensor([[0, 1], [1, 0], [1, 0], [1, 0]])
    scores = classification(top, torch.tensor([0, 1, 1, 0]), ["sunglasses", "sunglasses"])
    assert [entry["recall"] for entry in scores["per_class"]] == [0.5, 1.0]
    assert scores["acc1"] == 0.75
    assert scores["mean_per_class_recall"] == 0.75


def test_scores_are_fp32_and_features_finite() -> None:
    with pytest.raises(RunError, match="image features are not finite; the weights of this checkpoint are damaged"):
        normalized(torch.tensor([[1.0, float("nan")]]), "image")
    with pytest.raises(RunError, match="1 of 2 image features are not finite"):
        normalized(torch.tensor([[1e30, 1e30], [1.0, 0.0]]), "image")  # too long for fp32, though each number is finite
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert similarities(torch.eye(2), torch.eye(2)).dtype == torch.float32
    half = normalized(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16), "image")
    assert half.dtype == torch.float32
