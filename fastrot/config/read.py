"""A config read from YAML and dotted overrides, and written back."""

import difflib
import json
import math
import re
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from fastrot.config.fields import Config, Section
from fastrot.config.rules import cross_field_errors
from fastrot.errors import UserError

_OWN = ("linear", "finetune", "detect", "segment")  # commands that train, with a section of their own


class _Loader(yaml.SafeLoader):
    """YAML whose 1e-4 is a number (YAML 1.2's rule; PyYAML's own follows 1.1, where it is text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _shown(text: str) -> str:
    """As it is, or escaped where it would not stay on its line."""
    return text if text.isprintable() else repr(text)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{_shown(where)}{line}: not YAML ({_shown(why)})") from None
    except RecursionError:
        raise UserError(f"{_shown(where)}: not YAML (nested too deep)") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # what PyYAML's constructors raise for a value that is none of its kind, such as the date 2024-99-01
        raise UserError(f"{_shown(where)}: {_shown(str(error))}; quote it") from None


def read_yaml(path: str | Path, where: str) -> Any:
    """What a YAML file says. Raises UserError, which begins with `where`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    return _parse(text, where)


def _section(name: str) -> type[Section]:
    return cast(type[Section], Config.model_fields[name].annotation)


def is_text(key: str) -> bool:
    """Whether the values of a section.key are text, which an override gives letter by letter."""
    section, _, name = key.partition(".")
    field = _section(section).model_fields.get(name) if section in Config.model_fields else None
    return field is not None and field.annotation in (str, str | None)


def _value(key: str, text: str, where: str) -> Any:
    """An override's value. Text is taken as it is, but for quotes around it and for nothing or `null`, which unset
    the key; all else is YAML."""
    if not is_text(key):
        return _parse(text, where)
    if text in ("", "null"):
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return str(_parse(text, where)) if quoted else text


def _flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """{section: {key: value}} as {section.key: value}; values that are mappings stay whole."""
    flat: dict[str, Any] = {}
    for section, body in tree.items():
        if section in Config.model_fields and isinstance(body, dict):
            flat |= {f"{section}.{key}": value for key, value in body.items()}
        elif not (section in Config.model_fields and body is None):
            flat[str(section)] = body
    return flat


def _renamed(key: str, value: Any) -> tuple[str, Any]:
    """A key and its value as they are called now: folders of finished runs hold `run.tensorboard`."""
    if key == "run.tensorboard" and isinstance(value, bool):
        return "run.loggers", ["tensorboard"] if value else []
    return key, value


def known_keys() -> list[str]:
    """Every dotted key there is, in the order of the sections."""
    return [f"{name}.{key}" for name in Config.model_fields for key in _section(name).model_fields]


def _meant_for(values: dict[str, Any]) -> str | None:
    """The command that a file's values are for; None where several could read it.

    `linear`, `finetune`, `detect` and `segment` have a section each, and a file that sets one of them is for that
    command. A file that says how to learn (optim) and sets none is for `train`. A resolved config, as run folders hold,
    sets several: it is for the one whose section differs from the defaults, or for `train` where rotation.views is all.
    """
    own = {name: [key for key in values if key.startswith(f"{name}.")] for name in _OWN}
    named = [name for name, keys in own.items() if keys]
    if len(named) > 1:
        usual = flat(Config())
        named = [name for name, keys in own.items() if any(_changed(values[key], usual.get(key)) for key in keys)]
        if not named:
            return "train" if values.get("rotation.views") == "all" else None
    if len(named) == 1:
        return named[0]
    learns = any(key.startswith("optim.") for key in values)
    return "train" if not named and learns and values.get("rotation.views") != "one" else None


def _changed(value: Any, usual: Any) -> bool:
    return bool(value != usual)


def _refuse_foreign(path: str | None, values: dict[str, Any], overrides: list[str], command: str) -> None:
    """Raise UserError where a command that trains is given a file, or an override, that is another's."""
    meant = _meant_for(values)
    if meant not in (None, command):
        raise UserError(
            f"--config {path}: is a config of fastrot {meant}, and fastrot {command} would train another thing with it"
        )
    for override in overrides:
        section = override.partition(".")[0]
        if section in _OWN and section != command:
            raise UserError(f"{_shown(override)}: fastrot {command} does not read the section {section}")


