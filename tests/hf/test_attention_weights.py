"""``output_attentions=True`` under flash_two: whatever eager returns, however it is recorded."""

from __future__ import annotations

import pytest
import torch
import transformers
from checks import assert_close
from models import patched_where_known
from packaging.version import Version

import hf_flash_two
from scripts.coverage import inputs as given
from scripts.coverage.build import families
from scripts.coverage.compare import attention_layers, attention_weights

FAMILIES = {family.name: family for family in families()}
# Recorded by hooks of Transformers, by arguments, by the model's own code; in one family several.
NAMES = (
    "blip blip_2 blt bridgetower canary chameleon codegen cohere_asr dab_detr "
    "decision_transformer dpt gemma3 gpt2 gpt_bigcode gpt_oss granite_swa granitemoe_swa gptj "
    "imagegpt kosmos2 kosmos2_5 lfm3_vl llama moonshine moonshine_streaming mpt nemotron opt "
    "paddleocr_vl persimmon phi pix2struct prophetnet siglip siglip2 stablelm swinv2 t5 "
    "videomae vit_mae vivit whisper xglm"
).split()


def pair(name: str):
    """(eager, ours, inputs)"""
    if name not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    family = FAMILIES[name]
    eager = family.build(family.override.reference)
    by_patch = "hand-written" in attention_layers(eager).values() or family.override.patched
    ours = family.build("eager" if by_patch else "flash_two")
    if by_patch:
        patched_where_known(ours)
    ours.load_state_dict(eager.state_dict())
    return eager, ours, given.example(eager, family.override)


def skip_if_eager_returns_none(name: str, weights: dict) -> None:
    old = Version(transformers.__version__) < Version("5.23")
    if name == "siglip" and old and not weights:
        pytest.skip(f"in transformers {transformers.__version__} eager records none for {name}")


def check(got: dict, wanted: dict) -> None:
    assert wanted.keys() <= got.keys()
    for name, weights in wanted.items():
        torch.testing.assert_close(got[name], weights, atol=1e-4, rtol=0, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_every_entry_of_a_family(name: str) -> None:
    eager, ours, inputs = pair(name)
    asking = inputs | {"output_attentions": True, "return_dict": True}
    wanted, got = given.run(eager, asking), given.run(ours, asking)
    skip_if_eager_returns_none(name, attention_weights(wanted))
    assert attention_weights(wanted)
    check(attention_weights(got), attention_weights(wanted))
    # And by position, as they come without a dictionary.
    asking["return_dict"] = False
    wanted, got = (given.run(model, asking) for model in (eager, ours))
    assert len(got) == len(wanted)
    assert [type(part) for part in got] == [type(part) for part in wanted]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bridgetower", "kosmos2", "paddleocr_vl", "pix2struct", "siglip"])
def test_parts_that_are_called_by_themselves(name: str) -> None:
    eager, ours, inputs = pair(name)
    calls: dict[str, tuple] = {}

    def note(at: str):
        return lambda _, args, kwargs: calls.setdefault(at, (args, kwargs)) and None

    parts = [(at, m) for at, m in eager.named_modules() if isinstance(m, type(eager).__mro__[1])]
    hooks = [m.register_forward_pre_hook(note(at), with_kwargs=True) for at, m in parts if at]
    given.run(eager, inputs)
    for hook in hooks:
        hook.remove()
    compared: dict[str, torch.Tensor] = {}
    for at, (args, kwargs) in calls.items():
        kept = {k: x for k, x in kwargs.items() if not k.startswith(("past", "use_", "output_"))}
        kept["output_attentions"] = True
        with torch.no_grad():
            try:
                wanted = eager.get_submodule(at)(*args, **kept)
            except TypeError:
                continue  # it takes no such argument
            got = ours.get_submodule(at)(*args, **kept)
        if isinstance(wanted, dict):
            check(attention_weights(got), attention_weights(wanted))
            compared |= attention_weights(wanted, at)
    skip_if_eager_returns_none(name, compared)
    assert compared


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gptj"])
def test_generate(name: str) -> None:
    eager, ours, inputs = pair(name)
    options = {
        "max_new_tokens": 3, "do_sample": False, "output_attentions": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    eager.generation_config.eos_token_id = ours.generation_config.eos_token_id = None
    wanted = eager.generate(inputs["input_ids"], **options).attentions
    got = ours.generate(inputs["input_ids"], **options).attentions
    assert len(got) == len(wanted) == 3
    for ours_now, theirs_now in zip(got, wanted, strict=True):
        assert len(ours_now) == len(theirs_now) == 2
        for weights, theirs in zip(ours_now, theirs_now, strict=True):
            assert_close(weights, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiled_whole(name: str) -> None:
    eager, ours, inputs = pair(name)
    wanted = given.run(eager, inputs | {"output_attentions": True}).attentions
    torch._dynamo.reset()
    given.run(ours, inputs | {"output_attentions": True})  # its hooks are not installed compiled
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(**inputs, output_attentions=True).attentions
        assert not compiled(**inputs).attentions
    torch._dynamo.reset()
    assert len(got) == len(wanted) == 2
    for weights, theirs in zip(got, wanted, strict=True):
        assert_close(weights, theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "pix2struct"])
def test_nothing_is_computed_unasked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(hf_flash_two.hf.interface, "_weights", never)
    _, ours, inputs = pair(name)
    given.run(ours, inputs)
    with pytest.raises(AssertionError):
        given.run(ours, inputs | {"output_attentions": True})
