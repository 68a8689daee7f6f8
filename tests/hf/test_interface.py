"""The attention function: every argument a model may pass is honoured, harmless or refused."""

from __future__ import annotations

import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from checks import assert_close, error
from models import DECODERS, SEQUENCE_MODELS, Family, left_padded, named, supported, tokens
from torch import Tensor

from hf_flash_two import AttentionMask
from hf_flash_two.hf import compat, interface
from hf_flash_two.hf.interface import attention_forward
from hf_flash_two.hf.mask_function import make_mask

HEADS, KEY_HEADS, D = 4, 2, 12


class Layer(torch.nn.Module):
    """As much of an attention layer as the function looks at."""

    def __init__(self, implementation: str = "flash_two", **attributes):
        super().__init__()
        self.config = SimpleNamespace(
            _attn_implementation=implementation, output_attentions=False, model_type="test"
        )
        for name, value in attributes.items():
            setattr(self, name, value)


def qkv(queries: int, keys: int | None = None, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    keys = queries if keys is None else keys
    return (
        torch.randn(batch, HEADS, queries, D),
        torch.randn(batch, KEY_HEADS, keys, D),
        torch.randn(batch, KEY_HEADS, keys, D + 4),
    )


def expected(query, key, value, visible=None, bias=None, scale=None, sinks=None) -> Tensor:
    """[B, Tq, H, Dv] in float64; the mask is given as a dense one."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1).nan_to_num()[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


def causal(queries: int, keys: int | None = None, window: int | None = None) -> Tensor:
    keys = queries if keys is None else keys
    ahead = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
    return (ahead <= 0) & (ahead > -(window or keys + 1))


def check(actual, wanted: Tensor) -> None:
    out, weights = actual
    assert weights is None and out.is_contiguous()
    assert_close(out.double(), wanted, 2e-6)


# Without a mask


@pytest.mark.parametrize("argument", [None, True, False])
@pytest.mark.parametrize("attribute", [None, True, False])
def test_causality_without_a_mask(attribute: bool | None, argument: bool | None) -> None:
    """The argument counts, else the layer's attribute, else causal."""
    layer = Layer() if attribute is None else Layer(is_causal=attribute)
    is_causal = argument if argument is not None else attribute is not False
    states = qkv(13)
    visible = causal(13) if is_causal else None
    check(attention_forward(layer, *states, None, is_causal=argument), expected(*states, visible))


def test_one_query_without_a_mask_sees_all_keys() -> None:
    states = qkv(1, 9)
    check(attention_forward(Layer(is_causal=True), *states, None), expected(*states))


@pytest.mark.parametrize("queries", [1, 13])
def test_window_without_a_mask(queries: int) -> None:
    states = qkv(queries, 13)
    out = attention_forward(Layer(), *states, None, sliding_window=4)
    check(out, expected(*states, causal(queries, 13, window=4)))


def test_bidirectional_window_without_a_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window=4 got no mask"):
        attention_forward(Layer(is_causal=False), *qkv(13), None, sliding_window=4)
    states = qkv(4)
    out = attention_forward(Layer(is_causal=False), *states, None, sliding_window=4)
    check(out, expected(*states))


def test_a_window_that_only_the_cache_keeps() -> None:
    layer, states = Layer(is_causal=False), qkv(13)
    layer.config.model_type = "diffusion_gemma_text"
    check(attention_forward(layer, *states, None, sliding_window=4), expected(*states))


def test_causal_queries_of_unknown_place_are_refused() -> None:
    with pytest.raises(ValueError, match="causal attention of 3 queries to 9 keys needs a mask"):
        attention_forward(Layer(), *qkv(3, 9), None)


def test_a_name_without_mask_function_is_refused() -> None:
    with pytest.raises(ValueError, match="without its mask function"):
        attention_forward(Layer("registered_by_hand"), *qkv(5), None)


def test_learned_queries_are_shared_by_the_batch() -> None:
    query, key, value = qkv(3, 9)
    out = attention_forward(Layer(is_causal=False), query[:1], key, value, None)
    check(out, expected(query[:1].expand(2, -1, -1, -1), key, value))


# With our mask


def test_a_mask_of_another_shape_is_refused() -> None:
    mask = make_mask(batch_size=2, q_length=5, kv_length=5)
    with pytest.raises(ValueError, match=r"made for \[5, 5\] queries and keys, .* 5 to 9"):
        attention_forward(Layer(), *qkv(5, 9), mask)


def test_a_mask_of_one_query_is_broadcast() -> None:
    keep = left_padded(2, 9, 3).bool()
    function = transformers.masking_utils.bidirectional_mask_function
    mask = make_mask(
        batch_size=2, q_length=1, kv_length=9, mask_function=function, attention_mask=keep
    )
    states = qkv(5, 9)
    out = attention_forward(Layer(), *states, mask)
    check(out, expected(*states, keep[:, None, None]))


def test_a_mask_that_hides_nothing_fits_other_lengths() -> None:
    """Eager has none there, and models hand on that of other tokens."""
    function = transformers.masking_utils.bidirectional_mask_function
    mask = make_mask(batch_size=2, q_length=9, kv_length=9, mask_function=function)
    states = qkv(5, 9)
    check(attention_forward(Layer(is_causal=False), *states, mask), expected(*states))


def test_a_causal_mask_contradicts_is_causal_false() -> None:
    mask = make_mask(batch_size=2, q_length=5, kv_length=5)
    with pytest.raises(ValueError, match="is_causal: False was passed"):
        attention_forward(Layer(is_causal=True), *qkv(5), mask, is_causal=False)


def test_some_families_leave_causality_to_the_mask() -> None:
    layer, states = Layer(is_causal=True), qkv(5)
    layer.config.model_type = "moonshine"
    mask = make_mask(batch_size=2, q_length=5, kv_length=5)
    check(attention_forward(layer, *states, mask, is_causal=False), expected(*states, causal(5)))


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_decoder_made_bidirectional(padded: bool, how: str) -> None:
    flash, eager = DECODERS[0].pair("flash_two")
    ids, mask = tokens(2, 12), left_padded(2, 12, 3)
    real = mask.bool()
    given = {"attention_mask": mask} if padded else {}
    causal_logits = eager(ids, **given).logits[real]
    if how == "config":
        flash.config.is_causal = eager.config.is_causal = False
    else:
        given["is_causal"] = False
    wanted = eager(ids, use_cache=False, **given).logits[real]
    assert error(wanted, causal_logits) > 1e-2
    assert_close(flash(ids, use_cache=False, **given).logits[real], wanted)


def test_an_unknown_kind_of_mask_is_refused() -> None:
    with pytest.raises(TypeError, match="expected None, a tensor or a mask of flash_two, got dict"):
        attention_forward(Layer(), *qkv(5), {"full_attention": None})


# Masks of the user


def user_masks() -> dict[str, Tensor]:
    causal_padded = causal(13).expand(2, 1, 13, 13) & left_padded(2, 13, 4).bool()[:, None, None]
    return {
        "causal and padded": causal_padded,
        "scattered": torch.rand(2, 1, 13, 13) > 0.4,
        "per head": torch.rand(2, HEADS, 13, 13) > 0.4,
        "shared by the batch": torch.rand(1, 1, 13, 13) > 0.4,
        "keys only": left_padded(2, 13, 4).bool()[:, None, None],
    }


@pytest.mark.parametrize("kind", user_masks())
def test_bool_mask(kind: str) -> None:
    visible, states = user_masks()[kind], qkv(13)
    check(attention_forward(Layer(), *states, visible), expected(*states, visible))


@pytest.mark.parametrize("hidden", ["smallest", "infinite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", user_masks())
def test_float_mask_of_zero_and_the_smallest_number(kind: str, dtype, hidden: str) -> None:
    visible, states = user_masks()[kind], qkv(13)
    low = torch.finfo(dtype).min if hidden == "smallest" else -torch.inf
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, low)
    seen = visible.any(-1, keepdim=True).expand(2, HEADS, 13, 1).transpose(1, 2)
    wanted = expected(*states, visible) * seen
    out, _ = attention_forward(Layer(), *states, mask)
    # Of a row that sees nothing the smallest number makes an average.
    assert_close(out.double() * seen, wanted, 2e-6)


@pytest.mark.parametrize("shape", [(2, 1, 13, 13), (1, HEADS, 13, 13), (2, 1, 1, 13)], ids=str)
def test_float_mask_is_added_to_the_scores(shape: tuple[int, ...]) -> None:
    mask, states = torch.randn(shape), qkv(13)
    check(attention_forward(Layer(), *states, mask), expected(*states, bias=mask.double()))


def test_a_learned_float_mask_has_a_gradient() -> None:
    mask, states = torch.randn(1, 1, 13, 13, requires_grad=True), qkv(13)
    attention_forward(Layer(), *states, mask)[0].square().sum().backward()
    actual, mask.grad = mask.grad, None
    expected(*states, bias=mask.double()).square().sum().backward()
    assert_close(actual, mask.grad, 1e-5)


def test_a_float_mask_of_the_user_reaches_every_layer(kernel_calls) -> None:
    flash, eager = DECODERS[0].pair("flash_two")
    ids = tokens(2, 12)
    mask = torch.randn(2, 1, 12, 12).masked_fill(~causal(12), torch.finfo(torch.float32).min)
    assert_close(flash(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits)
    visible = mask > -0.5
    visible.diagonal(dim1=2, dim2=3).fill_(True)
    additive = torch.zeros(mask.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    wanted = eager(ids, attention_mask=additive).logits
    for given in (visible, additive):
        assert_close(flash(ids, attention_mask=given).logits, wanted)
    assert len(kernel_calls) == 3 * 2


def test_a_mask_with_runs_skips_tiles(monkeypatch) -> None:
    """A dense mask of one run per key is used as intervals, made once and shared by all layers."""
    made: list[AttentionMask] = []

    def recorded(*args, mask, **kwargs):
        made.append(mask)
        return flash_attention(*args, mask=mask, **kwargs)

    flash_attention = interface.flash_attention
    monkeypatch.setattr(interface, "flash_attention", recorded)
    model = DECODERS[0].build("flash_two")
    mask = causal(12).expand(2, 1, 12, 12).clone()
    model(tokens(2, 12), attention_mask=mask)
    assert made[0] is made[1] and made[0].dense is None
    mask[:, :, 5] = False
    model(tokens(2, 12), attention_mask=mask)
    assert not made[2].to_dense(12, 12)[:, :, 5].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_mask_of_keys_serves_any_number_of_queries(dtype: torch.dtype) -> None:
    keep = left_padded(2, 13, 4).bool()[:, None, None]
    low = torch.finfo(torch.float32).min
    mask = keep if dtype == torch.bool else torch.zeros(keep.shape).masked_fill(~keep, low)
    for queries in (1, 4, 2):
        states = qkv(queries, 13)
        visible = keep.expand(2, 1, queries, 13)
        check(attention_forward(Layer(), *states, mask), expected(*states, visible))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 13, 1), (2, HEADS, 1, 1)], ids=str)
