"""Which layers are watched by `watch_attention`, for the functions that compute their attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_flash_two.weights import AttentionWeights

Look = Callable[[str, AttentionWeights], Any]
"""Called with the name of a layer and its weights."""


class Watch:
    """
    Attributes:
        names: of the layers watched, by their ``id``.
        seen: by name, what ``look`` returned, unless that is None.
    """

    def __init__(self, names: dict[int, str], look: Look):
        self.names, self._look = names, look
        self.seen: dict[str, list] = {}

    def show(self, name: str, weights: AttentionWeights) -> None:
        result = self._look(name, weights)
        if result is not None:
            self.seen.setdefault(name, []).append(result)


watches: list[Watch] = []


def is_watched(layer: object) -> bool:
    """Whether anybody wants the weights of ``layer``."""
    return bool(watches) and any(id(layer) in watch.names for watch in watches)


@torch.compiler.disable(reason="watch_attention looks at attention in eager mode")
def show_weights(layer: object, query: Tensor, key: Tensor, value: Tensor, **terms: Any) -> None:
    """Show the weights of ``layer`` to all who watch it.

    Args:
        terms: arguments of `AttentionWeights`.
    """
    weights = AttentionWeights(query.to(value.dtype), key.to(value.dtype), **terms)
    for watch in watches:
        if (name := watch.names.get(id(layer))) is not None:
            watch.show(name, weights)
