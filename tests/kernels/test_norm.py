"""Batch norm with addition and ReLU in as few passes: plain torch against torch's own modules, Triton against plain."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fastrot_kernels import norm
from fastrot_kernels.norm import reference, triton_norm
from fastrot_kernels.norm.interface import Norm

# what Triton's interpreter does with a loop's end
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
EPS = 1e-5
KERNELS = [
    pytest.param(reference, "cpu", id="cpu-reference"),
    *([pytest.param(triton_norm, "cpu", id="cpu-triton")] if triton_norm.INTERPRETED else []),
    pytest.param(triton_norm, "cuda", id="cuda-triton", marks=pytest.mark.gpu),
]
SHAPES = [(2, 1), (33, 64), (150, 20), (40, 130)]
MODES = [(False, False), (True, False), (True, True)]  # relu, residual
# one rounding to the dtype, and sums in another order
NEAR = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 1e-5)}
# every dtype in every mode at one shape, each dtype and mode once at the others; the rest of the product is slow
CASES = [
    pytest.param(*shape, dtype, *mode, marks=[] if shape == (33, 64) or (dtype, mode) in once else pytest.mark.slow)
    for once in [list(zip(NEAR, MODES, strict=True))]
    for shape, dtype, mode in itertools.product(SHAPES, NEAR, MODES)
]


def make_case(rows, channels, dtype, device="cpu", residual=False):
    """x, residual or None, weight, bias, dy; channels of unlike mean and spread, weights of both signs."""
    generator = torch.Generator().manual_seed(rows * 1000 + channels)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = draw(rows, channels) * (0.1 + draw(channels).abs()) + 3 * draw(channels)
    maps = [x, draw(rows, channels) if residual else None, draw(rows, channels)]
    x, added, dy = (None if t is None else t.to(dtype).to(device) for t in maps)
    return x, added, draw(channels).to(device), draw(channels).to(device), dy


def run(kernels, x, added, weight, bias, dy, relu):
    """All of it, forward and backward: moments, y, (dw, db), dx, dresidual."""
    at_work = Norm(kernels.moments(x), weight, bias, EPS, relu)
    y = kernels.apply(x, added, at_work)
    kept = y if added is not None else None
    sums = kernels.gradient_sums(dy, x, kept, at_work)
    return at_work.moments, y, sums, *kernels.gradients(dy, x, kept, at_work, sums)


@pytest.mark.parametrize("relu, residual", MODES)
@pytest.mark.parametrize("dtype", NEAR)
def test_plain_torch_is_batch_norm_addition_and_relu_in_float64(dtype, relu, residual):
    x, added, weight, bias, dy = case = make_case(700, 20, dtype, residual=residual)
    moments, y, sums, dx, dresidual = run(reference, *case, relu)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, *([added] if residual else []))]
    running = torch.zeros(20).double(), torch.ones(20).double()
    want = F.batch_norm(leaves[0], *running, *leaves[1:3], True, 0.1, EPS)
    want = want + leaves[3] if residual else want
    want = F.relu(want) if relu else want
    want.backward(dy.double())
    rtol, atol = NEAR[dtype]
    torch.testing.assert_close(y.double(), want, rtol=rtol, atol=10 * atol)
    torch.testing.assert_close(dx.double(), leaves[0].grad, rtol=rtol, atol=10 * atol)
    torch.testing.assert_close(sums.double(), torch.stack([leaves[1].grad, leaves[2].grad]), rtol=1e-4, atol=1e-3)
    if residual:
        assert torch.equal(dresidual.double(), leaves[3].grad)
    ours = torch.zeros(20), torch.ones(20)
    reference.update_running(*ours, moments, 0.1)
    for got, right in zip(ours, running, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels, device", KERNELS)
@pytest.mark.parametrize("rows, channels, dtype, relu, residual", CASES)
def test_every_kernel_agrees_with_plain_torch(kernels, device, rows, channels, dtype, relu, residual):
    case = make_case(rows, channels, dtype, device, residual)
    got, want = run(kernels, *case, relu), run(reference, *case, relu)
    rtol, atol = NEAR[dtype]
    for name, ours, right in zip(("moments", "y", "sums", "dx", "dresidual"), got, want, strict=True):
        assert (ours.shape, ours.dtype) == (right.shape, right.dtype), name
        wide = {"sums": 10 * rows**0.5}.get(name, 1)  # a bias of 0 that rounds to either side of the ReLU
        torch.testing.assert_close(ours, right, rtol=rtol, atol=wide * atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kernels, device", KERNELS)
def test_statistics_far_from_zero_do_not_cancel(kernels, device):
    """Mean a thousand deviations away: the sum of squares alone would leave two digits of the variance."""
    x, *_ = make_case(4500, 8, torch.float32, device)
    x = x + 1000
    x[:, 3] = 7.0  # a constant channel has no variance rather than a negative one
    exact = x.double()
    _, mean, variance = kernels.moments(x)
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(0, correction=0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kernels, device", KERNELS)
@pytest.mark.parametrize("parts", [1, 3, 5])
def test_moments_of_parts_merge_into_those_of_the_whole(kernels, device, parts):
    x, *_ = make_case(150, 20, torch.float32, device)
    pieces = torch.stack([kernels.moments(piece) for piece in x.tensor_split([7 * n + 1 for n in range(1, parts)])])
    torch.testing.assert_close(kernels.merge(pieces), reference.moments(x), rtol=1e-5, atol=1e-6)
    running, again = (torch.full((2, 20), 0.5, device=device) for _ in range(2))
    kernels.update_running(*running, kernels.merge(pieces), 0.1)
    reference.update_running(*again, reference.moments(x), 0.1)
    torch.testing.assert_close(running, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels, device", KERNELS)
def test_more_parts_than_one_program_takes_merge_too(kernels, device):
    """As many as the tiles of a product: several groups, the last not full, then the groups."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 129, (1300, 1, 1), generator=generator).expand(-1, 1, 20)
    parts = torch.cat([counts, torch.randn(1300, 1, 20, generator=generator), torch.rand(1300, 1, 20)], 1).to(device)
    got = kernels.merge(parts)
    torch.testing.assert_close(got, reference.merge(parts.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels, device", KERNELS)
@pytest.mark.parametrize("residual", [False, True])
def test_a_value_that_is_not_a_number_stays_visible(kernels, device, residual):
    x, added, weight, bias, dy = make_case(33, 64, torch.float32, device, residual)
    x[3, 5] = torch.nan
    _, y, sums, dx, _ = run(kernels, x, added, weight, bias, dy, True)
    for out in (y, sums[:1], dx):
        assert out[:, 5].isnan().all() and not out[:, :5].isnan().any()


@pytest.mark.parametrize("residual", [False, True])
def test_the_operations_are_what_torch_asks_of_operations(residual):
    x, added, weight, bias, dy = make_case(5, 3, torch.bfloat16, residual=residual)
    moments = norm.moments(x)
    y = norm.apply(x, added, moments, weight, bias, EPS, True)
    kept = y if residual else None
    sums = norm.gradient_sums(dy, x, kept, moments, weight, bias, EPS, True)
    for op, arguments in (
        (norm.moments, (x,)),
        (norm.merge, (moments[None],)),
        (norm.update_running, (torch.zeros(3), torch.ones(3), moments, 0.1)),
        (norm.apply, (x, added, moments, weight, bias, EPS, True)),
        (norm.gradient_sums, (dy, x, kept, moments, weight, bias, EPS, True)),
        (norm.gradients, (dy, x, kept, moments, weight, bias, sums, EPS, True)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_residual_goes_through_a_relu():
    x, added, weight, bias, _ = make_case(5, 3, torch.float32, residual=True)
    with pytest.raises(ValueError, match="a residual is added before a ReLU"):
        norm.apply(x, added, norm.moments(x), weight, bias, EPS, False)
