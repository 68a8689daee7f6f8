"""Generation: eager's tokens with every cache and every way of decoding."""

from __future__ import annotations

import copy
import inspect
from itertools import product

import pytest
import torch
import transformers
from checks import assert_close
from models import (
    CACHE,
    DECODERS,
    MULTIMODAL,
    SEQUENCE_MODELS,
    VOCABULARY,
    Family,
    left_padded,
    named,
    right_padded,
    supported,
    tokens,
)
from packaging.version import Version
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    StaticCache,
    cache_utils,
    masking_utils,
)
from transformers.generation import configuration_utils

from hf_flash_two import patch

NEW = 9
VERSION = Version(transformers.__version__)


def bloom():
    return transformers.BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        n_layer=2,
        n_head=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )


FAMILIES = {f.name: f for f in DECODERS + SEQUENCE_MODELS}
FAMILIES["bloom"] = Family("bloom", "BloomForCausalLM", bloom)
WINDOWED = [FAMILIES[name] for name in ("llama", "mistral", "gemma3", "gpt-oss", "llama4")]
# As many as the random models must not pick one by chance: no token of theirs is this one.
END = VOCABULARY - 1

DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "samples": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "assisted": {"assistant_model": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "guidance": {"guidance_scale": 1.5},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no cache": {"use_cache": False},
}
SPECULATIVE = ("assisted", "prompt lookup")


def pair(family: Family, name: str = "flash_two") -> tuple[PreTrainedModel, PreTrainedModel]:
    supported(family)
    if family.name != "bloom":
        return family.pair(name)
    flash, eager = family.pair("eager")
    patch(flash)
    return flash, eager


def static_cache_of(family: Family) -> None:
    """Skip where Transformers' own masks for it fail, whatever the attention (5.17)."""
    arguments = [
        inspect.signature(getattr(masking_utils, name)).parameters
        for name in ("create_causal_mask", "create_chunked_causal_mask")
    ]
    takes = ["block_sequence_ids" in names for names in arguments]
    if family.name == "llama4" and takes == [True, False]:
        pytest.skip("`generate` with chunks and a static cache fails in this Transformers")


def generate(model, inputs: dict, **options) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})


def decoder_inputs(padding: str) -> dict[str, torch.Tensor]:
    masks = {"left": left_padded(2, 13, 4), "ones": torch.ones(2, 13, dtype=torch.long)}
    return {"input_ids": tokens(2, 13), "attention_mask": masks[padding]}


def prompts(family: Family, decoding: str = "greedy") -> dict[str, torch.Tensor]:
    """Speculation takes one prompt, and finds nothing to look up unless tokens come again."""
    if family in SEQUENCE_MODELS:
        inputs = {k: v for k, v in family.inputs().items() if not k.startswith("decoder")}
        return {k: v[:1] for k, v in inputs.items()} if decoding in SPECULATIVE else inputs
    if decoding in SPECULATIVE:
        return {"input_ids": tokens(1, 13, highest=9)}
    return decoder_inputs("left")


def refused(family: Family, decoding: str, cache: str | None) -> str | None:
    """What Transformers itself does not do, whatever the attention."""
    if cache == "static" and decoding in SPECULATIVE:
        return "a static cache cannot take tokens back"
    if cache == "static" and decoding == "no cache":
        return "no cache or a static one"
    if family in SEQUENCE_MODELS and decoding == "guidance":
        return "guidance needs a prompt of the decoder"
    if family in SEQUENCE_MODELS and decoding == "prefill in chunks":
        return "the encoder's mask would be cut to the decoder's chunk; eager lets padding in"
    return None


def decodings(families, caches) -> list:
    return [
        pytest.param(family, decoding, cache, id=f"{family.name}-{decoding}-{cache or 'dynamic'}")
        for family, decoding, cache in product(families, DECODING, caches)
        if not refused(family, decoding, cache)
    ]


