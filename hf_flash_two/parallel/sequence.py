"""Attention over a sequence that is spread over the ranks of a mesh.

Each rank holds the queries, keys and values of its tokens. There are two exchanges, and both give
each mask the result of one device:

* "gather": queries stay, and each rank gets the keys and values that its queries may see, a few
  heads at a time. A mask is intervals of positions, and those of a shard ascend: the queries that
  see a key stay one run among the shard's, whatever the layout. So a rank makes one ordinary call.
  The backward gets the keys once more instead of keeping them, and sends their gradients back.
* "ulysses": each rank gets all tokens of some of the heads (Jacobs et al. 2023, arXiv:2309.14509).

A mesh of two dimensions does both: heads over the inner ranks, keys among the outer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.functional import pad

from hf_flash_two.attention import flash_attention, flash_attention_gradients
from hf_flash_two.invariance import is_batch_invariant
from hf_flash_two.kernels.params import statistics_dtype
from hf_flash_two.masks import AttentionMask
from hf_flash_two.parallel.exchange import Pending, Route, Run, to_heads, to_tokens
from hf_flash_two.parallel.layout import Layout
from hf_flash_two.tensor_cache import derive, is_symbolic

EXCHANGES = ("auto", "gather", "ulysses")
_GATHERED = 2**27
"""Bytes of keys and values that are gathered at a time, if one head does not take more."""
_FEW_RUNS = 2
"""So many calls for runs of queries are faster than one call that puts up with any order."""
_MOST_SENT = 0.7
"""Above this share of all keys, all are sent to all: one collective that copies nothing first."""


@dataclass(frozen=True)
class Spread:
    """How a sequence is spread over ranks.

    Attributes:
        mesh: of one dimension, or of two: heads are exchanged within the inner one.
        layout: of the sequence over all ranks of the mesh, the inner dimension counting fastest.
        exchange: "gather", "ulysses", or "auto": the one that sends less.
        tokens: what this rank holds of each row, if that is known beforehand.
        lengths: of the sequences before they were filled up, by the tokens that a rank holds.
        decisions: what was chosen, and why, by how often; filled by each call.
    """

    mesh: DeviceMesh
    layout: Layout
    exchange: str = "auto"
    tokens: int | None = None
    lengths: Mapping[int, int] = field(default_factory=dict, compare=False, repr=False)
    decisions: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def ranks(self) -> int:
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """This process's place among the ranks that the layout counts."""
        if self.mesh.ndim == 1:
            return self.mesh.get_local_rank()
        return self.mesh.get_local_rank(0) * self.mesh.size(1) + self.mesh.get_local_rank(1)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole of a tensor without gradient, from this rank's shard of it along ``dim``."""
        return self.layout.join(self.of_all(x.movedim(dim, 0)), 0).movedim(0, dim)

    def of_all(self, x: Tensor) -> Tensor:
        """``x`` of rank 0, then of rank 1, and so on, along the first dimension."""
        for at in reversed(range(self.mesh.ndim)):
            group = self.mesh.get_group(at)
            route = Route(group, (), (x.shape[0],) * self.mesh.size(at), everything=True)
            x = route.go(x).wait()
        return x

    def whole_mask(self, keep: Tensor) -> Tensor:
        """bool [B, T] of the whole sequence from this rank's part."""
        return self.gather(keep.to(torch.uint8), 1).bool()

    def note(self, decision: str) -> None:
        if not torch.compiler.is_compiling():
            self.decisions[decision] = self.decisions.get(decision, 0) + 1


