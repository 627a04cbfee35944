"""The vision-language model as the stages see it: hidden states of a pack, the head's weight, image features."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence

import torch

from pr1.attention import TEXT, VISION, PackedAttention
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
    """

    def __init__(self, family, model, device, *, train_vision: bool, cache: FeatureCache):
        self.family, self.model, self.device, self.train_vision = family, model.to(device), device, train_vision
        self.cache = cache
        self.text, self.visual = family.language_model(model), family.visual(model)
        self.text.config._attn_implementation = TEXT
        self.visual.config._attn_implementation = VISION
        self.visual.requires_grad_(train_vision)
        model.train(False)  # these families have no dropout; eval mode keeps it that way whatever the config says

    @property
    def vocab_size(self) -> int:
        return self.model.lm_head.weight.shape[0]

    def features(self, images: Sequence[ImageInput]) -> list[tuple[torch.Tensor, ...]]:
        """Per image a tuple of (tokens, H) tensors, in order."""
        if self.train_vision:
            return self.family.image_features(self.model, images) if images else []
        return [self._frozen_features(image) for image in images]

    @torch.no_grad()
    def _frozen_features(self, image: ImageInput) -> tuple[torch.Tensor, ...]:
        features = self.cache.get(image.key)
        if features is None:
            (features,) = self.family.image_features(
                self.model, [image]
            )  # alone: the same whoever else is in the batch
            self.cache.put(image.key, features)
        return features

    def run(self, ids, position_ids, features, attend) -> torch.Tensor:
        """ids (T,), position_ids (3, T) -> last hidden states (T, H) after the final norm."""
        embeds = self.family.embed(self.model, ids, features)
        out = self.text(inputs_embeds=embeds[None], position_ids=position_ids[:, None], use_cache=False, attend=attend)
        return out.last_hidden_state[0]

    def hidden(self, pack: Pack) -> torch.Tensor:
        """(N, H): for each loss row the hidden state that predicts its token."""
        attend = PackedAttention(pack.segments)
        return self.run(pack.ids, pack.position_ids, self.features(pack.images), attend)[pack.row_index]

    @contextlib.contextmanager
    def head(self):
        """The head's whole weight (V, H); gradients reach it through autograd."""
        yield self.model.lm_head.weight

    @contextlib.contextmanager
    def rollout_weights(self):
        """Parameters as the rollout reads them. Replicated weights are whole already."""
        yield self
