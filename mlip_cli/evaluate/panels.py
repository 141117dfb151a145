"""What became one token, drawn on the picture, and the guidance that merging followed, as colours over the picture.

All drawing is arithmetic on whole batches: pictures (B, 3, H, W) uint8 and numbers of their patches (B, N), on any grid
of N = h*w patches.
"""

import colorsys
import io
import math
from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.types import MergeStage

MAPS = ("spatial", "frequency", "mixed")
"""Guidance of a stage."""

PANEL_SIDES = (192, 256)
"""Smallest and largest shorter side of a panel in pixels: smaller pictures are magnified, larger ones shrunk."""

HUE_STEPS = (0.18737, 0.46321)
"""Turns of the hue from row to row and from column to column, found by search: patches that touch, also at corners, are
at least 67 degrees apart, those two steps away 26, and equal hues as far apart as can be."""

TINT = 0.6
"""Share of the group's colour in its patches; the rest is the picture in grey, so that no other hue spoils it."""

DARK = 110
"""Groups with a mean grey up to this get light borders, others dark ones."""

MAP_COLORS = (
    *("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c"),
    *("#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"),
)
"""Guidance from 0 to 1 in equal steps: of matplotlib's viridis, whose lightness rises evenly in any colour vision."""

MAP_SHARE = 0.75
"""Share of the map's colour; the rest is the picture in grey."""


def panel_pictures(pictures: Tensor) -> Tensor:
    """Pictures at the size of panels: (B, 3, H, W) uint8 -> the same, small ones magnified by a whole number."""
    smallest, largest = PANEL_SIDES
    height, width = pictures.shape[-2:]
    side = min(height, width)
    if side <= largest:
        factor = math.ceil(smallest / side)
        return pictures.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    size = (round(height * largest / side), round(width * largest / side))
    return F.interpolate(pictures.float(), size=size, mode="area").round().to(torch.uint8)


def draw_groups(pictures: Tensor, groups: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tint and frame the patches that share a token: (B, 3, H, W) uint8, (B, N) int64 -> (B, 3, H, W) uint8.

    A patch alone in its token stays as it is. A group has the colour of its smallest patch, and keeps it when it grows
    by later patches.
    """
    index = torch.arange(groups.shape[1]).expand_as(groups)
    smallest = torch.full_like(groups, groups.shape[1]).scatter_reduce(1, groups, index, "amin").gather(1, groups)
    sizes = group_sums(torch.ones(groups.shape), groups)
    grey = grey_of(pictures)
    brightness = group_sums(F.adaptive_avg_pool2d(grey, grid).flatten(1), groups) / sizes

    color = group_colors(grid)[smallest].transpose(1, 2)
    line = 0.7 * color + torch.where(brightness > DARK, 0.0, 0.3 * 255)[:, None]
    size = (pictures.shape[-2], pictures.shape[-1])
    tinted = blend(grey, color, grid, share=TINT)
    is_border = near_another(smallest, grid, size, distance=max(1, size[0] // grid[0] // 8))
    drawn = torch.where(is_border[:, None], spread(line.round().to(torch.uint8), grid, size), tinted)
    return torch.where(spread(sizes > 1, grid, size)[:, None], drawn, pictures)


def draw_guidance(pictures: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Guidance in MAP_COLORS over the picture in grey: (B, 3, H, W) uint8, (B, N) in [0, 1] -> (B, 3, H, W) uint8."""
    stops = torch.tensor([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in MAP_COLORS]).float()
    at = values.float() * (len(stops) - 1)
    below = at.long().clamp(max=len(stops) - 2)
    color = torch.lerp(stops[below], stops[below + 1], (at - below)[..., None])
    return blend(grey_of(pictures), color.transpose(1, 2), grid, share=MAP_SHARE)


def as_webp(panel: Tensor, *, is_magnified: bool) -> bytes:
    """A panel (3, H, W) uint8 as WebP; magnified pixels stay exact, photos get small."""
    from PIL import Image

    file = io.BytesIO()
    settings = {"lossless": True, "quality": 50, "method": 2} if is_magnified else {"quality": 90, "method": 0}
    Image.fromarray(panel.permute(1, 2, 0).contiguous().numpy()).save(file, "WEBP", **settings)
    return file.getvalue()


def blend(grey: Tensor, color: Tensor, grid: tuple[int, int], *, share: float) -> Tensor:
    """`share` of each patch's colour, the rest grey: (B, 1, H, W), (B, 3, N) in [0, 255] -> (B, 3, H, W) uint8."""
    size = (grey.shape[-2], grey.shape[-1])
    rest = ((1 - share) * grey).to(torch.uint8)  # rounded down, so that the sum is at most 255
    return spread((share * color).round().to(torch.uint8), grid, size) + rest


def spread(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Give each pixel its patch's value: (..., N), grid (h, w), size (H, W) -> (..., H, W)."""
    rows, columns = lines_of_patches(grid, size)
    return values.unflatten(-1, grid).index_select(-1, columns).index_select(-2, rows)


def lines_of_patches(grid: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of the patch that each row and column of pixels lies in: (H,), (W,) int64."""
    rows, columns = (torch.arange(pixels) * patches // pixels for patches, pixels in zip(grid, size, strict=True))
    return rows, columns


def group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """Sum over each patch's group: (B, N), (B, N) -> (B, N)."""
    return torch.zeros_like(values).scatter_add(1, groups, values).gather(1, groups)


def grey_of(pictures: Tensor) -> Tensor:
    """Luma of Rec. 601: (B, 3, H, W) uint8 -> (B, 1, H, W) float in [0, 255]."""
    red, green, blue = pictures.unbind(1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def near_another(numbers: Tensor, grid: tuple[int, int], size: tuple[int, int], *, distance: int) -> Tensor:
    """Pixels with another patch's number `distance` rows or columns away, or both: (B, N) -> (B, H, W) bool."""
    own = numbers.to(torch.int16).unflatten(1, grid)
    shifted = [
        [line[(torch.arange(len(line)) + way * distance).clamp(0, len(line) - 1)] for way in (0, -1, 1)]
        for line in lines_of_patches(grid, size)
    ]
    here, *around = (own.index_select(2, columns).index_select(1, rows) for rows, columns in product(*shifted))
    is_near = torch.zeros(here.shape, dtype=torch.bool)
    for there in around:
        is_near |= there != here
    return is_near


def group_colors(grid: tuple[int, int]) -> Tensor:
    """A colour for the groups whose smallest patch this is: grid (h, w) -> (N, 3) RGB in [0, 255]."""
    colors = []
    for row, column in product(range(grid[0]), range(grid[1])):
        hue = row * HUE_STEPS[0] + column * HUE_STEPS[1]
        lightness = 0.45 + 0.15 * ((row + column) % 2)  # a second difference between neighbours
        colors.append(colorsys.hls_to_rgb(hue % 1, lightness, 0.8))
    return 255 * torch.tensor(colors)


def stage_panels(panels: Tensor, stage: MergeStage, grid: tuple[int, int]) -> Iterator[tuple[str, Tensor | None]]:
    """Groups, then the three maps of a stage, drawn on (B, 3, H, W) uint8 when they are asked for."""
    yield "groups", draw_groups(panels, stage.groups, grid)
    for kind in MAPS:
        values: Tensor | None = getattr(stage, kind)
        yield kind, None if values is None else draw_guidance(panels, values, grid)