def attend_over_mesh(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    spread: Spread,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    **settings,
) -> Any:
    """This rank's rows of `flash_attention` over the whole sequence.

    Args:
        query: [B, Hq, Tq / W, D] for W ranks; key, value: [B, Hk, Tk / W, D or Dv]; laid out as
            ``spread`` says.
        mask: the mask of the whole sequence, queries and keys in its order; the same on all ranks.
        bias: this rank's rows, [B or 1, Hq or 1, Tq / W or 1, Tk or 1], all keys in the order of
            the sequence. Its gradient, like that of sinks, is this rank's part of the sum over all.
        alibi_slopes, sinks: of all heads, [Hq] or [B or 1, Hq].
        return_max_logits: the same on all ranks.
        settings: other arguments of `flash_attention`. Dropout is not among them, since its bits
            count the queries and keys of one call.

    Returns:
        out [B, Hq, Tq / W, Dv], and on request lse [B, Hq, Tq / W] and max_logits [B, Hq] of all
        rows and heads, the same on all ranks.
    """
    if is_batch_invariant():
        raise NotImplementedError(
            "batch_invariant: not possible over a sharded sequence; the order of sums follows from "
            "the shards"
        )
    layout = spread.layout
    layout.check("queries", query.shape[2])
    layout.check("keys", key.shape[2])
    # All ranks must refuse what one refuses, or the others wait for it.
    lengths = query.shape[2] * spread.ranks, key.shape[2] * spread.ranks
    mask.check(query.shape[0], query.shape[1], *lengths)
    call = _Call(bias, alibi_slopes, sinks, return_max_logits, settings)
    ranks, reason = _heads_over(spread, query, key, mask, bias)
    spread.note(reason)
    shard = _Shard(layout, spread.mesh, spread.rank, lengths)
    if ranks == 1:
        out, lse, *largest = _over_keys(query, key, value, mask, shard, call)
    else:
        out, lse, *largest = _over_heads(query, key, value, mask, shard, ranks, call)
    # Not by a reduction: those of collectives may lose NaN.
    largest = [spread.of_all(x[None]).amax(0) for x in largest]
    wanted = [out, *([lse] if return_lse else []), *largest]
    return tuple(wanted) if len(wanted) > 1 else out


