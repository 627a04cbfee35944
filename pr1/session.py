"""What surrounds the algorithm: the run folder, evaluation, checkpoints, resumption, progress."""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
from pathlib import Path

import torch

from pr1.assemble import (
    build_policy,
    build_reference,
    build_task,
    check_prompts,
    load_eval_data,
    load_model_family,
    load_train_data,
)  # fmt: skip
from pr1.checkpoint import (
    load_trainer_state,
    newest_checkpoint,
    remove_stale,
    save_checkpoint,
    save_trainer_state,
)  # fmt: skip
from pr1.config import RESUMABLE, Config, parse_config
from pr1.lint import lint_before_training
from pr1.optim import Optimizer
from pr1.predict import evaluate, report_samples
from pr1.progress import Progress
from pr1.report import add_samples, write_report
from pr1.runfolder import open_run
from pr1.sampler import PromptSampler
from pr1.world import World, start_world

TRAINER_STATE = "trainer_state.pt"


class Session:
    """A run in progress. `start` is the first step to do; `records` and `held_out` are its data."""

    def __init__(self, cfg: Config, world: World):
        self.cfg, self.world = cfg, world
        say = print if world.main else (lambda *_: None)
        if cfg.deterministic:
            if world.device.type == "cuda" and (cfg.top_p < 1 or cfg.top_k):
                raise ValueError(
                    "--deterministic: --top-p and --top-k have no deterministic kernel on a GPU; leave one out"
                )
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
            torch.use_deterministic_algorithms(True)
        self.task = build_task(cfg)
        self.family = load_model_family(cfg, self.task, say)
        self.records = load_train_data(cfg, self.task, say)
        self.held_out = load_eval_data(cfg, self.task, say)
        check_prompts(cfg, self.task, self.family, self.records, "training data", say)
        if self.held_out is not None:
            check_prompts(cfg, self.task, self.family, self.held_out, "held-out data", say)
        lint_before_training(self.task, self.family, self.records, say)
        self.folder = open_run(
            cfg.run_dir, dataclasses.asdict(cfg), task=self.task.name, resume=cfg.resume, rank=world.rank,
            may_change=RESUMABLE, tensorboard=cfg.tensorboard, wandb=cfg.wandb,
        )  # fmt: skip
        if world.main:
            remove_stale(self.folder.path)
        checkpoint = newest_checkpoint(self.folder.path) if cfg.resume else None
        self.policy = build_policy(cfg, self.family, world, weights=checkpoint)
        self.reference = build_reference(cfg, self.family, world, self.policy)
        self.optimizer = Optimizer(self.policy, cfg)
        self.sampler = PromptSampler(len(self.records), cfg.seed)
        self.start = self._restore(checkpoint)
        say(f"run folder: {self.folder.path}" + (f", resumed at step {self.start}" if cfg.resume else ""))
        self.progress = Progress(cfg.steps, start=self.start, enabled=world.main)
        gc.freeze()  # what has been loaded stays: going through it again costs a fifth of a second each time
        self.pending = {}  # evaluation metrics that go into the next line
        self.before, self.after = None, None

    def _restore(self, checkpoint: Path | None) -> int:
        if checkpoint is None:
            if self.cfg.resume:
                self.folder.rewind(0)
            return 0
        state = load_trainer_state(checkpoint / TRAINER_STATE)
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.folder.rewind(state["step"])
        return state["step"]

    def due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def evaluate_due(self, step: int) -> bool:
        """Before the first step, every eval_every steps, and after the last."""
        every = self.cfg.eval_every
        return self.held_out is not None and every >= 0 and (step in (0, self.cfg.steps) or self.due(step, every))

    def evaluate(self, step: int) -> None:
        label = f"step {step}: evaluating"
        metrics, predictions = evaluate(self.policy, self.task, self.held_out, self.cfg, self.world, label)
        self.pending = {f"eval/{name}": value for name, value in metrics.items()}
        if self.world.main:
            samples = report_samples(self.task, predictions, self.held_out, self.cfg.report_samples)
            add_samples(self.folder.path, step, samples)
            self.progress.say(f"step {step}: held-out " + headline(metrics))
        self.before = self.before or (step, metrics)
        self.after = (step, metrics)

    def log(self, step: int, metrics: dict) -> None:
        """One line of metrics.jsonl, the evaluation made before this step included."""
        self.folder.write({"step": step, **metrics, **self.pending})
        self.pending = {}
        self.progress.update(step, metrics)

    def save_due(self, step: int) -> bool:
        return step == self.cfg.steps or self.due(step, self.cfg.save_every)

    def save(self, step: int) -> None:
        """Writes checkpoints/step-N: a folder `from_pretrained` loads, with the trainer's state beside the weights."""
        if self.world.main:
            save_checkpoint(self.folder.path, step, lambda tmp: self._write(tmp, step), self.cfg.keep_checkpoints)
        self.world.barrier()

    def _write(self, folder: Path, step: int) -> None:
        self.policy.model.save_pretrained(folder)
        self.family.save_pretrained(folder)
        state = {"step": step, "optimizer": self.optimizer.state_dict(), "sampler": self.sampler.state_dict()}
        save_trainer_state(folder / TRAINER_STATE, state)

    def close(self) -> None:
        """The evaluation after the last step, the report, and a last word."""
        if self.evaluate_due(self.cfg.steps):
            self.evaluate(self.cfg.steps)
            self.folder.write({"step": self.cfg.steps, **self.pending})
        self.progress.close()
        self.folder.close()
        if self.world.main:
            report = write_report(self.folder.path)
            if self.before and self.after and self.before[0] != self.after[0]:
                print(f"held-out before: {headline(self.before[1])}")
                print(f"held-out after:  {headline(self.after[1])}")
            print(f"checkpoint: {newest_checkpoint(self.folder.path)}")
            print(f"report: {report}")


def headline(metrics: dict) -> str:
    """Evaluation metrics in one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None)


def run_program(argv: list[str], prog: str, description: str, body) -> int:
    """Parses flags, opens the session and runs `body(session)`. Bad input ends in one line on stderr and status 2."""
    world = None
    try:
        try:
            cfg = parse_config(argv, prog, description)
            world = start_world()
            run = Session(cfg, world)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        body(run)
        return 0
    finally:
        if world:
            world.close()
