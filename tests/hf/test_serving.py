"""Continuous batching gives the tokens of `generate`, one request at a time under eager."""

from __future__ import annotations

import inspect
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import transformers
from hand_written_models import tiny
from models import DECODERS, Family, named, text, tokens
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from hf_flash_two import batch_invariant, flash_attention, patch, unpatch
from hf_flash_two.hf import compat, interface
from hf_flash_two.hf.interface import attention_forward

NEW = 9
VERSION = Version(transformers.__version__)
# Serving takes the machine's GPU, if there is one, wherever the model is.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def qwen2_moe():
    return text(
        "Qwen2MoeConfig",
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=3,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
    )


def gpt_neo():
    return tiny(transformers.GPTNeoConfig, attention_types=[[["global"], 2]])


FAMILIES = {f.name: f for f in DECODERS}
# Its layers do not tell the attention of their window.
FAMILIES["qwen2-moe"] = Family("qwen2-moe", "Qwen2MoeForCausalLM", qwen2_moe)
FULL = [FAMILIES[name] for name in ("llama", "qwen3", "phi3")]
WINDOWED = [FAMILIES[name] for name in ("mistral", "gemma2", "gemma3", "gpt-oss", "qwen2-moe")]
# Tokens in a page and in a step, and pages: odd and many, large and few.
SIZES = {"pages of 7": (7, 16, 60), "pages of 64": (64, 64, 24), "pages of 5": (5, 6, 80)}


def settings(page: int, step: int, pages: int, **options) -> ContinuousBatchingConfig:
    names = inspect.signature(ContinuousBatchingConfig).parameters
    options["page_size" if "page_size" in names else "block_size"] = page
    options.setdefault("use_cuda_graph", False)
    return ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=step, **options)


def pair(name: str, implementation: str = "flash_two") -> list[PreTrainedModel]:
    """The family's model under the implementation and under eager, where serving takes place."""
    return [model.to(DEVICE) for model in FAMILIES[name].pair(implementation)]


def greedy(**options) -> GenerationConfig:
    given = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return GenerationConfig(**{**given, **options})


def windows_work(family: Family) -> None:
    if family in WINDOWED and VERSION < compat.RIGHT_PAGED_WINDOWS:
        pytest.skip("its paged cache is wrong for windows, and we refuse: see the test of that")


def prompts() -> list[list[int]]:
    """Of different lengths: one token, more than a page, more than a step; two begin alike."""
    start = tokens(1, 20, seed=99)[0].tolist()
    others = [tokens(1, n, seed=n)[0].tolist() for n in (5, 1, 33, 9)]
    return [*others, [*start, 4, 5, 6], [*start, 7]]


