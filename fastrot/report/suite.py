"""What a page is to run, read from YAML: probes on stored features, and trainings on the images."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from fastrot import config
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
    """Whose published figures stand beside ours, where the data are theirs too."""
    draws: str | None = None
    """A folder of published low-shot draws, train_targets_sample1_k1.npy and so on; default: drawn by seed 0."""
    note: str = ""
    """What a reader of its tables must know."""


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Names its folder and results."""
    title: str
    """For a person."""
    task: Literal["linear", "finetune", "detect", "segment"]
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
    published: (
        Literal["imagenet", "places205", "semi_1", "semi_10", "detect_voc0712", "detect_coco", "segment_voc12aug"]
        | None
    ) = None
    """Whose published figures stand beside ours, where the data are theirs too."""
    note: str = ""
    """What a reader of its table must know."""


class Suite(Section):
    sets: tuple[Set, ...] = ()
    """Probed on stored features."""
    runs: tuple[Run, ...] = ()
    """Trained on the images, in run folders."""


def load(path: str) -> Suite:
    """Read a suite and look that what it names can be run. Raises UserError: a line for each thing that is wrong."""
    tree = config.read_yaml(path, f"--suite {path}")
    if not isinstance(tree, dict) or not tree.keys() & Suite.model_fields:
        keys = ", ".join(map(str, tree)) if isinstance(tree, dict) else "neither"
        raise UserError(
            f"--suite {path}: is no suite: expected `sets:` or `runs:` as in configs/page.yaml, found {keys}"
        )
    try:
        suite = Suite.model_validate(tree)
    except ValidationError as invalid:
        missing: dict[str, list[str]] = {}
        for one in invalid.errors():
            if one["type"] == "missing":
                missing.setdefault(_where(tree, one["loc"][:-1]), []).append(str(one["loc"][-1]))
        wrong = [f"{where}: lacks {', '.join(keys)}; add them" for where, keys in missing.items()]
        wrong += [f"{_where(tree, e['loc'])}: {_says(e)}" for e in invalid.errors() if e["type"] != "missing"]
    else:
        wrong = _wrong_together(suite)
    if wrong:
        raise UserError("\n".join(f"--suite {path}: {line}" for line in wrong))
    return suite


_KINDS = {
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "float_parsing": "a number",
    "float_type": "a number",
}


def _where(tree: dict[str, Any], loc: tuple[int | str, ...]) -> str:
    """("sets", 0, "probes", 1) -> "set voc07, probes 2": the parts of a suite by name, the others counted from 1."""
    words: list[str] = []
    value: Any = tree
    for part in loc:
        listed = isinstance(value, list)
        value = _keys(value).get(part)
        if listed:
            name = value.get("name") if isinstance(value, dict) else None
            words[-1] = f"{words[-1].removesuffix('s') if len(words) == 1 else words[-1]} {name or int(part) + 1}"
        else:
            words.append(str(part))  # a key of YAML's may be a number
    return ", ".join(words)


def _keys(value: Any) -> dict[Any, Any]:
    """A list's or a mapping's parts; of anything else none."""
    return dict(enumerate(value)) if isinstance(value, list) else value if isinstance(value, dict) else {}


def _says(error: ErrorDetails) -> str:
    """What is wrong with one value, and what to write instead."""
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"no such key; the keys are {', '.join(_model_of(error['loc']).model_fields)}"
        case "literal_error":
            return f"{given!r} is unknown; write {context['expected']}"
        case "string_pattern_mismatch":
            return f"{given!r} names a folder; write small letters, digits and _ alone"
        case "too_short":
            return "has no value; write at least one"
    kind = _KINDS.get(error["type"], "another value, as in configs/page.yaml")
    return f"{given!r} does not fit; write {kind}"


def _model_of(loc: tuple[int | str, ...]) -> type[Section]:
    if len(loc) == 1:
        return Suite
    return Set if loc[0] == "sets" else Run


def _wrong_together(suite: Suite) -> list[str]:
    """What no single value shows: nothing to run, a name used twice, configs and overrides that cannot be read."""
    wrong = []
    if not suite.sets and not suite.runs:
        wrong.append("names no set and no run; write one, as in configs/page.yaml")
    for kind, parts in (("set", suite.sets), ("run", suite.runs)):
        names = [part.name for part in parts]
        wrong += [
            f"{kind} {name}: named twice; each has a folder of its own" for name in names if names.count(name) > 1
        ]
        for part in parts:
            try:
                of_run = (part.config, part.task) if isinstance(part, Run) else (None, None)
                config.load(of_run[0], _overrides(part), of_run[1])
            except UserError as error:
                wrong += [
                    f"{kind} {part.name}: {line.replace('command line: ', '')}" for line in str(error).splitlines()
                ]
    return list(dict.fromkeys(wrong))


def _overrides(part: Set | Run) -> list[str]:
    """Its own, and the first point of its grid."""
    grid = part.grid if isinstance(part, Run) else {}
    return [*part.overrides, *(f"{key}={values[0]}" for key, values in grid.items())]
