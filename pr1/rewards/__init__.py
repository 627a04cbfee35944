"""Rewards as functions of boxes, labels and counts, for whole batches at once. They know no text and no task.

`score` is what detection is paid, under any preset of `PRESETS`; `count_set` and `count_paper` are what counting is
paid, `aligned_iou` and `quality` what grounding is. Every reward is a weighted sum of named parts, which are logged.
"""

from pr1.rewards.counting import COUNT_PAPER, COUNT_SET, count_paper, count_set
from pr1.rewards.detection import PRESETS, score
from pr1.rewards.tables import aligned_iou, check_weights, quality, weigh

__all__ = ["COUNT_PAPER", "COUNT_SET", "PRESETS", "aligned_iou", "check_weights", "count_paper", "count_set", "quality",
           "score", "weigh"]  # fmt: skip
