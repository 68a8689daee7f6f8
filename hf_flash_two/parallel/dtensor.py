"""The op on DTensors: each device computes its own batch rows or its own heads.

A tensor sharded in any other way, along the sequence for one, is gathered first. Masks and slopes
that are plain tensors need ``torch.distributed.tensor.experimental.implicit_replication()`` around
the call.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

_PROBLEM_TENSORS = 8
_DROPOUT_P = 5
"""Its place among the settings that follow the tensors of the problem."""


def register() -> None:
    """Tell DTensor how the forward and the backward op may be sharded. Idempotent."""
    register_sharding(torch.ops.hf_flash_two.flash_attn_fwd.default)(_shard_forward)
    register_sharding(torch.ops.hf_flash_two.flash_attn_bwd.default)(_shard_backward)


def _shard_forward(query, key, value, *arguments):
    problem, settings = arguments[:_PROBLEM_TENSORS], arguments[_PROBLEM_TENSORS:]
    shardings = []
    for rows, keys in _splits(query, key, settings[_DROPOUT_P]):
        inputs = [rows, keys, keys, *_place_problem(problem, rows), *[None] * len(settings)]
        shardings.append(([rows, rows], inputs))
    return shardings


def _shard_backward(d_out, d_lse, query, key, value, out, lse, *arguments):
    problem, settings = arguments[:_PROBLEM_TENSORS], arguments[_PROBLEM_TENSORS:]
    bias, sinks, need_d_bias = problem[4], problem[6], settings[-1]
    shardings = []
    for rows, keys in _splits(query, key, settings[_DROPOUT_P]):
        upstream = [None if tensor is None else rows for tensor in (d_out, d_lse)]
        inputs = [*upstream, rows, keys, keys, rows, rows, *_place_problem(problem, rows)]
        d_keys = _gradient(rows, keys)
        d_extras = [
            _gradient(rows, _place(tensor, rows)) if wanted else Replicate()
            for tensor, wanted in ((bias, need_d_bias), (sinks, sinks is not None))
        ]
        outputs = [rows, d_keys, d_keys, *d_extras]
        shardings.append((outputs, [*inputs, *[None] * len(settings)]))
    return shardings


def _splits(query, key, dropout_p: float) -> list[tuple[Placement, Placement]]:
    """How queries and keys may be split over one axis of the mesh."""
    whole, batch, heads = Replicate(), Shard(0), Shard(1)
    if dropout_p:
        # The bits are a function of the batch row and the head, which a shard would count from 0.
        return [(whole, whole)]
    splits = [(whole, whole), (batch, batch)]
    if key.shape[1] == 1:
        splits.append((heads, whole))
    elif key.shape[1] % query.mesh.size() == 0:
        # Only whole groups of query heads keep the key head that they share.
        splits.append((heads, heads))
    return splits


def _place(tensor, split: Placement) -> Placement | None:
    """The placement of a tensor that broadcasts to [B, H, ...]."""
    if tensor is None:
        return None
    return split if split.is_shard() and tensor.shape[split.dim] > 1 else Replicate()


def _place_problem(problem: tuple, split: Placement) -> list[Placement | None]:
    first_query, last_query, key_bounds, *per_head, seed = problem
    batch = Replicate() if split.is_shard(1) else split
    return [
        *(_place(tensor, batch) for tensor in (first_query, last_query, key_bounds)),
        *(_place(tensor, split) for tensor in per_head),
        _place(seed, Replicate()),
    ]


def _gradient(split: Placement, placement: Placement) -> Placement:
    """What stays whole where the queries are split gets a part of its gradient from each device."""
    return Partial() if split.is_shard() and placement.is_replicate() else placement
