"""The largest scores of whole models, against the dense formula in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import transformers
from models import DECODERS, Family, left_padded, named, tokens
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

from hf_flash_two import max_logits
from hf_flash_two.hf.max_logits import records_of

FAMILIES = {family.name: family for family in DECODERS}
LLAMA = FAMILIES["llama"]


@pytest.fixture
def dense() -> Iterator[dict[nn.Module, Tensor]]:
    """By layer what models under "dense" have seen, the largest score of each head."""
    seen: dict[nn.Module, Tensor] = {}

    def attend(module, query, key, value, mask, scaling, softcap=None, s_aux=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(mask[..., : key.shape[2]] != 0, -math.inf)
        seen[module] = scores.detach().amax((0, 2, 3))
        sinks = torch.tensor(-1e300) if s_aux is None else s_aux
        column = sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:2], -1, -1)
        column = column.expand(-1, scores.shape[1], scores.shape[2], -1)
        weights = torch.cat([scores, column], 3).softmax(3)[..., :-1]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    transformers.AttentionInterface.register("dense", attend)
    transformers.AttentionMaskInterface.register("dense", eager_mask)
    yield seen
    del transformers.AttentionInterface._global_mapping["dense"]
    del transformers.AttentionMaskInterface._global_mapping["dense"]


def built(family: Family, implementation: str) -> nn.Module:
    # PyTorch's grouped product of experts takes no float64.
    return family.build(implementation, _experts_implementation="eager").double().train()


@pytest.mark.parametrize("reentrant", [None, True, False], ids=str)
@pytest.mark.parametrize(
    "family", named([FAMILIES[name] for name in ("llama", "mistral", "gemma2", "gpt-oss")])
)
def test_equals_the_dense_formula(family: Family, reentrant: bool | None, dense) -> None:
    """Grouped heads, windows, softcap, sinks, padding; also where forwards are recomputed."""
    model, reference = built(family, "flash_two"), built(family, "dense")
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batches = [tokens(2, 21, seed=seed) for seed in range(2)]
    mask, want = left_padded(2, 21, 4), {}
    with max_logits(model) as seen:
        for ids in batches:
            model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    for ids in batches:
        reference(ids, attention_mask=mask, use_cache=False)
        for name, module in reference.named_modules():
            if module in dense:
                known = want.get(name, torch.tensor(-math.inf).double())
                want[name] = torch.maximum(known, dense[module])
    assert seen.keys() == want.keys() and len(seen) == family.layers
    for name, largest in seen.items():
        assert not largest.requires_grad
        torch.testing.assert_close(largest, want[name])


def test_records_within_the_block_alone() -> None:
    """Blocks may be nested; what they leave is what was there."""
    model, ids = LLAMA.build("flash_two"), tokens(2, 9)
    before = model(ids).logits
    with max_logits(model) as outer:
        model(ids[:, :5])
        few = dict(outer)
        with max_logits(model) as inner:
            torch.testing.assert_close(model(ids).logits, before)
        assert inner.keys() == few.keys() and all((outer[x] >= inner[x]).all() for x in inner)
        inner.clear()
    assert all((outer[x] >= few[x]).all() for x in few)
    model(ids)
    assert not inner
    assert not any(records_of(module) for module in model.modules())
    with pytest.raises(ZeroDivisionError), max_logits(model):
        raise ZeroDivisionError
    assert not any(records_of(module) for module in model.modules())


def test_clipping_queries_bounds_their_heads() -> None:
    """QK-clip: heads are those of the projection's rows, and scores follow its factor."""
    model, ids = LLAMA.build("flash_two"), tokens(2, 21)
    layer = model.model.layers[0].self_attn
    found = []
    for _ in range(2):
        with max_logits(model) as seen, torch.no_grad():
            model(ids)
            largest = seen["model.layers.0.self_attn"]
            limit = largest.median().item()
            factor = limit / largest.clamp(min=limit)
            layer.q_proj.weight.unflatten(0, (len(largest), -1)).mul_(factor[:, None, None])
        found.append((largest, factor))
    (before, factor), (after, _) = found
    assert 0 < limit and (factor < 1).any() and (factor == 1).any()
    torch.testing.assert_close(after, before * factor)


def test_compiled() -> None:
    """In one graph: before, while and after scores are recorded, twice."""
    torch._dynamo.reset()
    model, ids = LLAMA.build("flash_two", num_hidden_layers=1), tokens(2, 9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for forward in (model, compiled):
        forward(ids, use_cache=False)
        for shift in (1, 2):
            with max_logits(model) as seen:
                forward(ids, use_cache=False)
                forward(ids + shift, use_cache=False)
            forward(ids + 3, use_cache=False)
            found.append(dict(seen))
    for want, got in zip(found[:2], found[2:], strict=True):
        assert len(got) == 1
        torch.testing.assert_close(got, want)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="max_logits: .*attn_implementation='flash_two'"):
        with max_logits(LLAMA.build("eager")):
            pass
    with pytest.raises(TypeError, match="model: expected a loaded model"), max_logits("a name"):
        pass
    config = transformers.GPTNeoConfig(
        vocab_size=89, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flash_two")
    with pytest.raises(NotImplementedError, match="max_logits: .*hand-written attention"):
        with max_logits(model):
            pass
