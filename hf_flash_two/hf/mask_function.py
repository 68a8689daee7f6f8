"""Transformers' mask functions -> `AttentionMask`, once per forward.

Transformers describes a mask as a function of (batch, head, query, key) put together from a few
closures, plus the 2-D attention mask. The closures are recognised and turned into a band or into
visibility intervals in O(N). Any other function is evaluated tile by tile, and becomes intervals if
each key is seen by one run of queries, a dense mask otherwise. No conversion approximates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils import logging

from hf_flash_two.hf import compat, forward_pass
from hf_flash_two.hf.mask_carrier import MaskCarrier
from hf_flash_two.hf.packing import all_visible, demand, positions_of
from hf_flash_two.masks import FAR, AttentionMask
from hf_flash_two.tensor_cache import is_symbolic

logger = logging.get_logger(__name__)

_TILE_ELEMENTS = 2**22


@dataclass(frozen=True)
class _Place:
    """Where mask functions see query i, at ``i + q_offset``, and key j, at ``j + kv_offset``.

    `AttentionMask` counts from key 0 instead.
    """

    kv_length: int
    q_offset: int | Tensor
    kv_offset: int
    device: torch.device | str

    def keys(self) -> Tensor:
        """Positions of the keys on Transformers' axis, [Tk]."""
        return torch.arange(self.kv_length, device=self.device) + self.kv_offset

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
) -> MaskCarrier | Tensor | None:
    """What `transformers.AttentionMaskInterface` calls: one mask for all layers of one kind.

    Args:
        q_offset: position of query 0; a tensor [] under a static cache, which goes on counting in
            it, so its value is used up here.
        attention_mask: None or [B, L], nonzero where the key may be seen; L may exceed
            ``kv_offset + kv_length`` or, with a static cache, fall short of it. Rows beyond the
            batch, as MusicGen has one for each code book, count for nothing.
        allow_is_bidirectional_skip: None may stand for "all see all"; done where a family computes
            attention itself, and would add a mask of zeros.
        use_vmap: ``mask_function`` must be called with scalars.

    Returns:
        A `MaskCarrier`; a plain tensor for the few families that insist on one (`compat`).
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected 2 dimensions [batch, keys], or 4 for a ready mask, got "
            f"{list(attention_mask.shape)}"
        )
    place = _Place(kv_length, q_offset, kv_offset, device)
    if attention_mask is not None:
        attention_mask = attention_mask[:batch_size]
    keep = _padding(attention_mask, place, q_length)
    kinds = _kinds(mask_function)
    causal = "causal" in kinds
    documents, packed = _documents(batch_size, q_length, place, causal, kinds)
    positions = None if documents is None else _positions(documents, attention_mask)
    mask = _convert(mask_function, place, positions)
    if mask is not None:
        if documents is not None:
            apart = AttentionMask.from_documents(segment_ids=documents)
            mask = mask & replace(apart, query_offset=None)
        mask = _at_queries(mask, q_length, place)
        mask = mask if keep is None else mask & AttentionMask.from_padding(keep)
    else:
        if documents is not None:
            mask_function = _within(mask_function, documents, positions, batch_size)

        def visible(start: int, stop: int) -> Tensor:
            compat.require("masks")
            return compat.sdpa_mask(
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
    own_attention = config is not None and compat.has_own_attention(config)
    family = getattr(config, "model_type", None)
    # Through the interface it is not left out: layers without one may take themselves for causal.
    adds_it = own_attention or family in compat.WANTS_FLOAT_TENSOR
    if allow_is_bidirectional_skip and adds_it and _is_full(mask):
        return None
    shape = (batch_size, 1, q_length, kv_length)
    carrier = MaskCarrier(
        mask,
        shape,
        device,
        dtype if own_attention or family in compat.READS_ADDITIVE else torch.bool,
        causal=causal,
        packed=packed,
        padding=attention_mask,
    )
    if family in compat.WANTS_BOOL_TENSOR:
        return carrier.as_bool()
    return carrier.as_additive(dtype) if family in compat.WANTS_FLOAT_TENSOR else carrier


def from_tiles(
    visible: Callable[[int, int], Tensor], q_length: int, row_elements: int
) -> AttentionMask:
    """The mask that ``visible(start, stop)``, bool [B or 1, 1, stop - start, Tk], spells out.

    Args:
        row_elements: how many elements one row of ``visible`` has, over the whole batch.
    """
    step = max(1, _TILE_ELEMENTS // max(1, row_elements))
    if is_symbolic() and q_length != 1:
        return AttentionMask.from_dense(visible(0, q_length))
    starts = range(0, q_length, step)
    first = last = count = None
    for start in starts:
        tile = visible(start, min(start + step, q_length))[:, 0]
        query = torch.arange(start, start + tile.shape[1], device=tile.device)[:, None]
        tile_first = torch.where(tile, query, FAR).amin(1)
        tile_last = torch.where(tile, query + 1, -FAR).amax(1)
        first = tile_first if first is None else torch.minimum(first, tile_first)
        last = tile_last if last is None else torch.maximum(last, tile_last)
        count = tile.sum(1) + (0 if count is None else count)
    if q_length == 1 or bool((count == (last - first).clamp(min=0)).all()):
        return AttentionMask.from_intervals(first, last, query_offset=0)
    logger.warning_once(
        "flash_two: this attention mask has keys that are seen by more than one run of queries. It "
        "is kept as a dense tensor of batch x queries x keys bytes, and no tile of it is skipped."
    )
    tiles = [visible(start, min(start + step, q_length)) for start in starts]
    return replace(AttentionMask.from_dense(torch.cat(tiles, dim=2)), query_offset=0)


def _padding(attention_mask: Tensor | None, place: _Place, q_length: int) -> Tensor | None:
    """[B, Tk], nonzero for the keys that are not hidden; None if none is."""
    if attention_mask is None:
        return None
    keep = place.of_keys(attention_mask)
    missing = place.kv_length - keep.shape[1]
    keep = pad(keep, (0, missing)) if missing > 0 else keep
    if q_length != place.kv_length and (isinstance(place.q_offset, Tensor) or place.kv_offset):
        # Intervals in any case, or few keys. Another kind of mask once the padding has left the
        # window would be compiled anew, and to ask would make the device wait.
        return keep
    return None if all_visible(keep) is True else keep


def _documents(
    batch: int, queries: int, place: _Place, causal: bool, kinds: set[str]
) -> tuple[Tensor | None, bool]:
    """What the caller of the model told of packed documents.

    Returns:
        The number of the document of each key, [1 or B, Tk], None if there is one to a row; and
        whether a layer has nothing to add to it.
    """
    running = forward_pass.current()
    found = "packed_sequence_mask_function" in kinds
    if running is None:
        return None, found
    if not causal and (queries != place.kv_length or compat.has_cross_attention(running.model)):
        return None, found  # what else attends in such a model are decoders to encoders
    bounded = running.said.cu_seq_lens_q is not None
    if found and not bounded and compat.remaps_positions():
        running.apart = True
        return None, True
    offset = place.q_offset
    documents = running.documents(batch, queries, offset, causal=causal)
    if documents is not None:
        documents = _over_keys(documents, place)
    return documents, running.apart and (causal or bounded)


def _over_keys(documents: Tensor, place: _Place) -> Tensor:
    """From the documents of the queries, [B, Tq], to those of the keys.

    Raises:
        ValueError: the cache holds earlier tokens, and of which document is not known.
    """
    over_keys, queries = documents, documents.shape[1]
    if place.kv_length != queries:
        unused = documents.new_full((documents.shape[0], place.kv_length - queries), -1)
        over_keys = torch.cat([documents, unused], dim=1)
    at_start = (place.q_offset == 0) & (place.kv_offset == 0)
    message = (
        "position_ids: documents start among these tokens, but the cache holds earlier ones, and "
        "which of them those may see is not known; pass packed documents in one forward"
    )
    if not is_symbolic():
        if not at_start:
            raise ValueError(message)
    elif at_start is not True:
        several = (documents != documents[:, :1]).any()
        demand(~several | at_start, message)
        return torch.where(several, over_keys, 0)
    return over_keys


def _positions(documents: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, Tk], what stands for a token's place in the row: how far it is into its document.

    Padding on the left counts as before, since chunks are told how much of it there is.
    """
    positions = positions_of(documents)
    if attention_mask is None:
        return positions
    left = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
    return positions + torch.where(documents > 0, left, 0)


