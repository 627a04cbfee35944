"""The command line: every flag acts or fails, and what is given twice has a rule."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import runs
from runs import SHORT, RiggedDet
from tiny_models import make_tiny

import pr1.eval
import pr1.session
import pr1.sft
import pr1.train
from pr1.config import RECIPES, RESUMABLE, Config, build_parser, config_from, parse_config
from pr1.kernels import Objective
from pr1.tasks import TASKS

# Every flag there is. Adding one is a decision: it must be read (below), act, and be tested where it acts.
FLAGS = """
    task recipe run-dir steps seed resume deterministic
    model max-pixels min-pixels max-prompt-tokens train-vision feature-cache-mb
    data images eval-data eval-images eval-samples difficulty duplicates
    group-size prompts-per-step temperature top-p top-k min-new-tokens max-new-tokens max-refill rollout-batch
    rollout-cache-mb
    reward reward-weights prompt thinking
    loss ratio clip-low clip-high dual-clip sapo-tau-pos sapo-tau-neg kl-coef kl entropy-coef rollout-cap
    aggregation advantage-scale updates-per-batch
    lr vision-lr beta1 beta2 weight-decay grad-clip warmup-steps schedule pack-tokens checkpointing sft-batch
    eval-every save-every keep-checkpoints report-samples tensorboard wandb
