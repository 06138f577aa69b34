"""Plans for machines that are not there: against simulations of rings, of buckets and of failures."""

import json
import math
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape

from conftest import ROOT
from fastrot import config as configs
from fastrot.errors import UserError
from fastrot.profiling import collectives
from fastrot.profiling.collectives import Timing, fit
from fastrot.profiling.estimate import (
    Demand,
    Measured,
    Numbers,
    _exposed_s,
    all_reduce_s,
    checkpoint_interval_s,
    goodput,
    norm_s,
    plan,
    step_of,
)
from fastrot.profiling.hardware import FOLDER, read
from fastrot.profiling.roofline import Row
from fastrot.runs import elsewhere
from fastrot.runs.estimate import demand_of, norm_messages

H100 = read("h100")
N = Numbers.of(H100, "value")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


SHORT = Measured(1e-3, 0.0, (1.0, 1.0), 0.0, 0.0, 1e-6, 1e9, 0.0)


def demand(**changes) -> Demand:
    rows = (Row("conv", "convolution", False, 10**12, 10**9), Row("norm", "batch_norm", False, 10**8, 10**10))
    usual = {
        "images": 1024, "views": 4096, "steps": 10_000, "gradient_bytes": 94_000_000, "norms": 53, "norm_waits": (53, 53),
        "norm_channels": 26_560, "bucket_mb": 25.0, "image_bytes": 110_000.0, "memory_bytes": 2e10,
        "checkpoint_bytes": 3e8, "rows": rows,
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
    assert step_of(demand(measured=SHORT), H100, 64, 8).bound == "synchronised norms"
    assert step_of(demand(measured=SHORT, norms=0, bucket_mb=0.0), H100, 64, 8).bound == "gradients"


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
    assert found["stops_scaling"].endswith("the host's launches")


def timings(ranks: int, latency: float, rate: float) -> list[dict]:
    """What rings would take, round by round."""
    out = []
    for size in (256, 1024, 4096, 2**16, 2**20, 2**23):
        both = ring_s(ranks, size, latency, rate)
        once = (ranks - 1) * (latency + size / rate)
        for operation, seconds in (("all_reduce", both), ("all_gather", once)):
            out.append({"operation": operation, "ranks": ranks, "bytes": size, "seconds": seconds, "low": 0.9 * seconds,
                        "high": 1.2 * seconds, "cpu_s": seconds / 2})  # fmt: skip
    return out


@given(st.integers(2, 16), st.floats(1e-6, 1e-3), st.floats(1e8, 1e11))
def test_latency_and_rate_of_a_ring_are_found_again(ranks, latency, rate):
    found = fit([Timing(**one) for one in timings(ranks, latency, rate)])
    assert found.latency_s[1] == pytest.approx(latency, rel=0.2)
    assert found.rate[1] == pytest.approx(rate, rel=0.02)
    assert found.latency_s[0] <= found.latency_s[1] <= found.latency_s[2] and found.rate[0] <= found.rate[2]
    assert found.cpu_share == pytest.approx(0.5)


WORDS = ["model.arch=resnet18", "data.crop=32", "optim.images_per_step=64"]
NETWORK = {
    "model.arch": "resnet18", "data.crop": 32, "rotation.views": "all", "engine.precision": "fp32", "engine.norm": "torch",
    "engine.recompute": False,
}  # fmt: skip


def profile_of(path, **changes):
    """A profile: a step takes 0.1 s and 5 ms an image, of 0.8 of a core; training as long."""
    steps = [
        {"images": n, "seconds": s, "low": s, "high": s, "cpu_s": 0.8 * s} for n, s in ((64.0, 0.42), (16.0, 0.18))
    ]
    made = {"machine": {"device": "NVIDIA A100", "cores": 4}, "network": NETWORK, "steps": steps, "steps_over_ranks": steps,
            "collectives": timings(2, 1e-4, 1e9)}  # fmt: skip
    both = {"step_s": 0.42, "wait_share": 0.0, "communicate_share": 0.0}
    stages = {"data": {"pace": 500.0, "cpu_s": 0.002}, "both": {"paces": [60 / 0.42, 64 / 0.42, 68 / 0.42]}}
    found = {"stages": stages, "parts_of_a_step": {"both": both}, "elsewhere": made | changes}
    path.write_text(json.dumps(found))
    return ["--from", path, *WORDS, "--json"]


def test_a_profile_takes_the_place_of_the_hardware_files_numbers(fastrot, tmp_path):
    words = profile_of(tmp_path / "profile.json")
    done = fastrot("estimate", *words, "--gpus-per-node", "2")
    (one,) = done.json["plans"]
    assert one["step"]["compute_s"] == pytest.approx(0.1 + 32 * 0.005)
    assert one["step"]["norms_s"] == pytest.approx(20 * 2 * 1e-4, rel=0.3)  # a hop there and one back
    known = done.json["hardware"]
    assert known["link_latency_s"]["source"] == known["core_decode"]["source"] == "measured"
    assert known["core_decode"]["value"] == pytest.approx(500)
    assert known["net_bytes"]["source"] == "assumed"
    assert "of NVIDIA A100, 4 cores; another machine than 8 x H100" in done.json["profile"]
    assert "compute 260.0 [measured]" in one["says"]["a step"]


def test_more_processes_than_cores_take_turns():
    """Each keeps a core busy: four on two cores take twice as long, and the data path's cores come on top."""
    step = Measured(0.0, 0.01, (1.0, 1.0), 0.0, 0.01, 0.001, 1e9, 1.0)
    here = H100.model_copy(update={"cores": 2, "fabric": "gloo"})
    one = demand(images=64, norms=0, bucket_mb=0.0, gradient_bytes=0, measured=step)
    alone, two, four = (step_of(one, here, 1, gpus) for gpus in (1, 2, 4))
    taken = (0.64, 1.1 * 0.32, 1.1 * 0.32)  # two and four leave no core for the data path
    assert (alone.compute_s, two.compute_s, four.compute_s) == pytest.approx(taken)
    assert alone.bound == "compute" and four.seconds == pytest.approx((0.64 + 0.064) / 2, rel=1e-3)
    normed = replace(one, norms=20, norm_waits=(20, 20), norm_channels=200)
    messages = [step_of(normed, here, 1, 4, corner).norms_s for corner in ("best", "value")]
    waits = [sum(norm_s(Numbers.of(here, corner), 10, 1, 4, rings=True)) for corner in ("best", "value")]
    assert messages == pytest.approx([20 * waits[0], 2 * 20 * waits[1]])
    crowded = replace(one, measured=replace(step, crowding=1.5))
    assert step_of(crowded, here, 1, 4).seconds == pytest.approx(1.5 * four.seconds)


def test_a_step_waits_for_the_messages_that_no_product_hides():
    """62 of fused_conv's 98, at worst all: what test_compiled_ranks counts in a step."""
    config, _ = configs.load(str(ROOT / "configs" / "in1k.yaml"), ["data.crop=32"])
    asked = demand_of(config, 8, 1_281_167, 110_000.0, lambda: norm_messages(config))
    assert (asked.norms, asked.norm_waits) == (49, (45, 17))
    gathered, summed = norm_s(N, asked.norm_channels / 49, 1, 8, rings=False)
    assert step_of(asked, H100, 1, 8).norms_s == pytest.approx(45 * gathered + 17 * summed)
    worst = norm_s(Numbers.of(H100, "worst"), asked.norm_channels / 49, 1, 8, rings=False)
    assert step_of(asked, H100, 1, 8, "worst").norms_s == pytest.approx(49 * sum(worst))


def test_a_step_is_no_faster_than_its_launches():
    step = step_of(demand(launches=10_000, images=64), H100, 1, 1)
    assert step.compute_s == pytest.approx(10_000 * N["launch_s"]) and step.bound == "the host's launches"


def test_a_page_holds_the_plans_and_draws_them(fastrot, tmp_path):
    html = tmp_path / "plans.html"
    found = fastrot("estimate", *WORDS, "--nodes", "1,2,8", "--html", html, "--json").json
    page = html.read_text()
    assert page.count("<polyline") == 3 and "<script" not in page and "http" not in page
    assert all(escape(one["says"]["views/s"]) in page for one in found["plans"])
    assert escape(f"Stops scaling at {found['stops_scaling']}") in page
    refused = fastrot("estimate", *WORDS, "--html", tmp_path / "none" / "plans.html")
    assert refused.code == 2 and "cannot be written" in refused.errors[0]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--hardware", "tpu"], "no such file; known by name: a100, b200, h100, h200"),
        (["--hardware", "{odd}"], "gpus: Field required"),
        (["--nodes", "0"], "argument --nodes: invalid numbers value"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: must be 1 or more"),
        (["--images", "0"], "--images 0 of --image-kib 110: both must be above 0"),
        (["--from", "{odd}"], "not what fastrot profile --json prints"),
        (["--from", "{tmp}/none.json"], "not what fastrot profile --json prints"),
        (["--nodes", "99"], "leaves some of 792 ranks without an image"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(fastrot, tmp_path, words, line):
    odd = tmp_path / "odd.yaml"
    odd.write_text("name: x\n")
    done = fastrot(
        "estimate", "model.arch=resnet18", "data.crop=32", *(word.format(odd=odd, tmp=tmp_path) for word in words)
    )
    assert done.code == 2 and line in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"network": NETWORK | {"model.arch": "resnet50"}}, "a profile of model.arch=resnet50; profile this config"),
        ({"steps": []}, "holds no step at two sizes; profile for 20 s or more"),
        ({"steps": [{"images": 3}]}, "not what fastrot profile --json prints"),
    ],
)
def test_a_profile_that_does_not_fit_is_one_line(fastrot, tmp_path, changes, line):
    done = fastrot("estimate", *profile_of(tmp_path / "profile.json", **changes))
    assert done.code == 2 and len(done.errors) == 1 and line in done.errors[0]


