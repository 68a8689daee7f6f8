"""Families with hand-written attention give the same numbers under `patch`."""

from __future__ import annotations

import importlib
from contextlib import suppress

import helpers
import pytest
import torch
from checks import assert_close
from hand_written_layers import LAYERS
from hand_written_models import FAMILIES, HandWritten, floats
from helpers import assert_same_gradients
from models import supported
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_flash_two import patch, patched
from hf_flash_two.hf import families
from hf_flash_two.hf.tracer.mode import tracing
from hf_flash_two.hf.tracer.scores import Lazy

NAMED = [pytest.param(family, id=family.name) for family in FAMILIES]


def gradients_of(module: torch.nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    generator = torch.Generator().manual_seed(7)
    sums = [
        (x * torch.randn(x.shape, generator=generator)).sum() for x in outputs if x.requires_grad
    ]
    sum(sums[1:], sums[0]).backward()
    return helpers.gradients_of(module)


def outputs_and_gradients(model, inputs) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    outputs = floats(model(**inputs))
    mask = inputs.get("attention_mask")
    if mask is not None:
        # What a padded position attends to is no one's business.
        outputs = [x[mask.bool()] if x.shape[:2] == mask.shape else x for x in outputs]
    gradients = gradients_of(model, outputs)
    return [x.detach() for x in outputs], gradients


def assert_same(got, want) -> None:
    (outputs, gradients), (want_outputs, want_gradients) = got, want
    assert len(outputs) == len(want_outputs) > 0
    for ours, theirs in zip(outputs, want_outputs, strict=True):
        assert_close(ours, theirs)
    assert_same_gradients(gradients, want_gradients)


@pytest.mark.parametrize("family", NAMED)
def test_same_outputs_and_gradients(family: HandWritten, kernel_calls):
    supported(family)
    model, inputs = family.build(), family.inputs()
    want, want_gradients = outputs_and_gradients(model, inputs)
    kernel_calls.clear()
    with patched(model) as report:
        assert report.ok, str(report)
        got, gradients = outputs_and_gradients(model, inputs)
    active = [layer for layer in report.layers if not any(x in layer.name for x in family.inactive)]
    assert len(kernel_calls) >= len(active) > 0
    assert_same((got, gradients), (want, want_gradients))


@pytest.mark.parametrize("name", LAYERS)
def test_same_output_and_gradients_of_a_layer(name: str, kernel_calls):
    torch.manual_seed(0)
    layer, arguments = LAYERS[name]()

    def run() -> list:
        torch.manual_seed(1)
        return tree_leaves(layer(**arguments))

    wanted = run()
    assert not kernel_calls
    with tracing(name):
        got = run()
    assert kernel_calls
    computed = [i for i, x in enumerate(got) if not isinstance(x, Lazy) and x is not None]
    both = [[outputs[i] for i in computed] for outputs in (got, wanted)]
    assert_same(*(([x.detach() for x in some], gradients_of(layer, some)) for some in both))


GENERATING = [family for family in FAMILIES if family.name in {
    "bloom", "codegen", "falcon_alibi", "falcon_new", "falcon_rotary", "fsmt", "gpt_neo",
    "gpt_neox_japanese", "gptj", "imagegpt", "mpt", "mvp", "openai_gpt", "prophetnet", "trocr",
    "xglm",
}]  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in GENERATING])
def test_same_tokens(family: HandWritten):
    model, inputs = family.build(), family.inputs()
    inputs.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 7, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    want = model.generate(**inputs, **settings)
    assert patch(model).ok
    assert torch.equal(model.generate(**inputs, **settings), want)


def exists(listed: str) -> bool:
    """Whether the installed Transformers, or PyTorch, has the class ``family.Name``."""
    family, name = listed.split(".")
    if family == "torch":
        return True
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return False
    return hasattr(module, name)


def test_every_listed_class_is_tested():
    models = [family.build() for family in FAMILIES]
    layers = []
    for build in LAYERS.values():
        with suppress(pytest.skip.Exception):  # not of this version
            layers.append(build()[0])
    tested = {families.name_of(type(m)) for model in (*models, *layers) for m in model.modules()}
    untested = families.HAND_WRITTEN - tested
    assert not set(filter(exists, untested))
    assert not families.HAND_WRITTEN & families.NOT_POSSIBLE.keys()
