"""run.loggers: each gets the numbers of metrics.jsonl by its own library, goes on after a resume, and ends no training."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, after, metrics
from fastrot import config as configs
from fastrot.errors import Fault, UserError
from fastrot.runs import loggers

pytestmark = pytest.mark.usefixtures("narrow")
WORDS = [
    "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.epochs=2", "engine.kind=plain", "data.decode=torch",
    "optim.warmup_epochs=0", "run.log_every=1", "run.checkpoint_every=2",
]  # fmt: skip
BOTH = "run.loggers=[wandb,mlflow]"


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """A function: what the stand-ins of W&B and MLflow were asked since it was last called, [what, words, named] each."""
    for name in [one for one in sys.modules if one.partition(".")[0] in ("wandb", "mlflow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(ROOT / "tests" / "workers" / "loggers")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("WANDB_CACHE_DIR", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_TRACKING_URI", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def since():
        path = tmp_path / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return found

    yield since
    for name in [one for one in sys.modules if one.partition(".")[0] in ("wandb", "mlflow")]:
        del sys.modules[name]


def named(calls, what):
    return [(words, named) for name, words, named in calls if name == what]


def numbers(lines):
    return [
        {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "epoch")} for line in lines
    ]


def test_both_get_the_log_and_go_on_in_their_runs_after_a_resume(calls, images, tmp_path, fastrot):
    out = tmp_path / "run"
    words = ["train", *WORDS, f"data.train={images}", f"data.val={images}", f"run.out={out}", BOTH]
    assert fastrot(*words, "run.max_steps=2").code == 0
    first = calls()
    ((_, init),) = named(first, "wandb.init")
    assert (
        init["dir"] == str(out) and init["resume"] == "allow" and init["project"] == "fastrot" and init["name"] == "run"
    )
    assert init["config"]["optim.epochs"] == 2 and init["settings"] == {"console": "off", "silent": True}
    assert named(first, "wandb.Run.define_metric") == [(["*"], {"step_metric": "step"})]
    logged = [words[0] for words, _ in named(first, "wandb.Run.log")]
    assert [(one["step"], one["epoch"]) for one in logged] == [(line["step"], line["epoch"]) for line in metrics(out)]
    assert numbers(logged) == numbers(metrics(out))
    assert named(first, "wandb.Run.finish") == [([], {"exit_code": 0})]
    assert named(first, "mlflow.MlflowClient") == [([], {"tracking_uri": f"sqlite:///{out}/mlflow.db"})]
    params, *lines = named(first, "mlflow.MlflowClient.log_batch")
    assert {one["key"]: one["value"] for one in params[1]["params"]}["optim.epochs"] == "2.0"
    assert [{m["key"]: m["value"] for m in line["metrics"]} for _, line in lines] == numbers(metrics(out))
    assert all(line["synchronous"] is False for _, line in lines), "no step waits for a server"
    assert [line["metrics"][0]["step"] for _, line in lines] == [line["step"] for line in metrics(out)]
    assert [name for name, *_ in first[-2:]] == ["wait", "mlflow.MlflowClient.set_terminated"]
    assert first[-1][1] == ["its-id", "FINISHED"]
    ids = json.loads((out / "loggers.json").read_text())
    assert ids == {"wandb": init["id"], "mlflow": "its-id"}

    assert fastrot(*words).code == 0
    again = calls()
    assert named(again, "wandb.init")[0][1]["id"] == init["id"]
    assert named(again, "mlflow.MlflowClient.create_run") == []
    assert named(again, "mlflow.MlflowClient.update_run") == [(["its-id", "RUNNING"], {})]
    steps = [line["metrics"][0]["step"] for _, line in named(again, "mlflow.MlflowClient.log_batch")]
    assert steps == [2, 3, 3] and [words[0]["step"] for words, _ in named(again, "wandb.Run.log")] == steps
    assert not (out / "tensorboard").exists()


def test_places_of_their_own_are_the_users_by_their_variables(calls, images, tmp_path, fastrot, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/x.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    words = [*WORDS, f"data.train={images}", f"run.out={tmp_path / 'run'}", BOTH, "run.max_steps=1"]
    assert fastrot("train", *words).code == 0
    found = calls()
    assert named(found, "mlflow.MlflowClient")[0][1] == {"tracking_uri": "sqlite:////elsewhere/x.db"}
    assert named(found, "mlflow.MlflowClient.create_experiment")[0][0] == ["mine"]
    assert named(found, "wandb.init")[0][1]["project"] == "ours"


@pytest.mark.parametrize("what, who", [("wandb.Run.log", "wandb"), ("wait", "mlflow"), ("wandb.Run.finish", "wandb")])
def test_a_server_that_is_away_is_said_once_and_ends_no_training(
    calls, images, tmp_path, fastrot, monkeypatch, what, who
):
    monkeypatch.setenv("REFUSE", what)
    done = fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / 'run'}", BOTH)
    assert done.code == 0 and len(metrics(tmp_path / "run")) == 4
    assert done.err.count("was refused") == 1
    assert f"{who}: cannot be written ({what} was refused); training goes on" in done.err


def fail():
    raise Fault("the disk")


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("happens, code, ends", [(fail, 3, ("FAILED", 1)), (stop, 75, ("KILLED", 0))])
def test_how_a_start_ended_is_told(calls, images, tmp_path, fastrot, monkeypatch, happens, code, ends):
    after(monkeypatch, 1, happens)
    assert fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / 'run'}", BOTH).code == code
    found = calls()
    assert named(found, "mlflow.MlflowClient.set_terminated") == [(["its-id", ends[0]], {})]
    assert named(found, "wandb.Run.finish") == [([], {"exit_code": ends[1]})]


@pytest.mark.parametrize("what", ["wandb.init", "mlflow.MlflowClient.create_run"])
def test_one_that_cannot_begin_is_one_line(calls, images, tmp_path, fastrot, monkeypatch, what):
    monkeypatch.setenv("REFUSE", what)
    done = fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / 'run'}", BOTH)
    name = what.partition(".")[0]
    said = f"fastrot: run.loggers {name}: {what} was refused; mend it, or leave {name} out of run.loggers"
    assert done.code == 2 and done.errors == [said]


@pytest.mark.parametrize("name, says", [("wandb", "Weights & Biases"), ("mlflow", "MLflow")])
def test_a_library_that_is_missing_is_one_line_before_anything_is_made(
    images, tmp_path, fastrot, monkeypatch, name, says
):
    """Also where W&B's folder of another run lies in the working folder: Python takes that for a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / name).mkdir()
    done = fastrot("train", *WORDS, f"data.train={images}", "run.out=run", f"run.loggers=[{name}]")
    hint = f"pip install 'fastrot[{name}]', or leave it out of run.loggers"
    assert done.code == 2 and done.errors == [f"fastrot: run.loggers {name}: {says} is not installed; {hint}"]
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_none_is_one_line(images, tmp_path, fastrot):
    done = fastrot("train", *WORDS, f"data.train={images}", f"run.out={tmp_path / 'run'}", "run.loggers=[wandbb]")
    assert done.code == 2 and len(done.errors) == 1
    assert "run.loggers" in done.errors[0] and "'tensorboard', 'wandb' or 'mlflow'" in done.errors[0]


