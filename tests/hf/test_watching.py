"""`watch_attention`: what eager's whole matrices say, layer by layer, and none of them kept."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import DECODERS, ENCODERS, Family, named, supported
from torch import Tensor

from hf_flash_two import AttentionWeights, patch, watch_attention

FAMILIES = {family.name: family for family in (*DECODERS, *ENCODERS)}
LLAMA = FAMILIES["llama"]
WATCHED = [FAMILIES[name] for name in ("llama", "mistral", "gemma2", "gpt-oss", "bert")]
# What layers do with hand-written attention, they do under the tracer.
WATCHED.append(
    Family(
        "bloom",
        "BloomForCausalLM",
        lambda: transformers.BloomConfig(vocab_size=89, hidden_size=48, n_layer=2, n_head=4),
    )
)


def padded_batch() -> dict[str, Tensor]:
    """Row 0 is padded on the left, whose rows differ from eager's, row 1 on the right."""
    mask = torch.ones(2, 23, dtype=torch.int64)
    mask[0, :5] = mask[1, -4:] = 0
    return {"input_ids": torch.randint(3, 80, (2, 23)), "attention_mask": mask}


def everything(layer: str, weights: AttentionWeights) -> dict[str, Tensor]:
    values, indices = weights.top_keys(3)
    return {
        "received": weights.received(),
        "entropy": weights.entropy(),
        "top": values,
        "at top": weights.rows().gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0),
        "rows": weights.rows([0, -1]),
    }


def expected(weights: Tensor) -> dict[str, Tensor]:
    """The same of eager's matrix."""
    top = weights.topk(3, -1).values
    return {
        "received": weights.sum(2),
        "entropy": torch.special.entr(weights).sum(-1),
        "top": top,
        "at top": top,
        "rows": weights[:, :, [0, -1]],
    }


@pytest.mark.parametrize("family", named(WATCHED))
def test_layers_equal_eager(family: Family) -> None:
    """Grouped heads, windows, padding, softcap, sinks, ALiBi."""
    supported(family)
    eager, ours = family.build("eager"), family.build("eager")
    patch(ours)
    batch = padded_batch()
    padding = batch["attention_mask"][:, None, None] == 0
    with torch.no_grad():
        wanted = eager(**batch, output_attentions=True).attentions
        with watch_attention(ours, everything) as seen:
            ours(**batch)
    assert len(seen) == len(wanted) == family.layers
    for (found,), weights in zip(seen.values(), wanted, strict=True):
        # Eager gives a query that sees nothing the average of all keys.
        sees_nothing = (weights * padding).sum(-1, keepdim=True) > 0
        for name, want in expected(weights.masked_fill(sees_nothing, 0)).items():
            torch.testing.assert_close(found[name], want, atol=1e-4, rtol=1e-4, msg=name)


def test_what_each_key_received_is_the_default() -> None:
    ours, eager = LLAMA.pair("flash_two")
    ids = torch.randint(3, 80, (2, 23))
    with torch.no_grad(), watch_attention(ours) as seen:
        ours(ids)
        weights = eager(ids, output_attentions=True).attentions
    assert list(seen) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for (received,), want in zip(seen.values(), weights, strict=True):
        torch.testing.assert_close(received, want.sum(2), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        ours(ids)
    assert all(len(found) == 1 for found in seen.values())


def test_decoding_shows_each_step() -> None:
    ours, _ = LLAMA.pair("flash_two")
    ids = torch.randint(3, 80, (2, 23))
    with watch_attention(ours, lambda layer, weights: weights.rows()) as seen:
        ours.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    for found in seen.values():
        assert [tuple(x.shape[2:]) for x in found] == [(23, 23), (1, 24), (1, 25)]
        for x in found:
            torch.testing.assert_close(x.sum(-1), torch.ones(x.shape[:3]))


def test_layers_are_handed_over_and_nothing_is_kept() -> None:
    """A function that returns nothing sees each layer's whole matrix while its forward runs."""
    ours, eager = LLAMA.pair("flash_two")
    ids = torch.randint(3, 80, (2, 23))
    handed: list[tuple[str, float]] = []

    def look(layer: str, weights: AttentionWeights) -> None:
        handed.append((layer, weights.rows().square().sum().item()))

    with torch.no_grad(), watch_attention(ours, look) as seen:
        out = ours(ids)
        wanted = eager(ids, output_attentions=True).attentions
    assert not seen and out.attentions is None
    assert [value for _, value in handed] == pytest.approx(
        [x.square().sum().item() for x in wanted], rel=1e-4
    )


def test_training_is_not_changed_and_several_may_watch() -> None:
    ours, _ = LLAMA.pair("flash_two")
    ids = torch.randint(3, 80, (2, 23))
    ours(ids, labels=ids).loss.backward()
    want = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    with watch_attention(ours) as one, watch_attention(ours.model) as other:
        ours(ids, labels=ids).loss.backward()
    assert list(one) == [f"model.{name}" for name in other]
    for name, (received,) in other.items():
        assert torch.equal(received, one[f"model.{name}"][0])
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, want[name]), name


def test_compiled_layers_are_seen() -> None:
    """A layer that was compiled before is shown too."""
    ours = LLAMA.build("flash_two", num_hidden_layers=1)
    ids = torch.randint(3, 80, (2, 23))
    torch._dynamo.reset()
    with torch.no_grad():
        with watch_attention(ours) as want:
            ours(ids)
        ours.model.layers[0].compile(backend="eager")
        ours(ids)
        with watch_attention(ours) as seen:
            ours(ids)
    torch._dynamo.reset()
    assert list(seen) == list(want)
    for name in want:
        torch.testing.assert_close(seen[name], want[name])


def test_what_cannot_be_watched_is_refused() -> None:
    eager = LLAMA.build("eager")
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn, .* does not; load it"):
        with watch_attention(eager):
            pass
    with pytest.raises(ValueError, match="no attention layer does not"):
        with watch_attention(torch.nn.Linear(2, 2)):
            pass
    bloom = WATCHED[-1].build("eager")
    patch(bloom)
    with watch_attention(bloom), pytest.raises(ValueError, match="output_attentions: .* own code"):
        bloom(**padded_batch(), output_attentions=True)
    with pytest.raises(TypeError, match="model"):
        with watch_attention("org/model"):  # pyright: ignore[reportArgumentType]
            pass
