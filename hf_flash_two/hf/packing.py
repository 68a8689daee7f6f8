"""Packed documents: which tokens belong together, read off position_ids that restart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad


def recording() -> bool:
    """Whether no value may decide anything: there is none, or what runs is for others as well.

    Operations are recorded by torch.compile, torch.export, torch.jit.trace or a CUDA graph; they
    have shapes alone in a `FakeTensorMode`, and many values under torch.func's transforms.
    """
    return _recorded() or _are_functorch_transforms_active() or active_fake_mode() is not None


def readable(x: Tensor) -> bool:
    """Whether the values of this very tensor may decide: constants may under torch.func.vmap."""
    if _recorded() or x.is_meta or isinstance(x, FakeTensor):
        return False
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return False
        x = get_unwrapped(x)
    return True


def _recorded() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def falls(position_ids: Tensor) -> bool:
    """Whether positions fall anywhere, so that they tell of several documents (a device sync)."""
    return bool((position_ids[..., 1:] < position_ids[..., :-1]).any())


def document_ids(position_ids: Tensor, condition: bool | Tensor = True) -> Tensor:
    """[1 or B, T] positions -> the number of the document that each token belongs to, same shape.

    A document starts where positions fall; if they do so anywhere, also where they stay at the
    row's lowest, since then the token before was a document of its own. Without a fall each row is
    one document: the positions of an image's tokens stay, and may jump ahead.

    Args:
        condition: where False, everything is one document.
    """
    before, after = position_ids[:, :-1], position_ids[:, 1:]
    falls = after < before
    lowest = position_ids.amin(1, keepdim=True)
    stays = (after == before) & (after == lowest) & falls.any()
    return pad(((falls | stays) & condition).cumsum(1), (1, 0))


def documents_of(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """The number of the document that each token belongs to, int64 [B, T]; -1 in padding.

    Each row is read by itself, from one visible token to the next: a document starts where
    positions fall or stay at the row's lowest, and where a mask that numbers documents changes.

    Args:
        position_ids: [1 or B, T]; None: only the mask tells.
        attention_mask: [B, T], 0 for padding; None: all are visible.
    """
    given = position_ids if attention_mask is None else attention_mask
    visible = given.new_ones(given.shape, dtype=torch.bool)
    if attention_mask is not None:
        visible = attention_mask != 0
    places = torch.arange(given.shape[1], device=given.device)
    before = pad(torch.where(visible, places, -1).cummax(1)[0][:, :-1], (1, 0), value=-1)
    follows, before = before >= 0, before.clamp_min(0)
    starts = torch.zeros_like(visible)
    if position_ids is not None:
        position_ids = position_ids.expand(given.shape)
        previous = position_ids.gather(1, before)
        lowest = position_ids.masked_fill(~visible, torch.iinfo(position_ids.dtype).max)
        stays = (position_ids == previous) & (position_ids == lowest.amin(1, keepdim=True))
        starts = (position_ids < previous) | stays
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        starts = starts | (attention_mask != attention_mask.gather(1, before))
    numbers = (starts & follows & visible).cumsum(1)
    return numbers.masked_fill(~visible, -1)


def may_be_packed(position_ids: Tensor | None, batch: int, queries: int, keys: int) -> bool:
    """Whether the shapes allow it: self-attention without a past, one position per token."""
    return (
        position_ids is not None
        and 1 < queries == keys
        and position_ids.dim() == 2
        and position_ids.shape[1] == queries
        and position_ids.shape[0] in (1, batch)
    )


def all_visible(attention_mask: Tensor | None) -> bool | Tensor:
    """Whether [B, T] hides nothing; a bool tensor [] while recording."""
    if attention_mask is None:
        return True
    unpadded = (attention_mask != 0).all()
    return unpadded if recording() else bool(unpadded)
