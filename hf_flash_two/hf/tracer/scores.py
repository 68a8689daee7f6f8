"""Attention scores that are recorded instead of computed.

`TracedScores` stands for ``query @ key`` and what a layer makes of it: it keeps factors, biases and
masks, and `TracedScores.lower` hands them to `flash_attention` at once. A method that cannot record
something returns None and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hf_flash_two.attention import flash_attention
from hf_flash_two.hf.forward_pass import once
from hf_flash_two.hf.mask_proxy import MaskProxy
from hf_flash_two.hf.tensor_masks import from_dense, parted
from hf_flash_two.hf.tracer.batch_dims import BatchDims, BatchShape
from hf_flash_two.hf.watched import is_watched, show_weights
from hf_flash_two.masks import AttentionMask
from hf_flash_two.parallel import context
from hf_flash_two.tensor_cache import has_value

if TYPE_CHECKING or torch.distributed.is_available():
    from hf_flash_two.parallel.sequence import Spread, attend_over_mesh


class Lazy:
    """Stands for a tensor, which ``compute`` makes if it is needed after all.

    Attributes:
        tracer: whose functions decide what becomes of it (`mode.Tracer`).
        recorded: (tensor, its version) of all that ``compute`` would read.
    """

    tracer: Any
    compute: Callable[[], Tensor] | None
    recorded: tuple[tuple[Tensor, int], ...]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"`{func.__name__}` outside the layer that makes the scores")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(Tensor, name)
        if not callable(attribute):

            def read(tensor: Tensor):
                return getattr(tensor, name)

            read.__name__ = f".{name}"
            return self.tracer.dispatch(read, (self,), {})
        return lambda *args, **kwargs: self.tracer.dispatch(attribute, (self, *args), kwargs)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator:
        return iter(self.tracer.dispatch(Tensor.unbind, (self,), {}))

    def tensor(self, what: str) -> Tensor:
        """The tensor itself, because ``what`` has no counterpart here."""
        self.check_recorded()
        assert self.compute is not None
        with self.tracer.pause():
            if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
                return self.compute()
            # Tensors of inference mode do not tell whether they were changed.
            with torch.inference_mode(False), torch.no_grad():
                return self.compute()

    def check_recorded(self) -> None:
        if any(version_of(tensor) != version for tensor, version in self.recorded):
            self.tracer.refuse("a change in place of what scores were made from")


def version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _operator(name: str):
    return lambda self, *others: self.tracer.dispatch(getattr(Tensor, name), (self, *others), {})


_OPERATORS = """
add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod matmul rmatmul pow rpow
neg abs pos invert and or xor lt le gt ge eq ne getitem setitem len contains float int
"""
_IN_PLACE = {
    "iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_", "ipow": "pow_",
    "ifloordiv": "floor_divide_", "imod": "remainder_",
}  # fmt: skip
for _name in _OPERATORS.split():
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))
for _name, _method in _IN_PLACE.items():
    setattr(Lazy, f"__{_name}__", _operator(_method))
Lazy.__hash__ = object.__hash__  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(eq=False)
class TracedScores(Lazy):
    """What a layer has done so far to products of queries and keys.

    Attributes:
        products: (batch shape, query [..., Tq, D], key [..., Tk, D]), their products summed.
        shape, dtype: of the tensor it stands for, [*batch, Tq, Tk].
        batch_shapes: the batch shapes it has had, the present one last.
        scale: of the products.
        terms: (batch shape when it was added, float tensor or mask) of all that was added.
        visible: (batch shape, bool tensor) of all masks, True may attend.
        causal: query i sees keys 0 to i.
        shifted: a constant was subtracted that softmax ignores: per row, or for the whole tensor.
        gate: a tensor of 0 and 1 that it was multiplied by, until the term that follows hides what
            became 0; see `tail`.
        softmaxed: it stands for probabilities.
        dropout: (p, seed) with which they were dropped.
        whole: its shape before a view split the queries or keys into several dimensions.
        overwritten: shared with its views; not empty once another of them was changed in place.
        shown: (tensor, its version) of what a layer was given in place of views of it.
    """

    tracer: Any
    products: tuple[tuple[BatchShape, Tensor, Tensor], ...]
    shape: torch.Size
    dtype: torch.dtype
    batch_shapes: tuple[BatchShape, ...]
    scale: float = 1.0
    terms: tuple[tuple[BatchShape, Tensor | MaskProxy], ...] = ()
    visible: tuple[tuple[BatchShape, Tensor], ...] = ()
    causal: bool = False
    shifted: Literal["", "rows", "all"] = ""
    gate: Tensor | None = None
    softmaxed: bool = False
    dropout: tuple[float, Tensor] | None = None
    whole: torch.Size | None = None
    overwritten: list = field(default_factory=list)
    shown: list[tuple[Tensor, int]] = field(default_factory=list)
    compute: Callable[[], Tensor] | None = None
    recorded: tuple[tuple[Tensor, int], ...] = ()

    @property
    def device(self) -> torch.device:
        return self.products[0][1].device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    @property
    def batch_shape(self) -> BatchShape:
        return self.batch_shapes[-1]

    @property
    def plain(self) -> bool:
        """Whether it is a product and a scale, and nothing else."""
        return self.bare and not self.shifted

    @property
    def bare(self) -> bool:
        """Whether it is a product and a scale, shifted perhaps."""
        more = self.terms or self.visible or self.causal or self.softmaxed
        return not more and self.gate is None and len(self.products) == len(self.batch_shapes) == 1

    def tensor(self, what: str) -> Tensor:
        if self.softmaxed:
            self.tracer.refuse(f"`{what}` on probabilities, which are never computed")
        return super().tensor(what)

    def replaced(self, **changes) -> TracedScores:
        return replace(self, **{"compute": None, "overwritten": [], **changes})

    def holds(self, *shape: int) -> bool:
        """Whether it keeps its shape when combined with a tensor of that shape."""
        try:
            return torch.broadcast_shapes(self.shape, shape) == self.shape
        except RuntimeError:
            return False

    def plus(self, term: Tensor | MaskProxy) -> TracedScores | None:
        if self.softmaxed or self.gate is not None or not self.holds(*term.shape):
            return None
        if isinstance(term, MaskProxy):
            if self.whole is not None:
                return None
            return self.replaced(terms=(*self.terms, (self.batch_shape, term)))
        if not term.is_floating_point():
            # A mask of the user that says who may attend: added as it is, it would hide nothing.
            return self.hide(term) if term.dtype == torch.bool and term.dim() > 2 else None
        dtype = torch.promote_types(self.dtype, term.dtype) if term.dim() else self.dtype
        if self.whole is not None:
            term = term.expand(self.shape).reshape(self.whole)
        return self.replaced(terms=(*self.terms, (self.batch_shape, term)), dtype=dtype)

    def times(self, factor: float | Tensor) -> TracedScores | None:
        """Times a number, or a tensor that has one for each row."""
        if self.softmaxed or self.gate is not None:
            return None
        if isinstance(factor, Tensor) and factor.numel() == 1:
            known = has_value(factor) and not factor.requires_grad
            factor = factor.item() if known else factor.reshape(1, 1)
        if isinstance(factor, Tensor):
            fits = self.holds(*factor.shape) and factor.shape[-1] == 1
            if self.masked or not fits or len(self.batch_shapes) > 1:
                return None
            products = tuple((shape, query * factor, key) for shape, query, key in self.products)
            return self.replaced(products=products, terms=self._scaled_terms(factor))
        if self.masked and factor <= 0:
            return None
        return self.replaced(scale=self.scale * factor, terms=self._scaled_terms(factor))

    @property
    def masked(self) -> bool:
        return bool(self.visible) or any(isinstance(term, MaskProxy) for _, term in self.terms)

    def _scaled_terms(self, factor: float | Tensor) -> tuple:
        return tuple(
            (shape, term if isinstance(term, MaskProxy) else term * factor)
            for shape, term in self.terms
        )

    def hide(self, visible: Tensor) -> TracedScores | None:
        """Where not ``visible`` the probability is 0."""
        if self.softmaxed or self.gate is not None or not self.holds(*visible.shape):
            return None
        return self.replaced(visible=(*self.visible, (self.batch_shape, visible)))

    def viewed_as(self, shape: torch.Size) -> TracedScores | None:
        whole = self.whole or self.shape
        if self.gate is not None:
            return None
        if shape[-2:] == whole[-2:]:
            changes = {"batch_shapes": (*self.batch_shapes, tuple(shape[:-2])), "whole": None}
        else:
            changes = {"whole": whole}
        return self.replaced(shape=shape, overwritten=self.overwritten, **changes)

    def lower(self, value: Tensor) -> Tensor | None:
        """probabilities @ value [..., Tk, Dv]: [*batch, Tq, Dv]."""
        self.check_recorded()
        spread = context.current()
        if value.shape[-2] * _ranks(spread) != self.shape[-1] or not self.holds(
            *value.shape[:-2], 1, 1
        ):
            return None
        dims = BatchDims([*self.batch_shapes, *(shape for shape, *_ in self.products)])
        mask, biases, visible, batch = self._parted_terms(dims)
        bias = sum(biases[1:], biases[0]) if biases else None
        split = [dims.split(seen, shape) for shape, seen in visible]
        heads_at = dims.first_head_dim(split if bias is None else [*split, bias], batch)
        for (_, seen), whole in zip(visible, split, strict=True):
            mask = mask & self._mask_of(seen, dims.flatten(whole, heads_at), dims, heads_at, mask)
        query, key, value = self._flattened(value, dims, heads_at)
        bias = None if bias is None else dims.flatten(bias, heads_at)
        dropout_p, seed = self.dropout or (0.0, None)
        watched = is_watched(self.tracer.layer)
        if spread is None:
            terms: Any = dict(mask=mask, scale=self.scale, bias=bias)
            out: Any = flash_attention(
                query, key, value, dropout_p=dropout_p, dropout_seed=seed, **terms
            )
            if watched:
                show_weights(self.tracer.layer, query, key, value, **terms)
        else:
            if watched:
                self.tracer.refuse("watch_attention, on a shard of the sequence")
            if dropout_p or visible or self.causal:
                self.tracer.refuse("dropout, or a mask of its own, on a shard of the sequence")
            out = attend_over_mesh(query, key, value, mask, spread, scale=self.scale, bias=bias)
        self.tracer.lowered = True
        return out.reshape(*self.batch_shape, *out.shape[-2:])

    def _parted_terms(
        self, dims: BatchDims
    ) -> tuple[AttentionMask, list[Tensor], list[tuple[BatchShape, Tensor]], int | None]:
        """(mask, split biases, (batch shape, visible) of further masks, batch size of the mask)."""
        mask = AttentionMask.causal(query_offset=0) if self.causal else AttentionMask.full()
        biases, visible, batch = [], list(self.visible), None
        for shape, term in self.terms:
            if not isinstance(term, MaskProxy):
                rest, seen = parted(term)
                if rest is not None:
                    biases.append(dims.split(rest, shape))
                if seen is not None:
                    visible.append((shape, seen))
            elif len(shape) == 2:
                if term.lead:
                    self.tracer.refuse("batch_invariant where the cache drops the oldest keys")
                mask = mask & term.broadcast_to(*self.shape[-2:]).mask
                batch = shape[0] if term.shape[0] > 1 else batch
            else:
                visible.append((shape, term.as_bool()))
        return mask, biases, visible, batch

    def _mask_of(
        self, seen: Tensor, flat: Tensor, dims: BatchDims, heads_at: int, mask: AttentionMask
    ) -> AttentionMask:
        """That of ``flat``, which is ``seen`` flattened; queries are where ``mask`` has them."""
        queries, keys = self.shape[-2:]
        made_for = (*dims.ends, heads_at, queries, keys)
        found = once(seen, made_for, partial(from_dense, flat, queries, keys))
        return _moved(found, mask, queries, keys)

    def _flattened(
        self, value: Tensor, dims: BatchDims, heads_at: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For `flash_attention`; a sum of products is one product of longer vectors."""
        queries = [
            dims.flatten(dims.split(query, shape), heads_at, full=True)
            for shape, query, _ in self.products
        ]
        others = [dims.split(key, shape) for shape, _, key in self.products]
        others.append(dims.split(value, self.batch_shape))
        others = [dims.flatten(x, heads_at) for x in others]
        heads = max(x.shape[1] for x in others)
        *keys, value = (x.expand(queries[0].shape[0], heads, -1, -1) for x in others)
        if len(keys) == 1:
            return queries[0], keys[0], value
        return torch.cat(queries, -1), torch.cat(keys, -1), value


