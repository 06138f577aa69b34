"""python docs/views.py: draws docs/views.png, the picture of the README, from the embedded scenes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from fastrot.demo.scenes import draw
from fastrot_kernels import rotate_views

SIDE, GAP, HEAD = 120, 8, 22


def main() -> None:
    crops = [np.asarray(draw(i, 5)[0].convert("RGB").resize((SIDE, SIDE)), np.uint8) for i in (2, 8, 0, 7, 5, 3)]
    x = torch.from_numpy(np.stack(crops))
    turns = torch.arange(4, dtype=torch.uint8).expand(len(crops), 4)
    views = rotate_views(x, torch.zeros(len(crops), dtype=torch.uint8), turns, [0.0] * 3, [1.0] * 3, torch.float32)
    views = views.permute(0, 2, 3, 1).byte().numpy()
    step = SIDE + GAP
    sheet = Image.new("RGB", (len(crops) * step + GAP + 70, 4 * step + GAP + HEAD), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 6), "one image, one decode, four views; the network is asked which turn it sees", fill=(40, 40, 40))
    for turn in range(4):
        for i in range(len(crops)):
            sheet.paste(Image.fromarray(views[4 * i + turn]), (GAP + i * step, HEAD + GAP + turn * step))
        pen.text(
            (GAP + len(crops) * step, HEAD + GAP + turn * step + SIDE // 2), f"{90 * turn} degrees", fill=(40, 40, 40)
        )
    sheet.quantize(128).save(Path(__file__).parent / "views.png", optimize=True)


if __name__ == "__main__":
    main()
