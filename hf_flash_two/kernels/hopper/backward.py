"""The backward of the Hopper kernels: its launches.

Up to head dim 128, bands have dK, dV and dQ in one kernel (`gradients`), between two small ones
(`rows`); besides the results that takes a float32 dQ and an int32 for each tile of queries. Else
`queries` computes dQ, and `gradients`, or above head dim 128 `wide_keys`, dK and dV. All take two
float32 for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hf_flash_two.kernels.hopper import rows
from hf_flash_two.kernels.hopper.config import (
    ROWS,
    BackwardTiles,
    backward_tiles,
    forward_flags,
    heads_together,
)
from hf_flash_two.kernels.hopper.gluon import gl, shared_layout
from hf_flash_two.kernels.hopper.gradients import gradients_kernel
from hf_flash_two.kernels.hopper.queries import queries_kernel
from hf_flash_two.kernels.hopper.runs import key_runs, runs_tma
from hf_flash_two.kernels.hopper.schedule import ROW_MULTIPLE
from hf_flash_two.kernels.hopper.wide_keys import wide_keys_kernel
from hf_flash_two.kernels.params import LOG2E, AttentionParams, Layout, output_layout
from hf_flash_two.kernels.triton.args import (
    Heads,
    Operand,
    PerHead,
    Rows,
    Tma,
    broadcast_strides,
    dropout_of,
    intervals_of,
)
from hf_flash_two.kernels.triton.backward import gradient_of_sinks, replace_marked
from hf_flash_two.kernels.triton.config import Tiles, tma_fits, tma_of
from hf_flash_two.kernels.triton.launch import Launch, on_device, planned
from hf_flash_two.kernels.triton.ranges import key_ranges


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
    """Gradients of query, key, value, bias and sinks.

    Unless ``params.deterministic``, dQ may be summed in whatever order its parts arrive.
    """
    query, key, value, d_out = [
        x if _tma_copies(x) else x.clone(memory_format=torch.contiguous_format)
        for x in (query, key, value, d_out)
    ]
    out = out if out.stride(3) == 1 else out.contiguous()
    lse = lse.contiguous()
    plan = planned(_plan, params, (query, key, value), (d_out, out, lse, d_lse))
    return _differentiate(plan, d_out, d_lse, query, key, value, out, lse, params)


def prepare(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
    need_d_bias: bool,
) -> Callable | None:
    """`backward` for all calls that differ from this one in tensors' values only, or None."""
    if not all(map(_tma_copies, (query, key, value, d_out))):
        return None
    plan = planned(_plan, params, (query, key, value), (d_out, out, lse, d_lse))
    return lambda *given: _differentiate(plan, *given[:-1])


def _tma_copies(x: Tensor) -> bool:
    return x.stride(3) == 1 and tma_fits(x)


def _differentiate(
    plan: _Plan,
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor, Tensor, None, Tensor | None]:
    with on_device(query):
        dq, dk, dv = [query.new_empty_strided(*layout) for layout in plan.gradients]
        of_rows = lse.new_empty(plan.rows_shape)
        marked_rows = marked_keys = None
        if plan.tiles.setup.RESCUE:
            marked_rows = query.new_empty(query.shape[:3], dtype=torch.int8)
            # Two consumers mark each key of a wide head.
            empty = key.new_zeros if plan.tiles.wide else key.new_empty
            marked_keys = empty(key.shape[:3], dtype=torch.int8)
        tiles, counter, dq_sum, zeroed = plan.tiles.of_queries, None, None, None
        if tiles is None:
            dq_sum = lse.new_empty(plan.dq_sum_size)
            if plan.tiles.setup.ORDERED:
                counter = torch.empty(plan.counters, dtype=torch.int32, device=lse.device)
            else:
                zeroed = dq_sum
        plan.prepare(out, d_out, lse, d_lse, of_rows, counter, zeroed)
        of_keys = intervals_of(params, params.key_bounds)
        summed = () if plan.tiles.wide else (dq_sum, counter)
        plan.of_keys(
            query, key, value, d_out, of_rows, dk, dv,
            of_keys, params.alibi_slopes, params.seed, marked_keys, *summed,
        )  # fmt: skip
        if tiles is None:
            plan.of_queries(dq_sum, counter, marked_rows, dq)
        else:
            ranges = key_ranges(params, tiles, query.shape[2], key.shape[2])
            plan.of_queries(
                query, d_out, key, value, dq, key_runs(params, tiles.block_k), of_rows, ranges,
                marked_rows, params.alibi_slopes, params.seed,
            )  # fmt: skip
        if marked_rows is not None and marked_keys is not None:
            replace_marked(
                (marked_rows, marked_keys), Rows(of_rows[0], of_rows[1], None),
                d_out, d_lse, query, key, value, out, lse, params, dq, dk, dv,
            )  # fmt: skip
    return dq, dk, dv, None, gradient_of_sinks(params, lse, of_rows[1])


@dataclass(frozen=True, slots=True)
class _Plan:
    """``of_keys`` computes dK and dV, ``of_queries`` dQ, or what `rows` makes dQ of its sum."""

    tiles: BackwardTiles
    gradients: tuple[Layout, Layout, Layout]
    rows_shape: tuple[int, int, int, int]
    dq_sum_size: int
    counters: int
    prepare: Launch
    of_keys: Launch
    of_queries: Launch