@dataclass(frozen=True)
class _Shard:
    """One rank's part among those that exchange keys.

    Attributes:
        lengths: queries and keys of the whole sequence.
    """

    layout: Layout
    mesh: DeviceMesh
    rank: int
    lengths: tuple[int, int]

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(0)

    def everything(self) -> Route:
        """All keys to all ranks."""
        tokens = (self.lengths[1] // self.layout.ranks,) * self.layout.ranks
        return Route(self.group, (), tokens, everything=True)


class _Call(NamedTuple):
    """What is per head, and the rest.

    Attributes:
        max_logits: whether they are wanted.
        settings: other arguments of `flash_attention`.
    """

    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    max_logits: bool
    settings: dict[str, Any]

    def of_heads(self, heads: slice) -> _Call:
        bias, alibi, sinks = (
            _of_heads(x, heads) for x in (self.bias, self.alibi_slopes, self.sinks)
        )
        return self._replace(bias=bias, alibi_slopes=alibi, sinks=sinks)


def _of_heads(x: Tensor | None, heads: slice) -> Tensor | None:
    """Of what is per head: [H], [B or 1, H] or [B or 1, H or 1, ...]."""
    if x is None:
        return None
    if x.dim() == 1:
        return x[heads]
    return x if x.dim() == 4 and x.shape[1] == 1 else x[:, heads]


# Which exchange


def _heads_over(
    spread: Spread, query: Tensor, key: Tensor, mask: AttentionMask, bias: Tensor | None
) -> tuple[int, str]:
    """Over how many ranks heads are spread, and why."""
    ranks, exchange = spread.ranks, spread.exchange
    if spread.mesh.ndim == 2:
        ranks, exchange = spread.mesh.size(1), "ulysses"
    obstacle = _why_no_heads(ranks, query.shape[1], key.shape[1], bias)
    if exchange == "ulysses":
        if obstacle is not None:
            raise ValueError(f"exchange: 'ulysses' is not possible, {obstacle}; use 'gather'")
        return ranks, f"ulysses: heads over {ranks} ranks, as asked for"
    if exchange == "gather":
        return 1, "gather: as asked for"
    if obstacle is not None:
        return 1, f"gather: {obstacle}"
    if mask.window_left is not None:
        return 1, "gather: a window reaches few keys of other ranks"
    heads, key_heads = query.shape[1], key.shape[1]
    # Rows sent by each rank, in units of a shard of one head: queries, keys, values and outputs.
    by_heads = 2 * (heads + max(key_heads, ranks)) * (ranks - 1) / ranks
    by_keys = 2 * key_heads * (ranks - 1)
    if by_heads < by_keys:
        return ranks, f"ulysses: sends {by_heads:.3g} rows a token, gather {by_keys}"
    return 1, f"gather: sends {by_keys} rows a token, ulysses {by_heads:.3g}"


def _why_no_heads(ranks: int, heads: int, key_heads: int, bias: Tensor | None) -> str | None:
    if heads % ranks:
        return f"{heads} heads cannot be spread over {ranks} ranks"
    if heads // key_heads % (ranks // gcd(key_heads, ranks)):
        return f"{key_heads} key heads cannot be shared out over {ranks} ranks"
    if bias is not None and bias.shape[2] > 1:
        return "the bias has rows of its own for each query"
    return None


# Heads over ranks


def _over_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    shard: _Shard,
    ranks: int,
    call: _Call,
) -> tuple[Tensor, ...]:
    inner = shard.mesh.ndim - 1
    group, index = shard.mesh.get_group(inner), shard.mesh.get_local_rank(inner)
    # The ranks among which heads are spread are one rank to those that exchange keys.
    outer = replace(shard, layout=shard.layout.merged(ranks), rank=shard.rank // ranks)
    within = _within(shard.layout, outer.rank, ranks)
    copies, count = ranks // gcd(key.shape[1], ranks), query.shape[1]
    query = to_heads(query, within, group)
    key, value = (
        to_heads(x.repeat_interleave(copies, 1) if copies > 1 else x, within, group)
        for x in (key, value)
    )
    heads = slice(index * query.shape[1], (index + 1) * query.shape[1])
    call = call.of_heads(heads)
    if mask.dense is not None and mask.dense.shape[1] > 1:
        mask = replace(mask, dense=mask.dense[:, heads])
    if outer.layout.ranks == 1:
        out, lse, *largest = flash_attention(
            query, key, value, mask=mask, bias=call.bias, alibi_slopes=call.alibi_slopes,
            sinks=call.sinks, return_lse=True, return_max_logits=call.max_logits, **call.settings,
        )  # fmt: skip
    else:
        out, lse, *largest = _over_keys(query, key, value, mask, outer, call)
    # Nothing is known here of other ranks' heads.
    around = heads.start, count - heads.stop
    largest = [pad(x, around, value=-math.inf) for x in largest]
    lse = to_tokens(lse[..., None], within, group)[..., 0]
    return to_tokens(out, within, group), lse, *largest


def _within(layout: Layout, group: int, ranks: int) -> Layout:
    """The layout of the tokens of one group of ranks, as if they were all there are."""
    owners = layout.owners[group * ranks : (group + 1) * ranks]
    place = {chunk: at for at, chunk in enumerate(sorted(sum(owners, ())))}
    return Layout(tuple(tuple(place[chunk] for chunk in chunks) for chunks in owners))


# Keys over ranks


class _View(NamedTuple):
    """What one rank sees.

    Attributes:
        parts: runs of its queries, each with the run of the keys that come which it attends to, and
            its mask over these.
        positions: int64 [keys], where these stand in the sequence, ascending; None: all are there.
        route: how they come.
        layout: of keys that come in the order of ranks.
        order: int64 [keys], which of those that come is the n-th; None: they ascend.
    """

    parts: tuple[tuple[slice, slice, AttentionMask], ...]
    positions: Tensor | None
    route: Route
    layout: Layout | None = None
    order: Tensor | None = None

    def put_in_order(self, keys: Tensor) -> Tensor:
        """[keys, ...] that have come, in the order of the sequence.

        Kernels skip what lies before and behind all keys that a tile of queries sees: the keys of
        a document must not lie at two places.
        """
        if self.layout is not None:
            return self.layout.join(keys, 0)
        return keys if self.order is None else keys.index_select(0, self.order)

    def as_they_came(self, keys: Tensor) -> Tensor:
        """The opposite."""
        if self.layout is not None:
            return self.layout.split_all(keys, 0)
        if self.order is None:
            return keys
        return torch.empty_like(keys).index_copy_(0, self.order, keys)


def _over_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    shard: _Shard,
    call: _Call,
) -> tuple[Tensor, ...]:
    view = _view(mask, shard, query.device, by_position=call.alibi_slopes is not None)
    bias = call.bias
    if bias is not None and bias.shape[3] > 1 and view.positions is not None:
        bias = bias.index_select(3, view.positions)
    settings = call.settings | {"alibi_slopes": call.alibi_slopes}
    # One dtype for all: rotary embeddings may upcast queries and keys.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if torch.compiler.is_compiling() and shard.mesh.ndim == 1:
        return _traced(query, key, value, bias, call, view, settings, shard.mesh)
    return _Gathered.apply(  # pyright: ignore[reportReturnType]
        query, key, value, bias, call.sinks, view, settings, call.max_logits
    )


