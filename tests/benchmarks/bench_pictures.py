"""How long merge pictures take: 64 photos of 224 px, 14 x 14 patches, three merges: groups and three maps of each.

    make bench                    or, alone:    python tests/benchmarks/bench_pictures.py

Drawing and writing (encoding, and files that are synced) apart, and both as merge-sweep does them; the forward pass is
not counted. The photos are the two that scikit-learn ships, in crops.
"""

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from mlip_cli.devices import device_name
from mlip_cli.evaluate.merge_pictures import WRITERS, PanelWriter
from mlip_cli.evaluate.panels import panel_pictures, stage_panels
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.config import Data, Model, Text, Vision
from mlip_cli.terminal.output import print_lines, print_table
from mlip_cli.types import MergeStage

NUM_PICTURES, SIZE, GRID = 64, 224, (14, 14)
ROUNDS = 3


def photos() -> Tensor:
    """Crops of two photos: (64, 3, 224, 224) uint8."""
    sources = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(NUM_PICTURES):
        source = sources[i % len(sources)]
        top, left = (int(torch.randint(side - SIZE, (1,), generator=generator)) for side in source.shape[1:])
        crops.append(source[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(crops)


def three_stages(images: Tensor) -> tuple[MergeStage, ...]:
    """Merges of a small ViT with random weights on the grid of ViT-B/16."""
    config = Model(
        vision=Vision(patch_size=16, width=64, depth=6, num_heads=2), text=Text(width=64, depth=1, num_heads=1)
    )
    torch.manual_seed(0)
    model = CLIP(config, data=Data(train=(), image_size=SIZE), losses={}, global_batch_size=2).eval()
    plan = type(model.plan).resolve(depth=6, num_patches=196, rate=0.6, at=(2, 3, 4), method="guided")
    with torch.inference_mode():
        return model.merge_stages(images, plan)


def median_s(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[ROUNDS // 2]


def test_speed_of_merge_pictures() -> None:
    images = photos()
    stages = three_stages(images)
    panels = panel_pictures(images)
    drawn: dict[str, Tensor] = {}

    def draw() -> None:
        drawn.clear()
        drawn["picture"] = panel_pictures(images)
        for i, stage in enumerate(stages):
            drawn.update({f"{i}_{kind}": own for kind, own in stage_panels(panels, stage, GRID) if own is not None})

    def write(batches: dict[str, Tensor]) -> None:
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(WRITERS) as pool:
            writer = PanelWriter(Path(name), Path(name), is_magnified=False, pool=pool)
            for kind, batch in batches.items():
                writer.write(batch, [f"{i:06d}_{kind}" for i in range(len(batch))])
            sizes.extend(path.stat().st_size for path in Path(name).iterdir())

    def both() -> None:
        draw()
        write(drawn)

    sizes: list[int] = []
    rows = [
        [name, f"{seconds:.2f}", f"{1000 * seconds / NUM_PICTURES:.1f}"]
        for name, seconds in (
            ("drawing", median_s(draw)), ("writing", median_s(lambda: write(drawn))), ("both", median_s(both)),
        )
    ]  # fmt: skip
    print_table(["", f"s for {NUM_PICTURES} pictures", "ms a picture"], rows)
    print_lines(
        f"{len(drawn)} panels of {SIZE} px a picture, {sum(sizes) / len(sizes) / 1024:.1f} KiB each, at most "
        f"{max(sizes) / 1024:.1f}; {device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    test_speed_of_merge_pictures()
