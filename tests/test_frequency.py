"""The frequency domain: convolutions against loops, kernels on other grids, the block DCT, the branch and the stem."""

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from reference_for_tests import block_dct, convolve_by_fft
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from mlip_cli.model.frequency import (
    FrequencyBranch,
    GlobalFilter,
    StemBlock,
    grid_waves,
    regrid_kernel,
)
from mlip_cli.recipe.config import Frequency

GRIDS = [(1, 1), (2, 2), (3, 5), (4, 4), (1, 6), (7, 4), (14, 14)]


def direct(x: Tensor, taps: dict[tuple[int, int], Tensor]) -> Tensor:
    """Circular convolution, each tap (D,) at its offset in rows and columns."""
    result = torch.zeros_like(x)
    for (rows, columns), weights in taps.items():
        result += weights * x.roll((rows, columns), dims=(1, 2))
    return result


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# the filter ----------------------------------------------------------------------------------------------------------


def with_kernel(kernel: Tensor) -> GlobalFilter:
    layer = GlobalFilter(*kernel.shape).to(kernel.dtype)
    layer.kernel = nn.Parameter(kernel.clone())
    return layer


@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_filter_and_fft_are_the_circular_convolution(h: int, w: int) -> None:
    x, kernel = random(2, h, w, 3), random(h, w, 3, seed=1)
    expected = direct(x, {(r, c): kernel[r, c] for r, c in product(range(h), range(w))})
    assert relative_error(with_kernel(kernel)(x), expected) < 1e-12
    assert relative_error(convolve_by_fft(x, kernel), expected) < 1e-12


@pytest.mark.parametrize(("h", "w"), [*GRIDS, (7, 7), (24, 24), (37, 9)])
def test_the_filter_equals_the_fft_with_its_gradients(h: int, w: int) -> None:
    for dtype, most in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        x, layer = random(2, h, w, 8, dtype=dtype).requires_grad_(), with_kernel(random(h, w, 8, dtype=dtype))
        results = [layer(x), convolve_by_fft(x, layer.kernel)]
        assert relative_error(results[0], results[1]) < most
        gradients = [torch.autograd.grad(result, (x, layer.kernel), x.detach()) for result in results]
        for one, other in zip(*gradients, strict=True):
            assert relative_error(one, other) < most


@pytest.mark.parametrize(("h", "w"), [*GRIDS, (24, 24), (37, 9)])
def test_waves_are_orthonormal_and_one_of_each_mirrored_pair(h: int, w: int) -> None:
    waves = grid_waves(h, w)
    torch.testing.assert_close(waves.T @ waves, torch.eye(h * w, dtype=torch.float64), rtol=0, atol=1e-12)
    mirrors_of_itself = (1 + (h % 2 == 0)) * (1 + (w % 2 == 0))
    assert len(waves) == h * w + mirrors_of_itself


def is_off_by(layer: GlobalFilter, found: Tensor, x: Tensor) -> float:
    return relative_error(found.double(), convolve_by_fft(x.double(), layer.kernel.double()))


