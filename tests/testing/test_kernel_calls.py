"""`kernel_calls`: what it records of a call, wherever the call comes from, and when it ends."""

from __future__ import annotations

import pytest
import torch
from helpers import inputs
from torch.utils.checkpoint import checkpoint

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.testing import KernelCall, kernel_calls

CAUSAL = AttentionMask.causal()


def test_a_call_as_it_was() -> None:
    query, key, value = inputs(7, 9, value_dim=8, dtype=torch.bfloat16)
    with kernel_calls() as calls:
        flash_attention(query, key, value)
    assert calls == [
        KernelCall(
            "blockwise", "forward", query.shape, key.shape, value.shape, query.dtype,
            query.device, "full",
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, "full"),
        (CAUSAL, "band"),
        (AttentionMask.from_padding(torch.arange(9) > 2), "intervals"),
        (CAUSAL & AttentionMask.from_dense(torch.arange(63).view(7, 9) % 2 == 0), "band+dense"),
        (torch.arange(63).view(7, 9) % 2 == 0, "dense"),
    ],
    ids=["full", "band", "intervals", "both", "dense"],
)
def test_what_a_kernel_reads_of_the_mask(mask, expected: str) -> None:
    with kernel_calls() as calls:
        flash_attention(*inputs(7, 9), mask=mask)
    assert [call.mask for call in calls] == [expected]


def test_backward_kernels_are_recorded_if_wanted() -> None:
    leaves = [x.requires_grad_() for x in inputs(7, 9)]
    for backward, expected in ((False, ["forward"]), (True, ["forward", "backward"])):
        with kernel_calls(backward=backward) as calls:
            flash_attention(*leaves, mask=CAUSAL).sum().backward()
        assert [call.direction for call in calls] == expected
        assert {call.query for call in calls} == {leaves[0].shape}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_graphs_and_checkpoints_count(backend: str) -> None:
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in inputs(7, 9)]

    def attend(query, key, value):
        return flash_attention(query, key, value, mask=CAUSAL)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    with kernel_calls(backward=True) as calls:
        for _ in range(2):  # the first also compiles
            compiled(*leaves).sum().backward()
    assert [call.direction for call in calls] == ["forward", "backward"] * 2
    with kernel_calls() as calls:
        checkpoint(attend, *leaves, use_reentrant=False).sum().backward()
    assert len(calls) == 2
    torch._dynamo.reset()


def test_blocks_may_be_nested_and_end_by_an_error() -> None:
    tensors = inputs(7, 9)
    with kernel_calls() as outer:
        flash_attention(*tensors)
        with pytest.raises(RuntimeError, match="planned"), kernel_calls() as inner:
            flash_attention(*tensors)
            raise RuntimeError("planned")
        flash_attention(*tensors)
    flash_attention(*tensors)
    assert (len(outer), len(inner)) == (3, 1)
