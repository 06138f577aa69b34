"""Products that take in a norm and give moments: plain torch against torch's own operations, Triton against plain."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastrot_kernels import norm, pointwise
from fastrot_kernels.norm.reference import moments as moments_of
from fastrot_kernels.pointwise import reference, triton_pointwise

# what Triton's interpreter does with a loop's end
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
EPS = 1e-5
KERNELS = [
    pytest.param(reference, "cpu", id="cpu-reference"),
    *([pytest.param(triton_pointwise, "cpu", id="cpu-triton")] if triton_pointwise.INTERPRETED else []),
    pytest.param(triton_pointwise, "cuda", id="cuda-triton", marks=pytest.mark.gpu),
]
# one rounding to the dtype of sums taken in another order
NEAR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# rows, channels in, channels out: none a multiple of a tile; then ResNet-50's, the widest of which take long interpreted
SHAPES = [
    *((2, 1, 3, dtype) for dtype in NEAR),
    (70, 20, 70, torch.float32),  # whose tiles are smaller
    *(pytest.param(150, 20, 130, dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)),
    *((*shape, torch.bfloat16) for shape in [(300, 70, 65), (49, 256, 64)]),
    *(
        pytest.param(*shape, torch.bfloat16, marks=pytest.mark.slow)
        for shape in [(130, 64, 256), (98, 512, 2048), (49, 2048, 512)]
    ),
]


# maps, height, width, stride of the shortcut, channels of their product, their channels, norms that go into them: no
# tile is full, no side divides by the stride
JOINED = [
    (2, 9, 8, 1, 20, 130, 1),
    (3, 7, 9, 2, 70, 65, 2),
    (2, 10, 11, 3, 16, 20, 1),
    (1, 5, 6, 1, 150, 12, 2),
    (1, 1, 1, 1, 3, 1, 1),
]
LOW_AND_SLOW = [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]


@pytest.fixture(autouse=True)
def plain_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_case(rows, inputs, outputs, dtype, device="cpu"):
    """x, weight, affine, dy; channels of x of unlike mean and spread, gammas of both signs."""
    generator = torch.Generator().manual_seed(rows * 1000 + inputs)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = (draw(rows, inputs) * (0.1 + draw(inputs).abs()) + 3 * draw(inputs)).to(dtype)
    affine = pointwise.affine(moments_of(x), draw(inputs), draw(inputs), EPS)
    weight, dy = draw(outputs, inputs) / inputs**0.5, draw(rows, outputs)
    return tuple(t.to(device) for t in (x, weight.to(dtype), affine, dy.to(dtype)))


def through_norm(x, weight, affine, dy):
    """(y, backward): of a norm after the product, where dy is the gradient; half of its sums, as of two rows the whole
    would leave nothing."""
    y, moments = reference.forward(x, weight, affine)
    gamma = torch.linspace(-1, 1.5, len(weight), device=x.device)
    sums = norm.gradient_sums(dy, y, None, moments, gamma, gamma, EPS, False)
    return y, pointwise.backward_affine(sums / 2, moments, gamma, EPS)


def run(kernels, x, weight, affine, dy):
    y, backward = through_norm(x, weight, affine, dy)
    return {
        "plain": kernels.forward(x, weight, None),
        "normed": kernels.forward(x, weight, affine),
        "data": kernels.data_gradient(dy, weight, x, affine),
        "through a norm": kernels.normed_gradient(dy, weight, y, backward, x, affine),
        "through a norm alone": kernels.normed_gradient(dy, weight, y, backward, None, None),
        "weight": (kernels.weight_gradient(dy, x, affine),),
        "plain weight": (kernels.weight_gradient(dy, x, None),),
    }


def assert_near(got, want, rtol, name):
    """Within rtol of the value, or of what the sums it comes from are made of: the result's root mean square."""
    size = want.float().square().sum().div(max(1, want.numel())).sqrt().item()
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * size, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kernels, device", KERNELS)
@pytest.mark.parametrize("rows, inputs, outputs, dtype", SHAPES)
def test_every_kernel_agrees_with_plain_torch(kernels, device, rows, inputs, outputs, dtype):
    case = make_case(rows, inputs, outputs, dtype, device)
    got, want = run(kernels, *case), run(reference, *case)
    for name, rights in want.items():
        for part, (ours, right) in enumerate(zip(got[name], rights, strict=True)):
            assert (ours.shape, ours.dtype) == (right.shape, right.dtype), name
            # a sum over many rows of values rounded either way; a mask of a value that rounds to either side of 0
            rtol = NEAR[dtype] if part == 0 and "weight" not in name else max(NEAR[dtype], 1e-3)
            assert_near(ours, right, 4 * rtol, name)


