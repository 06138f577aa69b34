"""The objects of the demo's scenes, each with a top and a bottom, drawn by a brush."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from fastrot.demo.scenery import LEAVES, Brush, Colour


def boat(b: Brush) -> None:
    """A hull, a mast and two sails, with the reflection of the sails broken by ripples."""
    wood = b.paint()
    cloths: list[Colour] = [(240, 236, 224), b.paint()]
    cloth = b.pick(cloths)
    b.taper(0.3, 0.46, 0.0, 0.2, wood, 4)
    b.line([(-0.46, 0.2), (0.46, 0.2)], (240, 232, 214), 0.03)
    b.line([(0, 0.2), (0, 1)], (96, 70, 48), 0.025)
    b.poly([(0.03, 0.27), (0.4, 0.3), (0.03, 0.97)], cloth, 1.0 if b.sun > 0 else 0.8)
    b.poly([(-0.03, 0.27), (-0.32, 0.27), (-0.03, 0.82)], cloth, 0.8 if b.sun > 0 else 1.0)
    b.poly([(0, 1), (0.14, 0.97), (0, 0.94)], b.paint())
    for v in np.linspace(0.03, 0.5, 9):
        w, u = 0.4 * (1 - v), b.rng.normal(0, 0.03)
        b.line([(u - w, -v), (u + w, -v)], wood if v < 0.15 else cloth, 0.025, 0.7, 130 * (1 - v))


def car(b: Brush) -> None:
    """A car from the side; its own shadow lies between the wheels."""
    body, tall = b.paint(), b.rng.uniform(0.75, 1.0)
    b.shadow(0.95)
    b.poly([(-0.55, 0.5), (0.5, 0.5), (0.32, tall), (-0.4, tall)], body, 1.05)
    b.poly([(-0.47, 0.53), (-0.03, 0.53), (-0.03, tall - 0.06), (-0.36, tall - 0.06)], (70, 90, 108))
    b.poly([(0.03, 0.53), (0.42, 0.53), (0.28, tall - 0.06), (0.03, tall - 0.06)], (70, 90, 108), 1.2)
    b.taper(0.98, 0.92, 0.16, 0.54, body)
    b.line([(-0.94, 0.52), (0.94, 0.52)], body, 0.03, 1.35)
    b.line([(-0.98, 0.18), (0.98, 0.18)], (30, 30, 34), 0.05)
    for u in (-0.58, 0.58):
        b.oval(u, 0.18, 0.2, 0.2, (28, 28, 30))
        b.oval(u, 0.19, 0.1, 0.1, (170, 172, 176))
    b.oval(0.92 * b.sun, 0.4, 0.06, 0.06, (255, 240, 180))


def house(b: Brush) -> None:
    """Walls, a tiled roof with eaves, a door, windows with sills, a chimney that smokes."""
    wall, tile, half, top = b.paint(), b.paint(), b.rng.uniform(0.4, 0.75), b.rng.uniform(0.45, 0.62)
    b.shadow(half * 1.2)
    u = half * b.rng.uniform(0.3, 0.6) * b.pick((-1, 1))
    b.poly([(u - 0.05, top), (u + 0.05, top), (u + 0.05, 1), (u - 0.05, 1)], (120, 74, 60))
    for i in range(5 if b.chance(0.6) else 0):
        b.oval(
            u + 0.03 * i * i * b.sun,
            1.05 + 0.09 * i,
            0.04 + 0.02 * i,
            0.035 + 0.015 * i,
            (214, 214, 216),
            alpha=150 - 24 * i,
        )
    b.taper(half, half, 0, top, wall)
    ridge = half * b.rng.choice((0.0, 0.5, 0.7))
    for i in range(6):  # rows of tiles, each lighter than the one below it
        a, c = i / 6, (i + 1) / 6
        wa, wc = half * 1.16 + (ridge - half * 1.16) * a, half * 1.16 + (ridge - half * 1.16) * c
        va, vc = top + (0.96 - top) * a, top + (0.96 - top) * c
        b.poly([(-wa, va), (wa, va), (wc, vc), (-wc, vc)], tile, 0.8 + 0.07 * i)
        b.line([(-wa, va), (wa, va)], tile, 0.012, 0.5)
    b.poly([(-half, top), (half, top), (half, top - 0.05), (-half, top - 0.05)], (0, 0, 0), alpha=90)
    b.poly([(-0.08, 0), (0.08, 0), (0.08, 0.3), (-0.08, 0.3)], b.paint(), 0.7)
    b.oval(0.05, 0.14, 0.012, 0.012, (240, 220, 120))
    for side in (-1, 1):
        b.window(side * half * 0.6, top * 0.4, half * 0.17, top * 0.36)


def lighthouse(b: Brush) -> None:
    """A banded tower on a rock, with a gallery, a lantern room and a dome."""
    band, base = b.paint(), b.rng.uniform(0.12, 0.18)
    for u in (-0.2, 0.18, 0.0):
        b.ball(u, 0.0, 0.2, (112, 104, 98), 0.55)
    for i in range(6):
        low, high = base * (1 - 0.08 * i), base * (1 - 0.08 * (i + 1))
        b.taper(low, high, 0.08 + 0.11 * i, 0.08 + 0.11 * (i + 1), (band, (238, 234, 226))[i % 2], 1)
    b.poly([(-0.03, 0.1), (0.03, 0.1), (0.03, 0.2), (-0.03, 0.2)], (50, 44, 44))
    b.window(0, 0.42, 0.025, 0.07)
    b.taper(base * 0.75, base * 0.85, 0.73, 0.76, (60, 60, 66), 1)
    b.taper(0.055, 0.055, 0.76, 0.87, (255, 236, 150), 2)
    b.taper(0.075, 0.012, 0.87, 0.97, band, 3)
    b.line([(0, 0.97), (0, 1.03)], (40, 40, 44), 0.012)
    if b.scene.light.mean() < 0.7:
        b.poly([(0, 0.82), (b.sun * 1.6, 0.96), (b.sun * 1.6, 0.66)], (255, 240, 170), 1.6, 70)


def mushroom(b: Brush) -> None:
    """A cap with spots over a stem in its shade, gills at the rim."""
    cap, wide, rim = b.paint(), b.rng.uniform(0.36, 0.6), b.rng.uniform(0.45, 0.58)
    b.shadow(wide * 0.8)
    b.taper(0.15, 0.1, 0, rim, (232, 220, 196), lean=b.rng.normal(0, 0.03))
    b.poly([(-0.11, rim), (0.11, rim), (0.12, rim - 0.13), (-0.12, rim - 0.13)], (0, 0, 0), alpha=80)
    b.oval(0, rim, wide * 0.94, 0.08, (206, 178, 146), 0.7)
    arc = [(wide * math.cos(t), rim + (0.96 - rim) * math.sin(t)) for t in np.linspace(0, math.pi, 24)]
    for i in range(5):
        k = 1 - 0.17 * i
        b.poly(
            [(u * k + b.sun * 0.05 * (1 - k), rim + (v - rim) * (0.35 * k + 0.62)) for u, v in arc],
            cap,
            0.72 + 0.12 * i,
        )
    for _ in range(b.rng.integers(0, 9)):
        t, r = b.rng.uniform(0.4, 2.7), b.rng.uniform(0.3, 0.85)
        b.oval(wide * r * math.cos(t), rim + 0.03 + (0.9 - rim) * r * math.sin(t), 0.05, 0.035, (246, 238, 224))


def person(b: Brush) -> None:
    """Somebody who stands: shoes, legs, coat, arms, head with hair or a hat."""
    coat, legs, skin, hair = b.paint(), b.paint(), b.pick(((236, 196, 164), (150, 102, 72), (98, 64, 46))), b.paint()
    b.shadow(0.2)
    for side in (-1, 1):
        step = side * b.rng.uniform(0.04, 0.1)
        b.line([(step, 0.02), (side * 0.05, 0.46)], legs, 0.085, 0.8)
        b.oval(step + 0.03, 0.02, 0.07, 0.025, (36, 30, 30))
        hand = side * b.rng.uniform(0.16, 0.26), b.rng.uniform(0.36, 0.5)
        b.line([(side * 0.1, 0.78), hand], coat, 0.07, 0.85)
        b.oval(*hand, 0.035, 0.035, skin)
    b.taper(b.rng.uniform(0.12, 0.2), 0.11, 0.4, 0.81, coat)
    b.line([(0, 0.42), (0, 0.8)], coat, 0.012, 0.6)
    b.oval(0, 0.9, 0.09, 0.1, hair, 0.7)
    b.oval(0, 0.88, 0.075, 0.085, skin)
    for side in (-1, 1):
        b.oval(side * 0.03, 0.895, 0.01, 0.012, (30, 26, 26))
    b.line([(-0.025, 0.84), (0.025, 0.84)], (150, 60, 60), 0.012)
    if b.chance(0.5):
        b.taper(0.13, 0.13, 0.94, 0.955, hair, 1)
        b.taper(0.085, 0.075, 0.955, 1.04, hair, 2)


def plant(b: Brush) -> None:
    """A pot, wider at its rim, with leaves that bend out of it and flowers on top."""
    pot, leaf, petal = b.paint(), b.paint(LEAVES[:3]), b.paint()
    b.shadow(0.3)
    for u in np.linspace(-0.45, 0.45, b.rng.integers(5, 10)):
        tip = u + b.rng.normal(0, 0.05), 0.95 - abs(u) * 0.7 + b.rng.normal(0, 0.04)
        mid = u * 0.45, 0.66
        b.poly(
            [(u * 0.1, 0.36), (mid[0] - 0.045, mid[1]), tip, (mid[0] + 0.045, mid[1])], leaf, b.rng.uniform(0.7, 1.15)
        )
        if b.chance(0.5):
            b.ball(*tip, 0.06, petal)
            b.oval(*tip, 0.02, 0.02, (240, 210, 90))
    b.taper(0.17, 0.25, 0, 0.32, pot)
    b.taper(0.28, 0.28, 0.32, 0.4, pot, 2)
    b.poly([(-0.24, 0.32), (0.24, 0.32), (0.235, 0.29), (-0.235, 0.29)], (0, 0, 0), alpha=90)


def snowman(b: Brush) -> None:
    """Three balls, a carrot, coal buttons, arms of twigs and mostly a hat."""
    b.shadow(0.36)
    for v, r in ((0.24, 0.27), (0.58, 0.19), (0.83, 0.13)):
        b.ball(0, v, r, (206, 210, 222))
    for side in (-1, 1):
        b.line([(side * 0.17, 0.6), (side * 0.4, b.rng.uniform(0.6, 0.78))], (84, 58, 40), 0.02)
        b.oval(side * 0.045, 0.87, 0.015, 0.015, (20, 20, 22))
    for v in (0.5, 0.58, 0.66):
        b.oval(0, v, 0.016, 0.016, (20, 20, 22))
    b.poly([(0, 0.845), (0, 0.805), (b.sun * 0.15, 0.81)], (236, 124, 40))
    b.line([(-0.12, 0.72), (0.12, 0.72)], b.paint(), 0.05)
    if b.chance(0.8):
        hat = b.paint()
        b.taper(0.16, 0.16, 0.92, 0.945, hat, 1)
        b.taper(0.1, 0.11, 0.945, 1.1, hat, 2)


def tree(b: Brush) -> None:
    """A broad crown of lumps over a trunk, or a conifer of skirts, at times under snow."""
    leaf = b.paint(LEAVES)
    b.shadow(0.32)
    b.taper(0.075, 0.04, 0, 0.55, (98, 72, 52), lean=b.rng.normal(0, 0.03))
    if b.chance(0.45):
        cap = b.scene.ground[1] if b.chance(0.3) else leaf * 1.25
        for i in range(5):
            v, w = 0.14 + 0.16 * i, 0.38 - 0.065 * i
            b.poly(
                [(-w, v), (-w * 0.5, v - 0.035), (0, v), (w * 0.5, v - 0.035), (w, v), (0, v + 0.26)],
                leaf,
                0.66 + 0.06 * i,
            )
            b.poly([(0, v + 0.26), (b.sun * w * 0.75, v + 0.06), (b.sun * w * 0.2, v + 0.1)], cap, 0.95)
        return
    b.line([(0, 0.35), (0.16 * b.sun, 0.56)], (98, 72, 52), 0.03, 0.8)
    for v in np.sort(b.rng.uniform(0.5, 0.86, b.rng.integers(7, 14))):  # low, shaded lumps first
        b.ball(b.rng.normal(0, 0.17), v, b.rng.uniform(0.11, 0.19), leaf * (0.45 + 0.7 * v))


Drawing = Callable[[Brush], None]
OBJECTS: dict[str, Drawing] = {
    f.__name__: f for f in (boat, car, house, lighthouse, mushroom, person, plant, snowman, tree)
}
CLASSES = tuple(OBJECTS)


def bush(b: Brush) -> None:
    b.shadow(0.5)
    leaf = b.paint(LEAVES)
    for _ in range(6):
        b.ball(b.rng.uniform(-0.4, 0.4), b.rng.uniform(0.2, 0.6), 0.3, leaf)


def stone(b: Brush) -> None:
    b.shadow(0.5)
    b.ball(0, 0.25, 0.5, b.paint(((128, 122, 116), (92, 88, 90), (166, 150, 130))), 0.6)


def fence(b: Brush) -> None:
    wood = b.paint(((150, 112, 80), (226, 222, 212), (96, 80, 70)))
    for v in (0.3, 0.68):
        b.line([(-1.7, v), (1.7, v)], wood, 0.09, 0.8)
        b.line([(-1.7, v - 0.07), (1.7, v - 0.07)], (0, 0, 0), 0.04, alpha=90)
    for u in np.linspace(-1.6, 1.6, 7):
        b.poly([(u - 0.1, 0), (u + 0.1, 0), (u + 0.1, 0.85), (u, 1), (u - 0.1, 0.85)], wood)


def tuft(b: Brush) -> None:
    """Blades of grass: dark at the root, thin and light at the tip."""
    leaf = b.paint(LEAVES)
    for _ in range(7):
        u, tip = b.rng.uniform(-0.3, 0.3), b.rng.normal(0, 0.4)
        b.poly([(u - 0.06, 0), (u + 0.06, 0), (tip, b.rng.uniform(0.5, 1))], leaf, b.rng.uniform(0.6, 1.2))


PROPS: Sequence[Drawing] = (bush, stone, fence, tuft, bush, tuft)
