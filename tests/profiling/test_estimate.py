"""Plans for machines that are not there: against simulations of rings, of buckets and of failures."""

import json
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastrot.errors import UserError
from fastrot.profiling.estimate import (
    Demand,
    Numbers,
    _exposed_s,
    all_reduce_s,
    checkpoint_interval_s,
    goodput,
    plan,
    step_of,
)
from fastrot.profiling.hardware import FOLDER, read
from fastrot.profiling.roofline import Row

H100 = read("h100")
N = Numbers.of(H100, "value")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def demand(**changes) -> Demand:
    rows = (Row("conv", "convolution", False, 10**12, 10**9), Row("norm", "batch_norm", False, 10**8, 10**10))
    usual = {
        "images": 1024, "views": 4096, "steps": 10_000, "gradient_bytes": 94_000_000, "norms": 53, "norm_channels": 26_560,
        "bucket_mb": 25.0, "image_bytes": 110_000.0, "memory_bytes": 2e10, "checkpoint_bytes": 3e8, "rows": rows,
    }  # fmt: skip
    return Demand(**{**usual, **changes})


def ring_s(ranks: int, size: float, latency: float, rate: float) -> float:
    """Round by round: each rank passes a part on, to sum it up and again to hand it out."""
    clock = [0.0] * ranks
    for _ in range(2 * (ranks - 1)):
        clock = [max(clock[rank], clock[rank - 1]) + latency + size / ranks / rate for rank in range(ranks)]
    return max(clock)


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("size", [1e3, 1e8])
def test_summing_within_a_node_takes_what_a_ring_takes(gpus, size):
    want = ring_s(gpus, size, N["link_latency_s"], N["link_bytes"])
    assert all_reduce_s(N, size, 1, gpus) == pytest.approx(want)


def test_between_nodes_a_tree_is_taken_for_little_and_a_ring_for_much():
    many = 64
    for size, faster in ((1e4, "tree"), (1e12, "ring")):
        within = ring_s(8, size, N["link_latency_s"], N["link_bytes"])
        ring = ring_s(many, size / 8, N["net_latency_s"], N["net_bytes"])
        got = all_reduce_s(N, size, many, 8) - within
        assert got == pytest.approx(ring) if faster == "ring" else got < ring / 2


@given(st.floats(1, 100), st.integers(1, 64), st.floats(1e-3, 1))
def test_buckets_add_what_is_still_under_way_when_the_backward_pass_ends(bucket_mb, nodes, compute):
    one = demand(bucket_mb=bucket_mb)
    exposed = _exposed_s(one, N, nodes, 8, compute)
    buckets = max(1, math.ceil(one.gradient_bytes / (bucket_mb * 2**20)))
    each = all_reduce_s(N, one.gradient_bytes / buckets, nodes, 8)
    assert each * 0.999 <= exposed <= buckets * each * 1.001
    whole = _exposed_s(demand(bucket_mb=0.0), N, nodes, 8, compute)
    assert whole == pytest.approx(all_reduce_s(N, one.gradient_bytes, nodes, 8))


@pytest.mark.parametrize("write_s", [1, 60])
@pytest.mark.parametrize("to_failure_s", [2_000, 100_000])
def test_the_interval_is_where_the_expected_time_is_least(write_s, to_failure_s):
    """Daly's expected time of a run, minimised by looking."""

    def spent(interval: float) -> float:
        return math.expm1((interval + write_s) / to_failure_s) / interval

    looked = [to_failure_s * 1.01**-at for at in range(900)]
    best = min(looked, key=spent)
    assert checkpoint_interval_s(write_s, to_failure_s) == pytest.approx(best, rel=0.03)


def test_what_failures_cost_is_their_expectation():
    interval, write, failure, restart = 600.0, 10.0, 5_000.0, 120.0
    got = goodput(200, interval, write, failure, restart, runs=60)
    want = interval / (failure * math.exp(restart / failure) * math.expm1((interval + write) / failure))
    assert got == pytest.approx(want, rel=0.03)
    assert goodput(200, interval, write, 1e15, restart) == pytest.approx(interval / (interval + write), rel=1e-3)


@given(st.integers(1, 512), st.integers(1, 8), st.sampled_from(NAMES))
def test_worst_is_never_better_than_best_and_more_gpus_never_gain_over_their_number(nodes, gpus, name):
    hardware = read(name)
    found = plan(demand(), demand(), hardware, nodes, gpus)
    assert found.views_per_s[0] <= found.views_per_s[1] <= found.views_per_s[2]
    assert found.hours[0] >= found.hours[1] >= found.hours[2]
    assert 0 < found.goodput <= 1 and found.efficiency <= 1 + 1e-9


def test_each_bound_is_named():
    assert step_of(demand(images=64, norms=0), H100, 1, 1).bound == "compute"
    assert step_of(demand(image_bytes=1e8), H100, 1, 8).bound == "storage"
    assert step_of(demand(images=10**6, image_bytes=1e3), H100, 1, 1).bound == "decoding"
    assert step_of(demand(step_s=1e-3), H100, 64, 8).bound == "synchronised norms"
    assert step_of(demand(step_s=1e-3, norms=0, bucket_mb=0.0), H100, 64, 8).bound == "gradients"


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_hardware_file_says_where_it_is_from(name):
    for value in yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).values():
        assert not isinstance(value, dict) or (value["source"] and value["note"])


def test_a_sweep_says_where_it_stops_and_what_cannot_be(fastrot):
    words = [
        "--config",
        "configs/in1k.yaml",
        "model.arch=resnet18",
        "data.crop=32",
        "--image-kib",
        "1",
        "--nodes",
        "1,64",
        "--json",
    ]
    found = fastrot("estimate", *words).json
    assert [one["nodes"] for one in found["plans"]] == [1]
    assert found["steps"] == 700_639 and "leaves some of 512 ranks" in found["refused"]["64"]
    assert found["stops_scaling"].endswith("synchronised norms")


def test_a_profiled_step_takes_the_place_of_the_roofline(fastrot, tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"parts_of_a_step": {"step": {"step_s": 0.5}}, "stages": {"step": {"pace": 64.0}}}))
    words = ["model.arch=resnet18", "data.crop=32", "optim.images_per_step=64", "--from", profile, "--json"]
    found = fastrot("estimate", *words, "--gpus-per-node", "2").json
    assert found["plans"][0]["step"]["compute_s"] == pytest.approx(0.5)  # 32 images took it, as each GPU has
    assert found["step"] == "measured"


@pytest.mark.parametrize(
    "words, line",
    [
        (["--hardware", "tpu"], "no such file; known by name: a100, b200, h100, h200"),
        (["--hardware", "{odd}"], "gpus: Field required"),
        (["--nodes", "0"], "argument --nodes: invalid numbers value"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: must be 1 or more"),
        (["--images", "0"], "--images 0 of --image-kib 110: both must be above 0"),
        (["--from", "{odd}"], "not what fastrot profile --json prints"),
        (["--nodes", "99"], "leaves some of 792 ranks without an image"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(fastrot, tmp_path, words, line):
    odd = tmp_path / "odd.yaml"
    odd.write_text("name: x\n")
    done = fastrot("estimate", "model.arch=resnet18", "data.crop=32", *(word.format(odd=odd) for word in words))
    assert done.code == 2 and line in done.err and "Traceback" not in done.err


def test_a_hardware_file_out_of_order_is_refused(tmp_path):
    content = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    content["net_bytes"]["low"] = 1e12
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="must rise"):
        read(str(path))
