"""The operations that bench/kernels.py times, their truth in float64, and everyone who can do them.

A contender is (operation, name, kind of truth, build): build(problem) imports what it needs and returns (step, refresh):
step() runs once and returns its outputs by name, refresh() undoes what a step overwrote (None: nothing).
"""

import sys

sys.path[:] = [p for p in sys.path if not p.rstrip("/").endswith("/bench")]  # bench/ holds names like kernels.py

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pr1.kernels import Objective, Rows, grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs

OPERATIONS = {
    "logits-forward": "log-prob and entropy from logits",
    "logits-train": "the same, forward and backward",
    "logits-grpo": "GRPO loss from logits, forward and backward",
    "hidden-forward": "log-prob and entropy from hidden states, no gradient",
    "hidden-grpo": "GRPO head from hidden states, forward and backward",
    "hidden-grpo-frozen": "the same, the head's weight frozen",
}
GEMMS = {"hidden-forward": 1, "hidden-grpo": 3, "hidden-grpo-frozen": 2}  # of 2 N H V FLOP each
PASSES = {"logits-forward": 1, "logits-train": 3, "logits-grpo": 3}  # over N V logits: read; read; write
SEQUENCES = 8  # completions the rows fall into, for the contenders that want (B, L)
ON_POLICY = Objective(rollout_cap=0.0)  # ratio 1, clip .2/.28, no KL: what everyone can compute


