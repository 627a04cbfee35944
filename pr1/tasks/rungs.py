"""Constructed detection answers for the reward lint: from exact to worse along one axis each.

Items are (label, box in text units). All rungs stay in whole text units, which is what a policy can write.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pr1.records import Frame, Sample

Items = Sequence[tuple[str, tuple[int, ...]]]

SHIFTS = (0.02, 0.1, 0.3)  # of the box
UNKNOWN = "something else"  # a label where every class of the data set is in the image


def box_ladders(items: Items, sample: Sample) -> dict[str, list[list]]:
    """{axis: rungs}, each from the exact items to worse ones; equal rungs may follow each other (small n, small boxes).

    location: every box, and one box alone, moved by 2, 10 and 30 % of its longer side, along it, at least one unit.
    recall: 0, 1, n / 2, n - 1 and n missed. precision: 0, 1 and n spurious boxes, of a class that is there.
    duplicates: every box once, twice, ten times, but not those in an ignore region of their class, where copies count
    neither way. label: none, one, all wrong, of a class that is not in the image.
    tenfold, for n >= 3: one missed beats ten of each, and one spurious beats them. whole image: one box of all of it.
    wrong frame: the boxes in the units of the other families.
    """
    items, frame, n = list(items), sample.frames[0], len(items)
    label = items[0][0] if items else [*sample.target.categories, UNKNOWN][0]
    extra = spurious(max(n, 1), label, sample)
    ladders = {"precision": [items, items + extra[:1], items + extra[:n] if n else items + extra]}
    if not items:
        return ladders
    # One box where the next one can take its place proves nothing, so each goes its own way.
    moved = {share: [(name, moved_box(box, share, 1 - 2 * (i % 2))) for i, (name, box) in enumerate(items)]
             for share in SHIFTS}  # fmt: skip
    largest = max(range(n), key=lambda i: max(np.subtract(items[i][1][2:], items[i][1][:2])))
    alone = [[*items[:largest], moved[share][largest], *items[largest + 1 :]] for share in SHIFTS]
    absent = [name for name in sample.target.categories if name not in sample.target.labels]
    flags = inside_ignored(items, sample)
    repeated = [item for item, ignored in zip(items, flags, strict=True) if not ignored]
    wrong = [((absent or [UNKNOWN])[0], box) for _, box in items]
    ladders |= {
        "location": [items, *moved.values()],
        "location of one": [items, *alone],
        "recall": [items[k:] for k in sorted({0, 1, n // 2, n - 1, n})],
        "duplicates": [items + repeated * k for k in (0, 1, 9)],
        "label": [items, wrong[:1] + items[1:], wrong],
        "whole image": [items, [(label, (0, 0, *frame.text_size))]],
        "wrong frame": [items, [(name, other_units(box, frame)) for name, box in items]],
    }
    if n >= 3 and len(repeated) == n:
        ladders["tenfold, one missed"] = [items, items[1:], items * 10]
        ladders["tenfold, one spurious"] = [items, items + extra[:1], items * 10]
    return ladders


def moved_box(box: tuple[int, ...], share: float, sign: int) -> tuple[int, ...]:
    """A box moved along its longer side by a share of it, at least one unit. By up to 30 % its IoU stays above .5, so
    two different rungs never are worth 0 both; that holds for no shift of a box along its shorter side."""
    sides = box[2] - box[0], box[3] - box[1]
    axis = int(sides[1] > sides[0])
    step = sign * max(1, round(share * sides[axis]))
    return tuple(v + step * (k % 2 == axis) for k, v in enumerate(box))


def inside_ignored(items: Items, sample: Sample) -> np.ndarray:
    """(n,) bool: half of the item lies in an ignore region of its class."""
    target, regions = sample.target, sample.frames[0].scale_to_text(sample.target.boxes)
    inside = np.zeros(len(items), bool)
    for j in np.flatnonzero(target.ignore):
        for i, (label, box) in enumerate(items):
            sides = np.clip(np.minimum(box[2:], regions[j, 2:]) - np.maximum(box[:2], regions[j, :2]), 0, None)
            inside[i] |= label == target.labels[j] and sides.prod() >= 0.5 * np.subtract(box[2:], box[:2]).prod()
    return inside


def other_units(box: tuple[int, ...], frame: Frame) -> tuple[int, ...]:
    """The box in thousandths of the image; where those are the frame's own units, in pixels the model sees."""
    other = (1000, 1000) if frame.text_size != (1000, 1000) else (frame.model_width, frame.model_height)
    return tuple(round(v * other[k % 2] / frame.text_size[k % 2]) for k, v in enumerate(box))


def spurious(n: int, label: str, sample: Sample) -> list[tuple[str, tuple[int, ...]]]:
    """n boxes of a class that hardly touch a target (IoU < .1) or an ignore region, on ever finer grids; where there is
    no such place, of an unknown class."""
    frame, target = sample.frames[0], sample.target
    width, height = frame.text_size
    gt = frame.scale_to_text(target.boxes)
    found: list[tuple[str, tuple[int, ...]]] = []
    for parts in (8, 16, 32, 64):
        xs, ys = np.linspace(0, width, parts + 1).astype(int), np.linspace(0, height, parts + 1).astype(int)
        x, y = (v.ravel() for v in np.meshgrid(np.arange(parts), np.arange(parts)))
        grid = np.stack([xs[x], ys[y], xs[x + 1], ys[y + 1]], 1)
        a, b = grid[:, None], gt[None]
        overlap = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
        own, theirs = ((v[..., 2:] - v[..., :2]).prod(-1) for v in (a, b))
        iou = overlap / np.maximum(own + theirs - overlap, 1e-9)
        clear = (np.where(target.ignore, overlap / np.maximum(own, 1e-9), iou) < 0.1).all(1) & (own[:, 0] > 0)
        found += [(label, tuple(box)) for box in grid[clear].tolist()]
        if len(found) >= n:
            return found[:n]
    return found + [(UNKNOWN, (0, 0, 1 + k % width, 1 + k // width)) for k in range(n - len(found))]
