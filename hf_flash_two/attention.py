"""`flash_attention`: validates its arguments, resolves the dtype and calls the op."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral
from typing import NamedTuple, Never

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from hf_flash_two.documents import TILE
from hf_flash_two.invariance import is_batch_invariant
from hf_flash_two.kernels import NAMES as KERNELS
from hf_flash_two.kernels.params import TENSORS, AttentionParams, Prepared, statistics_dtype
from hf_flash_two.masks import AttentionMask
from hf_flash_two.op import flash_attn, is_eager, is_recorded, prepared

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 576
_LAYOUT = (
    "; the layout is [batch, heads, length, head_dim]: tensors of [batch, length, heads, head_dim] "
    "need transpose(1, 2)"
)
_CAUSAL = "mask=AttentionMask.causal()"
_DOCUMENTS = "mask=AttentionMask.from_documents(cu_seqlens)"
_ELSEWHERE = {
    "causal": _CAUSAL,
    "is_causal": "mask=AttentionMask.causal(query_offset=0), which is top-left",
    "attn_mask": "mask, or bias if it is added to the scores",
    "attention_mask": "mask=AttentionMask.from_padding(attention_mask)",
    "window_size": "mask=AttentionMask.window(left, right)",
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "dropout": "dropout_p",
    "p": "dropout_p",
    "enable_gqa": "not needed",
    "s_aux": "sinks",
    "learnable_sink": "sinks",
    "return_attn_probs": "return_lse",
    "cache_seqlens": "mask=AttentionMask.from_padding(...)",
    "attn_bias": "mask, or bias for a tensor",
    "score_mod": "bias, alibi_slopes or softcap",
    "num_splits": "batch_invariant=True, for the same bits in every batch",
    "block_table": "not possible: keys have to be gathered",
}
_ELSEWHERE |= dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"), _DOCUMENTS)
_ELSEWHERE |= dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k"), "not needed")
_ELSEWHERE |= dict.fromkeys(("block_mask", "mask_mod"), "mask: docs/moving.md has its words")
"""Names of arguments in other attention functions, and what to pass here instead."""


class Settings(NamedTuple):
    """The arguments of `flash_attention` that are no tensors, as they were given."""

    scale: float | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    q_bucket_size: int | None = None
    k_bucket_size: int | None = None
    deterministic: bool = True
    return_max_logits: bool = False
    batch_invariant: bool = False
    kernel: str = "auto"


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: AttentionMask | Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_max_logits: bool = False,
    kernel: str = "auto",
    q_bucket_size: int | None = None,
    k_bucket_size: int | None = None,
    deterministic: bool = True,
    batch_invariant: bool | None = None,
    **unknown: Never,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(cap(scale * Q K^T) + bias) V in memory linear in the sequence, forward and backward.

    Args:
        query: [B, Hq, Tq, D] in float64, float32, bfloat16 or float16; D up to 576, any strides.
        key: [B, Hk, Tk, D] with Hq a multiple of Hk; query head h uses key head h // (Hq / Hk).
        value: [B, Hk, Tk, Dv].
        mask: an `AttentionMask`, or a bool tensor broadcastable to [B, Hq, Tq, Tk], True may
            attend. With None every query sees every key. ``AttentionMask.causal()`` aligns the last
            query with the last key (bottom-right).
        scale: multiplies the scores; D ** -0.5 if None.
        bias: float, broadcastable to [B, Hq, Tq, Tk], added after scale and softcap; has a
            gradient.
        alibi_slopes: [Hq] or [B, Hq]; adds ``-slope * |position of query - key|``; no gradient.
        softcap: scores become ``softcap * tanh(score / softcap)``; None or 0 is off.
        sinks: [Hq] or [B, Hq], a logit per head that joins each row's softmax and has no value;
            has a gradient.
        dropout_p: chance that a probability is dropped. The caller passes 0 in evaluation.
        dropout_seed: an int or an integer tensor of one element; None draws one from PyTorch's
            generator. Which pairs are dropped depends on (seed, batch, head, query, key) only.
        return_lse: also return the log-sum-exp of each row's scores, sinks included;
            differentiable.
        return_max_logits: also return the largest score of each head, for QK-clip (Kimi Team 2025,
            arXiv:2507.20534) and monitoring; no gradient.
        kernel: "auto", "blockwise", "fused_cpu", "hopper" or "triton". One asked for by name
            raises where it cannot compute the call, in the forward or in the backward.
        q_bucket_size, k_bucket_size: upper limits on the tiles of queries and keys. Triton's have
            at least 16 of each, and in decoding sizes of their own.
        deterministic: False lets the backward on Hopper GPUs add up the gradient of the queries in
            any order where that is faster, unless ``torch.use_deterministic_algorithms(True)``.
        batch_invariant: the bits of a document's rows, and of their gradients, depend on nothing
            but its own queries, keys and values; see docs/batch_invariance.md. None: what
            `hf_flash_two.batch_invariant` says, else False.

    Returns:
        out [B, Hq, Tq, Dv], laid out in memory as ``query`` is, and on request lse [B, Hq, Tq] and
        max_logits [B, Hq], in this order, in float32 (float64 for float64). The latter is the
        largest score of all visible pairs after scale, softcap, bias and ALiBi, without sinks and
        before dropout; -inf where there are none. A row that sees no key has out 0, a gradient of
        its query of 0, and lse -inf, or that of its sink.
        All is computed and returned in the dtype of ``value``, because rotary embeddings and norms
        may upcast queries and keys; under autocast in autocast's dtype, unless ``value`` is
        float64. Statistics and sums are float32 (float64). The same inputs give the same bits,
        unless ``deterministic`` is False.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
        TypeError: there is no such argument. For names of other libraries the message says what to
            pass instead.

    Source: Dao 2023, arXiv:2307.08691, Algorithms 1 and 2.
    """
    if unknown:
        refuse_unknown("flash_attention", unknown, _ELSEWHERE)
    eager = is_eager(query, key, value)
    mask = as_mask(mask)
    if deterministic is False:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if batch_invariant is None:
        batch_invariant = is_batch_invariant()
    settings = Settings(
        scale, softcap, dropout_p, q_bucket_size, k_bucket_size, deterministic, return_max_logits,
        batch_invariant, kernel,
    )  # fmt: skip
    recorded = eager and is_recorded(query, key, value)
    kind, run, with_lse = None, None, return_lse or recorded
    if eager and bias is None and alibi_slopes is None and sinks is None and not dropout_p:
        kind = _kind(query, key, value, mask, (*settings, with_lse))
        known = None if kind is None else _calls.get(kind)
        if known is not None:
            numbers, run = known
            intervals = mask.query_start, mask.query_stop, mask.key_bounds()
            params = AttentionParams._make((*intervals, *_NO_TENSORS, *numbers))
            return flash_attn(query, key, value, params, kernel, return_lse, eager, recorded, run)
    query, key, value, params = validated(
        query, key, value, mask, settings, bias, alibi_slopes, sinks, dropout_seed
    )
    if kind is not None:
        run = prepared(query, key, value, params, kernel, with_lse)
        if len(_calls) >= _MOST_KINDS:
            _calls.clear()
        _calls[kind] = params.numbers, run
    recorded = recorded or eager and is_recorded(params.bias, params.sinks)
    return flash_attn(query, key, value, params, kernel, return_lse, eager, recorded, run)


