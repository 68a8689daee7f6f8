"""Whole models against eager from the same weights: outputs of real tokens, every gradient."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close, backward, error
from helpers import LargestTensor, assert_same_gradients
from models import (
    DECODERS,
    ENCODERS,
    MULTIMODAL,
    SEQUENCE_MODELS,
    Family,
    left_padded,
    named,
    right_padded,
    supported,
    tokens,
)

IMPLEMENTATIONS = ["flash_two", "fa_two"]
LENGTH = 21


def attention_masks() -> dict[str, torch.Tensor | None]:
    hole = torch.ones(2, LENGTH, dtype=torch.long)
    hole[1, 8:11] = 0
    return {
        "no mask": None,
        "ones": torch.ones(2, LENGTH, dtype=torch.long),
        "left padding": left_padded(2, LENGTH, 6),
        "right padding": right_padded(2, LENGTH, 6),
        "a hole": hole,
    }


@pytest.mark.parametrize("padding", attention_masks())
@pytest.mark.parametrize("family", named(DECODERS))
def test_decoder_equals_eager(family: Family, padding: str, kernel_calls) -> None:
    check_decoder(family, "flash_two", attention_masks()[padding], kernel_calls)


@pytest.mark.parametrize("family", named(DECODERS))
def test_decoder_equals_eager_without_the_shim(family: Family, kernel_calls) -> None:
    check_decoder(family, "fa_two", left_padded(2, LENGTH, 6), kernel_calls)


@pytest.mark.parametrize("family", named(DECODERS))
def test_memory_is_linear(family: Family) -> None:
    """In a step with padding nothing is made that has an entry for each pair of tokens."""
    flash = family.build("flash_two")
    length = 1200
    with LargestTensor() as largest:
        flash(tokens(2, length), attention_mask=left_padded(2, length, 500)).logits.sum().backward()
    assert largest.elements < length * length


def check_decoder(family: Family, implementation: str, mask, kernel_calls) -> None:
    flash, eager = family.pair(implementation)
    assert flash.config._attn_implementation == implementation
    ids = tokens(2, LENGTH)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    actual = flash(ids, attention_mask=mask).logits[real]
    assert len(kernel_calls) == family.layers
    expected = eager(ids, attention_mask=mask).logits[real]
    assert len(kernel_calls) == family.layers
    assert_close(actual, expected)
    if (real[:, 1:] > real[:, :-1]).any():  # causality hides what stands behind
        assert error(flash(ids).logits[real], expected) > 1e-2, "the mask makes no difference"
    backward(actual)
    backward(expected)
    assert_same_gradients(flash, eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", named(ENCODERS + SEQUENCE_MODELS + MULTIMODAL))
def test_model_equals_eager(family: Family, implementation: str, kernel_calls) -> None:
    supported(family)
    flash, eager = family.pair(implementation)
    inputs = family.inputs()
    actual, expected = flash(**inputs), eager(**inputs)
    real = real_tokens(inputs)
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if name in expected:
            actual, expected = actual[name], expected[name]
            break
    if real is not None and expected.dim() == 3:
        actual, expected = actual[real], expected[real]
    assert_close(actual, expected)
    backward(actual)
    backward(expected)
    assert_same_gradients(flash, eager)
    # Without "flash" in the name a vision tower with cu_seqlens calls once per window.
    one_call_per_layer = implementation == "flash_two" or family.name != "qwen2.5-vl"
    assert len(kernel_calls) == family.layers or not one_call_per_layer


def real_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    if "decoder_input_ids" in inputs:
        mask = inputs.get("decoder_attention_mask")
    else:
        mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def test_vision_windows_take_one_call(kernel_calls) -> None:
    """Two images of 48 and 32 patches, in windows of 16, go through the tower as one sequence."""
    family = next(f for f in MULTIMODAL if f.name == "qwen2.5-vl")
    model = family.build("flash_two")
    inputs = family.inputs()
    model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    assert [call.query for call in kernel_calls] == [(1, 4, 80, 12)] * 2


def test_gemma3_images_see_themselves_across_the_window() -> None:
    """An image token that the causal window alone would hide makes a difference."""
    family = next(f for f in MULTIMODAL if f.name == "gemma3-images")
    model = family.build("flash_two")
    inputs = family.inputs()
    with torch.no_grad():
        with_images = model(**inputs).logits
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
        without = model(**inputs).logits
    assert error(without[0, 3], with_images[0, 3]) > 1e-2
    assert_close(without[0, 2], with_images[0, 2])
