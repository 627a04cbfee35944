"""Optimal assignment for whole batches, and boxes matched to ground truth. The only Python file that touches `pr1._C`.

`linear_sum_assignment_batch` takes cost matrices; `match_boxes` takes boxes and makes the costs itself. Both solve
every problem to optimality in float64 (shortest augmenting paths, csrc/lsap.h) in one call that releases the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pr1 import _C


def linear_sum_assignment_batch(costs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest complete assignment of each cost matrix.

    costs: a (B, m, n) array, or a list of (m_i, n_i) arrays; NumPy arrays, CPU tensors or nested lists, any real dtype
    (solved in float64). Empty problems (0 rows, 0 columns, B = 0) are legal. +inf forbids a pair.

    Returns (rows, cols, offsets), int64: problem i is the pairs offsets[i]:offsets[i+1] of rows and cols, min(m_i, n_i)
    of them, rows ascending. offsets has B + 1 entries.

    Ties: the result depends on the problem's own costs only. The shorter side (rows when square) is assigned in index
    order; of equally short augmenting paths one that ends in a free column wins over one that goes on, then the lowest
    index. So a constant matrix gives the pairs (0, 0), (1, 1), ...

    Raises ValueError naming the problem when it holds NaN or -inf, when it has no complete assignment without a
    forbidden pair, or when it is not a real matrix.
    """
    if _ndim(costs) == 3:
        stack = _as_costs(costs, "costs")
        flat, shapes = stack.reshape(-1), np.tile(np.array(stack.shape[1:], np.int64), (len(stack), 1))
    else:
        if _ndim(costs) is not None:
            shape = tuple(costs.shape)
            raise ValueError(
                f"costs must have 3 dimensions (B, m, n), got shape {shape}; pass one matrix as costs[None]"
            )
        problems = [_as_costs(cost, f"problem {i}") for i, cost in enumerate(costs)]
        for i, cost in enumerate(problems):
            if cost.ndim != 2:
                raise ValueError(f"problem {i}: a cost matrix has 2 dimensions, got shape {cost.shape}")
        flat = np.concatenate([cost.reshape(-1) for cost in problems]) if problems else np.zeros(0)
        shapes = np.array([cost.shape for cost in problems], np.int64).reshape(-1, 2)
    return _C.assign_batch(flat, shapes)


@dataclass(frozen=True)
class Boxes:
    """Boxes of B problems, packed: problem i is the rows offsets[i]:offsets[i+1]."""

    boxes: np.ndarray  # (M, 4) float, xyxy pixels
    labels: np.ndarray  # (M,) int64
    offsets: np.ndarray  # (B + 1,) int64, from 0 to M
    ignore: np.ndarray | None = None  # (M,) bool: never matched; None means no such box

    @classmethod
    def pack(cls, boxes, labels, ignore=None) -> Boxes:
        """Packs lists with an (m_i, 4) array, an (m_i,) label array and, for ignore, an (m_i,) flag array a problem."""
        offsets = np.cumsum([0, *map(len, boxes)], dtype=np.int64)
        flags = None if ignore is None else _join(ignore, bool)
        return cls(_join(boxes, np.float64).reshape(-1, 4), _join(labels, np.int64), offsets, flags)


@dataclass(frozen=True)
class MatchCost:
    """The cost of matching a predicted box to a ground truth box, and which pairs are illegal.

    cost = l1 * L1 + giou * (1 - GIoU) + cls * [labels differ]: DETR's matching cost (Carion et al., ECCV 2020,
    arXiv 2005.12872, section 3.1) with hard labels. L1 is over (centre x, centre y, width, height), x and width divided
    by the image's width, y and height by its height. GIoU: Rezatofighi et al., CVPR 2019, arXiv 1902.09630.
    """

    l1: float = 5.0
    giou: float = 2.0
    cls: float = 2.0
    forbid_other_class: bool = False  # pairs of different labels are illegal
    min_iou: float = 0.0  # pairs of less IoU are illegal; 0: none

    def __post_init__(self):
        for name in ("l1", "giou", "cls"):
            value = getattr(self, name)
            if not 0 <= value <= 1e6:
                raise ValueError(f"MatchCost.{name} must be between 0 and 1e6, got {value}")
        if not 0 <= self.min_iou <= 1:
            raise ValueError(f"MatchCost.min_iou must be between 0 and 1, got {self.min_iou}")