def test_ids_that_cannot_be_read_are_one_line(calls, images, tmp_path):
    (tmp_path / "loggers.json").write_text("{")
    with pytest.raises(UserError, match="loggers.json: cannot be read .*remove it"):
        loggers.opened(("wandb",), tmp_path, 0, configs.Config(), print)


def test_the_key_of_earlier_versions_is_read(tmp_path):
    """Run folders and scripts hold it."""
    (tmp_path / "config.yaml").write_text("run: {tensorboard: false}")
    assert configs.load(str(tmp_path / "config.yaml"), [])[0].run.loggers == ()
    on, sources = configs.load(str(tmp_path / "config.yaml"), ["run.tensorboard=true"])
    assert on.run.loggers == ("tensorboard",) and sources["run.loggers"] == "command line"
    assert configs.from_values(None, {"run.tensorboard": False}).run.loggers == ()
    with pytest.raises(UserError, match="unknown key run.tensorboard"):
        configs.load(None, ["run.tensorboard=maybe"])


@pytest.mark.slow
def test_the_libraries_themselves_offline(calls, images, tmp_path, fastrot):
    """The stand-ins' calls fit the real functions; and a real run, stopped and resumed, lies whole in its folder."""
    words = ["train", *WORDS, f"data.train={images}", f"data.val={images}"]
    assert fastrot(*words, f"run.out={tmp_path / 'stand-in'}", BOTH).code == 0
    asked = calls()
    path = os.pathsep.join(one for one in sys.path if "workers" not in one)
    script = tmp_path / "real.py"
    script.write_text(REAL)
    environment = os.environ | {"PYTHONPATH": path, "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    for name in ("wandb", "mlflow"):
        if subprocess.run([sys.executable, "-c", f"import {name}"], env=environment, capture_output=True).returncode:
            pytest.skip(f"{name} is not installed")
    given = json.dumps([asked, [*map(str, words), f"run.out={tmp_path / 'run'}", BOTH]])
    done = subprocess.run(
        [sys.executable, script, ROOT], input=given, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["status"] == "FINISHED" and said["runs"] == 1
    assert said["loss"] == [[line["step"], line["loss"]] for line in metrics(tmp_path / "run") if "loss" in line]
    ids = json.loads((tmp_path / "run" / "loggers.json").read_text())
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{ids['wandb']}/*.wandb"))) == 2
    made = {path.name for path in tmp_path.iterdir()} - {"home", "calls"}
    assert made == {"stand-in", "run", "real.py"}
    left = [path for path in (tmp_path / "home").rglob("*") if re.search("wandb|mlflow", str(path))]
    assert left == [], "nothing outside the run's folder"


REAL = """
import inspect, json, operator, sys
asked, words = json.load(sys.stdin)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/kernels", sys.argv[1] + "/tests"]
import torchvision
from workers.narrow import NarrowResNet
torchvision.models.resnet18 = NarrowResNet
from fastrot.cli import main
assert main([*words, "run.max_steps=2"]) == 0 and main(words) == 0
import mlflow, wandb
places = {"wandb": wandb, "mlflow": mlflow, "wandb.Run": wandb.sdk.wandb_run.Run}
for what, given, named in asked:
    if what != "wait":
        place, _, name = what.rpartition(".")
        function = getattr(places.get(place) or operator.attrgetter(place.partition(".")[2])(mlflow), name)
        inspect.signature(function).bind(*([None] if place.count(".") else []), *given, **named)
client = mlflow.MlflowClient(f"sqlite:///{words[-2].partition('=')[2]}/mlflow.db")
(experiment,) = [one for one in client.search_experiments() if one.name == "fastrot"]
runs = client.search_runs([experiment.experiment_id])
loss = [[one.step, one.value] for one in client.get_metric_history(runs[0].info.run_id, "loss")]
print(json.dumps({"runs": len(runs), "status": runs[0].info.status, "loss": sorted(loss)}))
"""
