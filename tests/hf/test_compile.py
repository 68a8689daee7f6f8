"""torch.compile: one graph, none more for another length or token."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close, backward
from helpers import assert_same_gradients
from models import (
    CACHE,
    DECODERS,
    ENCODERS,
    SEQUENCE_MODELS,
    Family,
    left_padded,
    named,
    supported,
    tokens,
)
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from transformers import Cache, CompileConfig, DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

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
    try:
        torch.compile(eager, fullgraph=True, backend="eager")(**inputs)
    except Unsupported:
        pytest.skip("it is no one graph under eager either")
    torch._dynamo.reset()
    counters.clear()
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
            **{CACHE: None},
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
        flash(ids[:, :8], **{CACHE: cache})
        for at in range(8, 20):
            logits = compiled(ids[:, at : at + 1], **{CACHE: cache}).logits
            assert_close(logits[:, 0], expected[:, at])
    assert graphs() <= 2


def decode(step, model, cache: StaticCache, ids, mask, start: int, stop: int) -> list:
    """Logits of one token after another; the mask is as long as what has been seen."""
    made = []
    for at in range(start, stop):
        position_ids = (mask.cumsum(1) - 1)[:, at : at + 1]
        full = torch.nn.functional.pad(mask[:, : at + 1], (0, 32 - at - 1))
        masks = create_masks_for_generate(
            config=model.config,
            inputs_embeds=torch.empty(2, 1, 0),
            attention_mask=full,
            **{CACHE: cache},
            position_ids=position_ids,
        )
        with torch.no_grad():
            made.append(
                step(
                    ids[:, at : at + 1],
                    attention_mask=masks,
                    position_ids=position_ids,
                    **{CACHE: cache},
                ).logits[:, 0]
            )
    return made


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "aot_eager"),
        ("gpt-oss", "eager"),
        pytest.param("mistral", "aot_eager", marks=pytest.mark.sweep),
        pytest.param("llama4", "eager", marks=pytest.mark.sweep),
        pytest.param("deepseek-v3", "eager", marks=pytest.mark.sweep),
        pytest.param("llama", "inductor", marks=pytest.mark.sweep),
    ],
)
def test_no_token_of_a_static_cache_is_compiled_again(name: str, backend: str) -> None:
    """After the first token, and the first past a window, anything new to compile is an error."""
    flash, eager = FAMILIES[name].pair("flash_two")
    ids, mask = tokens(2, 20), left_padded(2, 20, 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = StaticCache(config=flash.config, max_cache_len=32)
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask, position_ids=positions).logits
        flash(
            ids[:, :4], attention_mask=mask[:, :4], position_ids=positions[:, :4],
            **{CACHE: cache},
        )  # fmt: skip
    step = torch.compile(flash, fullgraph=True, backend=backend)
    made = decode(step, flash, cache, ids, mask, 4, 9)
    with torch.compiler.set_stance("fail_on_recompile"):
        made += decode(step, flash, cache, ids, mask, 9, 20)
    # As with eager attention: one more for each of window and chunk, once they are full.
    assert graphs() == {"llama": 1, "deepseek-v3": 1, "llama4": 3}.get(name, 2)
    for at, logits in enumerate(made, start=4):
        assert_close(logits, expected[:, at])


def graphs_of_generate(model, inputs: dict, new: int) -> tuple[int, list]:
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # generate compiles by itself only on accelerators
    made = model.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
    )
    return graphs(), made.tolist()


def check_generate(name: str, implementation: str = "flash_two") -> None:
    """As many graphs as a layer's cache has states: filling, and for a window also full."""
    family = FAMILIES[name]
    supported(family)
    flash, eager = family.pair(implementation)
    if family in SEQUENCE_MODELS:
        inputs = {k: v for k, v in family.inputs().items() if not k.startswith("decoder")}
    else:
        inputs = {"input_ids": tokens(2, 11), "attention_mask": left_padded(2, 11, 4)}
    count, made = graphs_of_generate(flash, inputs, 14)
    if getattr(flash.config, "sliding_window", None):
        # Where a static cache tells its place as a number, the last one looks like a growing cache.
        assert count == (2 if hasattr(Cache, "get_query_offset") else 3)
    else:
        assert count == 1
    expected = eager.generate(**inputs, max_new_tokens=14, do_sample=False)
    assert made == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "t5", "whisper"])
def test_generate_with_a_static_cache(name: str) -> None:
    check_generate(name)


@pytest.mark.sweep
@pytest.mark.parametrize("implementation", ["flash_two", "fa_two"])
@pytest.mark.parametrize("name", [f.name for f in DECODERS + SEQUENCE_MODELS if f.name != "llama4"])
def test_every_generate_with_a_static_cache(name: str, implementation: str) -> None:
    """But Llama 4, which `generate` does not compile."""
    check_generate(name, implementation)


def test_more_tokens_make_no_more_graphs() -> None:
    flash = FAMILIES["llama"].build("flash_two")
    inputs = {"input_ids": tokens(2, 11)}
    counts = [graphs_of_generate(flash, inputs, new)[0] for new in (3, 14, 30)]
    assert counts == [1, 1, 1]


def test_generate_compiles_nothing_by_itself_on_a_cpu() -> None:
    flash = FAMILIES["llama"].build("flash_two")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    for config in (None, CompileConfig(backend="eager")):
        flash.generate(tokens(1, 7), compile_config=config, **options)
    assert graphs() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="generate compiles by itself on GPUs")
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "deepseek-v3", "t5"])
def test_generate_compiles_by_itself_on_a_gpu(name: str) -> None:
    """With Transformers' own settings, which capture CUDA graphs."""
    family = FAMILIES[name]
    flash, eager = (model.cuda() for model in family.pair("flash_two"))
    if family in SEQUENCE_MODELS:
        inputs = {k: v for k, v in family.inputs().items() if not k.startswith("decoder")}
    else:
        inputs = {"input_ids": tokens(2, 11), "attention_mask": left_padded(2, 11, 4)}
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    options = {"max_new_tokens": 14, "do_sample": False}
    expected = eager.generate(**inputs, **options)
    for _ in range(2):
        made = flash.generate(**inputs, **options, cache_implementation="static")
        assert made.tolist() == expected.tolist()
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.filterwarnings("ignore")  # of the tracer, about all that it looks at
def test_jit_trace_bakes_in_no_mask(restarts: bool) -> None:
    """Traced with a mask of ones and positions without documents, it takes others."""

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = DECODERS[0].build("flash_two")

        def forward(self, ids, mask, positions):
            given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
            return self.model(ids, **given).logits

    logits = Logits().eval()
    ids, ones = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    positions = torch.arange(24).repeat(2, 1)
    with torch.no_grad():
        traced = torch.jit.trace(logits, (ids, ones, positions), check_trace=False)
        if restarts:
            given = (ids, ones, positions % 12)
        else:
            given = (ids, (positions >= torch.tensor([[9], [0]])).long(), positions)
        difference = traced(*given) - logits(*given)
    assert difference[given[1].bool()].abs().max() < 1e-5
