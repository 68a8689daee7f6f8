"""The attention function that Transformers calls: it refuses, settles the mask, calls."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hf_flash_two.attention import flash_attention
from hf_flash_two.hf import compat, forward_pass
from hf_flash_two.hf.forward_pass import once
from hf_flash_two.hf.mask_carrier import MaskCarrier
from hf_flash_two.hf.mask_function import from_tiles
from hf_flash_two.hf.packing import demand, document_starts, may_be_packed
from hf_flash_two.masks import AttentionMask
from hf_flash_two.tensor_cache import is_symbolic

# What attention functions of Transformers read, though here it changes no result: lengths that
# cu_seq_lens already hold; every kernel is deterministic; how another kernel is tuned; groups of
# heads, which the shapes tell.
_INFORMATIONAL = frozenset(
    {
        "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "deterministic",
        "kernel_options", "layer_idx", "num_key_value_groups",
    }
)  # fmt: skip


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskCarrier | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cache=None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
    """Attention with the signature of `transformers.AttentionInterface`.

    Args:
        module: the calling attention layer; its ``is_causal`` counts where no mask came.
        query: [B, Hq, Tq, D]; key, value: [B, Hk, Tk, D or Dv].
        attention_mask: what our mask function made; or a bool [B, H, Tq, Tk], True may attend; or
            a float one, which is added to the scores; or [B, Tk], nonzero for the keys to see.
        is_causal: overrides ``module.is_causal`` where no mask came.
        sliding_window: used where no mask came; a mask already holds it.
        s_aux: [Hq], attention sinks; sinks: the same, or one per query [B, Hq, Tq, 1].
        position_bias: broadcastable to [B, Hq, Tq, Tk], added to the scaled scores; has a gradient.
        position_ids: [1 or B, T]; positions that restart separate packed documents, unless there
            is padding.
        cu_seq_lens_q, cu_seq_lens_k: [N + 1], boundaries of documents laid end to end (batch 1).
        indices: [B, Tq, n], the keys each query may see; block_indices: the same by blocks of
            ``module.indexer.block_size`` keys, [B, groups, Tq, n], negative for none.
        cache: the paged cache of continuous batching; None where the layer has written to it.

    Returns:
        out [B, Tq, Hq, Dv], contiguous, and the attention weights [B, Hq, Tq, Tk] if
        ``output_attentions`` (before dropout; they take the memory that attention here avoids), or
        one such tensor for each image of a tower.
        A query that sees no key gets 0, where "eager" gives it the average of all values.

    Raises:
        TypeError: an argument that another attention of Transformers, or the family's own eager
            one, would use, and that is not known here. What no attention uses is passed over, as
            models hand down all sorts of arguments.
        ValueError: arguments that contradict each other or do not fit.
    """
    for name, given in kwargs.items():
        if given is None or given is False or name in _INFORMATIONAL:
            continue
        if compat.is_read_by_attention(name, type(module).__module__):
            raise TypeError(
                f"{name}: other attention implementations of Transformers use this argument, and "
                "flash_two does not; drop it from the call of the model, or use "
                "attn_implementation='eager'"
            )
    if kwargs.get("block_table") is not None:
        raise TypeError(
            "block_table: flash_two does not write to the pages of continuous batching by a table; "
            "leave max_blocks_per_request of its configuration at 0"
        )
    if cache is not None or kwargs.get("write_index") is not None:
        compat.require("serving")
        _check_paged(module, attention_mask)
        paged = dict(kwargs, cu_seq_lens_k=cu_seq_lens_k)
        key, value, mask = _from_paged_cache(module, key, value, cache, cu_seq_lens_q, paged)
        bias = None
    else:
        causal = _causality(module, attention_mask, is_causal)
        mask, bias = _settle_mask(
            module, query, key, attention_mask, causal, sliding_window, position_ids,
            cu_seq_lens_q, cu_seq_lens_k,
        )  # fmt: skip
    if indices is not None or block_indices is not None:
        mask = mask & _from_indices(module, query, key, indices, block_indices)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    row_sinks = sinks if sinks is not None and sinks.dim() == 4 else None
    if sinks is not None and row_sinks is None:
        s_aux = sinks
    if output_attentions is None:
        output_attentions = getattr(getattr(module, "config", None), "output_attentions", False)
    wants_weights = (
        output_attentions or compat.returns_weights(module) or forward_pass.asks_for_weights()
    )
    out = flash_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scaling,
        bias=bias,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        return_lse=wants_weights or row_sinks is not None,
    )
    weights = None
    if isinstance(out, tuple):
        out, lse = out
        if row_sinks is not None:
            # One more logit in the denominator takes the share exp(sink) / (exp(lse) + exp(sink)).
            share = torch.sigmoid(lse - row_sinks[..., 0].to(lse.dtype))
            out = out * share[..., None].to(out.dtype)
            lse = torch.logaddexp(lse, row_sinks[..., 0].to(lse.dtype))
        if wants_weights:
            lse = None if compat.weights_without_sinks(module) else lse
            weights = _weights(query, key, mask, bias, lse, scaling, softcap)
            if cu_seq_lens_q is not None and is_causal is False and attention_mask is None:
                # Towers, which under "eager" attend within one image at a time.
                weights = _blocks(weights, cu_seq_lens_q, cu_seq_lens_k)
    return out.transpose(1, 2).contiguous(), weights


def _causality(module: torch.nn.Module, attention_mask, is_causal: bool | None) -> bool:
    modules = getattr(module, "is_causal", True)
    if is_causal is None:
        return modules and (attention_mask is not None or compat.is_causal_without_mask(module))
    if not is_causal and modules and isinstance(attention_mask, MaskCarrier):
        if attention_mask.causal and not compat.leaves_causality_to_mask(module):
            raise ValueError(
                "is_causal: False was passed, but the model made a causal mask; set "
                "`model.config.is_causal = False` before the forward for bidirectional attention"
            )
    return is_causal


def _settle_mask(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: MaskCarrier | Tensor | None,
    causal: bool,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> tuple[AttentionMask, Tensor | None]:
    """(mask, additive bias or None)"""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    bias = padding = None
    if isinstance(attention_mask, MaskCarrier):
        attention_mask = attention_mask.broadcast_to(queries, keys)
        if attention_mask.shape[2:] != (queries, keys):
            raise ValueError(
                f"attention_mask: made for {list(attention_mask.shape[2:])} queries and keys, but "
                f"the layer attends with {queries} to {keys}"
            )
        mask, padding = attention_mask.mask, attention_mask.padding
        if attention_mask.packed:
            return mask, None
    elif attention_mask is None:
        mask = _without_mask(module, queries, keys, causal, sliding_window)
    elif isinstance(attention_mask, Tensor):
        mask, bias = _from_tensor(attention_mask, (batch, heads, queries, keys), causal)
        padding = attention_mask
    else:
        raise TypeError(
            "attention_mask: expected None, a tensor or a mask of flash_two, got "
            f"{type(attention_mask).__name__}; a model must take its masks from "
            "transformers.masking_utils under the same attn_implementation"
        )
    if cu_seq_lens_q is not None:
        documents = _from_cu_seqlens(cu_seq_lens_q, cu_seq_lens_k, batch, queries, keys)
    elif may_be_packed(position_ids, batch, queries) and (padding is None or padding.dim() == 2):
        documents = _from_positions(position_ids, padding, mask, queries, keys)
    else:
        return mask, bias
    forward_pass.keep_apart()
    if documents is None:
        return mask, bias
    described_by = position_ids if cu_seq_lens_q is None else cu_seq_lens_q
    return once(described_by, (mask, documents), lambda: mask & documents), bias


def _without_mask(
    module: torch.nn.Module, queries: int, keys: int, causal: bool, sliding_window: int | None
) -> AttentionMask:
    """Towers and cross attention come without a mask; nothing that had to have one may."""
    if not causal:
        windowed = sliding_window is not None and compat.has_window_without_mask(module)
        if windowed and keys > sliding_window:
            raise ValueError(
                f"attention_mask: a bidirectional layer with sliding_window={sliding_window} got "
                f"no mask for its {keys} keys"
            )
        return AttentionMask.full()
    if queries > 1:
        if not torch.compiler.is_compiling() and not compat.makes_masks(module):
            raise ValueError(
                "attention_mask: the attention function is registered under a name without its "
                "mask function, so masks are lost; use 'flash_two' or 'fa_two'"
            )
        if queries != keys:
            raise ValueError(
                f"attention_mask: causal attention of {queries} queries to {keys} keys needs a "
                "mask that says where the queries stand, and none came"
            )
    elif sliding_window is None:
        return AttentionMask.full()
    return AttentionMask.causal(window=sliding_window)


def _from_tensor(
    mask: Tensor, shape: tuple[int, int, int, int], causal: bool
) -> tuple[AttentionMask, Tensor | None]:
    batch, _, queries, keys = shape
    if mask.dim() == 2:
        if mask.shape != (batch, keys):
            raise ValueError(
                f"attention_mask: expected [batch, keys] = [{batch}, {keys}], got "
                f"{list(mask.shape)}"
            )
        padding = once(mask, "padding", lambda: AttentionMask.from_padding(mask))
        return (padding & AttentionMask.causal() if causal and queries > 1 else padding), None
    if mask.dim() != 4 or any(
        got not in (1, want) for got, want in zip(mask.shape, shape, strict=True)
    ):
        raise ValueError(
            "attention_mask: expected [batch, keys], or a tensor broadcastable to [batch, heads, "
            f"queries, keys] = {list(shape)}, got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return once(mask, ("dense", queries, keys), lambda: _from_dense(mask, queries, keys)), None
    if not mask.is_floating_point():
        raise ValueError(
            "attention_mask: expected bool (True may attend) or float (added to the scores) in "
            f"four dimensions, got {mask.dtype}"
        )
    visible = None
    if mask.shape[1] == 1 and not mask.requires_grad and not is_symbolic():
        key = ("additive", queries, keys)
        visible = once(mask, key, lambda: _from_additive(mask, queries, keys))
    return (AttentionMask.full(), mask) if visible is None else (visible, None)


def _from_dense(visible: Tensor, queries: int, keys: int) -> AttentionMask:
    visible = visible.expand(*visible.shape[:3], keys)
    if visible.shape[1] != 1 or is_symbolic():
        return AttentionMask.from_dense(visible)
    if visible.shape[2] == 1 and queries != 1:
        return AttentionMask.from_padding(visible[:, 0, 0])
    return from_tiles(lambda i, j: visible[:, :, i:j], queries, visible[:, :, 0].numel())


def _from_additive(mask: Tensor, queries: int, keys: int) -> AttentionMask | None:
    """The mask that a float one of 0 and the smallest number (or -inf) is; None of any other."""
    visible = mask == 0
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
        return None
    return _from_dense(visible, queries, keys)


def _from_positions(
    position_ids: Tensor, padding: Tensor | None, mask: AttentionMask, queries: int, keys: int
) -> AttentionMask | None:
    """The documents that restarting positions tell of; None if there is one to a row.

    Raises:
        ValueError: there are several, behind a cache of earlier tokens.
    """
    if padding is not None:
        at = mask.resolve_offset(queries, keys)
        padding = padding[:, at : at + queries]

    def build() -> AttentionMask | None:
        starts = document_starts(position_ids, padding)
        if not is_symbolic() and not starts.any():
            return None
        if queries != keys:
            message = (
                "position_ids: tell of packed documents behind a cache that is longer than they "
                "are; pass them without a cache"
            )
            if not is_symbolic():
                raise ValueError(message)
            demand(~starts.any(), message)
            return None
        return AttentionMask.from_documents(segment_ids=starts.cumsum(1))

    others = () if padding is None else (padding,)
    return once(position_ids, ("documents of layers", queries, keys), build, *others)


def _from_cu_seqlens(
    query_ends: Tensor, key_ends: Tensor | None, batch: int, queries: int, keys: int
) -> AttentionMask:
    if batch != 1:
        raise ValueError(
            f"cu_seq_lens_q: describes documents laid end to end in a batch of 1, got batch {batch}"
        )
    key_ends = query_ends if key_ends is None else key_ends

    def build() -> AttentionMask:
        return AttentionMask.from_documents(key_ends, query_cu_seqlens=query_ends, key_length=keys)

    return once(key_ends, ("cu_seqlens", queries, keys), build, query_ends)


def _check_paged(module: torch.nn.Module, attention_mask) -> None:
    """Refuse what pages of earlier tokens have no answer to."""
    reason = None
    if isinstance(attention_mask, Tensor):
        reason = "makes a mask of this step's tokens, not of those in the cache"
    elif not getattr(module, "is_causal", True):
        reason = "attends both ways, and the cache holds earlier tokens only"
    if reason is not None:
        raise NotImplementedError(
            f"continuous batching: {type(module).__name__} {reason}; use `generate`"
        )


def _from_paged_cache(
    module: torch.nn.Module,
    key: Tensor,
    value: Tensor,
    cache,
    query_ends: Tensor,
    paged: dict,
) -> tuple[Tensor, Tensor, AttentionMask]:
    """The keys and values of all requests end to end, and the mask that keeps these apart."""
    key, value, key_ends, window = compat.update_paged_cache(cache, key, value, module, paged)
    forward_pass.keep_apart()
    keys = key.shape[2]

    def build() -> AttentionMask:
        return AttentionMask.from_documents(
            key_ends, query_cu_seqlens=query_ends, key_length=keys, causal=True, window=window
        )

    return key, value, once(key_ends, ("paged", keys, window), build, query_ends)


def _from_indices(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    indices: Tensor | None,
    block_indices: Tensor | None,
) -> AttentionMask:
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if indices is not None:
        visible = torch.zeros(batch, queries, keys, dtype=torch.bool, device=query.device)
        return AttentionMask.from_dense(visible.scatter(-1, indices.long(), True)[:, None])
    size = module.indexer.block_size
    blocks = -(-keys // size)
    groups = block_indices.shape[1]
    chosen = block_indices.masked_fill(block_indices < 0, blocks)
    visible = torch.zeros(
        batch, groups, queries, blocks + 1, dtype=torch.bool, device=query.device
    ).scatter(-1, chosen, True)[..., :blocks]
    visible = visible.repeat_interleave(size, dim=-1)[..., :keys]
    return AttentionMask.from_dense(visible.repeat_interleave(heads // groups, dim=1))


def _weights(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    bias: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """The probabilities once more, [B, Hq, Tq, Tk] in the dtype of ``query``.

    Args:
        lse: [B, Hq, Tq], sinks included; None: of the keys alone.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1).to(dtype)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    visible = mask.to(query.device).to_dense(query.shape[2], key.shape[2], device=query.device)
    scores = torch.where(visible, scores, -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp().to(query.dtype)


def _blocks(weights: Tensor, query_ends: Tensor, key_ends: Tensor | None) -> tuple[Tensor, ...]:
    """Of [1, Hq, Tq, Tk] what each document [1, Hq, its queries, its keys] has."""
    key_ends = query_ends if key_ends is None else key_ends
    runs = (pairwise(ends.tolist()) for ends in (query_ends, key_ends))
    return tuple(weights[:, :, a:b, c:d] for (a, b), (c, d) in zip(*runs, strict=True))
