"""Rules that serve a few families each, named above them.

A rule goes once its families have moved to Transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_flash_two.hf.tensor_masks import HIDDEN
from hf_flash_two.hf.tracer.scores import Lazy, TracedScores, product
from hf_flash_two.tensor_cache import has_value

_UNREACHED = 5e4
"""Limits this far from 0 change no scores: float16 ends a little further out."""


@dataclass(eq=False)
class FromScores(Lazy):
    """Something worked out from ``scores``, as lazily."""

    scores: TracedScores
    compute: Callable[[], Tensor] | None = field(default=None, kw_only=True)
    recorded: tuple[tuple[Tensor, int], ...] = field(default=(), kw_only=True)

    @property
    def tracer(self) -> Any:
        return self.scores.tracer


# OpenAI GPT: scores times a causal mask of ones and zeros, plus large negative numbers


def gated(scores: TracedScores, factor: Tensor) -> TracedScores | None:
    """``scores * factor``, where the factor may be such a mask: `ungated` finds out."""
    if scores.softmaxed or scores.gate is not None or scores.masked:
        return None
    if not scores.holds(*factor.shape) or len(scores.batch_shapes) > 1 or factor.numel() == 1:
        return None
    return scores.replaced(gate=factor)


def ungated(scores: TracedScores, term: Tensor) -> TracedScores | None:
    """``scores * gate + term`` if the term hides what the gate set to 0, and nothing else."""
    gate = scores.gate
    if gate is None or not term.is_floating_point() or not scores.holds(*term.shape):
        return None
    if not has_value(gate) or not has_value(term):
        return None
    opened = gate == 1
    if not torch.where(opened, term == 0, (gate == 0) & (term <= HIDDEN)).all():
        return None
    return scores.replaced(gate=None).hide(opened)


# LiLT: scores of the text plus scores of its layout


def sum_of_products(a: TracedScores, b: TracedScores) -> TracedScores | None:
    """Two products added are one of longer vectors."""
    if b.softmaxed or a.shape != b.shape or a.gate is not None or b.gate is not None:
        return None
    if a.causal or b.causal or a.whole or b.whole:
        return None
    products = tuple(
        (batch, query * scores.scale, key)
        for scores in (a, b)
        for batch, query, key in scores.products
    )
    return a.replaced(
        products=products,
        dtype=torch.promote_types(a.dtype, b.dtype),
        batch_shapes=(*b.batch_shapes, *a.batch_shapes),
        scale=1.0,
        terms=a.terms + b.terms,
        visible=a.visible + b.visible,
        shifted=max(a.shifted, b.shifted, key=("", "all", "rows").index),
    )


# LUKE: words and entities, of which each has queries of its own for both


def _cat(tensors, dim=0) -> TracedScores | None:
    """Scores side by side are those of longer vectors that are 0 where they must not meet."""
    first = tensors[0]
    if not all(
        isinstance(x, TracedScores) and x.plain and x.batch_shape == first.batch_shape
        for x in tensors
    ):
        return None
    if dim % first.dim() < first.dim() - 2:
        return None
    queries = [x.products[0][1] * x.scale for x in tensors]
    keys = [x.products[0][2].expand(*x.batch_shape, -1, -1) for x in tensors]
    if dim % first.dim() == first.dim() - 1:
        query, key = torch.cat(queries, -1), _block_diagonal(keys)
    else:
        query, key = _block_diagonal(queries), torch.cat(keys, -1)
    shape = torch.Size((*first.batch_shape, query.shape[-2], key.shape[-2]))
    return first.replaced(products=((first.batch_shape, query, key),), shape=shape, scale=1.0)


def _block_diagonal(parts: list[Tensor]) -> Tensor:
    """[..., T_i, D_i] -> [..., sum of T_i, sum of D_i], the parts along the diagonal."""
    width, at, rows = sum(part.shape[-1] for part in parts), 0, []
    for part in parts:
        rows.append(F.pad(part, (at, width - at - part.shape[-1])))
        at += part.shape[-1]
    return torch.cat(rows, -2)


# BLOOM, GPT-NeoX Japanese, ImageGPT: a bias, or 0, plus the product


def _baddbmm(tracer, input, batch1, batch2, *, beta=1, alpha=1) -> TracedScores | None:
    scores = product(tracer, batch1, batch2)
    scores = scores and scores.times(alpha)
    if scores is None or beta == 0:
        return scores
    return scores.plus(input if beta == 1 else input * beta)


# Chameleon, Janus, Apertus, WavTokenizer: values times transposed probabilities.
# Grounding DINO: scores of keys by queries


@dataclass(eq=False)
class Transposed(FromScores):
    """Probabilities with their dimensions in another ``order``."""

    order: tuple[int, ...]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.scores.shape[dim] for dim in self.order)

    def tensor(self, what: str) -> Tensor:
        return self.scores.tensor(what)

    def lower(self, value: Tensor) -> Tensor | None:
        """value [..., Dv, Tk] @ probabilities [..., Tk, Tq]: [..., Dv, Tq]."""
        *batch, last, before = range(self.scores.dim())
        if self.order != (*batch, before, last):
            return None
        attended = self.scores.lower(value.transpose(-1, -2))
        return None if attended is None else attended.transpose(-1, -2)


def _permute(scores, *dims) -> TracedScores | Transposed | None:
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    order = tuple(dim % scores.dim() for dim in dims)
    if scores.softmaxed:
        return Transposed(scores, order)
    *batch, last, before = range(scores.dim())
    if order != (*batch, before, last) or not scores.bare or scores.shifted == "rows":
        return None
    ((batch, query, key),) = scores.products
    return scores.replaced(
        products=((batch, key.expand(*batch, -1, -1), query),),
        shape=torch.Size((*batch, scores.shape[-1], scores.shape[-2])),
        overwritten=scores.overwritten,
    )


def _transpose(scores, dim0, dim1) -> TracedScores | Transposed | None:
    order = list(range(scores.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(scores, *order)


def _lower_transposed(value, transposed) -> Tensor | None:
    return transposed.lower(value) if isinstance(transposed, Transposed) else None


# Evolla, Grounding DINO, Informer: the largest score is subtracted before softmax.
# XGLM, Grounding DINO: limits that no score reaches


@dataclass(eq=False)
class RowMax(FromScores):
    """The largest of each row of ``scores``: softmax is indifferent to its being subtracted.

    Attributes:
        kept: the dimension of the keys is there, of size 1.
        of_all: the largest of all rows instead.
    """

    kept: bool
    of_all: bool = False


class Largest(NamedTuple):
    """As `torch.max` over one dimension gives them."""

    values: RowMax
    indices: FromScores


def _at_least(scores, least) -> TracedScores | None:
    if not isinstance(scores, TracedScores) or scores.softmaxed or isinstance(least, Lazy):
        return None
    if isinstance(least, Tensor) and (least.numel() > 1 or not has_value(least)):
        return None
    return scores.replaced() if least <= -_UNREACHED else None


def _clamp(scores, min=None, max=None) -> TracedScores | None:
    if max is not None and (not isinstance(max, (int, float)) or max < _UNREACHED):
        return None
    return _at_least(scores, -_UNREACHED if min is None else min)


def _max(scores, dim=None, keepdim=False) -> TracedScores | RowMax | Largest | None:
    if dim is None and not keepdim:
        return None if scores.softmaxed else RowMax(scores, False, of_all=True)
    if isinstance(dim, (Tensor, Lazy)):
        return None if keepdim else _at_least(scores, dim)
    values = _row_max(scores, dim, keepdim)
    return values and Largest(values, FromScores(scores))


def _row_max(scores, dim=(), keepdim=False) -> RowMax | None:
    if dim not in (-1, scores.dim() - 1, [-1], (-1,)) or scores.softmaxed:
        return None
    return RowMax(scores, keepdim)


def _unsqueeze(row_max, dim) -> RowMax | None:
    rows = dim == -1 and not row_max.kept and not row_max.of_all
    return RowMax(row_max.scores, True) if rows else None


def _detach(row_max) -> RowMax:
    return RowMax(row_max.scores, row_max.kept, row_max.of_all)


def subtract_row_max(scores: TracedScores, largest: RowMax) -> TracedScores | None:
    if scores.softmaxed or scores.gate is not None:
        return None
    if largest.of_all:
        return scores.replaced(shifted=scores.shifted or "all")
    fits = largest.kept and largest.scores.shape == scores.shape
    return scores.replaced(shifted="rows") if fits else None


PRODUCTS = {"baddbmm": _baddbmm}
RULES: dict[str, Callable] = {
    "amax": _row_max,
    "cat": _cat,
    "clamp": _clamp,
    "max": _max,
    "maximum": _at_least,
    "permute": _permute,
    "transpose": _transpose,
}
RULES_OF: dict[type[Lazy], dict[str, Callable]] = {
    FromScores: {},
    RowMax: {"detach": _detach, "unsqueeze": _unsqueeze},
    Transposed: dict.fromkeys(["matmul", "bmm", "__matmul__"], _lower_transposed),
}
