"""Where Transformers has changed: what needs a changed name is refused by name, the rest works."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import transformers
from hand_written_models import tiny
from models import DECODERS, left_padded, tokens
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

import hf_flash_two.hf
from hf_flash_two import patch
from hf_flash_two.hf import compat, mask_function
from hf_flash_two.hf.interface import attention_forward

FAMILIES = {family.name: family for family in DECODERS}


def gpt_neo(**options) -> PreTrainedModel:
    config = tiny(transformers.GPTNeoConfig, attention_types=[[["global"], 2]])
    torch.manual_seed(0)
    return transformers.GPTNeoForCausalLM._from_config(config, **options).eval()


HOOKED = [
    (compat._find(name.owner), name.name)
    for feature in ("flash_two", "loading", "serving")
    for name, _ in compat.HOOKS[feature]
]
LOADING = [name.name for name in compat.NAMES["loading"]]


def big_code(config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.GPTBigCodeForCausalLM._from_config(
        copy.deepcopy(config), attn_implementation=implementation
    ).eval()


MISSING, OTHER = "missing", "takes other arguments"


@pytest.fixture
def changed(monkeypatch) -> Iterator[Callable]:
    """Takes a name from its owner, or its arguments, and imports anew; undone at the end."""
    for owner, name in HOOKED:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    monkeypatch.setattr(PreTrainedModel, "__init__", PreTrainedModel.__init__)

    def change(owner, name: str, how: str = MISSING) -> None:
        before = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **given: before(*args, **given))
        for at in getattr(owner, "__mro__", [owner]) if how == MISSING else ():
            monkeypatch.delattr(at, name, raising=False)
        hf_flash_two.hf.register()

    yield change
    monkeypatch.undo()
    hf_flash_two.hf.register()
    assert all(map(compat.offers, compat._FEATURES))


def check_plain_attention(name: str) -> None:
    flash, eager = FAMILIES["llama"].pair(name)
    ids = tokens(2, 13)
    with torch.no_grad():
        torch.testing.assert_close(flash(ids).logits, eager(ids).logits, atol=1e-5, rtol=1e-4)
        mask = left_padded(2, 13, 4)
        got, want = (model(ids, attention_mask=mask).logits for model in (flash, eager))
    visible = mask.bool()
    torch.testing.assert_close(got[visible], want[visible], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("module", compat._FLASH_TEST_MODULES)
@pytest.mark.parametrize("how", [MISSING, OTHER])
def test_a_name_with_flash_in_it(module: str, how: str, changed) -> None:
    changed(sys.modules[module], "is_flash_attention_requested", how)
    refusal = f"attn_implementation='flash_two'.*{module}.*{how}.*use 'fa_two'"
    with pytest.raises(NotImplementedError, match=refusal):
        FAMILIES["llama"].build("flash_two")
    with pytest.raises(NotImplementedError, match=refusal):
        transformers.AttentionInterface()["flash_two"]()
    if how == MISSING:
        return  # Transformers itself would have another name for it
    check_plain_attention("fa_two")
    model = FAMILIES["llama"].build("eager")
    assert patch(model).ok
    assert model.config._attn_implementation == "fa_two"


@pytest.mark.parametrize("name", LOADING)
def test_loading_a_model_with_attention_of_its_own(name: str, changed) -> None:
    changed(PreTrainedModel, name, OTHER)
    refusal = f"model with hand-written attention.*{name}.*hf_flash_two.patch"
    with pytest.raises(NotImplementedError, match=refusal):
        gpt_neo(attn_implementation="flash_two")
    eager = gpt_neo(attn_implementation="eager")
    with pytest.raises(NotImplementedError, match=refusal):
        eager.set_attn_implementation("fa_two")
    check_plain_attention("flash_two")
    ids = tokens(2, 9)
    want = eager(ids).logits
    assert patch(eager).ok
    torch.testing.assert_close(eager(ids).logits, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("said", ["positions", "boundaries"])
def test_packed_documents_where_nothing_tells_of_models(said: str, changed) -> None:
    """Also in a family that hands its mask function no positions."""
    changed(PreTrainedModel, "post_init", OTHER)
    ids, lengths = tokens(1, 9), (4, 3, 2)
    given = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if said == "boundaries":
        ends = torch.tensor([0, 4, 7, 9], dtype=torch.int32)
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    config = tiny(transformers.GPTBigCodeConfig)
    for build in (FAMILIES["llama"].build, partial(big_code, config)):
        flash, eager = build("flash_two"), build("eager")
        alone = [eager(part).logits for part in ids.split(lengths, dim=1)]
        got = flash(ids, **given).logits
        torch.testing.assert_close(got, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-4)


def test_serving(changed) -> None:
    changed(GenerationMixin, "init_continuous_batching")
    query, ends = torch.zeros(1, 4, 3, 12), torch.tensor([0, 3], dtype=torch.int32)
    layer = FAMILIES["llama"].build("flash_two").model.layers[0].self_attn
    for paged in ({"cache": object()}, {"write_index": []}):
        with pytest.raises(NotImplementedError, match="batching.*init_cont.*use `generate`"):
            attention_forward(
                layer, query, query, query, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends, **paged
            )
    check_plain_attention("flash_two")


def test_masks_that_have_to_be_evaluated(changed) -> None:
    hf_flash_two.hf.register()
    compat.note("masks", "sdpa_mask is missing")
    check_plain_attention("flash_two")
    with pytest.raises(NotImplementedError, match="mask of this kind.*sdpa_mask is missing"):
        mask_function.make_mask(1, 3, 3, mask_function=lambda b, h, q, k: q >= k)


def test_weights_that_were_requested(changed, monkeypatch) -> None:
    monkeypatch.setattr(compat, "output_capturing", None)
    hf_flash_two.hf.register()
    flash, eager = (gpt_neo(attn_implementation=name) for name in ("flash_two", "eager"))
    ids = tokens(1, 5)
    got, want = (model(ids, output_attentions=True) for model in (flash, eager))
    torch.testing.assert_close(got.attentions, want.attentions)


def test_switching_a_model(changed) -> None:
    changed(PreTrainedModel, "_can_set_attn_implementation")
    model = FAMILIES["llama"].build("eager")
    with pytest.raises(NotImplementedError, match="switching .*_can_set_attn_implementation"):
        patch(model)


def test_everything_at_once() -> None:
    """In a process of its own: the package is imported, and attention by name is right."""
    script = """
