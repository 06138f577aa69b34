"""What the demo's scenes are made of: palettes, canvas and brush, sky and ground."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

T = TypeVar("T")
Rgb = tuple[float, float, float]
Colour = Rgb | NDArray[np.float64]
Point = tuple[float, float]

SCALE = 2  # drawn this many times larger, then averaged down: Pillow's shapes have hard edges
MARGIN = 1.36  # how much wider the canvas is, so that a tilted camera sees no empty corner


class Palette(NamedTuple):
    """A scene's colours. light: what colours of objects are multiplied by; floor: the kind of ground."""

    sky_at_the_top: Rgb
    sky_at_the_horizon: Rgb
    ground_at_the_horizon: Rgb
    ground_at_the_feet: Rgb
    light: Rgb
    floor: str


PALETTES = {
    "noon": Palette((64, 124, 205), (186, 212, 236), (134, 160, 88), (62, 104, 42), (1.0, 1.0, 1.0), "grass"),
    "overcast": Palette((150, 156, 164), (208, 210, 212), (120, 128, 96), (84, 96, 62), (0.9, 0.9, 0.92), "grass"),
    "sunset": Palette((70, 52, 108), (250, 150, 80), (110, 72, 60), (48, 34, 40), (0.9, 0.6, 0.5), "grass"),
    "night": Palette((10, 12, 34), (38, 48, 84), (40, 52, 66), (18, 26, 36), (0.4, 0.46, 0.66), "grass"),
    "snow": Palette((108, 124, 148), (164, 176, 192), (226, 232, 242), (246, 248, 252), (0.9, 0.95, 1.0), "dunes"),
    "desert": Palette((60, 110, 170), (236, 206, 160), (228, 186, 112), (204, 146, 74), (1.05, 0.95, 0.8), "dunes"),
    "storm": Palette((36, 42, 54), (84, 92, 100), (190, 176, 90), (158, 140, 58), (0.85, 0.85, 0.8), "grass"),
    "sea": Palette((96, 160, 214), (214, 230, 238), (88, 150, 176), (22, 76, 116), (1.0, 1.0, 1.0), "water"),
    "dusk sea": Palette((40, 36, 76), (224, 128, 112), (196, 120, 116), (40, 38, 72), (0.8, 0.6, 0.62), "water"),
    "mars": Palette((196, 140, 104), (228, 184, 150), (170, 88, 54), (120, 54, 34), (1.0, 0.82, 0.7), "stones"),
    "moor": Palette((176, 190, 200), (226, 222, 214), (140, 112, 128), (86, 60, 84), (0.92, 0.9, 0.95), "stones"),
    "city": Palette((126, 150, 176), (204, 206, 204), (136, 134, 132), (84, 84, 88), (0.95, 0.95, 0.95), "tiles"),
    "parlour": Palette((168, 148, 116), (190, 168, 132), (128, 84, 52), (96, 58, 34), (1.0, 0.92, 0.8), "tiles"),
    "blue room": Palette((92, 120, 140), (110, 138, 156), (176, 150, 116), (206, 182, 146), (0.95, 0.97, 1.0), "tiles"),
}
INDOORS, AT_HOME = ("parlour", "blue room"), ("person", "plant")  # the rooms, and what may stand in them
PAINTS: Sequence[Rgb] = ((196, 62, 48), (222, 176, 70), (66, 110, 168), (232, 226, 214), (90, 130, 84), (150, 104, 72), (120, 76, 128), (64, 68, 78), (226, 134, 92), (110, 172, 178))  # fmt: skip
LEAVES: Sequence[Rgb] = ((64, 112, 48), (98, 138, 52), (44, 86, 62), (188, 112, 40), (170, 60, 44), (214, 178, 66))


