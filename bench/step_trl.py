"""TRL's GRPOTrainer for bench/step.py: one update on given rollouts, and whole steps on rendered scenes.

python bench/step_trl.py JOB.json        whole steps; step_contenders.py takes `Trl` from here
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import json
import tempfile
import time
import warnings
from pathlib import Path

import torch

warnings.filterwarnings("ignore", category=FutureWarning)


class Trl:
    """TRL's own `training_step`, from its rollout buffer to the end of backward, micro-batch by micro-batch.

    Only `_generate_and_score_completions` is replaced, by our rollouts, so no generation is timed. Built well: no
    activation checkpointing, tower frozen when ours is, and completion rows gathered before the head, which TRL itself
    does on a GPU only. job["default"]: as shipped instead, with checkpointing and (off a GPU) a head over every row.
    """

    def __init__(self, model, family, rollouts, advantages, job, stages):
        import trl.trainer.utils
        from datasets import Dataset
        from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
        from trl import GRPOConfig, GRPOTrainer

        if not job["default"]:
            trl.trainer.utils._use_triton = lambda device: True  # in that module it decides about the gathering alone
        model.model.visual.requires_grad_(job["train_vision"])
        device = next(model.parameters()).device
        _, length, size = job["shape"]
        self.steps, gpu = len(rollouts) // job["micro"], device.type == "cuda"
        args = GRPOConfig(
            tempfile.mkdtemp(), per_device_train_batch_size=job["micro"], gradient_accumulation_steps=self.steps,
            num_generations=size, max_completion_length=length, bf16=gpu, use_cpu=not gpu, report_to=[],
            gradient_checkpointing=job["default"], epsilon=job["clip"][0], epsilon_high=job["clip"][1],
        )  # fmt: skip
        processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), family.tokenizer, Qwen2VLVideoProcessor(),
                                        chat_template=family.tokenizer.chat_template)  # fmt: skip
        data = Dataset.from_list([{"prompt": [{"role": "user", "content": "none"}]}])
        trainer = GRPOTrainer(model, lambda **_: [], args, data, processing_class=processor)
        if job["default"]:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)  # what trainer.train() would do
        batch = self._batch(family, rollouts, advantages, device)
        trainer._generate_and_score_completions = lambda _: dict(batch)
        trainer.current_gradient_accumulation_steps = self.steps
        compute_loss = trainer.compute_loss

        def watched(*args, **kwargs):
            loss = compute_loss(*args, **kwargs)
            stages.mark("head")
            return loss

        trainer.compute_loss = watched
        self.trainer, self.model, self.stages = trainer, model, stages

    @staticmethod
    def _batch(family, rollouts, advantages, device) -> dict:
        """What `_generate_and_score_completions` returns, from our rollouts."""
        ids = torch.stack([r.prompt_ids for r in rollouts])
        answers = torch.stack([r.completion_ids for r in rollouts])
        types = (ids == family.image_token_id).int()
        images = [image for r in rollouts for image in r.inputs.images]
        batch = {
            "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": answers,
            "completion_mask": torch.ones_like(answers),
            "advantages": torch.tensor(advantages.reshape(-1), dtype=torch.float32),
            "num_items_in_batch": torch.tensor(answers.numel()),
            "old_per_token_logps": torch.stack([r.logp_rollout for r in rollouts]),
            "pixel_values": torch.cat([image.pixels for image in images]),
            "image_grid_thw": torch.tensor([image.grid for image in images]),
            "mm_token_type_ids": torch.cat([types, torch.zeros_like(answers, dtype=torch.int32)], 1),
        }  # fmt: skip
        return {k: v.to(device) for k, v in batch.items()} | {"num_images": [1] * len(rollouts)}

    def update(self) -> float:
        self.trainer._step, self.trainer._buffered_inputs, total = 0, None, 0.0
        for _ in range(self.steps):
            total += self.trainer.training_step(self.model, None, None)
            self.stages.mark("backward")
        return float(total)

    def gradients(self, model) -> dict:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def end(self, model) -> None:
        model.zero_grad(set_to_none=True)


def whole_steps(job: dict) -> list[dict]:
    """Steps of GRPOTrainer on the prompts that train.py draws, with its model, reward, lengths and optimizer; per step
    seconds, those of rollout and reward, mean reward and completion length."""
    from datasets import Dataset
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from pr1.assemble import build_task, load_model_family, load_train_data
    from pr1.config import config_from
    from pr1.sampler import PromptSampler

    def quiet(_):
        pass

    cfg = config_from({"task": "det", **job["flags"]})
    task = build_task(cfg)
    family, scenes = load_model_family(cfg, task, quiet), load_train_data(cfg, task, quiet)
    sampler = PromptSampler(len(scenes), cfg.seed)
    drawn = [int(i) for _ in range(cfg.steps) for i in sampler.draw(cfg.prompts_per_step)]
    samples = {i: task.build(scenes[i], family) for i in drawn}
    data = Dataset.from_list([
        {"prompt": [{"role": "user", "content": s.messages[0]["content"][-1]["text"]}], "image": s.images[0], "scene": i}
        for i, s in ((i, samples[i]) for i in drawn)
    ])  # fmt: skip
    lines, line = [], {}

    def reward(completion_ids, scene, **_):
        begun = time.perf_counter()
        groups = range(0, len(scene), cfg.group_size)
        texts = [[family.decode(ids) for ids in completion_ids[g : g + cfg.group_size]] for g in groups]
        rewards = task.reward(texts, [samples[scene[g]] for g in groups])[0].reshape(-1).tolist()
        line.update(reward_seconds=time.perf_counter() - begun, reward=sum(rewards) / len(rewards),
                    completion_tokens=sum(map(len, completion_ids)) / len(scene))  # fmt: skip
        return rewards

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            line.update(begun=time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            lines.append({**line, "seconds": time.perf_counter() - line["begun"]})

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        family.folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.model.visual.requires_grad_(cfg.train_vision)
    args = GRPOConfig(
        tempfile.mkdtemp(), max_steps=cfg.steps, per_device_train_batch_size=job["micro"],
        gradient_accumulation_steps=cfg.prompts_per_step * cfg.group_size // job["micro"],
        num_generations=cfg.group_size, max_completion_length=cfg.max_new_tokens, temperature=cfg.temperature,
        learning_rate=cfg.lr, adam_beta1=cfg.beta1, adam_beta2=cfg.beta2, max_grad_norm=cfg.grad_clip,
        lr_scheduler_type="constant_with_warmup", warmup_steps=cfg.warmup_steps, epsilon=cfg.clip_low,
        epsilon_high=cfg.clip_high, generation_kwargs={"min_new_tokens": cfg.min_new_tokens or None},
        shuffle_dataset=False, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[],
        logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(model, reward, args, data, processing_class=AutoProcessor.from_pretrained(family.folder, padding_side="left"),
                          callbacks=[Watch()])  # fmt: skip
    generate_and_score = trainer._generate_and_score_completions

    def watched(inputs):
        begun = time.perf_counter()
        out = generate_and_score(inputs)
        line.update(rollout_seconds=time.perf_counter() - begun - line["reward_seconds"])
        return out

    trainer._generate_and_score_completions = watched
    trainer.train()
    return lines


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(whole_steps(job)))
