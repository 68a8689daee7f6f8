"""The attention through PyTorch's fused CPU op, wherever that can say what the call says.

The op enters one parallel region in a call, where tiles enter one for each product: it is faster
on plain attention, and keeps its speed on a busy machine. It takes the mask in pieces
(`pieces`), and what is added to scores block by block (`additive`); sinks join a row afterwards by
its log-sum-exp. What it has no word for (a softcap, dropout, the largest scores, the gradient of a
bias or of lse) is left to tiles. So is what it gets wrong: without keys it ends the process, it
ignores a last stride other than 1, it takes 0 for the lse of a row that sees nothing, and its
backward trusts the lse of rows whose bias is as low as a float can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from hf_flash_two.kernels import blockwise
from hf_flash_two.kernels.fused_cpu import choice
from hf_flash_two.kernels.fused_cpu.additive import Additive, blind, in_blocks
from hf_flash_two.kernels.fused_cpu.at_once import AtOnce, is_at_once
from hf_flash_two.kernels.fused_cpu.pieces import Piece, Plan, plan_of, share_no_key
from hf_flash_two.kernels.fused_cpu.rows import Rows, is_few, readable, result
from hf_flash_two.kernels.hidden import hides
from hf_flash_two.kernels.params import (
    TENSORS,
    AttentionParams,
    Prepared,
    empty_lse,
    output_layout,
    statistics_dtype,
)

_SAYS = """
query_start query_stop key_bounds dense bias alibi_slopes sinks
query_offset window_left window_right scale block_q block_k deterministic batch_invariant
""".split()
_TERMS = [at for at, name in enumerate(AttentionParams._fields) if name not in _SAYS]
"""Every other field, those to come included, changes scores in a way that the op does not know."""

_FINE = 2.0**10
"""Beyond this, what a row's lse adds to its largest score is worn by rounding."""

_FEW_PIECES = 4
"""Of more pieces, all results are looked at instead of a row and a key of each."""

_OP = "_scaled_dot_product_flash_attention_for_cpu"


def declines(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, by_name: bool
) -> str | None:
    """Why PyTorch's op does not compute this call, or why it does not pay."""
    has_terms = any([_is_on(params[at]) for at in _TERMS])
    reason = _declines(
        query.device.type, query.shape[3] == value.shape[3], has_terms, params.scale == 0,
        params.block_q is not None or params.block_k is not None,
        not by_name and choice.tiles_are_faster(query.dtype, is_few(query, key), key.numel()),
        key.shape[2] == 0, params.batch_invariant,
    )  # fmt: skip
    if reason is None:
        plan = _plan(query, key, params)
        reason = plan if isinstance(plan, str) else None
    return reason


def _is_on(field: Tensor | float | None) -> bool:
    return field is not None and (isinstance(field, Tensor) or field != 0)


