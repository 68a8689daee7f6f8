"""What each torch function, looked up by name, does to attention scores.

A rule has the signature of its function and returns what stands for the result, or None: then the
scores are computed, or, if they are probabilities, the layer is refused. Rules that few families
need stand in `tail`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_flash_two.hf.mask_proxy import MaskProxy
from hf_flash_two.hf.tensor_masks import HIDDEN
from hf_flash_two.hf.tracer import tail
from hf_flash_two.hf.tracer.scores import Lazy, TracedScores, product
from hf_flash_two.tensor_cache import has_value


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


def _einsum_product(tracer, equation, *operands) -> TracedScores | None:
    """An einsum that multiplies two tensors over one index, the last two of the result theirs."""
    first, second, out = _indices(equation, operands)
    shared = set(first) & set(second)
    summed = shared - set(out)
    if len(summed) != 1 or len(out) < 3 or shared - summed != set(out[:-2]):
        return None
    tensors = _operands(operands)
    if out[-2] in second:
        first, second, tensors = second, first, tensors[::-1]
    batch, (at,) = out[:-2], summed
    query = _permuted(tensors[0], first, batch + out[-2] + at)
    key = _permuted(tensors[1], second, batch + at + out[-1])
    return None if query is None or key is None else product(tracer, query, key)


def _sdpa(
    tracer,
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
    scores = product(tracer, query, key.transpose(-1, -2))
    scores = scores and scores.times(query.shape[-1] ** -0.5 if scale is None else scale)
    if scores is None:
        return None
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
        scores = scores.hide(attn_mask)
    elif attn_mask is not None:
        scores = scores.plus(attn_mask)
    if scores is None:
        return None
    dropout = _drawn(dropout_p, query.device) if dropout_p else None
    return scores.replaced(causal=is_causal, softmaxed=True, dropout=dropout).lower(value)


PRODUCTS = {
    "matmul": product,
    "__matmul__": product,
    "bmm": product,
    "einsum": _einsum_product,
    "scaled_dot_product_attention": _sdpa,
    **tail.PRODUCTS,
}


# What is done to scores


def _add(a, b, *, alpha=1) -> TracedScores | None:
    scores, other = (a, b) if isinstance(a, TracedScores) else (b, a)
    if alpha != 1 or scores.softmaxed:
        return None
    if isinstance(other, TracedScores):
        return tail.sum_of_products(scores, other)
    if isinstance(other, (int, float)):
        other = torch.full((), other, dtype=scores.dtype, device=scores.device)
    if scores.gate is not None:
        return tail.ungated(scores, other) if isinstance(other, Tensor) else None
    return scores.plus(other) if isinstance(other, (Tensor, MaskProxy)) else None


def _subtract(a, b, *, alpha=1) -> TracedScores | None:
    if not isinstance(a, TracedScores) or isinstance(b, TracedScores) or alpha != 1:
        return None
    if isinstance(b, tail.RowMax):
        return tail.subtract_row_max(a, b)
    return _add(a, -b)


def _multiply(a, b) -> TracedScores | None:
    scores, other = (a, b) if isinstance(a, TracedScores) else (b, a)
    if not isinstance(other, (int, float, Tensor)):
        return None
    scaled = scores.times(other)
    return tail.gated(scores, other) if scaled is None and isinstance(other, Tensor) else scaled


def _divide(a, b) -> TracedScores | None:
    divides = isinstance(a, TracedScores) and isinstance(b, (int, float, Tensor))
    return a.times(1 / b) if divides else None


def _softmax(scores, dim=None, *more, dtype=None, _stacklevel=3) -> TracedScores | None:
    dtype = next((x for x in more if isinstance(x, torch.dtype)), dtype)
    if dim not in (-1, scores.dim() - 1) or scores.softmaxed or scores.gate is not None:
        return None
    return scores.replaced(softmaxed=True, dtype=dtype or scores.dtype)


def _dropout(scores, p=0.5, training=True, inplace=False) -> TracedScores | None:
    if not training or p == 0:
        return scores
    if inplace or not scores.softmaxed or scores.dropout is not None:
        return None
    return scores.replaced(dropout=_drawn(p, scores.device))


def _drawn(p: float, device: torch.device) -> tuple[float, Tensor]:
    """(p, seed): drawn here, so that probabilities used twice are dropped once."""
    return p, torch.randint(2**62, (1,), device=device)


def _lower(scores, value) -> Tensor | None:
    lowers = isinstance(scores, TracedScores) and scores.softmaxed and isinstance(value, Tensor)
    return scores.lower(value) if lowers else None


def _einsum(equation, *operands) -> Tensor | None:
    """Probabilities [..., q, k] times values, laid out in any way."""
    first, second, out = _indices(equation, operands)
    if len(first) < 3:
        return None
    scores, value = _operands(operands)
    if isinstance(value, TracedScores):
        first, second, scores, value = second, first, value, scores
    summed = set(first) & set(second) - set(out)
    rest = set(second) - set(first)
    if not isinstance(scores, TracedScores) or not scores.softmaxed or isinstance(value, Lazy):
        return None
    if summed != {first[-1]} or len(rest) != 1:
        return None
    batch, (depth,) = first[:-2], rest
    value = _permuted(value, second, batch + first[-1] + depth)
    if value is None or set(out) != {*batch, first[-2], depth}:
        return None
    lowered = scores.lower(value)
    return None if lowered is None else _permuted(lowered, batch + first[-2] + depth, out)


def _to(scores, *args, **kwargs) -> TracedScores | None:
    dtype: Any = scores.dtype
    for target in (*args, *kwargs.values()):
        if isinstance(target, torch.dtype):
            dtype = target
        elif isinstance(target, (Tensor, Lazy)):
            dtype = target.dtype
        elif isinstance(target, (torch.device, str)) and torch.device(target) != scores.device:
            return None
    if not dtype.is_floating_point:
        return None
    return scores if dtype == scores.dtype else scores.replaced(dtype=dtype)


def _where(condition, input, other) -> TracedScores | None:
    if isinstance(input, TracedScores):
        return input.hide(condition) if _hides(other) else None
    return other.hide(~condition) if isinstance(other, TracedScores) and _hides(input) else None


def _masked_fill(scores, mask, value) -> TracedScores | None:
    if not isinstance(scores, TracedScores) or not isinstance(mask, (Tensor, MaskProxy)):
        return None
    visible = mask.logical_not()
    if scores.softmaxed and value == 0:
        if not has_value(visible):
            return None
        known = any(torch.equal(seen, visible) for _, seen in scores.visible)
        return scores.replaced() if known else None
    return scores.hide(visible) if _hides(value) else None


def _hides(value) -> bool:
    if isinstance(value, Tensor):
        return has_value(value) and bool((value <= HIDDEN).all())
    return isinstance(value, (int, float)) and value <= HIDDEN


def _reshape_as(x, scores) -> Tensor | None:
    return x.reshape(scores.shape) if isinstance(x, Tensor) else None


RULES = {
    **dict.fromkeys(["add", "__add__", "__radd__"], _add),
    **dict.fromkeys(["sub", "subtract", "__sub__"], _subtract),
    **dict.fromkeys(["mul", "multiply", "__mul__", "__rmul__"], _multiply),
    **dict.fromkeys(["div", "divide", "true_divide", "__truediv__"], _divide),
    **dict.fromkeys(["matmul", "bmm", "__matmul__"], _lower),
    **dict.fromkeys(["to", "type"], _to),
    **dict.fromkeys(["reshape_as", "view_as"], _reshape_as),
    "dropout": _dropout,
    "einsum": _einsum,
    "expand_as": lambda x, like: x.expand(like.shape) if isinstance(x, Tensor) else None,
    "float": lambda scores: _to(scores, torch.float32),
    "masked_fill": _masked_fill,
    "softmax": _softmax,
    "type_as": lambda x, like: _to(x, like) if isinstance(x, TracedScores) else x.to(like.dtype),
    "where": _where,
    **tail.RULES,
}
RULES_OF = {TracedScores: RULES, **tail.RULES_OF}
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
