"""What is different for a model that gets one shard of every row: see `parallel.context`.

A model sees its shard and knows nothing of the others. What it is told of the sequence, positions
and padding, is gathered when its forward begins; masks are made of the whole sequence; attention
reaches over all ranks. What would need more than that is refused by name: `families` lists the
models of which a test shows that nothing but attention looks at other tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_flash_two.hf import compat, families, forward_pass
from hf_flash_two.hf.forward_pass import ForwardPass, once
from hf_flash_two.hf.mask_proxy import MaskProxy
from hf_flash_two.masks import AttentionMask
from hf_flash_two.parallel import context

if TYPE_CHECKING or torch.distributed.is_available():
    from hf_flash_two.parallel.sequence import Spread

current = context.current

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_PER_TOKEN = (
    "MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
)  # fmt: skip
_BY_LENGTH = {"dynamic", "longrope"}
_BIASES = WeakIdKeyDictionary()
"""By the position bias that a model made of its shard, the one of the whole sequence."""


def attends(module: nn.Module) -> bool:
    """Whether a model in ``module`` attends with flash_two; if so, `Trainer` may shard for it."""
    models = (model for model in module.modules() if isinstance(model, PreTrainedModel))
    if not any(compat.uses_ours(model.config) for model in models):
        return False
    compat.hook_trainer()
    return True


def begin(running: ForwardPass, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Gather what was said to the model of ``running``; returns the arguments that it lacks.

    Raises:
        NotImplementedError: the model is not known to be right on a shard.
    """
    spread, model = current(), running.model
    if spread is None:
        return {}
    family = model.config.model_type
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    length = 0 if tokens is None else tokens.shape[1] * spread.ranks
    outermost = running.around is None
    reason = _why_not(model, kwargs, length)
    if reason is None and outermost:
        reason = _why_not_this_head(running, kwargs)
    if family not in families.SHARDABLE:
        reason = f"{family} is not among the families tested so; docs/parallel.md says which are"
    if reason is not None:
        raise NotImplementedError(
            f"context parallelism: {type(model).__name__} cannot get one shard of a row: {reason}"
        )
    if outermost and tokens is not None and spread.tokens not in (None, tokens.shape[1]):
        raise ValueError(
            f"{type(model).__name__}: expected the {spread.tokens} tokens that context_parallel "
            f"gives this rank, got {tokens.shape[1]}"
        )
    given: dict[str, Any] = {}
    said, names = running.said, _parameters(type(model))
    if outermost and "use_cache" in names:
        given["use_cache"] = False
    positions, mask = said.position_ids, said.attention_mask
    if positions is None and "position_ids" in names and tokens is not None:
        positions = spread.layout.positions(spread.rank, length, tokens.device)[None]
        given["position_ids"] = positions
    if isinstance(mask, Tensor) and mask.dim() != 2:
        raise NotImplementedError(
            "attention_mask: a mask of four dimensions is not sharded; pass [batch, keys]"
        )
    running.gathered = said._replace(
        position_ids=None if positions is None else whole(spread, positions),
        attention_mask=whole(spread, mask) if isinstance(mask, Tensor) else None,
        subtree_stop=None if said.subtree_stop is None else whole(spread, said.subtree_stop),
    )
    if family in families.MASK_IS_WHOLE and tokens is not None:
        mask = running.gathered.attention_mask
        if mask is None:
            shape = tokens.shape[0], tokens.shape[1] * spread.ranks
            mask = torch.ones(shape, dtype=torch.int64, device=tokens.device)
        given["attention_mask"] = (mask != 0).to(mask.dtype)
    if kwargs.get("labels") is not None or running.caller.get("labels") is not None:
        _check_loss(running, kwargs)
        if kwargs.get("labels") is not None and kwargs.get("num_items_in_batch") is None:
            count = (spread.gather(kwargs["shift_labels"], 1) != context.IGNORED).sum()
            given["num_items_in_batch"] = count / spread.ranks
    return given


def _why_not_this_head(running: ForwardPass, kwargs: dict[str, Any]) -> str | None:
    """Why the model that the user calls cannot be sharded, whatever is inside it."""
    model = running.caller.get("model", running.model)
    name = _class_of(model)
    if name not in _heads(*_PER_TOKEN):
        return f"{name} is no model that gives something for each token"
    if getattr(model, "pooler", None) is not None:
        return "its pooler looks at one token of a row; load it with add_pooling_layer=False"
    for cache_name in ("cache", "past_key_values"):
        if kwargs.get(cache_name) is not None:
            return f"{cache_name} holds the keys of a shard alone"
    if kwargs.get("use_cache"):
        return "use_cache=True would keep the keys of a shard alone"
    for at, module in running.model.named_modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size != (1,):
            return f"{at} mixes neighbouring tokens"
    return None