@pytest.mark.parametrize("dtype", NEAR)
def test_plain_torch_is_norm_relu_and_convolution_in_float64(dtype):
    """Output, moments and every gradient; dx by way of norm.gradients, as the network takes it."""
    x, weight, _, dy = make_case(700, 20, 30, dtype)
    gamma, beta = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    moments = moments_of(x)
    affine = pointwise.affine(moments, gamma, beta, EPS)
    leaves = [t.double().requires_grad_() for t in (x, weight, gamma, beta)]
    z = F.relu(F.batch_norm(leaves[0], None, None, leaves[2], leaves[3], True, 0.1, EPS))
    want = F.conv2d(z[:, :, None, None], leaves[1][:, :, None, None])[:, :, 0, 0]
    want.backward(dy.double())
    y, after = reference.forward(x, weight, affine)
    g, sums = reference.data_gradient(dy, weight, x, affine)
    dx, _ = norm.gradients(g, x, None, moments, gamma, beta, sums, EPS, False)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, ours, right in (
        ("y", y, want),
        ("moments", after[1:], torch.stack([want.mean(0), want.var(0, correction=0)])),
        ("dx", dx, leaves[0].grad),
        ("dw", reference.weight_gradient(dy, x, affine), leaves[1].grad),
        ("plain dw", reference.weight_gradient(dy, x, None), dy.double().t() @ x.double()),
        ("dgamma, dbeta", sums, torch.stack([leaves[2].grad, leaves[3].grad])),
    ):
        assert_near(ours.double(), right.detach(), tolerance, name)
    assert torch.equal(after, moments_of(y))


@pytest.mark.parametrize("dtype", NEAR)
def test_through_a_norm_it_is_autograd_in_float64(dtype):
    """norm, ReLU, convolution, norm: gradients of all but the weight; dx by way of norm.gradients."""
    x, weight, _, g = make_case(700, 20, 30, dtype)
    (gamma, beta), (gamma2, _) = (torch.randn(2, n, generator=torch.Generator().manual_seed(n)) for n in (20, 30))
    moments = moments_of(x)
    affine = pointwise.affine(moments, gamma, beta, EPS)
    leaves = [t.double().requires_grad_() for t in (x, gamma, beta)]
    want = F.relu(F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.1, EPS)) @ weight.double().t()
    want.retain_grad()
    F.batch_norm(want, None, None, gamma2.double(), None, True, 0.1, EPS).backward(g.double())
    y, after = reference.forward(x, weight, affine)
    sums2 = norm.gradient_sums(g, y, None, after, gamma2, gamma2, EPS, False)
    backward = pointwise.backward_affine(sums2, after, gamma2, EPS)
    dy, gx, sums = reference.normed_gradient(g, weight, y, backward, x, affine)
    again, alone, none = reference.normed_gradient(g, weight, y, backward, None, None)
    dx, _ = norm.gradients(gx, x, None, moments, gamma, beta, sums, EPS, False)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert_near(dy.double(), want.grad, tolerance, "dy")
    assert_near(dx.double(), leaves[0].grad, tolerance, "dx")
    assert_near(sums.double(), torch.stack([leaves[1].grad, leaves[2].grad]), tolerance, "dgamma, dbeta")
    assert torch.equal(dy, again) and torch.equal(alone, dy @ weight) and none.shape == (0, 20)


