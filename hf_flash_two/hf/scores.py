"""Attention scores that are noted instead of computed.

`Scores` stands for the tensor ``query @ key`` and for what a layer makes of it: it keeps the
factors, biases and masks, and `Scores.attend` hands all of it to `flash_attention` at once. Each
method that notes something returns None where it cannot, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from hf_flash_two.attention import flash_attention
from hf_flash_two.hf.forward_pass import once
from hf_flash_two.hf.interface import _from_dense
from hf_flash_two.hf.leading import Lead, Leading
from hf_flash_two.hf.mask_carrier import MaskCarrier
from hf_flash_two.masks import AttentionMask
from hf_flash_two.tensor_cache import has_value

HIDDEN = -1e4
"""Scores set to this or less have probability 0; the mildest such number that models use."""


class Lazy:
    """Stands for a tensor, which ``compute`` makes if it is needed after all.

    Attributes:
        layer: whose functions decide what becomes of it (`own_attention.OwnAttention`).
        noted: (tensor, its version) of all that ``compute`` would read.
    """

    layer: object
    compute: Callable[[], Tensor] | None
    noted: tuple[tuple[Tensor, int], ...]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"`{func.__name__}` outside the layer that makes the scores")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        attribute = getattr(Tensor, name)
        if not callable(attribute):
            return getattr(self.tensor(name), name)
        return lambda *args, **kwargs: self.layer.apply(attribute, (self, *args), kwargs)

    def tensor(self, what: str) -> Tensor:
        """The tensor itself, because ``what`` has no counterpart here."""
        self.check_noted()
        with self.layer.pause():
            return self.compute()

    def check_noted(self) -> None:
        if any(version_of(tensor) != version for tensor, version in self.noted):
            self.layer.refuse("a change in place of what scores were made from")


def version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _operator(name: str):
    return lambda self, *others: self.layer.apply(getattr(Tensor, name), (self, *others), {})


for _name in "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow neg getitem".split():
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))
for _name in "lt le gt ge".split():
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))
for _name, _method in {"iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_"}.items():
    setattr(Lazy, f"__{_name}__", _operator(_method))


@dataclass(eq=False)
class Scores(Lazy):
    """What a layer has done so far to products of queries and keys.

    Attributes:
        products: (leading shape, query [..., Tq, D], key [..., Tk, D]), their products summed.
        shape, dtype: of the tensor it stands for, [*lead, Tq, Tk].
        leads: the leading shapes it has had, the present one last.
        scale: of the products.
        terms: (leading shape when it was added, float tensor or mask) of all that was added.
        visible: (leading shape, bool tensor) of all masks, True may attend.
        causal: query i sees keys 0 to i.
        shifted: by numbers to which softmax is indifferent: "rows" each by its own, or all of it.
        gate: a tensor of 0 and 1 that it was multiplied by, until a sum hides what became 0.
        softmaxed: it stands for probabilities.
        dropout: (p, seed) with which they were dropped.
        whole: its shape before a view split the queries or keys into several dimensions.
        overwritten: shared with its views; not empty once another of them was changed in place.
    """

    layer: object
    products: tuple[tuple[Lead, Tensor, Tensor], ...]
    shape: torch.Size
    dtype: torch.dtype
    leads: tuple[Lead, ...]
    scale: float = 1.0
    terms: tuple[tuple[Lead, Tensor | MaskCarrier], ...] = ()
    visible: tuple[tuple[Lead, Tensor], ...] = ()
    causal: bool = False
    shifted: Literal["", "rows", "all"] = ""
    gate: Tensor | None = None
    softmaxed: bool = False
    dropout: tuple[float, Tensor] | None = None
    whole: torch.Size | None = None
    overwritten: list = field(default_factory=list)
    compute: Callable[[], Tensor] | None = None
    noted: tuple[tuple[Tensor, int], ...] = ()

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
    def lead(self) -> Lead:
        return self.leads[-1]

    @property
    def plain(self) -> bool:
        """Whether it is a product and a scale, and nothing else."""
        return self.bare and not self.shifted

    @property
    def bare(self) -> bool:
        """Whether it is a product and a scale, shifted perhaps."""
        more = self.terms or self.visible or self.causal or self.softmaxed
        return not more and self.gate is None and len(self.products) == len(self.leads) == 1

    def tensor(self, what: str) -> Tensor:
        if self.softmaxed:
            self.layer.refuse(f"`{what}` on probabilities, which are never computed")
        return super().tensor(what)

    def but(self, **changes) -> Scores:
        return replace(self, **{"compute": None, "overwritten": [], **changes})

    def holds(self, *shape: int) -> bool:
        """Whether it keeps its shape when combined with a tensor of that shape."""
        try:
            return torch.broadcast_shapes(self.shape, shape) == self.shape
        except RuntimeError:
            return False

    def plus(self, term: Tensor | MaskCarrier) -> Scores | None:
        carried = isinstance(term, MaskCarrier)
        if self.softmaxed or not self.holds(*term.shape):
            return None
        if not carried and not term.is_floating_point():
            # A mask of the user that says who may attend: added as it is, it would hide nothing.
            return self.hide(term) if term.dtype == torch.bool and term.dim() > 2 else None
        if self.gate is not None:
            return None if carried else self._closed(term)
        dtype = torch.promote_types(self.dtype, term.dtype)
        if carried or not term.dim():
            dtype = self.dtype
        if self.whole is not None:
            if carried:
                return None
            term = term.expand(self.shape).reshape(self.whole)
        return self.but(terms=(*self.terms, (self.lead, term)), dtype=dtype)

    def _closed(self, term: Tensor) -> Scores | None:
        """``scores * gate + term`` if the term hides what the gate set to 0, and nothing else."""
        opened = self.gate == 1
        if not has_value(self.gate) or not has_value(term):
            return None
        if not torch.where(opened, term == 0, (self.gate == 0) & (term <= HIDDEN)).all():
            return None
        return self.but(gate=None).hide(opened)

    def times(self, factor: float | Tensor) -> Scores | None:
        if self.softmaxed or self.gate is not None:
            return None
        if isinstance(factor, Tensor) and factor.numel() == 1 and not factor.requires_grad:
            factor = factor.item() if has_value(factor) else factor.reshape(1, 1)
        masked = self.visible or any(isinstance(term, MaskCarrier) for _, term in self.terms)
        if isinstance(factor, Tensor):
            return None if masked else self._times_tensor(factor)
        if masked and factor <= 0:
            return None
        return self.but(scale=self.scale * factor, terms=self._scaled_terms(factor))

    def _times_tensor(self, factor: Tensor) -> Scores | None:
        if not self.holds(*factor.shape) or len(self.leads) > 1:
            return None
        if factor.shape[-1] == 1:
            products = tuple((lead, query * factor, key) for lead, query, key in self.products)
            return self.but(products=products, terms=self._scaled_terms(factor))
        return self.but(gate=factor)

    def _scaled_terms(self, factor: float | Tensor) -> tuple:
        return tuple(
            (lead, term if isinstance(term, MaskCarrier) else term * factor)
            for lead, term in self.terms
        )

    def hide(self, visible: Tensor) -> Scores | None:
        """Where not ``visible`` the probability is 0."""
        if self.softmaxed or self.gate is not None or not self.holds(*visible.shape):
            return None
        return self.but(visible=(*self.visible, (self.lead, visible)))

    def viewed_as(self, shape: torch.Size) -> Scores | None:
        whole = self.whole or self.shape
        if self.gate is not None:
            return None
        if shape[-2:] == whole[-2:]:
            changes = {"leads": (*self.leads, tuple(shape[:-2])), "whole": None}
        else:
            changes = {"whole": whole}
        return self.but(shape=shape, overwritten=self.overwritten, **changes)

    def attend(self, value: Tensor) -> Tensor | None:
        """probabilities @ value [..., Tk, Dv]: [*lead, Tq, Dv]."""
        self.check_noted()
        queries, keys = self.shape[-2:]
        if value.shape[-2] != keys or not self.holds(*value.shape[:-2], 1, 1):
            return None
        leading = Leading([*self.leads, *(lead for lead, *_ in self.products)])
        mask = AttentionMask.causal(query_offset=0) if self.causal else AttentionMask.full()
        biases, visible, batch = [], list(self.visible), None
        for lead, term in self.terms:
            if not isinstance(term, MaskCarrier):
                rest, seen = _parted(term)
                if rest is not None:
                    biases.append(leading.spread(rest, lead))
                if seen is not None:
                    visible.append((lead, seen))
            elif len(lead) == 2:
                mask = mask & term.broadcast_to(queries, keys).mask
                batch = lead[0] if term.shape[0] > 1 else batch
            else:
                visible.append((lead, term.as_bool()))
        bias = sum(biases[1:], biases[0]) if biases else None
        spread = [leading.spread(seen, lead) for lead, seen in visible]
        place = leading.place(spread if bias is None else [*spread, bias], batch)
        for (_, seen), whole in zip(visible, spread, strict=True):
            made_for = (*leading.ends, place, queries, keys)
            whole = leading.fold(whole, place)
            found = once(seen, made_for, partial(_from_dense, whole, queries, keys))
            mask = mask & _moved(found, mask, queries, keys)
        query, key, value = self._folded(value, leading, place)
        dropout_p, seed = self.dropout or (0.0, None)
        out = flash_attention(
            query,
            key,
            value,
            mask=mask,
            scale=self.scale,
            bias=None if bias is None else leading.fold(bias, place),
            dropout_p=dropout_p,
            dropout_seed=seed,
        )
        self.layer.attended = True
        return out.reshape(*self.lead, *out.shape[-2:])

    def _folded(self, value: Tensor, leading: Leading, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """For `flash_attention`; a sum of products is one product of longer vectors."""
        queries = [
            leading.fold(leading.spread(query, lead), place, full=True)
            for lead, query, _ in self.products
        ]
        others = [leading.spread(key, lead) for lead, _, key in self.products]
        others = [leading.fold(x, place) for x in (*others, leading.spread(value, self.lead))]
        heads = max(x.shape[1] for x in others)
        *keys, value = (x.expand(queries[0].shape[0], heads, -1, -1) for x in others)
        if len(keys) == 1:
            return queries[0], keys[0], value
        return torch.cat(queries, -1), torch.cat(keys, -1), value


@dataclass(eq=False)
class FromScores(Lazy):
    """Something of ``scores`` that is not computed either."""

    scores: Scores
    compute: Callable[[], Tensor] | None = field(default=None, kw_only=True)
    noted: tuple[tuple[Tensor, int], ...] = field(default=(), kw_only=True)

    @property
    def layer(self) -> object:
        return self.scores.layer


@dataclass(eq=False)
class RowMax(FromScores):
    """The largest of each row of ``scores``: softmax is indifferent to its being subtracted.

    Attributes:
        kept: the dimension of the keys is there, of size 1.
        of_all: the largest of all rows instead.
    """

    kept: bool
    of_all: bool = False


@dataclass(eq=False)
class RowArgmax(FromScores):
    """Where the largest of each row is."""


@dataclass(eq=False)
class Turned(FromScores):
    """Probabilities with their dimensions in another ``order``."""

    order: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.scores.shape[dim] for dim in self.order)

    def tensor(self, what: str) -> Tensor:
        return self.scores.tensor(what)

    def attend(self, value: Tensor) -> Tensor | None:
        """value [..., Dv, Tk] @ probabilities [..., Tk, Tq]: [..., Dv, Tq]."""
        *lead, last, before = range(self.scores.dim())
        if self.order != (*lead, before, last):
            return None
        attended = self.scores.attend(value.transpose(-1, -2))
        return None if attended is None else attended.transpose(-1, -2)


def _parted(term: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(bias, visible) that a sum with ``term`` amounts to, None where there is none."""

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


def _moved(seen: AttentionMask, mask: AttentionMask, queries: int, keys: int) -> AttentionMask:
    """``seen`` with its queries at the positions that they have in ``mask``."""
    if seen.first_query is None:
        return seen
    shift = mask.resolve_offset(queries, keys) - seen.resolve_offset(queries, keys)
    first, last = seen.first_query + shift, seen.last_query + shift
    return AttentionMask.from_intervals(first, last, query_offset=mask.query_offset)
