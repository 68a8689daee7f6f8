"""Attention over a sequence that is sharded over the ranks of a mesh.

Each rank holds the queries, keys and values of its part of the sequence. The forward gathers keys
and values from all ranks in one collective, and the backward sends their gradients back in another;
queries stay. A shard is one run of the sequence ("contiguous"), or a run from its head and the
mirrored run from its tail ("head_tail"), which gives each rank the same work under a causal mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

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
        query: [B, Hq, Tq / W, D] for W ranks; key, value: [B, Hk, Tk / W, D or Dv]. The shards of
            all ranks have one length, an even one with "head_tail".
        mask: the mask of the whole sequence, its keys in the order of the sequence.
    """
    ranks, rows, cols = mesh.size(), query.shape[2], key.shape[2]
    if layout == "head_tail" and (rows % 2 or cols % 2):
        raise ValueError(
            f"layout: expected shards of even length with 'head_tail', got {rows} queries and "
            f"{cols} keys"
        )
    # All ranks must refuse what one refuses, or the others wait for it.
    mask.check(query.shape[0], query.shape[1], rows * ranks, cols * ranks)
    both = gather_sequence(torch.cat([key, value], dim=3), mesh, layout)
    key, value = both.split([key.shape[3], value.shape[3]], dim=3)
    outs = []
    for part, start in _parts(mesh.get_local_rank(), ranks, rows, layout):
        stop = start + part.stop - part.start
        part_mask = mask.slice_queries(start, stop, rows * ranks, cols * ranks)
        outs.append(flash_attention(query[:, :, part], key, value, mask=part_mask, **settings))
    return torch.cat(outs, dim=2)


def gather_sequence(shard: Tensor, mesh: DeviceMesh, layout: str) -> Tensor:
    """[B, H, T / W, D] of every rank as [B, H, T, D] in the order of the sequence.

    The gradient of a shard is the sum of what all ranks send back for it.
    """
    sharded = DTensor.from_local(shard, mesh, [Shard(2)], run_check=False)
    # `full_tensor` does this too, but the compiler of PyTorch 2.10 does not trace it.
    gathered = sharded.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if layout == "contiguous":
        return gathered
    parts = gathered.chunk(2 * mesh.size(), dim=2)
    return torch.cat([*parts[::2], *parts[1::2][::-1]], dim=2)


def _parts(rank: int, ranks: int, rows: int, layout: str) -> list[tuple[slice, int]]:
    """(rows of the shard, where the first of them stands in the sequence)"""
    if layout == "contiguous":
        return [(slice(0, rows), rank * rows)]
    half = rows // 2
    return [(slice(0, half), rank * half), (slice(half, rows), (2 * ranks - 1 - rank) * half)]
