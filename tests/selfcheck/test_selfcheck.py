"""The selfcheck: parts in order and within their time, each kept, none in another's way; and the verdict's choice."""

import importlib
import json
import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from fastrot import config as configs
from fastrot.selfcheck import correctness, report, run, speed, stand_in, verdict
from fastrot.selfcheck.parts import PARTS, Part, command
from fastrot.selfcheck.place import Found, Place, launcher
from fastrot.selfcheck.verdict import Arm

GOOD = {"figures": [["speed", "3 views/s"]], "failures": [], "skipped": [], "raw": {}}
SPREAD = {"median_s": 1.0, "least_s": 0.9, "most_s": 1.1}
STEP = {
    "switches": {
        name: {
            "times_base": times,
            "times_plain": times / 2,
            "views_per_s": 100 * times,
            "step": SPREAD,
            "base_step": SPREAD,
        }
        for name, times in {"base": 1.0, "norm=fused": 1.25, "precision=fp32": 3.0, "recompute=true": 0.8}.items()
    },
    "plain": {"plain PyTorch": {"times_base": 2.0, "views_per_s": 200.0}},
    "missing": {"compile=true": "<b>no compiler</b>"},
}
ITS_OWN = f"99.{os.getpid()}"  # seconds: a process that no other test starts
BODIES = {  # what a tiny part does with `out`, the file of what it found
    "good": f"out.write_text({json.dumps(json.dumps(GOOD))})",
    "step": f"out.write_text({json.dumps(json.dumps(GOOD | {'raw': STEP}))})",
    "wrong": f"out.write_text({json.dumps(json.dumps(GOOD | {'failures': ['2 < 3']}))})",
    "absent": f"out.write_text({json.dumps(json.dumps(GOOD | {'figures': [], 'skipped': ['needs two GPUs']}))})",
    "raises": "raise ValueError('it broke')",
    "rubbish": r"out.write_bytes(b'\xff{'); import os; os.write(1, b'\xff\xfe')",
    "silent": "pass",
    "other": "out.write_text('[1]')",
    "hangs": "import subprocess, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    f"subprocess.Popen(['sleep', '{ITS_OWN}']); time.sleep(99)",
}


def tiny(part, gpu, bundle, work, seconds, out):
    code = f"from pathlib import Path; out = Path({str(out)!r}); {BODIES[part.name]}"
    return [sys.executable, "-S", "-c", code]


def ran(bundle, *names, limits=None, **options):
    parts = [Part(name, "is it so?", 9, (limits or {}).get(name, 60), "") for name in names]
    return run.run(parts, False, bundle, start=tiny, **options)


def test_what_fails_hangs_or_says_rubbish_is_listed_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_GRACE_S", 0.1)
    monkeypatch.setattr(run, "_LEAST_S", 0.5)
    names = ("good", "raises", "hangs", "rubbish", "silent", "other", "wrong", "absent", "step")
    outcomes = {one.part: one for one in ran(tmp_path, *names, limits={"hangs": 1})}
    assert list(outcomes) == list(names)
    assert {name: one.status for name, one in outcomes.items()} == dict.fromkeys(names, "failed") | {
        "good": "passed", "step": "passed", "absent": "skipped",
    }  # fmt: skip
    why = {name: one.failures for name, one in outcomes.items()}
    assert why["raises"] == ["ended with code 1"] and "it broke" in outcomes["raises"].output
    assert why["hangs"] == ["was stopped at its limit of 1 s"] and why["wrong"] == ["2 < 3"]
    assert why["silent"] == ["wrote no result"] and "not JSON" in why["rubbish"][0]
    assert "cannot be read" in why["other"][0]
    assert not [line for line in _processes() if f"sleep\0{ITS_OWN}" in line]
    failed = json.loads((tmp_path / "verdict.json").read_text())["failed"]
    assert {one["part"] for one in failed} == {"raises", "hangs", "rubbish", "silent", "other", "wrong"}
    assert all((tmp_path / one["open"]).exists() for one in failed)


def _processes() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text())
        except OSError:
            continue
    return found


