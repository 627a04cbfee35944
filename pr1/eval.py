"""A task's metrics of a model, or of a file of predictions.

    torchrun pr1/eval.py --task det --data instances_val2017.json --images val2017 --model DIR_OR_ID --predictions out.jsonl
    python pr1/eval.py --task det --data instances_val2017.json --predictions out.jsonl

With --model (or without --predictions) the model answers greedily and --predictions is written; otherwise the file is
read: JSON lines as written here, or COCO's results JSON. Without --data the held-out rendered scenes are used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pr1.assemble import build_policy, build_task, check_prompts, load_eval_data, load_model_family
from pr1.config import Config, build_parser, config_from
from pr1.predict import evaluate
from pr1.predictions import write_predictions
from pr1.world import start_world


def answer_and_score(cfg: Config, predictions: str | None, world) -> dict:
    """Greedy answers of the model on --data; writes `predictions`. Returns the metrics."""
    say = print if world.main else (lambda *_: None)
    if predictions and world.main and not Path(predictions).absolute().parent.is_dir():
        raise ValueError(f"--predictions {predictions}: its folder does not exist")
    task = build_task(cfg)
    family = load_model_family(cfg, task, say)
    records = load_eval_data(cfg, task, say)
    check_prompts(cfg, task, family, records, "data", say)
    policy = build_policy(cfg, family, world)
    metrics, lines = evaluate(policy, task, records, cfg, world)
    if predictions and world.main:
        write_predictions(predictions, lines, getattr(records, "category_ids", None))
        say(f"predictions: {predictions}")
    return metrics


def score_file(cfg: Config, predictions: str) -> dict:
    """The metrics of a predictions file against --data; no model and no images are needed."""
    if cfg.eval_data is None:
        raise ValueError(f"--predictions {predictions}: the annotations to compare with are missing (--data)")
    task = build_task(cfg)
    records = task.load(cfg.eval_data, None)
    return task.evaluate(task.read_predictions(predictions, records), records)


NOTES = {"ap": "every box scored 1.0", "ap_scored": "bbox AP by the boxes' own scores"}


def show(metrics: dict) -> None:
    """A table for people, then one line of JSON for programs."""
    for name, value in metrics.items():
        print(f"{name:>12}  {'-' if value is None else format(value, '.15g'):<18} {NOTES.get(name, '')}".rstrip())
    print(json.dumps(metrics))


def main(argv: list[str] | None = None) -> int:
    parser = build_parser("eval.py", __doc__)
    parser.add_argument(
        "--predictions", metavar="FILE", help="JSONL of predictions: written with --model, read without"
    )
    flags = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    predictions = flags.pop("predictions")
    world = None
    try:
        if "data" in flags:  # --data names what to evaluate on
            flags["eval_data"], flags["eval_images"] = flags["data"], flags.pop("images", None)
        flags.setdefault("eval_samples", 0)
        cfg = config_from(flags)
        if predictions and not cfg.model:
            show(score_file(cfg, predictions))
            return 0
        world = start_world()
        metrics = answer_and_score(cfg, predictions, world)
        if world.main:
            show(metrics)
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if world:
            world.close()


if __name__ == "__main__":
    sys.exit(main())