def _class_of(model: nn.Module) -> str:
    """The name of its class in Transformers, of which FSDP makes another."""
    classes = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    return next(classes, type(model)).__name__


@cache
def _heads(*tables: str) -> frozenset[str]:
    """The classes that these tables of Transformers name."""
    named = [x for table in tables for x in getattr(modeling_auto, table).values()]
    return frozenset(x for each in named for x in ([each] if isinstance(each, str) else each))


def _why_not(model: nn.Module, kwargs: dict[str, Any], length: int) -> str | None:
    """Why a variant of a family cannot be sharded whose usual models can.

    Args:
        length: of the whole sequence.
    """
    config: Any = model.config
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in [given, *given.values()]:
        kind = isinstance(rope, dict) and (rope.get("rope_type") or rope.get("type"))
        if kind in _BY_LENGTH:
            usual = getattr(config, "original_max_position_embeddings", None)
            usual = rope.get("original_max_position_embeddings") or usual
            if length > (usual or config.max_position_embeddings):
                return f"its rotary embedding ({kind}) depends on the largest position of a shard"
    return why_not_by_token(model, kwargs, length)


def why_not_by_token(model: nn.Module, kwargs: dict[str, Any], length: int) -> str | None:
    """Why a variant of a family looks at other tokens of a row than attention shows it.

    Args:
        length: of the whole row.
    """
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    scale = getattr(config, "floor_scale", None)
    if getattr(config, "attn_temperature_tuning", False) and scale and length >= scale:
        return "its attention temperature counts the tokens that it gets"
    if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        return "output_router_logits adds a loss that is no mean over tokens"
    return None


def whole(spread: Spread, shard: Tensor) -> Tensor:
    """[B, T] in the order of the sequence, of which this rank has ``shard``."""
    return once(shard, ("whole", spread), lambda: spread.gather(shard, shard.dim() - 1))