def product(tracer: Any, query: Tensor, key: Tensor) -> TracedScores | None:
    """``query @ key`` for [..., Tq, D] and [..., D, Tk]."""
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return None
    if min(query.dim(), key.dim()) < 3 or not query.is_floating_point():
        return None
    device, dtype = query.device.type, query.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif key.dtype != dtype:
        return None
    if query.shape[-1] != key.shape[-2]:
        return None
    batch = tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]))
    products = ((batch, query.expand(*batch, -1, -1), key.transpose(-1, -2)),)
    keys = key.shape[-1] * _ranks(context.current())
    shape = torch.Size((*batch, query.shape[-2], keys))
    recorded = tuple((x, version_of(x)) for x in (query, key))
    return TracedScores(tracer, products, shape, dtype, (batch,), recorded=recorded)


def _ranks(spread: Spread | None) -> int:
    """Over how many shards the keys of a layer are spread."""
    return 1 if spread is None else spread.ranks


def _moved(seen: AttentionMask, mask: AttentionMask, queries: int, keys: int) -> AttentionMask:
    """``seen`` with its queries at the positions that they have in ``mask``."""
    if seen.query_start is None or seen.query_stop is None:
        return seen
    shift = mask.resolve_offset(queries, keys) - seen.resolve_offset(queries, keys)
    first, last = seen.query_start + shift, seen.query_stop + shift
    return AttentionMask.from_intervals(first, last, query_offset=mask.query_offset)