""".split()
FIELDS = {f.name for f in dataclasses.fields(Config)}


def parse(*argv) -> Config:
    return parse_config(["--task", "det", *map(str, argv)], "train.py", "")


# ---- names ---------------------------------------------------------------------------------------------------------


def test_the_flags_are_these():
    options = {o for action in build_parser("x", "")._actions for o in action.option_strings}
    switches = {f.name.replace("_", "-") for f in dataclasses.fields(Config) if isinstance(f.default, bool)}
    wanted = {"-h", "--help", "--config"}
    for flag in FLAGS:
        wanted |= {f"--{flag}"} | ({f"--no-{flag}"} if flag in switches else set())
    assert options == wanted
    assert {flag.replace("-", "_") for flag in FLAGS} == FIELDS


@pytest.mark.parametrize("argv", [
    ["--group-sise", "4"], ["--group", "4"], ["--max-new", "5"], ["--resum"], ["--lr"], ["--steps", "many"],
    ["--steps", "1.5"], ["--kl", "k1"], ["--recipe", "papers"], ["--schedule", "step"], ["-s", "3"], ["extra"],
    ["--resume", "yes"], ["--task"],
])  # fmt: skip
def test_what_is_not_understood_is_fatal(argv, capsys):
    for program in (pr1.train.main, pr1.sft.main, pr1.eval.main):
        with pytest.raises(SystemExit) as stop:
            program(["--task", "det", "--config", "/no/such/file.yaml", *argv])  # nothing starts if it is understood
        assert stop.value.code == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert any(word in told for word in argv)


def test_hyphens_and_underscores():
    assert parse("--group-size", 4, "--kl_coef", 0.5, "--no-tensorboard") == parse(
        "--group_size", 4, "--kl-coef", 0.5, "--no-tensorboard"
    )
    assert parse("--train_vision").train_vision and not parse("--no_tensorboard").tensorboard
    assert not parse("--no_train_vision").train_vision and parse("--run_dir=a_b=c_d").run_dir == "a_b=c_d"
    assert parse("--run-dir", "a_b").run_dir == "a_b"
    assert parse("--clip-high", "inf").clip_high == math.inf


# ---- precedence ----------------------------------------------------------------------------------------------------


def yaml(tmp_path, text: str):
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    return file


def test_defaults_recipe_file_flags_in_this_order(tmp_path):
    file = yaml(tmp_path, "recipe: paper\nmodel: some/model\nkl-coef: 0.2\nlr: 3e-6\nprompts_per_step: 5\n")
    cfg = parse("--config", file, "--prompts-per-step", 6)
    assert cfg.group_size == 8  # default
    assert cfg.aggregation == "sequence-mean" and cfg.train_vision  # recipe over default
    assert cfg.kl_coef == 0.2  # file over recipe
    assert cfg.lr == 3e-6
    assert cfg.prompts_per_step == 6  # flag over file
    assert parse("--config", file, "--recipe", "default").aggregation == "token-mean"
    assert parse("--config", yaml(tmp_path, "")) == parse()
    cfg = parse("--config", yaml(tmp_path, "train_vision: true\nvision_lr: 1\n"))
    assert cfg.vision_lr == 1.0 and isinstance(cfg.vision_lr, float)
    assert parse("--config", yaml(tmp_path, "eval_data: null\nclip_low: .inf\n")).clip_low == math.inf


@pytest.mark.parametrize("text, says", [
    ("group_sise: 4", ["unknown key", "group_sise"]),
    ("group_size: four", ["group_size", "'four'", "int"]),
    ("group_size: true", ["group_size", "True", "int"]),
    ("group_size: 4.5", ["group_size", "4.5", "int"]),
    ("lr: fast", ["lr", "'fast'", "float"]),
    ("resume: 1", ["resume", "1", "bool"]),
    ("task: null", ["task", "None", "str"]),
    ("- task", ["mapping", "list"]),
    ("{a: [}", ["cannot be read"]),
    ("kl: k1", ["--kl is k1", "k3"]),
])  # fmt: skip
def test_bad_yaml(text, says, tmp_path, capsys):
    file = yaml(tmp_path, text)
    assert pr1.train.main(["--task", "det", "--config", str(file), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in says) and (str(file) in error or "--kl" in error), error
    assert not (tmp_path / "run").exists()


def test_missing_yaml_and_missing_task(tmp_path, capsys):
    assert pr1.train.main(["--task", "det", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert pr1.train.main([]) == 2
    assert "--task is missing" in capsys.readouterr().err
    assert config_from({"task": "det", "model": "m"}).recipe == "default"


# ---- recipes -------------------------------------------------------------------------------------------------------


def test_defaults_with_a_model():
    wanted = dict(
        recipe="default", lr=1e-6, beta1=0.9, beta2=0.999, weight_decay=0.0, clip_low=0.2, clip_high=0.28, kl_coef=0.0,
        entropy_coef=0.0, group_size=8, prompts_per_step=16, temperature=1.0, updates_per_batch=1,
        aggregation="token-mean", grad_clip=1.0, warmup_steps=10, schedule="constant", max_pixels=1_000_000,
        max_new_tokens=1024, train_vision=False, max_refill=1, rollout_cap=2.0, advantage_scale="group",
    )  # fmt: skip
    cfg = dataclasses.asdict(parse("--model", "some/model"))
    assert {k: cfg[k] for k in wanted} == wanted


def test_paper_recipe():
    """arXiv 2504.07954 and its released script: KL .04 (k3), mean over sequences, no clipping, tower trained, linear."""
    wanted = dict(
        recipe="paper", kl_coef=0.04, kl="k3", aggregation="sequence-mean", clip_low=math.inf, clip_high=math.inf,
        train_vision=True, schedule="linear", warmup_steps=0, lr=1e-6, group_size=8, temperature=1.0,
        updates_per_batch=1, advantage_scale="group",
    )  # fmt: skip
    cfg = dataclasses.asdict(parse("--model", "some/model", "--recipe", "paper"))
    assert {k: cfg[k] for k in wanted} == wanted


def test_embedded_recipe_is_chosen_without_a_model_and_refused_with_one():
    assert parse().recipe == "embedded" and parse("--model", "m").recipe == "default"
    for name, value in RECIPES["embedded"].items():
        assert getattr(parse(), name) == value
    with pytest.raises(ValueError, match="--recipe is embedded"):
        parse("--model", "m", "--recipe", "embedded")


def test_objective_flags_reach_the_objective():
    argv = ["--clip-low", 0.1, "--clip-high", 0.3, "--kl-coef", 0.02, "--kl", "k2", "--entropy-coef", 0.01,
            "--rollout-cap", 3, "--temperature", 0.9]  # fmt: skip
    same = dict(clip_low=0.1, clip_high=0.3, kl_coef=0.02, kl="k2", entropy_coef=0.01, rollout_cap=3.0, temperature=0.9)
    make = lambda *flags: pr1.train.make_objective(parse(*flags))  # noqa: E731
    assert make(*argv) == Objective(**same)
    assert make(*argv, "--ratio", "sequence", "--dual-clip", 3) == Objective(**same, ratio="sequence", dual_clip=3.0)
    assert make("--temperature", 1, "--loss", "cispo") == Objective(loss="cispo", clip_low=math.inf)  # its own default
    assert make("--temperature", 1, "--loss", "cispo", "--clip-low", 0.5) == Objective(loss="cispo", clip_low=0.5)
    assert make("--temperature", 1, "--loss", "sapo", "--sapo-tau-pos", 2, "--sapo-tau-neg", 3) == Objective(
        loss="sapo", clip_low=math.inf, clip_high=math.inf, sapo_tau_pos=2.0, sapo_tau_neg=3.0
    )


def test_recipes_and_resumable_fields_name_fields():
    assert all(set(values) <= FIELDS for values in RECIPES.values()) and RESUMABLE <= FIELDS


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, flag", [
    (["--group-size", 1], "--group-size"), (["--prompts-per-step", 0], "--prompts-per-step"),
    (["--temperature", 0], "--temperature"), (["--top-p", 0], "--top-p"), (["--top-p", 1.5], "--top-p"),
    (["--top-k", -1], "--top-k"), (["--lr", -1], "--lr"), (["--lr", "nan"], "--lr"), (["--kl-coef", -0.1], "--kl-coef"),
    (["--eval-every", -2], "--eval-every"), (["--difficulty", 2], "--difficulty"), (["--beta2", 1], "--beta2"),
    (["--rollout-cap", 0], "--rollout-cap"), (["--max-pixels", 100], "--max-pixels"),
    (["--min-new-tokens", 9, "--max-new-tokens", 8], "--min-new-tokens"), (["--rollout-batch", 0], "--rollout-batch"),
    (["--vision-lr", 1e-5], "--vision-lr"), (["--images", "x"], "--images"), (["--eval-images", "x"], "--eval-images"),
    (["--eval-data", "x"], "--eval-data"), (["--resume"], "--resume"), (["--steps", -1], "--steps"),
    (["--max-refill", 0], "--max-refill"), (["--updates-per-batch", 0], "--updates-per-batch"),
    (["--pack-tokens", 0], "--pack-tokens"), (["--seed", -1], "--seed"), (["--temperature", "inf"], "--temperature"),
    (["--entropy-coef", "inf"], "--entropy-coef"), (["--kl-coef", "inf"], "--kl-coef"),
    (["--grad-clip", "nan"], "--grad-clip"), (["--weight-decay", "inf"], "--weight-decay"), (["--lr", "inf"], "--lr"),
    (["--vision-lr", -1, "--train-vision"], "--vision-lr"), (["--temperature", "nan"], "--temperature"),
    (["--dual-clip", 1], "--dual-clip"), (["--dual-clip", 3, "--loss", "cispo"], "--dual-clip"),
    (["--ratio", "sequence", "--loss", "sapo"], "--ratio"), (["--sapo-tau-pos", 2], "--sapo-tau-pos"),
    (["--loss", "sapo", "--sapo-tau-neg", 0], "--sapo-tau-neg"), (["--loss", "sapo", "--clip-low", 0.2], "--clip-low"),
    (["--loss", "sapo", "--sapo-tau-pos", "inf"], "--sapo-tau-pos"),
])  # fmt: skip
def test_senseless_values_name_their_flag(argv, flag):
    with pytest.raises(ValueError, match=f"^{flag} is "):
        parse(*argv)


# ---- every field is read -------------------------------------------------------------------------------------------

OWN_TEST = {"recipe"}  # spent when the configuration is made: the tests of recipes above


def fields_read(runs_to_make) -> set[str]:
    """Names of the Config fields that code outside pr1/config.py reads while these callables run."""
    read = set()

    def spying(cfg, name):
        if name in FIELDS and sys._getframe(1).f_globals["__name__"] not in ("pr1.config", "dataclasses", "copy"):
            read.add(name)
        return object.__getattribute__(cfg, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setitem(TASKS, "det", RiggedDet())
        patch.setattr(pr1.session, "lint_before_training", lambda *_: None)  # a rigged reward ranks nothing rightly
        patch.setattr(Config, "__getattribute__", spying)
        for run in runs_to_make:
            assert run() == 0
    return read


def test_every_field_is_read(tmp_path):
    """By a short run of each program. The same check reports fields whose reader is taken away."""
    model = make_tiny(tmp_path / "model", "qwen2_5_vl", hidden=32)
    data, images = runs.coco_data(tmp_path, 2)
    own_data = ["--data", data, "--images", images, "--eval-data", data, "--eval-images", images]
    short = [*SHORT, "--steps", "2", "--warmup-steps", "0", "--model", model, "--train-vision"]
    scenes = lambda name: pr1.train.main([*short, "--run-dir", str(tmp_path / name)])  # noqa: E731
    programs = [
        lambda: scenes("scenes"),
        lambda: pr1.train.main([*short, *own_data, "--run-dir", str(tmp_path / "own"), "--eval-every", "0"]),
        lambda: pr1.sft.main([*short, "--sft-batch", "2", "--run-dir", str(tmp_path / "sft")]),
        lambda: pr1.eval.main(["--task", "det", "--model", model, "--data", data, "--images", images, "--max-new-tokens",
                               "2"]),
    ]  # fmt: skip
    read = fields_read(programs)
    assert FIELDS - read - OWN_TEST == set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pr1.train, "make_objective", lambda cfg: Objective())
        assert FIELDS - fields_read([lambda: scenes("planted")]) >= {"clip_low", "ratio", "kl", "rollout_cap"}
