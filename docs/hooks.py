"""What `mkdocs build` adds to docs/: pages made from the code and from files elsewhere, and the files that pages link to.

`config.md` comes from the fields of the config, `commands.md` from the commands' own --help: neither can go stale. A link
to a file outside docs/ leads to a copy of it in the site, so that the site is whole without a network.
"""

import os
import posixpath
import re
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic_core import PydanticUndefined

from fastrot.commands import GROUPS, find
from fastrot.config.fields import Config

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # files elsewhere that are pages of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "kernels/fastrot_kernels/README.md": "kernels.md",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)([)#])")
_SHOWN = (".svg", ".png", ".json")  # what a browser shows; other files get .txt


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs' event: the files of the site, before any is read."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    texts |= {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
    made = {"config.md": config_page(), "commands.md": commands_page()}
    copies: set[str] = set()
    made |= {_page(path): _linked(text, path, copies) for path, text in texts.items()}
    made |= {_copy(path): (ROOT / path).read_bytes() for path in copies}
    for uri, content in made.items():
        if old := files.get_file_from_path(uri):
            files.remove(old)
        files.append(File.generated(config, uri, content=content))
    return files


def _page(path: str) -> str:
    """Where the site has a file of the repository that is a page or lies in docs/."""
    return PAGES.get(path) or path.removeprefix("docs/")


def _copy(path: str) -> str:
    return f"files/{path}" + ("" if path.endswith(_SHOWN) else ".txt")


def _linked(text: str, path: str, copies: set[str]) -> str:
    """A page's text whose links into the repository lead to where the site has that file; `copies` gets what they need.

    A link that leads nowhere stays as it is: mkdocs says so.
    """

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if (ROOT / target).is_dir():
            target += "/__init__.py"
        if not (ROOT / target).is_file():
            return match[0]
        inside = target in PAGES or (target.startswith("docs/") and not target.endswith(".py"))
        if not inside:
            copies.add(target)
        to = _page(target) if inside else _copy(target)
        return match[1] + posixpath.relpath(to, posixpath.dirname(_page(path)) or ".") + match[3]

    return _LINK.sub(lead, text)


def config_page() -> str:
    """A section after the other: key, type, default, meaning."""
    lines = [
        "# Config", "",
        "Every key of a config file, made from the code when these pages are built. A file holds sections; on the command",
        "line a key is `section.key=value`. `fastrot config` prints all of them with their values and where each comes",
        "from; `fastrot config --schema` prints a JSON schema for editors. An unknown key is refused.", "",
    ]  # fmt: skip
    for name, section in Config.model_fields.items():
        lines += [f"## {name}", ""]
        for key, field in section.annotation.model_fields.items():
            default = "" if field.default is PydanticUndefined else _yaml(field.default)
            lines += [
                f"**`{name}.{key}`** · {_type(field.annotation, field.metadata)} · default `{default}`",
                f":   {' '.join((field.description or '').split())}",
                "",
            ]
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:.4g}" if isinstance(value, float) and value < 1e5 else str(value)


def _type(kind: Any, bounds: list[Any] | tuple[Any, ...] = ()) -> str:
    """A field's type for a person: `int ≥ 1`, `a` or `b`, list of float."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        kind, *inner = parts
        return _type(kind, [one for bound in inner for one in getattr(bound, "metadata", [bound])])
    if origin is Literal:
        return ", ".join(f"`{_yaml(part)}`" for part in parts)
    if origin is Union or type(kind).__name__ == "UnionType":
        return " or ".join("null" if part is NoneType else _type(part, bounds) for part in parts)
    if origin is dict:
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    if origin is tuple:
        return f"list of {_type(parts[0])}" if parts[-1] is ... else f"{len(parts)} x {_type(parts[0])}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    said = [
        f"{sign} {_power(limit)}"
        for bound in bounds
        for name, sign in signs.items()
        if (limit := getattr(bound, name, None)) is not None
    ]
    return " ".join([{"str": "text"}.get(kind.__name__, kind.__name__), ", ".join(said)]).strip()


def _power(limit: float) -> str:
    return "2^64" if limit == 2**64 else f"{limit:g}"


def commands_page() -> str:
    """Each command's own --help."""
    os.environ["COLUMNS"] = "96"
    lines = [
        "# Commands", "",
        "`fastrot COMMAND --help`, for every command, in the order of a user's day. Exit codes: 0 done, 2 your error, 3 stopped",
        "by a fault, 75 stopped as asked, 130 Ctrl-C.", "",
    ]  # fmt: skip
    for group, names in GROUPS.items():
        lines += [f"## {group[0].upper()}{group[1:]}", ""]
        for name in names:
            lines += [f"### fastrot {name}", "", "```text", find(name).parser().format_help().rstrip(), "```", ""]
    return "\n".join(lines)