def test_a_mask_broadcasts_over_keys(shape: tuple[int, ...]) -> None:
    visible, states = torch.ones(shape, dtype=torch.bool), qkv(13)
    visible[0, 0, -1] = len(shape) == shape.count(1)
    check(attention_forward(Layer(), *states, visible), expected(*states, visible))


@pytest.mark.parametrize("kind", user_masks())
def test_a_mask_is_not_kept_alive_nor_written_to(kind: str) -> None:
    mask = user_masks()[kind].clone()
    attention_forward(Layer(), *qkv(13), mask)
    assert not vars(mask)
    gone = weakref.ref(mask)
    del mask
    assert gone() is None


@pytest.mark.parametrize("kind", user_masks())
def test_a_mask_first_used_in_inference_mode_trains(kind: str) -> None:
    mask, states = user_masks()[kind], qkv(13)
    with torch.inference_mode():
        attention_forward(Layer(), *states, mask)
    states[0].requires_grad_()
    attention_forward(Layer(), *states, mask)[0].sum().backward()
    assert states[0].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_mask_of_two_dimensions(is_causal: bool, dtype: torch.dtype) -> None:
    keep, states = left_padded(2, 13, 4), qkv(13)
    visible = keep.bool()[:, None, None] & (causal(13) if is_causal else torch.tensor(True))
    out = attention_forward(Layer(is_causal=is_causal), *states, keep.to(dtype))
    check(out, expected(*states, visible))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 7), r"expected \[batch, keys\] = \[2, 5\], got \[2, 7\]"),
        (torch.ones(2, 5, 5), r"got \[2, 5, 5\]"),
        (torch.ones(2, 1, 5, 5, dtype=torch.int64), "expected bool .* got torch.int64"),
        (torch.ones(2, 1, 5, 7, dtype=torch.bool), r"\[2, 4, 5, 5\], got \[2, 1, 5, 7\]"),
        (torch.zeros(2, 3, 5, 5), r"\[2, 4, 5, 5\], got \[2, 3, 5, 5\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_forward(Layer(), *qkv(5), mask)


# Other arguments


def test_scaling_may_be_a_tensor_with_a_gradient() -> None:
    scaling, states = torch.tensor(0.3, requires_grad=True), qkv(7)
    out, _ = attention_forward(Layer(is_causal=False), *states, None, scaling)
    assert_close(out.double(), expected(*states, scale=0.3), 2e-6)
    out.square().sum().backward()
    assert scaling.grad is not None


def test_position_bias_adds_to_a_float_mask() -> None:
    bias, mask = torch.randn(1, HEADS, 9, 9, requires_grad=True), torch.randn(2, 1, 9, 9)
    states = qkv(9)
    out = attention_forward(Layer(), *states, mask, position_bias=bias)
    wanted = expected(*states, bias=(bias + mask).double())
    check(out, wanted)
    (actual,) = torch.autograd.grad(out[0].square().sum(), bias)
    (exact,) = torch.autograd.grad(wanted.square().sum(), bias)
    assert_close(actual, exact, 1e-5)


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_sinks_per_head(name: str) -> None:
    sinks, states = torch.randn(HEADS), qkv(9)
    wanted = expected(*states, causal(9), sinks=sinks.double()[:, None, None])
    check(attention_forward(Layer(), *states, None, **{name: sinks}), wanted)


def test_sinks_per_query() -> None:
    sinks = torch.randn(2, HEADS, 9, 1, requires_grad=True)
    states = qkv(9)
    out = attention_forward(Layer(), *states, None, sinks=sinks, output_attentions=True)
    wanted = expected(*states, causal(9), sinks=sinks.double())
    assert_close(out[0].double(), wanted, 2e-6)
    value = states[2].repeat_interleave(2, dim=1)
    assert_close((out[1] @ value).transpose(1, 2), out[0], 2e-6)
    (actual,) = torch.autograd.grad(out[0].square().sum(), sinks)
    (exact,) = torch.autograd.grad(wanted.square().sum(), sinks)
    assert_close(actual, exact, 1e-5)


def test_dropout_is_what_the_layer_passes() -> None:
    states = qkv(9)
    layer = Layer(is_causal=False)
    assert layer.training
    check(attention_forward(layer, *states, None, dropout=0.0), expected(*states))
    torch.manual_seed(3)
    dropped = attention_forward(layer, *states, None, dropout=0.5)[0]
    torch.manual_seed(3)
    assert torch.equal(dropped, attention_forward(layer, *states, None, dropout=0.5)[0])
    assert not torch.equal(dropped, attention_forward(layer, *states, None, dropout=0.5)[0])


def test_indices_choose_keys() -> None:
    states = qkv(9)
    mask = make_mask(batch_size=2, q_length=9, kv_length=9)
    indices = torch.rand(2, 9, 9).topk(4, dim=-1).indices.to(torch.int32)
    chosen = torch.zeros(2, 9, 9, dtype=torch.bool).scatter(-1, indices.long(), True)[:, None]
    out = attention_forward(Layer(), *states, mask, indices=indices)
    check(out, expected(*states, chosen & causal(9)))


def test_block_indices_choose_blocks_of_keys() -> None:
    states = qkv(9)
    mask = make_mask(batch_size=2, q_length=9, kv_length=9)
    layer = Layer(indexer=SimpleNamespace(block_size=4))
    blocks = torch.tensor([[[2, -1], [0, 2]]]).expand(2, 2, 2).repeat(1, 1, 5)
    blocks = blocks.reshape(2, 2, 5, 2).repeat_interleave(2, dim=2)[:, :, :9]
    chosen = torch.zeros(2, HEADS, 9, 9, dtype=torch.bool)
    for batch in range(2):
        for head in range(HEADS):
            for query in range(9):
                for block in blocks[batch, head // 2, query].tolist():
                    if block >= 0:
                        chosen[batch, head, query, 4 * block : 4 * block + 4] = True
    out = attention_forward(layer, *states, mask, block_indices=blocks)
    check(out, expected(*states, chosen & causal(9)))


def test_cu_seq_lens_of_different_lengths() -> None:
    """Queries of 2 and 3 tokens against 5 and 4 keys, laid end to end."""
    states = qkv(5, 9, batch=1)
    visible = torch.zeros(5, 9, dtype=torch.bool)
    visible[:2, :5] = visible[2:, 5:] = True
    out = attention_forward(
        Layer(is_causal=False),
        *states,
        None,
        cu_seq_lens_q=torch.tensor([0, 2, 5], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, 5, 9], dtype=torch.int32),
        max_length_q=3,
        max_length_k=5,
    )
    check(out, expected(*states, visible))


def test_cu_seq_lens_are_read_again_after_a_change() -> None:
    layer, states = Layer(is_causal=False), qkv(6, batch=1)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    first = attention_forward(layer, *states, None, **given)[0]
    assert torch.equal(first, attention_forward(layer, *states, None, **given)[0])
    ends[1] = 3
    visible = torch.block_diag(*[torch.ones(3, 3)] * 2).bool()
    check(attention_forward(layer, *states, None, **given), expected(*states, visible))
    given["cu_seq_lens_q"] = other = torch.tensor([0, 1, 6], dtype=torch.int32)
    visible = torch.block_diag(torch.ones(1, 3), torch.ones(5, 3)).bool()
    check(attention_forward(layer, *states, None, **given), expected(*states, visible))
    other[1] = 4
    visible = torch.block_diag(torch.ones(4, 3), torch.ones(2, 3)).bool()
    check(attention_forward(layer, *states, None, **given), expected(*states, visible))


def test_cu_seq_lens_need_a_batch_of_one() -> None:
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="batch of 1, got batch 2"):
        attention_forward(Layer(is_causal=False), *qkv(6), None, cu_seq_lens_q=ends)


