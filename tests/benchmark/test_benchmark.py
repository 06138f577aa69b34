"""`fastrot bench`: gates that notice what is not equal, figures that follow from the rounds, comparisons with their
intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrot import distributed
from fastrot.benchmark import compare, parts, rounds
from fastrot.cli import main
from fastrot.config import from_values
from fastrot.data.build import open_manifest
from fastrot.errors import UserError
from fastrot.selfcheck.images import drawn

paces = st.lists(st.floats(1, 1e6), min_size=1, max_size=9)
SMALL = {
    "model.arch": "resnet18",
    "data.crop": 32,
    "optim.images_per_step": 4,
    "engine.kind": "plain",
    "data.threads": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, narrow):
    folder = drawn(tmp_path_factory.mktemp("images"), 12)
    config = from_values(None, {**SMALL, "data.train": str(folder), "engine.precision": "fp32"})
    with distributed_alone() as ranks:
        yield parts.Place(config, ranks, open_manifest(str(folder), config, ranks, "data.train"), 0.02)


class distributed_alone:
    def __enter__(self):
        return distributed.start()

    def __exit__(self, *_):
        distributed.end()


def arm(place, part, name):
    return parts.PARTS[part].arms(place.config, "cpu")[name]


@pytest.mark.parametrize("part,name", [("load", "turbo"), ("rotate", "cpu"), ("step", "as configured")])
def test_a_sound_arm_passes_its_gate_and_has_laps(place, part, name):
    one = arm(place, part, name)
    assert one.gate(place)
    laps = one.laps(place)
    assert len(laps) == 5 and min(laps) > 0


def test_the_steps_figure_counts_views_and_the_loaders_images(place, monkeypatch):
    from fastrot.profiling.verdict import Ceiling
    from fastrot.runs.subject import Training

    monkeypatch.setattr(Training, "data", lambda self, seconds: Ceiling([10.0], [0.0]))
    monkeypatch.setattr(Training, "both", lambda self, seconds: (Ceiling([10.0], [0.0]), {}))
    assert arm(place, "load", "turbo").laps(place) == [10.0]
    assert arm(place, "train", "as configured").laps(place) == [40.0]


def test_a_decoder_that_is_off_has_no_figure(place, monkeypatch):
    def brighter(self):
        return [
            one.__class__(**{**vars(one), "pixels": one.pixels + (self.config.data.decode == "turbo")})
            for one in batches(self)
        ]

    batches = parts.Place.batches
    monkeypatch.setattr(parts.Place, "batches", brighter)
    with pytest.raises(parts.Unequal, match="levels of 255"):
        arm(place, "load", "turbo").gate(place)


def test_a_kernel_that_is_off_has_no_figure(place, monkeypatch):
    def wrong(*crops, backend):
        views = real(*crops, backend=backend)
        return views + 1 if backend == "cpu" else views

    real = parts.rotate_views
    monkeypatch.setattr(parts, "rotate_views", wrong)
    with pytest.raises(parts.Unequal, match="reference"):
        arm(place, "rotate", "cpu").gate(place)


def test_a_step_with_swapped_turns_has_no_figure(place, monkeypatch):
    from fastrot.tasks.rotation import RotationTask

    def swapped(self, module, views, batch):
        turns = torch.tensor([0, 3, 2, 1], dtype=torch.uint8)[batch.turns.long()]
        return real(self, module, views, batch.__class__(**{**vars(batch), "turns": turns}))

    real = RotationTask.loss
    monkeypatch.setattr(RotationTask, "loss", swapped)
    with pytest.raises(parts.Unequal, match="gradient"):
        arm(place, "step", "as configured").gate(place)


def test_neighbours_are_those_of_every_distance(place, monkeypatch):
    gate = parts._same_neighbours
    assert "top-1" in gate(place)
    monkeypatch.setattr(parts, "_neighbours", lambda rows, place: 50.0)
    with pytest.raises(parts.Unequal):
        gate(place)


def bundle(**laps):
    """One with these arms of the part `load`: a list of rounds, each of its laps."""
    kept = [{"part": "load", "arm": name, "laps": one} for name, all_of in laps.items() for one in all_of]
    figures = rounds.figures(kept)
    return {
        "format": 1,
        "inputs": {"content": "a"},
        "rounds": kept,
        "figures": figures,
        "environment": {},
        "config": {},
    }


def test_every_round_is_asked_for_in_random_order_and_kept(monkeypatch, tmp_path, place):
    asked = []

    def answer(request):
        asked.append((request.part, request.arm, request.seconds))
        if request.arm == "ffcv":
            return {"missing": "not there"}
        if request.arm == "dali" and request.seconds:
            return {"missing": "died"}
        return {"laps": [1.0, 3.0, 2.0]} if request.seconds else {"gate": "equal"}

    monkeypatch.setattr(rounds, "_asked", answer)
    found = rounds.bench(place.config, ["load", "rotate"], 3, 0.5)
    timed = [one for one in asked if one[2]]
    assert timed.count(("load", "turbo", 0.5)) == 3 and timed.count(("load", "dali", 0.5)) == 1
    assert timed != sorted(timed), "rounds of an arm stand together"
    assert found["missing"]["load: ffcv"] == "not there" and "died" in found["missing"]["load: dali"]
    assert found["figures"]["load: turbo"]["median"] == 2.0
    assert len([one for one in found["rounds"] if one["arm"] == "turbo"]) == 3
    assert found["inputs"]["content"] == place.manifest.content
    (tmp_path / "a.json").write_text(json.dumps(found))
    assert compare.compare(*[compare.read(tmp_path / "a.json")] * 2)["ratios"]["load: turbo"]["ratio"] == 1


def test_what_is_done_is_kept_when_it_is_interrupted(monkeypatch, tmp_path, place):
    def answer(request):
        if request.seconds and not next(left):
            raise KeyboardInterrupt
        return {"laps": [1.0, 3.0, 2.0]} if request.seconds else {"gate": "equal"}

    left = iter([1, 1, 1, 0])
    monkeypatch.setattr(rounds, "_asked", answer)
    monkeypatch.setattr("fastrot.commands.bench.settings", lambda args: (place.config, None))
    words = ["--parts", "rotate", "--rounds", "4", "--out", str(tmp_path / "a.json"), "data.train=x"]
    assert main(["bench", *words]) == 130
    found = compare.read(tmp_path / "a.json")
    assert len(found["rounds"]) == 3 and found["left"] == 4 * len(found["gates"]) - 3
    assert {one["median"] for one in found["figures"].values()} == {2.0}


@given(paces)
def test_an_interval_holds_its_median_and_lies_within_the_rounds(values):
    low, high = compare.interval(values)
    assert min(values) <= low <= np.median(values) <= high <= max(values)


def test_a_faster_machine_is_faster_and_one_within_the_noise_is_not():
    old = bundle(turbo=[[100.0], [101.0], [99.0], [100.5], [99.5], [100.2]])
    new = bundle(turbo=[[120.0], [121.0], [119.0], [120.5], [119.5], [120.2]])
    one = compare.compare(old, new)["ratios"]["load: turbo"]
    assert one["ratio"] == pytest.approx(1.2, rel=0.01) and 1.15 < one["interval"][0] < one["interval"][1] < 1.25
    assert "faster" in compare.says(one["ratio"], *one["interval"])
    again = compare.compare(old, old)["ratios"]["load: turbo"]
    assert "no difference" in compare.says(again["ratio"], *again["interval"])
    back = compare.compare(new, old)["ratios"]["load: turbo"]
    assert "slower" in compare.says(back["ratio"], *back["interval"])


def test_of_seconds_less_is_faster():
    def of(value):
        made = bundle(x=[[value]] * 5)
        made["figures"]["load: x"]["unit"] = "s"
        return made

    assert compare.compare(of(2.0), of(1.0))["ratios"]["load: x"]["ratio"] == 2


def test_other_images_are_not_compared():
    other = bundle(x=[[1.0]]) | {"inputs": {"content": "b"}}
    with pytest.raises(UserError, match="inputs differ"):
        compare.compare(bundle(x=[[1.0]]), other)


@pytest.mark.parametrize(
    "words,says",
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--out", "/no/such/folder/a.json"], "no folder"),
        (["--compare", "/no/a.json", "/no/b.json"], "No such file"),
    ],
)
def test_what_cannot_be_is_one_line(words, says, capsys):
    assert main(["bench", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_another_file_is_no_bundle(tmp_path: Path, capsys):
    (tmp_path / "a.json").write_text("[1]")
    assert main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
    assert "no bundle" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bench_from_the_command_line(tmp_path):
    out = tmp_path / "bundle.json"
    words = ["--parts", "rotate", "--rounds", "1", "--seconds", "0.1", "--out", str(out)]
    assert main(["bench", *words, *(f"{key}={value}" for key, value in SMALL.items())]) == 0
    found = compare.read(out)
    assert found["figures"]["rotate: cpu"]["median"] > 0 and found["environment"]["versions"]["torch"]
    assert all(one["clocks"] and len(one["laps"]) == 5 for one in found["rounds"])
