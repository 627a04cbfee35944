"""Whole runs of train.py on tiny Qwen2-VL and Qwen2.5-VL models, checked against plain transformers in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import SHORT, RiggedDet, read_lines, train_here
from tiny_models import make_tiny
from transformers import AutoModelForImageTextToText
from worlds import make_policy, plain_logits

from pr1.assemble import TRAIN_SCENES, build_policy, load_eval_data
from pr1.collect import collect
from pr1.config import Config
from pr1.data.scenes import SceneDataset, SceneOptions
from pr1.families import load_family
from pr1.metrics import Clock
from pr1.predict import evaluate
from pr1.sampler import PromptSampler
from pr1.tasks import TASKS
from pr1.world import World

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
PARTS = ("f1", "precision", "recall", "iou", "count_ratio", "format")
STAGES = ("data", "rollout", "reward", "pack", "reference", "update")
STEP_KEYS = {
    *("step reward reward_std kl entropy completion_tokens truncated flat_groups clipped logp_gap logp_gap_max".split()),
    *("grad_norm lr seconds tokens_per_second".split()),
    *(f"reward/{part}" for part in PARTS), *(f"seconds/{stage}" for stage in STAGES),
}  # fmt: skip
AP_BY_SIZE = {"eval/ap_s", "eval/ap_m", "eval/ap_l"}  # null where no object is of that size
EVAL_KEYS = {*(f"eval/{name}" for name in "ap ap50 ap75 ar100 ap_scored reward".split()), *AP_BY_SIZE}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untied qwen2_5_vl, tied qwen2_vl."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make_tiny(folder / name, name, hidden=32, tied=name == "qwen2_vl") for name in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request, models, tmp_path_factory):
    """A run of three steps with evaluations at 0, 2 and 3."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    flags = [*SHORT, "--model", models[request.param], "--run-dir", folder, "--steps", 3, "--eval-every", 2,
             "--kl-coef", 0.1, "--entropy-coef", 0.01, "--tensorboard"]  # fmt: skip
    session, spy = train_here(flags)
    return SimpleNamespace(model=models[request.param], folder=folder, session=session, spy=spy)


# ---- a run leaves what it promises ---------------------------------------------------------------------------------


