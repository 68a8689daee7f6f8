"""The attention function that Transformers calls: resolves the mask, calls `flash_attention`."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_flash_two.attention import flash_attention
from hf_flash_two.hf import compat, families, forward_pass, shard
from hf_flash_two.hf.forward_pass import once
from hf_flash_two.hf.mask_proxy import MaskProxy
from hf_flash_two.hf.max_logits import record, records_of
from hf_flash_two.hf.packing import keep_apart, keep_apart_in_layer
from hf_flash_two.hf.tensor_masks import from_block_indices, from_indices, from_tensor
from hf_flash_two.hf.watched import is_watched, show_weights
from hf_flash_two.invariance import is_batch_invariant
from hf_flash_two.masks import AttentionMask

if TYPE_CHECKING or torch.distributed.is_available():
    from hf_flash_two.parallel.sequence import Spread, attend_over_mesh

# Other attention functions read these; here they change no result. cu_seq_lens hold the lengths,
# and the shapes tell the groups of heads.
_INFORMATIONAL = frozenset(
    {
        "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k", "kernel_options",
        "layer_idx", "num_key_value_groups",
    }
)  # fmt: skip


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskProxy | Tensor | None,
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
    deterministic: bool | None = None,
    batch_invariant: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
    """Attention with the signature of `transformers.AttentionInterface`.

    Args:
        module: the calling attention layer; its ``is_causal`` counts where no mask came.
        query: [B, Hq, Tq, D]; key, value: [B, Hk, Tk, D or Dv].
        attention_mask: what `make_mask` made; or bool [B, H, Tq, Tk], True may attend; or float,
            added to the scores; or [B, Tk], nonzero for the keys to see.
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
        deterministic: see `flash_attention`; None is True.
        batch_invariant: see `flash_attention`. In steps of decoding with a window the mask must
            know too: use `hf_flash_two.batch_invariant` there.

    Returns:
        out [B, Tq, Hq, Dv], contiguous, and the attention weights [B, Hq, Tq, Tk] if
        ``output_attentions`` (before dropout; they take the memory that attention here avoids), or
        one such tensor for each image of a tower.
        A query that sees no key gets 0, where "eager" gives it the average of all values.

    Raises:
        TypeError: an unknown argument that another attention function would use. Arguments that
            none uses are ignored, since models hand down all sorts.
        ValueError: arguments contradict each other or do not fit.
    """
    _refuse_what_others_use(module, kwargs)
    spread = getattr(attention_mask, "spread", None) or shard.current()
    if batch_invariant is None:
        batch_invariant = is_batch_invariant()
    lead = getattr(attention_mask, "lead", 0)
    bias = None
    if cache is not None or kwargs.get("write_index") is not None:
        compat.require("serving")
        if isinstance(attention_mask, Tensor):
            reason = "makes a mask of this step's tokens, not of those in the cache"
            compat.refuse_serving(module, reason)
        paged = dict(kwargs, cu_seq_lens_k=cu_seq_lens_k)
        key, value, mask = _from_paged_cache(
            module, key, value, cache, cu_seq_lens_q, paged, batch_invariant
        )
    else:
        mask, bias = _resolve_mask(
            module, query, key, attention_mask, is_causal, sliding_window, position_ids,
            cu_seq_lens_q, cu_seq_lens_k, spread,
        )  # fmt: skip
    _check_heads(module, query, key, s_aux, sinks, position_bias)
    if batch_invariant:
        _check_invariant(module, query, attention_mask, sliding_window, sinks)
    if lead:
        if bias is not None or position_bias is not None or is_watched(module):
            raise NotImplementedError(
                f"batch_invariant: {type(module).__name__} has a bias or is watched, which is not "
                "possible where the cache drops the oldest keys"
            )
        key, value = (pad(x, (0, 0, lead, 0)) for x in (key, value))
    if spread is not None:
        keys = key.shape[2] * spread.ranks
        position_bias = shard.whole_bias(spread, module, position_bias, keys)
    if indices is not None:
        mask = mask & from_indices(indices, key.shape[2])
    elif block_indices is not None:
        indexer: Any = module.indexer
        blocks = block_indices, indexer.block_size, query.shape[1], key.shape[2]
        mask = mask & from_block_indices(*blocks)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling, 1.0
    if query.shape[0] != key.shape[0] and query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    row_sinks = None
    if sinks is not None:
        s_aux, row_sinks = (s_aux, sinks) if sinks.dim() == 4 else (sinks, None)
    wants_weights = _wants_weights(module, output_attentions)
    terms: dict[str, Any] = dict(scale=scaling, bias=bias, softcap=softcap, sinks=s_aux)
    watched, records = is_watched(module), records_of(module)
    return_lse = wants_weights or watched or row_sinks is not None
    wanted: dict[str, Any] = dict(return_lse=return_lse, return_max_logits=len(records) > 0)
    if spread is None:
        here: dict[str, Any] = dict(
            dropout_p=dropout,
            deterministic=deterministic is not False,
            batch_invariant=batch_invariant,
        )
        out = flash_attention(query, key, value, mask=mask, **here, **wanted, **terms)
    else:
        shard.check_layer(module, dropout, wants_weights, watched, bool(batch_invariant))
        out = attend_over_mesh(query, key, value, mask, spread, **wanted, **terms)
    if records:
        record(records, out[-1])
        out = out[:-1] if return_lse else out[0]
    if not isinstance(out, tuple):
        return out.transpose(1, 2).contiguous(), None
    if watched:
        if row_sinks is not None:
            raise NotImplementedError(
                f"watch_attention: {type(module).__name__} has a sink for each query, which is not "
                "possible; use output_attentions=True"
            )
        show_weights(module, query, key, value, lse=out[1], mask=mask, **terms)
    out, lse = out if row_sinks is None else _with_row_sinks(*out, row_sinks)
    weights = None
    if wants_weights:
        if families.family_of(module) in families.WEIGHTS_WITHOUT_SINKS:
            lse = None
        weights = _weights(query, key, mask, bias, lse, scaling, softcap)[..., lead:]
        if cu_seq_lens_q is not None and is_causal is False and attention_mask is None:
            # Towers, which under "eager" attend within one image at a time.
            weights = _blocks(weights, cu_seq_lens_q, cu_seq_lens_k)
    return out.transpose(1, 2).contiguous(), weights


def _refuse_what_others_use(module: torch.nn.Module, kwargs: dict[str, object]) -> None:
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


def _check_heads(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    s_aux: Tensor | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
) -> None:
    """Refuse what tensor parallelism left whole beside one rank's share of the query's heads.

    Whole keys would pass all later checks, and serve other queries than their own.
    """
    heads, key_heads = query.shape[1], key.shape[1]
    counts = {}
    if s_aux is not None:
        counts["s_aux"] = s_aux.shape[0]
    if sinks is not None:
        counts["sinks"] = sinks.shape[0 if sinks.dim() == 1 else 1]
    if position_bias is not None and position_bias.dim() > 2:
        counts["position_bias"] = position_bias.shape[-3]
    wrong = [
        f"{name}: got {count} heads" for name, count in counts.items() if count not in (1, heads)
    ]
    groups = getattr(module, "num_key_value_groups", None)
    if groups is not None and key_heads * groups != heads:
        wrong.append(f"key: got {key_heads} heads, each for {groups} of the query's")
    if wrong:
        raise ValueError(
            f"{wrong[0]}, and a query of {heads}; a tensor-parallel plan that splits the heads of "
            "queries must give each rank its part of these too"
        )


def _check_invariant(
    module: torch.nn.Module,
    query: Tensor,
    attention_mask: MaskProxy | Tensor | None,
    sliding_window: int | None,
    sinks: Tensor | None,
) -> None:
    """Refuse a call that does not tell where documents start, or is not batch-invariant itself."""
    lost = getattr(attention_mask, "lead", 0) is None
    if attention_mask is None and sliding_window is not None and query.shape[2] == 1:
        lost = True
    if lost:
        raise ValueError(
            f"batch_invariant: the mask of {type(module).__name__} no longer tells where documents "
            "start; call the model within `with hf_flash_two.batch_invariant():`"
        )
    if sinks is not None and sinks.dim() == 4:
        raise NotImplementedError(
            f"batch_invariant: {type(module).__name__} has a sink for each query; not possible"
        )


def _causality(module: torch.nn.Module, attention_mask, is_causal: bool | None) -> bool:
    modules = getattr(module, "is_causal", True)
    if is_causal is None:
        if attention_mask is not None or not modules:
            return modules
        return families.family_of(module) not in families.NOT_CAUSAL_WITHOUT_MASK
    if not is_causal and modules and isinstance(attention_mask, MaskProxy):
        family = families.family_of(module)
        if attention_mask.causal and family not in families.CAUSALITY_IN_MASK:
            raise ValueError(
                "is_causal: False was passed, but the model made a causal mask; set "
                "`model.config.is_causal = False` before the forward for bidirectional attention"
            )
    return is_causal


def _resolve_mask(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: MaskProxy | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Any,
    spread: Spread | None,
) -> tuple[AttentionMask, Tensor | None]:
    """(mask, additive bias or None)"""
    causal = _causality(module, attention_mask, is_causal)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if spread is not None:
        shapes = queries, keys * spread.ranks
        return shard.mask_of_layer(spread, module, attention_mask, causal, shapes), None
    bias = padding = None
    if isinstance(attention_mask, MaskProxy):
        attention_mask = attention_mask.broadcast_to(queries, keys)
        if attention_mask.shape[2:] != (queries, keys):
            raise ValueError(
                f"attention_mask: made for {list(attention_mask.shape[2:])} queries and keys, but "
                f"the layer attends with {queries} to {keys}; under sequence parallelism both must "
                "be of whole sequences"
            )
        mask, padding = attention_mask.mask, attention_mask.padding
        if attention_mask.packed:
            return mask, None
    elif attention_mask is None:
        shard.check_gathered(position_ids)
        mask = _without_mask(module, queries, keys, causal, sliding_window)
    elif isinstance(attention_mask, Tensor):
        mask, bias = from_tensor(attention_mask, (batch, heads, queries, keys), causal)
        padding = attention_mask
    else:
        raise TypeError(
            "attention_mask: expected None, a tensor or a mask of flash_two, got "
            f"{type(attention_mask).__name__}; a model must take its masks from "
            "transformers.masking_utils under the same attn_implementation"
        )
    shape = batch, queries, keys
    mask = keep_apart_in_layer(mask, padding, shape, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    return mask, bias


def _without_mask(
    module: torch.nn.Module, queries: int, keys: int, causal: bool, sliding_window: int | None
) -> AttentionMask:
    """Towers and cross attention come without a mask; nothing that had to have one may."""
    if not causal:
        windowed = families.family_of(module) not in families.NO_WINDOW_WITHOUT_MASK
        if sliding_window is not None and windowed and keys > sliding_window:
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


def _from_paged_cache(
    module: torch.nn.Module,
    key: Tensor,
    value: Tensor,
    cache,
    query_ends: Any,
    paged: dict,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, AttentionMask]:
    """The keys and values of all requests end to end, and the mask that keeps these apart."""
    if not getattr(module, "is_causal", True):
        compat.refuse_serving(module, "attends both ways, and the cache holds earlier tokens only")
    key, value, key_ends, window = compat.update_paged_cache(cache, key, value, module, paged)
    keep_apart()
    keys = key.shape[2]
    if batch_invariant and window is not None:
        reason = "has a window, and the paged cache does not tell how many keys it has dropped"
        compat.refuse_serving(module, f"{reason}, which batch_invariant needs")

    def build() -> AttentionMask:
        return AttentionMask.from_documents(
            key_ends, query_cu_seqlens=query_ends, key_length=keys, causal=True, window=window
        )

    return key, value, once(key_ends, ("paged", keys, window), build, query_ends)


def _wants_weights(module: torch.nn.Module, asked: bool | None) -> bool:
    """Whether the layer is to return weights; found out once for all that are alike in a pass."""
    running = forward_pass.current()
    if running is None or torch.compiler.is_compiling():
        return _returns_weights(module, asked) or forward_pass.asks_for_weights()
    # Where layers keep both: `getattr` looks for what is not there in four places.
    own = module.__dict__
    alike = type(module), id(own.get("config")), asked, own.get("is_decoder")
    wants = running.returns_weights.get(alike)
    if wants is None:
        wants = _returns_weights(module, asked) or forward_pass.asks_for_weights()
        running.returns_weights[alike] = wants
    return wants


def _returns_weights(module: torch.nn.Module, asked: bool | None) -> bool:
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    always = families.family_of(module) in families.RETURNS_WEIGHTS
    return bool(asked) or always and not getattr(module, "is_decoder", True)


def _with_row_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit in the denominator of each row takes exp(sink) / (exp(lse) + exp(sink))."""
    sinks = sinks[..., 0].to(lse.dtype)
    share = torch.sigmoid(lse - sinks)
    return out * share[..., None].to(out.dtype), torch.logaddexp(lse, sinks)


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
    factor: float = query.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) @ key.transpose(2, 3) * factor
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    visible = mask.to(query.device).to_dense(query.shape[2], key.shape[2], device=query.device)
    scores = torch.where(visible, scores, -torch.inf)
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp().to(query.dtype)


def _blocks(weights: Tensor, query_ends: Tensor, key_ends: Any) -> tuple[Tensor, ...]:
    """Of [1, Hq, Tq, Tk] what each document [1, Hq, its queries, its keys] has."""
    key_ends = query_ends if key_ends is None else key_ends
    runs = (pairwise(ends.tolist()) for ends in (query_ends, key_ends))
    return tuple(weights[:, :, a:b, c:d] for (a, b), (c, d) in zip(*runs, strict=True))
