"""Packed documents: which tokens of a row belong together, and what keeps them apart.

A caller describes documents by boundaries (``cu_seq_lens_q``), by positions that restart, or by a
2-D mask that numbers them. Each row is read by itself, and only its visible tokens: the positions
of padding tell nothing.

No seam of Transformers reaches every model. `tests/hf/test_packing_seams.py` removes each one and
shows that its models then leak or are refused:

========================  ================================  ========================================
seam                      what it reads                     serves
========================  ================================  ========================================
`documents_of_mask`       the model's arguments, while it   models that tell their layers nothing:
                          has its masks made                hand-written attention (BLOOM, Falcon,
                                                            GPT-Neo, MPT, XGLM; GPT-J and CodeGen
                                                            until 5.23), CTRL, GPT-BigCode,
                                                            Persimmon; Llama 4, whose chunks count
                                                            within documents
`keep_apart_in_layer`     the arguments of the attention    towers with boundaries and no mask
                          function                          (Qwen2.5-VL); models nobody watches
`_begin`                  a mask that numbers documents     models that compute with its values
                                                            (BLOOM)
`_end`                    whether one of the above was      refuses models that make their own masks
                          asked                             (OpenAI GPT, XLM, FlauBERT)
`forward_pass`            the arguments of the callers      models called past their hooks (PEFT)
Transformers              positions, without a cache        chunks of models nobody watches
========================  ================================  ========================================
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hf_flash_two.hf import branches, compat, families, forward_pass, shard
from hf_flash_two.hf.forward_pass import ForwardPass, current, once
from hf_flash_two.masks import AttentionMask
from hf_flash_two.tensor_cache import all_values, is_mapped, is_symbolic

_BEHIND_CACHE = (
    "position_ids: documents start among these tokens, but the cache holds earlier ones, and which "
    "of them those may see is not known; pass packed documents in one forward"
)


def demand(holds: Tensor, message: str) -> None:
    """Raise RuntimeError unless bool [] ``holds``: when a traced graph runs, under vmap at once."""
    values = all_values(holds)
    if values is None or not is_mapped():
        torch._assert_async(holds, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not values.all():
        raise RuntimeError(message)


# What the caller of a model says, from its forward's beginning to its end


def watch(model: PreTrainedModel) -> None:
    """Keep the documents of ``model``'s callers apart, or refuse; a second call does nothing."""
    forward_pass.watch(model, _begin, _end)


def keep_apart() -> None:
    """Note that the caller's documents have reached a layer."""
    running = current()
    if running is not None:
        running.apart = True


