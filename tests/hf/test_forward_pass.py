"""What a model's caller says reaches its layers, and nothing outlives the forward pass."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checks import assert_close, error
from hand_written_models import FAMILIES
from models import DECODERS, tokens
from packed_rows import boundaries, positions
from test_packed import LENGTH, LENGTHS, alone
from torch import Tensor

from hf_flash_two import patch, patched, unpatch
from hf_flash_two.hf import forward_pass

LLAMA = DECODERS[0]


def silent_model():
    """BLOOM: nothing of what its caller says of documents gets past its first lines."""
    return next(f for f in FAMILIES if f.name == "bloom").build()


# Memory that is written to behind PyTorch's back

WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "in place": lambda x, new: x.copy_(new),
    "data in place": lambda x, new: x.data.copy_(new),
    "other data": lambda x, new: setattr(x, "data", new),
    "detached": lambda x, new: x.detach().copy_(new),
    "NumPy": lambda x, new: np.copyto(x.numpy(), new.numpy()),
    "DLPack": lambda x, new: torch.from_dlpack(x).copy_(new),
}


@pytest.mark.parametrize("write", [pytest.param(w, id=name) for name, w in WRITES.items()])
@pytest.mark.parametrize("what", ["bool", "additive", "padding", "positions", "boundaries"])
def test_what_is_rewritten_between_two_passes(what: str, write: Callable) -> None:
    flash, _ = LLAMA.pair("flash_two")
    ids = tokens(1, 12)
    causal = torch.ones(12, 12).tril().bool()[None, None]
    hidden = causal & (torch.arange(12) >= 5) | torch.eye(12, dtype=torch.bool)
    smallest = torch.finfo(torch.float32).min
    before, after, given = {
        "bool": (causal, hidden, lambda x: {"attention_mask": x}),
        "additive": (
            torch.where(causal, 0.0, smallest),
            torch.where(hidden, 0.0, smallest),
            lambda x: {"attention_mask": x},
        ),
        "padding": (
            torch.ones(1, 12),
            (torch.arange(12) >= 5).float()[None],
            lambda x: {"attention_mask": x},
        ),
        "positions": (positions(12), positions(5, 7), lambda x: {"position_ids": x}),
        "boundaries": (
            torch.tensor([0, 6, 12], dtype=torch.int32),
            torch.tensor([0, 4, 12], dtype=torch.int32),
            lambda x: boundaries(6, 6) | {"cu_seq_lens_q": x, "cu_seq_lens_k": x},
        ),
    }[what]
    x = before.clone().contiguous()
    first = flash(ids, **given(x)).logits
    write(x, after.clone().contiguous())
    second = flash(ids, **given(x)).logits
    assert_close(second[:, 5:], flash(ids, **given(after.clone())).logits[:, 5:])
    assert error(first[:, 5:], second[:, 5:]) > 1e-2


def test_layers_share_what_they_derive() -> None:
    built = []
    model = LLAMA.build("flash_two")
    mask = torch.ones(2, 1, 9, 9).tril().bool()
    once = forward_pass.once

    def counting(tensor, key, build, *others):
        return once(tensor, key, lambda: built.append(key) or build(), *others)

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("hf_flash_two.hf.tensor_masks.once", counting)
        model(tokens(2, 9), attention_mask=mask)
        assert len(built) == 1
        model(tokens(2, 9), attention_mask=mask)
        assert len(built) == 2


def test_nothing_outlives_the_pass() -> None:
    model = LLAMA.build("flash_two")
    mask = torch.ones(2, 1, 9, 9).tril().bool()
    dies = weakref.ref(mask)
    output = model(tokens(2, 9), attention_mask=mask).logits
    assert forward_pass.current() is None
    del mask, output
    assert dies() is None


# How a pass begins and ends


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_breaks_off_leaves_nothing(exception: type[BaseException]) -> None:
    model = silent_model()
    ids = tokens(1, LENGTH)
    expected = model(ids).logits
    patch(model)

    def stop(*_):
        raise exception

    handle = model.transformer.h[1].register_forward_pre_hook(stop)
    with pytest.raises(exception):
        model(ids, **boundaries(*LENGTHS))
    handle.remove()
    assert_close(model(ids).logits, expected)
    assert forward_pass.current() is None


def test_a_model_called_past_its_hooks() -> None:
    """As PEFT calls the model that it has put adapters into."""
    peft = pytest.importorskip("peft")
    model = silent_model()
    ids = tokens(1, LENGTH)
    expected = alone(model, ids)
    config = peft.LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    patch(adapted)
    assert_close(adapted(input_ids=ids, **boundaries(*LENGTHS)).logits, expected)


def test_two_threads_have_passes_of_their_own() -> None:
    model = silent_model()
    ids = tokens(1, LENGTH)
    expected = {"packed": alone(model, ids), "whole": model(ids).logits}
    patch(model)
    meet, found = threading.Barrier(2), {}

    def wait(*_) -> None:
        meet.wait(60)

    model.transformer.h[0].register_forward_pre_hook(wait)

    def run(name: str) -> None:
        given = boundaries(*LENGTHS) if name == "packed" else {}
        with torch.no_grad():
            found[name] = model(ids, **given).logits

    threads = [threading.Thread(target=run, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, logits in expected.items():
        assert_close(found[name], logits)


def test_a_copy_watches_itself() -> None:
    model = silent_model()
    ids = tokens(1, LENGTH)
    expected = alone(model, ids)
    patch(model)
    copied = copy.deepcopy(model)
    unpatch(model)
    assert_close(copied(ids, **boundaries(*LENGTHS)).logits, expected)
    unpatch(copied)
    for each in (model, copied):
        assert not each._forward_pre_hooks and not each._forward_hooks


def test_undone_hooks_are_gone_and_those_of_loading_stay() -> None:
    loaded = LLAMA.build("flash_two")
    hooks = len(loaded._forward_hooks)
    assert hooks == 1
    with patched(loaded):
        pass
    unpatch(loaded)
    assert len(loaded._forward_hooks) == hooks
    loaded.set_attn_implementation("eager")
    assert not loaded._forward_hooks
    loaded.set_attn_implementation("flash_two")
    assert len(loaded._forward_hooks) == hooks


def test_a_model_is_freed_at_once() -> None:
    model = LLAMA.build("flash_two")
    model(tokens(1, 5))
    dies = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert dies() is None
    finally:
        gc.enable()


def test_a_mask_is_not_that_of_the_model_around() -> None:
    """A decoder's tokens are not padded where those of the encoder's caller are."""
    outer, inner = LLAMA.build("flash_two"), LLAMA.build("flash_two")
    said = forward_pass.Said(attention_mask=torch.tensor([[0, 1, 1]]))
    around = forward_pass.ForwardPass(outer, said)
    assert forward_pass.ForwardPass(inner, forward_pass.Said(), around).said.attention_mask is None


# While operations are recorded


@pytest.mark.parametrize("mask", ["none", "ones", "zeros and ones", "numbers"])
def test_compiled_in_one_piece(mask: str) -> None:
    flash, eager = LLAMA.pair("flash_two")
    ids = tokens(2, LENGTH)
    given = {"position_ids": positions(*LENGTHS).expand(2, -1)}
    numbers = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS)).expand(2, -1)
    visible = torch.ones_like(ids)
    if mask == "zeros and ones":
        visible[0, :7] = 0
    if mask != "none":
        given["attention_mask"] = numbers if mask == "numbers" else visible
    torch._dynamo.reset()
    compiled = torch.compile(flash, fullgraph=True, backend="eager")
    logits = compiled(ids, **given).logits
    torch._dynamo.reset()
    assert_close(logits[visible.bool()], alone(eager, ids)[visible.bool()])


def test_an_exported_program_finds_the_documents_of_its_input() -> None:
    flash, eager = LLAMA.pair("flash_two")
    ids = tokens(1, LENGTH)
    given = {"position_ids": positions(LENGTH), "use_cache": False}
    program = torch.export.export(flash, (ids,), given).module()
    for lengths in (LENGTHS, (1, LENGTH - 1), (LENGTH,)):
        expected = [eager(part).logits for part in ids.split(lengths, dim=1)]
        got = program(ids, position_ids=positions(*lengths), use_cache=False).logits
        assert_close(got, torch.cat(expected, dim=1))


def test_a_compiled_model_that_cannot_keep_documents_apart() -> None:
    model = next(f for f in FAMILIES if f.name == "openai_gpt").build()
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    ids = tokens(1, LENGTH)
    assert compiled(ids, position_ids=positions(LENGTH)).logits.isfinite().all()
    with pytest.raises((NotImplementedError, RuntimeError), match="packed documents"):
        compiled(ids, position_ids=positions(*LENGTHS))
    torch._dynamo.reset()