def expected(eager: PreTrainedModel, requests: list[list[int]]) -> list[list[int]]:
    device = eager.device
    return [
        eager.generate(torch.tensor([ids], device=device), max_new_tokens=NEW, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in requests
    ]


def served(model: PreTrainedModel, requests: list[list[int]], sizes, **options) -> list[list[int]]:
    """The tokens of each request, in the order of the requests."""
    results = model.generate_batch(
        requests, generation_config=greedy(), continuous_batching_config=settings(*sizes, **options)
    )
    made = {tuple(result.prompt_ids): result for result in results.values()}
    assert all(result.error is None for result in results.values())
    return [made[tuple(ids)].generated_tokens for ids in requests]


def check(family: Family, size: str, **options) -> None:
    windows_work(family)
    flash, eager = pair(family.name)
    wanted = expected(eager, prompts())
    assert len({token for made in wanted for token in made}) > 9, "the tokens tell nothing"
    assert served(flash, prompts(), SIZES[size], **options) == wanted


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", "pages of 7"),
        ("phi3", "pages of 64"),
        ("mistral", "pages of 5"),
        ("gemma2", "pages of 7"),
        ("gemma3", "pages of 64"),
        ("gpt-oss", "pages of 7"),
        ("qwen2-moe", "pages of 64"),
    ],
)
def test_continuous_batching(name: str, size: str) -> None:
    check(FAMILIES[name], size)


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "size"), list(product(FULL + WINDOWED, SIZES)), ids=str)
def test_every_continuous_batching(family: Family, size: str) -> None:
    check(family, size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
@pytest.mark.parametrize("family", named(FULL + WINDOWED))
def test_continuous_batching_on_a_gpu(family: Family, graphs: bool) -> None:
    if graphs and family.name in ("gpt-oss", "qwen2-moe"):
        pytest.skip("PyTorch's grouped product of float32 experts cannot be captured")
    check(family, "pages of 64", use_cuda_graph=graphs, use_async_batching=graphs)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_mask_serves_all_layers_of_a_kind(name: str, monkeypatch) -> None:
    windows_work(FAMILIES[name])
    flash = FAMILIES[name].build("flash_two", num_hidden_layers=4, **four_layers(name)).to(DEVICE)
    seen = []

    def noting(*args, **kwargs):
        seen.append(kwargs["mask"])
        return flash_attention(*args, **kwargs)

    monkeypatch.setattr(interface, "flash_attention", noting)
    served(flash, prompts()[:2], SIZES["pages of 64"])
    steps = [seen[at : at + 4] for at in range(0, len(seen), 4)]
    # A token to see who asks the cache, then the answers, which need not begin in the same step.
    assert len(steps) in (1 + NEW, 2 + NEW)
    for step in steps[1:]:
        assert len({id(mask) for mask in step}) == (1 if name == "llama" else 2)


def four_layers(name: str) -> dict:
    kinds = ["sliding_attention", "full_attention"] * 2
    return {"layer_types": kinds} if name == "gemma3" else {}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "not shared"])
def test_a_common_beginning_is_computed_once(shared: bool, kernel_calls) -> None:
    flash, eager = pair("llama")
    requests = prompts()[-2:]
    wanted = expected(eager, requests)
    made = served(flash, requests, (4, 12, 60), allow_block_sharing=shared)
    assert made == wanted
    computed = sum(call.query[2] for call in kernel_calls) // 2
    # One token more shows beforehand who asks the cache.
    needed = 1 + sum(len(ids) + NEW - 1 for ids in requests)
    # Three or more of the five pages that both begin with are full when the second comes.
    assert computed <= needed - 8 if shared else computed == needed


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_requests_wait_and_start_again_when_the_cache_is_full(name: str, kernel_calls) -> None:
    windows_work(FAMILIES[name])
    flash, eager = pair(name)
    requests = [tokens(1, n, seed=n)[0].tolist() for n in (6, 7, 8)]
    wanted = expected(eager, requests)
    needed = 1 + sum(len(ids) + NEW - 1 for ids in requests)
    evicted = False
    for pages in (8, 10):  # two for each to begin with, and four or five at the end
        del kernel_calls[:]
        assert served(flash, requests, (4, 64, pages), allow_block_sharing=False) == wanted
        evicted |= sum(call.query[2] for call in kernel_calls) // 2 > needed
    assert evicted, "nothing was computed twice"