def _traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    call: _Call,
    view: _View,
    settings: dict[str, Any],
    mesh: DeviceMesh,
) -> tuple[Tensor, ...]:
    """`_Gathered` for the compiler, which before PyTorch 2.11 does not trace its backward.

    All heads at once, and what is gathered is kept for the backward.
    """
    part = DTensor.from_local(torch.cat([key, value], 3), mesh, [Shard(2)], run_check=False)
    # `full_tensor` does this too, but the compiler of PyTorch 2.10 does not trace it.
    both = part.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if view.layout is not None:
        both = view.layout.join(both, 2)
    keys, values = both.split([key.shape[3], value.shape[3]], 3)
    whole = slice(None)
    return _attend(query, keys, values, bias, call.sinks, whole, view, settings, call.max_logits)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    heads: slice,
    view: _View,
    settings: dict[str, Any],
    max_logits: bool,
) -> tuple[Tensor, ...]:
    """out, lse and, if wanted, max_logits of some heads, whose keys and values have come."""
    parts = [
        flash_attention(
            query[:, heads, rows], keys[:, :, seen], values[:, :, seen], mask=mask,
            bias=_part(bias, heads, rows, seen), sinks=_of_heads(sinks, heads), return_lse=True,
            return_max_logits=max_logits, **_settings_of(settings, heads),
        )
        for rows, seen, mask in view.parts
    ]  # fmt: skip
    out, lse, *largest = zip(*parts, strict=True)
    return torch.cat(out, 2), torch.cat(lse, 2), *(torch.stack(x).amax(0) for x in largest)


def _view(mask: AttentionMask, shard: _Shard, device: torch.device, by_position: bool) -> _View:
    is_band = mask.intervals is None and mask.dense is None
    ends = is_band and mask.window_left is None and mask.window_right is not None
    if by_position or ends and len(shard.layout.owners[0]) <= _FEW_RUNS:
        return _by_position(mask, shard)
    if mask.dense is not None or is_symbolic():
        return _make_view(mask, shard, device)
    if mask.intervals is None:
        band = mask.window_left, mask.window_right, mask.resolve_offset(*shard.lengths)
        return _view_of_band(band, shard, device)
    key = ("view", mask.resolve_offset(*shard.lengths), shard)
    return derive(key, lambda: _make_view(mask, shard, device), *mask.intervals)


@lru_cache(maxsize=64)
def _view_of_band(
    band: tuple[int | None, int | None, int], shard: _Shard, device: torch.device
) -> _View:
    with torch.inference_mode(False):
        return _make_view(AttentionMask(*band), shard, device)


def _by_position(mask: AttentionMask, shard: _Shard) -> _View:
    """Whole runs of queries and all keys in order: for scores that depend on positions.

    A few of them are faster for causal masks, which kernels know as such, than one of intervals.
    """
    parts, at, (queries, keys) = [], 0, shard.lengths
    size = queries // shard.layout.chunks
    for chunk in shard.layout.owners[shard.rank]:
        part = mask.slice_queries(chunk * size, (chunk + 1) * size, queries, keys)
        stop = keys
        if mask.window_right is not None:
            last = part.resolve_offset(size, keys) + size - 1
            stop = min(keys, max(1, last + mask.window_right + 1))
            part = part.slice_keys(0, stop, size, keys)
        parts.append((slice(at, at + size), slice(0, stop), part))
        at += size
    return _View(tuple(parts), None, shard.everything(), shard.layout)


