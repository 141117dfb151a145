"""Token merging as pure functions: the cost of a merge, a matching, a weighted mean, guidance.

Sources: bipartite soft matching and proportional attention, "Token Merging: Your ViT But Faster" (Bolya et al., ICLR
2023); guidance by the spatial and the frequency domain, our reading of MLIP (Zhang et al., ICML 2024); random drops of
patches, "Scaling Language-Image Pre-training via Masking" (FLIP, Li et al., CVPR 2023).

`assign` (B, N) holds the group of each token, or -1 for a dropped token.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SPATIAL_SHARE = 0.5
"""Share of the spatial guidance in the mean of both domains; our choice.

Features moved 1.08 times as far with either domain alone, 1.04 times with shares of 0.25 and 0.75 (standard errors
0.04). Such factors in this file and its neighbours are geometric means of 1 - cosine to the unmerged feature over two
trained models (CLIP and MLIP, 64 patches), four sets of pictures, three of them of sources that training never saw,
and the rates 0.5, 0.7 and 0.8: tests/ablation/results/merging/variants.json.
"""


def grid_parity(h: int, w: int) -> Tensor:
    """Chequerboard of the patch grid, flattened: (h*w,) bool. On an even grid `index_halves` would split by columns."""
    rows, columns = torch.arange(h), torch.arange(w)
    return ((rows[:, None] + columns[None]) % 2 == 1).flatten()


def grid_halves(h: int, w: int) -> tuple[Tensor, Tensor]:
    """Numbers of the even and of the odd patches of the chequerboard: (N - N//2,), (N//2,) with N = h*w."""
    n = h * w
    even, odd = grid_parity(h, w).int().argsort(stable=True).split([n - n // 2, n // 2])
    return even, odd


def index_halves(n: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Every second token, and the others: (n - n//2,), (n//2,)."""
    return torch.arange(0, n, 2, device=device), torch.arange(1, n, 2, device=device)


@torch.no_grad()
def cosine_cost(keys: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Minus the cosine similarity of each even to each odd token (ToMe): (B, N, d) -> (B, N - N//2, N//2)."""
    keys = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1, eps=1e-6)
    with torch.autocast(keys.device.type, enabled=False):
        return -(keys.index_select(1, even) @ keys.index_select(1, odd).transpose(1, 2))


@torch.no_grad()
def ward_cost(
    keys: Tensor, sizes: Tensor | None, guidance: Tensor, even: Tensor, odd: Tensor, *, strength: float
) -> Tensor:
    """What merging an even and an odd token changes: (B, N, d), (B, N), (B, N) in [0, 1] -> (B, N - N//2, N//2).

    The squared distances of all patches to the key of their token grow by s_i s_j / (s_i + s_j) * |k_i - k_j|^2 in sum
    (Ward, 1963). The larger guidance g of the two ends multiplies it by 1 + strength * g. So equal tokens merge for
    nothing, and a change of an important token costs more. Our reading of MLIP. `sizes` None: each token is one patch.

    The cost without guidance moves features 0.40 times as far as ToMe's rule. Strengths of 0 to 4 differ from 2 by less
    than twice the standard error (factors of 0.98 to 1.05, each +-0.03); 8 moves them 1.09 times as far.
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    order, halves = torch.cat([even, odd]), (len(even), len(odd))

    def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
        """One number a token, ordered: (B, N) -> those of the even tokens as a column, of the odd ones as a row."""
        own, other = values.split(halves, dim=1)
        return own[:, :, None], other[:, None]

    keys = keys.index_select(1, order)
    a, b = keys.split(halves, dim=1)
    cost = torch.add(*pairs(torch.linalg.vector_norm(keys, dim=-1).square_()))
    with torch.autocast(keys.device.type, enabled=False):
        torch.baddbmm(cost, a, b.transpose(1, 2), alpha=-2, out=cost)
    larger = torch.maximum(*pairs(guidance.index_select(1, order)))
    cost.addcmul_(cost, larger, value=strength)
    if sizes is None:
        return cost.div_(2)
    return cost.div_(torch.add(*pairs(sizes.index_select(1, order).reciprocal_()), out=larger))


@torch.no_grad()
def match(cost: Tensor, even: Tensor, odd: Tensor, num_groups: int) -> Tensor:
    """Group N tokens into K at the least cost: (B, N - N//2, N//2), K -> (B, N) int64 in [0, K).

    Each even token proposes its cheapest odd token, and the N-K cheapest proposals merge (bipartite soft matching).
    Equal costs merge in token order. Groups are numbered by their smallest token.
    """
    batch, n = cost.shape[0], len(even) + len(odd)
    removed = n - num_groups
    assert 0 <= removed <= n // 2, (n, num_groups)
    index = torch.arange(n, device=cost.device).expand(batch, n)
    if removed == 0:
        return index.clone()
    least, partner = cost.min(dim=-1)
    proposers = least.argsort(dim=-1, stable=True)[:, :removed]

    target = index.clone()
    target.scatter_(1, even[proposers], odd[partner.gather(1, proposers)])
    smallest = index.scatter_reduce(1, target, index, "amin", include_self=True).gather(1, target)
    number = (smallest == index).cumsum(1) - 1
    return number.gather(1, smallest)


def group_sizes(sizes: Tensor, assign: Tensor, num_groups: int) -> Tensor:
    """Sum sizes by group: (B, N), (B, N) -> (B, K); exact, never a product under autocast."""
    return sizes.new_zeros(sizes.shape[0], num_groups).scatter_add(1, assign, sizes)


def group_mean(values: Tensor, sizes: Tensor, assign: Tensor, merged_sizes: Tensor) -> Tensor:
    """Size-weighted mean of one number per token: (B, N), (B, N), (B, N), (B, K) of `group_sizes` -> (B, K)."""
    return group_sizes(values * sizes, assign, merged_sizes.shape[1]) / merged_sizes


def merge_tokens(x: Tensor, sizes: Tensor, assign: Tensor, merged_sizes: Tensor) -> Tensor:
    """Merge N tokens into K groups, weighted by size: (B, N, D), (B, N), (B, N), (B, K) of `group_sizes` -> (B, K, D).

    A token alone in its group keeps its bits. Sums are at least fp32.
    """
    batch, num_groups = merged_sizes.shape
    width = x.shape[-1]
    weights = sizes / merged_sizes.gather(1, assign)
    rows = assign + torch.arange(0, batch * num_groups, num_groups, device=x.device)[:, None]
    weighted = (x * weights[..., None]).flatten(0, 1)
    merged = weighted.new_zeros(batch * num_groups, width).index_add(0, rows.flatten(), weighted)
    return merged.unflatten(0, (batch, num_groups)).to(x.dtype)


def unmerge_tokens(x: Tensor, assign: Tensor) -> Tensor:
    """The token of each original patch's group, zeros for dropped patches: (B, K, D), (B, N) -> (B, N, D)."""
    tokens = x.gather(1, assign.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return tokens.masked_fill((assign < 0)[..., None], 0)


def compose(earlier: Tensor | None, later: Tensor) -> Tensor:
    """Groups of original patches after one more merge: (B, N0) in [-1, N), (B, N) -> (B, N0)."""
    if earlier is None:
        return later
    return F.pad(later, (1, 0), value=-1).gather(1, earlier + 1)


def last_step(earlier: Tensor | None, composed: Tensor, num_tokens: int) -> Tensor:
    """The inverse of `compose`: the merge from groups `earlier` to groups `composed`: (B, N0), (B, N0) -> (B, N)."""
    if earlier is None:
        return composed
    rows = composed.new_zeros(composed.shape[0], num_tokens + 1)  # the last column is for dropped patches
    return rows.scatter(1, earlier.remainder(num_tokens + 1), composed)[:, :num_tokens]


@torch.no_grad()
def drop(draws: Tensor, num_kept: int) -> Tensor:
    """Keep the K tokens with the largest draws, numbered in token order, and drop the others: (B, N) -> (B, N)."""
    kept = draws.topk(num_kept, dim=1).indices.sort(dim=1).values
    numbers = torch.arange(num_kept, device=draws.device).expand_as(kept)
    return torch.full_like(draws, -1, dtype=torch.int64).scatter(1, kept, numbers)


def kept_tokens(x: Tensor, assign: Tensor, num_kept: int) -> Tensor:
    """The K tokens that `drop` kept, to the bit: (B, N, D), (B, N) -> (B, K, D)."""
    places = (assign < 0).int().argsort(dim=1, stable=True)[:, :num_kept]
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def size_mask(sizes: Tensor, num_prefix: int) -> Tensor:
    """Log of the sizes, 0 for prefix tokens; attention adds it to its logits: (B, K) -> (B, 1, 1, P+K)."""
    return F.pad(sizes.log(), (num_prefix, 0))[:, None, None]


def mid_ranks(values: Tensor) -> Tensor:
    """Rank in [0, 1] among the tokens of an image; equal values share their mean rank: (B, N) -> (B, N).

    A third of the patches of a drawing tie. Distinct ranks would order tied patches by position.
    """
    values = values.contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    twice = (below + not_above - 1).to(torch.promote_types(values.dtype, torch.float32))
    return (twice / (2 * max(values.shape[-1] - 1, 1))).clamp(max=1)  # NaN compares as neither below nor above


def dct_matrix(patch_size: int) -> Tensor:
    """Orthonormal DCT-II of a patch, of columns and of rows at once: (p*p, p*p), rows are frequencies, fp64."""
    k = torch.arange(patch_size, dtype=torch.float64)
    matrix = torch.cos(math.pi / patch_size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / patch_size)
    matrix[0] /= math.sqrt(2)
    return torch.kron(matrix, matrix)


def patch_dct(images: Tensor, matrix: Tensor) -> Tensor:
    """Block DCT of every patch by `dct_matrix`: (B, C, H, W), (p*p, p*p) -> (B, N, C, p, p), at least fp32.

    One product for all patches: products of p x p matrices would be too small for a GPU.
    """
    patch_size = math.isqrt(len(matrix))
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    with torch.autocast(images.device.type, enabled=False):
        return (patches.flatten(-2) @ matrix.T.to(images.dtype)).view_as(patches)


@torch.no_grad()
def frequency_guidance(spectrum: Tensor) -> Tensor:
    """Rank of each patch's energy in the upper half of its DCT band: (B, N, C, p, p) -> (B, N) in [0, 1].

    The spectrum is that of normalised pixels. Its mean over the channels is the spectrum of the grey picture. Energy
    that rounding alone explains counts as 0, so that blank patches tie.
    """
    patch_size = spectrum.shape[-1]
    order = torch.arange(patch_size, device=spectrum.device)
    high = order[:, None] + order[None] >= patch_size / 2
    energy = (spectrum.mean(2).square() * high).sum((-1, -2))
    return mid_ranks(energy.masked_fill(energy < 1e-6 * patch_size**2, 0))


@torch.no_grad()
def distinctness(x: Tensor, sizes: Tensor) -> Tensor:
    """What orders tokens as 1 - cosine to the size-weighted mean token does: (B, N, D), (B, N) -> (B, N).

    For towers without a class token. Only its ranks are read, for which the length of the mean and the 1 do not matter.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    total = (x * sizes[..., None]).sum(1, keepdim=True)  # it points where the mean does
    along = (x * total).sum(-1)  # a product of matrices may tell equal tokens apart
    return -along / torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-6)


def mix_guidance(spatial: Tensor, frequency: Tensor) -> Tensor:
    """Mean of the ranks of both domains, by SPATIAL_SHARE: (B, N) in [0, 1], (B, N) in [0, 1] -> (B, N) in [0, 1]."""
    return torch.add(SPATIAL_SHARE * spatial, frequency, alpha=1 - SPATIAL_SHARE)
