"""What may go wrong, and the exit code that tells it.

Unsound     1   a check was made, and found damage
UserError   2   the user's to mend: one line, no traceback
Fault       3   the machine or the data failed while running
Stopped     75  asked to stop, and did, with a checkpoint: the same command goes on
"""

from typing import Any


class UserError(Exception):
    """One line a person can act on: what is wrong, where, and what to do."""

    exit_code = 2


class Unsound(Exception):
    """A check has said all that it found, and not all of it is sound. result: what --json prints all the same."""

    exit_code = 1

    def __init__(self, line: str, result: dict[str, Any]):
        super().__init__(line)
        self.result = result


class Fault(Exception):
    """The run cannot go on: a time-out, a full disk, too many bad images, a non-finite loss."""

    exit_code = 3


class Diverged(Fault):
    """The loss, the weights or their momentum are not finite any more."""


class Stopped(Exception):
    """A signal or `run.max_hours` ended a run early; a checkpoint of that step stands."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class LostPeer(Fault):
    """Another rank is gone or does not answer; where it failed by itself it knows why better than we."""


class BadImage(Exception):
    """One image could not be read or decoded; the loader replaces it by rule."""


class Unreadable(BadImage):
    """The system could not read it, or it is not the file that was indexed: this may pass, its bytes said nothing."""


# of the core, but for `fastrot orient` with an ONNX file: docs/upright.md installs the few that it needs
_LARGE = ("torch", "torchvision")
# a package that is not of the core -> its name, and the extra that brings it
EXTRAS = {
    "cv2": ("OpenCV", "detect"),
    "deepspeed": ("DeepSpeed", "deepspeed"),
    "ffcv": ("FFCV", "ffcv"),
    "jinja2": ("Jinja2", "report"),
    "markupsafe": ("MarkupSafe", "report"),
    "mlflow": ("MLflow", "mlflow"),
    "nvidia": ("DALI", "dali"),
    "onnx": ("ONNX", "onnx"),
    "onnxscript": ("ONNX Script", "onnx"),
    "onnxruntime": ("ONNX Runtime", "orient"),
    "pycocotools": ("pycocotools", "detect"),
    "scipy": ("SciPy", "report"),
    "tensorboard": ("TensorBoard", "report"),
    "wandb": ("Weights & Biases", "wandb"),
}


def is_known(error: ModuleNotFoundError) -> bool:
    """Whether an installation may well lack that package."""
    return _package(error) in (*EXTRAS, *_LARGE)


def why_not_there(error: ImportError) -> str:
    """Why a package cannot be imported, and what to install where that is known."""
    if isinstance(error, ModuleNotFoundError):
        if found := EXTRAS.get(_package(error)):
            return f"{found[0]} is not installed; pip install 'fastrot[{found[1]}]'"
        if _package(error) in _LARGE:
            return "torch is not installed; pip install fastrot brings it (fastrot orient runs an .onnx file without)"
    return f"cannot be imported ({error})"


def _package(error: ImportError) -> str:
    return (error.name or "").partition(".")[0]