def _within(function: Callable, documents: Tensor, positions: Tensor, batch: int) -> Callable:
    """``function`` within each document; blocks and padding are looked up by place in the row."""
    documents, positions = (x.expand(batch, -1) for x in (documents, positions))

    def moved(function: Callable) -> Callable:
        builder, arguments = compat.describe(function) or ("", ())
        if builder in ("and_masks", "or_masks"):
            return getattr(compat.masking_utils, builder)(*map(moved, arguments[0]))
        if builder in ("blockwise_overlay", "padding_mask_function"):
            return function
        return lambda b, h, q, k: function(b, h, positions[b, q], positions[b, k])

    inside = moved(function)
    return lambda b, h, q, k: inside(b, h, q, k) & (documents[b, q] == documents[b, k])


def _at_queries(mask: AttentionMask, q_length: int, place: _Place) -> AttentionMask:
    """The mask with its queries in their places on the axis of the keys."""
    offset = place.q_offset - place.kv_offset
    if isinstance(offset, Tensor):
        first, last = _intervals(mask, place)
        return AttentionMask.from_intervals(first - offset, last - offset, query_offset=0)
    # Bottom-right is said by None, so that a growing cache gives torch.compile nothing to guard.
    at_end = offset == place.kv_length - q_length
    return replace(mask, query_offset=None if at_end else offset)


