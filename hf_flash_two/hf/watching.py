"""`watch_attention`: what the layers of a model look at, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hf_flash_two.hf import compat
from hf_flash_two.hf.patching import check_model, report_layers
from hf_flash_two.hf.watched import Look, Watch, watches
from hf_flash_two.weights import AttentionWeights


def received(layer: str, weights: AttentionWeights) -> Tensor:
    """How much attention each key of a layer received, [B, Hq, Tk]."""
    return weights.received()


@contextmanager
def watch_attention(model: nn.Module, look: Look = received) -> Iterator[dict[str, list]]:
    """Look at the weights of each attention layer of ``model`` while it runs, and keep no matrix.

        with watch_attention(model) as seen:
            model(**batch)
        seen["model.layers.0.self_attn"][0]  # [B, Hq, Tk]: how much attention each key received

    Args:
        model: whose attention layers all use flash_two.
        look: called in each layer's forward with the layer's name in the model and its
            `AttentionWeights`, which are to be asked there and then; by default what each key
            received. What it returns is kept, unless that is None.

    Yields:
        By name of the layer what ``look`` returned in each of its forwards. A layer that attends
        twice has two of each; so has one that is computed again under gradient checkpointing,
        if the backward runs within the block.

    Raises:
        TypeError: not a loaded model.
        ValueError: a layer does not use flash_two.
        NotImplementedError: in the forward, under context parallelism, and where a layer has a sink
            of its own for each query.
    """
    check_model(model)
    report = list(report_layers(model))
    if not report or not all(layer.ok for layer in report):
        others = ", ".join(layer.name for layer in report if not layer.ok) or "no attention layer"
        raise ValueError(
            f"model: its layers must use flash_two to be watched, and {others} does not; load it "
            f"with attn_implementation={compat.FLASH_TWO!r}, or call hf_flash_two.patch(model)"
        )
    watch = Watch({id(model.get_submodule(layer.name)): layer.name for layer in report}, look)
    watches.append(watch)
    try:
        yield watch.seen
    finally:
        watches.remove(watch)
