"""How far merging moves the features of trained models, and what it costs in time.

    PYTHONPATH=tests python -m ablation.distortion OUT.json --runs RUN... --pictures NAME=TAR... [--places 2,3,4]...

A row is one run, set of pictures, method, choice of places and rate: the mean, the median and the 95th percentile of
1 - cosine to the unmerged feature, the tokens that the blocks see and the CPU time of the image tower as shares of the
unmerged ones; of blank and of drawn patches how many share a token at the end of the tower, and their mean guidance at
each merge. No labels are needed. Rates that the places cannot reach are left out. Times are taken in turn with the
unmerged tower, on one thread.

results/merging holds what we measured: distortion.json by this program, distortion_before.json by it with the code of
commit a975000 (minus cosine plus a quarter of the larger guidance, two places), places.json and places_time.json for
more choices of places, variants.json for single parts of the rule changed by hand, distortion_by_distance.json with
the distance from the mean in the place of class attention, and merge_sweep_patch_4.json for a model of 256 patches.
"""

import argparse
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.data.pictures import open_picture
from mlip_cli.data.transforms import decode, evaluation_transform
from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.runs.loading import load_run

BATCH_SIZE, ROUNDS = 32, 5
LOOKED_AT = 64
"""Pictures of each set of which the groups and the guidance are looked at."""
BLANK = 4
"""Largest difference between two pixels of a blank patch, of 255."""


def pictures(tar: Path, size: int, limit: int) -> Tensor:
    """The first pictures of a tar as the model gets them: (n, 3, S, S) uint8."""
    found: list[Tensor] = []
    with tarfile.open(tar) as members:
        for member in members:
            file = members.extractfile(member)
            if file is not None and member.name.endswith((".webp", ".png", ".jpg")):
                found.append(evaluation_transform(decode(open_picture(file.read())), size=size))
            if len(found) == limit:
                break
    return torch.stack(found)


def plans(
    model: CLIP, method: str, places: Sequence[Sequence[int] | None], rates: Sequence[float]
) -> Iterator[tuple[float, MergePlan]]:
    """The plans that reach their rates, with the default strength: (rate asked for, plan)."""
    tower = model.vision
    for at in places:
        for rate in rates:
            try:
                yield (
                    rate,
                    MergePlan.resolve(
                        depth=tower.depth,
                        num_patches=tower.num_patches,
                        rate=rate,
                        at=at,
                        method=method,
                        stem=tower.stem_depth,
                    ),
                )
            except UsageError:
                continue


@torch.inference_mode()
def features(model: CLIP, images: Tensor, plan: MergePlan) -> Tensor:
    """Unit features of all pictures: (n, D) fp64."""
    parts = [model.encode_image(batch, plan).double() for batch in images.split(BATCH_SIZE)]
    return F.normalize(torch.cat(parts), dim=-1)


def time_share(model: CLIP, images: Tensor, plan: MergePlan) -> float:
    """CPU time of one batch against the mean of the unmerged ones before and after it: the median over rounds."""

    def seconds(plan: MergePlan) -> float:
        start = time.process_time()
        features(model, images, plan)
        return time.process_time() - start

    whole = model.merge_plan(0.0)
    rounds = [(seconds(whole), seconds(plan), seconds(whole)) for _ in range(ROUNDS + 1)][1:]
    return median(2 * merged / (before + after) for before, merged, after in rounds)


@torch.inference_mode()
def blank_and_drawn(model: CLIP, images: Tensor, plan: MergePlan) -> dict[str, Any]:
    """Of blank and of drawn patches: patches by the tokens that they fill, and mean guidance at each merge."""
    p, stages = model.vision.patch_size, model.merge_stages(images, plan)
    patches = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2).int()
    is_blank = patches.amax(-1) - patches.amin(-1) <= BLANK
    groups, found = stages[-1].groups, {}
    sizes = torch.zeros(groups.shape).scatter_add(1, groups, torch.ones(groups.shape)).gather(1, groups)
    for name, chosen in (("blank", is_blank), ("drawn", ~is_blank)):
        shares = chosen / sizes
        found[f"{name}_patches_a_token"] = round((chosen.sum() / shares.sum()).item(), 2)
        maps = [stage.mixed for stage in stages if stage.mixed is not None]
        found[f"{name}_guidance"] = [round(values[chosen].mean().item(), 3) for values in maps]
    return found


def measure(run: Path, sets: dict[str, Path], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one run."""
    model = load_run(str(run), device="cpu").model.eval()
    read = {name: pictures(tar, model.image_size, options.limit) for name, tar in sets.items()}
    unmerged = {name: features(model, images, model.merge_plan(0.0)) for name, images in read.items()}
    first = next(iter(read.values()))[:BATCH_SIZE]
    for method in options.methods:
        for rate, plan in plans(model, method, options.places, options.rates):
            share = time_share(model, first, plan)
            tokens = sum(plan.tokens) / (plan.num_patches * len(plan.tokens))
            for name, images in read.items():
                moved = 1 - (features(model, images, plan) * unmerged[name]).sum(-1)
                yield {
                    "run": run.name,
                    "pictures": name,
                    "n": len(images),
                    "method": method,
                    "at": plan.at,
                    "rate": rate,
                    "true_rate": round(plan.rate, 4),
                    "tokens": round(tokens, 4),
                    "cpu_time": round(share, 3),
                    "mean": float(f"{moved.mean():.4g}"),
                    "median": float(f"{moved.median():.4g}"),
                    "p95": float(f"{moved.quantile(0.95):.4g}"),
                    **blank_and_drawn(model, images[:LOOKED_AT], plan),
                }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--pictures", nargs="+", required=True, help="NAME=TAR")
    parser.add_argument("--methods", nargs="+", default=["guided", "tome"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.8])
    parser.add_argument("--places", nargs="+", default=["default"], help="default, or blocks such as 2,3,4")
    parser.add_argument("--limit", type=int, default=384, help="pictures of each tar")
    options = parser.parse_args()
    options.places = [None if at == "default" else tuple(map(int, at.split(","))) for at in options.places]
    sets = {name: Path(tar) for name, _, tar in (given.partition("=") for given in options.pictures)}
    rows = [json.dumps(row) for run in options.runs for row in measure(run, sets, options)]
    options.out.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
