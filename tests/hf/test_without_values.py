"""Models whose tensors have no values to look at, or many: fake tensors, torch.export, vmap."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close
from hand_written_models import FAMILIES, OwnFamily
from models import supported
from test_patching import build
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap

from hf_flash_two import patch, patched
from hf_flash_two.hf.tracer.mode import own_attention

BY_NAME = {family.name: family for family in FAMILIES}
TEXT = ["bloom", "codegen", "falcon_alibi", "gpt_neo", "gptj", "mpnet", "mpt", "xglm", "xlnet"]
TEXT = [name for name in TEXT if name in BY_NAME]
ALL = [pytest.param(BY_NAME[name], id=name) for name in TEXT]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt_neo", "llama"])
def test_fake_tensors(family: str, batch) -> None:
    model = build(family)
    wanted = model(**batch).logits
    patch(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(x) for name, x in batch.items()}
        got = model(**fakes).logits
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    visible = batch["attention_mask"].bool()
    assert_close(model(**batch).logits[visible], wanted[visible])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ALL)
def test_every_family_of_text_is_exported(family: OwnFamily) -> None:
    supported(family)
    model, inputs = family.build(), family.inputs()
    model.config.use_cache = False
    wanted = model(**inputs)[0]
    with patched(model):
        program = torch.export.export(model, (), inputs, strict=False)
    got = program.module()(**inputs)[0]
    mask = inputs.get("attention_mask")
    if mask is not None and wanted.shape[:2] == mask.shape:
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["gptj", "gpt_neo", "codegen", "llama"])
def test_gradients_of_each_sample(family: str, masked: bool, batch) -> None:
    model = build(family)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def loss(weights: dict, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        given = {"attention_mask": mask[None]} if masked else {}
        logits = functional_call(model, weights, (ids[None],), {**given, "use_cache": False}).logits
        return (logits.square() * mask[None, :, None]).sum()

    wanted = [grad(loss)(weights, *sample) for sample in zip(ids, mask, strict=True)]
    patch(model)
    got = vmap(grad(loss), in_dims=(None, 0, 0))(weights, ids, mask)
    largest = max(gradient.abs().max() for sample in wanted for gradient in sample.values())
    for row, sample in enumerate(wanted):
        for name, gradient in sample.items():
            assert (got[name][row] - gradient).abs().max() <= 1e-5 * largest, name


def test_documents_under_vmap_are_refused_where_they_cannot_be_kept_apart() -> None:
    model = BY_NAME["xlnet"].build()
    patch(model)
    mask = torch.tensor([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
    ids = torch.arange(3, 15).view(2, 6)

    def run(ids, mask):
        return model(ids[None], attention_mask=mask[None])[0]

    with torch.no_grad(), pytest.raises(RuntimeError, match="XLNet.*packed documents"):
        vmap(run)(ids, mask)
    with torch.no_grad():
        vmap(run)(ids, torch.ones_like(mask))


@pytest.mark.parametrize("family", ["gptj", "gpt_neo", "codegen", "llama"])
def test_a_bool_mask_says_who_may_attend(family: str, batch) -> None:
    model, ids = build(family), batch["input_ids"]
    seen = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.7
    seen = (seen | torch.eye(11, dtype=torch.bool)).tril()
    hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    wanted = model(ids, attention_mask=hidden).logits
    patch(model)
    assert_close(model(ids, attention_mask=seen).logits, wanted)


def test_what_is_not_known_of_values_is_computed() -> None:
    """A number that may or may not hide: scores are computed after all, and probabilities too."""
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()

    def attend(limit: torch.Tensor) -> torch.Tensor:
        scores = torch.max(q @ k.transpose(-1, -2), limit)
        return scores.softmax(-1) @ v

    limits = torch.tensor([-1e9, 0.3])
    wanted = torch.stack([attend(limit) for limit in limits])

    def traced(limit: torch.Tensor) -> torch.Tensor:
        with own_attention("layer") as tracer:
            attended = attend(limit)
        return tracer.settled(attended)

    torch.testing.assert_close(vmap(traced)(limits), wanted)
