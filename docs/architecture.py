"""python docs/architecture.py: draws docs/architecture.svg, a batch's way from the plan to the step, in files."""

from html import escape
from pathlib import Path

WAY = (  # what happens, the file that does it, what it hands on
    ("plan", "fastrot/data/plan.py", "a position → rows, windows, flips, turns"),
    ("storage", "fastrot/data/storage.py", "the rows' bytes, read ahead"),
    ("decode", "fastrot/data/decode/", "upright crops, uint8 [n, S, S, 3]"),
    ("loader", "fastrot/data/loader.py", "batches ahead, bad images replaced"),
    ("views", "kernels/fastrot_kernels/op.py", "flipped, turned, normalised [n·V, C, S, S]"),
    ("task", "fastrot/tasks/rotation.py", "sum of losses, sums of metrics"),
    ("engine", "fastrot/engine/", "gradients averaged over ranks, one step"),
)
BESIDE = (  # number of the box of WAY, on which side, what stands there
    (0, -1, "order", "fastrot/data/order.py", "position → row"),
    (0, 1, "augment", "fastrot/data/augment.py", "row, epoch → window, flip, turn"),
    (1, -1, "manifest", "fastrot/data/manifest.py", "where each row lies, how large it is"),
    (1, 1, "sources", "fastrot/data/sources/", "folder, list, shards, .beton, VOC"),
    (3, -1, "bad images", "fastrot/data/bad_images.py", "listed once, counted"),
    (5, -1, "model", "fastrot/models/", "ResNet, norms over ranks"),
    (5, 1, "loop", "fastrot/runs/loop.py", "the page that drives all this"),
    (6, -1, "log", "fastrot/runs/log.py", "a line, metrics.jsonl, STATUS.json"),
    (6, 1, "checkpoint", "fastrot/runs/checkpoint.py", "position, weights, momentum"),
)
WIDE, HIGH, GAP_X, GAP_Y, EDGE = 268, 66, 34, 30, 12


def box(x: int, y: int, name: str, file: str, words: str, main: bool) -> str:
    fill, stroke = ("#e8f0fb", "#2f5f9e") if main else ("#f6f6f3", "#8a8a80")
    lines = (
        (20, 15, "bold", "#16202c", name),
        (39, 12.5, "normal", "#2f5f9e", file),
        (56, 12, "normal", "#444", words),
    )
    texts = "".join(
        f'<text x="{x + 12}" y="{y + dy}" font-size="{size}" font-weight="{weight}" fill="{ink}">{escape(text)}</text>'
        for dy, size, weight, ink, text in lines
    )
    return f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="7" fill="{fill}" stroke="{stroke}"/>{texts}'


def main() -> None:
    middle = EDGE + WIDE + GAP_X
    tops = [EDGE + number * (HIGH + GAP_Y) for number in range(len(WAY))]
    parts = [box(middle, top, *station, main=True) for top, station in zip(tops, WAY, strict=True)]
    for top in tops[:-1]:
        x, y = middle + WIDE // 2, top + HIGH
        parts.append(f'<path d="M{x} {y}v{GAP_Y - 7}m-5 -5l5 9l5 -9" fill="none" stroke="#2f5f9e" stroke-width="2"/>')
    for number, side, *words in BESIDE:
        x = middle + side * (WIDE + GAP_X)
        parts.append(box(x, tops[number], *words, main=False))
        start = middle if side < 0 else middle + WIDE
        parts.append(f'<path d="M{start} {tops[number] + HIGH // 2}h{side * GAP_X}" stroke="#8a8a80"/>')
    width, height = 3 * WIDE + 2 * GAP_X + 2 * EDGE, tops[-1] + HIGH + EDGE
    words = "A batch's way: " + ", ".join(f"{name} ({file})" for name, file, _ in WAY)
    (Path(__file__).parent / "architecture.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" role="img"><title>{escape(words)}</title>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
