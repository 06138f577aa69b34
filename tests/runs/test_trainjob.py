"""A run's progress for Kubeflow Trainer: what its server gets, and what happens where it does not answer."""

import json
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from conftest import metrics
from fastrot.runs import trainjob

pytestmark = pytest.mark.usefixtures("narrow")
WORDS = [
    "train", "model.arch=resnet18", "data.crop=16", "optim.images_per_step=6", "optim.epochs=2", "optim.warmup_epochs=0",
    "run.log_every=1", "run.loggers=[]", "engine.kind=plain",
]  # fmt: skip


class Metric(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: StrictStr
    value: StrictStr


class Status(BaseModel):
    """TrainerV1alpha1TrainerStatus of kubeflow_trainer_api 2.3.0."""

    model_config = ConfigDict(extra="forbid")
    progressPercentage: Annotated[StrictInt, Field(ge=0, le=100)] | None = None
    estimatedRemainingSeconds: Annotated[StrictInt, Field(ge=0)] | None = None
    lastUpdatedTime: datetime
    metrics: Annotated[list[Metric], Field(max_length=256)] = []


@pytest.fixture
def server(monkeypatch, tmp_path):
    """(what was posted, [code to answer])."""
    got, code = [], [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.headers["Authorization"], body))
            self.send_response(code[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    here = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=here.serve_forever)
    thread.start()
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"http://127.0.0.1:{here.server_port}/status")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield got, code
    here.shutdown()
    thread.join()
    here.server_close()


def test_the_cluster_gets_progress_and_metrics_in_its_own_form(images, tmp_path, fastrot, server, monkeypatch):
    monkeypatch.setattr(trainjob, "_APART_S", 0)
    assert fastrot(*WORDS, f"data.train={images}", f"data.val={images}", f"run.out={tmp_path / 'r'}").code == 0
    got, _ = server
    assert {token for token, _ in got} == {"Bearer secret"} and all(body.keys() == {"trainerStatus"} for _, body in got)
    last = [Status(**body["trainerStatus"]) for _, body in got][-1]
    assert last.progressPercentage == 100 and last.estimatedRemainingSeconds == 0
    line = metrics(tmp_path / "r")[-1]
    assert {m.name: float(m.value) for m in last.metrics}["held_out_loss"] == line["held_out_loss"]


def test_a_cluster_that_refuses_ends_no_training_and_is_said_once(images, tmp_path, fastrot, server, monkeypatch):
    monkeypatch.setattr(trainjob, "_APART_S", 0)
    got, code = server
    code[0] = 403
    done = fastrot(*WORDS, f"data.train={images}", f"run.out={tmp_path / 'r'}")
    assert done.code == 0 and len(got) > 1
    assert done.err.count("TrainJob: cannot be written (HTTP Error 403: Forbidden); training goes on") == 1
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_TOKEN")
    again = fastrot(*WORDS, f"data.train={images}", f"run.out={tmp_path / 's'}")
    assert again.code == 0 and again.err.count("TrainJob: cannot be written (No such file or directory)") == 1


def test_steps_that_come_fast_are_told_of_once_in_a_while(server):
    (logger,) = trainjob.opened(100)
    for step in range(50):
        logger.write({"step": step, "epoch": 0.1, "loss": 1.0, "eta_s": 3.7})
    logger.close("stopped")
    got, _ = server
    assert [body["trainerStatus"]["progressPercentage"] for _, body in got] == [1, 50]
    assert got[0][1]["trainerStatus"]["estimatedRemainingSeconds"] == 3


def test_elsewhere_nobody_is_told(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    assert trainjob.opened(100) == []
