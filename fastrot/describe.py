"""`fastrot index`: build a manifest, optionally decode all of it, and say what is there."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastrot import distributed, runlog
from fastrot.config import Config
from fastrot.data import beton
from fastrot.data.faults import KINDS, decode_upright
from fastrot.data.manifest import Manifest
from fastrot.data.storage import FileStorage
from fastrot.distributed import Ranks
from fastrot.errors import BadImage, UserError
from fastrot.job import open_manifest

_BLOCK = 64  # images read at once while verifying


def describe_source(config: Config, ranks: Ranks, verify: bool) -> dict:
    """Counts, sizes, classes, kinds and what is quarantined of data.train.

    verify  also decode every image in full, by Pillow. Raises UserError where some cannot be.
    """
    manifest = open_manifest(config.data.train, config, ranks, "data.train")
    broken = _verify(manifest) if verify else None
    pixels = manifest.height.astype(np.int64) * manifest.width
    labels = Counter(manifest.label.tolist())
    result = {
        "source": manifest.source,
        "rows": len(manifest),
        "files": len(manifest.name_ends),
        "bytes": int(manifest.length.sum()),
        "classes": len(manifest.classes) or len(labels),
        "images_per_class": [min(labels.values()), max(labels.values())],
        "kinds": {KINDS[kind]: count for kind, count in sorted(Counter(manifest.kind.tolist()).items())},
        "short_side_pixels": _quantiles(np.minimum(manifest.height, manifest.width)),
        "long_side_pixels": _quantiles(np.maximum(manifest.height, manifest.width)),
        "kilopixels": _quantiles(pixels // 1000),
        "kilobytes": _quantiles(manifest.length // 1000),
        "content": manifest.content,
        "skipped": manifest.skipped,
        "quarantined": manifest.quarantined,
        "verified": broken,
    }
    if ranks.first:
        _show(result)
    if broken:
        place, reason = broken[0]
        raise UserError(f"{manifest.source}: {len(broken)} images cannot be decoded, the first: {place}: {reason}")
    return result


def _quantiles(values: np.ndarray) -> list[int]:
    """Least, 5%, median, 95% and largest."""
    return [int(v) for v in np.quantile(values, (0, 0.05, 0.5, 0.95, 1), method="nearest")]


def _verify(manifest: Manifest) -> list[list[str]]:
    """[place, reason] of every row that cannot be read and decoded in full."""
    storage, broken = FileStorage(manifest), []

    def look(row: int, buffer) -> str:
        try:
            if isinstance(buffer, BadImage):
                raise buffer
            if not beton.unchanged(manifest.path(row), int(manifest.offset[row]), buffer):
                raise BadImage("its bytes are not those that were packed (CRC-32)")
            if buffer.ndim == 3:
                return ""
            image = decode_upright(buffer)
        except BadImage as error:
            return str(error)
        want = int(manifest.width[row]), int(manifest.height[row])
        return "" if image.size == want else f"is {image.size[0]}x{image.size[1]}, indexed as {want[0]}x{want[1]}"

    blocks = [np.arange(at, min(at + _BLOCK, len(manifest))) for at in range(0, len(manifest), _BLOCK)]
    with ThreadPoolExecutor(distributed.cores()) as pool:
        for rows in runlog.track(blocks, len(blocks), f"decoding {manifest.source}, blocks of {_BLOCK}"):
            for row, reason in zip(rows.tolist(), pool.map(look, rows.tolist(), storage.read(rows)), strict=True):
                if reason:
                    broken.append([manifest.name(row), reason])
    storage.close()
    return broken


def _show(r: dict) -> None:
    spread = "{} .. {} .. {} .. {} .. {}"
    least, most = r["images_per_class"]
    rows = [
        ("images", f"{r['rows']:,} in {r['files']:,} files, {r['bytes'] / 1e9:.3f} GB"),
        ("classes", f"{r['classes']:,} of {least:,} to {most:,} images"),
        ("kinds", ", ".join(f"{count:,} {kind}" for kind, count in r["kinds"].items())),
        ("least .. 5% .. median .. 95% .. most", ""),
        ("short side, pixels", spread.format(*r["short_side_pixels"])),
        ("long side, pixels", spread.format(*r["long_side_pixels"])),
        ("area, 1000 pixels", spread.format(*r["kilopixels"])),
        ("size, 1000 bytes", spread.format(*r["kilobytes"])),
        ("content", r["content"]),
        ("passed over", ", ".join(f"{count:,} {kind}" for kind, count in r["skipped"].items()) or "nothing"),
        ("quarantined", f"{len(r['quarantined']):,}"),
        *((place, reason) for place, reason in r["quarantined"][:10]),
    ]
    if r["verified"] is not None:
        rows.append(("verified by decoding", f"{len(r['verified']):,} cannot be decoded"))
        rows += [(place, reason) for place, reason in r["verified"][:10]]
    runlog.table(r["source"], rows)