def test_positions_that_restart_separate_images() -> None:
    """A tower without a mask, its patches numbered by row and column of a wider grid."""
    states = qkv(10, batch=1)
    position_ids = torch.tensor([[0, 1, 2, 8, 9, 10, 0, 1, 8, 9]])
    visible = torch.block_diag(torch.ones(6, 6), torch.ones(4, 4)).bool()
    out = attention_forward(Layer(is_causal=False), *states, None, position_ids=position_ids)
    check(out, expected(*states, visible))


@pytest.mark.parametrize("name", ["window_size", "learnable_sink"])
def test_arguments_that_another_attention_uses_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: other attention implementations .* use this"):
        attention_forward(Layer(), *qkv(5), None, **{name: torch.ones(5)})
    with pytest.raises(TypeError, match="attn_implementation='eager'"):
        DECODERS[0].build("flash_two")(tokens(1, 5), **{name: 2.0})


def test_an_argument_of_the_family_s_own_eager_attention_is_refused(monkeypatch) -> None:
    """By name, or looked up among the keyword arguments."""

    def eager_attention_forward(module, query, key, value, attention_mask, tilt=None, **kwargs):
        return kwargs.get("twist", 0)

    monkeypatch.setattr(
        sys.modules[__name__], "eager_attention_forward", eager_attention_forward, raising=False
    )
    compat._arguments_of_attention.cache_clear()
    for name in ("tilt", "twist"):
        with pytest.raises(TypeError, match=f"{name}: other attention implementations"):
            attention_forward(Layer(), *qkv(5), None, **{name: 1.0})
    monkeypatch.undo()
    compat._arguments_of_attention.cache_clear()