def _make_view(mask: AttentionMask, shard: _Shard, device: torch.device) -> _View:
    layout, (queries, keys) = shard.layout, shard.lengths
    offset = mask.resolve_offset(queries, keys)
    places = [layout.positions(rank, queries, device) for rank in range(layout.ranks)]
    runs = [(x.to(torch.int64).contiguous() - offset) for x in mask.to_intervals(keys, device)]
    seen = [tuple(torch.searchsorted(each, run) for run in runs) for each in places]
    needs = None if is_symbolic() else _needs(seen, layout)
    route, by_rank = shard.everything(), None if layout.in_order else layout
    positions = order = None
    if needs is not None:
        (route, wanted), by_rank = _route(needs, shard), None
        positions, order = torch.cat([torch.arange(*x, device=device) for x in wanted]).sort()
        order = None if wanted == sorted(wanted) else order
    start, stop = seen[shard.rank]
    dense = mask.dense
    if dense is not None and dense.shape[2] > 1:
        dense = dense.index_select(2, places[shard.rank])
    if positions is not None:
        start, stop = (x.index_select(1, positions) for x in (start, stop))
        if dense is not None and dense.shape[3] > 1:
            dense = dense.index_select(3, positions)
    part = AttentionMask.full()
    if replace(mask, dense=None).hides_nothing is False:
        part = AttentionMask.from_intervals(start, stop, query_offset=0)
    part = replace(part, dense=dense)
    return _View(((slice(None), slice(None), part),), positions, route, by_rank, order)


def _needs(seen: list[tuple[Tensor, ...]], layout: Layout) -> list[list[Run]] | None:
    """By rank and chunk the run of keys from the first to the last that the rank sees.

    None if they are most of all keys.

    Args:
        seen: by rank the run of its queries that sees each key: start and stop, [B or 1, Tk].
    """
    shown = torch.stack([(start < stop).any(0) for start, stop in seen])
    shown = shown.unflatten(1, (layout.chunks, -1)).to(torch.uint8)
    size = shown.shape[2]
    start, stop = shown.argmax(2), size - shown.flip(2).argmax(2)
    start, stop = (torch.where(shown.amax(2) > 0, x, 0) for x in (start, stop))
    base = torch.arange(layout.chunks, device=shown.device) * size
    found = torch.stack([start + base, stop + base], dim=2).tolist()
    sent = sum(
        stop - start
        for rank, chunks in enumerate(found)
        for chunk, (start, stop) in enumerate(chunks)
        if chunk not in layout.owners[rank]
    )
    most = _MOST_SENT * shown.numel() / layout.ranks * (layout.ranks - 1)
    return None if sent > most else found


def _route(needs: list[list[Run]], shard: _Shard) -> tuple[Route, list[Run]]:
    """How keys travel, and the runs of them that come, in the order in which they do."""
    layout, size = shard.layout, shard.lengths[1] // shard.layout.chunks
    # Where a position of the sequence lies in this rank's shard.
    lags = [(chunk, (chunk - at) * size) for at, chunk in enumerate(layout.owners[shard.rank])]
    sent = [
        tuple((chunks[at][0] - lag, chunks[at][1] - lag) for at, lag in lags) for chunks in needs
    ]
    wanted = [[needs[shard.rank][chunk] for chunk in chunks] for chunks in layout.owners]
    received = tuple(sum(stop - start for start, stop in runs) for runs in wanted)
    route = Route(shard.group, tuple(sent), received, everything=False)
    return route, sum(wanted, [])


