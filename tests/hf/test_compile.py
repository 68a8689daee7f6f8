"""torch.compile: one graph, none more for another length or token."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close, assert_same_gradients, backward
from models import (
    DECODERS,
    ENCODERS,
    SEQUENCE_MODELS,
    Family,
    left_padded,
    named,
    supported,
    tokens,
)
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

FAMILIES = {f.name: f for f in DECODERS + ENCODERS + SEQUENCE_MODELS}
LENGTHS = (19, 33)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def packed_positions(length: int) -> torch.Tensor:
    parts = (7, 1, length - 8)
    return torch.cat([torch.arange(n) for n in parts])[None].expand(2, -1)


@pytest.mark.parametrize(
    ("name", "batch", "backend"),
    [
        ("llama", "plain", "eager"),
        ("llama", "packed with ones", "aot_eager"),
        ("gemma3", "padded", "eager"),
        ("gemma3", "packed with ones", "eager"),
        ("gpt-oss", "packed", "eager"),
        ("llama4", "packed with ones", "eager"),
    ],
)
def test_training_in_one_graph(name: str, batch: str, backend: str) -> None:
    """With the cache that a forward makes by default, which hides packing from Transformers."""
    one_layer = {"num_hidden_layers": 1} if name == "llama" else {}
    flash, eager = (FAMILIES[name].build("flash_two", **one_layer) for _ in range(2))
    compiled = torch.compile(flash, fullgraph=True, dynamic=True, backend=backend)
    for length in LENGTHS:
        ids, mask = tokens(2, length), left_padded(2, length, 5)
        given = {
            "plain": {},
            "padded": {"attention_mask": mask},
            "packed": {"position_ids": packed_positions(length)},
            "packed with ones": {
                "position_ids": packed_positions(length),
                "attention_mask": torch.ones_like(ids),
            },
        }[batch]
        real = mask.bool() if batch == "padded" else torch.ones_like(mask, dtype=torch.bool)
        logits = [model(ids, **given).logits[real] for model in (compiled, eager)]
        assert_close(*logits)
        for output in logits:
            backward(output)
    assert graphs() == 1
    assert_same_gradients(flash, eager)


@pytest.mark.parametrize("family", named([FAMILIES["bert"], FAMILIES["t5"]]))
def test_encoders_in_one_graph(family: Family) -> None:
    supported(family)
    model, eager = family.pair("flash_two")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = family.inputs()
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    with torch.no_grad():
        assert_close(compiled(**inputs).logits[mask], eager(**inputs).logits[mask])
    assert graphs() == 1


def test_a_masked_user_function_in_one_graph() -> None:
    """What the compiler cannot look into stays exact, as a dense mask."""
    from transformers.masking_utils import create_causal_mask

    model, eager = DECODERS[0].pair("flash_two")

    def window_of_images(batch, head, query, key):
        return (query - key).abs() < 3

    def run(m, ids, mask):
        embeds = m.get_input_embeddings()(ids)
        ready = create_causal_mask(
            config=m.config,
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=None,
            or_mask_function=window_of_images,
        )
        return m(inputs_embeds=embeds, attention_mask=ready).logits

    ids, mask = tokens(2, 19), left_padded(2, 19, 5)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(model, ids, mask)[mask.bool()], run(eager, ids, mask)[mask.bool()])


def test_decoding_with_a_growing_cache_in_two_graphs() -> None:
    """One for the first token, one for every length after it."""
    flash, eager = DECODERS[0].pair("flash_two")
    compiled = torch.compile(flash, fullgraph=True, backend="eager")
    ids = tokens(2, 20)
    expected = eager(ids).logits
    cache = DynamicCache(config=flash.config)
    with torch.no_grad():
        flash(ids[:, :8], past_key_values=cache)
        for at in range(8, 20):
            logits = compiled(ids[:, at : at + 1], past_key_values=cache).logits
            assert_close(logits[:, 0], expected[:, at])
    assert graphs() <= 2


def graphs_of_generate(model, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[int, list]:
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # generate compiles by itself only on accelerators
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=14,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
    )
    return graphs(), made.tolist()


@pytest.mark.parametrize(("name", "padded"), [("llama", False), ("gemma3", True)])
def test_generate_with_a_static_cache(name: str, padded: bool) -> None:
    """As many graphs as a layer's cache has states: filling, and for a window also full."""
    flash, eager = FAMILIES[name].pair("flash_two")
    ids = tokens(2, 11)
    mask = left_padded(2, 11, 4) if padded else torch.ones_like(ids)
    count, made = graphs_of_generate(flash, ids, mask)
    assert count == (1 if name == "llama" else 2)
    expected = eager.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False)
    assert made == expected.tolist()
