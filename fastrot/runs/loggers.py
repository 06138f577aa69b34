"""Who gets a run's numbers besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, each by its own library.

A library that is named is imported, no other. All lies in the run's folder unless the library's own variables name another
place; the ids in loggers.json let a resume go on in the same run of theirs.
"""

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fastrot.config import Config, flat
from fastrot.errors import UserError, why_not_there
from fastrot.files import read_json, write_text

PROJECT = "fastrot"  # at W&B; MLflow's experiment
_ENDS = {"done": "FINISHED", "stopped": "KILLED"}  # in MLflow's words


class Trouble(Exception):
    """A logger did not take what it was given."""


class Logger(Protocol):
    name: str

    def write(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl. Raises OSError, Trouble."""

    def close(self, state: str) -> None:
        """The end of this start; state: STATUS.json's. Raises OSError, Trouble."""


def numbers_in(values: dict[str, Any]) -> dict[str, float]:
    """What a curve can be drawn of."""
    return {
        name: value
        for name, value in values.items()
        if name not in ("step", "epoch") and isinstance(value, int | float)
    }


def refuse_missing(names: Sequence[str]) -> None:
    """Raise UserError where a library that is named is not there; TensorBoard, the default, may lack."""
    for name in names:
        spec = importlib.util.find_spec(name) if name != "tensorboard" else None
        if name != "tensorboard" and (spec is None or spec.origin is None):  # W&B's own folder makes an empty package
            raise UserError(
                f"run.loggers {name}: {why_not_there(ModuleNotFoundError(name=name))}, or leave it out of run.loggers"
            )


def opened(
    names: Sequence[str], folder: Path, first_step: int, config: Config, say: Callable[[str], None]
) -> list[Logger]:
    """The loggers of a start that begins at `first_step`. Raises UserError where one cannot begin."""
    loggers: list[Logger] = []
    ids = _kept(folder)
    if "tensorboard" in names and (board := _board(folder, first_step, say)):
        loggers.append(board)
    for name, made in (("wandb", _Wandb), ("mlflow", _MLflow)):
        if name in names:
            try:
                logger = made(folder, config, ids.get(name))
            except Trouble as error:
                raise UserError(f"run.loggers {name}: {error}; mend it, or leave {name} out of run.loggers") from None
            say(f"{name}: {logger.where}")
            loggers.append(logger)
            ids[name] = logger.id
            write_text(folder / "loggers.json", json.dumps(ids) + "\n")
    return loggers


def _kept(folder: Path) -> dict[str, str]:
    path = folder / "loggers.json"
    try:
        return read_json(path, dict[str, str]) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, and the loggers begin new runs") from None


@contextmanager
def _troubles(*kinds: type[Exception]) -> Iterator[None]:
    """What a library raises becomes a Trouble of one line."""
    try:
        yield
    except kinds as error:
        raise Trouble((str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")) from error


def _board(folder: Path, first_step: int, say: Callable[[str], None]) -> "_Board | None":
    try:
        return _Board(folder, first_step)
    except ModuleNotFoundError as error:
        say(f"no TensorBoard events: {why_not_there(error)}, or set run.loggers=[]")
        return None


class _Board:
    name = "tensorboard"

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter  # a second, which runs without it need not pay

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, values: dict[str, Any]) -> None:
        for name, value in numbers_in(values).items():
            self._writer.add_scalar(name, value, values["step"])
        if "bound" in values:
            self._writer.add_text("bound", values["bound"], values["step"])

    def close(self, state: str) -> None:
        self._writer.close()


class _Wandb:
    """Numbers over an axis of their own, `step`: W&B's counter never goes back, as a resume does."""

    name = "wandb"

    def __init__(self, folder: Path, config: Config, known: str | None):
        import wandb  # type: ignore[import-not-found, unused-ignore]  # nobody's but who names it

        os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))
        self._error, self.id = wandb.Error, known or secrets.token_hex(4)
        with _troubles(self._error):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=self.id,
                resume="allow",
                dir=str(folder),
                config=flat(config),
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("*", step_metric="step")
        offline = f"run {self.id}, offline in {folder}/wandb: wandb sync sends it"
        self.where = offline if self._run.offline else str(self._run.url)

    def write(self, values: dict[str, Any]) -> None:
        with _troubles(self._error):
            self._run.log({"step": values["step"], "epoch": values["epoch"], **numbers_in(values)})

    def close(self, state: str) -> None:
        with _troubles(self._error):
            self._run.finish(exit_code=int(state not in _ENDS))


class _MLflow:
    """Numbers go to the store in a thread of MLflow's: a server far away holds up no step."""

    name = "mlflow"

    def __init__(self, folder: Path, config: Config, known: str | None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        import mlflow  # type: ignore[import-not-found, unused-ignore]  # nobody's but who names it

        self._error, self._metric = mlflow.MlflowException, mlflow.entities.Metric
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db"
        params = [mlflow.entities.Param(key, str(value)) for key, value in flat(config).items()]
        with _troubles(self._error):
            self._client = mlflow.MlflowClient(tracking_uri=place)
            self.id = known or self._begun(folder)
            if known:
                self._client.update_run(known, "RUNNING")
            else:
                self._client.log_batch(self.id, params=params)
        self.where = f"run {self.id} at {place}"
        self._last: Any = None

    def _begun(self, folder: Path) -> str:
        """A new run's id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        return str(self._client.create_run(experiment, run_name=folder.resolve().name).info.run_id)

    def write(self, values: dict[str, Any]) -> None:
        now, step = int(1000 * time.time()), values["step"]
        metrics = [self._metric(name, value, now, step) for name, value in numbers_in(values).items()]
        self._last = self._client.log_batch(self.id, metrics=metrics, synchronous=False)

    def close(self, state: str) -> None:
        with _troubles(self._error):
            if self._last is not None:
                self._last.wait()
            self._client.set_terminated(self.id, _ENDS.get(state, "FAILED"))
