"""The op on DTensors: each device computes its own batch rows or its own heads.

A tensor that is sharded in another way, such as along the sequence, is gathered first. Masks and
slopes that are plain tensors need a call inside of
``torch.distributed.tensor.experimental.implicit_replication()``.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from hf_flash_two.kernels.params import TENSORS, AttentionParams


def register() -> None:
    """Tell DTensor how the forward and the backward op may be sharded; may be called again."""
    register_sharding(torch.ops.hf_flash_two.flash_attn_fwd.default)(_shard_forward)
    register_sharding(torch.ops.hf_flash_two.flash_attn_bwd.default)(_shard_backward)


def _shard_forward(query, key, value, *settings):
    *params, _ = settings
    params = AttentionParams(*params)
    shardings = []
    for rows, keys in _splits(query, key, params.dropout_p):
        inputs = [rows, keys, keys, *_place_params(params, rows), None]
        max_logits = rows if params.max_logits else Replicate()
        shardings.append(([rows, rows, max_logits], inputs))
    return shardings


def _shard_backward(d_out, d_lse, query, key, value, out, lse, *settings):
    *params, _, need_d_bias = settings
    params = AttentionParams(*params)
    shardings = []
    for rows, keys in _splits(query, key, params.dropout_p):
        upstream = [None if tensor is None else rows for tensor in (d_out, d_lse)]
        inputs = [*upstream, rows, keys, keys, rows, rows, *_place_params(params, rows)]
        d_keys = _gradient(rows, keys)
        places = (
            _place(params.bias, rows) if need_d_bias else None,
            _place(params.sinks, rows),
        )
        d_extras = [Replicate() if place is None else _gradient(rows, place) for place in places]
        outputs = [rows, d_keys, d_keys, *d_extras]
        shardings.append((outputs, [*inputs, None, None]))
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
    return split if isinstance(split, Shard) and tensor.shape[split.dim] > 1 else Replicate()


def _place_params(params: AttentionParams, split: Placement) -> list[Placement | None]:
    """The placement of each field, None for fields that are no tensors."""
    splits: dict[str, Placement] = {name: split for name in TENSORS}
    if split.is_shard(1):
        splits |= {name: Replicate() for name in ("query_start", "query_stop", "key_bounds")}
    splits["seed"] = Replicate()
    return [
        _place(field, splits[name]) if name in splits else None
        for name, field in zip(AttentionParams._fields, params, strict=True)
    ]


def _gradient(split: Placement, placement: Placement) -> Placement:
    """The placement of a gradient: each device adds a part where only the queries are split."""
    return Partial() if split.is_shard() and placement.is_replicate() else placement
