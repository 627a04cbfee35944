"""Rendered data of the tasks `ground` and `count`: scenes whose objects share few colours, each asked about one thing.

What is asked follows from (split, index) and the options alone, as the scenes themselves do.
"""

from __future__ import annotations

from dataclasses import replace

from pr1.data.scenes import LABELS, SPLITS, Draws, Scene, SceneDataset, SceneOptions
from pr1.records import BoxTarget, ImageRecord, NamedTarget

COLOUR_STREAM, ASK_STREAM = 16, 32  # of the counter-based generator; scenes use those below
SIDES = ("left", "right", "top", "bottom")
MARGIN = 8  # pixels by which an object called the left one lies further left than the next, centre to centre


class AskedScenes(SceneDataset):
    """Scenes in two or three colours. Subclasses say in `ask` what is asked about one."""

    def scene(self, index: int) -> Scene:
        scene = super().scene(index)
        draws = Draws(self.seed, COLOUR_STREAM + SPLITS.index(self.split), scene.index)
        palette = draws.shuffled(LABELS)[: draws.integer(2, 3)]
        shapes = [replace(shape, label=palette[draws.integer(0, len(palette) - 1)]) for shape in scene.shapes]
        return replace(scene, shapes=tuple(shapes))

    def __getitem__(self, index: int) -> ImageRecord:
        record, scene = super().__getitem__(index), self.scene(index)
        target, n = record.target, len(scene.shapes)
        once = replace(target, boxes=target.boxes[:n], labels=target.labels[:n], ignore=target.ignore[:n])
        name, rows = self.ask(once, Draws(self.seed, ASK_STREAM + SPLITS.index(self.split), scene.index))
        if self.options.duplicates:
            second = self._second_boxes(scene, list(map(tuple, once.boxes)))
            rows = rows + [n + j for j, (k, _) in enumerate(second) if k in rows]
        target = NamedTarget(target.boxes[rows], (name,) * len(rows), target.ignore[rows], image_id=scene.index,
                             name=name, count=len(rows))  # fmt: skip
        return replace(record, source=f"{record.source} ({name})", target=target, categories=(name,))

    def ask(self, target: BoxTarget, draws: Draws) -> tuple[str, list[int]]:
        """The objects of a scene -> what the prompt names, and which rows that is."""
        raise NotImplementedError


class GroundScenes(AskedScenes):
    """Expressions such as "red object", "left object", "top red object", each true of exactly one object of its scene,
    and in one scene of eight a colour that is absent: no such object."""

    def ask(self, target: BoxTarget, draws: Draws) -> tuple[str, list[int]]:
        choices = expressions(target)
        absent = [label for label in LABELS if label not in target.labels]
        if draws.uniform() < 0.125 or not choices:
            return f"{draws.shuffled(absent)[0]} object", []
        # Colours, sides, and both together are drawn alike, where there are any.
        kinds = [[choice for choice in choices if kind(choice[0])] for kind in (_of_colour, _of_side, _of_both)]
        pool = draws.shuffled([each for each in kinds if each])[0]
        name, row = pool[draws.integer(0, len(pool) - 1)]
        return name, [row]


def _of_both(name: str) -> bool:
    return name.count(" ") == 2


def _of_side(name: str) -> bool:
    return not _of_both(name) and name.startswith(SIDES)


def _of_colour(name: str) -> bool:
    return not _of_both(name) and not name.startswith(SIDES)


def expressions(target: BoxTarget) -> list[tuple[str, int]]:
    """Every expression of ours that is true of exactly one object, with its row."""
    centres = (target.boxes[:, :2] + target.boxes[:, 2:]) / 2
    found = []
    for colour in ("", *dict.fromkeys(target.labels)):
        rows = [i for i, label in enumerate(target.labels) if colour in ("", label)]
        if len(rows) == 1:
            found.append((f"{colour} object", rows[0]) if colour else ("object", rows[0]))
            continue
        for side, axis, sign in zip(SIDES, (0, 0, 1, 1), (1, -1, 1, -1), strict=True):
            order = sorted(rows, key=lambda i: sign * centres[i, axis])
            if abs(centres[order[0], axis] - centres[order[1], axis]) >= MARGIN:
                found.append((f"{side} {colour} object".replace("  ", " "), order[0]))
    return [(text, row) for text, row in found if text != "object"]


class CountScenes(AskedScenes):
    """Counts of the objects of one colour: of a scene's colours, or in one scene of eight of one it does not show."""

    def ask(self, target: BoxTarget, draws: Draws) -> tuple[str, list[int]]:
        shown = list(dict.fromkeys(target.labels))
        absent = [label for label in LABELS if label not in shown]
        pool = absent if draws.uniform() < 0.125 or not shown else shown
        colour = pool[draws.integer(0, len(pool) - 1)]
        return f"{colour} object", [i for i, label in enumerate(target.labels) if label == colour]


def ground_scenes(split: str, n: int, difficulty: float, duplicates: float) -> GroundScenes:
    """n scenes with at least one object, of a difficulty from 0 to 1."""
    return GroundScenes(split, n, SceneOptions.at(difficulty, min_objects=1, duplicates=duplicates))


def count_scenes(split: str, n: int, difficulty: float, duplicates: float) -> CountScenes:
    """n scenes of up to 4 (difficulty 0) to 12 objects (1)."""
    fixed = {"min_objects": 1, "max_objects": round(4 + 8 * difficulty), "min_size": round(20 - 8 * difficulty)}
    return CountScenes(split, n, SceneOptions.at(difficulty, duplicates=duplicates, **fixed))
