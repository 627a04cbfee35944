"""The operations of the trainer that are worth a kernel, each beside its plain PyTorch form `*_ref`.

Nothing here knows of images, tasks or models. CPU tensors always take the plain form.
"""

from .grpo import (
    grpo_loss,
    grpo_loss_ref,
    grpo_loss_triton,
    linear_grpo_loss,
    linear_grpo_loss_ref,
    linear_grpo_loss_triton,
)
from .logprobs import (
    linear_token_logprobs,
    linear_token_logprobs_ref,
    linear_token_logprobs_triton,
    token_logprobs,
    token_logprobs_ref,
    token_logprobs_triton,
)
from .objective import Objective, Rows, RowStats, row_loss, row_terms
from .sample import Sampling, sample_tokens, sample_tokens_ref, token_keys, uniform

__all__ = [
    "Objective",
    "RowStats",
    "Rows",
    "Sampling",
    "grpo_loss",
    "grpo_loss_ref",
    "grpo_loss_triton",
    "linear_grpo_loss",
    "linear_grpo_loss_ref",
    "linear_grpo_loss_triton",
    "linear_token_logprobs",
    "linear_token_logprobs_ref",
    "linear_token_logprobs_triton",
    "row_loss",
    "row_terms",
    "sample_tokens",
    "sample_tokens_ref",
    "token_keys",
    "token_logprobs",
    "token_logprobs_ref",
    "token_logprobs_triton",
    "uniform",
]
