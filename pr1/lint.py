"""Reward lint: does the reward rank answers rightly on this data? Constructed answers, no model is run.

    python -m pr1.lint --task det --data instances.json [--images DIR] [--reward PRESET]     also every flag of train.py

Each sample is answered along the ladders of its task (`Task.ladders`): from the exact answer to ones that are worse and
worse in one respect. The reward must fall from rung to rung, nothing may be worth more than the exact answer, and texts
without an answer must be worth 0 (`Task.zeros`). Ladders are judged on targets rounded to what the model can write
(`Task.expressible`); what rounding costs stands below the table. Exit status 1 when anything is violated, which names
the sample and the rungs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pr1.assemble import build_task, load_model_family
from pr1.config import parse_config
from pr1.progress import track

SHOWN = 5  # violations printed in full
BEFORE_TRAINING = 16  # samples looked at before a run


@dataclass
class Row:
    """One ladder over all samples."""

    samples: int = 0
    violations: list[str] = field(default_factory=list)  # one message a sample
    sums: list[float] = field(default_factory=list)  # of the rewards, by rung
    counts: list[int] = field(default_factory=list)

    def add(self, rewards: Sequence[float], problem: str | None) -> None:
        self.samples += 1
        if problem:
            self.violations.append(problem)
        for i, reward in enumerate(rewards):
            if i == len(self.sums):
                self.sums.append(0.0)
                self.counts.append(0)
            self.sums[i] += float(reward)
            self.counts[i] += 1


@dataclass
class Report:
    """What the lint of a reward found."""

    reward: str  # its name
    rows: dict[str, Row]
    unrounded: list[tuple[float, str]]  # per sample: reward of the exact answer on the target as annotated, its id

    @property
    def violations(self) -> list[str]:
        return [problem for row in self.rows.values() for problem in row.violations]

    def __str__(self) -> str:
        head = f"{'ladder':24}{'samples':>8}{'violated':>10}   mean reward by rung"
        lines = [f"reward {self.reward}", head]
        for name, row in self.rows.items():
            means = " > ".join(f"{s / n:.3f}" for s, n in zip(row.sums, row.counts, strict=True))
            lines.append(f"{name:24}{row.samples:8}{len(row.violations):10}   {means}")
        if self.unrounded:
            lowest = min(self.unrounded)
            mean = np.mean([value for value, _ in self.unrounded])
            lines.append(f"exact answers on unrounded targets: {mean:.4f} on average, {lowest[0]:.4f} at the lowest "
                         f"(sample {lowest[1]}): the resolution of the text")  # fmt: skip
        return "\n".join(lines)


def lint(task, samples: Sequence, *, progress: float = 0.0, label: str | None = None) -> Report:
    """Scores the constructed answers of every sample under the task's reward; see above. `progress`: share of the
    training done, for rewards with a schedule. `label`: of a progress bar."""
    report = Report(task.preset, {}, [])
    for sample in samples if label is None else track(samples, label):
        said, zeros = task.ladders(sample), task.zeros(sample)
        expressible = task.expressible(sample) if hasattr(task, "expressible") else sample
        texts = list(dict.fromkeys([text for rungs in said.values() for text in rungs] + list(zeros.values())))
        rewards, _ = task.reward([texts], [expressible], progress=progress)
        worth = dict(zip(texts, map(float, rewards[0]), strict=True))
        exact = next(iter(said.values()))[0]
        for name, rungs in said.items():
            values = [worth[text] for text in dict.fromkeys(rungs)]
            _row(report, name).add(values, _not_falling(sample, name, values))
        best = max(worth, key=worth.get)
        beaten = worth[best] > worth[exact]
        _row(report, "exact is best").add(
            [worth[exact]],
            f"sample {sample.id}: worth {worth[best]:.4f}, the exact answer {worth[exact]:.4f}: {best[:200]!r}"
            if beaten else None,
        )  # fmt: skip
        if ours(task):
            wrong = abs(worth[exact] - 1) > 1e-6
            problem = f"sample {sample.id}: the exact answer is worth {worth[exact]:.6f}, not 1" if wrong else None
            _row(report, "exact is worth 1").add([worth[exact]], problem)
        paid = [name for name, text in zeros.items() if worth[text] != 0]
        problem = f"sample {sample.id}: {paid[0]} is worth {worth[zeros[paid[0]]]:.4f}, not 0" if paid else None
        _row(report, "zeros").add([max(worth[text] for text in zeros.values())] if zeros else [], problem)
        if expressible is not sample:
            report.unrounded.append((float(task.reward([[exact]], [sample], progress=progress)[0][0, 0]), sample.id))
    return report


def ours(task) -> bool:
    """Whether the reward is the default one as it stands, which is held to rank rightly; with weights of the user's own
    it is the user's."""
    return task.preset == "set" and not task.weights


def _row(report: Report, name: str) -> Row:
    return report.rows.setdefault(name, Row())


def _not_falling(sample, name: str, values: list[float]) -> str | None:
    """What is wrong with the rewards of a ladder, None if nothing: each must be below the one before."""
    for i, (better, worse) in enumerate(zip(values, values[1:], strict=False)):
        if not worse < better:
            return (f"sample {sample.id}: {name}, rung {i} is worth {better:.4f} and rung {i + 1}, which is worse, "
                    f"{worse:.4f}")  # fmt: skip
    return None


def without_pixels(task, family, record):
    """The sample of a record, its image not decoded."""
    return task.build(replace(record, load=lambda: None), family)


def lint_before_training(task, family, records, say=print) -> None:
    """Lints the first samples. Raises ValueError when the default reward ranks their answers wrongly, which is a bug or
    broken data; of another preset, whose flaws may be wanted, one line is said."""
    samples = [without_pixels(task, family, records[i]) for i in range(min(BEFORE_TRAINING, len(records)))]
    report = lint(task, samples)
    if not report.violations:
        return
    share = f"{len(report.violations)} ladders of {len(samples)} samples"
    message = (
        f"the reward {task.preset} ranks answers wrongly ({share}); {report.violations[0]}; see python -m pr1.lint"
    )
    if ours(task):
        raise ValueError(message)
    say(f"warning: {message}")


def load_records(cfg, task) -> Sequence:
    """The records of --data, no image opened that need not be; without it --eval-samples rendered ones."""
    if cfg.data is None:
        return task.rendered("val", cfg.eval_samples or 1000, cfg.difficulty)
    images = cfg.images or (str(Path(cfg.data).parent) if task.paths_from_data else None)
    return task.load(cfg.data, images, verify=False)


def main(argv: list[str] | None = None) -> int:
    try:
        cfg = parse_config(sys.argv[1:] if argv is None else argv, "lint.py", __doc__.splitlines()[0])
        task = build_task(cfg)
        family = load_model_family(cfg, task, print)
        records = load_records(cfg, task)
        samples = [without_pixels(task, family, records[i]) for i in range(len(records))]
        report = lint(task, samples, label="linting")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    for problem in report.violations[:SHOWN]:
        print(f"violated: {problem}")
    return int(bool(report.violations))


if __name__ == "__main__":
    sys.exit(main())
