"""A COCO-format annotation file, read and checked."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fastrot.errors import UserError

Number = Annotated[float, Field(allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CocoImage(_Entry):
    id: int
    file_name: str
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]


class CocoCategory(_Entry):
    id: int
    name: str


class CocoObject(_Entry):
    """bbox: x, y, width, height.  segmentation: polygons, or an RLE, counted or compressed; none for boxes alone."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[Number, Number, Number, Number]
    area: Number | None = None
    iscrowd: int = 0
    segmentation: list[list[Number]] | dict[str, Any] | None = None


class CocoFile(_Entry):
    images: list[CocoImage]
    annotations: list[CocoObject]
    categories: list[CocoCategory]


_READER = TypeAdapter(CocoFile)


def read_coco(file: Path) -> CocoFile:
    """Images, objects and categories of a file. Raises UserError, a line that names the place, where they do not fit."""
    try:
        content = _READER.validate_python(json.loads(file.read_bytes()))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: not of COCO's format: {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    for kind, entries in (
        ("image", content.images),
        ("annotation", content.annotations),
        ("category", content.categories),
    ):
        (often, count), *_ = Counter(entry.id for entry in entries).most_common(1) or [(0, 0)]
        if count > 1:
            raise UserError(f"{file}: {count} entries of kind {kind} have the id {often}")
    images, categories = ({entry.id for entry in entries} for entries in (content.images, content.categories))
    for one in content.annotations:
        if one.image_id not in images:
            raise UserError(f"{file}: annotation {one.id} is of image {one.image_id}, which is not listed")
        if one.category_id not in categories:
            raise UserError(f"{file}: annotation {one.id} is of category {one.category_id}, which is not listed")
    if not content.images:
        raise UserError(f"{file}: lists no image")
    return content