@dataclass
class Problem:
    """Hidden states near the weight rows of a few tokens, as a trained model's are, so that logits are peaked."""

    n: int
    h: int
    v: int
    dtype: torch.dtype
    device: str
    sharpness: float

    def __post_init__(self):
        g = torch.Generator().manual_seed(self.n)
        drawn = torch.rand(4, self.n, generator=g)
        # Low ids are the frequent ones in a byte-pair vocabulary: the density falls as id ** -3/4.
        likely, second, third = ((u**4 * self.v).long() for u in drawn[:3])
        self.tokens = torch.where(drawn[3] < 0.1, second, likely).to(self.device)
        sharp = (self.sharpness * (0.6 + 0.6 * torch.rand(self.n, 1, generator=g))).to(self.device)
        gpu = torch.Generator(self.device).manual_seed(0)
        weight = torch.randn(self.v, self.h, generator=gpu, device=self.device) / self.h**0.5  # rows of length about 1
        self.weight = weight.to(self.dtype)
        likely, second, third = (t.to(self.device) for t in (likely, second, third))
        self.hidden = (sharp * (weight[likely] + 0.7 * weight[second] + 0.4 * weight[third])).to(self.dtype)
        self.advantage = torch.linspace(-1.5, 1.5, SEQUENCES).repeat_interleave(self.n // SEQUENCES).to(self.device)
        self.upstream = torch.randn(2, self.n, generator=g).to(self.device)
        flat, zero = torch.full((self.n,), 1 / self.n, device=self.device), torch.zeros(self.n, device=self.device)
        sequence = torch.arange(self.n, device=self.device) // (self.n // SEQUENCES)
        self.rows = Rows(self.tokens, self.advantage, flat, zero, sequence)

    @functools.cached_property
    def logits(self) -> torch.Tensor:
        return self.hidden @ self.weight.T

    def truth(self, kind: str, from_logits: bool) -> dict:
        """Outputs in float64. kind: full (log-prob and entropy with upstream gradients), logp (entropy without), grpo,
        ce (mean cross entropy)."""
        hidden, weight = self.hidden.double(), self.weight.double()
        log_p = torch.log_softmax(self.logits.double() if from_logits else hidden @ weight.T, -1)
        logp = log_p.gather(1, self.tokens[:, None]).squeeze(1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1)
        advantage = self.advantage.double() if kind == "grpo" else torch.ones_like(logp)
        g, h = self.upstream.double() if kind in ("full", "logp") else (-advantage / self.n, None)
        dz = -g[:, None] * p
        dz[torch.arange(self.n, device=self.device), self.tokens] += g
        if kind == "full":
            dz -= h[:, None] * p * (log_p + entropy[:, None])
        loss = -(advantage * (logp if kind == "ce" else 1.0)).mean()
        return {"logp": logp, "entropy": entropy, "loss": loss, "dlogits": dz, "dhidden": dz @ weight,
                "dweight": dz.T @ hidden}  # fmt: skip

    def kept_tiles(self) -> float:
        """Share of 128 x 128 tiles with some |p - onehot| above 2^-12: what a filtering backward cannot skip."""
        error = torch.softmax(self.logits.float(), -1)
        error[torch.arange(self.n, device=self.device), self.tokens] -= 1
        error = F.pad(error.abs(), (0, -self.v % 128, 0, -self.n % 128))
        return (error.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amax((1, 3)) > 2**-12).float().mean().item()


def eager(logits, tokens):
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(1, tokens[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def clipped_loss(logp, advantage):
    ratio = (logp - logp.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).mean()


def eager_grpo(logits, tokens, advantage):
    logp = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None]).squeeze(1)
    return clipped_loss(logp, advantage)


def linear_eager(x, w, tokens):
    return eager(F.linear(x, w), tokens)


def linear_eager_grpo(x, w, tokens, advantage):
    return eager_grpo(F.linear(x, w), tokens, advantage)


def ours_grpo(x, rows, **how):
    return grpo_loss(x, rows, ON_POLICY, **how)[0]


def ours_head(x, w, rows):
    return linear_grpo_loss(x, w, rows, ON_POLICY)[0]


def compiled(fn):
    torch._dynamo.reset()  # each size is compiled for itself, and none meets the limit of recompilations
    return torch.compile(fn, dynamic=False)


def bound(fn, *names, wrap=lambda fn: fn):
    """fn(inputs..., attributes of the problem by name...) -> problem -> function of the inputs alone."""

    def build(p):
        call, arguments = wrap(fn), [getattr(p, name) for name in names]
        return lambda *inputs: call(*inputs, *arguments)

    return build


def forward(fn, linear=False):
    """fn(problem) -> function of the logits, or of (hidden, weight), giving (logp[, entropy])."""

    def build(p):
        call = fn(p)

        @torch.no_grad()
        def step():
            return dict(zip(("logp", "entropy"), call(p.hidden, p.weight) if linear else call(p.logits)))

        return step, None

    return build


def from_logits(fn, in_place=False, shape=None):
    """fn(problem) -> function of the logits giving (logp[, entropy]) to be met by the upstream gradients, or a loss."""

    def build(p):
        call = fn(p)
        buffer = p.logits.clone() if shape is None else shape(p)

        def step():
            x = buffer.detach().requires_grad_()
            out = call(x)
            if isinstance(out, tuple):
                torch.autograd.backward(out, tuple(g.to(o.dtype) for g, o in zip(p.upstream, out)))
                done = dict(zip(("logp", "entropy"), (o.detach() for o in out)))
            else:
                out.backward()
                done = {"loss": out.detach()}
            return {**done, "dlogits": x.grad if shape is None else x.grad[:, :-1]}

        def refresh():
            fresh = p.logits if shape is None else p.logits.view(SEQUENCES, -1, p.v)
            (buffer if shape is None else buffer[:, :-1]).copy_(fresh)

        return step, refresh if in_place else None

    return build


def from_hidden(fn, frozen=False):
    """fn(problem) -> function of (hidden, weight) giving a loss."""

    def build(p):
        call = fn(p)

        def step():
            x, w = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_(not frozen)
            loss = call(x, w)
            loss.backward()
            return {"loss": loss.detach(), "dhidden": x.grad, **({} if frozen else {"dweight": w.grad})}

        return step, None

    return build


def trl(p):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda x: (selective_log_softmax(x, p.tokens), entropy_from_logits(x))


def trl_kernel(p):
    from trl.kernels import selective_log_softmax_and_entropy

    return lambda x: selective_log_softmax_and_entropy(x, p.tokens)


def quack_logp(p):
    from quack.cross_entropy import cross_entropy

    return lambda x: (-cross_entropy(x, p.tokens, reduction="none"),)


def liger_triton(p):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    tokens, advantage = p.tokens.view(SEQUENCES, -1), p.advantage.view(SEQUENCES, -1)[:, 0].contiguous()
    options = dict(temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.28, inplace=True, loss_type="dapo", reduce=True)
    return lambda x: triton_grpo_loss(x, None, None, tokens, advantage, torch.ones_like(tokens), **options)[0]


def liger_shape(p):
    x = torch.zeros(SEQUENCES, p.n // SEQUENCES + 1, p.v, dtype=p.dtype, device=p.device)
    x[:, :-1] = p.logits.view(SEQUENCES, -1, p.v)
    return x


def liger_linear(p):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    tokens, advantage = p.tokens.view(SEQUENCES, -1), p.advantage.view(SEQUENCES, -1)[:, 0].contiguous()
    head = LigerFusedLinearGRPOLoss(beta=0.0, compiled=p.device == "cuda", use_ref_model=False, epsilon_high=0.28)
    return lambda x, w: head(x.view(SEQUENCES, -1, p.h), w, tokens, torch.ones_like(tokens), advantage)[0]


def liger_scaled(p):
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as head

    return lambda x, w: head.apply(x, w, p.tokens, 1.0, -100, 1, True)


def trl_chunked(p):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    return lambda x, w: ChunkedLogProbFunction.apply(
        x, w, None, p.tokens, 1.0, chunk, None, 1.0, ("entropy",)
    )[:2]  # fmt: skip


def liger_logprobs(p):
    call = liger_scaled(p)

    def logp_entropy(x, w):
        nll, entropy = call(x, w)
        return -nll, entropy

    return logp_entropy


def with_loss(fn):
    """A function of (hidden, weight) giving (logp, entropy), followed by the GRPO loss in plain PyTorch."""

    def build(p):
        call = fn(p)
        return lambda x, w: clipped_loss(call(x, w)[0], p.advantage)

    return build


def liger_ce(p):
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    head = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda x, w: head(w, x, p.tokens)


def cut_ce(p, filter_eps):
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w: linear_cross_entropy(x, w, p.tokens, reduction="mean", filter_eps=filter_eps)


def quack_ce(p):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w: chunked_linear_cross_entropy(x, w, p.tokens, reduction="mean")


def contenders():
    """[(operation, name, kind of truth, build)]; the first of an operation is ours, the second eager PyTorch."""
    in_place = functools.partial(token_logprobs, in_place=True)
    grpo_in_place = functools.partial(ours_grpo, in_place=True)
    listed = [
        ("logits-forward", "pr1", "full", forward(bound(token_logprobs, "tokens"))),
        ("logits-forward", "eager", "full", forward(bound(eager, "tokens"))),
        ("logits-forward", "torch.compile", "full", forward(bound(eager, "tokens", wrap=compiled))),
        ("logits-forward", "TRL", "full", forward(trl)),
        ("logits-forward", "TRL kernel", "full", forward(trl_kernel)),
        ("logits-forward", "QuACK (no entropy)", "full", forward(quack_logp)),
        ("logits-train", "pr1", "full", from_logits(bound(token_logprobs, "tokens"))),
        ("logits-train", "eager", "full", from_logits(bound(eager, "tokens"))),
        ("logits-train", "pr1 in place", "full", from_logits(bound(in_place, "tokens"), in_place=True)),
        ("logits-train", "torch.compile", "full", from_logits(bound(eager, "tokens", wrap=compiled))),
        ("logits-train", "TRL", "full", from_logits(trl)),
        ("logits-train", "TRL kernel", "full", from_logits(trl_kernel)),
        ("logits-train", "QuACK (no entropy)", "logp", from_logits(quack_logp)),
        ("logits-grpo", "pr1", "grpo", from_logits(bound(ours_grpo, "rows"))),
        ("logits-grpo", "eager", "grpo", from_logits(bound(eager_grpo, "tokens", "advantage"))),
        ("logits-grpo", "pr1 in place", "grpo", from_logits(bound(grpo_in_place, "rows"), in_place=True)),
        ("logits-grpo", "torch.compile", "grpo", from_logits(bound(eager_grpo, "tokens", "advantage", wrap=compiled))),
        ("logits-grpo", "Liger Triton in place", "grpo", from_logits(liger_triton, in_place=True, shape=liger_shape)),
        ("hidden-forward", "pr1", "full", forward(bound(linear_token_logprobs, "tokens"), linear=True)),
        ("hidden-forward", "eager", "full", forward(bound(linear_eager, "tokens"), linear=True)),
        ("hidden-forward", "torch.compile", "full", forward(bound(linear_eager, "tokens", wrap=compiled), linear=True)),
        ("hidden-forward", "TRL chunked", "full", forward(trl_chunked, linear=True)),
        ("hidden-forward", "Liger scaled CE", "full", forward(liger_logprobs, linear=True)),
    ]
    heads = [
        ("pr1", "grpo", bound(ours_head, "rows")),
        ("eager", "grpo", bound(linear_eager_grpo, "tokens", "advantage")),
        ("torch.compile", "grpo", bound(linear_eager_grpo, "tokens", "advantage", wrap=compiled)),
        ("Liger fused linear GRPO", "grpo", liger_linear),
        ("Liger scaled CE + loss", "grpo", with_loss(liger_logprobs)),
        ("TRL chunked + loss", "grpo", with_loss(trl_chunked)),
        ("Liger FLCE (CE only)", "ce", liger_ce),
        ("CCE (CE only)", "ce", lambda p: cut_ce(p, "high")),
        ("CCE exact (CE only)", "ce", lambda p: cut_ce(p, None)),
        ("QuACK (CE only)", "ce", quack_ce),
    ]
    for operation, frozen in (("hidden-grpo", False), ("hidden-grpo-frozen", True)):
        listed += [(operation, name, kind, from_hidden(fn, frozen)) for name, kind, fn in heads]
    return listed
