"""Write what became one token, at every setting of a sweep, as pictures into a run folder."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from mlip_cli.evaluate.panels import MAP_COLORS, as_webp, panel_pictures, stage_panels
from mlip_cli.evaluate.picture_results import DrawnPicture, DrawnSetting, DrawnStage, MergePicturesResult, StageTokens
from mlip_cli.evaluate.sweep import ChosenPicture, Point, SweepDataset
from mlip_cli.evaluate.wanted import FAILURES
from mlip_cli.files import write_bytes
from mlip_cli.runs.loading import LoadedRun
from mlip_cli.runs.result_files import checked
from mlip_cli.terminal.output import plural, say, warn
from mlip_cli.types import MergeStage

DRAWN_STAGES = 3
"""Merges drawn of each picture, the first and the last among them: a deep tower merges too often to look at all."""

WRITERS = 8
"""Threads that write files; each waits for the disk, so there may be more of them than cores."""


@dataclass(frozen=True)
class PanelWriter:
    """Writes panels into one folder, several at a time."""

    root: Path
    """Paths in results start at this folder."""
    folder: Path
    is_magnified: bool
    pool: ThreadPoolExecutor

    def write(self, panels: Tensor, names: Sequence[str]) -> list[str]:
        """One file a panel (B, 3, H, W); their paths from `root`."""
        return list(self.pool.map(self._write, panels.unbind(), names))

    def _write(self, panel: Tensor, name: str) -> str:
        path = self.folder / f"{name}.webp"
        write_bytes(path, as_webp(panel, is_magnified=self.is_magnified))
        return path.relative_to(self.root).as_posix()


def write_merge_pictures(
    loaded: LoadedRun, points: Sequence[Point], datasets: Sequence[SweepDataset], *, num_pictures: int
) -> None:
    """Draw pictures of the first data set that can be read, the same at every setting except rate 0.

    They lie in a folder of their own. Those of earlier sweeps of this checkpoint are removed after the new result is
    written.
    """
    dataset, chosen = _choose(datasets, num_pictures)
    if dataset is None:
        return
    root, model = loaded.run.folder, loaded.model
    name = f"merging_{loaded.checkpoint.name}"
    folder = loaded.run.pictures / f"{name}_{uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    images = torch.stack([picture.image for picture in chosen])
    panels = panel_pictures(images)
    with ThreadPoolExecutor(WRITERS) as pool:
        writer = PanelWriter(root, folder, panels.shape[-2] > images.shape[-2], pool)
        paths = writer.write(panels, [f"{picture.number:06d}" for picture in chosen])
        drawn = [_point(loaded, point, chosen, paths, panels, writer) for point in points if point.method]
    result = MergePicturesResult(
        run=loaded.label,
        checkpoint=loaded.checkpoint.name,
        step=loaded.step,
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        attribution=dataset.attribution,
        grid=model.vision.grid,
        image_size=model.image_size,
        chosen="at random with seed 0, the same for every setting",
        map_colors=MAP_COLORS,
        points=drawn,
    )
    result.write(loaded.run.evals / f"merge_pictures_{loaded.checkpoint.name}.json")
    for other in loaded.run.pictures.glob(f"{name}_*"):
        if other != folder:
            shutil.rmtree(other)
    say(f"{plural(len(chosen), 'picture')} of {dataset.name} at each setting drawn in {folder}")


def _choose(datasets: Sequence[SweepDataset], wanted: int) -> tuple[SweepDataset | None, list[ChosenPicture]]:
    """The first data set that can be read, and pictures of it."""
    for dataset in datasets:
        try:
            return dataset, dataset.choose(wanted)
        except FAILURES as error:
            warn(f"{dataset.name}: no merge pictures: {error}")
    return None, []


def _point(
    loaded: LoadedRun,
    point: Point,
    chosen: Sequence[ChosenPicture],
    pictures: Sequence[str],
    panels: Tensor,
    writer: PanelWriter,
) -> DrawnSetting:
    plan, images = point.encoder.plan, torch.stack([picture.image for picture in chosen])
    with torch.inference_mode():
        merges = point.encoder.merge_stages(images.to(loaded.device))
    stages = [stage.to("cpu") for stage in spread_evenly(merges)]
    written = []
    for stage in stages:
        paths = {}
        for kind, drawn in stage_panels(panels, stage, loaded.model.vision.grid):
            end = f"{point.method}_{point.rate:g}_block{stage.block}_{kind}"
            names = [f"{picture.number:06d}_{end}" for picture in chosen]
            paths[kind] = None if drawn is None else writer.write(drawn, names)
        written.append(paths)
    return DrawnSetting(
        **vars(point.setting),
        stages=[StageTokens(stage.block, plan.merges[stage.block]) for stage in stages],
        pictures=[
            DrawnPicture(
                picture.number,
                picture.label,
                path,
                [checked(DrawnStage, {kind: own and own[i] for kind, own in of_stage.items()}) for of_stage in written],
            )
            for i, (picture, path) in enumerate(zip(chosen, pictures, strict=True))
        ],
    )


def spread_evenly(merges: Sequence[MergeStage]) -> list[MergeStage]:
    """At most DRAWN_STAGES of all merges: the first, the last, and those between at equal steps."""
    last, shown = len(merges) - 1, min(len(merges), DRAWN_STAGES)
    return [merges[round(i * last / max(shown - 1, 1))] for i in range(shown)]
