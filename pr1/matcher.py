"""Optimal assignment for whole batches, and boxes matched to ground truth. The only Python file that touches `pr1._C`.

`linear_sum_assignment_batch` takes cost matrices; `match_boxes` takes boxes and makes the costs itself. Both solve
every problem to optimality (shortest augmenting paths, csrc/solve.h) in one call that releases the GIL.

Two environment variables are read at each call. PR1_THREADS: how many threads a batch may use (else OMP_NUM_THREADS,
else the cores this process may run on, at most 16); a batch of less than about 0.2 ms stays on the calling thread.
PR1_ISA: avx512, avx2 or scalar, instead of the best this machine has. Neither changes a result. A value that cannot be
used is a ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pr1 import _C

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
HALF = (np.dtype(np.float16), torch.float16, torch.bfloat16, torch.float32)  # what is solved in float32, besides SINGLE


def linear_sum_assignment_batch(costs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest complete assignment of each cost matrix.

    costs: a (B, m, n) array, or a list of (m_i, n_i) arrays; NumPy arrays, CPU tensors or nested lists, any real dtype.
    float32, float16 and bfloat16 are solved in float32, everything else in float64. Empty problems (0 rows, 0 columns,
    B = 0) are legal. +inf forbids a pair. C-contiguous float32 and float64 arrays are read where they are.

    Returns (rows, cols, offsets), int64: problem i is the pairs offsets[i]:offsets[i+1] of rows and cols, min(m_i, n_i)
    of them, rows ascending. offsets has B + 1 entries.

    The total is the least there is: exactly for whole numbers (float32 ones whose sums it could not hold are solved in
    float64), else to rounding in the dtype it is solved in.

    Ties: the result depends on the problem's own costs only, not on threads or instruction set. The shorter side (rows
    when square) goes first: each row in order takes its cheapest column if it is free, of equally cheap ones the lowest
    free one. If rows are left over they are served by shortest augmenting paths in the order csrc/solve.h states; of
    equally short paths one that ends in a free column wins over one that goes on, then the lowest index. So a constant matrix gives the pairs (0, 0), (1, 1), ...

    Raises ValueError naming the problem when it holds NaN or -inf, when it has no complete assignment without a
    forbidden pair, or when it is not a real matrix.
    """
    if _ndim(costs) == 3:
        return _C.assign_stack(_as_costs(costs, "costs"))
    if _ndim(costs) is not None:
        shape = tuple(costs.shape)
        raise ValueError(f"costs must have 3 dimensions (B, m, n), got shape {shape}; pass one matrix as costs[None]")
    problems = [_as_costs(cost, "problem", i) for i, cost in enumerate(costs)]
    for i, cost in enumerate(problems):
        if cost.ndim != 2:
            raise ValueError(f"problem {i}: a cost matrix has 2 dimensions, got shape {cost.shape}")
    return _C.assign_list(problems)


def settings() -> tuple[str, int]:
    """The instruction set and the number of threads a batch would use now. Raises ValueError as a batch would."""
    return _C.settings()


@dataclass(frozen=True)
class Boxes:
    """Boxes of B problems, packed: problem i is the rows offsets[i]:offsets[i+1]."""

    boxes: np.ndarray  # (M, 4) float, xyxy pixels
    labels: np.ndarray  # (M,) int64
    offsets: np.ndarray  # (B + 1,) int64, from 0 to M
    ignore: np.ndarray | None = None  # (M,) bool: never matched; on the ground truth side, an ignore region

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
    ignored: np.ndarray  # (M,) bool per predicted box, packed as they are: see match_boxes


def match_boxes(pred: Boxes, gt: Boxes, sizes, cost: MatchCost = MatchCost()) -> Match:  # noqa: B008 (frozen)
    """Matches predicted boxes to ground truth, one to one, optimally.

    pred, gt: the same B problems; sizes: (B, 2) image (width, height) in pixels.

    The result is the cheapest assignment among those with the most legal pairs: number of pairs first, then total cost,
    compared exactly as two ranks. (Cost alone would match nothing, since every pair costs something.) Boxes without a
    legal partner stay unmatched. A pair is illegal when either box is ignored or is no box (below), or by `cost`.
    Costs and table are float64. Ties depend on the problem's own boxes only, not on threads or instruction set.

    `ignored` says of each predicted box whether more than half of its own area lies inside one ground truth box of its
    label that has the ignore flag (COCO's crowd regions); of a matched box too.

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
    if batch and not (sizes.min() >= 1 and sizes.max() <= 1e6):  # a NaN fails
        i = np.flatnonzero(~((sizes >= 1) & (sizes <= 1e6)).all(1))[0]
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


def _as_costs(cost, name: str, index: int | None = None) -> np.ndarray:
    """C-contiguous float32 or float64. Errors call it `name`, or `name` and its index."""
    if type(cost) is np.ndarray and cost.dtype in (SINGLE, DOUBLE) and cost.flags.c_contiguous:
        return cost
    name = name if index is None else f"{name} {index}"
    if isinstance(cost, torch.Tensor):
        if cost.device.type != "cpu":
            raise ValueError(f"{name}: the matcher runs on the CPU, got a tensor on {cost.device}; pass cost.cpu()")
        if cost.is_complex():
            raise ValueError(f"{name}: costs must be real, got {cost.dtype}")
        dtype = torch.float32 if cost.dtype in HALF else torch.float64
        return np.ascontiguousarray(cost.detach().to(dtype).numpy())
    try:
        array = np.asarray(cost)
        if np.iscomplexobj(array):
            raise TypeError(f"costs must be real, got {array.dtype}")
        return np.ascontiguousarray(array, SINGLE if array.dtype == SINGLE or array.dtype in HALF else DOUBLE)
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
    if (
        offsets.ndim != 1
        or not len(offsets)
        or offsets[0] != 0
        or offsets[-1] != count
        or (offsets[1:] < offsets[:-1]).any()
    ):
        raise ValueError(f"{name}.offsets must rise from 0 to {count}, the number of boxes, got {offsets.tolist()[:8]}")
    return _C.BoxBatch(xyxy, labels, offsets, ignore)