def test_the_bundle_holds_every_part_the_verdict_the_config_and_a_page_by_itself(tmp_path):
    ran(tmp_path, "step", "good")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "environment.json", "step.json", "step.txt", "good.json", "good.txt", "verdict.json", "report.html",
        "in1k_fast_cpu.yaml",
    }  # fmt: skip
    said = json.loads((tmp_path / "verdict.json").read_text())
    assert said["arm"] == "norm=fused" and said["switches"]["norm"] == "fused" and said["times_plain"] == 0.625
    config, _ = configs.load(str(tmp_path / "in1k_fast_cpu.yaml"), [], "train")
    shipped, _ = configs.load(str(ROOT / "configs" / "in1k_fast.yaml"), [])
    assert config == shipped.model_copy(
        update={"engine": shipped.engine.model_copy(update={"norm": "fused", "compile": False})}
    )
    html = (tmp_path / "report.html").read_text()
    assert "norm=fused" in html and "3 views/s" in html and "&lt;b&gt;no compiler" in html
    assert "<script" not in html and "http" not in html and "src=" not in html


def test_a_part_run_again_takes_its_place_and_the_others_stay(tmp_path, monkeypatch):
    ran(tmp_path, "good", "wrong")
    monkeypatch.setitem(BODIES, "wrong", BODIES["good"])
    ran(tmp_path, "wrong")
    said = json.loads((tmp_path / "verdict.json").read_text())
    assert said["parts"] == {"good": "passed", "wrong": "passed"} and said["failed"] == []


def test_a_parts_time_runs_from_its_start_and_what_it_calls_ends_before_it(tmp_path):
    """Also the second that its process takes to import torch is the part's."""
    words = command(PARTS[0], False, tmp_path, tmp_path, 60, tmp_path / "out")
    assert 0 < time.monotonic() + 60 - float(words[words.index("--until") + 1]) < 10
    place, done = Place(False, tmp_path, tmp_path, time.monotonic() + 1), tmp_path / "done"
    assert place.call([sys.executable, "-c", f"open({str(done)!r}, 'w')"]).endswith("was not begun: no time was left")
    assert not done.exists()
    trains = [*launcher(8), "-m", "fastrot.cli", "train", "run.max_steps=5"]
    assert [place.call(words).partition(" was")[0] for words in (trains, [*launcher(8), "bench/step.py", "--out"])] == [
        "fastrot train", "bench/step.py",
    ]  # fmt: skip


def test_a_budget_cuts_a_parts_time_and_leaves_out_what_it_does_not_reach(tmp_path, monkeypatch):
    (cut,) = ran(tmp_path, "good", budget=60, limits={"good": 500})
    assert 50 < cut.limit_s <= 60 and cut.status == "passed"
    monkeypatch.setattr(run, "_LEAST_S", 61)
    (left_out,) = ran(tmp_path, "good", budget=60)
    assert left_out.status == "skipped" and left_out.skipped == ["the budget was spent before it"]


ARMS = st.lists(
    st.builds(
        Arm,
        st.sampled_from([*speed.ARMS, "precision=fp32", "LARS", "half the images", "sync_batchnorm=false"]),
        st.floats(0.1, 10),
        st.floats(0.1, 10),
        st.booleans(),
    )
)


@settings(max_examples=50, deadline=None)
@given(ARMS)
def test_the_verdict_never_takes_a_slower_an_unequal_or_another_recipes_arm(arms):
    chosen = verdict.choose(arms)
    assert chosen == verdict.BASE or (chosen in arms and chosen.equal and chosen.switches and chosen.least > 1)
    sure = [arm for arm in arms if arm.equal and arm.switches and arm.speed >= arm.least > 1]
    assert all(chosen.speed >= arm.speed * (1 - verdict.NOISE) for arm in sure)
    assert not any(len(arm.switches) < len(chosen.switches) and arm.speed >= chosen.speed for arm in sure)
    configs.load(None, [f"engine.{k}={yaml.safe_dump(v).split()[0]}" for k, v in verdict.engine_keys(chosen).items()])


