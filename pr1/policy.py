"""The vision-language model as the stages see it: hidden states of a pack, the head's weight, image features."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from pr1.attention import TEXT, VISION, PackedAttention
from pr1.balance import Costs
from pr1.fused import use_liger
from pr1.records import ImageInput, Pack


class FeatureCache:
    """Image features of a frozen tower by content, least recently used first out."""

    def __init__(self, budget: int):
        self.budget, self.used = budget, 0
        self.entries: OrderedDict[str, tuple[torch.Tensor, ...]] = OrderedDict()

    def get(self, key: str) -> tuple[torch.Tensor, ...] | None:
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: str, features: tuple[torch.Tensor, ...]) -> None:
        size = _bytes(features)
        if size > self.budget:  # would drive everything else out and still not fit
            return
        self.used -= _bytes(self.entries.pop(key, ()))
        while self.used + size > self.budget:
            self.used -= _bytes(self.entries.popitem(last=False)[1])
        self.entries[key] = features
        self.used += size


def _bytes(features: tuple[torch.Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in features)


class Policy:
    """A model of a known family and everything the stages ask of it.

    model: transformers' own Qwen2(.5)-VL for conditional generation, on `device`; its attention is set to ours.
    train_vision: whether gradients reach the tower and merger; a frozen tower runs one image a call and is cached.
    checkpointing: keep only the inputs of decoder layers and vision blocks, and run these again in the backward pass.
    """

    def __init__(self, family, model, device, *, train_vision: bool, cache: FeatureCache, checkpointing: bool = False):
        self.family, self.model, self.train_vision = family, model.to(device), train_vision
        self.device = torch.device(device)
        self.cache = cache
        self.text, self.visual = family.language_model(model), family.visual(model)
        self.text.config._attn_implementation = TEXT
        self.visual.config._attn_implementation = VISION
        self.visual.requires_grad_(train_vision)
        model.train(False)  # these families have no dropout; eval mode keeps it that way whatever the config says
        self.costs = self._costs()
        if self.device.type == "cuda":
            use_liger(model)
        if checkpointing:
            for layer in [*self.text.layers, *self.visual.blocks]:
                layer.forward = _recomputed(layer.forward)

    def _costs(self) -> Costs:
        """A trunk token costs 2 FLOPs a parameter, a pair 4 for each of the layers' query channels; an image token is
        made of merge x merge patches that all of the tower's parameters see."""
        trunk, tower = (
            sum(p.numel() for p in layers.parameters()) for layers in (self.text.layers, self.visual.blocks)
        )
        config = self.text.config
        patches = self.visual.spatial_merge_size**2 if self.train_vision else 0
        return Costs(2 * config.hidden_size * config.num_hidden_layers / trunk, patches * tower / trunk)

    @property
    def vocab_size(self) -> int:
        return self.model.lm_head.weight.shape[0]

    def features(self, images: Sequence[ImageInput]) -> list[tuple[torch.Tensor, ...]]:
        """Per image a tuple of (tokens, H) tensors, in order; a trained tower runs once over the distinct images."""
        if not self.train_vision or not images:
            return [self._frozen_features(image) for image in images]
        distinct = {image.key: image for image in images}
        found = dict(zip(distinct, self.family.image_features(self.model, list(distinct.values()))))
        return [found[image.key] for image in images]

    @torch.no_grad()
    def _frozen_features(self, image: ImageInput) -> tuple[torch.Tensor, ...]:
        features = self.cache.get(image.key)
        if features is None:
            (features,) = self.family.image_features(
                self.model, [image]
            )  # alone: the same whoever else is in the batch
            self.cache.put(image.key, features)
        return features

    def run(self, ids, position_ids, features, attend, image_rows=None) -> torch.Tensor:
        """ids (T,), position_ids (3, T), image_rows (I,) of the image tokens (searched for in ids when not given) ->
        last hidden states (T, H) after the final norm."""
        embeds = self.family.embed(self.model, ids, features, image_rows)
        out = self.text(inputs_embeds=embeds[None], position_ids=position_ids[:, None], use_cache=False, attend=attend)
        return out.last_hidden_state[0]

    def step(self, ids, positions, attend) -> torch.Tensor:
        """One text token of each of B sequences: ids, positions (B,) -> last hidden states (B, H) after the norm."""
        return self.family.step_hidden(self.text, ids, positions, attend)

    def hidden(self, pack: Pack) -> torch.Tensor:
        """(N, H): for each loss row the hidden state that predicts its token."""
        attend, features = PackedAttention(pack.segments), self.features(pack.images)
        return self.run(pack.ids, pack.position_ids, features, attend, pack.image_rows)[pack.row_index]

    @contextlib.contextmanager
    def head(self):
        """The head's whole weight (V, H); gradients reach it through autograd."""
        yield self.model.lm_head.weight

    @contextlib.contextmanager
    def rollout_weights(self):
        """Parameters as the rollout reads them. Replicated weights are whole already."""
        yield self


def _recomputed(forward):
    """The forward of one layer, its activations not kept: without gradients, as in a rollout, nothing changes."""

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
