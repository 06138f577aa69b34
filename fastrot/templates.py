"""The templates of pages, which escape what they are given and refuse what they are not."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template


def template(package: str, name: str, **filters: object) -> Template:
    """A file of a package. filters: name -> function."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))
