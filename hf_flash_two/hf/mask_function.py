"""Transformers' mask functions -> `AttentionMask`, once per forward.

Transformers describes a mask as a function of (batch, head, query, key) put together from a few
closures, plus the 2-D attention mask. Known closures become a band or visibility intervals in O(N).
Any other function is evaluated tile by tile, and becomes intervals if each key is seen by one run
of queries, a dense mask otherwise. No conversion approximates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import and_

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_flash_two.documents import without_dropped
from hf_flash_two.hf import branches, compat, families, shard
from hf_flash_two.hf.branches import Branches
from hf_flash_two.hf.mask_proxy import MaskProxy
from hf_flash_two.hf.packing import demand, documents_of_mask, positions_within
from hf_flash_two.hf.tensor_masks import from_tiles
from hf_flash_two.invariance import is_batch_invariant
from hf_flash_two.masks import FAR, AttentionMask
from hf_flash_two.tensor_cache import is_symbolic

_FORWARD = frozenset({"blockwise_overlay", ""})
"""Builders of mask functions beside "causal" that may show a later token."""


@dataclass(frozen=True)
class _Axes:
    """Where mask functions see query i, at ``i + q_offset``, and key j, at ``j + kv_offset``.

    `AttentionMask` counts from key 0 instead.
    """

    kv_length: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device | str

    @property
    def of_queries(self) -> int | Tensor:
        """Where query 0 stands among the keys."""
        return self.q_offset - self.kv_offset if self.kv_offset else self.q_offset

    def of_keys(self, x: Tensor) -> Tensor:
        """[B, L] over positions -> [B, Tk] over keys."""
        return x[:, self.kv_offset : self.kv_offset + self.kv_length]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = compat.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    config=None,
    device: torch.device | str = "cpu",
    **_,
) -> MaskProxy | Tensor | None:
    """The mask of all layers of one kind, as `transformers.AttentionMaskInterface` asks for it.

    Args:
        q_offset: position of query 0; a tensor [] under a static cache, which counts on in it, so
            nothing may keep it.
        attention_mask: None or [B, L], nonzero where the key may be seen; L may exceed
            ``kv_offset + kv_length`` or, with a static cache, fall short of it. Rows beyond the
            batch are ignored: MusicGen has one for each code book.
        allow_is_bidirectional_skip: None may stand for "all see all"; used only where a family
            computes attention by hand, and would add a mask of zeros.
        use_vmap: ``mask_function`` must be called with scalars.

    Returns:
        A `MaskProxy`; a plain tensor for the few families that insist on one (`families`).
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected 2 dimensions [batch, keys], or 4 for a ready mask, got "
            f"{list(attention_mask.shape)}"
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:batch_size]
        if attention_mask.shape[0] != batch_size:
            raise ValueError(
                f"attention_mask: expected {batch_size} batch rows, as in input_ids, got "
                f"{attention_mask.shape[0]}"
            )
    own_queries, spread = q_length, shard.current()
    if spread is not None:
        q_length, kv_length, attention_mask, mask_function = shard.whole_arguments(
            spread, q_length, kv_length, q_offset, kv_offset, attention_mask, mask_function
        )
    dropped, lead = kv_offset, 0
    if is_batch_invariant():
        # Where a document starts decides, also if the cache has dropped its first keys.
        kv_length, kv_offset = kv_offset + kv_length, 0
    axes = _Axes(kv_length, q_offset, kv_offset, device)
    keep = _padding(attention_mask, axes, q_length)
    kinds = _kinds(mask_function)
    causal = "causal" in kinds
    tree = branches.of_mask(
        batch_size, q_length, kv_length, q_offset, attention_mask, causal=causal
    )
    documents = positions = None
    if tree is not None:
        packed, mask = True, _of_branches(mask_function, tree)
        mask_function = _along(mask_function, tree)
    else:
        documents, packed = documents_of_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset,
            causal=causal, in_function="packed_sequence_mask_function" in kinds,
        )  # fmt: skip
        positions = None if documents is None else positions_within(documents, attention_mask)
        mask = _convert(mask_function, axes, positions)
    if mask is not None:
        if documents is not None:
            apart = AttentionMask.from_documents(segment_ids=documents)
            mask = mask & replace(apart, query_offset=None)
        counted = isinstance(q_offset, Tensor)
        one = q_length == 1 and (counted or keep is not None and not is_symbolic())
        if one and not is_batch_invariant():
            if mask.window_left is not None or mask.intervals is not None:
                lead = None
            mask = _of_one_query(mask, keep, axes)
        else:
            mask = _at_queries(mask, q_length, axes)
            mask = mask if keep is None else mask & AttentionMask.from_padding(keep)
    else:
        if documents is not None and positions is not None:
            mask_function = _within(mask_function, documents, positions, batch_size)

        def visible(start: int, stop: int) -> Tensor:
            compat.require("masks")
            return compat.masking_utils.sdpa_mask(
                batch_size=batch_size,
                q_length=stop - start,
                kv_length=kv_length,
                q_offset=q_offset + start,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
                use_vmap=use_vmap,
                device=device,
            )

        mask = from_tiles(visible, q_length, batch_size * kv_length)
        if tree is not None and mask.dense is not None and kinds.isdisjoint(_FORWARD):
            mask = mask & tree.mask()  # whose intervals tell which tiles not to visit
    if spread is not None:
        mask = shard.without_filling(spread, mask, (q_length, kv_length), device)
    if kv_offset:
        lead = None
    elif dropped:
        mask, lead = without_dropped(mask, dropped, q_length, kv_length)
    hand_written = config is not None and families.is_hand_written(config)
    family = getattr(config, "model_type", None)
    # Through the interface it is not left out: layers without one may take themselves for causal.
    adds_it = hand_written or family in families.WANTS_TENSOR
    if allow_is_bidirectional_skip and adds_it and mask.hides_nothing:
        return None
    shape = (batch_size, 1, own_queries, kv_length - dropped + kv_offset)
    proxy = MaskProxy(
        mask,
        shape,
        device,
        dtype if hand_written or family in families.READS_ADDITIVE else torch.bool,
        causal=causal,
        packed=packed,
        padding=attention_mask,
        spread=spread,
        lead=lead,
    )
    return proxy.as_additive(dtype) if family in families.WANTS_TENSOR else proxy


