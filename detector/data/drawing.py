"""Draws the objects and grounds of the synthetic data set, and outlines what stays visible of the objects.

A class is a combination of shape, colour and texture, so that any number of classes up to `MAX_CLASSES` can
be told apart by eye. Coordinates follow COCO: pixel (i, j) is the unit square with its centre at (i + 0.5, j
+ 0.5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import contourpy
import numpy as np
from PIL import Image, ImageDraw

Rings = list[np.ndarray]  # an outer ring [n, 2] and its holes
OVERSAMPLING = 4
SMALLEST_PART = 3.0  # square pixels; smaller fragments of an outline, and smaller holes, are left out
TOLERANCE = 0.08  # pixels a vertex may lie off the chord of its neighbours and be dropped, per pass


def _polar(radius: Callable[[np.ndarray], np.ndarray], samples: int = 96) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, samples, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.asarray(radius(angle))[..., None]


def _regular(corners: int) -> np.ndarray:
    return _polar(lambda angle: np.ones_like(angle), corners)


def _star(points: int, inner: float) -> np.ndarray:
    return _polar(lambda angle: np.where(np.arange(len(angle)) % 2 == 0, 1.0, inner), 2 * points)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1)


def _crescent() -> np.ndarray:
    t = np.linspace(0.6, 2 * np.pi - 0.6, 64)
    outer = np.stack([np.cos(t), np.sin(t)], axis=1)
    inner = np.stack([0.45 + 0.67 * np.cos(t), 0.67 * np.sin(t)], axis=1)
    return np.concatenate([outer, inner[::-1]])


_QUARTER = np.array([[3, 1], [1, 1], [1, 3]])
_CROSS = np.concatenate(
    [_QUARTER @ np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
)
_ARROW = np.array([[-3, -1], [0, -1], [0, -2.6], [3, 0], [0, 2.6], [0, 1], [-3, 1]])
_BAR = np.array([[-3, -1], [3, -1], [3, 1], [-3, 1]])


def _unit(*rings: np.ndarray) -> Rings:
    """Scaled about the origin so that the farthest point lies on the unit circle."""
    reach = max(float(np.linalg.norm(ring, axis=1).max()) for ring in rings)
    return [ring / reach for ring in rings]


SHAPES: dict[str, Rings] = {
    "circle": _unit(_regular(64)),
    "triangle": _unit(_regular(3)),
    "star": _unit(_star(5, 0.42)),
    "square": _unit(_regular(4)),
    "ring": _unit(_regular(64), 0.52 * _regular(48)),
    "cross": _unit(_CROSS),
    "heart": _unit(_heart()),
    "crescent": _unit(_crescent()),
    "arrow": _unit(_ARROW),
    "bar": _unit(_BAR),
    "flower": _unit(_polar(lambda angle: 0.75 + 0.25 * np.cos(6 * angle), 144)),
    "pentagon": _unit(_regular(5)),
}

# Neighbours in this order differ strongly, since small data sets use only the first few per shape.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "blue": (38, 84, 214),
    "yellow": (247, 216, 40),
    "green": (30, 140, 50),
    "magenta": (224, 60, 190),
    "white": (245, 245, 245),
    "orange": (250, 130, 20),
    "cyan": (50, 205, 225),
    "purple": (110, 40, 150),
    "lime": (165, 230, 50),
    "brown": (120, 70, 30),
    "black": (25, 25, 25),
}


def _edge(distance: np.ndarray, pixel: float) -> np.ndarray:
    """1 where the signed distance is positive, 0 where negative, blended over one pixel."""
    return np.clip(0.5 + distance / pixel, 0, 1)


def _wave(phase: np.ndarray, period: float, pixel: float) -> np.ndarray:
    """Bands: 1 in every second half period."""
    return _edge(period / 4 - np.abs((phase / period) % 1 - 0.5) * period, pixel)


def _dots(x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    u, v = (x / 0.56) % 1 - 0.5, (y / 0.56) % 1 - 0.5
    return _edge(0.17 - 0.56 * np.hypot(u, v), pixel)


def _checks(x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    a, b = _wave(x, 0.8, pixel), _wave(y, 0.8, pixel)
    return a + b - 2 * a * b


def _grid(x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    lines = [_edge(0.08 - np.abs((t / 0.5) % 1 - 0.5) * 0.5, pixel) for t in (x, y)]
    return np.maximum(*lines)


# The share of the second colour at object coordinates (x, y), in radii of the object, as is ``pixel``.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "plain": lambda x, y, pixel: np.zeros_like(x),
    "striped": lambda x, y, pixel: _wave(y, 0.5, pixel),
    "dotted": _dots,
    "checkered": _checks,
    "ringed": lambda x, y, pixel: _wave(np.hypot(x, y), 0.45, pixel),
    "gridded": _grid,
    "halved": lambda x, y, pixel: _edge(x, pixel),
    "wavy": lambda x, y, pixel: _wave(y + 0.15 * np.sin(7 * x), 0.6, pixel),
    "shaded": lambda x, y, pixel: np.clip(0.5 + 0.6 * y, 0, 1),
}

MAX_CLASSES = len(SHAPES) * len(COLOURS) * len(TEXTURES)


@dataclass(frozen=True)
class Appearance:
    """What the objects of one class look like."""

    shape: str
    colour: str
    texture: str

    @property
    def name(self) -> str:
        return f"{self.texture}_{self.colour}_{self.shape}"


def appearance(k: int) -> Appearance:
    """The k-th of `MAX_CLASSES` distinct appearances; the first differ in shape, the next in colour too."""
    if not 0 <= k < MAX_CLASSES:
        raise ValueError(f"there are {MAX_CLASSES} appearances, number {k} is not one of them")
    shapes, colours, textures = list(SHAPES), list(COLOURS), list(TEXTURES)
    lap, shape = divmod(k, len(shapes))
    turn, step = divmod(lap, len(colours))
    return Appearance(
        shapes[shape], colours[(step + shape) % len(colours)], textures[(turn + step + shape) % len(textures)]
    )


@dataclass(frozen=True)
class Placement:
    """Where one object lies: centre and radius in pixels, rotation in radians."""

    x: float
    y: float
    radius: float
    angle: float


def ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """A muted ground, float32 [size, size, 3] in 0..255: a gradient with noise of several scales."""
    base, far = rng.uniform(70, 190, size=(2, 1, 1, 3))
    base, far = (0.35 * colour + 0.65 * colour.mean() for colour in (base, far))  # little saturation
    angle = rng.uniform(0, 2 * np.pi)
    along = np.linspace(-0.5, 0.5, size)
    slope = np.clip(0.5 + np.cos(angle) * along[None] + np.sin(angle) * along[:, None], 0, 1)[..., None]
    picture = base * (1 - slope) + far * slope
    for cells, strength in ((4, 22.0), (14, 14.0), (48, 8.0)):
        patch = rng.normal(0, 1, size=(cells, cells)).astype(np.float32)
        noise = Image.fromarray(patch).resize((size, size), Image.Resampling.BICUBIC)
        picture = picture + strength * rng.uniform(0.4, 1.2) * np.asarray(noise)[..., None]
    return picture.astype(np.float32)


def paint(canvas: np.ndarray, look: Appearance, place: Placement, rng: np.random.Generator) -> np.ndarray:
    """Draw an object onto the canvas (float32 [H, W, 3], in place); returns its coverage, float32 [H, W]."""
    height, width = canvas.shape[:2]
    x0, y0 = max(0, int(place.x - place.radius) - 1), max(0, int(place.y - place.radius) - 1)
    x1, y1 = min(width, int(place.x + place.radius) + 2), min(height, int(place.y + place.radius) + 2)
    turn = np.array([[np.cos(place.angle), np.sin(place.angle)], [-np.sin(place.angle), np.cos(place.angle)]])
    rings = [ring @ turn * place.radius + (place.x - x0, place.y - y0) for ring in SHAPES[look.shape]]
    cover = _coverage(rings, y1 - y0, x1 - x0)

    column, row = np.meshgrid(np.arange(x0, x1) + 0.5 - place.x, np.arange(y0, y1) + 0.5 - place.y)
    local = np.stack([column, row], axis=-1) @ turn.T / place.radius
    second = TEXTURES[look.texture](local[..., 0], local[..., 1], 1 / place.radius)[..., None]
    main_colour, second_colour = _jittered(COLOURS[look.colour], rng)
    fill = main_colour * (1 - second) + second_colour * second
    fill = fill + rng.normal(0, 3, size=fill.shape)

    region = canvas[y0:y1, x0:x1]
    region += cover[..., None] * (fill - region)
    full = np.zeros((height, width), dtype=np.float32)
    full[y0:y1, x0:x1] = cover
    return full


def _coverage(rings: Rings, height: int, width: int) -> np.ndarray:
    """The share of each pixel inside the outer ring and outside the holes, float32 [height, width]."""
    plane = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    draw = ImageDraw.Draw(plane)
    for k, ring in enumerate(rings):
        draw.polygon([tuple(point) for point in ring * OVERSAMPLING], fill=255 if k == 0 else 0)
    return np.asarray(plane.reduce(OVERSAMPLING), dtype=np.float32) / 255


def _jittered(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The colour under slightly varied light, and the darker or lighter one its texture is drawn with."""
    main = np.array(colour) * rng.uniform(0.88, 1.08) + rng.uniform(-10, 10, size=3)
    luminance = np.array(colour) @ (0.299, 0.587, 0.114)
    second = 0.3 * main if luminance > 110 else 0.35 * main + 0.65 * 255
    return main, second


