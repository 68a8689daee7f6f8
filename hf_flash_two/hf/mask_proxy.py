"""The mask on its way through a Transformers model, from the mask function to the attention."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map
from transformers.utils import logging

from hf_flash_two.hf.tensor_masks import from_dense
from hf_flash_two.masks import AttentionMask

if TYPE_CHECKING:
    from hf_flash_two.parallel.sequence import Spread

logger = logging.get_logger(__name__)

_bitwise_and: Any = torch.bitwise_and  # takes proxies too, by `__torch_function__`
_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


class MaskProxy(BlockMask):
    """An `AttentionMask` that Transformers passes through and foreign code may use as a tensor.

    Transformers passes on a tensor or a ``BlockMask`` of four dimensions; nothing else of
    ``BlockMask`` is used. Code that treats the proxy as a tensor gets the dense mask, in O(Tq * Tk)
    memory: additive (0 and the smallest number) where ``dtype`` is a float, in a sum, or converted
    to a float; boolean (True may attend) everywhere else.

    Attributes:
        mask: what the attention uses.
        dtype: that of the tensor it stands for.
        causal: whether causality is part of the mask.
        packed: whether it holds the packed documents that the model's caller described.
        padding: [B, L], nonzero for visible tokens, that it was made with; None if all are.
        spread: where the model gets one shard of the sequence, how it is spread: ``mask`` is of
            the whole, and the tensor has this rank's queries and all keys.
        lead: how many keys, seen by none of the queries, ``mask`` has in front of the tensor's: for
            batch-invariant attention, where the cache has dropped the oldest. None: where a
            document starts is no longer known.
    """

    ndim = 4

    def __init__(
        self,
        mask: AttentionMask,
        shape: tuple[int, int, int, int],
        device: torch.device | str,
        dtype: torch.dtype = torch.bool,
        *,
        causal: bool,
        packed: bool = False,
        padding: Tensor | None = None,
        spread: Spread | None = None,
        lead: int | None = 0,
    ):
        self.mask, self.device, self.dtype = mask, torch.device(device), dtype
        batch, heads, queries, keys = shape
        self._shape = batch, heads, queries, keys
        self.causal, self.packed, self.padding = causal, packed, padding
        self.spread, self.lead = spread, lead

    @property
    def shape(self) -> torch.Size:
        """[B, 1, Tq, Tk]"""
        return torch.Size(self._shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def broadcast_to(self, queries: int, keys: int) -> MaskProxy:
        """The mask of one query, or to one key, as that of all; any other as it is.

        One that hides nothing fits all lengths: BridgeTower takes that of other tokens, which goes
        unnoticed under eager, where it is None.
        """
        batch, heads, *own = self._shape
        if own == [queries, keys]:
            return self
        if self.mask.hides_nothing:
            return self._replace(shape=(batch, heads, queries, keys))
        if self.spread is not None:
            return self
        wanted = [n if has == 1 else has for has, n in zip(own, (queries, keys), strict=True)]
        if wanted == own:
            return self
        mask = from_dense(self.as_bool(), *wanted)
        return self._replace(mask=mask, shape=(batch, heads, *wanted))

    def as_bool(self) -> Tensor:
        """bool [B, 1, Tq, Tk], True may attend."""
        queries, keys = self._shape[2:]
        if self.spread is None:
            lead = self.lead or 0
            visible = self.mask.to_dense(queries, lead + keys, device=self.device)
            return visible[..., lead:].expand(self._shape)
        queries *= self.spread.ranks
        rows = self.spread.layout.positions(self.spread.rank, queries, self.device)
        visible = self.mask.to_dense(queries, keys, device=self.device)
        return visible.index_select(2, rows).expand(self._shape)

    def as_additive(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, Tq, Tk]: 0 where the query may attend, the smallest number elsewhere."""
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.device)
        return torch.where(self.as_bool(), torch.zeros_like(hidden), hidden)

    def as_tensor(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense mask in its own ``dtype``, or in another.

        The additive one as bool is True where it is not 0: there the query may not attend.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype.is_floating_point:
            return self.as_additive(dtype)
        visible = self.as_bool()
        return (~visible if self.dtype.is_floating_point else visible).to(dtype)

    def to_dense(self) -> Tensor:
        return self.as_tensor()

    def contiguous(self, *_, **__) -> MaskProxy:
        return self

    def to(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args, **kwargs
    ) -> MaskProxy | Tensor:
        options = [*args, *kwargs.values()]
        for like in (x for x in options if isinstance(x, Tensor)):
            options += [like.device, like.dtype]
        dtypes = [x for x in options if isinstance(x, torch.dtype) and x != self.dtype]
        devices = [
            torch.device(x)
            for x in options
            if isinstance(x, (torch.device, str, int)) and not isinstance(x, bool)
        ]
        moved = self
        if devices and devices[0] != self.device:
            padding = None if self.padding is None else self.padding.to(devices[0])
            mask = self.mask.to(devices[0])
            moved = self._replace(mask=mask, device=devices[0], padding=padding)
        return moved.as_tensor(dtypes[0]) if dtypes else moved

    def float(self) -> Tensor:
        return self.as_tensor(torch.float32)

    def type_as(self, other: Tensor) -> Tensor:
        return self.as_tensor(other.dtype)

    def _replace(self, **changes) -> MaskProxy:
        names = "mask shape device dtype causal packed padding spread lead".split()
        return MaskProxy(**{name: getattr(self, name) for name in names} | changes)

    def __getitem__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, index
    ) -> MaskProxy | Tensor:
        rows = _slices(index, self._shape)
        if rows is None or self.spread is not None or self.lead:
            return self.as_tensor()[index]
        batch, (start_q, stop_q), (start_k, stop_k) = rows
        _, _, queries, keys = self._shape
        mask = self.mask.slice_queries(start_q, stop_q, queries, keys)
        mask = mask.slice_keys(start_k, stop_k, stop_q - start_q, keys)
        mask = mask.each_tensor(lambda part: part[batch] if part.shape[0] > 1 else part)
        shape = len(range(self._shape[0])[batch]), 1, stop_q - start_q, stop_k - start_k
        padding = None if self.padding is None else self.padding[batch]
        return self._replace(mask=mask, shape=shape, padding=padding)

    def __and__(self, other) -> MaskProxy | Tensor:
        whole = self.spread is None and not self.lead
        if not whole or not isinstance(other, MaskProxy) or other._shape != self._shape:
            return _bitwise_and(self, other)
        queries, keys = self._shape[2:]
        offset, others = (m.mask.resolve_offset(queries, keys) for m in (self, other))
        if offset != others:
            return _bitwise_and(self, other)
        both = replace(self.mask, query_offset=offset) & replace(other.mask, query_offset=offset)
        causal, packed = self.causal or other.causal, self.packed or other.packed
        return self._replace(mask=both, causal=causal, packed=packed)

    def __getattr__(self, name: str):
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"MaskProxy has no attribute {name!r}")
        return getattr(self.as_tensor(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        in_sum = getattr(func, "__name__", "") in _SUMS
        if in_sum:
            logger.warning_once(
                "A mask of `flash_two` was added to scores: an attention layer of this model "
                "computes them itself instead of through Transformers' attention interface. "
                "`hf_flash_two.patch(model)` reports which, and replaces what it can."
            )
        scores = next((x.dtype for x in args if isinstance(x, Tensor)), None) if in_sum else None

        def as_tensor(x):
            if not isinstance(x, cls):
                return x
            return x.as_tensor() if x.dtype.is_floating_point else x.as_tensor(scores)

        args, kwargs = tree_map(as_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"MaskProxy({self.mask}, shape={list(self._shape)}, device={self.device})"

    __str__ = __repr__


def _slices(index, shape):
    """Batch slice, and (start, stop) of queries and keys; None if ``index`` is no such slices."""
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


def _operator(name: str):
    def operate(self: MaskProxy, *others) -> Tensor:
        return self.__torch_function__(getattr(Tensor, name), (MaskProxy,), (self, *others))

    return operate


for _name in "add radd sub rsub mul rmul rand or ror invert eq ne lt le gt ge".split():
    setattr(MaskProxy, f"__{_name}__", _operator(f"__{_name}__"))