def test_several_answers_to_one_request() -> None:
    """They share the pages of the prompt, and a page that is half full is copied.

    Sampling from the one likeliest token is greedy.
    """
    flash, eager = pair("llama")
    request = prompts()[-1]
    results = flash.generate_batch(
        [request],
        generation_config=greedy(do_sample=True, top_k=1, num_return_sequences=3),
        continuous_batching_config=settings(7, 16, 60),
    )
    made = [result.generated_tokens for result in results.values()]
    # `generate_batch` returns the first alone until 5.17.
    assert made == expected(eager, [request]) * (3 if VERSION >= Version("5.18") else 1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_manager_takes_requests_while_it_runs(name: str) -> None:
    windows_work(FAMILIES[name])
    flash, eager = pair(name)
    requests = prompts()
    wanted = dict(zip(map(tuple, requests), expected(eager, requests), strict=True))
    manager = flash.init_continuous_batching(
        generation_config=greedy(), continuous_batching_config=settings(7, 16, 60)
    )
    manager.start()
    try:
        streamed = manager.add_request(requests[0], max_new_tokens=NEW, streaming=True)
        for ids in requests[1:4]:
            manager.add_request(ids, max_new_tokens=NEW)
        made, parts = {}, 0
        while len(made) < len(requests):
            result = manager.get_result(timeout=600)
            assert result is not None, "no result"
            if not parts:
                for ids in requests[4:]:
                    manager.add_request(ids, max_new_tokens=NEW)
            parts += result.request_id == streamed
            if result.is_finished():
                made[tuple(result.prompt_ids)] = result.generated_tokens
    finally:
        manager.stop(block=True)
    assert made == wanted
    assert parts == NEW


def test_the_model_still_generates_and_trains_afterwards() -> None:
    flash, eager = pair("llama")
    served(flash, prompts()[:2], SIZES["pages of 7"])
    ids = tokens(2, 13).to(DEVICE)
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert flash.generate(ids, **options).tolist() == eager.generate(ids, **options).tolist()
    flash(ids, labels=ids).loss.backward()
    assert flash.get_input_embeddings().weight.grad.abs().sum() > 0
    assert compat.is_ours(flash.config._attn_implementation)


def test_the_paged_name_is_the_same_attention() -> None:
    """Until 5.18 serving sets it, and leaves it; later the prefix is taken off, with a warning."""
    names = compat.with_paged_names(["flash_two", "fa_two"])
    for name in names:
        assert transformers.AttentionInterface()[name] is attention_forward
    assert len(names) == (4 if VERSION < Version("5.19") else 2)


def test_the_neutral_name_is_refused_where_flash_is_requested() -> None:
    """Transformers takes from 5.19 only names with "flash" in them. It says so."""
    flash, eager = pair("llama", "fa_two")
    requests = prompts()[:2]
    if VERSION < Version("5.19"):
        assert served(flash, requests, SIZES["pages of 7"]) == expected(eager, requests)
    else:
        with pytest.raises(ValueError, match="fa_two is not supported for continuous batching"):
            served(flash, requests, SIZES["pages of 7"])


def test_a_cache_that_loses_tokens_is_refused() -> None:
    """The paged cache of old versions reads a full window without its newest token."""

    class Cache:
        sliding_windows = {0: 5}

    key = torch.zeros(1, 2, 3, 8)
    if VERSION < compat.RIGHT_PAGED_WINDOWS:
        with pytest.raises(NotImplementedError, match="layer 0 has a sliding window"):
            compat.update_paged_cache(Cache(), key, key, SimpleNamespace(layer_idx=0), {})
    else:
        check(FAMILIES["mistral"], "pages of 64")


@pytest.mark.parametrize("part", ["whole", "decoder", "at loading"])
def test_models_that_never_see_the_cache_are_refused(part: str) -> None:
    """Their own attention ignores it, and each step would see its own tokens only."""
    config = gpt_neo()
    model = transformers.GPTNeoForCausalLM(config)
    if part == "at loading":
        model.set_attn_implementation("flash_two")
    else:
        patch(model if part == "whole" else model.transformer)
    with pytest.raises(NotImplementedError, match=r"GPTNeoForCausalLM .*h\.0\.attn.* `generate`"):
        served(model, prompts(), SIZES["pages of 64"])
    unpatch(model)
    # Unpatched it is Transformers' business again.
    assert model.init_continuous_batching(greedy(), settings(*SIZES["pages of 64"])) is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Bloom", "BloomForCausalLM takes no position_ids"),
        ("Nemotron", r"does not give layers\.0\.self_attn \(NemotronAttention\) the paged cache"),
        ("Doge", "DogeAttention makes a mask of this step's tokens"),
        ("Camembert", "CamembertSelfAttention attends both ways|asks more of its cache"),
    ],
)
def test_models_that_cannot_use_the_cache_are_refused(name: str, reason: str) -> None:
    model_class = getattr(transformers, f"{name}ForCausalLM")
    module = sys.modules[model_class.__module__]
    if name != "Bloom" and not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("its attention is its own in this version of Transformers, and not known")
    changes = {"num_key_value_heads": 2} if name == "Nemotron" else {}
    config = tiny(getattr(transformers, f"{name}Config"), **changes)
    model = model_class._from_config(config, attn_implementation="flash_two")
    with pytest.raises(NotImplementedError, match=f"({reason}).*; use `generate`"):
        served(model, prompts(), SIZES["pages of 64"])