def test_over_ranks_an_arm_pays_only_where_a_training_has_learnt_alike():
    """Of the widest result; each way by itself, and both together."""
    graphs, memory = "cuda_graphs=collectives", "symmetric_memory=true"
    times = {"base": 1.0, "norm=fused_conv": 1.1, f"norm=fused_conv {graphs}": 1.3, f"norm=fused_conv {memory}": 1.2,
             f"norm=fused_conv {graphs} {memory}": 1.5}  # fmt: skip
    line = {"step": SPREAD | {"least_s": 1.0, "most_s": 1.0}, "base_step": SPREAD | {"least_s": 1.0}}
    measured = [
        {"ranks": ranks, "images": images, "switches": {name: line | {"times_base": t} for name, t in some.items()}}
        for ranks, images, some in ((8, 16, {"base": 1.0}), (8, 128, times), (2, 128, {"base": 1.0}))
    ]
    for proven, chosen in (([], "norm=fused_conv"), ([[graphs]], f"norm=fused_conv {graphs}"),
                           ([[memory]], f"norm=fused_conv {memory}"),
                           ([[memory], [graphs, memory]], f"norm=fused_conv {graphs} {memory}")):  # fmt: skip
        widest, arm = verdict.over_ranks({"measured": measured, "proven": proven})
        assert (widest["images"], arm.name) == (128, chosen)
        config = yaml.safe_load(verdict.fast_config(arm, "8 x H100", 128))["engine"]
        assert config.get("cuda_graphs", False) == ("collectives" if graphs in chosen else False)
        assert config.get("symmetric_memory", False) == (memory in chosen)
    assert verdict.over_ranks({}) is None


def test_the_documents_table_is_the_parts():
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `") and line.endswith(" |")]
    parts = [f"| `{part.name}` | {part.says} | {part.gpu_s:,.0f} |" for part in PARTS]
    assert [row for row in rows if row.split("`")[1] in {part.name for part in PARTS}] == parts


def test_a_switch_pays_where_it_is_faster_in_every_round_and_more_of_them_by_more_than_the_noise():
    assert verdict.choose([Arm("norm=fused", 1.2, 0.99, True)]) == verdict.BASE
    assert verdict.choose([Arm("norm=fused", 1.005, 1.001, True)]) == verdict.BASE
    both = [Arm("norm=fused cuda_graphs=true", 1.504, 1.5, True), Arm("norm=fused", 1.5, 1.4, True)]
    assert verdict.choose(both).name == "norm=fused"


