"""Ranks of a run or a checkpoint for the three questions, picture by picture: ablation.measure RUN OUT.json ..."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ablation.questions import QUESTIONS
from ablation.train_one import CPU_TIMES
from torch import Tensor

from mlip_cli.data.open import open_prepared
from mlip_cli.evaluate.validation import evaluation_loader, tokenize
from mlip_cli.evaluate.zeroshot import normalized, similarities, text_features
from mlip_cli.files import write_json
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import LoadedRun, at_rate, load_run

BATCH_SIZE = 256


@dataclass(frozen=True)
class Question:
    """Pictures of a split and the texts among which they look for theirs."""

    numbers: Sequence[int]
    """Pictures, by their numbers in the split."""
    texts: Sequence[str]
    right: Tensor
    """(pictures, texts) bool. A picture without a right text is a wrong answer to all texts."""
    concepts: Sequence[str]
    """Of the pictures with a right text, as `sources`; these are the pictures that have ranks."""
    sources: Sequence[str]

    @classmethod
    def of(cls, name: str, samples: Sequence[Mapping[str, Any]]) -> "Question":
        """The question `name` among the samples of a split."""
        numbers = [i for i, sample in enumerate(samples) if name in sample["questions"].split()]
        own = [samples[i] for i in numbers]
        texts_of = [one["tags"].split(", ") if name == "tags" else [one["name"]] for one in own]
        texts_of = [[text for text in texts if text] for texts in texts_of]
        texts = sorted({text for found in texts_of for text in found})
        number = {text: i for i, text in enumerate(texts)}
        right = torch.zeros(len(own), len(texts), dtype=torch.bool)
        for row, found in enumerate(texts_of):
            right[row, [number[text] for text in found]] = True
        asked = [one for one, found in zip(own, texts_of, strict=True) if found]
        return cls(numbers, texts, right, [one["concept"] for one in asked], [one["source"] for one in asked])


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """`name`, `concept`, `source`, `questions` and `tags` of every picture, in order."""
    dataset = open_prepared(folder)
    return [dict(dataset.read(id).info.meta) for id in range(dataset.num_samples)]


def pair_ranks(scores: Tensor, right: Tensor) -> Tensor:
    """The place of every right candidate among the wrong ones of its query, from 1: (Q, G), (Q, G) bool -> (Q, G).

    A wrong candidate of an equal score comes before it. Where a candidate is wrong the place is 0.
    """
    places = torch.zeros(scores.shape, dtype=torch.int64)
    for row in range(len(scores)):
        own, wrong = scores[row, right[row]], scores[row, ~right[row]]
        places[row, right[row]] = 1 + (wrong >= own[:, None]).sum(dim=1)
    return places


def ranks_of(pictures: Tensor, texts: Tensor, right: Tensor) -> dict[str, str]:
    """Both ways' places of all right pairs: (I, E), (T, E) unit vectors, (I, T) bool -> a line each.

    A line holds a word for each picture with a right text: its places, one for each of its texts, between commas.
    """
    scores = similarities(pictures, texts)
    places = {"image_to_text": pair_ranks(scores, right), "text_to_image": pair_ranks(scores.T, right.T).T}
    return {way: in_one_line(found[i, right[i]].tolist() for i in range(len(right))) for way, found in places.items()}


def in_one_line(places: Iterable[Sequence[int]]) -> str:
    """As JSON that stays small and can be read."""
    return " ".join(",".join(map(str, own)) for own in places if own)


def image_features(run: LoadedRun, folder: Path, rate: float | None) -> dict[str, Tensor]:
    """Unit vectors of all pictures, (n, E) each: `spatial`, and with a frequency head `frequency` and their `sum`."""
    encoder = at_rate(run.model, rate)
    parts: dict[str, list[Tensor]] = {"spatial": [], "frequency": [], "sum": []}
    for images in evaluation_loader(open_prepared(folder), data=run.recipe.data, batch_size=BATCH_SIZE, num_workers=0):
        with torch.no_grad():
            found = encoder.image_features(images)
        spatial = normalized(found.spatial, "image")
        parts["spatial"].append(spatial)
        if found.frequency is not None:
            frequency = normalized(found.frequency, "frequency")
            parts["frequency"].append(frequency)
            parts["sum"].append(F.normalize(spatial + frequency, dim=-1))
    return {name: torch.cat(features) for name, features in parts.items() if features}


def encode_texts(run: LoadedRun, texts: Sequence[str]) -> Tensor:
    """Unit vectors: (len(texts), E)."""
    return text_features(
        texts,
        tokenize=lambda some: tokenize(run.tokenizer, run.device, some),
        encode_text=run.model.encode_text,
        device="cpu",
        batch_size=BATCH_SIZE,
    )


def cpu_s(run: Run) -> float | None:
    """CPU seconds of the training; None if a session was killed before it could say."""
    path = run.folder / CPU_TIMES
    lines = path.read_text().splitlines() if path.is_file() else []
    if len(lines) < len(run.read_stamp().sessions):
        return None
    return round(sum(json.loads(line)["cpu_s"] for line in lines), 1)


def measure(run: LoadedRun, data: Path, split: str, questions: Mapping[str, Question]) -> dict[str, Any]:
    """Everything that the verdict reads, as the run evaluates itself and, if it merges tokens, without merging."""
    merging = run.recipe.model.merging
    rates = [None, 0.0] if merging is not None and merging.rate else [None]
    texts = {name: encode_texts(run, question.texts) for name, question in questions.items()}
    at: dict[str, Any] = {}
    for rate in rates:
        features = image_features(run, data / split, rate)
        at["own" if rate is None else f"{rate:g}"] = {"rate": at_rate(run.model, rate).plan.rate} | {
            feature: {name: ranks_of(x[list(q.numbers)], texts[name], q.right) for name, q in questions.items()}
            for feature, x in features.items()
        }
    return {
        "split": split,
        "data": open_prepared(data / split).fingerprint,
        "step": run.step,
        "cpu_s": cpu_s(run.run),
        "torch": str(torch.__version__),
        "recipe": recipe_yaml(run.recipe).replace(f"{data.resolve()}/", ""),
        "at": at,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=("validation", "test"), required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = load_run(str(arguments.run), device="cpu")
    folder = arguments.data / arguments.split
    samples = samples_of(folder)
    questions = {name: Question.of(name, samples) for name in QUESTIONS}
    shared = {name: {"concepts": q.concepts, "sources": q.sources} for name, q in questions.items()}
    found = measure(run, arguments.data, arguments.split, questions)
    write_json(
        arguments.out.with_name(f"pictures_{arguments.split}.json"),
        {"data": open_prepared(folder).fingerprint, "questions": shared},
    )
    write_json(arguments.out, found)


if __name__ == "__main__":
    main()