@dataclass(frozen=True)
class Match:
    """Pairs of B problems and their pairwise IoU. Indices are local to each problem."""

    rows: np.ndarray  # (K,) int64 predicted boxes, ascending within a problem
    cols: np.ndarray  # (K,) int64 ground truth boxes
    offsets: np.ndarray  # (B + 1,) int64: problem i has the pairs offsets[i]:offsets[i+1]
    iou: np.ndarray  # (K,) float64 IoU of the pairs
    table: np.ndarray  # (sum m_i * n_i,) float64 IoU of every pair, row-major (m_i, n_i) per problem
    table_offsets: np.ndarray  # (B + 1,) int64


def match_boxes(pred: Boxes, gt: Boxes, sizes, cost: MatchCost = MatchCost()) -> Match:  # noqa: B008 (frozen)
    """Matches predicted boxes to ground truth, one to one, optimally.

    pred, gt: the same B problems; sizes: (B, 2) image (width, height) in pixels.

    The result is the cheapest assignment among those with the most legal pairs: number of pairs first, then total cost,
    compared exactly as two ranks. (Cost alone would match nothing, since every pair costs something.) Boxes without a
    legal partner stay unmatched. A pair is illegal when either box is ignored or is no box (below), or by `cost`.
    Ties go as in `linear_sum_assignment_batch`.

    A box that is inverted or without area, and a predicted one with a coordinate that is NaN, infinite or beyond 1e6
    pixels, is no box: its IoU with everything is 0 and it has no partner. No prediction raises.

    Raises ValueError when shapes disagree, and naming the problem when a size is not between 1 and 1e6 pixels or a
    ground truth coordinate is NaN, infinite or beyond 1e6 pixels.
    """
    pred_batch, gt_batch = _as_box_batch(pred, "pred"), _as_box_batch(gt, "gt")
    sizes = np.ascontiguousarray(sizes, np.float64)
    batch = len(pred.offsets) - 1
    if len(gt.offsets) - 1 != batch or sizes.shape != (batch, 2):
        raise ValueError(
            f"pred holds {batch} problems, gt {len(gt.offsets) - 1}, and sizes has shape {sizes.shape}; "
            "they must agree, sizes being (B, 2)"
        )
    wrong = np.flatnonzero(~((sizes >= 1) & (sizes <= 1e6)).all(1))
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"problem {i}: image size {sizes[i].tolist()} must be (width, height) between 1 and 1e6 pixels"
        )
    weights = _C.MatchWeights(cost.l1, cost.giou, cost.cls, cost.forbid_other_class, cost.min_iou)
    return Match(*_C.match_batch(pred_batch, gt_batch, sizes, weights))


def _join(parts, dtype) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part).ravel().astype(dtype) for part in parts)])


def _ndim(costs) -> int | None:
    """Dimensions of an array or tensor; None for anything else, which is read as a list of problems."""
    return costs.ndim if isinstance(costs, (np.ndarray, torch.Tensor)) else None


def _as_costs(cost, name: str) -> np.ndarray:
    if isinstance(cost, torch.Tensor):
        if cost.device.type != "cpu":
            raise ValueError(f"{name}: the matcher runs on the CPU, got a tensor on {cost.device}; pass cost.cpu()")
        if cost.is_complex():
            raise ValueError(f"{name}: costs must be real, got {cost.dtype}")
        return np.ascontiguousarray(cost.detach().to(torch.float64).numpy())
    try:
        array = np.asarray(cost)
        if np.iscomplexobj(array):
            raise TypeError(f"costs must be real, got {array.dtype}")
        return np.ascontiguousarray(array, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: costs cannot be read as a matrix of numbers: {error}") from error


def _as_box_batch(boxes: Boxes, name: str) -> _C.BoxBatch:
    xyxy = np.ascontiguousarray(boxes.boxes, np.float64)
    labels = np.ascontiguousarray(boxes.labels, np.int64)
    offsets = np.ascontiguousarray(boxes.offsets, np.int64)
    ignore = None if boxes.ignore is None else np.ascontiguousarray(boxes.ignore, bool)
    count = len(xyxy)
    if xyxy.shape != (count, 4):
        raise ValueError(f"{name}.boxes must be (M, 4), got shape {xyxy.shape}")
    if labels.shape != (count,) or (ignore is not None and ignore.shape != (count,)):
        flags = "" if ignore is None else f", ignore {ignore.shape}"
        raise ValueError(f"{name}: {count} boxes need as many labels and flags, got labels {labels.shape}{flags}")
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name}.offsets must rise from 0 to {count}, the number of boxes, got {offsets.tolist()[:8]}")
    return _C.BoxBatch(xyxy, labels, offsets, ignore)
