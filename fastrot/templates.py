"""The templates of pages, which escape what they are given and refuse what they are not; and pictures inside pages."""

import base64
import io
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image


def template(package: str, name: str, **filters: object) -> Template:
    """A file of a package. filters: name -> function."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))


def data_uri(image: Image.Image, kind: str) -> str:
    """An image as a page holds it. kind: JPEG or PNG."""
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 82} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