def _padding(attention_mask: Tensor | None, axes: _Axes, q_length: int) -> Tensor | None:
    """[B, Tk], nonzero for the keys that are not hidden; None if none is."""
    if attention_mask is None:
        return None
    keep = axes.of_keys(attention_mask)
    missing = axes.kv_length - keep.shape[1]
    keep = pad(keep, (0, missing)) if missing > 0 else keep
    if q_length != axes.kv_length and (isinstance(axes.q_offset, Tensor) or axes.kv_offset):
        # Intervals in any case, or few keys. Another kind of mask once the padding has left the
        # window would be compiled anew, and to ask would make the device wait.
        return keep
    return keep if is_symbolic() or not keep.all() else None


def _within(function: Callable, documents: Tensor, positions: Tensor, batch: int) -> Callable:
    """``function`` within each document."""
    documents, positions = (x.expand(batch, -1) for x in (documents, positions))
    inside = _at_positions(function, positions)
    return lambda b, h, q, k: inside(b, h, q, k) & (documents[b, q] == documents[b, k])


def _along(function: Callable, tree: Branches) -> Callable:
    """``function`` along each branch."""
    inside = _at_positions(function, tree.positions)
    return lambda b, h, q, k: inside(b, h, q, k) & tree.related(b, q, k)


def _at_positions(function: Callable, positions: Tensor) -> Callable:
    """``function`` of positions [B, T]; blocks and padding are looked up by place in the row."""
    builder, arguments = compat.describe(function)
    if builder in ("and_masks", "or_masks"):
        parts = (_at_positions(part, positions) for part in arguments[0])
        return getattr(compat.masking_utils, builder)(*parts)
    if builder == "remap_positions_for_packed_sequence":
        return _at_positions(arguments[0], positions)
    if builder == "packed_sequence_mask_function":
        return compat.masking_utils.bidirectional_mask_function
    if builder in ("blockwise_overlay", "padding_mask_function"):
        return function
    return lambda b, h, q, k: function(b, h, positions[b, q], positions[b, k])


