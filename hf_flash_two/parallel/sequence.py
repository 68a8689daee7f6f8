"""Attention over a sequence that is sharded over the ranks of a mesh.

Each rank holds the queries, keys and values of its part of the sequence. Keys and values are
gathered from all ranks, queries stay: one collective forward, its reverse backward. A shard is one
run of the sequence ("contiguous"), or a run from its head and the mirrored run from its tail
("head_tail"), which gives every rank the same work under a causal mask.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hf_flash_two.attention import flash_attention
from hf_flash_two.masks import AttentionMask


def attend_over_mesh(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    mesh: DeviceMesh,
    layout: str,
    **settings,
) -> Tensor:
    """This rank's rows of `flash_attention` over the whole sequence.

    Args:
        query: [B, Hq, Tq / W, D] for W ranks; key, value: [B, Hk, Tk / W, D or Dv]; every rank's
            shard has the same length, an even one with "head_tail".
        mask: of the whole sequence, with its keys in their true order.
    """
    group = mesh.get_group()
    rank, ranks = mesh.get_local_rank(), mesh.size()
    rows, cols = query.shape[2], key.shape[2]
    if layout == "head_tail" and (rows % 2 or cols % 2):
        raise ValueError(
            f"layout: 'head_tail' needs shards of even length, got {rows} queries and {cols} keys"
        )
    key, value = (gather_sequence(x, group, ranks, layout) for x in (key, value))
    outs = []
    for part, start in _parts(rank, ranks, rows, layout):
        stop = start + part.stop - part.start
        part_mask = mask.slice_queries(start, stop, rows * ranks, cols * ranks)
        outs.append(flash_attention(query[:, :, part], key, value, mask=part_mask, **settings))
    return torch.cat(outs, dim=2)


def gather_sequence(x: Tensor, group, ranks: int, layout: str) -> Tensor:
    """[B, H, T / W, D] of every rank as [B, H, T, D] in the order of the sequence."""
    shards = _AllGather.apply(x, group)
    if layout == "contiguous":
        return torch.cat(shards.unbind(0), dim=2)
    halves = [shard.chunk(2, dim=2) for shard in shards.unbind(0)]
    heads, tails = [head for head, _ in halves], [tail for _, tail in halves]
    return torch.cat(heads + tails[::-1], dim=2)


def _parts(rank: int, ranks: int, rows: int, layout: str) -> list[tuple[slice, int]]:
    """(rows of the shard, where the first of them stands in the sequence)"""
    if layout == "contiguous":
        return [(slice(0, rows), rank * rows)]
    half = rows // 2
    return [(slice(0, half), rank * half), (slice(half, rows), (2 * ranks - 1 - rank) * half)]


class _AllGather(torch.autograd.Function):
    """[...] -> [W, ...]; a rank's gradient is the sum of what all ranks send back for its part."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, d_gathered: Tensor) -> tuple[Tensor, None]:
        d_gathered = d_gathered.contiguous()
        if dist.get_backend(ctx.group) == "gloo":
            # gloo has no reduce-scatter.
            dist.all_reduce(d_gathered, group=ctx.group)
            return d_gathered[dist.get_rank(ctx.group)], None
        d_x = torch.empty_like(d_gathered[0])
        dist.reduce_scatter_tensor(d_x, d_gathered, group=ctx.group)
        return d_x, None