@lru_cache
def _declines(
    device: str,
    one_dim: bool,
    terms: bool,
    scale_0: bool,
    sizes: bool,
    few: bool,
    empty: bool,
    invariant: bool,
) -> str | None:
    if not hasattr(torch.ops.aten, _OP) or not hasattr(torch.ops.aten, _OP + "_backward"):
        return "this PyTorch has no fused op for CPUs"
    reasons = {
        f"it needs a CPU and the tensors are on {device}": device != "cpu",
        "it has no softcap, no dropout, and does not tell the largest scores": terms,
        "it is not batch-invariant": invariant,
        "it needs keys and values of the same head_dim": not one_dim,
        "it has no scale of 0": scale_0,
        "it does not take q_bucket_size or k_bucket_size": sizes,
        "blockwise is faster for so few queries": few,
        "there are no keys": empty,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def load() -> tuple[Callable, Callable, Callable]:
    """The forward, the backward and `prepare`."""
    return forward, backward, prepare


def _plan(query: Tensor, key: Tensor, params: AttentionParams) -> Plan | str:
    batch, heads, rows, width = query.shape
    # Where no heads become rows of one, a square stays one.
    few = is_few(query, key) and (heads != key.shape[1] or rows != key.shape[2])
    plan = plan_of(params, batch, rows, key.shape[2], heads * width, few)
    return plan if isinstance(plan, str) else in_blocks(plan, params)


def _pieces_of(query: Tensor, key: Tensor, params: AttentionParams) -> Plan:
    plan = _plan(query, key, params)
    assert isinstance(plan, Plan), plan
    return plan


def forward(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, D] in the dtype of ``query`` and lse [B, Hq, Tq] in float32 (float64)."""
    plan = _pieces_of(query, key, params)
    dtype = choice.forward_dtype(query.dtype, params.sinks is not None)
    inputs = [readable(x, dtype) for x in (query, key, value)]
    # What sinks take comes off before the output is rounded.
    out_dtype = query.dtype if params.sinks is None else dtype
    out, lse, additive = None, None, Additive(params, inputs[0])
    if not plan.is_whole:
        layout = output_layout(query, query.shape[3])
        out, lse = query.new_empty_strided(*layout, dtype=out_dtype), empty_lse(query)
    for planned in plan.pieces:
        piece, added, reverse = additive(planned)
        rows = Rows(piece, query, key, reverse, choice.doubled)
        queries, keys, values = _cut(piece, *inputs)
        out_part, lse_part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows.arrange(queries), keys, values, 0.0, piece.causal,
            attn_mask=rows.arrange_mask(added), scale=params.scale,
        )  # fmt: skip
        out_part, lse_part = rows.restore(out_part), rows.restore_lse(lse_part)
        if added is not None and _may_blind(params) and (lse_part == 0).any():
            lse_part = lse_part.masked_fill(blind(piece, added), -torch.inf)
        if out is None or lse is None:
            out, lse = result(out_part, query, out_dtype), lse_part.contiguous()
        else:
            at = (piece.batch, slice(None), piece.rows)
            out[at], lse[at] = out_part, lse_part
    assert out is not None and lse is not None
    if plan.blind is not None:
        out.masked_fill_(plan.blind[..., None], 0)
        lse.masked_fill_(plan.blind, -torch.inf)
    if params.sinks is not None:
        total = torch.logaddexp(lse, params.sinks[..., None])
        out.mul_(torch.exp(lse - total).nan_to_num_(0.0)[..., None])
        out, lse = result(out, query, query.dtype), total
    for row in _polluted(plan, params, [out], []) if hides(query, key, params) else ():
        only = slice(row, row + 1)
        part = blockwise.forward(query[only], key[only], value[only], _rows_of(params, only))
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
    """Gradients of query, key, value and sinks.

    PyTorch's op knows none of lse or of a bias, and tiles compute all.
    """
    if d_lse is not None or need_d_bias and params.bias is not None:
        return blockwise.backward(d_out, d_lse, query, key, value, out, lse, params, need_d_bias)
    plan = _pieces_of(query, key, params)
    shown = lse
    if plan.blind is not None or _may_blind(params):
        shown = lse.masked_fill(lse == -torch.inf, torch.inf)

    @lru_cache
    def given(dtype: torch.dtype) -> tuple[list[Tensor], Additive]:
        tensors = [readable(x, dtype) for x in (query, key, value, d_out, out)]
        return tensors, Additive(params, tensors[0])

    tensors, grads = (query, key, value), []
    alone = share_no_key(plan.pieces)
    if not plan.is_whole:
        # Sums of several pieces are rounded once.
        grads = [
            x.new_empty_strided(
                *output_layout(x, x.shape[3]),
                dtype=x.dtype if alone else statistics_dtype(x.dtype),
            ).zero_()
            for x in tensors
        ]
    for planned in plan.pieces:
        count = planned.rows.stop - planned.rows.start
        all_rows, has_sinks = count == query.shape[2], params.sinks is not None
        dtype = choice.backward_dtype(query.dtype, count, all_rows, has_sinks)
        inputs, additive = given(dtype)
        piece, added, reverse = additive(planned)
        rows = Rows(piece, query, key, reverse)
        at = (piece.batch, slice(None), piece.rows)
        d_out_part, out_part, lse_part = (x[at] for x in (*inputs[3:], shown))
        queries, keys, values = _cut(piece, *inputs[:3])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            rows.arrange(d_out_part), rows.arrange(queries), keys, values, rows.arrange(out_part),
            rows.arrange_lse(lse_part), 0.0, piece.causal, attn_mask=rows.arrange_mask(added),
            scale=params.scale,
        )  # fmt: skip
        parts = rows.restore(dq), dk, dv
        if plan.is_whole:
            grads = list(parts)
            break
        for grad, part in zip(_cut(piece, *grads), parts, strict=True):
            if alone:
                grad.copy_(part)
            else:
                grad.add_(part)
    grads = [result(x, like, like.dtype) for x, like in zip(grads, tensors, strict=True)]
    d_sinks = _d_sinks(d_out, out, lse, params)
    again = _polluted(plan, params, grads[:1], grads[1:]) if hides(query, key, params) else []
    if not params.plain:
        again = sorted({*again, *_coarse(lse)})
    if d_sinks is not None and hides(query, key, params):
        dirty = (~d_sinks.isfinite()).any(1)
        again = sorted({*again, *dirty.nonzero().flatten().tolist()})
    for row in again:
        only = slice(row, row + 1)
        *parts, _, sinks_part = blockwise.backward(
            d_out[only], None, query[only], key[only], value[only], out[only], lse[only],
            _rows_of(params, only), False,
        )  # fmt: skip
        for grad, part in zip(grads, parts, strict=True):
            grad[only] = part
        if d_sinks is not None and sinks_part is not None:
            d_sinks[only] = sinks_part
    if d_sinks is not None and params.sinks is not None:
        d_sinks = d_sinks.sum_to_size(params.sinks.shape)
    return grads[0], grads[1], grads[2], None, d_sinks


def prepare(
    query: Tensor, key: Tensor, value: Tensor, params: AttentionParams, with_lse: bool
) -> Prepared | None:
    """`forward` and `backward`, with the same bits, for all calls that differ in values only.

    None where their values decide more, and where the op is called more than once.

    Args:
        with_lse: otherwise lse may be None.
    """
    plan = _pieces_of(query, key, params)
    if not is_at_once(plan, params):
        return None
    call = AtOnce(plan, query, key, value, params, with_lse, forward, backward)
    return Prepared(call.forward, call.backward)


def _d_sinks(d_out: Tensor, out: Tensor, lse: Tensor, params: AttentionParams) -> Tensor | None:
    """[B, Hq], by batch row."""
    if params.sinks is None:
        return None
    weight = torch.exp(params.sinks[..., None] - lse).nan_to_num_(0.0)
    delta = torch.linalg.vecdot(d_out.to(lse.dtype), out.to(lse.dtype))
    return (weight * delta).sum(2).neg_()


def _may_blind(params: AttentionParams) -> bool:
    """Whether rows may see nothing that the plan does not know of."""
    return params.bias is not None or params.dense is not None


def _cut(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    of_keys = (piece.batch, slice(None), piece.keys)
    return query[piece.batch, :, piece.rows], key[of_keys], value[of_keys]


def _rows_of(params: AttentionParams, batch: slice) -> AttentionParams:
    """The settings of some batch rows."""
    tensors = {name: getattr(params, name) for name in TENSORS if name != "seed"}
    cut = {name: x[batch] for name, x in tensors.items() if x is not None and x.shape[0] > 1}
    return params._replace(**cut)


def _polluted(
    plan: Plan, params: AttentionParams, of_rows: list[Tensor], of_keys: list[Tensor]
) -> list[int]:
    """The batch rows with numbers that are not finite, which may come from hidden inputs.

    The op computes what is hidden and multiplies it by 0, which is no help against NaN. In a causal
    square the last row sees every key and the first key is seen by every row: what is not finite
    anywhere is not finite there.
    """
    results = of_rows + of_keys
    probes = results
    is_square = params.dense is None and not any([piece.masked for piece in plan.pieces])
    if is_square and len(plan.pieces) <= _FEW_PIECES:
        probes = [x[piece.batch, :, piece.rows.stop - 1] for piece in plan.pieces for x in of_rows]
        probes += [x[piece.batch, :, piece.keys.start] for piece in plan.pieces for x in of_keys]
    if all(math.isfinite(x.sum(dtype=statistics_dtype(x.dtype)).item()) for x in probes):
        return []
    sums = [x.sum((1, 2, 3), dtype=statistics_dtype(x.dtype)) for x in results]
    return (~torch.stack(sums).isfinite()).any(0).nonzero().flatten().tolist()


def _coarse(lse: Tensor) -> list[int]:
    """The batch rows with an lse whose rounding shows in probabilities."""
    far = (lse.abs() > _FINE) & (lse != -torch.inf)
    return far.any(2).any(1).nonzero().flatten().tolist()
