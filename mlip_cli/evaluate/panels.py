"""What became one token, drawn on the picture, and the guidance that merging followed, as colours over the picture.

All drawing is arithmetic on whole batches: pictures (B, 3, H, W) uint8 and numbers of their patches (B, N), on any grid
of N = h*w patches.
"""

import io
import math
from collections.abc import Iterator

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
    return values.unflatten(-1, grid).index_select(-2, rows).index_select(-1, columns)


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
    """Pixels with another patch's number at most `distance` rows and columns away: (B, N) -> (B, H, W) bool.

    A bit for each of the eight neighbours: of a patch, that its number is another; of a pixel, that it is near enough.
    """
    own = numbers.unflatten(1, grid)
    around = F.pad(own, (1, 1, 1, 1))  # with anything: no pixel is near a patch outside
    rows, columns = lines_of_patches(grid, size)
    near_rows, near_columns = _near(rows, distance), _near(columns, distance)
    differs = torch.zeros(own.shape, dtype=torch.uint8)
    is_near = torch.zeros(size, dtype=torch.uint8)
    for bit, (down, right) in enumerate((d, r) for d in (-1, 0, 1) for r in (-1, 0, 1) if (d, r) != (0, 0)):
        neighbour = around[:, 1 + down : 1 + down + grid[0], 1 + right : 1 + right + grid[1]]
        differs |= (neighbour != own).to(torch.uint8) << bit
        is_near |= (near_rows[down][:, None] & near_columns[right]).to(torch.uint8) << bit
    return (spread(differs.flatten(1), grid, size) & is_near) != 0


def _near(line: Tensor, distance: int) -> dict[int, Tensor]:
    """Places of a line that are near the patch before (-1), near their own (0, all), near the next (1): (n,) bool."""
    places = torch.arange(len(line))
    beside = {way: line[(places + way * distance).clamp(0, len(line) - 1)] for way in (-1, 1)}
    return {0: places >= 0, **{way: other != line for way, other in beside.items()}}


def group_colors(grid: tuple[int, int]) -> Tensor:
    """A colour for the groups whose smallest patch this is: grid (h, w) -> (N, 3) RGB in [0, 255]."""
    rows, columns = (torch.arange(n) for n in grid)
    hue = 2 * math.pi * (rows[:, None] * HUE_STEPS[0] + columns * HUE_STEPS[1]).flatten()
    lightness = 0.62 + 0.12 * ((rows[:, None] + columns) % 2).flatten()  # a second difference between neighbours
    return 255 * oklch_to_rgb(lightness, torch.full_like(hue, 0.17), hue)


def oklch_to_rgb(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Tensor:
    """Oklab (Ottosson, 2020) in polar form to sRGB, cut where it has no such colour: 3 x (n,), radians -> (n, 3)."""
    to_lms = [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
    to_linear = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    lab = torch.stack([lightness, chroma * hue.cos(), chroma * hue.sin()], dim=-1)
    linear = ((lab @ torch.tensor(to_lms).T) ** 3 @ torch.tensor(to_linear).T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def stage_panels(panels: Tensor, stage: MergeStage, grid: tuple[int, int]) -> Iterator[tuple[str, Tensor | None]]:
    """Groups, then the three maps of a stage, drawn on (B, 3, H, W) uint8 when they are asked for."""
    yield "groups", draw_groups(panels, stage.groups, grid)
    for kind in MAPS:
        values: Tensor | None = getattr(stage, kind)
        yield kind, None if values is None else draw_guidance(panels, values, grid)