def _in_file(path: str | None) -> dict[str, Any]:
    """{section.key: value} of a YAML file, or nothing. Raises UserError."""
    if path is None:
        return {}
    tree = read_yaml(path, f"--config {path}") or {}
    if not isinstance(tree, dict):
        raise UserError(f"--config {path}: expected sections ({', '.join(Config.model_fields)})")
    return dict(_renamed(key, value) for key, value in _flatten(tree).items())


def command_of(path: str | None, overrides: list[str]) -> str:
    """The command that a file and overrides are for: train, linear, finetune, detect or segment."""
    values = _in_file(path) | dict(override.partition("=")[::2] for override in overrides)
    return _meant_for(values) or "train"


def load(path: str | None, overrides: list[str], command: str | None = None) -> tuple[Config, dict[str, str]]:
    """The resolved config, and where each key's value comes from (file, command line, default).

    path       a YAML file of sections, or None for the defaults.
    overrides  "section.key=value", the last one wins. Values of text keys are taken literally, others are YAML.
    command    train, linear, finetune, detect or segment: refuse a file that is for another of them, or an override that it does not
               read. A command that trains nothing reads any file, and of it what it needs.
    Raises UserError with one line for each thing that is wrong.
    """
    values = _in_file(path)
    sources = dict.fromkeys(values, path or "")
    if command is not None:
        _refuse_foreign(path, values, overrides, command)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected section.key=value, as in optim.lr=0.1")
        key, parsed = _renamed(key, _value(key, value, override))
        values[key], sources[key] = parsed, "command line"
    return _validated(values, sources), {key: sources.get(key, "default") for key in known_keys()}


def from_values(path: str | None, values: dict[str, Any], command: str | None = None) -> Config:
    """The config of a file, or of the defaults, in which keys have other values, as Python has them. As `load`."""
    found, values = _in_file(path), dict(_renamed(*one) for one in values.items())
    if command is not None:
        _refuse_foreign(path, found, list(values), command)
    return _validated(found | values, dict.fromkeys(found, path or "") | dict.fromkeys(values, "argument"))


def _validated(values: dict[str, Any], sources: dict[str, str]) -> Config:
    known = known_keys()
    wrong = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6) or [
                k for k in known if k.endswith("." + key.rpartition(".")[2])
            ]
            hint = f"; did you mean {near[0]}?" if near else f"; sections: {', '.join(Config.model_fields)}"
            wrong.append(f"{sources[key]}: unknown key {_shown(key)}{hint}")
    tree: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key in known:
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as errors:
        first: dict[str, Any] = {}  # a line a key
        for error in errors.errors():
            first.setdefault(".".join(str(part) for part in error["loc"][:2]), error)
        for key, error in first.items():
            wrong.append(f"{sources.get(key, 'default')}: {key} is {error['input']!r}: {error['msg']}")
    else:
        wrong += cross_field_errors(config)
    if wrong:
        raise UserError("\n".join(wrong))
    return config


def flat(config: Config) -> dict[str, Any]:
    """The resolved config as {section.key: value}, plain JSON values."""
    return {
        f"{section}.{key}": value
        for section, body in config.model_dump(mode="json").items()
        for key, value in body.items()
    }


def as_overrides(config: Config, sources: dict[str, str]) -> tuple[str, ...]:
    """What is set as words section.key=value that `load` reads back; sources: as `load` gives them."""
    values = flat(config)
    return tuple(f"{key}={_written(key, values[key])}" for key, source in sources.items() if source != "default")


def _written(key: str, value: Any) -> str:
    if not is_text(key) or value is None:
        return json.dumps(value)
    plain = value and value != "null" and value[0] not in "\"'"
    return str(value) if plain else yaml.safe_dump(value, default_style='"', width=math.inf).rstrip("\n")


def table(config: Config, sources: dict[str, str]) -> list[tuple[str, str]]:
    """(key, value and where it is from) for a person, without the sections of other commands that nobody has set."""
    told = {name for name in Config.model_fields if name not in _OWN}
    told |= {key.partition(".")[0] for key, source in sources.items() if source != "default"}
    return [(key, f"{value}  ({sources[key]})") for key, value in flat(config).items() if key.partition(".")[0] in told]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