def _of_branches(function: Callable, tree: Branches) -> AttentionMask | None:
    """The mask of the branches if ``function`` hides no token before another on its branch."""
    builder, arguments = compat.describe(function)
    if builder == "and_masks":
        parts = [_of_branches(part, tree) for part in arguments[0]]
        return None if None in parts else parts[0]
    if builder == "remap_positions_for_packed_sequence":
        return _of_branches(arguments[0], tree)
    hides_nothing = builder in ("causal", "bidirectional", "packed_sequence_mask_function")
    if builder in ("sliding_window_overlay", "chunked_overlay"):
        hides_nothing = tree.are_within(arguments[0])
    return tree.mask() if hides_nothing else None


def _of_one_query(mask: AttentionMask, keep: Tensor | None, axes: _Axes) -> AttentionMask:
    """The mask of a step of decoding: the keys that its one query sees, in few operations.

    Args:
        keep: [B, Tk], nonzero for the keys that are not hidden; None if none is.
    """
    offset, last = axes.of_queries, axes.kv_length - 1
    counted = isinstance(offset, Tensor)
    left, right = (FAR if x is None else x for x in (mask.window_left, mask.window_right))
    begins = left < FAR and (counted or offset > left)
    ends = right < FAR and (counted or offset + right < last)
    parts: list[Tensor] = []
    if begins or ends:
        key = torch.arange(axes.kv_length, device=axes.device)
        parts += [key + left >= offset] if begins else []
        parts += [(key - right if right else key) <= offset] if ends else []
    if keep is not None:
        parts.append(keep if keep.dtype == torch.bool else keep != 0)
    if mask.intervals is not None:
        start, stop = mask.intervals
        parts += [start <= offset, stop > offset]
    seen = AttentionMask.from_padding(reduce(and_, parts)) if parts else AttentionMask.full()
    return seen if not counted and offset == last else replace(seen, query_offset=0)


def _at_queries(mask: AttentionMask, q_length: int, axes: _Axes) -> AttentionMask:
    """The mask with its queries in their places on the axis of the keys."""
    offset = axes.of_queries
    if isinstance(offset, Tensor):
        first, last = mask.to_intervals(axes.kv_length, axes.device)
        return AttentionMask.from_intervals(first - offset, last - offset, query_offset=0)
    # Bottom-right is said by None, so that a growing cache gives torch.compile nothing to guard.
    at_end = offset == axes.kv_length - q_length
    return replace(mask, query_offset=None if at_end else offset)


def _kinds(function: Callable) -> set[str]:
    """The builders that a mask function is put together from."""
    builder, arguments = compat.describe(function)
    if builder in ("and_masks", "or_masks"):
        return set().union(*(_kinds(part) for part in arguments[0]))
    if builder == "remap_positions_for_packed_sequence":
        return _kinds(arguments[0])
    return {builder}