@pytest.mark.parametrize("name", ["CodeGen", "DiffLlama", "GPTJ"])
def test_models_that_use_the_cache_since_their_layers_write_to_it(name: str) -> None:
    """Before 5.24 DiffLlama asked twice, and the others computed attention themselves."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    own = not hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")
    if name == "DiffLlama" and own:
        pytest.skip("its attention is its own in this version of Transformers, and not known")
    config = tiny(getattr(transformers, f"{name}Config"))
    torch.manual_seed(0)
    eager = model_class._from_config(config, attn_implementation="eager").eval()
    flash = model_class._from_config(config, attn_implementation="flash_two").eval()
    eager, flash = eager.to(DEVICE), flash.to(DEVICE)
    for parameter in eager.parameters():
        parameter.data.normal_(0, 0.3)
    flash.load_state_dict(eager.state_dict())
    requests = prompts()[:3]
    if VERSION < Version("5.24"):
        with pytest.raises(NotImplementedError, match="paged cache.*; use `generate`"):
            served(flash, requests, SIZES["pages of 7"])
    else:
        assert served(flash, requests, SIZES["pages of 7"]) == expected(eager, requests)


def test_towers_with_attention_of_their_own_are_no_reason() -> None:
    """Only the decoder's layers have to do with the cache."""
    model = FAMILIES["llama"].build("flash_two")
    model.tower = transformers.GPTNeoModel(
        tiny(transformers.GPTNeoConfig, attention_types=[[["global"], 2]])
    )
    patch(model)
    eager, model = FAMILIES["llama"].build("eager").to(DEVICE), model.to(DEVICE)
    requests = prompts()[:2]
    assert served(model, requests, SIZES["pages of 64"]) == expected(eager, requests)


def test_a_table_of_blocks_is_refused() -> None:
    """It would mean that the cache expects to be written to by the attention."""
    model = FAMILIES["llama"].build("flash_two")
    query = torch.zeros(1, 4, 3, 12)
    with pytest.raises(TypeError, match="block_table"):
        attention_forward(
            model.model.layers[0].self_attn,
            query,
            query,
            query,
            None,
            cache=object(),
            block_table=torch.zeros(1, 1),
        )


def test_a_layer_that_the_cache_does_not_know_is_refused() -> None:
    """The cache replaces the boundaries by those of the layer's kind when it is written to."""
    model = FAMILIES["llama"].build("flash_two")
    query, ends = torch.zeros(1, 4, 3, 12), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="LlamaAttention does not use the paged cache"):
        attention_forward(
            model.model.layers[0].self_attn,
            query,
            query,
            query,
            None,
            cu_seq_lens_q=ends,
            cu_seq_lens_k={"full_attention": ends},
            write_index=[torch.arange(3)],
        )


def test_batch_invariant_requests() -> None:
    flash, eager = pair("llama")
    with batch_invariant():
        assert served(flash, prompts(), SIZES["pages of 7"]) == expected(eager, prompts())


def test_batch_invariant_windows_are_refused() -> None:
    """Which keys of a window the paged cache has dropped it does not tell."""
    layer = pair("mistral")[0].model.layers[0].self_attn
    ends = torch.tensor([0, 4], dtype=torch.int32)
    paged = {"cache": None, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "write_index": [0]}
    query, key = torch.randn(1, 4, 4, 12), torch.randn(1, 2, 4, 12)
    with batch_invariant(), pytest.raises(NotImplementedError, match="how many keys it has"):
        attention_forward(layer, query, key, key, None, **paged)
    attention_forward(layer, query, key, key, None, **paged)