def test_arguments_that_no_attention_uses_pass() -> None:
    states = qkv(5)
    wanted = expected(*states, causal(5))
    check(attention_forward(Layer(), *states, None, head_mask=None, window_size=False), wanted)
    unused = {
        "use_cache": True, "num_items_in_batch": torch.tensor(3), "deterministic": True,
        "pixel_values": torch.ones(2), "decoder_input_ids": torch.ones(2), "max_length_q": 3,
    }  # fmt: skip
    check(attention_forward(Layer(), *states, None, **unused), wanted)


def test_an_argument_that_a_model_hands_through_to_attention() -> None:
    """DETR takes what it does not use, and so do its layers."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
    )
    states = []
    for name in ("eager", "flash_two"):
        torch.manual_seed(0)
        model = transformers.DetrModel._from_config(config, attn_implementation=name).eval()
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        unused = {"decoder_input_ids": torch.ones(1, 3, dtype=torch.long)}
        states.append(model(pixel_values=image, **unused).last_hidden_state)
    assert_close(states[1], states[0])


def test_a_mask_of_one_key_is_that_of_all() -> None:
    """BERT's language model, left bidirectional, makes its masks of the newest token alone."""
    inputs = tokens(2, 7)
    for missing in (0, 2):
        given = {"attention_mask": left_padded(2, 7, missing)}
        made = []
        for name in ("eager", "flash_two"):
            torch.manual_seed(0)
            config = transformers.BertConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=37, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            model = transformers.BertLMHeadModel._from_config(config, attn_implementation=name)
            made.append(model.eval().generate(inputs, **given, max_new_tokens=4, do_sample=False))
        assert torch.equal(*made)


