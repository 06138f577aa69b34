"""What a page is to run, read from YAML: probes on stored features, and trainings on the images."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError

from fastrot.config import Section, Tap
from fastrot.errors import UserError


class Set(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Names the folders of its features and results."""
    title: str
    """For a person."""
    train: str
    """Images to fit, any source of fastrot index."""
    test: str
    """Images to judge by."""
    transform: Literal["test", "svm"] = "test"
    """As in fastrot features."""
    pool: Literal["specified", "gap", "adaptive"] = "specified"
    """As in fastrot features."""
    taps: tuple[Tap, ...] = ("feature1", "feature2", "feature3", "feature4", "feature5")
    """Layers to read."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the stored features."""
    overrides: tuple[str, ...] = ()
    """Config keys for its features, as in data.crop=128."""
    probes: tuple[Literal["svm", "lowshot", "knn", "linear"], ...]
    """What to fit on the features."""
    published: Literal["voc07", "imagenet", "places205"] | None = None
    """Whose published figures stand beside ours."""
    note: str = ""
    """What a reader of its tables must know."""


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Names its folder and results."""
    title: str
    """For a person."""
    task: Literal["linear", "finetune"]
    """The command that trains: heads on a frozen backbone, or the whole network."""
    config: str
    """Its config file."""
    train: str
    """Images to learn from, any source of fastrot index."""
    test: str
    """Images to judge by."""
    overrides: tuple[str, ...] = ()
    """Config keys, as in data.crop=128."""
    grid: dict[str, Annotated[tuple[float, ...], Field(min_length=1)]] = Field({})
    """Config keys with several values: every combination is run, the best on the images to judge by is shown."""
    published: Literal["imagenet", "places205", "semi_1", "semi_10"] | None = None
    """Whose published figures stand beside ours."""
    note: str = ""
    """What a reader of its table must know."""


class Suite(Section):
    sets: tuple[Set, ...] = ()
    """Probed on stored features."""
    runs: tuple[Run, ...] = ()
    """Trained on the images, in run folders."""


def load(path: str) -> Suite:
    """Raises UserError with a line for each thing that is wrong."""
    try:
        return Suite.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise UserError(f"--suite {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--suite {path}: not YAML ({str(error).splitlines()[0]})") from None
    except ValidationError as errors:
        lines = (f"--suite {path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors.errors())
        raise UserError("\n".join(lines)) from None