@pytest.mark.parametrize(("h", "w"), [(3, 7), (14, 14), (24, 24)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_filters_grids_of_any_size(dtype: torch.dtype, h: int, w: int) -> None:
    """The whole is off by less than the gap between 1 and the next number, alone and under autocast."""
    torch.manual_seed(0)
    layer, x = GlobalFilter(h, w, 8), 1 + random(4, h, w, 8).float()
    with torch.autocast("cpu", dtype):
        found = layer(x)
    assert found.dtype == dtype
    most = torch.finfo(dtype).eps
    assert is_off_by(layer, found, x) < most
    layer, x = layer.to(dtype), x.to(dtype)
    assert layer(x).dtype == dtype
    assert is_off_by(layer, layer(x), x) < most


def test_no_tap_of_a_new_kernel_is_too_small_for_fp32() -> None:
    taps = GlobalFilter(24, 24, 8).kernel.detach()
    assert (taps[12, 12] == 0).all()
    assert taps[taps != 0].abs().min() > torch.finfo(torch.float32).tiny


def test_large_activations_of_every_patch_stay_finite_in_fp16() -> None:
    """Towers have channels with large values everywhere; their sum over a grid would leave the range of fp16."""
    layer = GlobalFilter(24, 24, 1).half()
    assert layer(torch.full((1, 24, 24, 1), 1000.0).half()).isfinite().all()


def test_matrices_stand_in_no_checkpoint_and_follow_their_model() -> None:
    layer = GlobalFilter(3, 5, 2)
    assert list(layer.state_dict()) == ["kernel"]
    exact = layer.double().waves.matrix
    assert torch.equal(exact, grid_waves(3, 5))  # and not the fp32 numbers of before
    with torch.device("meta"):
        empty = GlobalFilter(3, 5, 2)
    assert empty.waves.matrix.is_meta
    assert torch.equal(empty.to_empty(device="cpu").waves.matrix, exact.float())


# other grids ---------------------------------------------------------------------------------------------------------


def local_taps(radius: int, width: int) -> dict[tuple[int, int], Tensor]:
    reach = range(-radius, radius + 1)
    return {(r, c): random(width, seed=100 * r + c + 5000) for r, c in product(reach, reach)}


def kernel_of(taps: dict[tuple[int, int], Tensor], h: int, w: int) -> Tensor:
    kernel = torch.zeros(h, w, 3, dtype=torch.float64)
    for (rows, columns), weights in taps.items():
        kernel[rows % h, columns % w] += weights
    return kernel


@pytest.mark.parametrize("grid", [(14, 14), (9, 20), (5, 6), (7, 5), (16, 8), (8, 11)])
@pytest.mark.parametrize("trained_on", [(8, 8), (7, 7), (6, 9)])
def test_a_local_kernel_is_the_same_taps_on_every_grid(trained_on: tuple[int, int], grid: tuple[int, int]) -> None:
    taps, x = local_taps(2, 3), random(2, *grid, 3)
    kernel, lost_share = regrid_kernel(kernel_of(taps, *trained_on), grid)
    assert relative_error(convolve_by_fft(x, kernel), direct(x, taps)) < 1e-12
    assert lost_share == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("times", [(2, 2), (3, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize(("h", "w"), [(3, 5), (4, 6), (5, 4), (2, 1)])
def test_a_padded_kernel_filters_repeated_pictures_as_before(h: int, w: int, times: tuple[int, int]) -> None:
    x, kernel = random(2, h, w, 3), random(h, w, 3, seed=1)
    larger, lost_share = regrid_kernel(kernel, (h * times[0], w * times[1]))
    found = convolve_by_fft(x.tile(1, *times, 1), larger)
    torch.testing.assert_close(found, convolve_by_fft(x, kernel).tile(1, *times, 1), rtol=1e-10, atol=1e-10)
    assert lost_share == 0


@pytest.mark.parametrize("larger", [(4, 4), (5, 5), (6, 7), (11, 8), (4, 9)])
@pytest.mark.parametrize("own", [(4, 4), (3, 4), (4, 3), (1, 2)])
def test_cropping_undoes_padding(own: tuple[int, int], larger: tuple[int, int]) -> None:
    kernel = random(*own, 3)
    padded, _ = regrid_kernel(kernel, larger)
    back, lost_share = regrid_kernel(padded, own)
    assert torch.equal(back, kernel)
    assert lost_share == 0


@pytest.mark.parametrize("grid", [(9, 9), (8, 10), (3, 4), (4, 3), (5, 12)])
@pytest.mark.parametrize("own", [(6, 6), (5, 5), (6, 7)])
def test_mirrored_kernels_stay_mirrored(own: tuple[int, int], grid: tuple[int, int]) -> None:
    """A mirrored picture still gives the mirrored result, whatever the two ends of an even grid do."""

    def mirrored(kernel: Tensor) -> Tensor:
        return kernel.flip(0, 1).roll((1, 1), dims=(0, 1))

    kernel = random(*own, 3)
    torch.testing.assert_close(regrid_kernel(mirrored(kernel), grid)[0], mirrored(regrid_kernel(kernel, grid)[0]))


def test_odd_grids_are_shifted_padded_or_cropped_and_shifted_back() -> None:
    kernel = random(5, 7, 2)
    centred = torch.fft.fftshift(kernel, dim=(0, 1))
    moved = torch.fft.ifftshift(nn.functional.pad(centred[1:-1], (0, 0, 1, 1)), dim=(0, 1))
    found, lost_share = regrid_kernel(kernel, (3, 9))
    assert torch.equal(found, moved)
    assert lost_share == pytest.approx((centred[[0, -1]].square().sum() / kernel.square().sum()).item())


def test_both_ends_of_an_even_grid_share_the_outermost_tap() -> None:
    kernel = torch.tensor([1.0, 2.0, 8.0, 3.0])[:, None, None]  # offsets 0, 1, +-2, -1
    assert regrid_kernel(kernel, (6, 1))[0].flatten().tolist() == [1, 2, 4, 0, 4, 3]
    cropped, lost_share = regrid_kernel(kernel, (2, 1))
    assert cropped.flatten().tolist() == [1, 5]  # both neighbours are one place
    assert lost_share == pytest.approx(64 / 78)
    assert regrid_kernel(torch.zeros(4, 4, 2), (2, 2))[1] == 0


# the block DCT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_the_dct_keeps_energy_and_stays_inside_its_patch(patch_size: int) -> None:
    images = random(2, 3, 2 * patch_size, 3 * patch_size)
    spectrum = block_dct(images, patch_size)
    assert spectrum.shape == (2, 6, 3, patch_size, patch_size)
    for row, column in product(range(2), range(3)):
        rows, columns = (slice(patch_size * i, patch_size * (i + 1)) for i in (row, column))
        patch, found = images[:, :, rows, columns], spectrum[:, 3 * row + column]
        torch.testing.assert_close(found.square().sum((-1, -2)), patch.square().sum((-1, -2)))
        torch.testing.assert_close(block_dct(patch, patch_size)[:, 0], found)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_the_dct_of_a_constant_patch_is_its_mean_alone(value: float) -> None:
    spectrum = block_dct(torch.full((1, 3, 14, 14), value), 14)
    torch.testing.assert_close(spectrum[..., 0, 0], torch.full((1, 1, 3), 14 * value))
    spectrum[..., 0, 0] = 0
    assert spectrum.abs().max() < 1e-5


# the branch ----------------------------------------------------------------------------------------------------------


def branch(kind: str, *, grid: tuple[int, int] = (3, 5), width: int = 4) -> FrequencyBranch:
    torch.manual_seed(0)
    config = Frequency(input=kind, width=width, depth=2)  # type: ignore[arg-type]
    return FrequencyBranch(config, grid=grid, patch_size=2, tower_width=width)


def read_by(kind: str, images: Tensor, tokens: Tensor) -> Tensor:
    """What a branch of this kind reads, of pictures of patch size 2 and their tokens."""
    return block_dct(images, 2).flatten(2).to(images.dtype) if kind == "dct" else tokens


@pytest.mark.parametrize("kind", ["tokens", "dct"])
def test_gradients_of_the_branch_by_differences(kind: str) -> None:
    model = branch(kind, grid=(2, 3)).double()
    inputs = [random(1, 3, 4, 6) if kind == "dct" else random(1, 6, 4), *(p.detach() for p in model.parameters())]
    names = [name for name, _ in model.named_parameters()]

    def run(given: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            model, dict(zip(names, parameters, strict=True)), (read_by(kind, given, given),)
        )

    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in inputs], fast_mode=True)


@pytest.mark.parametrize("kind", ["tokens", "dct"])
def test_constant_pictures_give_equal_finite_tokens_and_gradients(kind: str) -> None:
    model = branch(kind)
    for value in (0.0, 1.5):
        tokens = model(read_by(kind, torch.full((2, 3, 6, 10), value), torch.full((2, 15, 4), value)))
        torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens), rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(tokens.square().sum(), [p for _, p in model.named_parameters()])
        assert all(gradient.isfinite().all() for gradient in (tokens, *gradients))


def test_a_shifted_picture_gives_shifted_tokens() -> None:
    model, images = branch("dct").double(), random(1, 3, 6, 10)
    shifted = model(block_dct(images.roll((2, -4), dims=(2, 3)), 2).flatten(2))
    expected = model(block_dct(images, 2).flatten(2)).unflatten(1, (3, 5)).roll((1, -2), dims=(1, 2)).flatten(1, 2)
    torch.testing.assert_close(shifted, expected)


@pytest.mark.parametrize("kind", ["tokens", "dct"])
def test_the_branch_in_half_precision_copied_and_pickled(kind: str) -> None:
    model, given = branch(kind), read_by(kind, random(2, 3, 6, 10).float(), random(2, 15, 4).float())
    with torch.no_grad():
        expected = model(given)
        names = list(model.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
            assert torch.equal(other(given), expected)
            assert list(other.state_dict()) == names
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(given).float(), expected, rtol=0.1, atol=0.1)
        half = copy.deepcopy(model).half()(given.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


class Graphs:
    """A compiler that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.code: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.code.append(graph.code)
        return graph.forward


@pytest.mark.slow
def test_the_branch_compiles_to_one_graph_without_complex_numbers() -> None:
    torch.compiler.reset()
    graphs = Graphs()
    model, images = branch("dct"), random(2, 3, 6, 10).float()

    def run(images: Tensor) -> Tensor:
        return model(block_dct(images, 2).flatten(2))

    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(run, fullgraph=True, backend=graphs)(images)
        torch.testing.assert_close(found, run(images))
    [code] = graphs.code
    assert "fft" not in code
    assert "matmul" in code


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "stem"])
def test_uncompiled_blocks_use_no_complex_numbers_on_a_cpu(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = StemBlock(3, 5, 4) if kind == "stem" else branch(kind)
    given = random(2, 16 if kind == "stem" else 15, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        code = make_fx(model)(given).code
    assert "fft" not in code
    assert "mm" in code