def test_a_mask_with_rows_beyond_the_batch() -> None:
    """MusicGen is handed one for each of its code books."""
    config = transformers.MusicgenDecoderConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=32,
        num_codebooks=4, pad_token_id=99, bos_token_id=99, max_position_embeddings=64,
    )  # fmt: skip
    ids, logits = tokens(2 * 4, 9), []
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for name in ("eager", "flash_two"):
        torch.manual_seed(0)
        model = transformers.MusicgenForCausalLM._from_config(config, attn_implementation=name)
        logits.append(model.eval()(ids, attention_mask=mask).logits.unflatten(0, (2, 4)))
    assert_close(logits[1][0, :, 3:], logits[0][0, :, 3:])
    assert_close(logits[1][1], logits[0][1])


# Attention weights


@pytest.mark.parametrize(
    "family",
    named([f for f in DECODERS if f.name in ("llama", "mistral", "gemma2", "gpt-oss", "qwen3")]),
)
def test_attention_weights(family: Family) -> None:
    flash, eager = family.pair("flash_two")
    ids, mask = tokens(2, 12), left_padded(2, 12, 4)
    given = {"attention_mask": mask, "output_attentions": True}
    actual, wanted = flash(ids, **given), eager(ids, **given)
    assert len(actual.attentions) == len(wanted.attentions) == 2
    real = mask.bool()
    for ours, eagers in zip(actual.attentions, wanted.attentions, strict=True):
        assert_close(ours.transpose(1, 2)[real], eagers.transpose(1, 2)[real])
    assert_close(actual.logits[real], wanted.logits[real])
    assert flash(ids).attentions is None


