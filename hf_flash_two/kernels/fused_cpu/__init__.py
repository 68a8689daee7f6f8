"""The attention through PyTorch's fused CPU op, wherever that can say what the mask says.

The op enters one parallel region in a call, where tiles enter one for each product: it is faster
on plain attention, and keeps its speed on a busy machine. What it has no word for (a bias, a
softcap, ALiBi, sinks, dropout, a dense mask) is left to tiles. So is what it gets wrong: without
keys it ends the process, it ignores a last stride other than 1, and it takes 0 for the lse of a row
that sees nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from hf_flash_two.kernels import blockwise
from hf_flash_two.kernels.fused_cpu.pieces import Piece, Plan, plan_of
from hf_flash_two.kernels.hidden import HiddenPairs, hides
from hf_flash_two.kernels.params import (
    AttentionParams,
    empty_lse,
    empty_output,
    output_layout,
    statistics_dtype,
)

_FEW_ROWS = 64
"""With so few rows of queries to a key head, reading the keys is what takes time: tiles read them
once for all query heads that share them."""

_LONG = 768
"""From so many rows on the op takes 256 of them at a time."""

_SAYS = """
query_start query_stop key_bounds query_offset window_left window_right scale block_q block_k
""".split()
_TERMS = [at for at, name in enumerate(AttentionParams._fields) if name not in _SAYS]
"""Every other field, those to come included, changes scores in a way that the op does not know."""

_OP = "_scaled_dot_product_flash_attention_for_cpu"


def declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, by_name: bool
) -> str | None:
    """Why PyTorch's op does not compute this call, or why it does not pay."""
    heads, rows = query.shape[1] // key.shape[1], query.shape[2]
    has_terms = any([_is_on(params[at]) for at in _TERMS])
    reason = _declines(
        query.device.type, query.shape[3] == value.shape[3], has_terms, params.scale == 0,
        params.block_q is not None or params.block_k is not None,
        rows * heads <= _FEW_ROWS and not by_name, key.shape[2] == 0,
    )  # fmt: skip
    if reason is None:
        plan = _plan(query, key, params)
        reason = plan if isinstance(plan, str) else None
    return reason


def _is_on(field: Tensor | float | None) -> bool:
    return field is not None and (isinstance(field, Tensor) or field != 0)


@lru_cache
def _declines(
    device: str, one_dim: bool, terms: bool, scale_0: bool, sizes: bool, few: bool, empty: bool
) -> str | None:
    if not hasattr(torch.ops.aten, _OP) or not hasattr(torch.ops.aten, _OP + "_backward"):
        return "this PyTorch has no fused op for CPUs"
    reasons = {
        f"it needs a CPU and the tensors are on {device}": device != "cpu",
        "it has no bias, ALiBi, softcap, sinks, dropout or dense mask": terms,
        "it needs keys and values of the same head_dim": not one_dim,
        "it has no scale of 0": scale_0,
        "it does not take q_bucket_size or k_bucket_size": sizes,
        "blockwise is faster for so few queries": few,
        "there are no keys": empty,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def load() -> tuple[Callable, Callable]:
    """The forward and the backward."""
    return forward, backward


def _plan(query: Tensor, key: Tensor, params: AttentionParams) -> Plan | str:
    batch, heads, rows, width = query.shape
    return plan_of(params, batch, rows, key.shape[2], heads * width)


def _pieces_of(query: Tensor, key: Tensor, params: AttentionParams) -> Plan:
    plan = _plan(query, key, params)
    assert isinstance(plan, Plan), plan
    return plan


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, D] in the dtype of ``query`` and lse [B, Hq, Tq] in float32 (float64)."""
    plan = _pieces_of(query, key, params)
    inputs = [_readable(x, query.dtype) for x in (query, key, value)]
    out, lse = empty_output(query, value.shape[3]), empty_lse(query)
    masks = _Masks(params, inputs[0])
    for piece in plan.pieces:
        out_part, lse_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_cut(piece, *inputs), 0.0, piece.causal, attn_mask=masks(piece), scale=params.scale
        )
        at = (piece.batch, slice(None), piece.rows)
        if plan.is_whole:
            out, lse = _result(out_part, query), lse_part.contiguous()
        else:
            out[at], lse[at] = out_part, lse_part
    if plan.blind is not None:
        out.masked_fill_(plan.blind[..., None], 0)
        lse.masked_fill_(plan.blind, -torch.inf)
    for row in _polluted(out) if hides(query, key, params) else ():
        only = slice(row, row + 1)
        part = blockwise.forward(query[only], key[only], value[only], _rows(params, only))
        out[only], lse[only] = part
    return out, lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    need_d_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and value; of lse PyTorch's op knows none, and tiles compute it."""
    if d_lse is not None:
        return blockwise.backward(d_out, d_lse, query, key, value, out, lse, params, need_d_bias)
    plan = _pieces_of(query, key, params)
    dtype = _backward_dtype(query.dtype, plan)
    inputs = [_readable(x, dtype) for x in (query, key, value)]
    shown = lse.masked_fill(lse == -torch.inf, torch.inf)
    results = [_readable(d_out, dtype), _readable(out, dtype), shown]
    # Sums of several pieces are rounded once.
    wide, sums = statistics_dtype(query.dtype), ()
    if not plan.is_whole:
        layouts = [output_layout(x, x.shape[3]) for x in (query, key, value)]
        sums = tuple(query.new_empty_strided(*at, dtype=wide).zero_() for at in layouts)
    masks = _Masks(params, inputs[0])
    for piece in plan.pieces:
        at = (piece.batch, slice(None), piece.rows)
        d_out_part, out_part, lse_part = (x[at] for x in results)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out_part, *_cut(piece, *inputs), out_part, lse_part, 0.0, piece.causal,
            attn_mask=masks(piece), scale=params.scale,
        )  # fmt: skip
        if plan.is_whole:
            sums = parts
        else:
            for total, part in zip(_cut(piece, *sums), parts, strict=True):
                total.add_(part)
    grads = [_result(total, x) for total, x in zip(sums, (query, key, value), strict=True)]
    for row in _polluted(*grads) if hides(query, key, params) else ():
        only = slice(row, row + 1)
        dq, dk, dv, _, _ = blockwise.backward(
            d_out[only], None, query[only], key[only], value[only], out[only], lse[only],
            _rows(params, only), False,
        )  # fmt: skip
        for grad, part in zip(grads, (dq, dk, dv), strict=True):
            grad[only] = part
    return grads[0], grads[1], grads[2], None, None


