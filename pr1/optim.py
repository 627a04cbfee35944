"""AdamW on float32 master weights, float32 gradient accumulation, one gradient sum over ranks per step."""

from __future__ import annotations

import math

import torch

from pr1.config import Config
from pr1.world import World


def learning_rate(cfg: Config, step: int, peak: float) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or linear / cosine decay to 0 at `steps`."""
    if step < cfg.warmup_steps:
        return peak * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return peak * shape[cfg.schedule]


class Optimizer:
    """Owns masters, moments and gradient sums of a model's trainable parameters.

    A float32 parameter is its own master. A half-precision one has a float32 master; after every backward pass its
    gradient is added to the master's float32 gradient and freed, so packs never accumulate in half precision.
    Parameters are written in place: their addresses never change.
    """

    def __init__(self, policy, cfg: Config):
        self.cfg = cfg
        vision = {id(p) for p in policy.visual.parameters()}
        self.names, self.params, self.masters, groups = [], [], [], {}
        for name, param in policy.model.named_parameters():
            if not param.requires_grad:
                continue
            master = param if param.dtype == torch.float32 else param.detach().float().requires_grad_()
            if master is not param:
                param.grad_dtype = None  # a float32 gradient (the head's) comes as it is, not rounded on its way
                param.register_post_accumulate_grad_hook(lambda p, m=master: _accumulate(p, m))
            peak = cfg.vision_lr if id(param) in vision and cfg.vision_lr is not None else cfg.lr
            decay = cfg.weight_decay if param.ndim > 1 else 0.0
            groups.setdefault((peak, decay), []).append(master)
            self.names.append(name)
            self.params.append(param)
            self.masters.append(master)
        self.adam = torch.optim.AdamW(
            [dict(params=p, lr=peak, peak=peak, weight_decay=decay) for (peak, decay), p in groups.items()],
            betas=(cfg.beta1, cfg.beta2),
            fused=True,
        )

    def sum_gradients(self, world: World) -> None:
        """Adds up gradients over ranks. Losses are divided by global counts, so a sum is the whole gradient; a rank
        without packs takes part with zeros."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        world.sum_tensors([m.grad for m in self.masters])

    def clip(self) -> float:
        """Scales all gradients so that their global norm is at most grad_clip; returns the norm before (one sync)."""
        return float(torch.nn.utils.clip_grad_norm_(self.masters, self.cfg.grad_clip or math.inf, foreach=True))

    def step(self, step: int) -> float:
        """One update at the learning rate of `step`; returns the language model's learning rate."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(self.cfg, step, group["peak"])
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for param, master in zip(self.params, self.masters):
                if master is not param:
                    param.copy_(master)
        return learning_rate(self.cfg, step, self.cfg.lr)

    def zero(self) -> None:
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Moments, step counts and the masters of half-precision parameters, by parameter name."""
        state = {}
        for name, param, master in zip(self.names, self.params, self.masters):
            entry = dict(self.adam.state.get(master, {}))
            if master is not param:
                entry["master"] = master.detach()
            state[name] = entry
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the parameters are not those of the saved run."""
        if set(state) != set(self.names):
            differing = sorted(set(state) ^ set(self.names))[:3]
            raise ValueError(f"the checkpoint trains other parameters than this run: {', '.join(differing)}, ...")
        for name, param, master in zip(self.names, self.params, self.masters):
            entry = dict(state[name])
            if master is not param:
                master.copy_(entry.pop("master"))
                param.copy_(master)
            if entry:
                device = {k: "cpu" if k == "step" and master.device.type == "cpu" else master.device for k in entry}
                self.adam.state[master] = {k: v.to(device[k], torch.float32) for k, v in entry.items()}


@torch.no_grad()
def _accumulate(param: torch.Tensor, master: torch.Tensor) -> None:
    if master.grad is None:
        master.grad = param.grad.float()
    else:
        master.grad += param.grad
    param.grad = None