def flash_attention_gradients(
    d_out: Tensor | None,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    mask: AttentionMask | Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
    q_bucket_size: int | None = None,
    k_bucket_size: int | None = None,
    need_d_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients that `flash_attention` passes on, for a caller with a graph of its own.

    Args:
        d_out, d_lse: [B, Hq, Tq, Dv] and [B, Hq, Tq]; None is zero.
        out, lse: as `flash_attention` returned them.
        need_d_bias: whether that of ``bias`` is wanted.

    Returns:
        The gradients of query, key, value, bias and sinks, the last two in the shape that
        `flash_attention` took, or None without one.
    """
    settings = Settings(
        scale, softcap, q_bucket_size=q_bucket_size, k_bucket_size=k_bucket_size, kernel=kernel
    )
    query, key, value, params = validated(
        query, key, value, as_mask(mask), settings, bias, alibi_slopes, sinks, None
    )
    dq, dk, dv, d_bias, d_sinks = torch.ops.hf_flash_two.flash_attn_bwd(
        d_out, d_lse, query, key, value, out, lse, *params, kernel, need_d_bias
    )
    d_bias = None if bias is None or not need_d_bias else d_bias.reshape(bias.shape)
    d_sinks = None if sinks is None else d_sinks.reshape(sinks.shape).to(sinks.dtype)
    return dq, dk, dv, d_bias, d_sinks


def validated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    settings: Settings,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: int | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, AttentionParams]:
    """The tensors in the dtype to compute in, and all else as kernels take it."""
    _check_inputs(query, key, value)
    query, key, value = _resolve_dtype(query, key, value)
    batch, heads, query_length, head_dim = query.shape
    shape = (batch, heads, query_length, key.shape[2])
    mask.check(*shape)
    for tensor in (mask.query_start, mask.dense):
        if tensor is not None and tensor.device != query.device:
            mask = mask.to(query.device)
    numbers = _check_settings(head_dim, *settings)
    if settings.batch_invariant and mask.dense is not None:
        raise ValueError(
            "batch_invariant: a dense mask does not tell where documents start; describe it by one "
            "of AttentionMask's other constructors"
        )
    params = AttentionParams(
        mask.query_start,
        mask.query_stop,
        mask.key_bounds(),
        mask.dense,
        None if bias is None else _check_bias(bias, shape, query),
        None if alibi_slopes is None else _check_per_head("alibi_slopes", alibi_slopes, query),
        None if sinks is None else _check_per_head("sinks", sinks, query),
        _resolve_seed(dropout_seed, query.device) if numbers[2] else None,
        mask.resolve_offset(query_length, key.shape[2]),
        mask.window_left,
        mask.window_right,
        *numbers,
    )
    _check_constant("alibi_slopes", alibi_slopes, "pass `bias`")
    return query, key, value, params


def refuse_unknown(
    function: str, unknown: Mapping[str, object], elsewhere: Mapping[str, str]
) -> Never:
    """Raise the TypeError of a keyword that ``function`` does not have, and what to pass instead.

    Args:
        elsewhere: names of other libraries, and what they are here.
    """
    name = next(iter(unknown))
    hint = f"; here it is {elsewhere[name]}" if name in elsewhere else ""
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


_CONSTANTS = frozenset({float, int, str, bool, type(None)})
_MOST_KINDS = 1024
_NO_TENSORS = (None,) * (len(TENSORS) - 3)
_calls: dict[tuple, tuple[tuple[float | None, ...], Prepared | None]] = {}
"""Of calls that passed all checks, what others of their kind need not find out again."""


def _kind(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, settings: tuple
) -> tuple | None:
    """All that decides how a call without further tensors is run, but tensors' values.

    None of calls that may depend on more.
    """
    if query is None or key is None or value is None or mask.dense is not None:
        return None
    dtype, device = query.dtype, query.device
    if not (dtype == key.dtype == value.dtype and device == key.device == value.device):
        return None
    types = tuple([type(x) for x in settings])
    if torch.is_autocast_enabled(device.type) or not _CONSTANTS.issuperset(types):
        return None
    intervals = None
    if (start := mask.query_start) is not None and (stop := mask.query_stop) is not None:
        if start.device != device:
            return None
        at = start.data_ptr() % 16, stop.data_ptr() % 16
        intervals = start.shape, start.stride(), stop.stride(), at
    return (
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
        query.data_ptr() % 16, key.data_ptr() % 16, value.data_ptr() % 16, dtype, device,
        mask.window_left, mask.window_right, mask.query_offset, intervals, settings, types,
    )  # fmt: skip


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_device(name, tensor, query)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, heads, length, head_dim], "
                f"got shape {list(tensor.shape)}"
            )
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype}"
            )
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: expected head_dim from 1 to {MAX_HEAD_DIM}, got {tensor.shape[3]}"
            )
    batch, heads, _, head_dim = query.shape
    key_heads, key_length = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(
            f"key: expected [batch, heads, length, head_dim] = [{batch}, *, *, {head_dim}] as in "
            f"query, got {list(key.shape)}{_LAYOUT}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: expected [batch, heads, length, *] = [{batch}, {key_heads}, {key_length}, *] "
            f"as in key, got {list(value.shape)}{_LAYOUT}"
        )
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            "query: expected a number of heads that is a multiple of key's "
            f"{key_heads}, got {heads}{_LAYOUT}"
        )


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device != query.device:
        raise ValueError(f"{name}: expected device {query.device}, got {tensor.device}")


def _resolve_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = query.device.type
    dtype = value.dtype
    # `is_autocast_available` would ask this too, but torch.compile cannot trace it before 2.11.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    # Small calls notice a `to` that has nothing to do.
    if query.dtype == key.dtype == dtype == value.dtype:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def as_mask(mask: AttentionMask | Tensor | None) -> AttentionMask:
    if mask is None:
        return AttentionMask.full()
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            padding = "; padding, [batch, keys], is mask=AttentionMask.from_padding(mask)"
            raise ValueError(
                f"mask: expected bool (True may attend), got {mask.dtype}; pass a float mask that "
                "is added to scores as `bias`, and one of 0 and 1 as `mask != 0`"
                f"{padding if mask.dim() == 2 else ''}"
            )
        if mask.dim() > 4:
            raise ValueError(
                "mask: expected at most the 4 dimensions [batch, heads, queries, keys], "
                f"got shape {list(mask.shape)}"
            )
        return AttentionMask.from_dense(mask)
    if not isinstance(mask, AttentionMask):
        raise ValueError(
            f"mask: expected an AttentionMask, a bool tensor or None, got {type(mask).__name__}"
        )
    return mask


def _check_bias(bias: Tensor, shape: tuple[int, ...], query: Tensor) -> Tensor:
    _check_device("bias", bias, query)
    if not bias.is_floating_point():
        raise ValueError(f"bias: expected a float tensor, got {bias.dtype}; pass bool as `mask`")
    if bias.dim() > 4 or any(
        got not in (1, want) for got, want in zip(bias.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            "bias: expected a tensor broadcastable to [batch, heads, queries, keys] = "
            f"{list(shape)}, got {list(bias.shape)}"
        )
    return bias[(None,) * (4 - bias.dim())]


def _check_per_head(name: str, tensor: Tensor, query: Tensor) -> Tensor:
    _check_device(name, tensor, query)
    batch, heads = query.shape[:2]
    if tuple(tensor.shape) not in ((heads,), (1, heads), (batch, heads)):
        raise ValueError(
            f"{name}: expected shape [{heads}] or [{batch}, {heads}], got {list(tensor.shape)}"
        )
    tensor = tensor[None] if tensor.dim() == 1 else tensor
    return tensor.to(statistics_dtype(query.dtype)).contiguous()


def _check_constant(name: str, given: object, instead: str) -> None:
    if not isinstance(given, Tensor):
        return
    message = f"{name}: no gradient is computed for it; detach it or {instead}"
    if given.requires_grad and torch.is_grad_enabled():
        raise ValueError(message)
    if forward_ad._current_level >= 0:
        _Constant.apply(given, message)


class _Constant(Function):
    """Refuses tangents, at any level of `torch.func`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(given: Tensor, message: str) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return given.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message = inputs[1]

    @staticmethod
    def jvp(ctx, *tangents):
        raise ValueError(ctx.message)


def _number(name: str, given: float) -> float:
    try:
        return float(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a number, got {given!r}") from error


def _check_settings(
    head_dim: int,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
    q_bucket_size: int | None,
    k_bucket_size: int | None,
    deterministic: bool,
    return_max_logits: bool,
    batch_invariant: bool,
    kernel: str,
) -> tuple[float, float, float, int | None, int | None, bool, bool, bool]:
    """All but the first and the last as numbers of Python; softcap 0 is off."""
    _check_constant("scale", scale, "multiply query by it")
    number = head_dim**-0.5 if scale is None else _number("scale", scale)
    if not -math.inf < number < math.inf:
        raise ValueError(f"scale: expected None or a finite number, got {number}")
    _check_constant("softcap", softcap, "cap the scores outside")
    softcap = 0.0 if softcap is None else _number("softcap", softcap)
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap: expected None, 0 (off) or a positive number, got {softcap}")
    dropout_p = _number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected 0 <= dropout_p < 1, got {dropout_p}")
    q_bucket_size = _check_bucket("q_bucket_size", q_bucket_size)
    k_bucket_size = _check_bucket("k_bucket_size", k_bucket_size)
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {KERNELS}, got {kernel!r}")
    flags = deterministic, return_max_logits, batch_invariant
    names = "deterministic", "return_max_logits", "batch_invariant"
    for name, flag in zip(names, flags, strict=True):
        if not isinstance(flag, bool):
            raise ValueError(f"{name}: expected True or False, got {flag!r}")
    if batch_invariant:
        if dropout_p:
            raise ValueError(
                "batch_invariant: expected dropout_p 0, got "
                f"{dropout_p}; which pairs are dropped depends on the batch row"
            )
        q_bucket_size = _check_no_limit("q_bucket_size", q_bucket_size)
        k_bucket_size = _check_no_limit("k_bucket_size", k_bucket_size)
    return number, softcap, dropout_p, q_bucket_size, k_bucket_size, *flags


def _check_bucket(name: str, size: int | None) -> int | None:
    if size is None:
        return None
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f"{name}: expected None or an integer of at least 1, got {size!r}")
    return int(size)


def _check_no_limit(name: str, size: int | None) -> None:
    """Refuse what would limit the tiles of a batch-invariant call."""
    if size is not None and size < TILE:
        raise ValueError(
            f"batch_invariant: expected no {name}, or one of at least {TILE}, got {size}; tiles "
            "are of one size"
        )


def _resolve_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**62, (1,), device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1:
            raise ValueError(f"dropout_seed: expected one element, got shape {list(seed.shape)}")
        if seed.is_floating_point() or seed.is_complex():
            raise ValueError(f"dropout_seed: expected an integer tensor, got {seed.dtype}")
        return seed.to(device=device, dtype=torch.int64).reshape(1)
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"dropout_seed: expected None or an integer of 64 bits, got {seed!r}")
    return torch.tensor([seed], dtype=torch.int64, device=device)