def outlines(visible: np.ndarray) -> list[list[float]]:
    """Polygons [x0, y0, x1, y1, ...] around where the coverage [H, W] exceeds one half, to 0.01 pixels.

    Separate parts give separate polygons. COCO polygons have no holes: a hole is joined to its outer ring by
    a bridge that is run along there and back, which an even-odd fill does not see.
    """
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    if len(rows) == 0:
        return []
    top, left = rows[0], columns[0]
    padded = np.pad(visible[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    # Sample p of the padded array is the centre of pixel p - 1.
    shift = np.array([left - 0.5, top - 0.5])
    filled = contourpy.contour_generator(z=padded, fill_type="OuterOffset").filled(0.5, 2.0)
    polygons = []
    for points, offsets in zip(*filled, strict=True):
        outer, *holes = (_simplify(points[a : b - 1] + shift) for a, b in pairwise(offsets))
        if _area(outer) < SMALLEST_PART:
            continue
        for hole in holes:
            if _area(hole) >= SMALLEST_PART:
                outer = _bridge(outer, hole)
        polygons.append([round(float(value), 2) for value in outer.ravel()])
    return polygons


def _area(ring: np.ndarray) -> float:
    x, y = ring.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _simplify(ring: np.ndarray) -> np.ndarray:
    """Without vertices close to the line between their neighbours; no two neighbours go in one pass."""
    for start in (0, 1) * 4:
        if len(ring) < 8:
            break
        before, after = np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0)
        chord, arm = after - before, ring - before
        cross = np.abs(chord[:, 0] * arm[:, 1] - chord[:, 1] * arm[:, 0])
        needless = cross < TOLERANCE * np.linalg.norm(chord, axis=1)
        needless[1 - start :: 2] = False
        needless[-1] = False  # with an odd count, first and last are neighbours of one parity
        ring = ring[~needless]
    return ring


def _bridge(outer: np.ndarray, hole: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(outer[:, None] - hole[None], axis=2)
    i, j = np.unravel_index(distance.argmin(), distance.shape)
    return np.concatenate([outer[: i + 1], np.roll(hole, -j, axis=0), hole[j : j + 1], outer[i:]])
