"""What a trained run is worth on a split of the ablation's data: ranks picture by picture, as one JSON object."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ablation.pointing_runs import point

from mlip_cli.data.open import open_prepared
from mlip_cli.evaluate.retrieval import images_of_texts, ranks
from mlip_cli.evaluate.validation import evaluation_loader, tokenize
from mlip_cli.evaluate.zeroshot import normalized, text_features
from mlip_cli.files import write_json
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.runs.loading import LoadedRun, at_rate, load_run

BATCH_SIZE = 256


def samples(folder: Path) -> list[dict[str, Any]]:
    """`name`, `concept`, `source` and `group` of every picture, in order."""
    dataset = open_prepared(folder)
    return [dict(dataset.read(id).info.meta) for id in range(dataset.num_samples)]


def image_features(run: LoadedRun, folder: Path, rate: float | None) -> dict[str, torch.Tensor]:
    """Unit vectors of all pictures, (n, E) each: `spatial`, and with a frequency head `sum` of both domains."""
    encoder = at_rate(run.model, rate)
    size = run.recipe.data.image_size
    parts: dict[str, list[torch.Tensor]] = {"spatial": [], "sum": []}
    loader = evaluation_loader(open_prepared(folder), image_size=size, batch_size=BATCH_SIZE, num_workers=0)
    for images in loader:
        with torch.no_grad():
            found = encoder.image_features(images)
        spatial = normalized(found.spatial, "image")
        parts["spatial"].append(spatial)
        if found.frequency is not None:
            parts["sum"].append(F.normalize(spatial + normalized(found.frequency, "frequency"), dim=-1))
    return {name: torch.cat(features) for name, features in parts.items() if features}


def encode_texts(run: LoadedRun, texts: Sequence[str]) -> torch.Tensor:
    """Unit vectors: (len(texts), E)."""
    return text_features(
        texts,
        tokenize=lambda some: tokenize(run.tokenizer, some),
        encode_text=run.model.encode_text,
        device="cpu",
        batch_size=BATCH_SIZE,
    )


def retrieval(run: LoadedRun, pictures: torch.Tensor, names: Sequence[str]) -> dict[str, str]:
    """For each picture the place of its name among all names, and of the first picture of its name among all pictures.

    Places count from 1, in one line each, in the order of the pictures.
    """
    candidates = sorted(set(names))
    number = {name: i for i, name in enumerate(candidates)}
    right = [[number[name]] for name in names]
    texts = encode_texts(run, candidates)
    pictures_of = images_of_texts(right, len(candidates))
    by_name = ranks(texts, pictures, pictures_of)
    return {
        "image_to_text": in_one_line((ranks(pictures, texts, right) + 1).tolist()),
        "text_to_image": in_one_line(int(by_name[number[name]]) + 1 for name in names),
    }


def group_hits(run: LoadedRun, pictures: torch.Tensor, groups: Sequence[str], training: list[dict[str, Any]]) -> str:
    """1 or 0 a picture: is it nearest to its own group, the mean of the group's training names? - for new groups."""
    words: dict[str, set[str]] = {}
    for sample in training:
        words.setdefault(sample["group"], set()).add(sample["name"])
    known = sorted(words)
    classes = torch.stack([encode_texts(run, sorted(words[group])).mean(0) for group in known])
    nearest = (pictures @ F.normalize(classes, dim=-1).T).argmax(1).tolist()
    return "".join(
        "01"[known[best] == group] if group in words else "-" for best, group in zip(nearest, groups, strict=True)
    )


def in_one_line(numbers: Iterable[int]) -> str:
    """As JSON that stays small and can be read."""
    return " ".join(map(str, numbers))


def pictures(data: Path, split: str) -> dict[str, Any]:
    """What is the same for every run: of all pictures the group, of those whose name training never saw the rest."""
    trained_names = {sample["name"] for sample in samples(data / "train")}
    own = samples(data / split)
    unseen = [i for i, sample in enumerate(own) if sample["name"] not in trained_names]
    return {
        "data": open_prepared(data / split).fingerprint,
        "unseen": unseen,
        "concepts": [own[i]["concept"] for i in unseen],
        "sources": [own[i]["source"] for i in unseen],
        "groups": [sample["group"] for sample in own],
    }


def measure(
    run: LoadedRun, data: Path, split: str, unseen: Sequence[int], rates: Sequence[float | None]
) -> dict[str, Any]:
    """Everything that the verdict reads, at each merge rate (None: as the run evaluates itself)."""
    training, own = samples(data / "train"), samples(data / split)
    at: dict[str, Any] = {}
    pointing = point(run, [at_rate(run.model, rate) for rate in rates], data / split, batch_size=BATCH_SIZE)
    for rate, accuracy in zip(rates, pointing, strict=True):
        features = image_features(run, data / split, rate)
        at["own" if rate is None else f"{rate:g}"] = {
            "rate": at_rate(run.model, rate).plan.rate,
            "pointing": accuracy,
            "group_hits": group_hits(run, features["spatial"], [sample["group"] for sample in own], training),
            **{name: retrieval(run, f[unseen], [own[i]["name"] for i in unseen]) for name, f in features.items()},
        }
    return {
        "split": split,
        "data": open_prepared(data / split).fingerprint,
        "step": run.step,
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
    merging = run.recipe.model.merging
    rates = [None, 0.0] if merging is not None and merging.rate else [None]
    shared = pictures(arguments.data, arguments.split)
    found = measure(run, arguments.data, arguments.split, shared["unseen"], rates)
    write_json(arguments.out.with_name(f"pictures_{arguments.split}.json"), shared)
    write_json(arguments.out, found)
    print(json.dumps({name: scores["rate"] for name, scores in found["at"].items()}))


if __name__ == "__main__":
    main()