def _plan(
    params: AttentionParams,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
) -> _Plan:
    batch, heads, query_length, head_dim = query.shape
    key_heads, key_length, value_dim = key.shape[1], key.shape[2], value.shape[3]
    tiles = backward_tiles(query, key, value, params)
    block_d, block_v = tiles.block_d, tiles.block_v
    block_q, block_k = tiles.setup.BLOCK_Q, tiles.setup.BLOCK_K
    key_tiles = triton.cdiv(key_length, block_k)
    padded = triton.cdiv(query_length, ROW_MULTIPLE) * ROW_MULTIPLE
    row_count = batch * heads * padded
    layouts = [output_layout(x, x.shape[3]) for x in (query, key, value)]
    d_query, d_key, d_value = [query.new_empty_strided(*x, device="meta") for x in layouts]

    def tma(x: Tensor, block_rows: int, columns: int) -> Tma:
        return tma_of(x, block_rows, columns, shared_layout((1, 1, block_rows, columns), x.dtype))

    rows_shape = (2, row_count // block_q, block_q)
    templates = {
        "q_desc": tma(query, block_q, block_d),
        "k_desc": tma(key, block_k, block_d),
        "v_desc": tma(value, block_k, block_v),
        "do_desc": tma(d_out, block_q, block_v),
        "dk_desc": tma(d_key, block_k, block_d),
        "dv_desc": tma(d_value, block_k, block_v),
        "rows_desc": Tma(
            rows_shape, (row_count, block_q, 1), (2, 1, block_q), gl.NVMMASharedLayout(0, 32, 3)
        ),
        "dq_desc": Tma(
            (row_count * block_d // 256, 256), (256, 1), (16, 256), gl.NVMMASharedLayout(0, 32, 2)
        )
        if tiles.setup.WITH_DQ
        else Tma(),
        "dropout": dropout_of(params),
        "slopes": PerHead(None, *broadcast_strides(params.alibi_slopes, batch, heads)),
    }  # fmt: skip
    plain = tiles.setup.PLAIN
    scalars = (
        Heads(heads, heads // key_heads), query_length, key_length, params.query_offset,
        params.window_left or 0, params.window_right or 0,
        broadcast_strides(params.query_start, batch, key_length)[0],
        batch * key_heads, min(tiles.together, batch * key_heads),
        params.scale * (LOG2E if plain else 1.0), params.softcap or 1.0,
    )  # fmt: skip
    of_keys = Launch(
        wide_keys_kernel if tiles.wide else gradients_kernel,
        (key_tiles * batch * key_heads,), templates, scalars,
        {"SETUP": tiles.setup}, Tiles(block_q, block_k, block_d, block_v, 4, 1),
        maxnreg=168,
    )  # fmt: skip
    small = Tiles(rows.ROWS, 0, block_d, block_v, 4, 1)
    prepare = Launch(
        rows.prepare_kernel,
        (row_count // rows.ROWS,),
        {
            "out": Operand(None, *out.stride()[:3]),
            "do": Operand(None, *d_out.stride()[:3]),
            "d_lse": Operand(None, *((0, 0, 0) if d_lse is None else d_lse.stride())),
        },
        (heads, query_length, row_count),
        {
            "PLAIN": plain, "DV": value_dim, "BLOCK_V": block_v, "BLOCK_D": block_d,
            "BLOCK_Q": block_q, "ROWS": rows.ROWS,
        },
        small,
    )  # fmt: skip
    if tiles.of_queries is None:
        of_queries = Launch(
            rows.convert_kernel,
            (triton.cdiv(query_length, rows.ROWS) * batch * heads,),
            {"dq": Operand(None, *d_query.stride()[:3])},
            (heads, query_length, params.scale),
            {
                "D": head_dim, "BLOCK_D": block_d, "BLOCK_Q": block_q, "ROWS": rows.ROWS,
                "ORDERED": tiles.setup.ORDERED,
            },
            small,
        )  # fmt: skip
    else:
        flags = forward_flags(query, key, params, tiles.of_queries, False)
        row_tiles = triton.cdiv(query_length, tiles.of_queries.block_q)
        keys = tiles.of_queries.block_k
        together = heads_together(key, value, heads // key_heads)
        of_queries = Launch(
            queries_kernel,
            (row_tiles * batch * heads,),
            templates
            | {
                "q_desc": tma(query, ROWS, block_d),
                "do_desc": tma(d_out, ROWS, block_v),
                "k_desc": tma(key, keys, block_d),
                "v_desc": tma(value, keys, block_v),
                "dq_desc": tma(d_query, ROWS, block_d),
                "run_desc": runs_tma(params, key_length, keys),
            },
            (
                row_count, params.scale, params.softcap or 1.0, heads, heads // key_heads,
                query_length, key_length, params.query_offset,
                params.window_left or 0, params.window_right or 0,
                row_tiles, batch * heads, min(together, batch * heads),
            ),
            {"FLAGS": flags},
            tiles.of_queries,
            maxnreg=168,
        )  # fmt: skip
    of_query, of_key, of_value = layouts
    return _Plan(
        tiles, (of_query, of_key, of_value), (2, batch, heads, padded), row_count * block_d,
        row_count // block_q, prepare, of_keys, of_queries,
    )  # fmt: skip
