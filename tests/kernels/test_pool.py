"""The stem's norm, ReLU and max-pool in one: plain torch against torch's own modules, Triton against plain."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_norm import EPS, NEAR
from torch.nn import functional as F

from fastrot_kernels import pool
from fastrot_kernels.norm import reference as norms
from fastrot_kernels.norm.interface import Norm
from fastrot_kernels.pool import reference, triton_pool

KERNELS = [
    pytest.param(reference, "cpu", id="cpu-reference"),
    *([pytest.param(triton_pool, "cpu", id="cpu-triton")] if triton_pool.INTERPRETED else []),
    pytest.param(triton_pool, "cuda", id="cuda-triton", marks=pytest.mark.gpu),
]
SHAPES = [(2, 7, 9, 20), (1, 1, 2, 3), (2, 8, 6, 64), (1, 3, 4, 130)]
# every dtype at one shape, bfloat16 at all; the rest of the product is slow
CASES = [
    pytest.param(*case, marks=[] if case[0] == SHAPES[0] or case[1] == torch.bfloat16 else pytest.mark.slow)
    for case in itertools.product(SHAPES, NEAR)
]
FEW = settings(max_examples=6, deadline=None)
sides = st.integers(1, 9)


def make_case(shape, dtype, device="cpu"):
    """x, weight, bias, dy; weights of both signs."""
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    n, height, width, channels = shape
    x = draw(*shape) * (0.5 + draw(channels).abs()) + 3 * draw(channels)
    dy = draw(n, (height + 1) // 2, (width + 1) // 2, channels)
    return (t.to(device) for t in (x.to(dtype), draw(channels), draw(channels), dy.to(dtype)))


def rows(t):
    return t.flatten(0, 2)


def maps(t):
    return t.permute(0, 3, 1, 2)


def at_winners(x, winners):
    """x where the windows' maxima were, by indexing."""
    n, i, j, c = torch.meshgrid(*(torch.arange(size, device=x.device) for size in winners.shape), indexing="ij")
    return x[n, 2 * i - 1 + winners // 3, 2 * j - 1 + winners % 3, c]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", [(3, 12, 15, 8), (2, 9, 8, 5)])
def test_plain_torch_is_batch_norm_relu_and_max_pool_in_float64(dtype, shape):
    """The maximum taken among values rounded to the dtype, which decides of near ones who is first."""
    x, weight, bias, dy = make_case(shape, dtype)
    at_work = Norm(norms.moments(rows(x)), weight, bias, EPS, True)
    y, peaks, winners = reference.forward(x, at_work)
    sums = norms.gradient_sums(rows(dy), rows(peaks), None, at_work)
    dx = reference.gradient(dy, winners, x, at_work, sums)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    z = F.relu(F.batch_norm(maps(leaves[0]), None, None, *leaves[1:], True, 0.1, EPS))
    want = F.max_pool2d(z + (z.to(dtype).double() - z).detach(), 3, 2, 1)
    want.backward(maps(dy).double())
    rtol, atol = NEAR[dtype]
    torch.testing.assert_close(maps(y).double(), want, rtol=rtol, atol=atol)
    torch.testing.assert_close(dx.double(), leaves[0].grad, rtol=rtol, atol=10 * atol)
    torch.testing.assert_close(sums.double(), torch.stack([leaves[1].grad, leaves[2].grad]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels, device", KERNELS)
@pytest.mark.parametrize("shape, dtype", CASES)
def test_every_kernel_agrees_with_plain_torch(kernels, device, shape, dtype):
    x, weight, bias, dy = make_case(shape, dtype, device)
    at_work = Norm(norms.moments(rows(x)), weight, bias, EPS, True)
    got, want = kernels.forward(x, at_work), reference.forward(x, at_work)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    rtol, atol = NEAR[dtype]
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=10 * atol)
    assert torch.equal(got[1], at_winners(x, got[2]))
    if dtype is not torch.bfloat16 or device == "cuda":  # which the interpreter cuts off where a GPU rounds
        assert torch.equal(got[2][want[0] > 0], want[2][want[0] > 0])
    sums = norms.gradient_sums(rows(dy), rows(want[1]), None, at_work)
    dx = kernels.gradient(dy, want[2], x, at_work, sums)
    torch.testing.assert_close(dx, reference.gradient(dy, want[2], x, at_work, sums), rtol=rtol, atol=10 * atol)


@pytest.mark.parametrize("kernels, device", KERNELS)
@FEW
@given(n=st.integers(1, 3), height=sides, width=sides, channels=st.sampled_from([1, 3, 8, 20]), seed=st.integers(0, 99))
def test_of_equal_values_the_one_that_torch_takes_gets_the_gradient(kernels, device, n, height, width, channels, seed):
    """Few whole numbers, so that windows hold many equals; with a mean of 0 and a deviation of 1 all is exact."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(-2, 3, shape, generator=generator)  # noqa: E731
    x, weight, bias = draw(n, height, width, channels), draw(channels), draw(channels)
    dy = draw(n, (height + 1) // 2, (width + 1) // 2, channels)
    x, dy = (t.to(device, torch.bfloat16) for t in (x, dy))
    weight, bias = (t.to(device).float() for t in (weight, bias))
    leaf = x.double().requires_grad_()
    want = F.max_pool2d(F.relu(maps(leaf * weight + bias)), 3, 2, 1)
    want.backward(maps(dy).double())
    one = torch.ones_like(bias)
    at_work = Norm(torch.stack([n * height * width * one, 0 * one, one]), weight, bias, 0.0, True)
    y, _, winners = kernels.forward(x, at_work)
    assert torch.equal(maps(y).double(), want)
    dx = kernels.gradient(dy, winners, x, at_work, torch.zeros(2, channels, device=device))
    assert torch.equal(dx.double(), leaf.grad)


@pytest.mark.parametrize("kernels, device", KERNELS)
def test_a_value_that_is_not_a_number_wins_as_in_torch(kernels, device):
    x, weight, bias, _ = make_case((2, 9, 8, 20), torch.float32, device)
    at_work = Norm(norms.moments(rows(x)), weight, bias, EPS, True)
    x[0, 2:4, 3, 5] = torch.nan
    y, peaks, _ = kernels.forward(x, at_work)
    z = norms.apply(rows(x), None, at_work).view_as(x)
    want = F.max_pool2d(maps(z), 3, 2, 1)
    torch.testing.assert_close(maps(y), want, equal_nan=True)
    assert 0 < y.isnan().sum() < 10 and torch.equal(y.isnan(), peaks.isnan())


@pytest.mark.parametrize("kernels, device", KERNELS)
def test_parts_of_a_batch_with_all_ones_statistics_are_the_batch(kernels, device):
    """As uneven ranks see them."""
    x, weight, bias, dy = make_case((5, 6, 7, 8), torch.float32, device)
    whole = Norm(norms.moments(rows(x)), weight, bias, EPS, True)
    y, peaks, winners = kernels.forward(x, whole)
    sums = norms.gradient_sums(rows(dy), rows(peaks), None, whole)
    parts = [slice(0, 2), slice(2, 5)]
    merged = Norm(norms.merge(torch.stack([norms.moments(rows(x[part])) for part in parts])), *whole[1:])
    outs = [kernels.forward(x[part], merged) for part in parts]
    mine = [norms.gradient_sums(rows(dy[p]), rows(out[1]), None, merged) for p, out in zip(parts, outs, strict=True)]
    dx = [kernels.gradient(dy[p], out[2], x[p], merged, sum(mine)) for p, out in zip(parts, outs, strict=True)]
    near = {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(torch.cat([out[0] for out in outs]), y, **near)
    torch.testing.assert_close(torch.cat(dx), kernels.gradient(dy, winners, x, whole, sums), **near)


def test_the_operations_are_what_torch_asks_of_operations():
    x, weight, bias, dy = make_case((2, 5, 4, 3), torch.bfloat16)
    at_work = (norms.moments(rows(x)), weight, bias)
    _, peaks, winners = pool.forward(x, *at_work, EPS)
    sums = norms.gradient_sums(rows(dy), rows(peaks), None, Norm(*at_work, EPS, True))
    for op, arguments in (
        (pool.forward, (x, *at_work, EPS)),
        (pool.gradient, (dy, winners, x, *at_work, sums, EPS)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