@pytest.mark.parametrize("padding", ["left", "ones"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", named(DECODERS))
def test_decoder(family: Family, cache: str | None, padding: str, kernel_calls) -> None:
    if cache == "static":
        static_cache_of(family)
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
    if cache == "static":
        static_cache_of(family)
    flash, eager = family.pair("flash_two")
    inputs = decoder_inputs("left")
    actual = generate(flash, inputs, prefill_chunk_size=size, cache_implementation=cache)
    assert actual.tolist() == generate(eager, inputs).tolist()


def check_decoding(family: Family, decoding: str, cache: str | None, name: str) -> None:
    if cache == "static":
        static_cache_of(family)
    flash, eager = pair(family, name)
    inputs, options = prompts(family, decoding), dict(DECODING[decoding], eos_token_id=END)
    options["cache_implementation"] = cache
    if decoding in SPECULATIVE and family in WINDOWED[1:] and VERSION < Version("5.13"):
        pytest.skip("caches with windows take tokens back from transformers 5.13")
    results = []
    for model, implementation in ((flash, name), (eager, "eager")):
        if decoding == "assisted":
            # The same weights but for one layer: it guesses right now and then.
            own = "eager" if family.name == "bloom" else implementation
            options["assistant_model"] = family.build(own)
            wobble(options["assistant_model"])
        results.append(generate(model, inputs, **options).tolist())
    assert results[0] == results[1]


def wobble(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += 0.5 * embedding.std() * torch.randn(embedding.shape, generator=generator)


@pytest.mark.parametrize(
    ("family", "decoding", "cache"),
    decodings([FAMILIES[name] for name in ("mistral", "gpt-oss", "llama4", "bloom", "t5")], [None]),
)
def test_decoding(family: Family, decoding: str, cache: str | None) -> None:
    check_decoding(family, decoding, cache, "flash_two")


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["flash_two", "fa_two"])
@pytest.mark.parametrize(
    ("family", "decoding", "cache"), decodings(FAMILIES.values(), [None, "static"])
)
def test_every_decoding(family: Family, decoding: str, cache: str | None, name: str) -> None:
    check_decoding(family, decoding, cache, name)


def test_every_cache_implementation_has_a_test() -> None:
    """Paged ones are those of continuous batching, in test_serving.py."""
    known = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    known = {*known} - {*configuration_utils.DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS, "paged"}
    tested = {"dynamic", "static", "offloaded", "offloaded_static", "quantized"}
    # 5.4 has a name for a dynamic cache that keeps what has left its windows.
    assert known - {"dynamic_full"} == tested


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves a cache off a GPU")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", named(WINDOWED))
def test_offloaded_cache(family: Family, cache: str) -> None:
    if cache == "offloaded_static" and VERSION < Version("5.18"):
        pytest.skip("this cache ends the process under eager too, or finds nothing to offload")
    flash, eager = (model.cuda() for model in family.pair("flash_two"))
    inputs = {name: tensor.cuda() for name, tensor in decoder_inputs("left").items()}
    actual = generate(flash, inputs, cache_implementation=cache)
    assert actual.tolist() == generate(eager, inputs).tolist()


@pytest.mark.parametrize(
    ("backend", "package", "settings"),
    [
        ("fp8", None, {}),
        ("quanto", "optimum.quanto", {"nbits": 4}),
        ("hqq", "hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1}),
    ],
    ids=["fp8", "quanto", "hqq"],
)
@pytest.mark.parametrize("decoding", ["greedy", "beams"])
@pytest.mark.parametrize("family", named([FAMILIES["llama"], FAMILIES["qwen3"]]))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantized_cache(
    family: Family, decoding: str, backend: str, package: str | None, settings: dict
) -> None:
    """Eager's tokens with the same cache. Transformers has it for models without windows only."""
    if package is not None:
        pytest.importorskip(package, reason="the extra quantized-cache installs it")
    elif not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this Transformers has no cache in fp8")
    flash, eager = family.pair("flash_two")
    config = {"backend": backend, **settings}
    if package is not None:
        config |= {"q_group_size": 24, "residual_length": 8}
    options = {"cache_implementation": "quantized", "cache_config": config, **DECODING[decoding]}
    made = [generate(model, decoder_inputs("left"), **options) for model in (flash, eager)]
    assert made[0].tolist() == made[1].tolist()


def caches_of(model: PreTrainedModel) -> dict:
    return {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=48),
    }


@pytest.mark.parametrize("family", named(WINDOWED + [FAMILIES["deepseek-v3"], FAMILIES["bloom"]]))
def test_a_conversation_continues(family: Family) -> None:
    """Several tokens at once after a filled cache, past the window and the chunk."""
    flash, eager = pair(family)
    ids, mask = tokens(2, 25), left_padded(2, 25, 3)
    expected = eager(ids, attention_mask=mask).logits
    for kind, cache in caches_of(flash).items():
        if kind == "static" and family.name == "bloom":
            continue  # its slopes go with the mask, which would have to be as long as the cache
        at = 0
        for stop in (6, 7, 16, 25):
            logits = flash(ids[:, at:stop], attention_mask=mask[:, :stop], **{CACHE: cache}).logits
            real = mask[:, at:stop].bool()
            assert_close(logits[real], expected[:, at:stop][real])
            at = stop


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", named(WINDOWED + [FAMILIES["bloom"]]))
def test_turns_of_a_chat_share_a_cache(family: Family, kind: str) -> None:
    """`generate` gets back the cache it filled; eager computes every turn from scratch."""
    if kind == "static":
        static_cache_of(family)
    flash, eager = pair(family)
    cache = caches_of(flash)[kind]
    ids, mask = tokens(2, 7), left_padded(2, 7, 2)
    for turn in range(3):
        inputs = {"input_ids": ids, "attention_mask": mask}
        expected = generate(eager, inputs, max_new_tokens=5)
        ids = generate(flash, inputs, max_new_tokens=5, **{CACHE: cache})
        assert ids.tolist() == expected.tolist(), f"turn {turn}"
        ids = torch.cat([ids, tokens(2, 4, seed=turn)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 9), value=1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", named(WINDOWED + [FAMILIES["bloom"]]))
def test_prompts_continue_a_copied_cache(family: Family, kind: str) -> None:
    """A system prompt is computed once; the attention mask is longer than what is new."""
    if kind == "static":
        static_cache_of(family)
    flash, eager = pair(family)
    start, mask = tokens(2, 11), left_padded(2, 11, 3)
    cache = caches_of(flash)[kind]
    prompt = {"input_ids": start, "attention_mask": mask}
    generate(flash, prompt, max_new_tokens=1, **{CACHE: cache})
    assert cache.get_seq_length() == 11
    for seed, length in ((1, 1), (2, 6)):
        ids = torch.cat([start, tokens(2, length, seed=seed)], dim=1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(mask, (0, length), value=1),
        }
        made = generate(flash, inputs, **{CACHE: copy.deepcopy(cache)})
        assert made.tolist() == generate(eager, inputs).tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama4", "deepseek-v3", "bloom"])
def test_a_cache_loses_its_last_tokens(name: str) -> None:
    """As speculation does it: below the window and the chunk, so that nothing old is missing."""
    longer = {"sliding_window": 15} if name == "gemma2" else {}
    longer |= {"attention_chunk_size": 15} if name == "llama4" else {}
    if name == "bloom":
        flash, eager = pair(FAMILIES[name])
    else:
        flash, eager = FAMILIES[name].pair("flash_two", **longer)
    ids, mask = tokens(2, 12), left_padded(2, 12, 3)
    other = torch.cat([ids[:, :8], tokens(2, 17, seed=1)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 13), value=1)
    cache = DynamicCache(config=flash.config)
    with torch.no_grad():
        flash(ids, attention_mask=mask[:, :12], **{CACHE: cache})
        cache.crop(-4)
        assert cache.get_seq_length() == 8
        logits = flash(other[:, 8:], attention_mask=mask, **{CACHE: cache}).logits
        expected = eager(other, attention_mask=mask).logits
    assert_close(logits, expected[:, 8:])


@pytest.mark.parametrize("family", named(WINDOWED + [FAMILIES["bloom"]]))
def test_a_cache_changes_its_batch(family: Family) -> None:
    flash, eager = pair(family)
    ids, mask = tokens(2, 15), left_padded(2, 15, 3)
    cache = DynamicCache(config=flash.config)
    with torch.no_grad():
        flash(ids[:, :11], attention_mask=mask[:, :11], **{CACHE: cache})
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([4, 0, 3]))
        rows = torch.tensor([1, 0, 1])
        cache.reorder_cache(torch.tensor([2, 1, 0]))
        logits = flash(ids[rows, 11:], attention_mask=mask[rows], **{CACHE: cache}).logits
        assert_close(logits, eager(ids, attention_mask=mask).logits[rows, 11:])


@pytest.mark.parametrize("family", named(SEQUENCE_MODELS))
def test_a_decoder_continues_with_both_its_caches(family: Family) -> None:
    flash, eager = pair(family)
    inputs = family.inputs()
    ids = tokens(2, 11, seed=1)
    inputs["decoder_input_ids"] = ids
    inputs.pop("decoder_attention_mask", None)
    expected = eager(**inputs).logits
    config = flash.config
    for own, cross in (
        (DynamicCache(config=config), DynamicCache(config=config)),
        (
            StaticCache(config=config, max_cache_len=16),
            StaticCache(config=config, max_cache_len=37),
        ),
    ):
        if isinstance(cross, StaticCache) and family.name != "whisper":
            cross = StaticCache(config=config, max_cache_len=19)
        cache = EncoderDecoderCache(own, cross)
        encoded, at = None, 0
        for stop in (4, 5, 11):
            step = dict(inputs, decoder_input_ids=ids[:, at:stop], **{CACHE: cache})
            if encoded is not None:
                step["encoder_outputs"] = encoded
            out = flash(**step)
            encoded = (out.encoder_last_hidden_state,)
            assert_close(out.logits, expected[:, at:stop])
            at = stop


@pytest.mark.parametrize("family", named([FAMILIES["llama"], FAMILIES["qwen3"]]))
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
