"""Of MLflow's module what a run calls, with its parameters: each call is a line of $CALLS."""

import json
import os
from types import SimpleNamespace

from mlflow import entities as entities


class MlflowException(Exception):
    pass


def note(what, *words, **named):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([what, words, named], default=vars) + "\n")
    if os.environ.get("REFUSE") == what:
        raise MlflowException(f"{what} was refused")


class MlflowClient:
    def __init__(self, tracking_uri=None):
        note("mlflow.MlflowClient", tracking_uri=tracking_uri)

    def get_experiment_by_name(self, name):
        note("mlflow.MlflowClient.get_experiment_by_name", name)

    def create_experiment(self, name, artifact_location=None, tags=None):
        note("mlflow.MlflowClient.create_experiment", name)
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        note("mlflow.MlflowClient.create_run", experiment_id, run_name=run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="its-id"))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        note("mlflow.MlflowClient.log_batch", run_id, metrics=metrics, params=params, synchronous=synchronous)
        return SimpleNamespace(wait=lambda: note("wait"))

    def update_run(self, run_id, status=None, name=None):
        note("mlflow.MlflowClient.update_run", run_id, status)

    def set_terminated(self, run_id, status=None, end_time=None):
        note("mlflow.MlflowClient.set_terminated", run_id, status)
