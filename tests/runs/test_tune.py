"""`fastrot tune`: what it chooses from given timings, the file it keeps, and that training says it used it."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrot import distributed, machine
from fastrot.config import Data, load
from fastrot.data import loader_settings
from fastrot.data.build import make_loader
from fastrot.data.index import index
from fastrot.data.loader_settings import Tuned
from fastrot.data.manifest import Manifest
from fastrot.distributed import Ranks
from fastrot.errors import UserError
from fastrot.runs import tune

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
seconds = st.lists(st.floats(1e-3, 1), min_size=1, max_size=60)


def steady(**paces: float) -> dict[float, list[float]]:
    return {int(name[1:]): [pace, 1.002 * pace, 0.998 * pace, pace, pace] for name, pace in paces.items()}


def chosen(paces: dict[float, list[float]], default: int) -> float | None:
    return tune._fewest_of_the_fastest(default, paces)


def test_the_fewest_threads_near_the_fastest_are_chosen():
    assert chosen(steady(t1=500, t2=985, t3=1000, t4=990), 3) == 2
    assert chosen(steady(t1=500, t2=900, t3=1000), 2) == 3
    assert chosen(steady(t2=1000, t3=1020, t4=1020), 2) == 2, "2% more are no reason for another thread"
    assert chosen(steady(t1=40), 1) == 1


@pytest.mark.parametrize("busy", range(5))
def test_one_busy_round_changes_nothing(busy):
    paces = steady(t1=500, t2=1000, t3=1010)
    paces[2][busy] = 300
    assert chosen(paces, 2) in (2, None)  # five rounds may not tell; eight do
    more = {one: [*pace, *pace[:3]] for one, pace in steady(t1=500, t2=1000, t3=1010).items()}
    more[2][busy] = 300
    assert chosen(more, 2) == 2


def test_what_the_noise_hides_is_not_chosen():
    """The rounds of an afternoon on a shared machine: one thread had the highest median by chance."""
    paces = {1: [700.0, 400, 900, 650, 800], 2: [500.0, 900, 600, 640, 1000]}
    assert sorted(paces[1])[2] > sorted(paces[2])[2]
    assert chosen(paces, 2) is None


@given(st.integers(5, 11), st.integers(0, 2**32))
def test_equal_settings_are_seldom_told_apart(rounds, seed):
    """At most once in ten, whatever the noise: here as wide as a factor of three."""
    noise, told = random.Random(seed), 0
    for _ in range(40):
        one, other = ([noise.uniform(1, 3) for _ in range(rounds)] for _ in range(2))
        told += loader_settings.at_least(one, other, 1 / 0.97) is True
    assert told <= 10  # 2 on average; 11 once in a million


@pytest.mark.parametrize("n, cut", [(1, 0), (5, 0), (7, 0), (8, 1), (9, 1), (11, 2)])
def test_the_interval_leaves_out_what_so_many_coins_allow(n, cut):
    low, middle, high = loader_settings.interval([float(v) for v in range(n)])
    assert (low, middle, high) == (cut, (n - 1) / 2, n - 1 - cut)


def test_the_hardware_decoder_takes_the_most_with_which_the_loader_keeps_up():
    paces = {0.5: [1900.0] * 5, 0.65: [2000.0] * 5, 0.9: [1500.0] * 5, 0.99: [1200.0] * 5}
    asked = {1000: 0.99, 1400: 0.9, 1700: 0.65, 2500: 0.65}  # the fastest where none is fast enough
    assert {demand: loader_settings.most_that_meets(demand, paces) for demand in asked} == asked
    noisy = paces | {0.99: [800.0, 1600, 900, 1500, 1300]}
    assert loader_settings.most_that_meets(1000, noisy) is None


def test_only_a_demand_makes_tune_time_the_hardware_decoder(images, tmp_path, monkeypatch):
    """On a GPU, played on the host."""
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    loads = []

    def intervals(bench, settings):
        loads.append(settings.hw_decoder_load)
        return iter([0.01 if settings.hw_decoder_load == 0.8 else 0.02] * 8)

    monkeypatch.setattr(tune._Bench, "_intervals", intervals)
    config = load(None, [f"data.train={images}", "optim.images_per_step=6"])[0]
    distributed.start()
    gpu = Ranks(0, 1, 0, 1, torch.device("cuda", 0))
    try:
        assert tune.tune(config, gpu, 1.0)["hw_decoder_load"] is None and set(loads) == {None}
        found = tune.tune(config, gpu, 1.0, demand=500)
        assert found["hw_decoder_load"] == 0.8 and found["images_per_s"] == pytest.approx(600)
        assert tune.tune(config, gpu, 1.0, demand=200)["hw_decoder_load"] is None, "the default keeps up"
    finally:
        distributed.end()


def test_thread_counts_surround_a_ranks_share_of_the_cores():
    assert loader_settings.thread_counts(0) == [1]
    assert loader_settings.thread_counts(1) == [1, 2]
    assert loader_settings.thread_counts(16) == [8, 12, 16, 24, 32]


def test_an_even_pace_never_waits_and_needs_the_least_depth():
    assert loader_settings.waiting([0.1] * 50, 2) == 0
    assert loader_settings.depth_for([0.1] * 50) == 2


def test_a_slow_batch_costs_what_the_queue_does_not_hide():
    # a step takes (10 * 0.1 + 0.5) / 11 / 0.9 s; two batches ahead, the third is 0.5 s in the making
    course, step = [0.1] * 10 + [0.5], 1.5 / 11 / 0.9
    assert loader_settings.waiting(course, 1) > loader_settings.waiting(course, 4)
    ahead = 1 * step  # the queue of one is refilled long before
    assert loader_settings.waiting(course, 1) == pytest.approx((0.5 - ahead) / (11 * step + 0.5 - ahead), rel=1e-6)


@given(seconds, st.integers(1, 8))
def test_a_deeper_queue_never_waits_longer(course, depth):
    def lost(depth):
        share = loader_settings.waiting(course, depth)
        return share / (1 - share)  # waiting per second of work

    assert 0 <= loader_settings.waiting(course, depth) < 1
    assert lost(depth + 1) <= lost(depth) + 1e-9
    assert 2 <= loader_settings.depth_for(course) <= 8


def test_what_was_found_is_read_as_written_and_for_its_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path))
    here = loader_settings.place(Data(), ALONE)
    assert loader_settings.read(here) is None
    loader_settings.write(here, Tuned(5, 4, 0.8, "by fastrot tune, 2020-02-02"))
    assert loader_settings.read(here) == Tuned(5, 4, 0.8, "by fastrot tune, 2020-02-02")
    others = [(Data(crop=96), ALONE), (Data(decode="torch"), ALONE), (Data(), Ranks(0, 2, 0, 2, ALONE.device))]
    assert all(loader_settings.read(loader_settings.place(data, ranks)) is None for data, ranks in others)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"threads": 2}', '{"threads": 0, "prefetch": 1, "hw_decoder_load": null, "found": ""}']
)
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json: not what fastrot tune wrote .*; remove it"):
        loader_settings.read(path)


def test_training_uses_what_tune_found_and_says_so(fastrot, images, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path / "cache"))
    words = [f"data.train={images}", "data.crop=32", "data.decode=torch", "optim.images_per_step=6"]
    monkeypatch.setattr(tune._Bench, "_intervals", lambda bench, settings: iter([0.3 / settings.threads] * 8))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    found = fastrot("tune", *words, "--json").json
    assert found["threads"] == 4 and found["spread"] == 0
    kept = json.loads(Path(found["kept"]).read_text())
    assert (kept["threads"], kept["prefetch"]) == (found["threads"], found["prefetch"])

    manifest = Manifest.load(index(str(images), tmp_path / "manifests", 10**8, lambda items, total, title: items))

    def said(*more):
        loader, line = make_loader(load(None, words + list(more))[0], manifest, ALONE, 6, None)
        loader.close()
        return line

    assert f"{found['threads']} threads, prefetch {found['prefetch']} (by fastrot tune, " in said()
    assert "7 threads, prefetch" in said("data.threads=7")
    assert said("data.threads=7", "data.prefetch=2") == "decoding with torch on the CPU, 7 threads"


def test_a_noisy_machine_is_measured_longer_and_then_nothing_is_kept(fastrot, images, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path / "cache"))
    noise, laps = random.Random(1), []

    def intervals(bench, settings):
        laps.append(settings.threads)
        return iter([noise.uniform(0.1, 0.3)] * 8)

    monkeypatch.setattr(tune._Bench, "_intervals", intervals)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    done = fastrot("tune", f"data.train={images}", "optim.images_per_step=6", "--json")
    assert done.json["threads"] is None and done.json["kept"] is None and done.json["spread"] > 0.3
    assert laps == loader_settings.thread_counts(2) * 11
    assert not (tmp_path / "cache/tune").exists()
    assert "not told apart" in done.err and "stays the default" in done.err


def test_the_stream_does_not_depend_on_what_tune_found(fastrot, images, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE", str(tmp_path / "cache"))
    words = [
        "stream",
        f"data.train={images}",
        "data.crop=32",
        "data.decode=torch",
        "--steps",
        "3",
        "--pixels",
        "--json",
    ]
    before = fastrot(*words).json
    loader_settings.write(loader_settings.place(Data(crop=32, decode="torch"), ALONE), Tuned(7, 1, None, "here"))
    assert fastrot(*words).json == before


def test_tune_without_data_says_what_to_set(fastrot):
    done = fastrot("tune")
    assert done.code == 2
    assert done.errors == ["fastrot: data.train is not set; name an image folder, as in data.train=/path, or list:FILE"]


def test_a_demand_is_above_zero(fastrot, images):
    done = fastrot("tune", f"data.train={images}", "--images-per-s", "0")
    assert done.code == 2 and done.errors == ["fastrot: --images-per-s 0: must be above 0"]


def test_a_share_of_the_hardware_decoder_is_dalis(fastrot):
    done = fastrot("tune", "data.decode=turbo", "data.hw_decoder_load=0.5")
    assert done.code == 2 and done.errors == ["fastrot: data.hw_decoder_load is dali's; data.decode is turbo"]
