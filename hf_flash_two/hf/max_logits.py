"""The largest attention scores that a model's layers see, head by head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_flash_two.hf import compat, layer_forward
from hf_flash_two.hf.patching import check_model

_RECORDS = "_flash_two_max_logits"


@contextmanager
def max_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Records the largest score of each head of each layer, for QK-clip and monitoring.

    Source: Kimi Team 2025, arXiv:2507.20534. `flash_attention` says which scores count.

    Args:
        model: its layers with flash_two are recorded, those with another attention are not.

    Yields:
        {name of the layer in ``model``: float32 (float64) [Hq]}, a detached tensor on the layer's
        device: the largest over the batch and over all forwards within the block so far. Layers
        that have not run are not in it. ``clear()`` makes it start anew.
        Under `context_parallel` and ``cp_size`` it is that of whole rows on each rank, and all
        ranks of a row must record, or none. Tensor parallelism gives a rank its own heads.

    Raises:
        TypeError: ``model`` is no model.
        ValueError: no part of it uses flash_two.
        NotImplementedError: a layer has hand-written attention, which may compute with other heads
            than the layer's.
    """
    check_model(model)
    modules = dict(model.named_modules())
    models: list[Any] = [x for x in modules.values() if isinstance(x, PreTrainedModel)]
    if not any(compat.uses_ours(x.config) for x in models):
        raise ValueError(
            "max_logits: no part of the model uses flash_two; load it with "
            "attn_implementation='flash_two'"
        )
    for name, module in modules.items():
        if layer_forward.of(module) is not None:
            raise NotImplementedError(
                f"max_logits: {name} ({type(module).__name__}) has hand-written attention, which "
                "may compute with other heads than the layer's"
            )
    seen: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.__dict__[_RECORDS] = (*records_of(module), (name, seen))
    try:
        yield seen
    finally:
        for module in modules.values():
            rest = tuple(record for record in records_of(module) if record[1] is not seen)
            module.__dict__[_RECORDS] = rest
            if not rest:
                del module.__dict__[_RECORDS]


def records_of(module: nn.Module) -> tuple[tuple[str, dict[str, Tensor]], ...]:
    """Where the scores of a layer are recorded, and its name there; mostly nowhere."""
    if torch.compiler.is_compiling():
        # Of what `__dict__` lacks the compiler forgets that it has looked for it.
        return getattr(module, _RECORDS, ())
    return module.__dict__.get(_RECORDS, ())


def record(records: tuple[tuple[str, dict[str, Tensor]], ...], largest: Tensor) -> None:
    """Enter what one call gave, [B, Hq]."""
    largest = largest.amax(0)
    for name, seen in records:
        seen[name] = torch.maximum(seen[name], largest) if name in seen else largest