def test_metrics_hold_exactly_the_documented_keys(whole):
    lines = read_lines(whole.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for step, keys in enumerate((STEP_KEYS | EVAL_KEYS, STEP_KEYS, STEP_KEYS | EVAL_KEYS, {"step"} | EVAL_KEYS)):
        assert set(lines[step]) == keys
        assert all(value is not None or key in AP_BY_SIZE for key, value in lines[step].items())
        assert all(math.isfinite(value) for value in lines[step].values() if value is not None)
    assert lines[0]["eval/ap_m"] is not None


def test_metrics_are_what_they_say(whole):
    """Each against the batches and gradients that went through the loop."""
    for step, line in enumerate(read_lines(whole.folder / "metrics.jsonl")[:3]):
        batch, grads = whole.spy.batches[step], whole.spy.grads[step]
        lengths = [len(r.completion_ids) for r in batch.rollouts]
        assert line["reward"] == pytest.approx(batch.rewards.mean(), abs=1e-12)
        assert line["reward_std"] == pytest.approx(np.mean([np.std(g, ddof=1) for g in batch.rewards]), abs=1e-12)
        for part in PARTS:
            assert line[f"reward/{part}"] == pytest.approx(batch.parts[part].mean(), abs=1e-7)
        assert line["completion_tokens"] == np.mean(lengths)
        assert line["truncated"] == np.mean([not r.finished for r in batch.rollouts])
        assert line["flat_groups"] == np.mean([g.max() == g.min() for g in batch.rewards])
        entropy = torch.cat([r.entropy for r in batch.rollouts]).double()
        assert line["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-9)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert line["lr"] == pytest.approx(2e-4 * min(1, (step + 1) / 2))
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(sum(lengths))
        assert sum(line[f"seconds/{stage}"] for stage in STAGES) <= line["seconds"]
        assert 0 < line["logp_gap"] <= line["logp_gap_max"] < 1e-4


def test_checkpoint_is_the_model_that_was_trained(whole):
    """transformers and load_family read back the trainer's weights bit for bit; every trained tensor has moved."""
    folder = whole.folder / "checkpoints" / "step-3"
    trained = whole.session.policy.model.state_dict()
    before = AutoModelForImageTextToText.from_pretrained(whole.model, dtype=torch.float32).state_dict()
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    ours = load_family(str(folder)).load_model(torch.float32).state_dict()
    assert plain.keys() == ours.keys() == trained.keys() == before.keys()
    for name, value in trained.items():
        assert torch.equal(value, plain[name]) and torch.equal(value, ours[name]), name
        if name in whole.session.optimizer.names:
            assert not torch.equal(value, before[name]), name


def test_reloaded_checkpoint_evaluates_alike(whole):
    """The metrics of the last line, from the checkpoint by the evaluation's own path; and they are not those before."""
    cfg = dataclasses.replace(whole.session.cfg, model=str(whole.folder / "checkpoints" / "step-3"))
    world = World(0, 1, torch.device("cpu"))
    policy = build_policy(cfg, load_family(cfg.model, max_pixels=cfg.max_pixels, min_pixels=cfg.min_pixels), world)
    metrics, predictions = evaluate(policy, RiggedDet(), load_eval_data(cfg, TASKS["det"], print), cfg, world)
    lines = read_lines(whole.folder / "metrics.jsonl")
    assert {f"eval/{name}": value for name, value in metrics.items()} == {k: lines[3][k] for k in EVAL_KEYS}
    assert lines[3]["eval/reward"] != lines[0]["eval/reward"]
    samples = {(line["step"], line["id"]): line for line in read_lines(whole.folder / "samples.jsonl")}
    assert len(samples) == 3 * len(predictions) == 9  # evaluations x images
    for line in predictions:
        assert samples[3, line["id"]]["text"] == line["text"]


def test_config_is_complete(whole):
    record = json.loads((whole.folder / "config.json").read_text())
    cfg = {k: "inf" if v == math.inf else v for k, v in dataclasses.asdict(whole.session.cfg).items()}
    assert record["config"] == cfg and set(cfg) == {f.name for f in dataclasses.fields(Config)}
    assert cfg["model"] == whole.model and cfg["kl_coef"] == 0.1  # flags, not defaults
    for budget in ("feature_cache_mb", "pack_tokens", "rollout_batch", "max_pixels", "max_prompt_tokens"):
        assert isinstance(record["config"][budget], int)
    machine = record["environment"]
    assert machine["image_backend"] == "pil" and machine["world_size"] == 1 and machine["device"]
    assert machine["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"git_hash", "git_dirty", "python", "pr1", "transformers", "tokenizers", "numpy", "pillow"} <= set(machine)


def test_report_and_tensorboard_are_there(whole):
    report = (whole.folder / "report.html").read_text()
    assert report.count("data:image/") >= 3 and "<svg" in report
    assert any((whole.folder / "tensorboard").iterdir())


# ---- the loss and the gradient are those of the formula ------------------------------------------------------------


def plain_model(folder, weights=None):
    """transformers' model in float64, its trainable parameters replaced by `weights`."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in (weights or {}).items():
            parameters[name].copy_(value)
    return model


def plain_logp(model, rollout, temperature):
    """(C,) log-probs and entropies of one completion, float64."""
    log_p = (plain_logits(model, rollout.inputs, rollout.completion_ids) / temperature).log_softmax(-1)
    return log_p.gather(1, rollout.completion_ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def plain_step(cfg, batch, model, start=None, reference=None):
    """Loss of one optimizer step, completion by completion as §6 of the objective has it; its gradient lands in the
    model. Returns (loss, mean k3, share of clipped tokens)."""
    std = batch.rewards.std(1, ddof=1, keepdims=True) if cfg.advantage_scale == "group" else 1 - 1e-4
    advantages = ((batch.rewards - batch.rewards.mean(1, keepdims=True)) / (std + 1e-4)).reshape(-1)
    tokens, total, k3, clipped = sum(len(r.completion_ids) for r in batch.rollouts), 0.0, 0.0, 0
    for rollout, advantage in zip(batch.rollouts, advantages, strict=True):
        logp, entropy = plain_logp(model, rollout, cfg.temperature)
        old = logp.detach() if start is None else plain_logp(start, rollout, cfg.temperature)[0].detach()
        ratio = (logp - old).exp()
        weight = (old - rollout.logp_rollout + rollout.log_kept).exp().clamp(max=cfg.rollout_cap)
        bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        row = -weight * torch.minimum(ratio * advantage, bounded * advantage) - cfg.entropy_coef * entropy
        clipped += int((bounded * advantage < ratio * advantage).sum())
        if reference is not None:
            d = plain_logp(reference, rollout, cfg.temperature)[0].detach() - logp
            row = row + cfg.kl_coef * (d.exp() - d - 1 if cfg.kl == "k3" else d.square() / 2)
            k3 += float((d.exp() - d - 1).detach().sum())
        n = len(rollout.completion_ids)
        normaliser = {"token-mean": tokens, "sequence-mean": len(batch.rollouts) * n,
                      "constant": len(batch.rollouts) * cfg.max_new_tokens}[cfg.aggregation]  # fmt: skip
        loss = row.sum() / normaliser
        loss.backward()
        total += float(loss.detach())
    return total, k3 / tokens, clipped / tokens


def compare_gradients(ours, model, rtol=2e-4):
    """Each tensor's error against its own size, or a thousandth of the whole gradient where that is larger."""
    truth = {n: p.grad for n, p in model.named_parameters() if n in ours}
    whole = math.sqrt(sum(float(g.square().sum()) for g in truth.values()))
    assert whole > 1e-3 and ours.keys() == truth.keys()
    for name, grad in ours.items():
        error = float((grad.double() - truth[name]).norm())
        assert error <= rtol * max(float(truth[name].norm()), 1e-3 * whole), (name, error)


CASES = {
    "default, a flat group, many packs": ("qwen2_5_vl", "--pack-tokens 150 --prompts-per-step 4"),
    "sequences, no std, k3, tower": (
        "qwen2_vl", "--aggregation sequence-mean --advantage-scale none --kl-coef 0.2 --train-vision "
        "--temperature 0.7 --entropy-coef 0.02"),
    "constant, k2, nucleus, low cap": (
        "qwen2_5_vl", "--aggregation constant --kl k2 --kl-coef 0.3 --top-p 0.8 --rollout-cap 0.7 --train-vision"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_each_step(case, models, tmp_path):
    """Two steps: at the second the reference is no longer the policy."""
    name, extra = CASES[case]
    first = PromptSampler(TRAIN_SCENES, 0).draw(1)[0]
    flags = [*SHORT, "--model", models[name], "--run-dir", tmp_path / "run", "--steps", 2, "--warmup-steps", 0]
    session, spy = train_here([*flags, *extra.split()], RiggedDet(flat=(f"train-{first}",)))
    cfg, total = session.cfg, 0.0
    reference = plain_model(models[name]) if cfg.kl_coef else None
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    for step in range(2):
        model = plain_model(models[name], spy.weights[step])
        loss, k3, _ = plain_step(cfg, spy.batches[step], model, reference=reference)
        compare_gradients(spy.grads[step], model)
        assert lines[step]["kl"] == pytest.approx(k3, rel=1e-3, abs=1e-9)
        total += loss
    assert sum(spy.losses) == pytest.approx(total, rel=1e-4, abs=1e-5)  # packs add up
    assert ("model.visual.patch_embed.proj.weight" in spy.grads[0]) == cfg.train_vision
    assert spy.batches[0].flat == 1  # normalisers count its tokens too
    if cfg.pack_tokens < 1000:
        assert len(spy.losses) > 2  # more than one pack a step
    if cfg.kl_coef:
        assert lines[0]["kl"] == 0.0 and lines[1]["kl"] > 1e-4
    if cfg.rollout_cap < 1:
        log_kept = torch.cat([r.log_kept for r in spy.batches[1].rollouts])
        assert (log_kept.exp() > 0.7).any() and (log_kept.exp() <= 1).all()  # some weights are capped


def test_second_update_of_a_batch(models, tmp_path):
    """Its ratios are against the policy before the first update, and clipping acts; the first update is AdamW's."""
    flags = [*SHORT, "--model", models["qwen2_5_vl"], "--run-dir", tmp_path / "run", "--steps", 1, "--lr", 2e-3,
             "--warmup-steps", 0, "--updates-per-batch", 2, "--weight-decay", 0.3, "--grad-clip", 0.5]  # fmt: skip
    session, spy = train_here(flags)
    model, start = (plain_model(session.cfg.model, w) for w in (spy.weights[1], spy.weights[0]))
    _, _, clipped = plain_step(session.cfg, spy.batches[0], model, start=start)
    compare_gradients(spy.grads[1], model)
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 0 < clipped < 1 and line["clipped"] == pytest.approx(clipped, abs=1e-9)
    norm = math.sqrt(sum(float(g.square().sum()) for g in spy.grads[0].values()))
    for name, grad in spy.grads[0].items():
        grad = grad.double() * min(1.0, 0.5 / norm)
        before, after = spy.weights[0][name].double(), spy.weights[1][name].double()
        kept = 1 - 2e-3 * 0.3 if before.ndim > 1 else 1.0  # only matrices decay
        wanted = before * kept - 2e-3 * grad / (grad.abs() + 1e-8)  # both moments' bias corrections cancel at step 1
        clear = grad.abs() > 1e-6
        assert torch.allclose(after[clear], wanted[clear], atol=2e-5)
    assert norm > 0.5


@pytest.mark.parametrize(
    "extra, moves", [("", False), ("--train-vision", True), ("--train-vision --vision-lr 0", False)]
)
def test_tower_moves_only_when_told(extra, moves, models, tmp_path):
    flags = [*SHORT, "--model", models["qwen2_5_vl"], "--run-dir", tmp_path / "run", "--steps", 2, "--weight-decay", 0.1,
             *extra.split()]  # fmt: skip
    session, _ = train_here(flags)
    before = AutoModelForImageTextToText.from_pretrained(session.cfg.model, dtype=torch.float32).state_dict()
    same = [torch.equal(v, before[n]) for n, v in session.policy.model.state_dict().items() if ".visual." in n]
    assert len(same) > 20 and (not any(same) if moves else all(same))
    after = session.policy.model.state_dict()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_a_broken_gradient_stops_before_the_weights(models, tmp_path):
    class Infinite(RiggedDet):
        def reward(self, texts, samples, *, progress=1.0):
            rewards, parts = super().reward(texts, samples)
            return rewards * 3e38, parts

    flags = [*SHORT, "--model", models["qwen2_5_vl"], "--run-dir", tmp_path / "run", "--steps", 1,
             "--advantage-scale", "none", "--rollout-cap", "inf", "--grad-clip", 1]  # fmt: skip
    with pytest.raises(FloatingPointError, match="step 0: the gradient norm is .*--resume"):
        train_here(flags, Infinite())
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# ---- drawing again for flat groups ---------------------------------------------------------------------------------


class LiveAt(RiggedDet):
    """Groups of the records at these places of the drawing order have different rewards, all others equal ones."""

    def __init__(self, order, live):
        self.ids = {f"train-{order[i]}" for i in live}

    def reward(self, texts, samples, *, progress=1.0):
        group = len(texts[0])
        spread = np.linspace(0, 1, group, dtype=np.float32)
        rewards = np.stack([spread if s.id in self.ids else np.full(group, 0.5, np.float32) for s in samples])
        return rewards, {"own": rewards}


@pytest.mark.parametrize("rounds, live, kept, drawn, flat", [
    (1, {0, 3}, [0, 1, 2, 3], 4, 2),  # no refill
    (3, {0, 3, 5}, [0, 3, 5, 6], 7, 4),  # 4, then 2, then 1 drawn; the last, flat, makes up the number
    (3, {0, 3, 4, 5}, [0, 3, 4, 5], 6, 2),  # enough after two rounds
    (3, {0, 1, 2, 3}, [0, 1, 2, 3], 4, 0),  # enough at once
    (2, {1, 4}, [1, 4, 5, 6], 7, 5),
    (3, set(), [8, 9, 10, 11], 12, 12),  # nothing lives: the last round stands
])  # fmt: skip
def test_refill_keeps_the_right_groups(rounds, live, kept, drawn, flat, models):
    policy = make_policy(load_family(models["qwen2_5_vl"]), torch.float32, train_vision=False)
    order = PromptSampler(40, 5).draw(40)
    cfg = Config(task="det", group_size=2, prompts_per_step=4, max_refill=rounds, max_new_tokens=3, seed=5)
    run = SimpleNamespace(cfg=cfg, world=World(0, 1, torch.device("cpu")), task=LiveAt(order, live), policy=policy,
                          family=policy.family, sampler=PromptSampler(40, 5),
                          records=SceneDataset("train", 40, SceneOptions.at(0.0)))  # fmt: skip
    batch = collect(run, 0, Clock())
    assert [s.id for s in batch.samples] == [f"train-{order[i]}" for i in kept]
    assert [(r.prompt, r.completion) for r in batch.rollouts] == [(p, g) for p in kept for g in range(2)]
    assert (batch.drawn, batch.flat) == (drawn, flat)
    assert run.sampler.draw(1) == [order[drawn]]
    assert [bool(np.ptp(g)) for g in batch.rewards] == [i in live for i in kept]
    assert np.array_equal(batch.parts["own"], batch.rewards.astype(np.float32))
    for sample, rollout in zip(batch.samples, batch.rollouts[::2], strict=True):  # rolled out on its own image
        assert torch.equal(run.family.encode(sample).ids, rollout.prompt_ids)