def make_joined(maps, height, width, stride, inputs, outputs, norms, dtype, device="cpu"):
    """Maps of `outputs` channels, made of one norm and a residual or of two norms, that a product of `inputs` and a
    shortcut read: (the arguments of joined_forward, those of joined_gradient, each norm's gamma and beta)."""
    generator = torch.Generator().manual_seed(outputs)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    rows, fewer = maps * height * width, maps * -(-height // stride) * -(-width // stride)
    x, residual = ((draw(rows, outputs) * 2 + draw(outputs)).to(dtype) for _ in range(2))
    weights = [(draw(outputs), draw(outputs)) for _ in range(norms)]
    xs = [x, residual][:norms]
    affines = [pointwise.affine(moments_of(x), *each, EPS) for x, each in zip(xs, weights, strict=True)]
    weight, dy, added = draw(inputs, outputs) / outputs**0.5, draw(rows, inputs), draw(fewer, outputs)
    forward = (x, weight.to(dtype), affines[0], residual, affines[1] if norms == 2 else None)
    _, mask, *_ = reference.joined_forward(*forward)
    gradient = (dy.to(dtype), weight.to(dtype), xs, affines, mask, added.to(dtype), height, width, stride)
    return forward, gradient, weights


@pytest.mark.parametrize("kernels, device", KERNELS)
@pytest.mark.parametrize("dtype", LOW_AND_SLOW)
@pytest.mark.parametrize("shape", JOINED)
def test_joined_products_agree_with_plain_torch(kernels, device, shape, dtype):
    forward, gradient, _ = make_joined(*shape, dtype, device)
    for name, case in (("joined_forward", forward), ("joined_gradient", gradient)):
        ours, again, plain = (getattr(module, name)(*case) for module in (kernels, kernels, reference))
        for part, (got, want) in enumerate(zip(ours, plain, strict=True)):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            if got.dtype != torch.uint8:
                near = NEAR[dtype] if got.dtype == dtype else max(NEAR[dtype], 1e-3)
                assert_near(got, want, 4 * near, f"{name}, part {part}")
        assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))


@pytest.mark.parametrize("kernels, device", KERNELS)
@pytest.mark.parametrize("dtype", LOW_AND_SLOW)
@pytest.mark.parametrize("shape", JOINED)
def test_a_mask_says_where_the_relu_lets_through(kernels, device, shape, dtype):
    (x, *rest), *_ = make_joined(*shape, dtype, device)
    x[-1, 0] = torch.nan
    z, mask, y, moments = kernels.joined_forward(x, *rest)
    assert z[-1, 0].isnan() and y[-1].isnan().all() and not y[:-1].isnan().any() and moments[1:].isnan().all()
    through = ~(z.cpu() <= 0).numpy()
    assert z.numel() == 1 or 0.2 < through.mean() < 0.8
    assert np.array_equal(mask.cpu().numpy(), np.packbits(through, axis=1, bitorder="little"))


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", JOINED[:4])
def test_joined_products_are_autograds_in_float64(shape, dtype):
    """Maps, their product and its moments; gradients of all that went into the maps, by way of norm.gradients."""
    forward, (dy, weight, xs, affines, mask, added, height, width, stride), weights = make_joined(*shape, dtype)
    x, residual = (each.double().requires_grad_() for each in (forward[0], forward[3]))
    leaves = [tuple(each.double().requires_grad_() for each in pair) for pair in weights]
    made = [F.batch_norm(y, None, None, *pair, True, 0.1, EPS) for y, pair in zip((x, residual), leaves, strict=False)]
    want = F.relu(sum(made if len(made) == 2 else [*made, residual]))
    product = want @ weight.double().t()
    thin = want.view(-1, height, width, want.shape[1])[:, ::stride, ::stride].reshape(added.shape)
    ((product * dy.double()).sum() + (thin * added.double()).sum()).backward()
    z, _, y, moments = reference.joined_forward(*forward)
    g, sums = reference.joined_gradient(dy, weight, xs, affines, mask, added, height, width, stride)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert_near(z.double(), want.detach(), tolerance, "z")
    assert_near(y.double(), product.detach(), tolerance, "y")
    assert torch.equal(moments, moments_of(y))
    for at, leaf, pair, right, mine in zip(xs, (x, residual), weights, leaves, sums, strict=False):
        assert_near(mine.double(), torch.stack([each.grad for each in right]), tolerance, "dgamma, dbeta")
        dx, _ = norm.gradients(g, at, None, moments_of(at), *pair, mine, EPS, False)
        assert_near(dx.double(), leaf.grad, 2 * tolerance, "dx")
    if len(xs) == 1:
        assert_near(g.double(), residual.grad, tolerance, "g")


