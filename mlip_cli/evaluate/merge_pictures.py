"""Write what became one token, at every setting of a sweep, as pictures into a run folder."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlip_cli.evaluate.panels import MAP_COLORS, as_webp, panel_pictures, stage_panels
from mlip_cli.evaluate.picture_results import DrawnPicture, DrawnSetting, DrawnStage, MergePicturesResult, StageTokens
from mlip_cli.evaluate.sweep import FAILURES, ChosenPicture, Point, SweepDataset
from mlip_cli.files import write_bytes
from mlip_cli.runs.loading import LoadedRun
from mlip_cli.runs.result_files import checked
from mlip_cli.terminal.output import plural, say, warn
from mlip_cli.types import MergeStage

SUFFIX = ".webp"
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
        """One file a panel (B, 3, H, W); their paths from `root`.

        The name contains a digest of the content, so that files of another sweep are not overwritten.
        """
        return list(self.pool.map(self._write, panels.unbind(), names))

    def _write(self, panel: Tensor, name: str) -> str:
        content = as_webp(panel, is_magnified=self.is_magnified)
        path = self.folder / f"{name}-{hashlib.sha256(content).hexdigest()[:8]}{SUFFIX}"
        if not path.exists():
            write_bytes(path, content)
        return path.relative_to(self.root).as_posix()


def write_merge_pictures(
    loaded: LoadedRun, points: Sequence[Point], datasets: Sequence[SweepDataset], *, num_pictures: int
) -> None:
    """Draw pictures of the first data set that can be read, the same at every setting except rate 0.

    Pictures of an earlier sweep of this checkpoint are removed after the new result is written.
    """
    dataset, chosen = _choose(datasets, num_pictures)
    if dataset is None:
        return
    root, model = loaded.run.folder, loaded.model
    folder = loaded.run.pictures / f"merging_{loaded.checkpoint.name}"
    folder.mkdir(parents=True, exist_ok=True)
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
    _remove_others(folder, root, result)
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
    paths: Sequence[str],
    panels: Tensor,
    writer: PanelWriter,
) -> DrawnSetting:
    plan, images = point.encoder.plan, torch.stack([picture.image for picture in chosen])
    with torch.inference_mode():
        stages = [stage.to("cpu") for stage in loaded.model.merge_stages(images.to(loaded.device), plan)]
    names = [f"{picture.number:06d}_{point.method}_{point.rate:g}" for picture in chosen]
    written = [_write_stage(writer, panels, stage, loaded.model.vision.grid, names=names) for stage in stages]
    return DrawnSetting(
        **vars(point.setting),
        stages=[StageTokens(stage.block, plan.merges[stage.block]) for stage in stages],
        pictures=[
            DrawnPicture(picture.number, picture.label, path, [panels_of_stage[i] for panels_of_stage in written])
            for i, (picture, path) in enumerate(zip(chosen, paths, strict=True))
        ],
    )


def _write_stage(
    writer: PanelWriter, panels: Tensor, stage: MergeStage, grid: tuple[int, int], *, names: Sequence[str]
) -> list[DrawnStage]:
    """Paths of each picture's panels."""

    paths = {
        kind: None if drawn is None else writer.write(drawn, [f"{name}_block{stage.block}_{kind}" for name in names])
        for kind, drawn in stage_panels(panels, stage, grid)
    }
    return [
        checked(DrawnStage, {kind: None if own is None else own[i] for kind, own in paths.items()})
        for i in range(len(names))
    ]


def _remove_others(folder: Path, root: Path, result: MergePicturesResult) -> None:
    """Remove panels that the new result does not name."""
    pictures = [picture for point in result.points for picture in point.pictures]
    kept = {picture.image for picture in pictures}
    kept |= {path for picture in pictures for stage in picture.stages for path in vars(stage).values()}
    for path in folder.glob(f"*{SUFFIX}"):
        if path.relative_to(root).as_posix() not in kept:
            path.unlink()