def test_the_arms_are_the_benchs(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    step = importlib.import_module("step")
    assert all(step.able(step.BASE | step.SWITCHES[name], 1, cuda=True) for name in speed.ARMS)
    for world in (2, 8):
        assert all(step.able(step.BASE | step.SWITCHES[name], world, cuda=True) for name in speed._RANKS_ARMS)
    assert {key: step.BASE[key] for key in verdict.SWITCHES} == verdict.SWITCHES


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    return importlib.import_module("kernels")


def test_the_kernels_measured_are_those_of_the_table(bench):
    """Bytes and products of a stage's last block, which has no shortcut."""
    import traffic

    block = next(one for one in traffic.blocks() if one.layer == "layer4.2")
    inner, outer = (list(traffic.norm("fused", "", "", n, added=n == block.out)) for n in (block.mid, block.out))
    cases = list(bench.cases(1, [4], torch.device("cpu")))
    norms, products = cases[:8], cases[8:]
    assert [traffic.BF16 * case.values for case in norms] == [kernel.bytes for kernel in inner + outer]
    (conv3, *_) = traffic.convolution("", "", block.low, block.out, block.within)
    assert {case.flops for case in products} == {conv3.flops}
    assert traffic.BF16 * products[0].values == conv3.bytes


def test_a_kernel_that_is_wrong_has_no_figure(bench):
    case = next(bench.cases(1, [4], torch.device("cpu")))
    row = bench.measured(case, 1, 1, torch.device("cpu"))
    assert row["gb_per_s"] == pytest.approx(row["predicted_us"] / row["us"] * 2300)
    count, mean, var = case.check()[1]
    wrong = replace(case, check=lambda: (torch.stack([count, 1.01 * mean, var]), torch.stack([count, mean, var])))
    with pytest.raises(SystemExit, match=r"layer4 norm: moments: within 0.0\d+ of the reference"):
        bench.measured(wrong, 1, 1, torch.device("cpu"))


def test_kernels_stand_beside_what_was_predicted_in_the_bundle_and_the_page(tmp_path, monkeypatch):
    row = {"layer": "layer1", "us": 412.5, "predicted_us": 400.0, "gb_per_s": 2231.0, "tflop_per_s": 0.0}
    told = {
        "rows": [row | {"kernel": "norm: apply"}, row | {"kernel": "product: weight gradient", "tflop_per_s": 301.0}],
        "missing": {"layer2 norm: sums": "Unequal: gate"}, "predicted_by": {"memory": 2300, "library": 400, "ours": 350},
        "views_per_s": {"fused_conv": 5570.0},
    }  # fmt: skip
    monkeypatch.setattr(Place, "bench", lambda place, found, script, *words: told)
    found = Found()
    speed.kernels(Place(True, tmp_path, tmp_path, 0.0), found)
    assert ("norm kernels", "2,231.0 to 2,231.0 GB/s; 2,300 were predicted") in found.figures
    assert found.failures == ["layer2 norm: sums: Unequal: gate"]
    assert found.figures[-1] == ("the step by these rates, norm=fused_conv", "5,570 views/s")
    (tmp_path / "found.json").write_text(json.dumps(GOOD | {"raw": told}))
    monkeypatch.setitem(BODIES, "kernels", f"out.write_text(Path({str(tmp_path / 'found.json')!r}).read_text())")
    ran(tmp_path / "bundle", "kernels")
    html = (tmp_path / "bundle" / "report.html").read_text()
    assert '<td>layer1</td><td class="n">412.5</td><td class="n">400.0</td>' in html and "301" in html


def test_the_stand_in_finds_what_it_takes_the_place_of(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert stand_in.main(["config", "--json"]) == 0
    assert "cuda_graphs" in capsys.readouterr().out


def test_all_parts_take_an_hour_at_most():
    assert sum(part.gpu_s for part in PARTS) <= 3600


def test_every_parts_check_is_there_and_a_card_has_a_files_name():
    for part in PARTS:
        module, _, name = part.check.partition(":")
        assert callable(getattr(importlib.import_module(f"fastrot.selfcheck.{module}"), name))
    assert report.name_of(["NVIDIA H100 80GB HBM3"]) == "nvidia-h100-80gb-hbm3"


class Told(Place):
    """A GPU's place whose trainings only read their words; the run `odd` writes other weights and losses."""

    odd = None

    def train(self, name, *words, hide_gpu=False, ranks=1, most=1.0):
        config, _ = configs.load(None, [*map(str, words), f"run.out={self.work / name}"], "train")
        steps, other = config.run.max_steps, name == self.odd
        folder = self.work / name / "checkpoints" / f"step-{steps:08d}"
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "optimizer.safetensors"):
            (folder / file).write_text(str(other))
        line = {"loss": 1.0 + other, "grad_norm": 2.0, "wait_share": 0.02 if other else 0.001, "views_per_s": 900.0}
        return [line] * steps, None


@pytest.mark.parametrize(
    "check, odd, says",
    [
        (correctness.losses, "losses-1", "bf16: the mean loss 100.00% from the CPU's"),
        (correctness.resume, "resume-0-again", "bf16, deepspeed: model.safetensors of the resumed run differ"),
        (
            partial(speed._as_without, world=2),
            "2-ranks-2",
            "2 ranks, engine.symmetric_memory=true: losses 100.00% from those without, more than 0.5%",
        ),
        (speed.end_to_end, "end-to-end", "waits for data 2.00% of its time, more than 1%"),
    ],
)
def test_a_gpus_trainings_are_given_words_that_training_reads_and_are_judged(tmp_path, monkeypatch, check, odd, says):
    for module in (correctness, speed):
        monkeypatch.setattr(module, "drawn", lambda work, count: work)
    monkeypatch.setattr(speed, "at_once", lambda place: 128)
    for name in (None, odd):
        found, place = Found(), Told(True, tmp_path, tmp_path / str(name), 0.0)
        monkeypatch.setattr(Told, "odd", name)
        check(place, found)
        assert found.figures
        assert (found.failures == []) if name is None else says in found.failures[0]


def test_eight_gpus_are_asked_at_both_sizes_and_two_beside_them(tmp_path, monkeypatch):
    class Eight(Told):
        def bench(self, found, script, *words, before=()):
            world = int(before[-1].partition("=")[2])
            images, arms = words[words.index("--images") + 1], words[words.index("--only") + 1 :]
            asked.append((world, images))
            assert all(step.able(step.BASE | step.SWITCHES[arm], world, cuda=True) for arm in arms)
            talk = {"messages": 107, "seconds": 0.002}
            line = {"views_per_s": 700.0 * world, "communicate": SPREAD, "collectives": talk}
            return {"switches": dict.fromkeys(arms, line), "missing": {}}

    monkeypatch.syspath_prepend(ROOT / "bench")
    step, asked, found = importlib.import_module("step"), [], Found()
    monkeypatch.setattr(speed, "at_once", lambda place: 128)
    monkeypatch.setattr(correctness, "drawn", lambda work, count: work)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    (tmp_path / "step.json").write_text(json.dumps({"raw": STEP | {"images": 128}}))
    speed.ranks(Eight(True, tmp_path, tmp_path / "work", 0.0), found)
    assert asked == [(8, 16), (8, 128), (2, 64), (2, 128)]
    figures = dict(found.figures)
    assert figures["8 ranks of 128 images, of 8 times one's speed"] == "700%" and not found.failures
    assert figures["8 ranks of 16 images, norm_ranks=2"] == "5,600 views/s, 107 messages a step, 2.00 ms in them"
    for way in ("engine.cuda_graphs=collectives", "engine.symmetric_memory=true", "both"):
        assert figures[f"8 ranks, {way}"] == "losses 0.00% from those without"


def test_a_decoder_that_writes_into_other_tensors_or_its_own_given_ones_is_seen():
    device = torch.device("cpu")
    canaries = correctness.Canaries(device, 3, 1000)
    canaries.add()
    assert canaries.overwritten() == 0
    canaries._held[3][17] += 1
    assert canaries.overwritten() == 1

    class Decoder:
        """Gives a batch's bytes as pixels; `reuses` its memory."""

        def __init__(self, reuses):
            self.memory, self.reuses, self.flying = torch.zeros(64, 1, 1, 3), reuses, []

        def submit(self, batch):
            self.flying.append(torch.from_numpy(np.stack(batch.buffers)).float()[:, None, None, :])

        def result(self):
            pixels = self.flying.pop(0)
            return (self.memory[: len(pixels)].copy_(pixels) if self.reuses else pixels), {}

        def close(self):
            pass

    buffers = list(np.arange(300, dtype=np.uint8).reshape(100, 3))
    windows = np.zeros((100, 4), np.int32)
    pixels = correctness._decode(Decoder(False), buffers, windows, canaries)
    assert np.array_equal(pixels[:, 0, 0], np.stack(buffers))
    with pytest.raises(AssertionError, match="3 batches changed after they were given"):
        correctness._decode(Decoder(True), buffers, windows, canaries)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--gpu"], "--gpu: torch finds no CUDA device"),
        (["--only", "rotatoin"], "--only rotatoin: no such part; did you mean rotation?"),
        (["--only", "x"], "--only x: no such part; parts: tests, decoders"),
        (["--budget", "0"], "--budget 0: seconds, above 0"),
        (["--only", "tests", "--out", "FILE/bundle"], "cannot be written (Not a directory); name another folder"),
    ],
)
def test_the_users_errors_are_a_line_each(fastrot, monkeypatch, tmp_path, words, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    done = fastrot("selfcheck", *(word.replace("FILE", str(tmp_path / "file")) for word in words))
    assert done.code == 2 and len(done.errors) == 1 and says in done.errors[0]


def test_a_package_without_its_checkout_says_so(fastrot, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "CHECKOUT", tmp_path)
    done = fastrot("selfcheck", "--out", tmp_path / "bundle")
    assert done.code == 2 and len(done.errors) == 1
    assert "holds no bench, tests, configs; run it in a clone of the repository" in done.errors[0]


@pytest.mark.parametrize("body, code", [("good", 0), ("wrong", 3)])
def test_the_command_says_where_the_page_lies_and_what_to_open(fastrot, monkeypatch, tmp_path, body, code):
    monkeypatch.setattr("fastrot.selfcheck.parts.PARTS", (Part(body, "is it so?", 9, 9, ""),))
    plain = run.run
    monkeypatch.setattr(run, "run", lambda *words: plain(*words, start=tiny))
    done = fastrot("selfcheck", "--out", tmp_path, "--json")
    assert done.code == code and json.loads(done.out)["parts"] == {body: "failed" if code else "passed"}
    assert done.errors == ([f"fastrot: wrong: 2 < 3; open {tmp_path}/wrong.txt"] if code else [])
