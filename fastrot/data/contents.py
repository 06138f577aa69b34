"""`fastrot index`: build a manifest, optionally decode all of it, and say what is there."""

import re
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrot import terminal
from fastrot.data.images import KINDS
from fastrot.data.index import in_cache
from fastrot.data.manifest import Manifest
from fastrot.data.remarks import remarks, unlabelled
from fastrot.data.verify import verify

_SHOWN = 10  # quarantined images named in the terminal
_BAR = 30  # characters of a histogram's longest bar


def describe_source(source: str | None, max_pixels: int, decode: bool) -> dict[str, Any]:
    """Counts, sizes, classes, kinds, histograms and what is quarantined of a source.

    decode  first decode every image in full and quarantine what is damaged: the manifest in the cache
            then holds the sound rows alone, with the content hash of those.
    """
    folder = in_cache(source, max_pixels, "data.train")
    broken = verify(folder, terminal.track) if decode else None
    manifest = Manifest.load(folder)
    result = {
        "source": manifest.source,
        "rows": len(manifest),
        "files": len(manifest.name_ends),
        "bytes": int(manifest.length.sum()),
        **_classes(manifest),
        "unlabelled": _unlabelled(manifest),
        "remarks": remarks(manifest),
        "kinds": {KINDS[kind]: count for kind, count in enumerate(np.bincount(manifest.kind).tolist()) if count},
        "histograms": {
            "short_side_pixels": histogram(np.minimum(manifest.height, manifest.width)),
            "long_side_pixels": histogram(np.maximum(manifest.height, manifest.width)),
            "file_bytes": histogram(manifest.length),
        },
        "content": manifest.content,
        "skipped": manifest.skipped,
        "quarantined": manifest.quarantined,
        "quarantined_reasons": dict(Counter(_kind_of(reason) for _, reason in manifest.quarantined).most_common()),
        "verified": broken,
        "manifest": str(folder),
    }
    _show(result)
    return result


def _classes(manifest: Manifest) -> dict[str, Any]:
    """How many classes, and the images of each: by class where images have many, else least and most."""
    if manifest.label.ndim == 2:
        present, ignored = ((manifest.label == value).sum(0).tolist() for value in (1, -1))
        by_class = {
            name: {"present": p, "ignored": i} for name, p, i in zip(manifest.classes, present, ignored, strict=True)
        }
        return {"classes": len(manifest.classes), "multi_label": by_class}
    counts = np.unique(manifest.label[manifest.label >= 0], return_counts=True)[1]
    spread = [int(counts.min()), int(counts.max())] if len(counts) else [0, 0]
    return {"classes": len(manifest.classes) or len(counts), "images_per_class": spread}


def _unlabelled(manifest: Manifest) -> dict[str, Any]:
    """How many images have no label; and which, where others have one."""
    rows = unlabelled(manifest).tolist()
    return {"count": len(rows), "images": [manifest.name(row) for row in rows] if len(rows) < len(manifest) else []}


def histogram(values: NDArray[Any]) -> dict[str, list[int]]:
    """Counts between edges half an octave apart: bin i holds edges[i] <= value < edges[i + 1]; and the spread.

    values  positive integers [n]. `spread` is the least, 5%, median, 95% and largest.
    """
    first, last = (int(np.floor(2 * np.log2(v))) for v in (values.min(), values.max()))
    edges = np.unique(np.round(2 ** (np.arange(first - 1, last + 3) / 2)).astype(np.int64))
    counts = np.histogram(values, edges)[0]
    used = np.flatnonzero(counts)
    some = slice(used[0], used[-1] + 1)
    return {
        "edges": edges[some.start : some.stop + 1].tolist(),
        "counts": counts[some].tolist(),
        "spread": np.quantile(values, (0, 0.05, 0.5, 0.95, 1), method="nearest").tolist(),
    }


def _kind_of(reason: str) -> str:
    """A reason without the figures of one image."""
    return re.sub(r"\b(0x[0-9a-f]+|\d+(x\d+)?)\b", "N", reason)


def _show(r: dict[str, Any]) -> None:
    rows = [
        ("images", f"{r['rows']:,} in {r['files']:,} files, {r['bytes'] / 1e9:.3f} GB"),
        *_class_rows(r),
        *([("without a label", f"{r['unlabelled']['count']:,}")] if r["unlabelled"]["count"] else []),
        *(("", name) for name in r["unlabelled"]["images"][:_SHOWN]),
        *(("note", line) for line in r["remarks"]),
        ("kinds", ", ".join(f"{count:,} {kind}" for kind, count in r["kinds"].items())),
        ("content", r["content"]),
        ("passed over", ", ".join(f"{count:,} {kind}" for kind, count in r["skipped"].items()) or "nothing"),
        ("quarantined", f"{len(r['quarantined']):,}"),
    ]
    if r["verified"] is not None:
        rows.append(("  of them by decoding", f"{len(r['verified']):,}"))
    rows += [(f"  {count:,}", reason) for reason, count in r["quarantined_reasons"].items()]
    if r["quarantined"]:
        newest = r["verified"] or r["quarantined"]
        rows += [("", f"{place}: {reason}") for place, reason in newest[:_SHOWN]]
        rows.append(("  all of them", f"{r['manifest']}/meta.json"))
    terminal.table(r["source"], rows)
    for name, bins in r["histograms"].items():
        terminal.table(name.replace("_", " "), _bars(bins))


def _class_rows(r: dict[str, Any]) -> list[tuple[str, str]]:
    if "multi_label" not in r:
        least, most = r["images_per_class"]
        return [("classes", f"{r['classes']:,} of {least:,} to {most:,} images")]
    by_class = r["multi_label"].items()
    lines = [f"{name} {n['present']:,}" + (f" ({n['ignored']:,})" if n["ignored"] else "") for name, n in by_class]
    return [("classes", f"{r['classes']}, many an image"), ("images present (ignored)", ", ".join(lines))]


def _bars(h: dict[str, Any]) -> list[tuple[str, str]]:
    most = max(h["counts"])
    wide = len(f"{most:,}")
    bins = zip(h["edges"], h["edges"][1:], h["counts"], strict=False)
    least, low, median, high, last = (f"{value:,}" for value in h["spread"])
    return [
        *((f"{a:,} to {b - 1:,}", f"{n:>{wide},} " + "\u2588" * (-(-_BAR * n // most))) for a, b, n in bins),
        ("median", f"{median} (5% {low}, 95% {high}, {least} to {last})"),
    ]