import torch, transformers
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import generation, masking_utils, modeling_utils
from transformers.generation import utils
from transformers.utils import output_capturing

def renamed(owner, name):
    before = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: before(*args, **kwargs))

renamed(masking_utils, "is_flash_attention_requested")
renamed(modeling_utils, "is_flash_attention_requested")
renamed(utils, "is_flash_attention_requested")
renamed(PreTrainedModel, "post_init")
del masking_utils.bidirectional_mask_function
for owner in GenerationMixin.__mro__:
    if "init_continuous_batching" in vars(owner):
        del owner.init_continuous_batching

import warnings
warnings.simplefilter("error")
import hf_flash_two
from hf_flash_two.hf import compat
lacking = {name for name in compat._FEATURES if not compat.offers(name)}
assert lacking == {"flash_two", "loading", "masks", "serving"}, lacking

sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
config = LlamaConfig(vocab_size=9, **sizes)
models = []
for name in ("eager", "fa_two"):
    torch.manual_seed(0)
    models.append(LlamaForCausalLM._from_config(config, attn_implementation=name).eval())
ids = torch.tensor([[1, 2, 3, 4]])
eager, ours = (model(ids).logits for model in models)
torch.testing.assert_close(eager, ours)
alone = torch.cat([models[0](part).logits for part in ids.split(2, dim=1)], dim=1)
torch.testing.assert_close(models[1](ids, position_ids=torch.tensor([[0, 1, 0, 1]])).logits, alone)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=240)


def test_the_features_are_told_apart() -> None:
    assert PreTrainedConfig()._attn_implementation is None
    compat.require("serving")
    with pytest.raises(NotImplementedError, match=transformers.__version__):
        compat.note("serving", "a name is missing")
        try:
            compat.require("serving")
        finally:
            compat.note("serving", None)
