"""Greedy generation: eager's tokens with every cache, prefill in chunks, serving."""

from __future__ import annotations

import pytest
import torch
import transformers
from checks import assert_close
from models import (
    DECODERS,
    MULTIMODAL,
    SEQUENCE_MODELS,
    Family,
    left_padded,
    named,
    right_padded,
    supported,
    tokens,
)
from packaging.version import Version
from transformers import DynamicCache, GenerationConfig, StaticCache

NEW = 9
WINDOWED = [f for f in DECODERS if f.name in ("llama", "mistral", "gemma3", "gpt-oss", "llama4")]


def generate(model, inputs: dict, **options) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)


def decoder_inputs(padding: str) -> dict[str, torch.Tensor]:
    masks = {"left": left_padded(2, 13, 4), "ones": torch.ones(2, 13, dtype=torch.long)}
    return {"input_ids": tokens(2, 13), "attention_mask": masks[padding]}


@pytest.mark.parametrize("padding", ["left", "ones"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", named(DECODERS))
def test_decoder(family: Family, cache: str | None, padding: str, kernel_calls) -> None:
    flash, eager = family.pair("flash_two")
    inputs = decoder_inputs(padding)
    expected = generate(eager, inputs)
    assert len(set(expected[:, 13:].flatten().tolist())) > 3, "the tokens tell nothing"
    assert not kernel_calls
    actual = generate(flash, inputs, cache_implementation=cache)
    assert len(kernel_calls) == family.layers * NEW
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", named(SEQUENCE_MODELS + MULTIMODAL))
def test_other_models(family: Family, cache: str | None) -> None:
    supported(family)
    flash, eager = family.pair("flash_two")
    inputs = {k: v for k, v in family.inputs().items() if not k.startswith("decoder")}
    actual = generate(flash, inputs, cache_implementation=cache)
    assert actual.tolist() == generate(eager, inputs).tolist()


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("family", named(WINDOWED))
def test_prefill_in_chunks(family: Family, size: int, cache: str | None) -> None:
    flash, eager = family.pair("flash_two")
    inputs = decoder_inputs("left")
    actual = generate(flash, inputs, prefill_chunk_size=size, cache_implementation=cache)
    assert actual.tolist() == generate(eager, inputs).tolist()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"prompt_lookup_num_tokens": 3, "eos_token_id": 88}, id="prompt lookup"),
        pytest.param({"use_cache": False}, id="no cache"),
    ],
)
@pytest.mark.parametrize("family", named(WINDOWED))
def test_decoding(family: Family, options: dict) -> None:
    if "prompt_lookup_num_tokens" in options and family.name != "llama":
        pytest.skip("a cache with windows cannot take tokens back")
    flash, eager = family.pair("flash_two")
    inputs = {"input_ids": tokens(1, 13, highest=9)}
    assert (
        generate(flash, inputs, **options).tolist() == generate(eager, inputs, **options).tolist()
    )


def test_assisted_decoding() -> None:
    flash, eager = DECODERS[0].pair("flash_two")
    assistant = DECODERS[0].build("flash_two", seed=1)
    inputs = {"input_ids": tokens(1, 13)}
    actual = generate(flash, inputs, assistant_model=assistant)
    assert actual.tolist() == generate(eager, inputs).tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves a cache off a GPU")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", named(WINDOWED))
def test_offloaded_cache(family: Family, cache: str) -> None:
    flash, eager = (model.cuda() for model in family.pair("flash_two"))
    inputs = {name: tensor.cuda() for name, tensor in decoder_inputs("left").items()}
    actual = generate(flash, inputs, cache_implementation=cache)
    assert actual.tolist() == generate(eager, inputs).tolist()


@pytest.mark.parametrize("family", named(WINDOWED))
def test_a_conversation_continues(family: Family) -> None:
    """Several tokens at once after a filled cache, past the window and the chunk."""
    flash, eager = family.pair("flash_two")
    ids, mask = tokens(2, 25), left_padded(2, 25, 3)
    expected = eager(ids, attention_mask=mask).logits
    caches = {"dynamic": DynamicCache(config=flash.config)}
    caches["static"] = StaticCache(config=flash.config, max_cache_len=40)
    for cache in caches.values():
        at = 0
        for stop in (6, 7, 16, 25):
            logits = flash(
                ids[:, at:stop], attention_mask=mask[:, :stop], past_key_values=cache
            ).logits
            real = mask[:, at:stop].bool()
            assert_close(logits[real], expected[:, at:stop][real])
            at = stop


@pytest.mark.parametrize("family", named([f for f in DECODERS if f.name in ("llama", "qwen3")]))
def test_right_padding_in_a_batch(family: Family) -> None:
    """The padding lies between the prompt and what follows, so it must stay hidden in the cache.

    Without a window: in one, the last prompt token sees nothing, of which eager makes an average.
    """
    flash, eager = family.pair("flash_two")
    ids, mask = tokens(2, 13), right_padded(2, 13, 5)
    actual, expected = (
        generate(m, {"input_ids": ids, "attention_mask": mask}) for m in (flash, eager)
    )
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("family", named([f for f in WINDOWED if f.name in ("llama", "mistral")]))
def test_continuous_batching(family: Family) -> None:
    if Version(transformers.__version__) < Version("5.19"):
        pytest.skip("continuous batching calls the ordinary attention function from 5.19")
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    flash, eager = family.pair("flash_two")
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 17, 9)]
    config = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    outputs = flash.generate_batch(
        prompts, generation_config=config, continuous_batching_config=small
    )
    made = sorted((r.prompt_ids, r.generated_tokens) for r in outputs.values())
    expected = sorted(
        (p, generate(eager, {"input_ids": torch.tensor([p])})[0, len(p) :].tolist())
        for p in prompts
    )
    assert made == expected
