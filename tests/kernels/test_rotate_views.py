"""Every backend that runs here against the reference, and the reference against numpy."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastrot_kernels import backends, contest, cpu_views, reference, rotate_views
from fastrot_kernels.op import rotate_views_op

MEAN = [123.675, 116.28, 103.53, 99.5]
STD = [58.395, 57.12, 57.375, 61.0]
FORMATS = [  # dtype, channels, pad_channels
    (torch.float32, 3, 0),
    (torch.float32, 4, 0),
    (torch.float16, 3, 4),
    (torch.float16, 1, 0),
    (torch.bfloat16, 3, 4),
    (torch.bfloat16, 4, 0),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# n, side, views: any two of the three together; the rest of their product is slow where it is interpreted
QUICK = [(1, 1, 1), (3, 1, 4), (3, 2, 4), (1, 2, 1), (3, 5, 4), (1, 5, 1), (1, 33, 4), (3, 33, 1), (1, 64, 4)]
SIZES = [
    pytest.param(*size, marks=[] if size in QUICK else pytest.mark.slow)
    for size in itertools.product([1, 3], [1, 2, 5, 33, 64], [1, 4])
]

DEVICES_AND_BACKENDS = [
    *(pytest.param("cpu", name, id=f"cpu-{name}") for name in backends.runnable_backends(torch.device("cpu"))),
    *(pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.gpu) for name in ("reference", "triton", "cuda")),
]


def make_case(n, side, views, channels, device="cpu"):
    """Random arguments up to std; turns and flips of all kinds, bits beyond the lowest two set."""
    generator = torch.Generator().manual_seed(side * 100 + n * 10 + views)

    def draw(high, *shape):
        return torch.randint(0, high, shape, dtype=torch.uint8, generator=generator).to(device)

    constants = (torch.tensor((v * 9)[:channels], device=device) for v in (MEAN, STD))
    return (draw(256, n, side, side, channels), draw(3, n), draw(8, n, views), *constants)


def oracle(x, flips, turns, mean, std, channels):
    """float32 [n*V, C', S, S] by numpy, one view at a time."""
    x, flips, turns, mean, std = (t.cpu().numpy() for t in (x, flips, turns, mean, std))
    n, side, _, in_channels = x.shape
    views = turns.shape[1]
    out = np.zeros((n * views, channels, side, side), np.float32)
    for i, v in itertools.product(range(n), range(views)):
        image = np.fliplr(x[i]) if flips[i] else x[i]
        image = np.rot90(image, int(turns[i, v]) % 4)
        out[i * views + v, :in_channels] = ((image.astype(np.float32) - mean) / std).transpose(2, 0, 1)
    return torch.from_numpy(out)


def ulps_apart(got, want):
    """Largest distance in units of the last place; a NaN is far from every number."""
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    bits = [t.cpu().contiguous().view(integer).long() for t in (got, want)]
    got, want = (torch.where(b < 0, -(b & torch.iinfo(integer).max) - 1, b) for b in bits)
    return (got - want).abs().max().item()


@pytest.fixture(autouse=True)
def fresh_memory_holds_nan():
    """An output value that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, channels, pad", FORMATS)
@pytest.mark.parametrize("n, side, views", [(1, 1, 1), (3, 2, 4), (3, 5, 4), (1, 33, 3)])
def test_the_reference_is_what_numpy_says(device, dtype, channels, pad, n, side, views):
    case = make_case(n, side, views, channels, device)
    got = rotate_views(*case, dtype, pad, backend="reference")
    torch.testing.assert_close(got.cpu(), oracle(*case, pad or channels).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("device, backend", DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("dtype, channels, pad", FORMATS)
@pytest.mark.parametrize("n, side, views", SIZES)
def test_backends_agree_with_the_reference(device, backend, dtype, channels, pad, views, n, side):
    case = make_case(n, side, views, channels, device)
    got = rotate_views(*case, dtype, pad, backend=backend)
    want = rotate_views(*case, dtype, pad, backend="reference")

    width = pad or channels
    like = torch.empty(n * views, width, side, side).to(memory_format=torch.channels_last)
    exact = (side * side * width, 1, side * width, width)
    assert got.shape == like.shape and got.dtype == dtype and got.device == case[0].device
    assert got.is_contiguous(memory_format=torch.channels_last) and got.stride() == exact
    assert ulps_apart(got, want) <= (0 if backend in ("reference", "numpy", "cpu") else 1)


@pytest.mark.parametrize("device, backend", DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("channels, pad", [(5, 8), (33, 0)])
def test_many_channels_are_fine(device, backend, channels, pad):
    case = make_case(2, 9, 2, channels, device)
    got = rotate_views(*case, torch.float32, pad, backend=backend)
    want = oracle(*case, pad or channels).contiguous(memory_format=torch.channels_last)
    assert ulps_apart(got, want) <= 1


@pytest.mark.parametrize("device, backend", DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("flip", range(2))
def test_each_flip_and_turn_puts_the_corners_where_torch_does(device, backend, flip, turn):
    x = torch.arange(9, dtype=torch.uint8, device=device).view(1, 3, 3, 1)
    flips = torch.tensor([flip], dtype=torch.uint8, device=device)
    turns = torch.tensor([[turn]], dtype=torch.uint8, device=device)
    got = rotate_views(x, flips, turns, [0.0], [1.0], torch.float32, backend=backend)
    want = (x.flip(2) if flip else x)[0, :, :, 0].rot90(turn)
    assert got[0, 0].tolist() == want.tolist()


@pytest.mark.parametrize("device, backend", DEVICES_AND_BACKENDS)
def test_all_byte_values_are_normalised_alike(device, backend):
    x = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    upright = torch.zeros(1, 1, dtype=torch.uint8, device=device)
    got = rotate_views(x, upright[0], upright, MEAN[:3], STD[:3], torch.float32, backend=backend)
    want = (x.cpu().double() - torch.tensor(MEAN[:3])) / torch.tensor(STD[:3])
    torch.testing.assert_close(got.permute(0, 2, 3, 1).cpu().double(), want, rtol=2**-22, atol=2**-22)


@pytest.mark.parametrize("device, backend", DEVICES_AND_BACKENDS)
def test_strided_inputs_and_empty_batches_are_fine(device, backend):
    x, flips, turns, mean, std = make_case(6, 5, 4, 3, device)
    strided = x[::2].transpose(1, 2), flips[::2], turns[::2].flip(1)[:, ::2], mean, std
    got = rotate_views(*strided, torch.float32, backend=backend)
    want = oracle(*strided, 3)
    assert ulps_apart(got, want.contiguous(memory_format=torch.channels_last)) <= 1

    empty = rotate_views(x[:0], flips[:0], turns[:0], mean, std, torch.float32, 4, backend=backend)
    assert empty.shape == (0, 4, 5, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_batch_beyond_2_31_values_is_addressed_right(backend):
    n = 2**31 // (4 * 4 * 224 * 224) + 2
    x = torch.zeros(n, 224, 224, 3, dtype=torch.uint8, device="cuda")
    x[-1].random_(0, 256)
    flips = torch.ones(n, dtype=torch.uint8, device="cuda")
    turns = torch.arange(4, dtype=torch.uint8, device="cuda").repeat(n, 1)
    got = rotate_views(x, flips, turns, MEAN[:3], STD[:3], torch.float16, 4, backend=backend)
    want = rotate_views(x[-1:], flips[-1:], turns[-1:], MEAN[:3], STD[:3], torch.float16, 4)
    assert ulps_apart(got[-4:], want) <= 1


images = st.integers(1, 7).flatmap(lambda side: hnp.arrays(np.uint8, (1, side, side, 3)))


def turned(x, flip, turns):
    """uint8 [V, S, S, 3]: the views of one image, mean 0 and std 1 to keep the bytes."""
    flips, turns = torch.tensor([flip]).to(torch.uint8), torch.tensor([turns]).to(torch.uint8)
    out = rotate_views(x, flips, turns, [0.0] * 3, [1.0] * 3, torch.float32)
    return out.permute(0, 2, 3, 1).to(torch.uint8)


@given(images, st.integers(0, 3), st.booleans())
def test_turning_back_gives_the_image_again(image, k, flip):
    image = torch.from_numpy(image)
    there = turned(image, flip, [k])
    # A mirror reverses the sense of a turn: undone by the same turn after the second mirror.
    back = turned(there, flip, [k if flip else (4 - k) % 4])
    assert torch.equal(back, image)


@given(images, st.booleans())
def test_four_views_are_quarter_turns_of_one_another(image, flip):
    views = turned(torch.from_numpy(image), flip, [0, 1, 2, 3])
    for k in range(4):
        assert torch.equal(views[k].rot90(1), views[(k + 1) % 4])
    assert torch.equal(views[0], torch.from_numpy(np.fliplr(image[0]).copy() if flip else image[0]))


def replaced(case, position, value):
    return (*case[:position], value, *case[position + 1 :])


REFUSALS = {
    "crops are 5 x 4; a quarter turn needs them square": (
        0,
        torch.zeros(3, 5, 4, 3, dtype=torch.uint8),
    ),
    "x has shape [3, 5, 5]; expected [n, S, S, C]": (0, torch.zeros(3, 5, 5, dtype=torch.uint8)),
    "x has shape [3, 0, 0, 3]; expected [n, S, S, C]": (
        0,
        torch.zeros(3, 0, 0, 3, dtype=torch.uint8),
    ),
    "x is torch.float32; expected torch.uint8": (0, torch.zeros(3, 5, 5, 3)),
    "flips has shape [2]; expected [3]": (1, torch.zeros(2, dtype=torch.uint8)),
    "flips is torch.bool; expected torch.uint8": (1, torch.zeros(3, dtype=torch.bool)),
    "turns has shape [3]; expected [3, V] with V >= 1": (2, torch.zeros(3, dtype=torch.uint8)),
    "turns has shape [3, 0]; expected [3, V] with V >= 1": (
        2,
        torch.zeros(3, 0, dtype=torch.uint8),
    ),
    "turns is torch.int64; expected torch.uint8": (2, torch.zeros(3, 4, dtype=torch.int64)),
    "mean has shape [4]; expected [3]": (3, MEAN),
    "mean is torch.float64; expected torch.float32": (3, torch.zeros(3, dtype=torch.float64)),
    "std is on meta and x on cpu; move one": (4, torch.ones(3, device="meta")),
    "dtype is torch.float64; expected one of torch.float32, torch.float16, torch.bfloat16": (
        5,
        torch.float64,
    ),
    "pad_channels is 2; expected 0 or at least 3, the channels of x": (6, 2),
    "pad_channels is -1; expected 0 or at least 3, the channels of x": (6, -1),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_wrong_arguments_are_refused_in_one_line(message):
    case = replaced((*make_case(3, 5, 4, 3), torch.float32, 0), *REFUSALS[message])
    with pytest.raises(ValueError) as raised:
        rotate_views(*case)
    assert str(raised.value) == message


@pytest.fixture
def fresh_choice():
    """`auto` decides anew in this test, and after it."""
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


def test_a_backend_that_cannot_run_raises(monkeypatch, fresh_choice):
    case = (*make_case(1, 2, 1, 3), torch.float32)
    with pytest.raises(ValueError, match="backend 'tirton' is unknown; choose auto or"):
        rotate_views(*case, backend="tirton")

    monkeypatch.setitem(backends.BACKENDS, "triton", "fastrot_kernels.not_there")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: triton cannot be"):
        rotate_views(*case, backend="triton")
    with pytest.raises(RuntimeError, match="tensors are on cuda, not the CPU"):
        backends.choose("cpu", torch.device("cuda"))
    with pytest.raises(RuntimeError, match="tensors are on cpu, not CUDA"):
        backends.choose("cuda", torch.device("cpu"))


def test_auto_tells_what_it_chose_and_why(fresh_choice):
    assert backends.choose("auto", torch.device("cpu")) == ("cpu", "the fastest for cpu tensors")
    assert backends.choose("auto", torch.device("xpu")) == ("reference", "no kernel for xpu")
    assert backends.choose("reference", torch.device("cpu")) == ("reference", "named by the caller")


def test_without_a_compiler_the_cpu_falls_to_numpy_and_says_why(monkeypatch, tmp_path, fresh_choice):
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    cpu_views._library.cache_clear()
    reason = "cpu: there is no C compiler; install gcc, or set CC"
    assert backends.choose("auto", torch.device("cpu")) == ("numpy", reason)
    case = (*make_case(3, 5, 4, 3), torch.float32)
    assert torch.equal(rotate_views(*case), rotate_views(*case, backend="reference"))


def test_on_a_gpu_auto_takes_what_was_measured_to_be_faster(monkeypatch, fresh_choice):
    monkeypatch.setattr(backends, "obstacle", lambda name, device: "")
    monkeypatch.setattr(backends.contest, "obstacle", lambda rotate_views, device: "")
    gpu = torch.device("cuda", 0)
    for milliseconds, fastest in (({"cuda": 0.5, "triton": 0.25}, "triton"), ({"cuda": 0.25, "triton": 0.5}, "cuda")):
        monkeypatch.setattr(backends.contest, "times", lambda able, device, said=milliseconds: said)
        backends.choose.cache_clear()
        name, reason = backends.choose("auto", gpu)
        slower = {"triton": "cuda", "cuda": "triton"}[fastest]
        assert name == fastest
        assert reason == f"0.250 ms for 128 images, {slower} 0.500 ms, measured on this GPU"

    monkeypatch.setattr(backends, "obstacle", lambda name, device: "too old" if name == "cuda" else "")
    backends.choose.cache_clear()
    assert backends.choose("auto", gpu) == ("triton", "cuda: too old")
    monkeypatch.setattr(backends, "obstacle", lambda name, device: "broken")
    backends.choose.cache_clear()
    assert backends.choose("auto", gpu) == ("reference", "cuda: broken; triton: broken")


def test_a_candidate_that_cannot_be_compiled_is_passed_over_with_a_line(monkeypatch, fresh_choice, caplog):
    """On the host, whose reference plays the one that can."""
    caplog.set_level("INFO")
    monkeypatch.setattr(backends, "obstacle", lambda name, device: "")
    crops = contest._crops
    monkeypatch.setattr(contest, "_crops", lambda images, side, device: crops(images, side, torch.device("cpu")))
    monkeypatch.setattr(contest, "times", lambda *_: pytest.fail("one is left: there is nothing to measure"))

    def fails(crops):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    able = {"cuda": SimpleNamespace(rotate_views=reference.rotate_views), "triton": SimpleNamespace(rotate_views=fails)}
    monkeypatch.setattr(backends, "load", able.__getitem__)
    why = "triton: cannot be compiled and run (RuntimeError: Failed to find C compiler. Please specify via CC)"
    for _ in range(2):
        assert backends.choose("auto", torch.device("cuda", 0)) == ("cuda", why)
    assert caplog.text.count(why) == 1

    def dies(crops):
        raise torch.OutOfMemoryError("the device's own")

    able["triton"] = SimpleNamespace(rotate_views=dies)
    backends.choose.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        backends.choose("auto", torch.device("cuda", 0))


def test_a_contest_is_held_once_a_kind_of_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path))
    held = []
    monkeypatch.setattr(contest, "_measured", lambda able, device: held.append(device) or dict.fromkeys(able, 0.5))
    for name in ("one GPU", "one GPU", "another"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert contest.times({"cuda": None, "triton": None}, torch.device("cuda")) == {"cuda": 0.5, "triton": 0.5}
    assert len(held) == 2


ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]


@pytest.mark.parametrize("backend", ON_GPU)
def test_a_cuda_graph_replays_on_what_its_inputs_hold_by_then(backend):
    case, other = make_case(3, 64, 4, 3, "cuda"), make_case(4, 64, 4, 3, "cuda")
    rotate_views(*case, torch.bfloat16, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = rotate_views(*case, torch.bfloat16, backend=backend)
    for captured, fresh in zip(case[:3], other[:3], strict=True):
        captured.copy_(fresh[:3])
    graph.replay()
    assert ulps_apart(got, rotate_views(*case, torch.bfloat16, backend="reference")) <= 1


@pytest.mark.parametrize("backend", ON_GPU)
def test_it_runs_on_the_current_stream(backend):
    case = make_case(3, 64, 4, 3, "cuda")
    want = rotate_views(*case, torch.bfloat16, backend="reference")
    late, stream = torch.zeros_like(case[0]), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the pixels arrive late on this stream: another would read zeros
        late.copy_(case[0])
        got = rotate_views(late, *case[1:], torch.bfloat16, backend=backend)
    stream.synchronize()
    assert ulps_apart(got, want) <= 1


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_one_operation_under_torch_compile(device):
    case = make_case(2, 5, 4, 3, device)
    compiled = torch.compile(lambda *a: rotate_views(*a, torch.float32).mul(2), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*case), rotate_views(*case, torch.float32).mul(2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, pad", [(torch.float32, 0), (torch.bfloat16, 4)])
@pytest.mark.parametrize("side", [1, 5])
def test_the_operation_is_a_good_citizen_of_torch(device, dtype, pad, side):
    torch.library.opcheck(rotate_views_op, (*make_case(3, side, 4, 3, device), dtype, pad))


def test_the_fake_knows_the_strides():
    with torch._subclasses.FakeTensorMode() as mode:
        case = [mode.from_tensor(t) for t in make_case(3, 1, 4, 3)]
        fake = rotate_views(*case, torch.float16, 4)
    assert fake.shape == (12, 4, 1, 1) and fake.stride() == (4, 1, 4, 4)
    assert fake.dtype == torch.float16