def _result(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype and layout that a result has for the input ``like``."""
    _, strides = output_layout(like, like.shape[3])
    if (x.dtype, x.stride()) == (like.dtype, strides):
        return x
    return empty_output(like, like.shape[3]).copy_(x)


def _backward_dtype(dtype: torch.dtype, plan: Plan) -> torch.dtype:
    """In which the op computes gradients: in half precision it adds up those of keys in it, too.

    It does so over 64 rows at a time in pieces of fewer than 768, over 256 in longer ones. Of
    float16 it is never faster than of float32.
    """
    if dtype == torch.float16:
        return torch.float32
    short = any(piece.rows.stop - piece.rows.start < _LONG for piece in plan.pieces)
    return torch.float32 if dtype == torch.bfloat16 and short and not plan.is_whole else dtype


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, its last axis without gaps."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.stride(3) == 1 else x.contiguous()


def _cut(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    of_keys = (piece.batch, slice(None), piece.keys)
    return query[piece.batch, :, piece.rows], key[of_keys], value[of_keys]


def _rows(params: AttentionParams, batch: slice) -> AttentionParams:
    """The settings of some batch rows."""
    cut = {}
    for name in ("query_start", "query_stop", "key_bounds"):
        tensor = getattr(params, name)
        if tensor is not None and tensor.shape[0] > 1:
            cut[name] = tensor[batch]
    return params._replace(**cut)


def _polluted(*results: Tensor) -> list[int]:
    """The batch rows with numbers that are not finite, which may come from hidden inputs.

    The op computes what is hidden and multiplies it by 0, which is no help against NaN.
    """
    sums = torch.stack([x.sum((1, 2, 3), dtype=statistics_dtype(x.dtype)) for x in results])
    return (~sums.isfinite()).any(0).nonzero().flatten().tolist()


class _Masks:
    """Additive masks of pieces, [1, 1, rows, keys]: 0 or -inf."""

    def __init__(self, params: AttentionParams, like: Tensor) -> None:
        self._hidden, self._dtype = HiddenPairs(params, like.device), like.dtype
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, piece: Piece) -> Tensor | None:
        if not piece.masked:
            return None
        # The batch rows of a piece are alike.
        row = slice(piece.batch.start, piece.batch.start + 1)
        hidden = self._hidden(row, piece.rows, piece.keys)
        assert hidden is not None, "nothing is hidden without a band or intervals"
        # The blocks of a band hide the same, one after the other.
        if self._last is None or self._last[0] is not hidden:
            mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
            self._last = hidden, mask[None]
        return self._last[1]