def _check_loss(running: ForwardPass, kwargs: dict[str, Any]) -> None:
    """Refuse a loss that would not be this rank's share of the mean over all labels."""
    directly = kwargs.get("labels") is not None
    told = kwargs if directly else running.caller
    model: Any = running.model if directly else running.caller["model"]
    # A head that was called past its hooks has to have been told the number of labels.
    knows = directly or told.get("num_items_in_batch") is not None
    causal = _class_of(model) in _heads("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    shifts = model.config.model_type in families.SHIFTS_LABELS
    if shifts or not causal or not knows or told.get("shift_labels") is None:
        raise NotImplementedError(
            f"labels: {type(model).__name__} would take the mean over the labels of one shard, or "
            "shift them there; pass shift_labels and num_items_in_batch beside them to a causal "
            "model, as `context_parallel` does, or compute the loss from its logits"
        )


@cache
def _parameters(model: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


# Masks of the whole sequence


def whole_arguments(
    spread: Spread,
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    function: Callable,
) -> tuple[int, int, Tensor | None, Callable]:
    """Lengths, 2-D mask and mask function of the whole sequence, from those made for a shard.

    Raises:
        NotImplementedError: there is a cache of earlier tokens.
    """
    if not isinstance(q_offset, int) or q_offset or kv_offset:
        raise NotImplementedError("context parallelism: not with a cache of earlier tokens")
    running, ranks = forward_pass.current(), spread.ranks
    if running is None:
        raise NotImplementedError(
            "context parallelism: a mask was made outside of a model that flash_two watches; load "
            "the model with attn_implementation='flash_two'"
        )
    is_whole = running.model.config.model_type in families.MASK_IS_WHOLE
    if attention_mask is not None and not is_whole:
        attention_mask = whole(spread, attention_mask)
    # Without a cache the mask that a model is given tells it the number of keys.
    keys = keys if is_whole and keys == queries * ranks else keys * ranks
    return queries * ranks, keys, attention_mask, whole_function(spread, function, attention_mask)


def whole_function(spread: Spread, function: Callable, attention_mask: Tensor | None) -> Callable:
    """A mask function of the whole sequence, from one that was made for a shard.

    Documents are left out: `packing` finds them in what was said of the whole sequence.

    Args:
        attention_mask: of the whole sequence.

    Raises:
        NotImplementedError: it looks at more than positions and padding.
    """
    builder, arguments = compat.describe(function)
    utils: Any = compat.masking_utils
    if builder in ("causal", "bidirectional") or builder.startswith("sliding_window"):
        return function
    if builder == "remap_positions_for_packed_sequence":
        return whole_function(spread, arguments[0], attention_mask)
    if builder == "packed_sequence_mask_function":
        return utils.bidirectional_mask_function
    if builder in ("and_masks", "or_masks"):
        parts = (whole_function(spread, part, attention_mask) for part in arguments[0])
        return getattr(utils, builder)(*parts)
    if builder == "chunked_overlay":
        size, left = arguments
        if attention_mask is not None:
            left = (attention_mask.cumsum(1) == 0).sum(1).to(left.dtype)
        return utils.chunked_overlay(size, left)
    raise NotImplementedError(
        "context parallelism: the model's mask looks at more than positions, padding and packed "
        "documents, and one shard does not tell that of the others"
    )


def without_filling(
    spread: Spread, mask: AttentionMask, lengths: tuple[int, int], device: torch.device | str
) -> AttentionMask:
    """A mask of the whole sequence, where the tokens that fill it up see nothing.

    Nobody looks at what they compute, but their scores would be among the largest of their heads.

    Args:
        lengths: queries and keys, filled up.
    """
    queries, keys = lengths
    tokens = spread.lengths.get(queries // spread.ranks, queries)
    if tokens == queries:
        return mask
    start = torch.full((keys,), mask.resolve_offset(*lengths), device=device)
    return mask & AttentionMask.from_intervals(
        start, start + tokens, query_offset=mask.query_offset
    )


# Attention over all ranks


def mask_of_layer(
    spread: Spread, module: nn.Module, given: Any, causal: bool, shape: tuple[int, int]
) -> AttentionMask:
    """The mask of the whole sequence that a layer attends with.

    Args:
        shape: this rank's queries, and all keys.

    Raises:
        ValueError: the layer's mask was lost, or is not one that was made here.
    """
    if given is None and not causal:
        return AttentionMask.full()
    if not isinstance(given, MaskProxy) or given.spread is None:
        raise ValueError(
            f"attention_mask: under context parallelism {type(module).__name__} needs the mask "
            f"that flash_two made of the whole sequence, got {type(given).__name__}"
        )
    if tuple(given.shape[2:]) != shape:
        raise ValueError(
            f"attention_mask: made for {list(given.shape[2:])} queries and keys, but the layer "
            f"attends with {shape[0]} to {shape[1]}"
        )
    return given.mask


def check_gathered(position_ids: Tensor | None) -> None:
    """Refuse a layer that lost its mask where another package gathered the sequence (DeepSpeed's).

    It gathers positions, which tell packed documents, and drops what was said of padding. Padding
    after the tokens changes nothing that causal attention gives these.

    Args:
        position_ids: what the layer got.

    Raises:
        NotImplementedError: there is padding before tokens.
    """
    running = forward_pass.current()
    if running is None or position_ids is None:
        return
    mask, shard = running.said.attention_mask, running.said.position_ids
    if not isinstance(mask, Tensor) or mask.dim() != 2 or shard is None:
        return
    if shard.shape[-1] == position_ids.shape[-1]:
        return

    def is_padded() -> bool:
        seen = mask != 0
        first = (shard == position_ids[:, : shard.shape[1]]).all()
        return bool((seen[:, 1:] > seen[:, :-1]).any() | (first & ~seen[:, 0].all()))

    if once(mask, ("gathered",), is_padded, shard, position_ids):
        raise NotImplementedError(
            "attention_mask: DeepSpeed's sequence parallelism drops it, and tokens would see the "
            "padding before them; pad on the right, pack the rows, or use context parallelism"
        )


def check_layer(
    module: nn.Module,
    dropout: float,
    wants_weights: bool,
    watched: bool,
    batch_invariant: bool = False,
) -> None:
    """Refuse what a shard cannot give."""
    if dropout:
        raise NotImplementedError(
            f"context parallelism: {type(module).__name__} drops probabilities (dropout "
            f"{dropout}); set the config's attention dropout to 0"
        )
    wanted = {
        "output_attentions": wants_weights,
        "watch_attention": watched,
        "batch_invariant": batch_invariant,
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise NotImplementedError(
                f"{what}: not possible under context parallelism; leave it out"
            )


def whole_bias(spread: Spread, module: Any, bias: Tensor | None, keys: int) -> Tensor | None:
    """This rank's rows of the position bias of T5 and its like, [1, H, Tq, all keys].

    A model makes it in its first layer, as if its shard were all there is, and hands it on.

    Args:
        keys: of the whole sequence.
    """
    if bias is None:
        return None
    known = _BIASES.get(bias)
    if known is not None:
        return known
    if not hasattr(module, "compute_bias"):
        raise NotImplementedError(
            f"position_bias: {type(module).__name__} makes it of one shard; context parallelism "
            "is not possible"
        )
    if not module.has_relative_attention_bias:
        # To other sequences there is none: the model hands on zeros.
        if bias.any():
            raise NotImplementedError("position_bias: unknown where on the sequence it was made")
        return None
    queries = bias.shape[2] * spread.ranks
    rows = spread.layout.positions(spread.rank, queries, bias.device)
    found = module.compute_bias(queries, keys, device=bias.device).index_select(2, rows)
    _BIASES[bias] = found
    return found