def test_attention_weights_asked_for_by_the_config() -> None:
    config = DECODERS[0].config()
    config.output_attentions = True
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flash_two")
    weights = model(tokens(2, 7)).attentions
    assert [w.shape for w in weights] == [(2, 4, 7, 7)] * 2
    assert_close(weights[0].sum(-1), torch.ones(2, 4, 7), 1e-6)


def test_attention_weights_of_encoder_and_decoder() -> None:
    family = next(f for f in SEQUENCE_MODELS if f.name == "t5")
    supported(family)
    flash, eager = family.pair("flash_two")
    inputs = family.inputs()
    actual, wanted = (m(**inputs, output_attentions=True) for m in (flash, eager))
    encoder, decoder = (inputs[n].bool() for n in ("attention_mask", "decoder_attention_mask"))
    for name, real in {
        "encoder_attentions": encoder,
        "decoder_attentions": decoder,
        "cross_attentions": decoder,
    }.items():
        for ours, eagers in zip(actual[name], wanted[name], strict=True):
            assert_close(ours.transpose(1, 2)[real], eagers.transpose(1, 2)[real])


def test_a_row_that_sees_nothing_is_zero() -> None:
    states = qkv(5)
    visible = causal(5).expand(2, 1, 5, 5).clone()
    visible[0, 0, 3] = False
    out, weights = attention_forward(Layer(), *states, visible, output_attentions=True)
    assert not out[0, 3].any() and not weights[0, :, 3].any()
    assert out[1, 3].all() and weights.isfinite().all()