@dataclass
class Scene:
    """A canvas with its light: what every function below draws on.

    sky, ground  [2, 3]: the two ends of each ramp, the upper first.
    """

    image: Image.Image
    rng: np.random.Generator
    horizon: float
    sky: NDArray[np.float64]
    ground: NDArray[np.float64]
    light: NDArray[np.float64]
    sun: int  # -1: the light comes from the left, 1: from the right

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image, "RGBA")
        self.width, self.height = self.image.size

    def pick(self, table: Sequence[T]) -> T:
        return table[int(self.rng.integers(len(table)))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def paint(self, table: Sequence[Rgb] = PAINTS) -> NDArray[np.float64]:
        """A colour of the table, shifted a little so that no two walls are alike."""
        return np.clip(np.array(self.pick(table)) + self.rng.normal(0, 16, 3), 0, 255)

    def ink(self, colour: Colour, shade: float = 1.0, alpha: float = 255) -> tuple[int, int, int, int]:
        red, green, blue = np.clip(np.asarray(colour) * self.light * shade, 0, 255).astype(int).tolist()
        return red, green, blue, int(alpha)


class Brush:
    """Draws one thing in units of its own size: (0, 0) is its foot, v grows upward."""

    def __init__(self, scene: Scene, x: float, y: float, size: float):
        self.scene, self.x, self.y, self.size = scene, x, y, size
        self.rng, self.sun = scene.rng, scene.sun
        self.pick, self.chance, self.paint = scene.pick, scene.chance, scene.paint

    def at(self, u: float, v: float) -> Point:
        return self.x + u * self.size, self.y - v * self.size

    def poly(self, points: Iterable[Point], colour: Colour, shade: float = 1.0, alpha: float = 255) -> None:
        self.scene.draw.polygon([self.at(*p) for p in points], fill=self.scene.ink(colour, shade, alpha))

    def line(
        self, points: Iterable[Point], colour: Colour, width: float = 0.02, shade: float = 1.0, alpha: float = 255
    ) -> None:
        ink, width = self.scene.ink(colour, shade, alpha), max(1, round(width * self.size))
        self.scene.draw.line([self.at(*p) for p in points], fill=ink, width=width, joint="curve")

    def oval(
        self, u: float, v: float, ru: float, rv: float, colour: Colour, shade: float = 1.0, alpha: float = 255
    ) -> None:
        box = [*self.at(u - ru, v + rv), *self.at(u + ru, v - rv)]
        self.scene.draw.ellipse(box, fill=self.scene.ink(colour, shade, alpha))

    def taper(
        self, low: float, high: float, v0: float, v1: float, colour: Colour, bands: int = 6, lean: float = 0.0
    ) -> None:
        """A trunk, wall or hull: half width `low` at v0 and `high` at v1, darker towards its foot."""
        for i in range(bands):
            a, b = i / bands, (i + 1) / bands
            wa, wb = low + (high - low) * a, low + (high - low) * b
            va, vb = v0 + (v1 - v0) * a, v0 + (v1 - v0) * b
            shade = 0.78 + 0.3 * b
            self.poly(
                [(lean * a - wa, va), (lean * a + wa, va), (lean * b + wb, vb), (lean * b - wb, vb)], colour, shade
            )
            far = -self.sun  # the side away from the light
            self.poly([(lean * a + far * wa * 0.45, va), (lean * a + far * wa, va), (lean * b + far * wb, vb), (lean * b + far * wb * 0.45, vb)], colour, shade * 0.8)  # fmt: skip

    def ball(self, u: float, v: float, r: float, colour: Colour, flat: float = 1.0) -> None:
        """A lump lit from above: ovals that shrink towards the light while they brighten."""
        for i in range(5):
            k = i / 5
            self.oval(
                u + self.sun * r * 0.22 * k,
                v + r * flat * 0.38 * k,
                r * (1 - k),
                r * flat * (1 - k),
                colour,
                0.62 + 0.62 * k,
            )

    def shadow(self, reach: float) -> None:
        for k in (1.0, 0.8, 0.6):
            self.oval(-self.sun * reach * 0.35, -0.01, reach * 1.3 * k, reach * 0.26 * k, (0, 0, 0), alpha=46)

    def window(self, u: float, v: float, w: float, h: float, frame: Colour = (232, 228, 216)) -> None:
        """A pane with a bright sill below and the shadow of its lintel above."""
        glass = (250, 214, 130) if self.chance(0.25) else (62, 78, 96)
        self.poly([(u - w, v), (u + w, v), (u + w, v + h), (u - w, v + h)], frame)
        self.poly([(u - w * 0.8, v + h * 0.1), (u + w * 0.8, v + h * 0.1), (u + w * 0.8, v + h * 0.9), (u - w * 0.8, v + h * 0.9)], glass)  # fmt: skip
        self.poly([(u - w * 0.8, v + h * 0.72), (u + w * 0.8, v + h * 0.72), (u + w * 0.8, v + h * 0.9), (u - w * 0.8, v + h * 0.9)], glass, 0.55)  # fmt: skip
        self.line([(u, v), (u, v + h)], frame, w * 0.2)
        self.line([(u - w, v + h * 0.6), (u + w, v + h * 0.6)], frame, w * 0.2)
        self.line([(u - w * 1.25, v), (u + w * 1.25, v)], frame, h * 0.12, 1.1)
        self.line([(u - w * 1.1, v - h * 0.12), (u + w * 1.1, v - h * 0.12)], (0, 0, 0), h * 0.1, alpha=80)


def gradient(scene: Scene, top: float, bottom: float, ends: NDArray[np.float64]) -> None:
    """Fill the rows from `top` to `bottom` with a ramp between two colours."""
    rows = np.linspace(0, 1, max(2, int(bottom) - int(top)))[:, None]
    ramp = (ends[0] * (1 - rows) + ends[1] * rows)[:, None].clip(0, 255).astype(np.uint8)
    scene.image.paste(Image.fromarray(ramp).resize((scene.width, len(rows)), 0), (0, int(top)))


def clouds(scene: Scene) -> None:
    """Heaps with a round top and a flat, shaded base; birds between them."""
    tint = np.clip(np.array(scene.sky[1]) * 0.5 + scene.pick((120, 60, 20)), 0, 255)
    for _ in range(scene.rng.integers(0, 7)):
        x, y = scene.rng.uniform(0, scene.width), scene.rng.uniform(0, max(1.0, scene.horizon))
        r = scene.rng.uniform(0.05, 0.16) * scene.width
        for shade, rise in ((0.78, 0.0), (0.95, 0.12), (1.1, 0.28)):
            ink = tuple(np.clip(tint * shade, 0, 255).astype(int).tolist())
            for u in (-0.9, -0.4, 0.15, 0.7):
                k = r * (0.75 - 0.35 * abs(u)) * (1 - rise)
                scene.draw.pieslice(
                    [x + u * r - k, y - k - rise * k, x + u * r + k, y + k - rise * k], 180, 360, fill=ink
                )
    for _ in range(scene.rng.integers(0, 5) if scene.chance(0.3) else 0):
        x, y = scene.rng.uniform(0, scene.width), scene.rng.uniform(0, max(1.0, scene.horizon))
        r = 0.02 * scene.width
        scene.draw.line([(x - r, y - r * 0.4), (x, y), (x + r, y - r * 0.4)], fill=(30, 30, 36, 200), width=3)


def heavens(scene: Scene, night: bool) -> None:
    """The sky: its ramp, a sun or moon with a halo, stars, clouds."""
    gradient(scene, 0, scene.horizon, scene.sky)
    if scene.chance(0.5):
        x = scene.width * (0.5 + scene.sun * scene.rng.uniform(0.1, 0.4))
        y, r = scene.horizon * scene.rng.uniform(0.1, 1.0), scene.width * scene.rng.uniform(0.02, 0.06)
        for k, alpha in ((3.0, 24), (2.0, 36), (1.4, 60), (1.0, 255)):
            scene.draw.ellipse([x - r * k, y - r * k, x + r * k, y + r * k], fill=(255, 244, 206, alpha))
    for _ in range(60 if night else 0):
        x, y = scene.rng.uniform(0, scene.width), scene.rng.uniform(0, max(1.0, scene.horizon))
        scene.draw.ellipse([x, y, x + 2, y + 2], fill=(240, 240, 255, 190))
    clouds(scene)


def hills(scene: Scene) -> None:
    """Up to three ridges, each nearer and less hazy than the one before."""
    count = scene.rng.integers(0, 4)
    for i in range(count):
        haze = 0.75 - 0.25 * i
        colour = np.array(scene.sky[1]) * haze + np.array(scene.paint(LEAVES)) * scene.light * 0.7 * (1 - haze)
        x = np.linspace(0, scene.width, 28)
        waves = np.zeros(len(x))
        for k in (1, 2, 4):
            waves += scene.rng.uniform(0.2, 1) / k * np.sin(x / scene.width * 6 * k + scene.rng.uniform(0, 6))
        rise = scene.height * (0.16 - 0.045 * i) * (0.5 + 0.3 * waves).clip(0.02)
        ridge = list(zip(x.tolist(), (scene.horizon - rise).tolist(), strict=True))
        scene.draw.polygon(
            [*ridge, (scene.width, scene.horizon), (0, scene.horizon)],
            fill=tuple(colour.clip(0, 255).astype(int).tolist()),
        )
        scene.draw.line(ridge, fill=tuple((colour * 1.15).clip(0, 255).astype(int).tolist()), width=3)


def wall(scene: Scene) -> None:
    """A room: papered wall, skirting board, and pictures or a window with light falling in."""
    gradient(scene, 0, scene.horizon, scene.sky)
    stripe = (*[int(c * 0.8) for c in scene.sky[0]], 120)
    for x in np.arange(0, scene.width, scene.width / scene.rng.integers(8, 30)).tolist() if scene.chance(0.5) else ():
        scene.draw.line([(x, 0), (x, scene.horizon)], fill=stripe, width=4)
    for _ in range(scene.rng.integers(1, 4)):
        size = scene.height * scene.rng.uniform(0.18, 0.34)
        b = Brush(scene, scene.rng.uniform(0, scene.width), scene.horizon * scene.rng.uniform(0.5, 0.8), size)
        b.window(0, 0, 0.4, 1, scene.paint())
    board = scene.height * 0.035
    scene.draw.rectangle([0, scene.horizon - board, scene.width, scene.horizon], fill=scene.ink((226, 216, 200), 0.9))
    scene.draw.line(
        [(0, scene.horizon - board), (scene.width, scene.horizon - board)], fill=scene.ink((255, 250, 240)), width=3
    )


def floor(scene: Scene, kind: str) -> None:
    """The ground: a ramp and marks that grow towards the viewer, each with its own up and down."""
    gradient(scene, scene.horizon, scene.height, scene.ground)
    depth, centre = scene.height - scene.horizon, scene.rng.uniform(0.2, 0.8) * scene.width
    if kind == "tiles":
        for u in np.linspace(-6, 7, 30):
            scene.draw.line([(centre + (u - 0.5) * scene.width * 0.16, scene.horizon), (centre + (u - 0.5) * scene.width, scene.height)], fill=(0, 0, 0, 60), width=3)  # fmt: skip
        for k in np.linspace(0, 1, 9) ** 2:
            scene.draw.line(
                [(0, scene.horizon + depth * k), (scene.width, scene.horizon + depth * k)], fill=(0, 0, 0, 60), width=3
            )
        return
    for k in np.sort(scene.rng.uniform(0, 1, {"water": 110, "grass": 170, "dunes": 26, "stones": 50}[kind])):
        base = np.array(scene.ground[0]) * (1 - k) + np.array(scene.ground[1]) * k
        x, y, size = scene.rng.uniform(0, scene.width), scene.horizon + depth * k, (0.01 + 0.05 * k) * scene.height
        light, dark = (tuple((base * s).clip(0, 255).astype(int).tolist()) for s in (scene.rng.uniform(1.1, 1.35), 0.7))
        if kind == "water":
            scene.draw.line([(x - size, y), (x + size, y)], fill=light, width=max(1, int(size / 9)))
            scene.draw.line(
                [(x - size * 0.8, y + size / 6), (x + size * 0.8, y + size / 6)], fill=dark, width=max(1, int(size / 7))
            )
        elif kind == "grass":
            for u in scene.rng.normal(0, 0.5, 3):
                scene.draw.polygon([(x + u * size - size * 0.1, y), (x + u * size + size * 0.1, y), (x + u * size * 1.6, y - size)], fill=light if u < 0 else dark)  # fmt: skip
        elif kind == "dunes":
            box = [x - size * 7, y, x + size * 7, y + size * 4]
            scene.draw.arc(box, 225, 315, fill=light, width=max(2, int(size / 4)))
            scene.draw.arc(
                [box[0], y + size * 0.3, box[2], box[3]], 230, 310, fill=(*dark, 110), width=max(2, int(size / 2))
            )
        else:
            scene.draw.ellipse([x - size * 0.6, y - size * 0.1, x + size * 0.6, y + size * 0.3], fill=(0, 0, 0, 90))
            scene.draw.ellipse([x - size * 0.5, y - size * 0.4, x + size * 0.5, y + size * 0.2], fill=dark)
            scene.draw.ellipse([x - size * 0.4, y - size * 0.38, x + size * 0.4, y + size * 0.02], fill=light)
