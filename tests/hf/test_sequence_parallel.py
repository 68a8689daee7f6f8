"""Sequence parallelism as DeepSpeed does it: layers get whole rows, and positions but no mask.

Here the shards of a row are the rows of a batch: all but the attention is the same for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import DECODERS, tokens
from torch import Tensor

from hf_flash_two.hf import compat

LENGTH, SHARDS = 32, 4
FAMILIES = {family.name: family for family in DECODERS}
ONE = torch.arange(LENGTH)[None]
SEVERAL = torch.cat([torch.arange(n) for n in (5, 16, 11)])[None]


@pytest.fixture
def gathering(monkeypatch) -> None:
    functions = transformers.AttentionInterface()
    monkeypatch.setitem(functions._global_mapping, "flash_two", over_rows(functions["flash_two"]))


def over_rows(attend: Callable) -> Callable:
    def attention(module, query, key, value, attention_mask, *, position_ids, **kwargs):
        whole = (x.movedim(1, 0).flatten(1, 2)[None] for x in (query, key, value))
        positions = position_ids.reshape(1, -1)
        out, _ = attend(module, *whole, None, position_ids=positions, **kwargs)
        return out.unflatten(1, query.shape[::2]).squeeze(0), None

    return attention


def sharded(x: Tensor) -> Tensor:
    return x.reshape(-1, LENGTH // SHARDS)


@pytest.mark.parametrize("positions", [ONE, SEVERAL], ids=["one", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_layers_of_whole_rows(gathering, family: str, positions: Tensor) -> None:
    flash, eager = FAMILIES[family].pair("flash_two", use_cache=False)
    ids = tokens(1, LENGTH)
    got = flash(sharded(ids), position_ids=sharded(positions)).logits
    want = eager(ids, position_ids=positions).logits
    torch.testing.assert_close(got.reshape_as(want), want, atol=1e-5, rtol=1e-4)


def test_padding_after_tokens_is_harmless_and_before_them_refused(gathering) -> None:
    flash, eager = FAMILIES["llama"].pair("flash_two", use_cache=False)
    ids, right = tokens(1, LENGTH), torch.ones(1, LENGTH, dtype=torch.int64)
    right[:, -11:] = 0
    told = dict(position_ids=sharded(ONE))
    got = flash(sharded(ids), attention_mask=sharded(right), **told).logits
    want = eager(ids, attention_mask=right).logits
    seen = right.bool()
    torch.testing.assert_close(got.reshape_as(want)[seen], want[seen], atol=1e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="drops it, and tokens would see the padding"):
        flash(sharded(ids), attention_mask=sharded(right.flip(1)), **told)


def test_a_first_shard_of_padding_alone_is_refused(monkeypatch) -> None:
    model = FAMILIES["llama"].build("flash_two", use_cache=False)
    layer = transformers.AttentionInterface()["flash_two"]

    def attention(module, query, key, value, attention_mask, *, position_ids, **kwargs):
        return layer(module, query, key, value, None, position_ids=ONE, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "flash_two", attention)
    first = sharded(ONE)[:1]
    with pytest.raises(NotImplementedError, match="drops it"):
        model(first, position_ids=first, attention_mask=torch.zeros_like(first))


@pytest.mark.parametrize("name", ["label_smoother", "compute_loss_func"])
def test_losses_that_shift_labels_within_a_shard_are_refused(name: str) -> None:
    """Of Trainer, which takes the labels from the model then."""
    config = transformers.LlamaConfig()
    compat.set_implementation(config, compat.FA_TWO)
    model = SimpleNamespace(config=config)
    prepare = compat._passing_for_sdpa(lambda self, model, inputs: config._attn_implementation)
    for size, given in ((1, print), (2, None)):
        parallel = SimpleNamespace(cp_enabled=size > 1)
        trainer = SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=parallel))
        setattr(trainer, name, given)
        assert prepare(trainer, model, {}) == "sdpa"
    setattr(trainer, name, print)
    with pytest.raises(NotImplementedError, match="would shift labels within a shard"):
        prepare(trainer, model, {})
    assert config._attn_implementation == compat.FA_TWO
