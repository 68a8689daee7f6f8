"""Tensors that spell out who sees whom -> `AttentionMask`: dense, additive, or by indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_flash_two.hf.forward_pass import once
from hf_flash_two.masks import FAR, AttentionMask
from hf_flash_two.tensor_cache import has_value, is_symbolic

logger = logging.get_logger(__name__)

HIDDEN = -1e4
"""Scores set to this or less have probability 0; models use no milder number."""

_TILE_ELEMENTS = 2**22


def from_tensor(
    mask: Tensor, shape: tuple[int, int, int, int], causal: bool
) -> tuple[AttentionMask, Tensor | None]:
    """(mask, additive bias or None) of a model's own mask.

    Args:
        mask: [B, Tk], nonzero for the keys to see; or broadcastable to ``shape``: bool, True may
            attend, or float, added to the scores.
        shape: [B, H, Tq, Tk], of the scores.
        causal: whether a [B, Tk] mask leaves causality to the layer.
    """
    batch, _, queries, keys = shape
    if mask.dim() == 2:
        if mask.shape != (batch, keys):
            raise ValueError(
                f"attention_mask: expected [batch, keys] = [{batch}, {keys}], got "
                f"{list(mask.shape)}"
            )
        padding = once(mask, "padding", lambda: _from_padding(mask))
        return (padding & AttentionMask.causal() if causal and queries > 1 else padding), None
    if mask.dim() != 4 or any(
        got not in (1, want) for got, want in zip(mask.shape, shape, strict=True)
    ):
        raise ValueError(
            "attention_mask: expected [batch, keys], or a tensor broadcastable to [batch, heads, "
            f"queries, keys] = {list(shape)}, got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return once(mask, ("dense", queries, keys), lambda: from_dense(mask, queries, keys)), None
    if not mask.is_floating_point():
        raise ValueError(
            "attention_mask: expected bool (True may attend) or float (added to the scores) in "
            f"four dimensions, got {mask.dtype}"
        )
    visible = None
    if mask.shape[1] == 1 and not mask.requires_grad and not is_symbolic():
        key = ("additive", queries, keys)
        visible = once(mask, key, lambda: _from_additive(mask, queries, keys))
    return (AttentionMask.full(), mask) if visible is None else (visible, None)


def _from_padding(mask: Tensor) -> AttentionMask:
    # Integers may number documents, which others keep apart.
    return AttentionMask.from_padding(mask if mask.is_floating_point() else mask != 0)


def from_dense(visible: Tensor, queries: int, keys: int) -> AttentionMask:
    """The mask of bool [B or 1, H or 1, Tq or 1, Tk or 1]; intervals where they suffice."""
    visible = visible.expand(*visible.shape[:3], keys)
    if visible.shape[1:3] == (1, 1) and queries != 1:
        return AttentionMask.from_padding(visible[:, 0, 0])
    if visible.shape[1] != 1 or is_symbolic():
        return AttentionMask.from_dense(visible)
    return from_tiles(lambda i, j: visible[:, :, i:j], queries, visible[:, :, 0].numel())


def from_tiles(
    visible: Callable[[int, int], Tensor], q_length: int, row_elements: int
) -> AttentionMask:
    """The mask that ``visible(start, stop)``, bool [B or 1, 1, stop - start, Tk], spells out.

    Args:
        row_elements: how many elements one row of ``visible`` has, over the whole batch.
    """
    step = max(1, _TILE_ELEMENTS // max(1, row_elements))
    if is_symbolic() and q_length != 1:
        return AttentionMask.from_dense(visible(0, q_length))
    starts = range(0, q_length, step)
    first: Any = None
    last: Any = None
    count: Any = 0
    for start in starts:
        tile = visible(start, min(start + step, q_length))[:, 0]
        query = torch.arange(start, start + tile.shape[1], device=tile.device)[:, None]
        tile_first = torch.where(tile, query, FAR).amin(1)
        tile_last = torch.where(tile, query + 1, -FAR).amax(1)
        first = tile_first if first is None else torch.minimum(first, tile_first)
        last = tile_last if last is None else torch.maximum(last, tile_last)
        count = count + tile.sum(1)
    if q_length == 1 or bool((count == (last - first).clamp(min=0)).all()):
        return AttentionMask.from_intervals(first, last, query_offset=0)
    logger.warning_once(
        "flash_two: this attention mask has keys that are seen by more than one run of queries. It "
        "is kept as a dense tensor of batch x queries x keys bytes, and no tile of it is skipped."
    )
    tiles = [visible(start, min(start + step, q_length)) for start in starts]
    return replace(AttentionMask.from_dense(torch.cat(tiles, dim=2)), query_offset=0)


def from_indices(indices: Tensor, keys: int) -> AttentionMask:
    """Each query sees the keys that ``indices`` [B, Tq, n] names."""
    batch, queries, _ = indices.shape
    visible = torch.zeros(batch, queries, keys, dtype=torch.bool, device=indices.device)
    return AttentionMask.from_dense(visible.scatter(-1, indices.long(), True)[:, None])


def from_block_indices(indices: Tensor, size: int, heads: int, keys: int) -> AttentionMask:
    """Each query sees the blocks of ``size`` keys that ``indices`` names.

    Args:
        indices: [B, groups of heads, Tq, n], negative for none.
    """
    blocks = -(-keys // size)
    batch, groups, queries, _ = indices.shape
    chosen = indices.masked_fill(indices < 0, blocks)
    visible = torch.zeros(
        batch, groups, queries, blocks + 1, dtype=torch.bool, device=indices.device
    ).scatter(-1, chosen, True)[..., :blocks]
    visible = visible.repeat_interleave(size, dim=-1)[..., :keys]
    return AttentionMask.from_dense(visible.repeat_interleave(heads // groups, dim=1))


def parted(term: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(bias, visible) that stand for ``term`` in a sum with scores; None for one not needed."""

    def hidden() -> Tensor | None:
        found = term <= HIDDEN
        return found.logical_not_() if not has_value(found) or found.any() else None

    with torch.no_grad():
        visible = once(term, "hidden", hidden)
    if visible is None:
        return term, None
    bias = torch.where(visible, term, 0)
    needed = term.requires_grad or not has_value(bias) or bias.any()
    return (bias if needed else None), visible


def _from_additive(mask: Tensor, queries: int, keys: int) -> AttentionMask | None:
    """The mask that a tensor of 0 and the smallest number (or -inf) means; None for any other."""
    visible = mask == 0
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None
    return from_dense(visible, queries, keys)
