"""Who may attend to whom: one small immutable value, made once and shared by all layers.

Query i sits at position ``i + query_offset`` on the axis of the keys, key j at position j. A mask
says for each pair whether the query may attend to the key; True always means "may attend". It has
one of three forms, from the cheapest to the most expensive:

* a band: the key lies at most ``window_left`` positions behind the query, ``window_right`` ahead;
* intervals: for each key the one run of positions ``query_start <= position < query_stop`` that may
  see it, two int32 per key. Padding, packed documents, chunks, prefixes, bidirectional blocks and
  trees are all of this form, and the intersection of two such masks is one again;
* a dense boolean tensor, which kernels read tile by tile, for what has no such form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_flash_two.tensor_cache import all_values, derive, is_own, own

KEY_GROUP = 64
"""Keys are summarised in groups of this many, from which kernels read which tiles to visit."""

FAR = 2**30
"""Larger than every position, and small enough to add an offset to without leaving int32."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMask:
    """An immutable description of visibility; combine masks with ``&``.

    Attributes:
        window_left, window_right: the band, in positions; None is unbounded. Unset where intervals
            are present, because a band is folded into them.
        query_offset: position of query 0; None aligns the last query with the last key
            (bottom-right).
        query_start, query_stop: int32 [B or 1, Tk], the half-open run of positions that see each
            key.
        dense: bool, broadcastable to [B, H, Tq, Tk].

    With two queries and five keys, ``AttentionMask.causal()`` is
    ``1 1 1 1 0`` / ``1 1 1 1 1``: the queries are the last two positions.
    """

    window_left: int | None = None
    window_right: int | None = None
    query_offset: int | None = None
    query_start: Tensor | None = None
    query_stop: Tensor | None = None
    dense: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.query_offset, (float, Tensor)):
            raise ValueError(f"query_offset: expected an integer or None, got {self.query_offset}")
        if (self.query_start is None) != (self.query_stop is None):
            raise ValueError("query_start, query_stop: expected both or none, got one")
        band = self.window_left, self.window_right
        if self.query_start is not None and band != (None, None):
            raise ValueError(
                f"window_left, window_right: expected None beside intervals, got {band}; combine "
                "the two masks with &"
            )

    # Constructors

    @classmethod
    def full(cls) -> AttentionMask:
        """Every query sees every key."""
        return cls()

    @classmethod
    def causal(cls, window: int | None = None, *, query_offset: int | None = None) -> AttentionMask:
        """A query sees the keys up to its own position.

        Args:
            window: how many keys a query sees, itself included; None is no limit.
            query_offset: position of query 0 among the keys; None aligns bottom-right.
        """
        if window is not None and (isinstance(window, float) or window < 1):
            raise ValueError(
                f"window: expected an integer of at least 1 (the query itself), got {window}"
            )
        left = None if window is None else min(window - 1, FAR)
        return cls(window_left=left, window_right=0, query_offset=query_offset)

    @classmethod
    def window(
        cls, left: int | None, right: int | None, *, query_offset: int | None = None
    ) -> AttentionMask:
        """A query sees ``left`` keys behind its own position, its own, and ``right`` ahead."""
        for name, size in (("left", left), ("right", right)):
            if size is not None and (isinstance(size, float) or size < 0):
                raise ValueError(f"{name}: expected None or an integer of at least 0, got {size}")
        left, right = (None if size is None else min(size, FAR) for size in (left, right))
        return cls(window_left=left, window_right=right, query_offset=query_offset)

    @classmethod
    def from_intervals(
        cls, query_start: Tensor, query_stop: Tensor, *, query_offset: int | None = None
    ) -> AttentionMask:
        """Key j is seen from the positions ``query_start[b, j] <= position < query_stop[b, j]``.

        Args:
            query_start, query_stop: integers, [Tk] or [B or 1, Tk]; an empty run hides the key.
        """
        _check_tensor("query_start", query_start)
        _check_tensor("query_stop", query_stop)
        first, last = torch.broadcast_tensors(query_start, query_stop)
        if first.dim() == 1:
            first, last = first[None], last[None]
        if first.dim() != 2 or first.is_floating_point() or last.is_floating_point():
            raise ValueError(
                "query_start, query_stop: expected integers of shape [Tk] or [B, Tk], got "
                f"{query_start.dtype} {list(query_start.shape)} and "
                f"{query_stop.dtype} {list(query_stop.shape)}"
            )
        first, last = (x.clamp(-FAR, FAR).to(torch.int32).contiguous() for x in (first, last))
        return cls._of_runs(first, last, query_offset)

    @classmethod
    def _of_runs(cls, first: Tensor, last: Tensor, query_offset: int | None) -> AttentionMask:
        """`from_intervals` of int32 [B or 1, Tk] no larger than `FAR`.

        Each step of decoding comes here: every operation less is a kernel less to launch.
        """
        # One spelling of "nobody": it is neutral in the minima and maxima of `key_bounds`.
        nobody = first >= last
        start, stop = first.masked_fill(nobody, FAR), last.masked_fill(nobody, -FAR)
        return cls(query_offset=query_offset, query_start=own(start), query_stop=own(stop))

    @classmethod
    def from_padding(cls, keep: Tensor) -> AttentionMask:
        """No query sees the keys marked False or 0; padding may stand anywhere.

        Args:
            keep: [Tk] or [B, Tk], bool or 0/1 of any dtype. Other numbers are refused: to see that
                there are none, the check waits for a GPU, which a bool mask avoids.
        """
        _check_tensor("keep", keep, "bool or 0 and 1")
        if keep.dim() not in (1, 2):
            raise ValueError(f"keep: expected shape [Tk] or [B, Tk], got {list(keep.shape)}")
        check_zeros_and_ones("keep", keep)
        keep = keep if keep.dtype == torch.bool else keep != 0
        keep = keep if keep.dim() == 2 else keep[None]
        start = torch.full_like(keep, FAR, dtype=torch.int32).masked_fill(keep, -FAR)
        start = start.contiguous()
        return cls(query_start=own(start), query_stop=own(-start))

    @classmethod
    def from_documents(
        cls,
        cu_seqlens: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_cu_seqlens: Tensor | None = None,
        key_length: int | None = None,
        causal: bool = False,
        window: int | None = None,
        sink_tokens: int = 0,
    ) -> AttentionMask:
        """Several documents laid end to end; none sees another. Exactly one description is given.

        Args:
            cu_seqlens: [N + 1] boundaries 0, end of document 0, ...; keys past the last are
                padding. On a CPU those that do not start at 0 or go down are refused; on a GPU that
                would mean to wait for it.
            segment_ids: [T] or [B, T]; a document is a maximal run of equal ids.
            position_ids: [T] or [B, T]; a document starts wherever they do not go up by one.
            query_cu_seqlens: boundaries of the queries where they differ from those of the keys;
                only with ``cu_seqlens``. Causal is then bottom-right within each document.
            key_length: number of keys; None reads it from ``cu_seqlens``, which waits for a GPU,
                and torch.compile cannot trace it.
            causal: a query sees only keys up to its own position in its document.
            window: with ``causal``, how many keys a query sees, itself included.
            sink_tokens: with ``window``, so many keys at the start of each document are seen by all
                later queries of it as well (Xiao et al. 2023, arXiv:2309.17453).
        """
        given = [x is not None for x in (cu_seqlens, segment_ids, position_ids)]
        if sum(given) != 1:
            raise ValueError(
                "cu_seqlens, segment_ids, position_ids: expected exactly one of them, got "
                f"{sum(given)}"
            )
        if window is not None and not causal:
            raise ValueError(
                f"window: expected None without causal=True, got {window}; intersect with "
                "AttentionMask.window(left, right) instead"
            )
        if isinstance(sink_tokens, float) or sink_tokens < 0 or (sink_tokens and window is None):
            raise ValueError(
                "sink_tokens: expected an integer of at least 0, and 0 without a window, got "
                f"{sink_tokens}"
            )
        if cu_seqlens is None:
            if query_cu_seqlens is not None:
                raise ValueError("query_cu_seqlens: expected cu_seqlens along with it, got none")
            if segment_ids is None:
                assert position_ids is not None
                begin, end = _runs(_per_token("position_ids", position_ids), step=1)
            else:
                begin, end = _runs(_per_token("segment_ids", segment_ids))
            mask = cls.from_intervals(begin, end, query_offset=0)
            if not causal:
                return mask
            if window is None or not sink_tokens:
                return mask & cls.causal(window)
            key = torch.arange(end.shape[1], device=end.device)
            reach = torch.where(key - begin < sink_tokens, FAR, key + min(window, FAR))
            return mask & cls.from_intervals(key, reach)
        key_cu, query_cu = cu_seqlens, cu_seqlens if query_cu_seqlens is None else query_cu_seqlens
        _check_tensor("cu_seqlens", key_cu)
        _check_tensor("query_cu_seqlens", query_cu)
        if (
            key_cu.dim() != 1
            or key_cu.shape != query_cu.shape
            or key_cu.shape[0] < 2
            or key_cu.is_floating_point()
            or query_cu.is_floating_point()
        ):
            raise ValueError(
                "cu_seqlens, query_cu_seqlens: expected integers of one shape [N + 1], got "
                f"{key_cu.dtype} {list(key_cu.shape)} and {query_cu.dtype} {list(query_cu.shape)}"
            )
        key_cu, query_cu = key_cu.to(torch.int32), query_cu.to(torch.int32)
        _check_boundaries("cu_seqlens", key_cu)
        if query_cu_seqlens is not None:
            _check_boundaries("query_cu_seqlens", query_cu)
        if key_length is None:
            try:
                key_length = int(key_cu[-1])
            except RuntimeError as error:
                raise ValueError(
                    "key_length: expected the number of keys, got None; cu_seqlens, which gives it "
                    "otherwise, cannot be read under vmap or without data"
                ) from error
        key = torch.arange(key_length, device=key_cu.device, dtype=torch.int32)
        # Under vmap with the axes of the boundaries: searchsorted warns of expanded tensors.
        key = key + torch.zeros_like(key_cu[:1])
        document = torch.searchsorted(key_cu, key, right=True) - 1
        inside = document < key_cu.shape[0] - 1
        document = document.clamp(max=key_cu.shape[0] - 2)
        first, last = query_cu[document], query_cu[document + 1]
        if causal:
            # The query that stands at this key's own place, counted from the ends of the document.
            own = last - (key_cu[document + 1] - key)
            first = torch.maximum(first, own)
            if window is not None:
                reach = own + min(window, FAR)
                if sink_tokens:
                    reach = torch.where(key - key_cu[document] < sink_tokens, last, reach)
                last = torch.minimum(last, reach)
        last = torch.where(inside, last, first)
        return cls.from_intervals(first, last, query_offset=0)

    @classmethod
    def from_prefix(cls, prefix_lengths: Tensor, key_length: int) -> AttentionMask:
        """Causal, and every query sees the first ``prefix_lengths[b]`` keys (a prefix LM)."""
        _check_integers("prefix_lengths", prefix_lengths)
        key = torch.arange(key_length, device=prefix_lengths.device)
        first = torch.where(key < prefix_lengths.reshape(-1, 1), -FAR, key)
        return cls.from_intervals(first, torch.full_like(first, FAR))

    @classmethod
    def from_blocks(cls, block_ids: Tensor) -> AttentionMask:
        """Causal, and the tokens of one block see each other both ways (image tokens).

        Args:
            block_ids: [T] or [B, T]; a block is a maximal run of one id, negative ids are no block.
        """
        ids = _per_token("block_ids", block_ids)
        begin, _ = _runs(ids)
        key = torch.arange(ids.shape[1], device=ids.device)
        first = torch.where(ids >= 0, begin, key)
        return cls.from_intervals(first, torch.full_like(first, FAR))

    @classmethod
    def from_block_diffusion(cls, block_ids: Tensor, noisy: Tensor) -> AttentionMask:
        """Each block of a text twice, with noise and then clean: noisy, clean, noisy, clean, ...

        A noisy token sees its own noisy block, both ways, and the clean blocks before it. A clean
        token sees its own clean block, both ways, and the clean blocks before it. A block may also
        come clean alone, as that of a prompt.

        Args:
            block_ids: [T] or [B, T], integers that never go down; both copies of a block share one.
            noisy: bool of the same shape; within a block the noisy tokens come first.

        Raises:
            ValueError: tokens are in another order, as that of all noisy ones before all clean
                ones. To see it, the check waits for a GPU; ids on the CPU avoid that.

        Source: Arriola et al. 2025, arXiv:2503.09573, whose order is all noisy, then all clean.
        """
        ids = _per_token("block_ids", block_ids)
        _check_integers("block_ids", ids)
        _check_tensor("noisy", noisy, "bool")
        if noisy.dtype != torch.bool or noisy.shape != block_ids.shape:
            raise ValueError(
                f"noisy: expected bool of shape {list(block_ids.shape)}, as block_ids, got "
                f"{noisy.dtype} {list(noisy.shape)}"
            )
        noisy = noisy.reshape(ids.shape)
        order = 2 * ids.to(torch.int64) + ~noisy
        if (values := all_values(order)) is not None and (values.diff() < 0).any():
            raise ValueError(
                "block_ids, noisy: expected each block's noisy tokens and then its clean ones, "
                "block after block, got another order; sort the tokens by 2 * block_ids + ~noisy"
            )
        begin, end = _runs(order)
        return cls.from_intervals(begin, torch.where(noisy, end, FAR), query_offset=0)

    @classmethod
    def from_tree(
        cls,
        segment_lengths: Sequence[int] | Tensor,
        parents: Sequence[int] | Tensor,
        *,
        device=None,
    ) -> AttentionMask:
        """Segments that share prefixes; a token sees its own segment so far and all its ancestors.

        Args:
            segment_lengths: [S] tokens in each segment, the segments in depth-first order.
            parents: [S] index of each segment's parent, -1 for a root.
        """
        segment_lengths, parents = (
            x.tolist() if isinstance(x, Tensor) else x for x in (segment_lengths, parents)
        )
        if any(isinstance(length, float) or length < 0 for length in segment_lengths):
            raise ValueError(
                f"segment_lengths: expected integers of at least 0, got {list(segment_lengths)}"
            )
        if len(segment_lengths) != len(parents):
            raise ValueError(
                f"parents: expected {len(segment_lengths)} entries, got {len(parents)}"
            )
        ends, total, path = [0] * len(parents), 0, []
        for node, parent in enumerate(parents):
            while path and path[-1] != parent:
                ends[path.pop()] = total
            if parent != -1 and not path:
                raise ValueError(
                    f"parents: expected segments in depth-first order, got segment {node} neither "
                    f"right after its parent {parent} nor after that one's descendants"
                )
            path.append(node)
            total += segment_lengths[node]
        for node in path:
            ends[node] = total
        repeats = torch.tensor(segment_lengths, device=device)
        last = torch.tensor(ends, device=device).repeat_interleave(repeats)
        return cls.from_intervals(torch.arange(total, device=device), last, query_offset=0)

    @classmethod
    def chunked(
        cls, size: int, key_length: int, *, starts: Tensor | None = None, device=None
    ) -> AttentionMask:
        """Causal within chunks of ``size`` positions; a chunk sees no other.

        Args:
            starts: [B] position where chunk 0 begins (the left padding); 0 if None.
        """
        if isinstance(size, float) or size < 1:
            raise ValueError(f"size: expected an integer of at least 1, got {size}")
        if starts is not None:
            _check_integers("starts", starts)
            device = starts.device
        key = torch.arange(key_length, device=device)[None]
        start = 0 if starts is None else starts.reshape(-1, 1)
        end = (torch.div(key - start, size, rounding_mode="floor") + 1) * size + start
        return cls.from_intervals(key.expand_as(end), end)

    @classmethod
    def from_dense(cls, visible: Tensor) -> AttentionMask:
        """A bool tensor broadcastable to [B, H, Tq, Tk]; it takes O(Tq * Tk) memory itself."""
        _check_tensor("visible", visible, "bool")
        if visible.dtype != torch.bool:
            raise ValueError(
                f"visible: expected bool (True may attend), got {visible.dtype}; "
                "pass a float mask that is added to scores as `bias` of flash_attention"
            )
        if visible.dim() > 4:
            raise ValueError(f"visible: expected at most 4 dimensions, got {visible.dim()}")
        return cls(dense=visible[(None,) * (4 - visible.dim())])

    # Combining and moving

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Visible in both masks. An explicit query offset takes precedence over bottom-right."""
        if not isinstance(other, AttentionMask):
            return NotImplemented
        offset = self.query_offset if other.query_offset is None else other.query_offset
        if self.query_offset is not None and offset != self.query_offset:
            raise ValueError(
                "query_offset: expected the same in both masks, got "
                f"{self.query_offset} and {offset}"
            )
        dense = self.dense if other.dense is None else other.dense
        if self.dense is not None and other.dense is not None:
            dense = self.dense & other.dense
        left = _tighter(self.window_left, other.window_left)
        right = _tighter(self.window_right, other.window_right)
        runs = [m.intervals for m in (self, other) if m.intervals is not None]
        if not runs:
            return AttentionMask(left, right, offset, dense=dense)
        (first, last), *more = runs
        if not more and left is None and right is None:
            return AttentionMask(None, None, offset, first, last, dense)
        for other_first, other_last in more:
            if first.shape[1] != other_first.shape[1]:
                raise ValueError(
                    "mask & mask: expected the same number of keys in both, got "
                    f"{first.shape[1]} and {other_first.shape[1]}"
                )
            first, last = torch.maximum(first, other_first), torch.minimum(last, other_last)
        band_first, band_last = _of_band(left, right, first.shape[1], first.device)
        first = first if band_first is None else torch.maximum(first, band_first)
        last = last if band_last is None else torch.minimum(last, band_last)
        mask = AttentionMask._of_runs(first, last, offset)
        return mask if dense is None else replace(mask, dense=dense)

    def to(self, device: torch.device | str, *_, **__) -> AttentionMask:
        """The same mask with its tensors on ``device``."""
        return self.each_tensor(lambda tensor: tensor.to(device))

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> AttentionMask:
        """The mask with ``change`` applied to each of its tensors."""
        changed = {}
        for name in ("query_start", "query_stop", "dense"):
            tensor = getattr(self, name)
            if tensor is not None:
                changed[name] = new = change(tensor)
                if new is not tensor and is_own(tensor):
                    own(new)
        return replace(self, **changed) if changed else self

    def slice_queries(
        self, start: int, stop: int, query_length: int, key_length: int
    ) -> AttentionMask:
        """The mask of queries ``start`` to ``stop`` of ``query_length``, against the same keys."""
        _check_slice(start, stop, "query_length", query_length)
        dense = self.dense
        if dense is not None and dense.shape[2] > 1:
            dense = dense[:, :, start:stop]
        offset = self.resolve_offset(query_length, key_length) + start
        return replace(self, query_offset=offset, dense=dense)

    def slice_keys(
        self, start: int, stop: int, query_length: int, key_length: int
    ) -> AttentionMask:
        """The mask of the same queries against keys ``start`` to ``stop`` of ``key_length``."""
        _check_slice(start, stop, "key_length", key_length)
        offset = self.resolve_offset(query_length, key_length) - start
        dense = self.dense
        if dense is not None and dense.shape[3] > 1:
            dense = dense[..., start:stop]
        if self.intervals is None:
            return replace(self, query_offset=offset, dense=dense)
        first, last = (run[:, start:stop] - start for run in self.intervals)
        mask = AttentionMask.from_intervals(first, last, query_offset=offset)
        return mask if dense is None else replace(mask, dense=dense)

    # Questions

    def __repr__(self) -> str:
        parts = []
        if self.window_right == 0:
            parts.append("causal")
            if self.window_left is not None:
                parts.append(f"window={self.window_left + 1}")
        elif self.window_left is not None or self.window_right is not None:
            parts.append(f"window left={self.window_left} right={self.window_right}")
        if self.query_start is not None:
            batch, keys = self.query_start.shape
            on = self.query_start.device
            parts.append(f"intervals over {keys} keys, batch {batch}, on {on}")
        if self.dense is not None:
            parts.append(f"dense {list(self.dense.shape)} on {self.dense.device}")
        if self.query_offset is not None:
            parts.append(f"query_offset={self.query_offset}")
        return f"AttentionMask({', '.join(parts or ['full'])})"

    @property
    def intervals(self) -> tuple[Tensor, Tensor] | None:
        """``query_start`` and ``query_stop``, or None without them."""
        if self.query_start is None or self.query_stop is None:
            return None
        return self.query_start, self.query_stop

    def tensors(self) -> list[Tensor]:
        parts = (self.query_start, self.query_stop, self.dense)
        return [part for part in parts if part is not None]

    def to_intervals(self, key_length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """``query_start`` and ``query_stop`` of a mask that may be a band, [B or 1, Tk].

        The dense part is left out.
        """
        if self.query_start is not None and self.query_stop is not None:
            return self.query_start, self.query_stop
        first, last = _of_band(self.window_left, self.window_right, key_length, device)
        everyone = torch.full((1, key_length), FAR, dtype=torch.int32, device=device)
        return -everyone if first is None else first[None], everyone if last is None else last[None]

    @property
    def hides_nothing(self) -> bool:
        parts = (self.window_left, self.window_right, self.query_start, self.dense)
        return all(part is None for part in parts)

    def resolve_offset(self, query_length: int, key_length: int) -> int:
        """Position of query 0 among ``key_length`` keys."""
        return key_length - query_length if self.query_offset is None else self.query_offset

    def check(self, batch: int, heads: int, query_length: int, key_length: int) -> None:
        """Raise a ValueError unless the mask fits attention of this shape."""
        if self.query_start is not None:
            got, keys = self.query_start.shape
            if keys != key_length or got not in (1, batch):
                raise ValueError(
                    f"mask: expected {key_length} keys and 1 or {batch} batch rows, as in key, "
                    f"got {keys} keys and {got} batch rows"
                )
        if self.dense is not None:
            shape = (batch, heads, query_length, key_length)
            if any(got not in (1, want) for got, want in zip(self.dense.shape, shape, strict=True)):
                raise ValueError(
                    "mask: expected a tensor broadcastable to [batch, heads, queries, keys] = "
                    f"{list(shape)}, got {list(self.dense.shape)}"
                )

    def to_dense(self, query_length: int, key_length: int, device=None) -> Tensor:
        """bool [B or 1, H or 1, Tq, Tk], in O(Tq * Tk) memory: for small sizes and debugging."""
        for tensor in (self.query_start, self.dense):
            device = tensor.device if tensor is not None else device
        offset = self.resolve_offset(query_length, key_length)
        position = torch.arange(query_length, device=device)[:, None] + offset
        key = torch.arange(key_length, device=device)
        visible = torch.ones(1, 1, query_length, key_length, dtype=torch.bool, device=device)
        if self.window_left is not None:
            visible = visible & (position - key <= self.window_left)
        if self.window_right is not None:
            visible = visible & (key - position <= self.window_right)
        if self.intervals is not None:
            first, last = (run[:, None, None] for run in self.intervals)
            visible = visible & (first <= position) & (position < last)
        return visible if self.dense is None else visible & self.dense

    def key_bounds(self) -> Tensor | None:
        """int32 [B or 1, ceil(Tk / KEY_GROUP), 4], or None without intervals.

        For each group of keys the smallest and largest ``query_start``, then the smallest and
        largest ``query_stop``: a tile of queries at positions [p, q) meets the group only if
        ``min_start < q and max_stop > p`` and needs no masking if
        ``max_start <= p and q <= min_stop``.
        """
        if self.intervals is None:
            return None
        first, last = self.intervals
        return derive("bounds", lambda: own(_group_bounds(first, last)), first, last)


def _of_band(
    left: int | None, right: int | None, keys: int, device: torch.device | str
) -> tuple[Tensor | None, Tensor | None]:
    """``query_start`` and ``query_stop`` of a band, int32 [keys]; None where it has no end."""
    if left is None and right is None:
        return None, None
    key = torch.arange(keys, device=device, dtype=torch.int32)
    first = None if right is None else key if right == 0 else key - right
    return first, None if left is None else key + (left + 1)


def _tighter(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else min(a, b)


def _check_tensor(name: str, given: Tensor, of: str = "integers") -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"{name}: expected a tensor of {of}, got {type(given).__name__}")


def _check_integers(name: str, given: Tensor) -> None:
    _check_tensor(name, given)
    if given.is_floating_point():
        raise ValueError(f"{name}: expected a tensor of integers, got {given.dtype}")


def _check_boundaries(name: str, boundaries: Tensor) -> None:
    """Refuse those that do not start at 0 or go down, where nothing waits for their values."""
    if boundaries.device.type != "cpu" or (values := all_values(boundaries)) is None:
        return
    wrong = all_values((boundaries[0] != 0) | (boundaries.diff() < 0).any())
    if wrong is not None and wrong.any():
        raise ValueError(
            f"{name}: expected 0, then boundaries that never go down, got {values.tolist()}; "
            "of lengths they are torch.tensor([0, *lengths]).cumsum(0)"
        )


def _check_slice(start: int, stop: int, name: str, length: int) -> None:
    if not 0 <= start <= stop <= length:
        raise ValueError(
            f"start, stop: expected 0 <= start <= stop <= {name} = {length}, got {start} and {stop}"
        )


def _per_token(name: str, ids: Tensor) -> Tensor:
    _check_tensor(name, ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"{name}: expected shape [T] or [B, T], got {list(ids.shape)}")
    return ids[None] if ids.dim() == 1 else ids


def _runs(ids: Tensor, step: int = 0) -> tuple[Tensor, Tensor]:
    """Of each element's run the first index and the one past the last.

    In a run, ids go up by ``step``.
    """
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = ids[:, 1:] != ids[:, :-1] + step
    # Not written in place: under vmap ids may have an axis that the index has not.
    first, length = index[:, :1], ids.shape[1]
    begin = torch.cat([first, torch.where(starts, index[:, 1:], 0)], dim=1).cummax(1).values
    next_start = torch.cat([torch.where(starts, index[:, 1:], length), first + length], dim=1)
    return begin, next_start.flip(1).cummin(1).values.flip(1)


def check_zeros_and_ones(name: str, mask: Tensor) -> None:
    """Refuse a mask with other values: one that is added to scores, or that numbers documents.

    On a GPU the check waits for the device; a bool mask is not checked.
    """
    if mask.dtype == torch.bool or (values := all_values(mask)) is None:
        return
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(
            f"{name}: expected 0 and 1 (1 may be seen), got {mask.dtype} with other values; pass "
            "what is added to scores as `bias` of flash_attention, and documents by "
            "AttentionMask.from_documents"
        )


def _group_bounds(first: Tensor, last: Tensor) -> Tensor:
    keys = first.shape[1]
    groups = (keys + KEY_GROUP - 1) // KEY_GROUP
    # The last key again and again: a repeated value changes neither minimum nor maximum.
    if torch.compiler.is_compiling():
        # torch.compile specialises on a size of 1: make one group more, which the op drops. How
        # many keys are missing would be guarded.
        start = torch.arange(groups + 1, device=first.device)[:, None] * KEY_GROUP
        index = (start + torch.arange(KEY_GROUP, device=first.device)).clamp(max=keys - 1)
        first, last = first[:, index], last[:, index]
    else:
        missing = groups * KEY_GROUP - keys
        first, last = (
            torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (groups, KEY_GROUP))
            for x in (first, last)
        )
    return torch.stack([first.amin(-1), first.amax(-1), last.amin(-1), last.amax(-1)], dim=-1)