def _begin(running: ForwardPass, arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace a mask that numbers documents by one of ones: models compute with its values."""
    given, around = running.said.attention_mask, running.around
    if around is not None and given is not None and given is around.ones:
        # The model around this one handed on the mask of ones that it got.
        given = around.said.attention_mask
        running.said = running.said._replace(attention_mask=given)
    branches.check(running, arguments)
    replaced = shard.begin(running, arguments)
    if _is_numbered(given):
        replaced = {"attention_mask": (given != 0).to(given.dtype)} | replaced
        running.ones = replaced["attention_mask"]
    return replaced


def _end(ending: ForwardPass) -> None:
    """Raise NotImplementedError if the caller described documents and nothing kept them apart."""
    if not compat.uses_ours(ending.model.config):
        return
    if ending.apart:
        around = ending.around
        if around is not None and _says_no_more_than(around, ending):
            around.apart = True
        return
    stop, around = ending.said.subtree_stop, ending.around
    if stop is not None:
        if around is None or not (around.apart and around.said.subtree_stop is stop):
            _refuse(ending.model, "subtree_stop")
        return  # the model around it has made its masks
    ends, tokens = ending.whole.cu_seq_lens_q, _tokens(ending)
    if ends is not None:
        if ends.numel() > 2:
            _refuse(ending.model, "cu_seq_lens_q")
    elif tokens is not None:
        ids = _said_documents(ending, *tokens, 0, causal=families.is_causal_model(ending.model))
        if ids is None:
            return
        if not is_symbolic():
            _refuse(ending.model, "position_ids, attention_mask")
        demand((ids == 0).all(), f"{type(ending.model).__name__}: packed documents need eager mode")


def _says_no_more_than(outer: ForwardPass, inner: ForwardPass) -> bool:
    """Whether all that was said of documents to ``outer`` has been said to ``inner`` as well."""
    here, there = outer.said, inner.said
    if outer.model.config is inner.model.config:
        return True
    if here.cu_seq_lens_q is not there.cu_seq_lens_q or (
        outer.ones is not None and inner.ones is None
    ):
        return False
    positions = here.position_ids, there.position_ids
    return positions[0] is None or (
        positions[1] is not None and positions[0].shape == positions[1].shape
    )


def _tokens(ending: ForwardPass) -> tuple[int, int] | None:
    """(batch, tokens in a row) of what was said; None if the caller made the whole mask."""
    positions, mask = ending.whole[:2]
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        return None
    if mask is not None:
        return mask.shape[0], mask.shape[1] if positions is None else positions.shape[-1]
    return None if positions is None else (positions.shape[0], positions.shape[-1])


def _refuse(model: PreTrainedModel, name: str) -> None:
    raise NotImplementedError(
        f"{name}: tells of packed documents, and {type(model).__name__} "
        f"({model.config.model_type}) makes masks that cannot keep them apart; pass one document "
        "in a row"
    )


def _said_documents(
    running: ForwardPass, batch: int, queries: int, offset: int | Tensor, *, causal: bool
) -> Tensor | None:
    """The number of each token's document, [1 or B, queries]; None if no row holds several.

    Without values, numbers come wherever a row could hold several.

    Args:
        offset: how many tokens of the row were passed in before these.
        causal: in a bidirectional model positions that restart say nothing of documents.
    """
    said = running.whole
    if said.cu_seq_lens_q is not None:
        if batch != 1 or not _equal(said.cu_seq_lens_q, said.cu_seq_lens_k):
            return None
        running.apart = True
        return ids_of_boundaries(said.cu_seq_lens_q, queries)
    running.apart = True
    if queries == 1:
        return None
    mask = _padding(said.attention_mask, batch, queries, offset)
    positions = said.position_ids
    stand = causal and running.model.config.model_type not in families.WITHOUT_POSITIONS
    if not (stand and may_be_packed(positions, batch, queries)):
        positions = None
    if mask is not None and positions is None and not numbers_documents(mask):
        mask = None
    given = [x for x in (positions, mask) if x is not None]
    if not given:
        return None

    def build() -> Tensor | None:
        starts = document_starts(positions, mask)
        return starts.cumsum(1) if is_symbolic() or bool(starts.any()) else None

    return once(given[0], "documents", build, *given[1:])


def _padding(mask, batch: int, queries: int, offset: int | Tensor) -> Tensor | None:
    """The caller's mask of the tokens now passed in, [B, queries]: those from ``offset`` on."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] < batch:
        return None
    mask = mask[:batch] if mask.shape[0] > batch else mask
    if mask.shape[1] <= queries:
        return mask if mask.shape[1] == queries else None
    at = torch.arange(queries, device=mask.device) + offset
    return mask.index_select(1, at.clamp(max=mask.shape[1] - 1))


def _is_numbered(mask) -> TypeGuard[Tensor]:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == 1:
        return False
    return numbers_documents(mask) and (is_symbolic() or bool((mask > 1).any()))


def _equal(a: Tensor, b) -> bool:
    """Whether both are known to be the same boundaries; ``b`` may be none, or a dict of them."""
    if b is None or a is b:
        return True
    return isinstance(b, Tensor) and not is_symbolic() and torch.equal(a, b)


# The seam of masks: Transformers' mask functions are converted while a model runs


def documents_of_mask(
    batch: int,
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    *,
    causal: bool,
    in_function: bool,
) -> tuple[Tensor | None, bool]:
    """What a mask has to keep apart of what the caller of the running model said.

    Args:
        q_offset, kv_offset: positions of query 0 and key 0; see `mask_function.make_mask`.
        causal: whether causality is part of the mask.
        in_function: whether the mask function keeps documents apart that Transformers has found.

    Returns:
        The number of each key's document, [1 or B, Tk], None if the mask has nothing to keep apart;
        and whether a layer has nothing to add to the mask.
    """
    running = current()
    if running is None:
        return None, in_function
    causal = causal or families.hides_future(running.model)
    if not causal and (queries != keys or families.has_cross_attention(running.model)):
        return None, in_function  # what else attends in such a model are decoders to encoders
    bounded = running.whole.cu_seq_lens_q is not None
    if in_function and not bounded and compat.remaps_positions():
        running.apart = True
        return None, True
    documents = _said_documents(running, batch, queries, q_offset, causal=causal)
    if documents is not None:
        documents = _over_keys(documents, keys, (q_offset == 0) & (kv_offset == 0))
    return documents, running.apart and (causal or bounded)


def _over_keys(documents: Tensor, keys: int, at_start: bool | Tensor) -> Tensor:
    """From the documents of the queries, [B, Tq], to those of the keys."""
    over_keys, queries = documents, documents.shape[1]
    if keys != queries:
        unused = documents.new_full((documents.shape[0], keys - queries), -1)
        over_keys = torch.cat([documents, unused], dim=1)
    if at_start is True:
        return over_keys
    several = not is_symbolic() or (documents != documents[:, :1]).any()
    _refuse_behind_cache(several, at_start)
    return over_keys if several is True else torch.where(several, over_keys, 0)


def _refuse_behind_cache(several: Any, at_start: bool | Tensor) -> None:
    """Raise ValueError where documents start behind a cache of earlier tokens."""
    if is_symbolic():
        demand(~several | at_start, _BEHIND_CACHE)
    elif several and not at_start:
        raise ValueError(_BEHIND_CACHE)


def positions_within(documents: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, Tk], what stands for a token's place in the row: how far it is into its document.

    Padding on the left counts as before, since chunks are told how much of it there is.
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    positions = index - torch.where(starts, index, 0).cummax(1).values
    if attention_mask is None:
        return positions
    left = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
    return positions + torch.where(documents > 0, left, 0)


# The seam of layers: what a model hands to the attention function


def keep_apart_in_layer(
    mask: AttentionMask,
    padding: Tensor | None,
    shape: tuple[int, int, int],
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> AttentionMask:
    """``mask`` within the documents that a layer is told of.

    Args:
        padding: what the mask was made of: [B, L], nonzero for visible tokens; or a tensor of four
            dimensions, which holds the documents; or None.
        shape: batch, queries and keys.
    """
    batch, queries, keys = shape
    running = current()
    if running is not None and running.said.subtree_stop is not None:
        _refuse(running.model, "subtree_stop")
    if cu_seq_lens_q is not None:
        documents = _of_boundaries(cu_seq_lens_q, cu_seq_lens_k, shape)
        said = cu_seq_lens_q
    elif may_be_packed(position_ids, batch, queries) and (padding is None or padding.dim() == 2):
        documents = _of_positions(position_ids, padding, mask, queries, keys)
        said = position_ids
    else:
        return mask
    keep_apart()
    if documents is None:
        return mask
    return once(said, (mask, documents), lambda: mask & documents)


def _of_positions(
    position_ids: Tensor, padding: Tensor | None, mask: AttentionMask, queries: int, keys: int
) -> AttentionMask | None:
    """The documents that restarting positions tell of; None if there is one to a row."""
    if padding is not None:
        at = mask.resolve_offset(queries, keys)
        padding = padding[:, at : at + queries]

    def build() -> AttentionMask | None:
        starts = document_starts(position_ids, padding)
        if not is_symbolic() and not starts.any():
            return None
        if queries != keys:
            _refuse_behind_cache(starts.any(), False)
            return None
        return AttentionMask.from_documents(segment_ids=starts.cumsum(1))

    others = () if padding is None else (padding,)
    key = ("documents of layers", queries, keys)
    return once(position_ids, key, build, *others)


def _of_boundaries(
    query_ends: Tensor, key_ends: Tensor | None, shape: tuple[int, int, int]
) -> AttentionMask:
    batch, queries, keys = shape
    if batch != 1:
        raise ValueError(
            f"cu_seq_lens_q: describes documents laid end to end in a batch of 1, got batch {batch}"
        )
    key_ends = query_ends if key_ends is None else key_ends

    def build() -> AttentionMask:
        return AttentionMask.from_documents(key_ends, query_cu_seqlens=query_ends, key_length=keys)

    return once(key_ends, ("cu_seqlens", queries, keys), build, query_ends)


# Reading tensors


def document_starts(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Where a visible token belongs to another document than the visible token before it.

    Its position is lower; or is the row's lowest once more, as the token before was a document of
    its own (the tokens of an image repeat higher positions); or an integer mask numbers it
    differently.

    Args:
        position_ids: [1 or B, T], or None.
        attention_mask: [B, T], nonzero for visible tokens; None if all are. Not both are None.

    Returns:
        bool [1 or B, T].
    """
    visible = None if attention_mask is None else attention_mask != 0
    starts: Tensor | bool = False
    if position_ids is not None:
        before, seen = _before(position_ids, visible), position_ids
        if visible is not None:
            seen = torch.where(visible, position_ids, position_ids.amax(1, keepdim=True))
        again = (position_ids == before) & (position_ids == seen.amin(1, keepdim=True))
        starts = (position_ids < before) | again
    if attention_mask is not None and numbers_documents(attention_mask):
        starts = starts | (attention_mask != _before(attention_mask, visible))
    like: Any = position_ids if attention_mask is None else attention_mask
    if visible is None:
        visible = torch.ones_like(like, dtype=torch.bool)
    follows = pad(visible.cumsum(1)[:, :-1] > 0, (1, 0), value=False)
    return starts & visible & follows


def numbers_documents(attention_mask: Tensor) -> bool:
    """Whether the dtype of a mask can hold numbers of documents."""
    return attention_mask.dtype != torch.bool and not attention_mask.is_floating_point()


def document_ids(position_ids: Tensor | None, attention_mask: Tensor | None = None) -> Tensor:
    """The number of the document that each token belongs to, [1 or B, T], from 0 in each row."""
    return document_starts(position_ids, attention_mask).cumsum(1)


def ids_of_boundaries(ends: Tensor, length: int) -> Tensor:
    """The number of each token's document, [1, length], from boundaries [N + 1] in a row."""
    token = torch.arange(length, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, token, right=True)[None] - 1


def may_be_packed(position_ids: Tensor | None, batch: int, queries: int) -> TypeGuard[Tensor]:
    """Whether the shapes allow it: several tokens in a row, with one position each."""
    return (
        position_ids is not None
        and queries > 1
        and position_ids.dim() == 2
        and position_ids.shape[1] == queries
        and position_ids.shape[0] in (1, batch)
    )


def _before(x: Tensor, visible: Tensor | None) -> Tensor:
    """The value of ``x`` [B, T] at the last visible token before each; any where there is none."""
    if visible is None:
        return x.roll(1, dims=1)
    x, seen = torch.broadcast_tensors(x, visible)
    index = torch.arange(x.shape[1], device=x.device).expand_as(x)
    last = torch.where(seen, index, 0).cummax(1).values
    return x.gather(1, last.roll(1, dims=1))
