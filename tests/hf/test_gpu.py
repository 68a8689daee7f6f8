"""Models on a GPU: the same training as on the CPU, and compiled as they are there."""

from __future__ import annotations

import pytest
import torch
from machine import GPU
from models import DECODERS, Family, left_padded, named, tokens

pytestmark = [
    pytest.mark.skipif(not GPU, reason="needs a GPU"),
    # Inductor gives its advice as warnings.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

STEPS = 5
DENSE = ("llama", "gemma2", "gemma3")
CHOSEN = [f for f in DECODERS if f.name in (*DENSE, "gpt-oss", "deepseek-v3")]


def losses(family: Family, device: str, packed: bool) -> torch.Tensor:
    """Loss of each step of plain gradient descent, all in float32 without TF32."""
    model = family.build("flash_two").to(device).train()
    ids, mask = tokens(2, 45).to(device), left_padded(2, 45, 9).to(device)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if packed:
        lengths = (20, 1, 24)
        positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
        batch = {"input_ids": ids, "position_ids": positions.to(device), "labels": ids}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(STEPS):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", named(CHOSEN))
def test_trains_as_on_the_cpu(family: Family, packed: bool) -> None:
    """The losses of five steps within 1e-4 of those of the blockwise kernel on the CPU."""
    expected = losses(family, "cpu", packed)
    assert expected[-1] < expected[0] - 0.01
    torch.testing.assert_close(losses(family, "cuda", packed), expected, rtol=1e-4, atol=1e-4)


# The experts of the others are not compiled in one graph by PyTorch 2.11, whatever the attention.
@pytest.mark.parametrize("family", named([f for f in CHOSEN if f.name in DENSE]))
def test_compiled_in_one_graph(family: Family, kernel_calls) -> None:
    """Inductor's code around our kernels: the losses and gradients of the model as it was."""
    torch._dynamo.reset()
    model = family.build("flash_two").cuda().train()
    ids = tokens(2, 45).cuda()

    def run(forward) -> list[torch.Tensor]:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [loss.detach(), *grads]

    plain = run(model)
    kernel_calls.clear()
    for got, want in zip(run(torch.compile(model, fullgraph=True)), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    assert len(kernel_calls) == family.layers
    assert {call.kernel for call in kernel_calls} == {"triton"}


@pytest.mark.parametrize("family", named(CHOSEN))
def test_static_cache_writes_what_eager_writes(family: Family) -> None:
    """Decoding compiled by Transformers itself, in CUDA graphs."""
    flash, eager = (model.cuda() for model in family.pair("flash_two"))
    ids, mask = tokens(2, 21).cuda(), left_padded(2, 21, 6).cuda()
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    expected = eager.generate(ids, **settings)
    assert torch.equal(flash.generate(ids, **settings), expected)
    assert torch.equal(flash.generate(ids, cache_implementation="static", **settings), expected)