def _convert(
    function: Callable, axes: _Axes, position: Tensor | None = None
) -> AttentionMask | None:
    """The mask of a function that consists of known closures, else None.

    Every closure known here shows a key to its own position or to nobody. So do their
    intersections and unions, and such runs of queries always touch: their union is one run.

    Args:
        position: [B, L], what stands for the axes on the axis inside a packed document.
    """
    builder, arguments = compat.describe(function)
    if builder == "causal":
        return AttentionMask.causal()
    if builder == "bidirectional":
        return AttentionMask.full()
    if builder in ("and_masks", "or_masks"):
        return _combine(builder, arguments[0], axes, position)
    if builder == "sliding_window_overlay" and arguments[0] >= 1:
        return AttentionMask.window(arguments[0] - 1, None)
    if builder == "sliding_window_bidirectional_overlay":
        return AttentionMask.window(arguments[0], arguments[0])
    if builder == "chunked_overlay":
        size, left_padding = arguments
        return _chunks(size, left_padding, axes, position)
    if builder == "padding_mask_function":
        return AttentionMask.from_padding(axes.of_keys(arguments[0]))
    if builder == "packed_sequence_mask_function":
        return _equal_ids(arguments[0], axes)
    if builder == "blockwise_overlay":
        return _equal_ids(arguments[0], axes, hidden=arguments[0] < 0)
    return None


def _combine(builder: str, functions, axes: _Axes, position) -> AttentionMask | None:
    parts = [compat.describe(function) for function in functions]
    remapped = any(name == "remap_positions_for_packed_sequence" for name, _ in parts)
    assumed = torch.compiler.is_compiling() and not compat.remaps_positions()
    masks = []
    for function, (name, arguments) in zip(functions, parts, strict=True):
        if builder == "and_masks" and name == "remap_positions_for_packed_sequence":
            # Within a document positions go up by one: all that is relative stays as it is.
            mask = _convert(arguments[0], axes, arguments[1])
        elif (
            builder == "and_masks"
            and name == "packed_sequence_mask_function"
            and (remapped or assumed)
        ):
            # The library numbers documents in order, so no number comes back.
            if not remapped:  # a user's own numbers look the same
                in_order = (arguments[0][:, 1:] >= arguments[0][:, :-1]).all()
                demand(in_order, "flash_two: document ids that fall need eager mode")
            mask = replace(
                AttentionMask.from_documents(segment_ids=arguments[0]), query_offset=None
            )
        else:
            mask = _convert(function, axes, position)
        if mask is None:
            return None
        masks.append(mask)
    return reduce(and_ if builder == "and_masks" else partial(_union, axes), masks)


def _union(axes: _Axes, *masks: AttentionMask) -> AttentionMask:
    runs = (x.to_intervals(axes.kv_length, axes.device) for x in masks)
    first, last = zip(*runs, strict=True)
    return AttentionMask.from_intervals(torch.minimum(*first), torch.maximum(*last))


def _chunks(size: int, left_padding: Tensor, axes: _Axes, position) -> AttentionMask:
    key = torch.arange(axes.kv_length, device=axes.device)[None] + axes.kv_offset
    position = key if position is None else axes.of_keys(position)
    first = key - (position - left_padding[:, None]) % size
    return AttentionMask.from_intervals(first - axes.kv_offset, first - axes.kv_offset + size)


def _equal_ids(ids: Tensor, axes: _Axes, hidden: Tensor | None = None) -> AttentionMask | None:
    """A query sees the keys of its own id, [B, L]; None unless each id is one run of positions."""
    if is_symbolic():
        return None  # whether an id comes back later is not to be known
    visible = torch.ones_like(ids, dtype=torch.bool) if hidden is None else ~hidden
    starts = pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True) & visible
    # Ids that grow from run to run do not come back.
    highest = torch.where(visible, ids, ids.amin() - 1).cummax(1).values
    returns = starts[:, 1:] & (ids[:, 1:] <= highest[:, :-1])
    if bool(returns.any()):
        return None
    runs = AttentionMask.from_documents(segment_ids=ids).to_intervals(ids.shape[1], ids.device)
    first, last = (axes.of_keys(x) - axes.kv_offset for x in runs)
    if hidden is not None:
        last = torch.where(axes.of_keys(hidden), first, last)
    return AttentionMask.from_intervals(first, last)
