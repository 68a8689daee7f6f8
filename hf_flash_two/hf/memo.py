"""What layers work out from a tensor they all get: once, as long as it stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_flash_two.hf.packing import recording
from hf_flash_two.masks import AttentionMask

Found = TypeVar("Found")


class _Kept(NamedTuple):
    state: tuple
    others: tuple[ref[Tensor], ...]
    found: AttentionMask | Tensor | None


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once(tensor: Tensor, key, build: Callable[[], Found], *others: Tensor) -> Found:
    """``build()``, which reads all of the tensors; kept while neither they nor ``key`` change.

    One result is kept per ``tensor``, as long as it lives. What is not written by PyTorch's own
    operations goes unseen.
    """
    if recording() or tensor.is_inference():
        return build()
    kept = _kept.get(tensor)
    state = (key, tensor._version, *(other._version for other in others))
    if (
        kept is not None
        and kept.state == state
        and all(seen() is other for seen, other in zip(kept.others, others, strict=True))
    ):
        return kept.found
    # What is made in inference mode cannot be saved for a later backward.
    with torch.inference_mode(False):
        found = build()
    # A view of the tensor would keep it alive, and so itself.
    if not _is_view_of(found, tensor):
        _kept[tensor] = _Kept(state, tuple(map(ref, others)), found)
    return found


def _is_view_of(found: AttentionMask | Tensor | None, tensor: Tensor) -> bool:
    seen = found.dense if isinstance(found, AttentionMask) else found
    return seen is not None and (seen is tensor or seen._base is tensor)
