"""What becomes of attention scores under each torch function.

A rule has the signature of the function it stands for and returns what stands for the result, or
None where none does: then the scores are computed, or, if they are probabilities, the layer is
refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_flash_two.hf.mask_carrier import MaskCarrier
from hf_flash_two.hf.scores import HIDDEN, Lazy, RowArgmax, RowMax, Scores, Turned, version_of
from hf_flash_two.tensor_cache import has_value

_UNREACHED = 5e4
"""Limits this far from 0 change no scores: float16 ends a little further out."""


def follow(rule: Callable | None, *args, **kwargs):
    """``rule`` of these arguments, None if there is none or it does not take them."""
    if rule is None:
        return None
    try:
        signature(rule).bind(*args, **kwargs)
    except TypeError:
        return None
    return rule(*args, **kwargs)


@cache
def signature(func: Callable) -> inspect.Signature:
    return inspect.signature(func)


# Products of queries and keys


def _product(layer, query: Tensor, key: Tensor) -> Scores | None:
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
    lead = tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]))
    products = ((lead, query.expand(*lead, -1, -1), key.transpose(-1, -2)),)
    shape = torch.Size((*lead, query.shape[-2], key.shape[-1]))
    noted = tuple((x, version_of(x)) for x in (query, key))
    return Scores(layer, products, shape, dtype, (lead,), noted=noted)


def _baddbmm(layer, input, batch1, batch2, *, beta=1, alpha=1) -> Scores | None:
    scores = _product(layer, batch1, batch2)
    scores = scores and scores.times(alpha)
    if scores is None or beta == 0:
        return scores
    return scores.plus(input if beta == 1 else input * beta)


def _einsum_product(layer, equation, *operands) -> Scores | None:
    """An einsum that multiplies two tensors over one index, the last two of the result theirs."""
    first, second, out = _indices(equation, operands)
    shared = set(first) & set(second)
    summed = shared - set(out)
    if len(summed) != 1 or len(out) < 3 or shared - summed != set(out[:-2]):
        return None
    tensors = _operands(operands)
    if out[-2] in second:
        first, second, tensors = second, first, tensors[::-1]
    lead, (at,) = out[:-2], summed
    query = _permuted(tensors[0], first, lead + out[-2] + at)
    key = _permuted(tensors[1], second, lead + at + out[-1])
    return None if query is None or key is None else _product(layer, query, key)


def _sdpa(
    layer,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
) -> Tensor | None:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    scores = _product(layer, query, key.transpose(-1, -2))
    if scores is None:
        return None
    scores = scores.times(query.shape[-1] ** -0.5 if scale is None else scale)
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
        scores = scores.hide(attn_mask)
    elif attn_mask is not None:
        scores = scores.plus(attn_mask)
    if scores is None:
        return None
    dropout = _drawn(dropout_p, query.device) if dropout_p else None
    return scores.but(causal=is_causal, softmaxed=True, dropout=dropout).attend(value)


PRODUCTS = {
    "matmul": _product,
    "__matmul__": _product,
    "bmm": _product,
    "baddbmm": _baddbmm,
    "einsum": _einsum_product,
    "scaled_dot_product_attention": _sdpa,
}


# What is done to scores


def _add(a, b, *, alpha=1) -> Scores | None:
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    if alpha != 1 or scores.softmaxed:
        return None
    if isinstance(other, Scores):
        return _sum(scores, other)
    if isinstance(other, (int, float)):
        other = torch.full((), other, dtype=scores.dtype, device=scores.device)
    return scores.plus(other) if isinstance(other, (Tensor, MaskCarrier)) else None


def _sum(a: Scores, b: Scores) -> Scores | None:
    if b.softmaxed or a.shape != b.shape or a.gate is not None or b.gate is not None:
        return None
    if a.causal or b.causal or a.whole or b.whole:
        return None
    products = tuple(
        (lead, query * scores.scale, key)
        for scores in (a, b)
        for lead, query, key in scores.products
    )
    return a.but(
        products=products,
        dtype=torch.promote_types(a.dtype, b.dtype),
        leads=(*b.leads, *a.leads),
        scale=1.0,
        terms=a.terms + b.terms,
        visible=a.visible + b.visible,
        shifted=max(a.shifted, b.shifted, key=("", "all", "rows").index),
    )


def _subtract(a, b, *, alpha=1) -> Scores | None:
    if not isinstance(a, Scores) or isinstance(b, Scores) or alpha != 1:
        return None
    if isinstance(b, RowMax):
        if a.softmaxed or a.gate is not None:
            return None
        if b.of_all:
            return a.but(shifted=a.shifted or "all")
        return a.but(shifted="rows") if b.kept and b.scores.shape == a.shape else None
    return _add(a, -b)


def _multiply(a, b) -> Scores | None:
    scores, other = (a, b) if isinstance(a, Scores) else (b, a)
    return scores.times(other) if isinstance(other, (int, float, Tensor)) else None


def _divide(a, b) -> Scores | None:
    return a.times(1 / b) if isinstance(a, Scores) and isinstance(b, (int, float, Tensor)) else None


def _cat(tensors, dim=0) -> Scores | None:
    """Scores side by side are those of longer vectors that are 0 where they must not meet."""
    first = tensors[0]
    if not all(isinstance(x, Scores) and x.plain and x.lead == first.lead for x in tensors):
        return None
    if dim % first.dim() < first.dim() - 2:
        return None
    queries = [x.products[0][1] * x.scale for x in tensors]
    keys = [x.products[0][2].expand(*x.lead, -1, -1) for x in tensors]
    if dim % first.dim() == first.dim() - 1:
        query, key = torch.cat(queries, -1), _blocks(keys)
    else:
        query, key = _blocks(queries), torch.cat(keys, -1)
    shape = torch.Size((*first.lead, query.shape[-2], key.shape[-2]))
    return first.but(products=((first.lead, query, key),), shape=shape, scale=1.0)


def _blocks(parts: list[Tensor]) -> Tensor:
    """[..., T_i, D_i] -> [..., sum of T_i, sum of D_i], the parts along the diagonal."""
    width, at, rows = sum(part.shape[-1] for part in parts), 0, []
    for part in parts:
        rows.append(F.pad(part, (at, width - at - part.shape[-1])))
        at += part.shape[-1]
    return torch.cat(rows, -2)


def _softmax(scores, dim=None, *more, dtype=None, _stacklevel=3) -> Scores | None:
    dtype = next((x for x in more if isinstance(x, torch.dtype)), dtype)
    if dim not in (-1, scores.dim() - 1) or scores.softmaxed or scores.gate is not None:
        return None
    return scores.but(softmaxed=True, dtype=dtype or scores.dtype)


def _dropout(scores, p=0.5, training=True, inplace=False) -> Scores | None:
    if not training or p == 0:
        return scores
    if inplace or not scores.softmaxed or scores.dropout is not None:
        return None
    return scores.but(dropout=_drawn(p, scores.device))


def _drawn(p: float, device: torch.device) -> tuple[float, Tensor]:
    """(p, seed): drawn here, so that probabilities used twice are dropped once."""
    return p, torch.randint(2**62, (1,), device=device)


def _attend(scores, value) -> Tensor | None:
    if not isinstance(scores, Scores) or not scores.softmaxed or not isinstance(value, Tensor):
        return None
    return scores.attend(value)


def _einsum(equation, *operands) -> Tensor | None:
    """Probabilities [..., q, k] times values, laid out in any way."""
    first, second, out = _indices(equation, operands)
    if len(first) < 3:
        return None
    scores, value = _operands(operands)
    if isinstance(value, Scores):
        first, second, scores, value = second, first, value, scores
    summed = set(first) & set(second) - set(out)
    rest = set(second) - set(first)
    if not isinstance(scores, Scores) or not scores.softmaxed or isinstance(value, Lazy):
        return None
    if summed != {first[-1]} or len(rest) != 1:
        return None
    lead, (depth,) = first[:-2], rest
    value = _permuted(value, second, lead + first[-1] + depth)
    if value is None or set(out) != {*lead, first[-2], depth}:
        return None
    attended = scores.attend(value)
    return None if attended is None else _permuted(attended, lead + first[-2] + depth, out)


def _to(scores, *args, **kwargs) -> Scores | None:
    dtype = scores.dtype
    for target in (*args, *kwargs.values()):
        if isinstance(target, torch.dtype):
            dtype = target
        elif isinstance(target, (Tensor, Lazy)):
            dtype = target.dtype
        elif isinstance(target, (torch.device, str)) and torch.device(target) != scores.device:
            return None
    if not dtype.is_floating_point:
        return None
    return scores if dtype == scores.dtype else scores.but(dtype=dtype)


def _where(condition, input, other) -> Scores | None:
    if isinstance(input, Scores):
        return input.hide(condition) if _hides(other) else None
    return other.hide(~condition) if isinstance(other, Scores) and _hides(input) else None


def _masked_fill(scores, mask, value) -> Scores | None:
    if not isinstance(scores, Scores) or not isinstance(mask, (Tensor, MaskCarrier)):
        return None
    visible = mask.logical_not()
    if scores.softmaxed and value == 0:
        if not has_value(visible):
            return None
        known = any(torch.equal(seen, visible) for _, seen in scores.visible)
        return scores.but() if known else None
    return scores.hide(visible) if _hides(value) else None


def _hides(value) -> bool:
    if isinstance(value, Tensor):
        return has_value(value) and bool((value <= HIDDEN).all())
    return isinstance(value, (int, float)) and value <= HIDDEN


class Largest(NamedTuple):
    """As `torch.max` over one dimension gives them."""

    values: RowMax
    indices: RowArgmax


def _at_least(scores, least) -> Scores | None:
    if not isinstance(scores, Scores) or scores.softmaxed or isinstance(least, Lazy):
        return None
    if isinstance(least, Tensor) and (least.numel() > 1 or not has_value(least)):
        return None
    return scores.but() if least <= -_UNREACHED else None


def _clamp(scores, min=None, max=None) -> Scores | None:
    if max is not None and (not isinstance(max, (int, float)) or max < _UNREACHED):
        return None
    return _at_least(scores, -_UNREACHED if min is None else min)


def _max(scores, dim=None, keepdim=False) -> Scores | RowMax | Largest | None:
    if dim is None and not keepdim:
        return None if scores.softmaxed else RowMax(scores, False, of_all=True)
    if isinstance(dim, (Tensor, Lazy)):
        return None if keepdim else _at_least(scores, dim)
    values = _row_max(scores, dim, keepdim)
    return values and Largest(values, RowArgmax(scores))


def _row_max(scores, dim=(), keepdim=False) -> RowMax | None:
    if dim not in (-1, scores.dim() - 1, [-1], (-1,)) or scores.softmaxed:
        return None
    return RowMax(scores, keepdim)


def _unsqueeze(row_max, dim) -> RowMax | None:
    rows = dim == -1 and not row_max.kept and not row_max.of_all
    return RowMax(row_max.scores, True) if rows else None


def _detach(row_max) -> RowMax:
    return RowMax(row_max.scores, row_max.kept, row_max.of_all)


def _permute(scores, *dims) -> Scores | Turned | None:
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    order = tuple(dim % scores.dim() for dim in dims)
    if scores.softmaxed:
        return Turned(scores, order)
    *lead, last, before = range(scores.dim())
    if order != (*lead, before, last) or not scores.bare or scores.shifted == "rows":
        return None
    ((lead, query, key),) = scores.products
    return scores.but(
        products=((lead, key.expand(*lead, -1, -1), query),),
        shape=torch.Size((*lead, scores.shape[-1], scores.shape[-2])),
        overwritten=scores.overwritten,
    )


def _transpose(scores, dim0, dim1) -> Scores | Turned | None:
    order = list(range(scores.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(scores, *order)


def _attend_turned(value, turned) -> Tensor | None:
    return turned.attend(value) if isinstance(turned, Turned) else None


def _reshape_as(x, scores) -> Tensor | None:
    return x.reshape(scores.shape) if isinstance(x, Tensor) else None


RULES = {
    **dict.fromkeys(["add", "__add__", "__radd__"], _add),
    **dict.fromkeys(["sub", "subtract", "__sub__"], _subtract),
    **dict.fromkeys(["mul", "multiply", "__mul__", "__rmul__"], _multiply),
    **dict.fromkeys(["div", "divide", "true_divide", "__truediv__"], _divide),
    **dict.fromkeys(["matmul", "bmm", "__matmul__"], _attend),
    **dict.fromkeys(["to", "type"], _to),
    **dict.fromkeys(["reshape_as", "view_as"], _reshape_as),
    "amax": _row_max,
    "cat": _cat,
    "clamp": _clamp,
    "dropout": _dropout,
    "einsum": _einsum,
    "expand_as": lambda x, like: x.expand(like.shape) if isinstance(x, Tensor) else None,
    "float": lambda scores: _to(scores, torch.float32),
    "masked_fill": _masked_fill,
    "max": _max,
    "maximum": _at_least,
    "permute": _permute,
    "softmax": _softmax,
    "transpose": _transpose,
    "type_as": lambda x, like: _to(x, like) if isinstance(x, Scores) else x.to(like.dtype),
    "where": _where,
}
ROW_MAX_RULES = {"detach": _detach, "unsqueeze": _unsqueeze}
TURNED_RULES = dict.fromkeys(["matmul", "bmm", "__matmul__"], _attend_turned)
RULES_OF = {Scores: RULES, RowMax: ROW_MAX_RULES, RowArgmax: {}, Turned: TURNED_RULES}
VIEWS = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous"}
WHILE_SPLIT = {"add", "__add__", "__radd__"} | VIEWS
"""What may be done to scores whose queries or keys a view has split into several dimensions."""


# Einstein sums


def _operands(operands) -> list:
    return list(operands[0]) if isinstance(operands[0], (list, tuple)) else list(operands)


def _indices(equation: str, operands) -> tuple[str, str, str]:
    """The indices of two operands and of the result, an ellipsis spelled out; empty if unusual."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    tensors, inputs = _operands(operands), inputs.split(",")
    if not arrow or len(inputs) != 2 or equation.count(".") not in (0, 9):
        return "", "", ""
    extra = [x.dim() - len(i.replace("...", "")) for x, i in zip(tensors, inputs, strict=True)]
    if extra[0] != extra[1]:
        return "", "", ""
    first, second, out = (x.replace("...", "ABCDEFGH"[: extra[0]]) for x in (*inputs, out))
    if any(len(set(x)) != len(x) for x in (first, second, out)):
        return "", "", ""
    return first, second, out


def _permuted(x: Tensor, indices: str, wanted: str) -> Tensor | None:
    if sorted(indices) != sorted(wanted):
        return None
    return x.permute([indices.index(index) for index in wanted])
