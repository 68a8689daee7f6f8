"""Attention that a model writes out itself, carried out by `flash_attention`.

Such a layer multiplies queries with keys, scales, adds biases and masks, takes the softmax, drops
out and multiplies with values. While `own_attention` is active the first product yields `Scores`,
which only note what is done to them; the last product calls `flash_attention` once. Nothing of the
size of the scores is computed, and the layer's forward runs as its authors wrote it. Whatever is
done to scores that has no counterpart raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hf_flash_two.attention import flash_attention
from hf_flash_two.hf.mask_carrier import MaskCarrier
from hf_flash_two.masks import AttentionMask

_PRODUCTS = {"matmul", "bmm", "baddbmm", "__matmul__"}


@contextmanager
def own_attention(layer: str) -> Iterator[None]:
    """Within the block products of queries and keys are `Scores`.

    Args:
        layer: named in errors.
    """
    with _Products(layer):
        yield


class _Products(TorchFunctionMode):
    def __init__(self, layer: str):
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operands = [*args, *kwargs.values()]
        if any(isinstance(operand, Scores) for operand in operands):
            return _apply(name, args, kwargs)
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        if name not in _PRODUCTS or any(tensor.dim() < 3 for tensor in tensors):
            return func(*args, **kwargs)
        if name != "baddbmm":
            query, key = tensors
            return Scores(self.layer, query, key, query.dtype)
        added, query, key = tensors
        scores = Scores(self.layer, query, key, query.dtype).times(kwargs.get("alpha", 1))
        beta = kwargs.get("beta", 1)
        return scores.plus(added if beta == 1 else added * beta) if beta else scores


@dataclass(frozen=True, eq=False)
class Scores:
    """What a layer has done so far to the product of ``query`` and ``key``; stands for a tensor.

    Attributes:
        query: [..., Tq, D]; key: [..., D, Tk].
        scale: of the product.
        terms: (leading shape when it was added, tensor or mask) of everything added since.
        visible: the same of boolean masks, True may attend.
        lead: the leading shape it now pretends to have.
        softmaxed: it stands for the probabilities.
        dropout_p: with which they were dropped.
    """

    layer: str
    query: Tensor
    key: Tensor
    dtype: torch.dtype
    scale: float = 1.0
    terms: tuple = ()
    visible: tuple = ()
    view_lead: tuple[int, ...] | None = None
    softmaxed: bool = False
    dropout_p: float = 0.0

    @property
    def lead(self) -> tuple[int, ...]:
        if self.view_lead is not None:
            return self.view_lead
        return tuple(torch.broadcast_shapes(self.query.shape[:-2], self.key.shape[:-2]))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.lead, self.query.shape[-2], self.key.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self.query.device

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def refuse(self, what: str):
        raise NotImplementedError(
            f"{self.layer}: flash_two cannot carry out {what} on attention scores that are never "
            "computed; take the layer out with hf_flash_two.unpatch(model)"
        )

    def times(self, factor) -> Scores:
        if self.softmaxed:
            self.refuse("a factor after the softmax")
        if isinstance(factor, Tensor):
            if factor.numel() != 1 or factor.requires_grad:
                self.refuse(f"a product with a tensor of shape {list(factor.shape)}")
            factor = factor.item()
        terms = tuple(
            (lead, term if isinstance(term, MaskCarrier) else term * factor)
            for lead, term in self.terms
        )
        return replace(self, scale=self.scale * factor, terms=terms)

    def plus(self, term) -> Scores:
        if self.softmaxed or not isinstance(term, (Tensor, MaskCarrier)):
            self.refuse("a sum after the softmax" if self.softmaxed else f"adding {term!r}")
        if isinstance(term, Tensor) and term.dtype == torch.bool:
            self.refuse("adding a bool tensor")
        return replace(self, terms=(*self.terms, (self.lead, term)))

    def hide(self, visible: Tensor, value) -> Scores:
        """Scores where ``visible``, ``value`` elsewhere."""
        value = value.item() if isinstance(value, Tensor) else value
        if self.softmaxed or value > -1e4:
            self.refuse(f"filling scores with {value}")
        return replace(self, visible=(*self.visible, (self.lead, visible)))

    def viewed(self, *shape) -> Scores:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        full = torch.empty(self.shape, device="meta").view(*shape).shape
        if full[-2:] != self.shape[-2:]:
            self.refuse(f"a view as {list(full)} of {list(self.shape)}")
        return replace(self, view_lead=tuple(full[:-2]))

    def softmax(self, dim: int = -1, dtype: torch.dtype | None = None, **_) -> Scores:
        if self.softmaxed or dim not in (-1, self.dim() - 1):
            self.refuse(f"a softmax over dimension {dim}")
        return replace(self, softmaxed=True, dtype=dtype or self.dtype)

    def to(self, *args, **kwargs) -> Scores:
        for target in (*args, *kwargs.values()):
            if isinstance(target, torch.dtype):
                return replace(self, dtype=target)
            if isinstance(target, (Tensor, Scores)):
                return replace(self, dtype=target.dtype)
        return self

    type = to
    type_as = to
    view = viewed
    reshape = viewed

    def float(self) -> Scores:
        return self.to(torch.float32)

    def masked_fill(self, mask: Tensor, value) -> Scores:
        return self.hide(mask.logical_not(), value)

    def __mul__(self, factor) -> Scores:
        return self.times(factor)

    def __truediv__(self, divisor) -> Scores:
        return self.times(1 / divisor)

    def __add__(self, term) -> Scores:
        return self.plus(term)

    __rmul__ = __mul__
    __radd__ = __add__

    def __matmul__(self, value: Tensor) -> Tensor:
        return self.attend(value)

    def __getattr__(self, name: str):
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        self.refuse(f"`{name}`")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _apply(getattr(func, "__name__", ""), args, kwargs or {})

    def attend(self, value: Tensor) -> Tensor:
        """probabilities @ value, at last: [*lead, Tq, Dv]."""
        if not self.softmaxed:
            self.refuse("a product without a softmax")
        batch, heads = self._batch_and_heads()
        query = self._split(self.query, batch, heads)
        key = self._split(self.key.transpose(-1, -2), batch, heads)
        out = flash_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            self._split(value, batch, heads),
            mask=self._mask(batch, heads),
            bias=self._bias(batch, heads),
            scale=self.scale,
            dropout_p=self.dropout_p,
        )
        return out.reshape(*self.lead, *out.shape[-2:])

    def _batch_and_heads(self) -> tuple[int, int]:
        leads = [lead for lead, _ in (*self.terms, *self.visible)] + [self.lead]
        pairs = [lead for lead in (self.query.shape[:-2], *leads) if len(lead) == 2]
        if pairs:
            return tuple(pairs[0])
        if len(self.lead) != 1:
            self.refuse(f"attention over {list(self.shape)}")
        return self.lead[0], 1

    def _split(self, x: Tensor, batch: int, heads: int) -> Tensor:
        """[B * H, ...] or [B, H or fewer, ...] as the latter."""
        return x if x.dim() == 4 else x.reshape(batch, -1, *x.shape[-2:])

    def _placed(self, lead: tuple[int, ...], x: Tensor, batch: int, heads: int) -> Tensor:
        """What broadcast against ``lead`` now broadcasts against [B, H]."""
        if len(lead) == 2 or x.dim() < 3:
            return x
        return x[:, None] if x.shape[0] == 1 else x.reshape(batch, heads, *x.shape[-2:])

    def _mask(self, batch: int, heads: int) -> AttentionMask:
        mask = AttentionMask.full()
        for _, term in self.terms:
            if isinstance(term, MaskCarrier):
                mask = mask & term.mask
        for lead, visible in self.visible:
            mask = mask & AttentionMask.from_dense(self._placed(lead, visible, batch, heads))
        return mask

    def _bias(self, batch: int, heads: int) -> Tensor | None:
        bias = None
        for lead, term in self.terms:
            if not isinstance(term, MaskCarrier):
                term = self._placed(lead, term, batch, heads)
                bias = term if bias is None else bias + term
        return bias


def _apply(name: str, args: tuple, kwargs: dict):
    """A torch function one of whose operands is `Scores`."""
    operands = [*args, *kwargs.values()]
    operands += [part for x in operands if isinstance(x, (list, tuple)) for part in x]
    scores = next(x for x in operands if isinstance(x, Scores))
    first, *rest = args
    if name in ("matmul", "bmm", "__matmul__") and first is scores and len(rest) == 1:
        return scores.attend(rest[0])
    if name in ("add", "__add__", "__radd__") and not kwargs:
        return scores.plus(rest[0] if first is scores else first)
    if name in ("mul", "__mul__", "__rmul__") and not kwargs:
        return scores.times(rest[0] if first is scores else first)
    if name in ("div", "true_divide", "__truediv__") and first is scores and not kwargs:
        return scores.times(1 / rest[0])
    if name == "softmax" and first is scores:
        given = dict(zip(("dim", "_stacklevel", "dtype"), rest, strict=False)) | kwargs
        return scores.softmax(dim=given.get("dim", -1), dtype=given.get("dtype"))
    if name == "dropout" and first is scores:
        given = dict(zip(("p", "training"), rest, strict=False)) | kwargs
        if not scores.softmaxed or scores.dropout_p:
            scores.refuse("dropout before the softmax" if not scores.softmaxed else "dropout twice")
        return replace(scores, dropout_p=given["p"] if given.get("training", True) else 0.0)
    if name == "where" and len(args) == 3 and args[1] is scores:
        return scores.hide(args[0], args[2])
    if name == "masked_fill" and first is scores:
        return scores.masked_fill(*rest, **kwargs)
    return scores.refuse(f"`{name}`")