def _kinds(function: Callable) -> set[str]:
    """The builders that a mask function is put together from; "causal" for the plain one."""
    if function is compat.causal_mask_function:
        return {"causal"}
    builder, arguments = compat.describe(function) or ("", ())
    if builder in ("and_masks", "or_masks"):
        return set().union(*(_kinds(part) for part in arguments[0]))
    if builder == "remap_positions_for_packed_sequence":
        return _kinds(arguments[0])
    return {builder}


def _is_full(mask: AttentionMask) -> bool:
    parts = (mask.window_left, mask.window_right, mask.first_query, mask.dense)
    return all(part is None for part in parts)


def _convert(
    function: Callable, place: _Place, position: Tensor | None = None
) -> AttentionMask | None:
    """The mask of a function that consists of known closures, else None.

    Every closure known here shows a key to its own position or to nobody. So do their
    intersections and unions, and such runs of queries always touch: their union is one run.

    Args:
        position: [B, L], what stands for the place on the axis inside a packed document.
    """
    if function is compat.causal_mask_function:
        return AttentionMask.causal()
    if function is compat.bidirectional_mask_function:
        return AttentionMask.full()
    builder, arguments = compat.describe(function) or ("", ())
    if builder in ("and_masks", "or_masks"):
        return _combine(builder, arguments[0], place, position)
    if builder == "sliding_window_overlay" and arguments[0] >= 1:
        return AttentionMask.window(arguments[0] - 1, None)
    if builder == "sliding_window_bidirectional_overlay":
        return AttentionMask.window(arguments[0], arguments[0])
    if builder == "chunked_overlay":
        return _chunks(*arguments, place, position)
    if builder == "padding_mask_function":
        return AttentionMask.from_padding(place.of_keys(arguments[0]))
    if builder == "packed_sequence_mask_function":
        return _equal_ids(arguments[0], place)
    if builder == "blockwise_overlay":
        return _equal_ids(arguments[0], place, hidden=arguments[0] < 0)
    return None


def _combine(builder: str, functions, place: _Place, position) -> AttentionMask | None:
    parts = [compat.describe(function) or ("", ()) for function in functions]
    masks = []
    remapped = any(name == "remap_positions_for_packed_sequence" for name, _ in parts)
    assumed = torch.compiler.is_compiling() and not compat.remaps_positions()
    for function, (name, arguments) in zip(functions, parts, strict=True):
        if builder == "and_masks" and name == "remap_positions_for_packed_sequence":
            # Within a document positions go up by one: all that is relative stays as it is.
            inner, position_ids = arguments
            masks.append(_convert(inner, place, position_ids))
        elif (
            name == "packed_sequence_mask_function"
            and builder == "and_masks"
            and (remapped or assumed)
        ):
            # The library numbers documents in order, so no number comes back.
            if not remapped:  # a user's own numbers look the same
                in_order = (arguments[0][:, 1:] >= arguments[0][:, :-1]).all()
                demand(in_order, "flash_two: document ids that fall need eager mode")
            runs = AttentionMask.from_documents(segment_ids=arguments[0])
            masks.append(replace(runs, query_offset=None))
        else:
            masks.append(_convert(function, place, position))
    if any(mask is None for mask in masks):
        return None
    result = masks[0]
    for mask in masks[1:]:
        result = result & mask if builder == "and_masks" else _union(result, mask, place)
    return result


def _union(a: AttentionMask, b: AttentionMask, place: _Place) -> AttentionMask:
    (first_a, last_a), (first_b, last_b) = _intervals(a, place), _intervals(b, place)
    return AttentionMask.from_intervals(
        torch.minimum(first_a, first_b), torch.maximum(last_a, last_b)
    )


def _intervals(mask: AttentionMask, place: _Place) -> tuple[Tensor, Tensor]:
    """first_query, last_query of any mask without a dense part."""
    everyone = torch.ones(1, place.kv_length, dtype=torch.bool, device=place.device)
    mask = mask & AttentionMask.from_padding(everyone)
    return mask.first_query, mask.last_query


def _chunks(size: int, left_padding: Tensor, place: _Place, position) -> AttentionMask:
    key = place.keys()[None]
    position = key if position is None else place.of_keys(position)
    first = key - (position - left_padding[:, None]) % size
    return AttentionMask.from_intervals(first - place.kv_offset, first - place.kv_offset + size)


def _equal_ids(ids: Tensor, place: _Place, hidden: Tensor | None = None) -> AttentionMask | None:
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
    runs = AttentionMask.from_documents(segment_ids=ids)
    first = place.of_keys(runs.first_query) - place.kv_offset
    last = place.of_keys(runs.last_query) - place.kv_offset
    if hidden is not None:
        last = torch.where(place.of_keys(hidden), first, last)
    return AttentionMask.from_intervals(first, last)
