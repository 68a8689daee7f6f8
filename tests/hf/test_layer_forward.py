"""What patching puts on modules: it holds none of them, follows every copy, and goes as it came."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable

import accelerate
import pytest
import torch
import transformers
from hand_written_models import FAMILIES, HandWritten, floats
from models import supported
from test_patching import build
from torch import nn

from hf_flash_two import patch, patched, unpatch

HOOKS = [name for name in vars(nn.Linear(1, 1)) if name.endswith(("_hooks", "_hooks_with_kwargs"))]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def replica(model: nn.Module, factor: float, *, trains: bool = False) -> nn.Module:
    """As `torch.nn.parallel.replicate` makes one; instead of a device, weights times ``factor``.

    Args:
        trains: weights are attributes, through which gradients come back to the model's. Many
            models have no dtype then.
    """
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, weight in module._parameters.items():
            if trains and weight is not None:
                setattr(copied, name, weight * factor)
                continue
            moved = None if weight is None else nn.Parameter(weight.detach() * factor)
            copied._parameters[name] = moved
        for name, buffer in module._buffers.items():
            copied._buffers[name] = buffer
    return copies[model]


@pytest.mark.parametrize("family", [pytest.param(x, id=x.name) for x in FAMILIES])
def test_a_replica_computes_with_its_own_weights(family: HandWritten) -> None:
    supported(family)
    model, inputs = family.build(), family.inputs()
    torch.manual_seed(2)
    wanted = floats(replica(model, 1.25)(**inputs))
    with patched(model):
        torch.manual_seed(2)
        got = floats(replica(model, 1.25)(**inputs))
    mask = inputs.get("attention_mask")
    assert len(got) == len(wanted) > 0
    for ours, theirs in zip(got, wanted, strict=True):
        if mask is not None and theirs.shape[:2] == mask.shape:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        torch.testing.assert_close(ours, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=1e-3)


def test_replicas_in_threads_are_asked_for_weights_each(ids: torch.Tensor) -> None:
    model = build("bloom")
    wanted = model(ids, output_attentions=True).attentions
    patch(model)
    found: dict[bool, list] = {True: [], False: []}

    def run(asked: bool) -> None:
        for _ in range(20):
            found[asked].append(replica(model, 1.0)(ids, output_attentions=asked).attentions)

    threads = [threading.Thread(target=run, args=(asked,)) for asked in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[True]) == len(found[False]) == 20
    for weights in found[True]:
        torch.testing.assert_close(weights, wanted)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("made", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_stand_by_themselves(made: Callable, ids: torch.Tensor, kernel_calls) -> None:
    model = build("bloom")
    patch(model)
    copied = made(model)
    unpatch(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(1.5)
    wanted = replica(model, 1.5)(ids).logits
    del model
    kernel_calls.clear()
    torch.testing.assert_close(copied(ids).logits, wanted, atol=1e-5, rtol=1e-4)
    assert len(kernel_calls) == 2
    unpatch(copied)
    assert torch.equal(copied(ids).logits, wanted) and len(kernel_calls) == 2


def test_a_shallow_copy_runs_its_own_weights(ids: torch.Tensor) -> None:
    model = build("gpt_neo")
    patch(model)
    layer = model.transformer.h[0].attn.attention
    shallow = copy.copy(layer)
    shallow._modules = {name: copy.deepcopy(child) for name, child in layer._modules.items()}
    with torch.no_grad():
        shallow.out_proj.weight.mul_(2)
        shallow.out_proj.bias.mul_(2)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(shallow(x)[0], 2 * layer(x)[0])


@pytest.mark.parametrize("family", ["bloom", "gptj", "llama"])
def test_a_deleted_model_is_gone_at_once(family: str, ids: torch.Tensor) -> None:
    model = build(family)
    patch(model)
    with torch.no_grad():
        model(ids)
    kept = [weakref.ref(weight) for weight in model.parameters()]
    gc.disable()
    try:
        del model
        assert not any(weight() is not None for weight in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("first", ["patch", "hook"])
def test_with_hooks_of_accelerate(first: str, ids: torch.Tensor, kernel_calls) -> None:
    model = build("bloom")
    wanted = model(ids).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    if first == "patch":
        patch(model)
    # Every module's weights are on the "meta" device but while it runs.
    accelerate.cpu_offload(model, execution_device="cpu")
    if first == "hook":
        patch(model)
    kernel_calls.clear()
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)
    assert len(kernel_calls) == 2
    unpatch(model)
    torch.testing.assert_close(model(ids).logits, wanted)
    assert len(kernel_calls) == 2
    accelerate.hooks.remove_hook_from_submodules(model)
    after = {name: set(vars(module)) - {"forward"} for name, module in model.named_modules()}
    assert after == before
    torch.testing.assert_close(model(ids).logits, wanted)


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_hooks_go_as_they_came(family: str) -> None:
    model = build(family)

    def mine(*_) -> None:
        pass

    for module in model.modules():
        module.register_forward_pre_hook(mine)
        module.register_forward_hook(mine, always_call=True)

    def state() -> dict:
        return {name: [dict(vars(m)[k]) for k in HOOKS] for name, m in model.named_modules()}

    before = state()
    patch(model)
    assert state() != before
    patch(model)
    unpatch(model)
    assert state() == before


def test_its_forward_alone_is_refused(ids: torch.Tensor) -> None:
    model = build("bloom")
    patch(model)
    with pytest.raises(TypeError, match=r"h\.0\.self_attention .*call the layer, or undo `patch`"):
        model.transformer.h[0].self_attention.forward(torch.randn(2, 5, 32))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_nothing_is_asked(error: type, ids, kernel_calls) -> None:
    model = build("bloom")
    patch(model)

    def stop(*_) -> None:
        raise error

    hook = model.transformer.h[1].register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(ids, output_attentions=True)
    hook.remove()
    kernel_calls.clear()
    assert model(ids).attentions is None and len(kernel_calls) == 2
    assert torch.ones(2, 3, 3).matmul(torch.ones(2, 3, 3)).sum() == 54


@pytest.mark.filterwarnings("ignore")
def test_patched_and_unpatched_after_it_was_compiled(ids: torch.Tensor, kernel_calls) -> None:
    model = build("gptj")
    wanted = model(ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for calls, change in ((0, None), (2, patch), (0, unpatch), (2, patch)):
        if change is not None:
            change(model)
        kernel_calls.clear()
        torch.testing.assert_close(compiled(ids).logits, wanted, atol=1e-5, rtol=1e-4)
        assert len(kernel_calls) == calls
    torch._dynamo.reset()


def test_a_forward_of_the_instance_is_kept(ids: torch.Tensor, kernel_calls) -> None:
    """A user's own `layer.forward = ...` runs under the tracer, and comes back."""
    model = build("bloom")
    layer = model.transformer.h[0].self_attention
    forward = layer.forward

    def twice(*args, **kwargs):
        output, *rest = forward(*args, **kwargs)
        return (2 * output, *rest)

    layer.forward = twice
    wanted = model(ids).logits
    patch(model)
    torch.testing.assert_close(model(ids).logits, wanted, atol=1e-5, rtol=1e-4)
    assert len(kernel_calls) == 2
    unpatch(model)
    assert layer.forward is twice


def test_composites_reach_layers_of_their_parts() -> None:
    """SigLIP: the pooling head of its vision part is PyTorch's own layer."""
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model, pixels = transformers.SiglipVisionModel(config).eval(), torch.randn(2, 3, 16, 16)
    model.set_attn_implementation("eager")
    wanted = replica(model, 1.5)(pixels).pooler_output
    with patched(model):
        got = replica(model, 1.5)(pixels).pooler_output
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