class _Gathered(Function):
    """Attention to keys that are gathered, some heads at a time, forward and backward."""

    @staticmethod
    def forward(ctx, query, key, value, bias, sinks, view, settings, max_logits):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        results = [
            _attend(query, keys, values, bias, sinks, heads, view, settings, max_logits)
            for heads, keys, values in _groups(query, key, value, view)
        ]
        out, lse, *largest = (torch.cat(x, 1) for x in zip(*results, strict=True))
        ctx.save_for_backward(query, key, value, bias, sinks, out, lse)
        ctx.mark_non_differentiable(*largest)
        ctx.call = view, settings
        return out, lse, *largest

    @staticmethod
    def backward(ctx, d_out, d_lse, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors  # checkpointing gives them once
        with torch.no_grad():
            grads = _Gathered._gradients(ctx, d_out, d_lse, *saved)
        return (*_Once.apply(grads, d_out, d_lse, *saved), None, None, None)  # pyright: ignore[reportGeneralTypeIssues]

    @staticmethod
    def _gradients(
        ctx, d_out, d_lse, query, key, value, bias, sinks, out, lse
    ) -> tuple[Tensor | None, ...]:
        view, settings = ctx.call
        need_d_bias = bias is not None and ctx.needs_input_grad[3]
        d_query, statistics = torch.empty_like(query), statistics_dtype(key.dtype)
        d_bias: Any = torch.zeros_like(bias) if bias is not None and need_d_bias else None
        d_sinks: Any = None if sinks is None else torch.zeros_like(sinks)
        returning: list[Pending] = []
        for rows, keys, values in _groups(query, key, value, view):
            both: Tensor | None = None
            for part, seen, mask in view.parts:
                at = (slice(None), rows, part)
                upstream_out, upstream_lse = (None if x is None else x[at] for x in (d_out, d_lse))
                grads = flash_attention_gradients(
                    upstream_out, upstream_lse, query[at], keys[:, :, seen], values[:, :, seen],
                    out[at], lse[at], mask=mask, bias=_part(bias, rows, part, seen),
                    sinks=_of_heads(sinks, rows), need_d_bias=need_d_bias,
                    **_settings_of(settings, rows),
                )  # fmt: skip
                d_query[at] = grads[0]
                d_keys = torch.cat(grads[1:3], 3)
                if len(view.parts) == 1 and d_keys.shape[2] == keys.shape[2]:
                    both = d_keys
                else:
                    if both is None:
                        shape = (*keys.shape[:3], d_keys.shape[3])
                        both = d_keys.new_zeros(shape, dtype=statistics)
                    both[:, :, seen] += d_keys
                if d_bias is not None:
                    _part(d_bias, rows, part, seen).add_(grads[3])
                if sinks is not None:
                    d_sinks[..., rows].add_(grads[4])
            assert both is not None
            both = both.to(key.dtype).permute(2, 0, 1, 3)
            returning.append(view.route.back(view.as_they_came(both)))
        tokens, sizes = key.shape[2], [key.shape[3], value.shape[3]]
        sums = [view.route.add(parts.wait(), tokens) for parts in returning]
        d_key, d_value = torch.cat(sums, 2).permute(1, 2, 0, 3).to(key.dtype).split(sizes, 3)
        return d_query, d_key, d_value, d_bias, d_sinks


class _Once(Function):
    """``grads``, whose own gradient is refused."""

    @staticmethod
    def forward(ctx, grads, *made_from):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "exchange: 'gather' has no second derivatives (gradient penalties, create_graph=True); "
            "use 'ulysses', or one device"
        )


def _groups(
    query: Tensor, key: Tensor, value: Tensor, view: _View
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(query heads, their keys, their values); those of the next heads are on their way."""
    count, share = key.shape[1], query.shape[1] // key.shape[1]
    sizes = [key.shape[3], value.shape[3]]
    a_head = sum(view.route.received) * key.shape[0] * sum(sizes) * key.element_size()
    step = max(1, min(count, _GATHERED // max(1, a_head)))
    groups = [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def begin(heads: slice) -> Pending:
        both = torch.cat([key[:, heads], value[:, heads]], 3)
        return view.route.go(both.permute(2, 0, 1, 3))

    coming = begin(groups[0])
    for at, heads in enumerate(groups):
        both = coming.wait()
        if at + 1 < len(groups):
            coming = begin(groups[at + 1])
        keys, values = view.put_in_order(both).permute(1, 2, 0, 3).split(sizes, 3)
        yield slice(heads.start * share, heads.stop * share), keys, values


def _part(bias: Any, heads: slice, rows: slice, keys: slice) -> Any:
    """Of [B or 1, Hq or 1, Tq or 1, Tk or 1]."""
    if bias is None:
        return None
    whole = slice(None)
    bias = _of_heads(bias, heads)
    return bias[:, :, rows if bias.shape[2] > 1 else whole, keys if bias.shape[3] > 1 else whole]


def _settings_of(settings: dict[str, Any], heads: slice) -> dict[str, Any]:
    return settings | {"alibi_slopes": _of_heads(settings["alibi_slopes"], heads)}
