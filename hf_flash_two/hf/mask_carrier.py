"""The mask on its way through a Transformers model, from the mask function to the attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map
from transformers.utils import logging

from hf_flash_two.hf.packing import document_ids, falls
from hf_flash_two.masks import AttentionMask

logger = logging.get_logger(__name__)

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


class MaskCarrier(BlockMask):
    """An `AttentionMask` that Transformers passes through and foreign code may use as a tensor.

    Transformers lets a mask pass untouched if it is a tensor or a ``BlockMask`` of four dimensions;
    nothing else of ``BlockMask`` is used. Whatever treats it as a tensor gets the dense mask it
    stands for, at O(Tq * Tk) memory: additive (0 and the smallest number) in a sum, boolean (True
    may attend) everywhere else.

    Attributes:
        mask: what the attention uses.
        causal: whether causality is part of the mask.
        may_pack: whether ``position_ids`` that restart say more than the mask: False if it already
            holds the documents, or padding. A bool tensor [] where only the device knows.
    """

    dtype = torch.bool
    ndim = 4

    def __init__(
        self,
        mask: AttentionMask,
        shape: tuple[int, int, int, int],
        device: torch.device | str,
        *,
        causal: bool,
        may_pack: bool | Tensor,
    ):
        self.mask = mask
        self._shape = tuple(shape)
        self.device = torch.device(device)
        self.causal = causal
        self.may_pack = may_pack
        self._packed: tuple[Tensor, AttentionMask] | None = None

    @property
    def shape(self) -> torch.Size:
        """[B, 1, Tq, Tk]"""
        return torch.Size(self._shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def packed(self, position_ids: Tensor) -> AttentionMask:
        """The mask within the documents that ``position_ids`` [1 or B, T] tell of."""
        if self.may_pack is False or self._shape[2] != self._shape[3]:
            return self.mask
        if torch.compiler.is_compiling():
            return self.mask & documents(position_ids, self.may_pack)
        if self._packed is None or self._packed[0] is not position_ids:
            restarts = documents(position_ids, self.may_pack) if falls(position_ids) else None
            self._packed = (position_ids, self.mask if restarts is None else self.mask & restarts)
        return self._packed[1]

    def as_bool(self) -> Tensor:
        """bool [B, 1, Tq, Tk], True may attend."""
        return self.mask.to_dense(*self._shape[2:], device=self.device).expand(self._shape)

    def as_additive(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, Tq, Tk]: 0 where the query may attend, the smallest number elsewhere."""
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return torch.where(self.as_bool(), torch.zeros_like(hidden), hidden)

    to_dense = as_bool

    def contiguous(self, *_, **__) -> MaskCarrier:
        return self

    def to(self, *args, **kwargs) -> MaskCarrier | Tensor:
        device = kwargs.get("device", args[0] if args else None)
        if len(args) > 1 and not isinstance(args[1], bool) or "dtype" in kwargs:
            return self.as_bool().to(*args, **kwargs)
        if not isinstance(device, (torch.device, str, int)):
            return self.as_bool().to(*args, **kwargs)
        device = torch.device(device)
        return self if device == self.device else self._replace(self.mask.to(device), device=device)

    def _replace(self, mask: AttentionMask, shape=None, device=None) -> MaskCarrier:
        may_pack = self.may_pack
        if device is not None and isinstance(may_pack, Tensor):
            may_pack = may_pack.to(device)
        return MaskCarrier(
            mask,
            self._shape if shape is None else shape,
            self.device if device is None else device,
            causal=self.causal,
            may_pack=may_pack,
        )

    def __getitem__(self, index) -> MaskCarrier | Tensor:
        rows = _slices(index, self._shape)
        if rows is None:
            return self.as_bool()[index]
        batch, (start_q, stop_q), (start_k, stop_k) = rows
        _, _, queries, keys = self._shape
        mask = self.mask.slice_queries(start_q, stop_q, queries, keys)
        mask = mask.slice_keys(start_k, stop_k, stop_q - start_q, keys)
        parts = {}
        for name in ("first_query", "last_query", "dense"):
            part = getattr(mask, name)
            if part is not None and part.shape[0] > 1:
                parts[name] = part[batch]
        count = len(range(self._shape[0])[batch])
        return self._replace(
            replace(mask, _bounds=[], **parts), (count, 1, stop_q - start_q, stop_k - start_k)
        )

    def __and__(self, other) -> MaskCarrier | Tensor:
        if not isinstance(other, MaskCarrier) or other._shape != self._shape:
            return self.as_bool() & (other.as_bool() if isinstance(other, MaskCarrier) else other)
        queries, keys = self._shape[2:]
        offsets = [m.mask.resolve_offset(queries, keys) for m in (self, other)]
        if offsets[0] != offsets[1]:
            return self.as_bool() & other.as_bool()
        both = replace(self.mask, query_offset=None) & replace(other.mask, query_offset=None)
        carrier = self._replace(replace(both, query_offset=offsets[0]))
        carrier.causal = self.causal or other.causal
        carrier.may_pack = False
        return carrier

    def __rand__(self, other) -> Tensor:
        return other & self.as_bool()

    def __or__(self, other) -> Tensor:
        return self.as_bool() | (other.as_bool() if isinstance(other, MaskCarrier) else other)

    __ror__ = __or__

    def __invert__(self) -> Tensor:
        return ~self.as_bool()

    def __eq__(self, other) -> Tensor:
        return self.as_bool() == other

    def __ne__(self, other) -> Tensor:
        return self.as_bool() != other

    __hash__ = object.__hash__

    def __add__(self, other: Tensor) -> Tensor:
        return torch.add(self, other)

    __radd__ = __add__

    def __getattr__(self, name: str):
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"MaskCarrier has no attribute {name!r}")
        return getattr(self.as_bool(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args = (args, kwargs or {})
        if getattr(func, "__name__", "") not in _SUMS:
            args, kwargs = tree_map(lambda x: x.as_bool() if isinstance(x, cls) else x, args)
            return func(*args, **kwargs)
        logger.warning_once(
            "A mask of `flash_two` was added to scores: an attention of this model does not go "
            "through Transformers' attention interface, and computes them as it always did. "
            "`hf_flash_two.patch(model)` reports which, and replaces what it can."
        )
        dtype = next(x.dtype for x in args[0] if isinstance(x, Tensor))
        args, kwargs = tree_map(lambda x: x.as_additive(dtype) if isinstance(x, cls) else x, args)
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"MaskCarrier({self.mask}, shape={list(self._shape)}, device={self.device})"

    __str__ = __repr__


def documents(position_ids: Tensor, condition: bool | Tensor = True) -> AttentionMask:
    """The documents of `packing.document_ids` as a mask: none sees another."""
    return AttentionMask.from_documents(segment_ids=document_ids(position_ids, condition))


def _slices(index, shape):
    """Batch slice, and (start, stop) of queries and keys; None if ``index`` is anything else."""
    index = index if isinstance(index, tuple) else (index,)
    gaps = [at for at, i in enumerate(index) if i is Ellipsis]
    if gaps:
        at = gaps[0]
        index = index[:at] + (slice(None),) * (5 - len(index)) + index[at + 1 :]
    index = index + (slice(None),) * (4 - len(index))
    if len(index) != 4 or not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        return None
    ranges = [range(n)[i] for n, i in zip(shape, index, strict=True)]
    if len(ranges[1]) != 1 or not all(map(len, ranges)):
        return None
    return index[0], *((r.start, r.stop) for r in ranges[2:])
