"""Calls that are one call of PyTorch's op, whatever their tensors hold.

Small ones take less time than what is found out about them, so that is found out once for all that
are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_flash_two.kernels.fused_cpu import choice
from hf_flash_two.kernels.fused_cpu.additive import band_additive
from hf_flash_two.kernels.fused_cpu.pieces import Plan
from hf_flash_two.kernels.fused_cpu.rows import Rows, laid_out, readable
from hf_flash_two.kernels.hidden import hides
from hf_flash_two.kernels.params import AttentionParams, output_layout, statistics_dtype

_attend = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)
"""PyTorch's op, by the quicker of two ways to it."""


def is_at_once(plan: Plan, params: AttentionParams) -> bool:
    """Whether a call has one piece, to which at most a band is added."""
    if _attend is None or not plan.is_whole or plan.blind is not None or not params.plain:
        return False
    return params.query_start is None and params.dense is None and params.sinks is None


class AtOnce:
    """The forward and the backward of all calls that differ in their tensors' values only.

    Args:
        plan: that of the call, which `is_at_once`.
        with_lse: otherwise lse is None.
        forward, backward: of any call: they compute those whose results are not finite, for which
            hidden inputs may be the reason.
    """

    def __init__(
        self,
        plan: Plan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        params: AttentionParams,
        with_lse: bool,
        forward: Callable,
        backward: Callable,
    ) -> None:
        (self._piece,), inputs = plan.pieces, (query, key, value)
        self._with_lse, self._otherwise = with_lse, (forward, backward)
        self._dtype, self._stats = query.dtype, statistics_dtype(query.dtype)
        self._dtypes = (
            choice.forward_dtype(query.dtype, sinks=False),
            choice.backward_dtype(query.dtype, query.shape[2], all_rows=True, sinks=False),
        )
        without_gaps = all(x.stride(3) == 1 for x in inputs)
        self._as_they_are = without_gaps and self._dtypes[0] == query.dtype
        self._rows = Rows(self._piece, query, key, False, choice.doubled)
        self._rows_of_gradients = Rows(self._piece, query, key, False)
        self._layouts = [output_layout(x, x.shape[3]) for x in inputs]
        self._may_hide = hides(query, key, params)

    def _added(self, rows: Rows, params: AttentionParams, dtype: torch.dtype) -> Tensor | None:
        masked = self._piece.masked
        return rows.arrange_mask(band_additive(params, self._piece, dtype)) if masked else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> tuple[Tensor, Tensor | None]:
        rows, dtype = self._rows, self._dtypes[0]
        queries, keys, values = query, key, value
        if not self._as_they_are:
            queries, keys, values = [readable(x, dtype) for x in (query, key, value)]
        assert _attend is not None
        out, lse = _attend(
            rows.arrange(queries), keys, values, 0.0, self._piece.causal,
            attn_mask=self._added(rows, params, dtype), scale=params.scale,
        )  # fmt: skip
        out = laid_out(rows.restore(out), query, self._layouts[0], self._dtype)
        if self._may_hide:
            # In a causal square the last row sees every key.
            probe = out if self._piece.masked else out.select(2, -1)
            if not math.isfinite(probe.sum(dtype=self._stats).item()):
                return self._otherwise[0](query, key, value, params)
        return out, rows.restore_lse(lse).contiguous() if self._with_lse else None

    def backward(
        self,
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
        found = None
        if d_lse is None:
            found = self._differentiate(d_out, query, key, value, out, lse, params)
        if found is None:
            settings = (params, need_d_bias)
            return self._otherwise[1](d_out, d_lse, query, key, value, out, lse, *settings)
        return *found, None, None

    def _differentiate(
        self,
        d_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        params: AttentionParams,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """None if hidden inputs may have spoilt the gradients."""
        rows, dtype = self._rows_of_gradients, self._dtypes[1]
        inputs = [readable(x, dtype) for x in (d_out, query, key, value, out)]
        d_outs, queries, keys, values, outs = inputs
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            rows.arrange(d_outs), rows.arrange(queries), keys, values, rows.arrange(outs),
            rows.arrange_lse(lse), 0.0, self._piece.causal,
            attn_mask=self._added(rows, params, dtype), scale=params.scale,
        )  # fmt: skip
        if self._may_hide:
            # What spoils gradients of values spoils the scores', and so those of keys.
            probes = dq, dk
            if not self._piece.masked:
                # In a causal square every row sees the first key, too.
                probes = dq.select(2, -1), dk.select(2, 0)
            sums = [x.sum(dtype=self._stats).item() for x in probes]
            if not all(map(math.isfinite, sums)):
                return None
        (of_q, of_k, of_v), dtype = self._layouts, self._dtype
        return (
            laid_out(rows.restore(dq), query, of_q, dtype),
            laid_out(dk, key, of_k, dtype), laid_out(dv, value, of_v, dtype),
        )  # fmt: skip