@pytest.mark.parametrize("kernels, device", KERNELS)
def test_moments_far_from_zero_do_not_cancel(kernels, device):
    """A mean a thousand deviations away, over more tiles than one merge takes: squares alone would leave no digit."""
    x, *_ = make_case(70_000 if device == "cuda" else 700, 8, 8, torch.float32, device)
    x = x + 1000
    x[:, 3] = 7.0
    y, (count, mean, variance) = kernels.forward(x, torch.eye(8, device=device), None)
    assert torch.equal(count, torch.full_like(count, len(x)))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), x.double().var(0, correction=0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kernels, device", KERNELS)
def test_a_value_that_is_not_a_number_stays_visible(kernels, device):
    x, weight, affine, dy = make_case(70, 20, 70, torch.float32, device)
    x[3, 5] = torch.nan
    y, moments = kernels.forward(x, weight, affine)
    assert y[3].isnan().all() and not y[:3].isnan().any() and moments[1:].isnan().all()
    g, sums = kernels.data_gradient(dy, weight, x, affine)
    assert sums[0, 5].isnan() and not sums[0, :5].isnan().any() and not g.isnan().any()
    dw = kernels.weight_gradient(dy, x, affine)
    assert dw[:, 5].isnan().all() and not dw[:, :5].isnan().any()


# interpreted, programs run one after another
@pytest.mark.parametrize("kernels, device", [KERNELS[0], KERNELS[-1]])
def test_results_are_equal_bit_for_bit_from_run_to_run(kernels, device):
    case = make_case(150, 20, 130, torch.bfloat16, device)
    first, again = run(kernels, *case), run(kernels, *case)
    for name, parts in first.items():
        for one, other in zip(parts, again[name], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("normed", [False, True])
def test_the_operations_are_what_torch_asks_of_operations(normed):
    x, weight, affine, dy = make_case(5, 3, 4, torch.bfloat16)
    y, backward = through_norm(x, weight, affine, dy)
    more = (x, affine) if normed else (None, None)
    for op, arguments in (
        (pointwise.normed_gradient, (dy, weight, y, backward, *more)),
        (pointwise.forward, (x, weight, affine if normed else None)),
        (pointwise.data_gradient, (dy, weight, x, affine)),
        (pointwise.weight_gradient, (dy, x, affine if normed else None)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("shape", JOINED)
def test_joined_products_are_operations(shape):
    forward, gradient, _ = make_joined(*shape, torch.bfloat16)
    for op, case in ((pointwise.joined_forward, forward), (pointwise.joined_gradient, gradient)):
        torch.library.opcheck(op, case, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "dtype, taken", [(torch.bfloat16, torch.ops.aten.mm.dtype), (torch.float32, torch.ops.aten.mm.default)]
)
def test_cublas_is_asked_for_weight_gradients_in_float32(dtype, taken):
    """On a GPU it adds the parts of a split sum in the result's dtype; seen on tensors without memory."""
    ran = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            ran.append(operation)
            return operation(*args, **kwargs or {})

    with FakeTensorMode() as mode, Seen():
        device = torch.device("cuda", 0)
        dy, x = (FakeTensor(mode, torch.empty(50, n, dtype=dtype, device="meta"), device) for n in (8, 6))
        dw = triton_pointwise.weight_gradient(dy, x, None)
    assert dw.dtype == torch.float32 and dw.shape == (8, 6)
    assert [op for op in ran if "mm" in str(op)] == [taken]
