"""Training as people do it: autocast, gradient checkpointing, dropout, adapters."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close, backward, error
from helpers import assert_same_gradients
from models import DECODERS, SEQUENCE_MODELS, Family, left_padded, named, supported, tokens

from hf_flash_two.hf import interface

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")

SOME = [f for f in DECODERS if f.name in ("llama", "qwen3", "gemma3", "gpt-oss", "llama4")]


# No experts: which of them a token goes to may change with rounding.
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(
    "family", named([f for f in DECODERS if f.name in ("llama", "qwen3", "gemma2", "gemma3")])
)
def test_bfloat16_autocast(family: Family, padded: bool, monkeypatch) -> None:
    """The error against float32 stays that of eager; the attention gets mixed dtypes."""
    dtypes = set()

    def recorded(query, key, value, **kwargs):
        dtypes.add((query.dtype, key.dtype, value.dtype))
        return flash_attention(query, key, value, **kwargs)

    flash_attention = interface.flash_attention
    monkeypatch.setattr(interface, "flash_attention", recorded)
    flash, eager = family.pair("flash_two")
    exact = family.build("eager")
    ids = tokens(2, 25)
    mask = left_padded(2, 25, 5) if padded else torch.ones_like(ids)
    given, real = {"attention_mask": mask, "use_cache": False}, mask.bool()
    truth = exact(ids, **given).logits[real]
    backward(truth)
    errors = []
    for model in (flash, eager):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, **given).logits[real]
        backward(logits)
        errors.append(rms(logits.float() - truth) / rms(truth))
    assert errors[0] <= 1.3 * errors[1] < 0.3
    assert dtypes == {(torch.float32, torch.float32, torch.bfloat16)}
    wanted = {n: p.grad for n, p in exact.named_parameters()}
    for name, parameter in eager.named_parameters():
        own = rms(dict(flash.named_parameters())[name].grad - wanted[name])
        limit = rms(parameter.grad - wanted[name])
        assert own <= 1.6 * limit + 1e-6 * rms(wanted[name]), name


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype: torch.dtype) -> None:
    flash, eager = DECODERS[0].pair("flash_two")
    ids, mask = tokens(2, 25), left_padded(2, 25, 5)
    real = mask.bool()
    truth = eager(ids, attention_mask=mask).logits[real]
    actual, wanted = (m.to(dtype)(ids, attention_mask=mask).logits[real] for m in (flash, eager))
    assert actual.dtype == dtype
    assert rms(actual - truth) <= 1.3 * rms(wanted - truth)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", named(SOME))
def test_gradient_checkpointing(
    family: Family, packed: bool, reentrant: bool, kernel_calls
) -> None:
    """The recomputed forward is the first one, so gradients are the same to the bit."""
    plain, checkpointed = family.build("flash_two").train(), family.build("flash_two").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids = tokens(2, 25)
    if packed:
        position_ids = torch.cat([torch.arange(9), torch.arange(16)])[None]
        given = {"position_ids": position_ids, "use_cache": False}
    else:
        given = {"attention_mask": left_padded(2, 25, 5), "use_cache": False}
    backward(plain(ids, **given).logits)
    once = len(kernel_calls)
    backward(checkpointed(ids, **given).logits)
    assert len(kernel_calls) - once == 2 * once == 2 * family.layers
    assert_same_gradients(checkpointed, plain, limit=0.0)


def test_checkpointed_encoder_and_decoder() -> None:
    family = next(f for f in SEQUENCE_MODELS if f.name == "t5")
    supported(family)
    plain, checkpointed = family.build("flash_two").train(), family.build("flash_two").train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        backward(model(**family.inputs(), use_cache=False).logits)
    # Under checkpointing T5 asks for the gradient of a bias in cross attention as well, which on a
    # CPU another kernel computes.
    assert_same_gradients(checkpointed, plain, limit=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_dropout_is_replayed_by_checkpointing(reentrant: bool) -> None:
    plain = DECODERS[0].build("flash_two", attention_dropout=0.4).train()
    checkpointed = DECODERS[0].build("flash_two", attention_dropout=0.4).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ids, logits = tokens(2, 25), []
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        logits.append(model(ids, use_cache=False).logits)
        backward(logits[-1])
    assert torch.equal(*logits)
    assert_same_gradients(checkpointed, plain, limit=0.0)
    assert error(plain(ids).logits, logits[0]) > 1e-2
    assert_close(plain.eval()(ids).logits, DECODERS[0].build("eager")(ids).logits)


def test_adapters_alone_are_trained() -> None:
    """With frozen inputs the values have a gradient and queries may have none."""
    flash, eager = DECODERS[0].pair("flash_two")
    for model in (flash, eager):
        model.requires_grad_(False)
        model.model.layers[1].self_attn.v_proj.weight.requires_grad_(True)
        backward(model(tokens(2, 12), attention_mask=left_padded(2, 12, 3)).logits[1])
    assert_same_gradients(flash, eager)
