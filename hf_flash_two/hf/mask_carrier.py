"""The mask on its way through a Transformers model, from the mask function to the attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._pytree import tree_map
from transformers.utils import logging

from hf_flash_two.masks import AttentionMask

logger = logging.get_logger(__name__)

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


class MaskCarrier(BlockMask):
    """An `AttentionMask` that Transformers passes through and foreign code may use as a tensor.

    Transformers lets a mask pass untouched if it is a tensor or a ``BlockMask`` of four
    dimensions; nothing else of ``BlockMask`` is used. What treats it as a tensor gets the dense
    mask it stands for, at O(Tq * Tk) memory: additive (0 and the smallest number) where ``dtype``
    is a float, in a sum, or converted to a float; boolean (True may attend) everywhere else.

    Attributes:
        mask: what the attention uses.
        dtype: that of the tensor it stands for.
        causal: whether causality is part of the mask.
        packed: whether it holds the packed documents that the model's caller told of.
        padding: [B, L], nonzero for visible tokens, that it was made with; None if all are.
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
    ):
        self.mask = mask
        self._shape = tuple(shape)
        self.device = torch.device(device)
        self.dtype = dtype
        self.causal = causal
        self.packed, self.padding = packed, padding

    @property
    def shape(self) -> torch.Size:
        """[B, 1, Tq, Tk]"""
        return torch.Size(self._shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    def broadcast_to(self, queries: int, keys: int) -> MaskCarrier:
        """The mask of one query, or to one key, as that of all; any other as it is.

        One that hides nothing fits all lengths: eager has no mask there, so nobody notices when a
        model takes that of other tokens (BridgeTower).
        """
        batch, heads, own_queries, own_keys = self._shape
        if self.mask.hides_nothing:
            return self._replace(self.mask, (batch, heads, queries, keys))
        shape = tuple(
            want if own == 1 else own for own, want in ((own_queries, queries), (own_keys, keys))
        )
        if shape == (own_queries, own_keys):
            return self
        if own_queries == 1:
            seen = self.as_bool()[:, 0, 0]
            mask = AttentionMask.from_padding(seen.expand(batch, shape[1]))
        else:
            mask = AttentionMask.from_dense(self.as_bool())
        return self._replace(mask, (batch, heads, *shape))

    def as_bool(self) -> Tensor:
        """bool [B, 1, Tq, Tk], True may attend."""
        return self.mask.to_dense(*self._shape[2:], device=self.device).expand(self._shape)

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

    def contiguous(self, *_, **__) -> MaskCarrier:
        return self

    def to(self, *args, **kwargs) -> MaskCarrier | Tensor:
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
            moved = self._replace(self.mask.to(devices[0]), device=devices[0])
        return moved.as_tensor(dtypes[0]) if dtypes else moved

    def float(self) -> Tensor:
        return self.as_tensor(torch.float32)

    def type_as(self, other: Tensor) -> Tensor:
        return self.as_tensor(other.dtype)

    def _replace(self, mask: AttentionMask, shape=None, device=None) -> MaskCarrier:
        padding = self.padding
        return MaskCarrier(
            mask,
            self._shape if shape is None else shape,
            self.device if device is None else device,
            self.dtype,
            causal=self.causal,
            packed=self.packed,
            padding=padding if device is None or padding is None else padding.to(device),
        )

    def __getitem__(self, index) -> MaskCarrier | Tensor:
        rows = _slices(index, self._shape)
        if rows is None:
            return self.as_tensor()[index]
        batch, (start_q, stop_q), (start_k, stop_k) = rows
        _, _, queries, keys = self._shape
        mask = self.mask.slice_queries(start_q, stop_q, queries, keys)
        mask = mask.slice_keys(start_k, stop_k, stop_q - start_q, keys)
        mask = mask.each_tensor(lambda part: part[batch] if part.shape[0] > 1 else part)
        count = len(range(self._shape[0])[batch])
        carrier = self._replace(mask, (count, 1, stop_q - start_q, stop_k - start_k))
        if self.padding is not None:
            carrier.padding = self.padding[batch]
        return carrier

    def __and__(self, other) -> MaskCarrier | Tensor:
        if not isinstance(other, MaskCarrier) or other._shape != self._shape:
            return torch.bitwise_and(self, other)
        queries, keys = self._shape[2:]
        offset, others = (m.mask.resolve_offset(queries, keys) for m in (self, other))
        if offset != others:
            return torch.bitwise_and(self, other)
        both = replace(self.mask, query_offset=offset) & replace(other.mask, query_offset=offset)
        carrier = self._replace(both)
        carrier.causal, carrier.packed = self.causal or other.causal, self.packed or other.packed
        return carrier

    def __getattr__(self, name: str):
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"MaskCarrier has no attribute {name!r}")
        return getattr(self.as_tensor(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        in_sum = getattr(func, "__name__", "") in _SUMS
        if in_sum:
            logger.warning_once(
                "A mask of `flash_two` was added to scores: an attention of this model does not go "
                "through Transformers' attention interface, and computes them as it always did. "
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
        return f"MaskCarrier({self.mask}, shape={list(self._shape)}, device={self.device})"

    __str__ = __repr__


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


def _operator(name: str):
    def operate(self: MaskCarrier, *others) -> Tensor:
        return self.__torch_function__(getattr(Tensor, name), (MaskCarrier,), (self, *others))

    return operate


for _name in "add radd sub rsub mul rmul rand or ror invert eq ne lt le gt ge".split():
    setattr(MaskCarrier, f"__{_name}__", _operator(f"__{_name}__"))
