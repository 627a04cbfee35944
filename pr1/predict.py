"""Greedy answers on a set of records, and the metrics of a task on them."""

from __future__ import annotations

import math

import numpy as np

from pr1.kernels import Sampling
from pr1.progress import track
from pr1.report import encode_image
from pr1.rollout import stream


def item_score(logp: np.ndarray, spans: list[tuple[int, int]], start: int, end: int) -> float:
    """Geometric mean of the probabilities of the tokens that wrote text[start:end].

    logp: (C,) log-probs of the completion's tokens; spans: their character spans.
    """
    inside = [lp for lp, (a, b) in zip(logp, spans) if a < end and b > start]
    return math.exp(float(np.mean(inside))) if inside else 0.0


def prediction(task, family, sample, rollout) -> dict:
    """One line of a predictions file: boxes in original pixels, each with the policy's own score."""
    ids = rollout.completion_ids[:-1] if rollout.finished else rollout.completion_ids
    spans, logp = family.token_spans(ids), rollout.logp_rollout.numpy()
    items = [
        {"label": found.label, "bbox": [float(x) for x in found.xyxy],
         "score": item_score(logp, spans, found.start, found.end)}
        for found in task.boxes(rollout.text, sample) if found.valid
    ]  # fmt: skip
    frame, image_id = sample.frames[0], getattr(sample.target, "image_id", None)
    return {"id": sample.id, **({} if image_id is None else {"image_id": image_id}), "width": frame.width,
            "height": frame.height, "text": rollout.text, "items": items}  # fmt: skip


def predict(policy, task, records, cfg, world, label: str = "evaluating") -> list[dict]:
    """Greedy predictions on all records, in order, on every rank; each rank answers a contiguous share."""
    sampling = Sampling(temperature=0.0, max_new_tokens=cfg.max_new_tokens)
    share, lines = world.share(len(records)), []
    open_samples = {}  # by index, from the building to the scoring

    def prompts():
        for i in share:
            open_samples[i] = task.build(records[i], policy.family)
            yield policy.family.encode(open_samples[i])

    groups = stream(policy, prompts(), 1, sampling, seed=0, step=0, count=len(share), first=share.start,
                    batch=cfg.rollout_batch, cache_mb=cfg.rollout_cache_mb,
                    max_prompt_tokens=cfg.max_prompt_tokens)  # fmt: skip
    for (rollout,) in track(groups, label, len(share)) if world.main else groups:
        sample = open_samples.pop(rollout.prompt)
        rewards, _ = task.reward([[rollout.text]], [sample])
        line = {**prediction(task, policy.family, sample, rollout), "reward": float(rewards[0, 0])}
        lines.append((rollout.prompt, line))
    lines.sort(key=lambda each: each[0])  # they come as they are done
    return [line for part in world.gather([line for _, line in lines]) for line in part]


def evaluate(policy, task, records, cfg, world, label: str = "evaluating") -> tuple[dict, list[dict]]:
    """({metric: value}, predictions): the task's metrics and the mean reward of the greedy answers."""
    predictions = predict(policy, task, records, cfg, world, label)
    metrics = task.evaluate(predictions, records)
    return {**metrics, "reward": float(np.mean([p["reward"] for p in predictions]))}, predictions


def report_samples(task, predictions: list[dict], records, n: int) -> list[dict]:
    """The first n predictions with image and ground truth, as the report draws them."""
    samples = []
    for line, record in zip(predictions[:n], records):
        samples.append({
            "id": line["id"], "image_png_base64": encode_image(record.load()), "width": record.width,
            "height": record.height, "items": line["items"], "text": line["text"], "reward": line["reward"],
            "boxes": task.truth(record), "expected": getattr(record.target, "text", None),
        })  # fmt: skip
    return samples
