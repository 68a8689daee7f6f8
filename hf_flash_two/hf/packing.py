"""Packed documents: which tokens of a row belong together.

A caller says so in three ways: by boundaries (``cu_seq_lens_q``), by positions that restart, and by
a 2-D mask that numbers the documents. Each row is read by itself, and of each row only the visible
tokens: padding has positions of its own, which tell nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_flash_two.tensor_cache import all_values, is_mapped, is_symbolic


def demand(holds: Tensor, message: str) -> None:
    """Without values: raise RuntimeError unless bool [] ``holds`` when what is traced runs.

    Under `torch.func.vmap`, which runs at once, of any of the values.
    """
    values = all_values(holds)
    if values is None or not is_mapped():
        torch._assert_async(holds, message)
    elif not values.all():
        raise RuntimeError(message)


def document_starts(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Where a visible token belongs to another document than the visible token before it.

    It does where its position is lower, or is the row's lowest once more: the token before was a
    document of its own. Positions that stay at a higher place are those of an image's tokens. It
    also does where an integer mask numbers it differently.

    Args:
        position_ids: [1 or B, T], or None.
        attention_mask: [B, T], nonzero for visible tokens; None if all are. Not both are None.

    Returns:
        bool [1 or B, T].
    """
    visible = None if attention_mask is None else attention_mask != 0
    starts: Tensor | bool = False
    if position_ids is not None:
        before, seen = _before(position_ids, visible), position_ids
        if visible is not None:
            seen = torch.where(visible, position_ids, position_ids.amax(1, keepdim=True))
        again = (position_ids == before) & (position_ids == seen.amin(1, keepdim=True))
        starts = (position_ids < before) | again
    if attention_mask is not None and numbers_documents(attention_mask):
        starts = starts | (attention_mask != _before(attention_mask, visible))
    like = position_ids if attention_mask is None else attention_mask
    if visible is None:
        visible = torch.ones_like(like, dtype=torch.bool)
    follows = pad(visible.cumsum(1)[:, :-1] > 0, (1, 0), value=False)
    return starts & visible & follows


def numbers_documents(attention_mask: Tensor) -> bool:
    """Whether the values of a mask may be numbers of documents: those of its dtype can be."""
    return attention_mask.dtype != torch.bool and not attention_mask.is_floating_point()


def document_ids(position_ids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
    """The number of the document that each token belongs to, [1 or B, T], from 0 in each row."""
    return document_starts(position_ids, attention_mask).cumsum(1)


def ids_of_boundaries(ends: Tensor, length: int) -> Tensor:
    """The number of each token's document, [1, length], from boundaries [N + 1] in a row."""
    token = torch.arange(length, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, token, right=True)[None] - 1


def positions_of(ids: Tensor) -> Tensor:
    """How far each token stands from the start of its document, [B, T] like ``ids``."""
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(1).values


def may_be_packed(position_ids: Tensor | None, batch: int, queries: int) -> bool:
    """Whether the shapes allow it: several tokens in a row, with one position each."""
    return (
        position_ids is not None
        and queries > 1
        and position_ids.dim() == 2
        and position_ids.shape[1] == queries
        and position_ids.shape[0] in (1, batch)
    )


def all_visible(attention_mask: Tensor | None) -> bool | Tensor:
    """Whether [B, T] hides nothing; a bool tensor [] where no values are known."""
    if attention_mask is None:
        return True
    unpadded = (attention_mask != 0).all()
    return unpadded if is_symbolic() else bool(unpadded)


def _before(x: Tensor, visible: Tensor | None) -> Tensor:
    """The value of ``x`` [B, T] at the last visible token before each; any where there is none."""
    if visible is None:
        return x.roll(1, dims=1)
    x, visible = torch.broadcast_tensors(x, visible)
    index = torch.arange(x.shape[1], device=x.device).expand_as(x)
    last = torch.where(visible, index, 0).cummax(1).values
    return x.gather(1, last.roll(1, dims=1))
