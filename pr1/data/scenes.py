"""Rendered scenes with exact boxes: the data of `--task det` when none is given.

A scene is a shaded ground with coloured shapes on it; the label is the colour, the shape is a distractor. The ground
loses red from left to right and blue from top to bottom, so that every patch tells roughly where it is.
Every pixel follows from (seed, split, index) alone: the numbers are raw words of a counter-based generator, the shapes
are integer arithmetic on the pixel grid, nothing is antialiased, no font and no drawing library is involved. So the
same scene has the same bytes on every machine, and its boxes are the drawn pixels, not an estimate of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from pr1.records import BoxTarget, ImageRecord

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {  # all far from the pale ground
    "red": (214, 39, 40), "blue": (31, 99, 220), "yellow": (255, 221, 30), "purple": (148, 32, 196),
    "green": (20, 140, 50), "orange": (255, 127, 14), "black": (20, 20, 20), "brown": (110, 56, 20),
}  # fmt: skip
LABELS = tuple(COLOURS)
SPLITS = ("train", "val")
LIGHT, FALL = 235, 55  # red and blue of the ground at the left and upper edge, and how much they lose on 100 px
ASPECTS = {"triangle": 1.6, "cross": 1.6}  # largest ratio of the two sides; the other shapes fit a square
ROUNDS, TRIES = 10, 60  # a layout is begun anew with smaller objects up to ROUNDS times; places tried for an object


@dataclass(frozen=True)
class SceneOptions:
    """What scenes look like. `SceneOptions.at(difficulty)` moves the fields that make them hard together.

    Raises ValueError for values outside the ranges given here.
    """

    min_objects: int = 0  # with 1 or more there are no empty scenes
    max_objects: int = 6
    min_side: int = 84  # image sides, pixels, drawn independently: the aspect varies and 28 rarely divides them
    max_side: int = 196
    min_size: int = 18  # longer side of an object, pixels; at least 12, below that the shapes look alike
    max_size: int = 80
    max_overlap: float = 0.2  # largest share of an object's pixels that later ones may cover; at most 0.4
    crowded: float = 0.15  # share of scenes filled up to max_objects; the others draw their count evenly
    empty: float = 0.04  # share of scenes without objects
    noise: int = 8  # amplitude of the uniform pixel noise, grey levels of 255
    clutter: int = 4  # largest number of faint thin strips behind the objects
    duplicates: float = 0.0  # share of objects annotated twice, the second box off by up to a tenth of its size

    def __post_init__(self):
        self._between("max_objects", 1, 100)
        self._between("min_objects", 0, self.max_objects)
        self._between("min_side", 28, self.max_side)
        self._between("min_size", 12, self.max_size)
        self._between("max_size", self.min_size, self.min_side)
        self._between("max_overlap", 0.0, 0.4)
        self._between("empty", 0.0, 1.0)
        self._between("crowded", 0.0, 1.0 - self.empty)
        self._between("duplicates", 0.0, 1.0)
        self._between("noise", 0, 64)
        self._between("clutter", 0, 100)
        # Above a third of the canvas the smallest objects no longer always find a place.
        if 3 * self.max_objects * self.min_size**2 > self.min_side**2:
            raise ValueError(
                f"SceneOptions: {self.max_objects} objects of {self.min_size} px do not fit in an image of "
                f"{self.min_side} x {self.min_side}: lower max_objects or min_size, or raise min_side"
            )

    def _between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if isinstance(low, int) and not isinstance(value, int):
            raise ValueError(f"SceneOptions.{name} = {value!r}: must be a whole number")
        if not low <= value <= high:
            raise ValueError(f"SceneOptions.{name} = {value}: must lie between {low} and {high}")

    @classmethod
    def at(cls, difficulty: float, **fixed) -> SceneOptions:
        """Options of a difficulty from 0 (up to two big objects apart on a clean ground) to 1 (up to ten, down to
        12 px, 0.4 hidden, noise and clutter). 0.5 is the default. Other fields may be `fixed` by name."""
        if not 0.0 <= difficulty <= 1.0:
            raise ValueError(f"difficulty = {difficulty}: must lie between 0 and 1")
        scaled = {
            "max_objects": round(2 + 8 * difficulty),
            "min_size": round(24 - 12 * difficulty),
            "max_overlap": 0.4 * difficulty,
            "noise": round(16 * difficulty),
            "clutter": round(8 * difficulty),
        }
        return cls(**(scaled | fixed))


@dataclass(frozen=True)
class Shape:
    """One object of a scene. Its box is [x, x + width) x [y, y + height), pixels; its mask touches all four edges."""

    name: str  # one of SHAPES
    x: int
    y: int
    width: int
    height: int
    label: str  # one of LABELS, its colour

    @property
    def mask(self) -> np.ndarray:
        return shape_mask(self.name, self.width, self.height)


@dataclass(frozen=True)
class Scene:
    """A layout: all that `render` needs."""

    width: int
    height: int
    shapes: tuple[Shape, ...]  # in drawing order: later ones lie on top
    noise: int
    clutter: int
    seed: int
    split: str
    index: int


class Draws:
    """Random numbers from the raw words of Philox, whose stream numpy guarantees (NEP 19), unlike its distributions."""

    def __init__(self, seed: int, stream: int, index: int):
        self._bits = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=[0, 0, index, 0])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) / 2**53

    def integer(self, low: int, high: int) -> int:
        """low..high, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def shuffled(self, items: Sequence) -> list:
        return [items[k] for k in np.argsort(self._bits.random_raw(len(items)), kind="stable")]

    def bytes(self, n: int) -> np.ndarray:
        """(n,) uint8."""
        return self._bits.random_raw(-(-n // 8)).astype("<u8").view(np.uint8)[:n]


@lru_cache(maxsize=4096)
def shape_mask(name: str, width: int, height: int) -> np.ndarray:
    """(height, width) bool pixels of a shape; first and last row and column are never blank (width, height >= 12)."""
    j, i = np.mgrid[0:height, 0:width]
    u, v = 2 * i - (width - 1), 2 * j - (height - 1)  # twice the distance from the centre: -(w-1) .. w-1
    if name == "square":
        mask = np.ones((height, width), bool)
    elif name == "circle":
        mask = u * u + v * v <= width * width
    elif name == "ring":
        mask = (u * u + v * v <= width * width) & (9 * (u * u + v * v) >= 4 * width * width)  # hole: 2/3 of the width
    elif name == "cross":
        mask = (3 * abs(u) <= width) | (3 * abs(v) <= height)
    elif name == "triangle":
        mask = abs(u) * (height - 1) <= j * (width - 1) + (height - 1)  # half a pixel wider, so the tip has a pixel
    elif name == "star":
        mask = _star(i, j, width)  # width == height
    else:
        raise ValueError(f"unknown shape {name!r}: one of {', '.join(SHAPES)}")
    mask.flags.writeable = False
    return mask


def _star(i: np.ndarray, j: np.ndarray, size: int) -> np.ndarray:
    """Five-pointed star: the pixels on the inner side of at least four of the pentagram's five lines."""
    tips = ((500, 0), (809, 1000), (0, 382), (1000, 382), (191, 1000))  # in drawing order, thousandths of the box
    inner = np.zeros(i.shape, int)
    for (ax, ay), (bx, by) in zip(tips, tips[1:] + tips[:1], strict=True):
        dx, dy = bx - ax, by - ay
        side = dx * (1000 * j - ay * (size - 1)) - dy * (1000 * i - ax * (size - 1))
        # 0.6 pixel wider all round: thinner tips would miss every pixel centre of the outermost rows
        inner += side >= -600 * math.isqrt(dx * dx + dy * dy)
    return inner >= 4


def _count(draws: Draws, options: SceneOptions) -> int:
    share = draws.uniform()
    if options.min_objects == 0 and share < options.empty:
        return 0
    if share >= 1.0 - options.crowded:
        return options.max_objects
    return draws.integer(max(1, options.min_objects), options.max_objects)


def _place(draws: Draws, options: SceneOptions, width: int, height: int, n: int, largest: int) -> list[Shape]:
    """Up to n shapes in drawing order, fewer where TRIES places were not enough for one."""
    owner = np.full((height, width), -1)  # which shape a pixel shows
    shapes, full, visible = [], np.zeros(n, int), np.zeros(n, int)
    for k in range(n):
        name, long = SHAPES[draws.integer(0, len(SHAPES) - 1)], draws.integer(options.min_size, largest)
        label = LABELS[draws.integer(0, len(LABELS) - 1)]
        short = round(long / draws.uniform(1.0, ASPECTS.get(name, 1.0)))
        w, h = (long, short) if draws.integer(0, 1) else (short, long)
        mask = shape_mask(name, w, h)
        for _ in range(TRIES):
            x, y = draws.integer(0, width - w), draws.integer(0, height - h)
            window = owner[y : y + h, x : x + w]
            hidden = np.bincount(window[mask] + 1, minlength=n + 1)[1:]
            if np.all(visible - hidden >= (1.0 - options.max_overlap) * full):
                window[mask] = k
                visible -= hidden
                visible[k] = full[k] = mask.sum()
                shapes.append(Shape(name, x, y, w, h, label))
                break
        else:
            break
    return shapes


def arrange(options: SceneOptions, seed: int, split: str, index: int) -> Scene:
    """The layout of scene `index`: sizes, places and colours, nothing drawn yet."""
    draws = Draws(seed, 2 * SPLITS.index(split), index)
    width, height = (draws.integer(options.min_side, options.max_side) for _ in range(2))
    n = _count(draws, options)
    shapes = []
    for round_ in range(ROUNDS if n else 0):
        # Together the boxes cover at most .75**2 of the canvas in the first round, less and less after it.
        largest = int(0.75 * math.sqrt(width * height / n) * 0.75**round_)
        shapes = _place(draws, options, width, height, n, max(options.min_size, min(options.max_size, largest)))
        if len(shapes) == n:
            break
    return Scene(width, height, tuple(shapes), options.noise, options.clutter, seed, split, index)


def paint(canvas: np.ndarray, shapes: Sequence[Shape]) -> None:
    """Draws the shapes in their order into an (H, W, 3) array, in place."""
    for s in shapes:
        canvas[s.y : s.y + s.height, s.x : s.x + s.width][s.mask] = COLOURS[s.label]


def render(scene: Scene) -> Image.Image:
    """The scene as a PIL RGB image."""
    draws = Draws(scene.seed, 2 * SPLITS.index(scene.split) + 1, scene.index)
    height, width = scene.height, scene.width
    canvas = np.empty((height, width, 3), np.int16)
    canvas[..., 0] = LIGHT - FALL * np.arange(width) // 100 + draws.integer(-8, 8)
    canvas[..., 1] = draws.integer(150, 225)
    canvas[..., 2] = LIGHT - FALL * np.arange(height)[:, None] // 100 + draws.integer(-8, 8)
    for _ in range(draws.integer(0, scene.clutter)):
        x, y, long = draws.integer(0, width - 2), draws.integer(0, height - 2), draws.integer(20, 120)
        w, h = (long, 2) if draws.integer(0, 1) else (2, long)
        canvas[y : y + h, x : x + w] += draws.integer(-25, 25)
    paint(canvas, scene.shapes)
    if scene.noise:
        grain = draws.bytes(canvas.size).reshape(canvas.shape).astype(np.int16)
        canvas += (grain * (2 * scene.noise + 1) >> 8) - scene.noise
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


class SceneDataset(Sequence):
    """`size` scenes of a split, made when indexed and drawn when loaded. Objects are listed in reading order (y1, x1).

    Scene i depends on (seed, split, i) and the options only; the two splits use different keys of the generator.
    Raises ValueError for an unknown split, a size below 1, a seed outside 0 .. 2**64 - 1.
    """

    categories = LABELS
    category_ids = {name: i for i, name in enumerate(LABELS, 1)}

    def __init__(self, split: str, size: int, options: SceneOptions | None = None, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"scene split {split!r}: must be one of {', '.join(SPLITS)}")
        if size < 1:
            raise ValueError(f"a scene dataset of {size} scenes: size must be at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"scene seed {seed}: must lie between 0 and 2**64 - 1")
        self.split, self.size, self.seed = split, size, seed
        self.options = SceneOptions() if options is None else options

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        """The layout behind record `index`; negative indices count from the end, others out of range: IndexError."""
        i = operator.index(index)
        i = i + self.size if i < 0 else i
        if not 0 <= i < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        return arrange(self.options, self.seed, self.split, i)

    def _second_boxes(self, scene: Scene, boxes: list[tuple]) -> list[tuple[int, tuple]]:
        """(object, its second box) of those a second annotator marked too, in whole pixels inside the image."""
        draws, second = Draws(self.seed, 2 * len(SPLITS) + SPLITS.index(scene.split), scene.index), []
        for k, (x1, y1, x2, y2) in enumerate(boxes):
            off = [round(draws.uniform(-0.1, 0.1) * side) for side in (x2 - x1, y2 - y1) * 2]
            if draws.uniform() < self.options.duplicates:
                box = [v + d for v, d in zip((x1, y1, x2, y2), off, strict=True)]
                ends = (scene.width, scene.height) * 2
                second.append((k, tuple(min(max(v, 0), end) for v, end in zip(box, ends, strict=True))))
        return second

    def __getitem__(self, index: int) -> ImageRecord:
        scene = self.scene(index)
        shapes = sorted(scene.shapes, key=lambda s: (s.y, s.x))
        boxes = [(s.x, s.y, s.x + s.width, s.y + s.height) for s in shapes]
        labels = [s.label for s in shapes]
        if self.options.duplicates:
            extra = self._second_boxes(scene, boxes)
            boxes, labels = boxes + [box for _, box in extra], labels + [labels[k] for k, _ in extra]
        target = BoxTarget(
            boxes=np.array(boxes, np.float64).reshape(-1, 4),
            labels=tuple(labels),
            ignore=np.zeros(len(boxes), bool),
            image_id=scene.index,
        )
        return ImageRecord(
            id=f"{self.split}-{scene.index}",
            source=f"scene {scene.index} of {self.split}",
            width=scene.width,
            height=scene.height,
            target=target,
            categories=LABELS,
            load=partial(render, scene),
        )
