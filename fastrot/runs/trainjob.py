"""A run's progress in the status of the TrainJob that it is.

Kubeflow Trainer v2's contract, as `update_trainjob_status` of the package kubeflow 0.5.0 keeps it: a POST of
{"trainerStatus": ...} to the address in the pod's environment, with the pod's token, at most one in five seconds.
"""

import json
import os
import ssl
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastrot.runs.loggers import Logger, numbers_in

_APART_S = 5.0
_TIME_OUT_S = 5.0


def opened(total: int) -> list[Logger]:
    """One where this process is a TrainJob's whose cluster asks for its status. total: steps of the run."""
    url = os.environ.get("KUBEFLOW_TRAINER_SERVER_URL")
    return [_TrainJob(url, total)] if url else []


class _TrainJob:
    """Posts in a thread: no step waits for the cluster."""

    name = "TrainJob"

    def __init__(self, url: str, total: int):
        self._url, self._total, self._next = url, total, 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trainjob")
        self._posting: Future[None] | None = None
        self._status: dict[str, Any] = {}

    def write(self, values: dict[str, Any]) -> None:
        self._status |= _status(values, self._total)
        if self._posting and self._posting.done():
            self._posting.result()
        if time.monotonic() >= self._next and not (self._posting and self._posting.running()):
            self._next = time.monotonic() + _APART_S
            self._posting = self._pool.submit(_post, self._url, dict(self._status))

    def close(self, state: str) -> None:
        """The last line's, whenever the one before was sent."""
        last = self._pool.submit(_post, self._url, self._status)
        self._pool.shutdown()
        last.result()


def _status(values: dict[str, Any], total: int) -> dict[str, Any]:
    """Of a line of metrics.jsonl, in the contract's words."""
    metrics = [{"name": name, "value": str(value)} for name, value in numbers_in(values).items()]
    found = {"progressPercentage": 100 * (values["step"] + 1) // total, "metrics": metrics}
    if "eta_s" in values:
        found["estimatedRemainingSeconds"] = int(values["eta_s"])
    return found | {"lastUpdatedTime": datetime.now(UTC).isoformat()}


def _post(url: str, status: dict[str, Any]) -> None:
    """Raises OSError."""
    token = Path(os.environ.get("KUBEFLOW_TRAINER_SERVER_TOKEN", "KUBEFLOW_TRAINER_SERVER_TOKEN")).read_text().strip()
    context = ssl.create_default_context(cafile=os.environ.get("KUBEFLOW_TRAINER_SERVER_CA_CERT"))
    request = urllib.request.Request(
        url,
        json.dumps({"trainerStatus": status}).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_TIME_OUT_S, context=context):
        pass