def test_a_hardware_file_that_lacks_a_number_is_refused(tmp_path):
    content = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    del content["net_bytes"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="net_bytes: Field required"):
        read(str(path))


def test_a_hardware_file_out_of_order_is_refused(tmp_path):
    content = yaml.safe_load((FOLDER / "h100.yaml").read_text())
    content["net_bytes"]["low"] = 1e12
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="must rise"):
        read(str(path))


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_estimate_reads_what_profile_prints(fastrot, images, tmp_path, monkeypatch):
    """A step of the same images on one process takes what it took in training there."""
    monkeypatch.setattr(elsewhere, "LEAST_S", 0.0)
    monkeypatch.setattr(elsewhere, "sweep", lambda _: {"collectives": timings(2, 1e-4, 1e9), "crowding": 1.0})
    words = [
        "model.arch=resnet18",
        "engine.kind=plain",
        "data.crop=16",
        "optim.images_per_step=8",
        f"data.train={images}",
    ]
    found = fastrot("profile", *words, "--seconds", "1", "--json").json
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(found))
    (one,) = fastrot("estimate", *words, "--gpus-per-node", "1", "--from", path, "--json").json["plans"]
    both = found["parts_of_a_step"]["both"]
    assert one["step"]["compute_s"] == pytest.approx(
        both["step_s"] * (1 - both["wait_share"] - both["communicate_share"])
    )


@pytest.mark.slow
def test_a_pair_of_processes_sweeps_and_fits():
    swept = collectives._of_a_pair()
    found = fit([Timing(**one) for one in swept["collectives"]])
    assert found.ranks == 2 and 0 < found.latency_s[0] <= found.latency_s[1] <= found.latency_s[2]
    assert 0 < found.rate[0] <= found.rate[2] and swept["crowding"] >= 1
