"""Hand-made samples, rollouts and plain-transformers truths shared by the tests of packing, rollout and training."""

from __future__ import annotations

import torch
from tiny_models import messages, picture

from pr1.policy import FeatureCache, Policy
from pr1.records import Rollout, Sample


def make_sample(family, sizes, text="Output the bounding box of the cat in the image.", name="s") -> Sample:
    images = tuple(picture(w, h) for w, h in sizes)
    return Sample(name, "det", messages(len(sizes), text), images, tuple(family.frame(w, h) for w, h in sizes), None)


def make_policy(family, dtype=torch.float64, train_vision=True, device="cpu", **how) -> Policy:
    model = family.load_model(dtype)
    return Policy(family, model, torch.device(device), train_vision=train_vision, cache=FeatureCache(1 << 28), **how)


def make_rollouts(family, prompts, lengths, seed=0) -> list[Rollout]:
    """Group-major rollouts of random legal tokens; lengths[p][g] tokens each (0 is an empty completion)."""
    generator = torch.Generator().manual_seed(seed)
    legal = (~family.banned_ids(len(family.tokenizer))).nonzero()[:, 0]
    rollouts = []
    for p, group in enumerate(lengths):
        for g, length in enumerate(group):
            ids = legal[torch.randint(len(legal), (length,), generator=generator)]
            rollouts.append(Rollout(p, g, prompts[p], ids, torch.ones(length, dtype=torch.bool),
                                    -torch.rand(length, generator=generator), torch.zeros(length),
                                    torch.zeros(length), "", True))  # fmt: skip
    return rollouts


def plain_logits(model, prompt, completion_ids) -> torch.Tensor:
    """(C, V): transformers' own forward on one prompt with one completion; row j predicts completion token j."""
    ids = torch.cat([prompt.ids, completion_ids])[None]
    kinds = (ids == model.config.image_token_id).int()
    extra = {}
    if prompt.images:
        extra = dict(pixel_values=torch.cat([i.pixels for i in prompt.images]).to(model.dtype),
                     image_grid_thw=torch.tensor([i.grid for i in prompt.images]), mm_token_type_ids=kinds)  # fmt: skip
    model.model.rope_deltas = None
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **extra).logits[0]
    return logits[len(prompt.ids) - 1 : -1]
