"""Which kernel computes a call, and what those say that do not."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers import inputs

from hf_flash_two import flash_attention, kernels, op
from hf_flash_two.kernels.params import SCHEMA, TENSORS, AttentionParams
from hf_flash_two.testing import kernel_calls


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A kernel before all others that computes calls without a bias; the passes that it ran."""
    runs = []
    blockwise = kernels._loaded("blockwise")
    forward, backward = blockwise.forward, blockwise.backward

    def declines(query, key, value, params, by_name):
        return None if params.bias is None else "it adds no bias"

    def load():
        return (
            lambda *args: runs.append("forward") or forward(*args),
            lambda *args: runs.append("backward") or backward(*args),
        )

    package = SimpleNamespace(declines=declines, load=load)
    monkeypatch.setattr(kernels, "_PACKAGES", {"picky": package, **kernels._PACKAGES})
    monkeypatch.setattr("hf_flash_two.attention.KERNELS", ("auto", *kernels._PACKAGES))
    kernels._loaded.cache_clear()
    yield runs
    kernels._loaded.cache_clear()


def test_auto_takes_the_first_that_does_not_decline(picky: list[str]) -> None:
    tensors, bias = [x.requires_grad_() for x in inputs(9, 20)], torch.zeros(1, 1, 9, 20)
    flash_attention(*tensors).sum().backward()
    assert picky == ["forward", "backward"]
    flash_attention(*tensors, bias=bias).sum().backward()
    assert picky == ["forward", "backward"]


def test_one_asked_for_by_name_says_why_it_declines(picky: list[str]) -> None:
    tensors, bias = inputs(9, 20), torch.zeros(1, 1, 9, 20)
    flash_attention(*tensors, kernel="picky")
    with pytest.raises(ValueError, match="kernel: 'picky' cannot run, it adds no bias; use 'auto'"):
        flash_attention(*tensors, bias=bias, kernel="picky")
    assert picky == ["forward"]


def test_the_backward_may_be_that_of_another_kernel(
    picky: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward and a backward of two kernels; by name the backward raises its own reason."""
    package = kernels._PACKAGES["picky"]
    package.declines_backward = lambda *call, by_name: "it has no backward"
    leaves = [x.requires_grad_() for x in inputs(9, 20)]
    with kernel_calls(backward=True) as calls:
        got = flash_attention(*leaves)
        grads = torch.autograd.grad(got.sum(), leaves)
    assert [call.kernel for call in calls] == ["picky", "fused_cpu"]
    want = flash_attention(*leaves, kernel="blockwise")
    for a, b in zip(grads, torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    out = flash_attention(*leaves, kernel="picky")
    with pytest.raises(ValueError, match="'picky' cannot run, it has no backward; use 'auto'"):
        out.sum().backward()
    assert picky == ["forward", "forward"]


def test_the_ops_take_every_setting_by_its_name() -> None:
    """Tensors come first; both schemas hold all fields in their order."""
    assert list(SCHEMA) == list(AttentionParams._fields)
    assert tuple(SCHEMA)[: len(TENSORS)] == TENSORS
    for packet, names in (
        (torch.ops.hf_flash_two.flash_attn_fwd, op.FORWARD_NAMES),
        (torch.ops.hf_flash_two.flash_attn_bwd, op.BACKWARD_NAMES),
    ):
        arguments = [argument.name for argument in packet.default._schema.arguments]
        assert arguments == list(names)
        start = arguments.index(AttentionParams._fields[0])
        assert arguments[start:][: len(SCHEMA)] == list(SCHEMA)


def test_a_call_that_all_decline_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(reason: str) -> SimpleNamespace:
        return SimpleNamespace(declines=lambda *call, by_name: reason)

    packages = {"one": never("it is off"), "other": never("it is too old")}
    monkeypatch.setattr(kernels, "_PACKAGES", packages)
    with pytest.raises(ValueError, match="none computes .*one: it is off; other: it is too old"):
        flash_attention(*inputs(9, 20))


KNOWN = {"query_start", "query_stop", "key_bounds", "dense", "bias", "alibi_slopes", "sinks"}
UNKNOWN = {"softcap", "dropout_p", *TENSORS} - KNOWN


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_the_fused_op_declines_fields_that_it_does_not_know(name: str) -> None:
    """A field that is added is declined until it is said to be understood."""
    tensors = inputs(99, 99)
    params = AttentionParams(**dict.fromkeys(AttentionParams._fields))._replace(
        query_offset=0, scale=1.0, softcap=0.0, dropout_p=0.0
    )
    assert kernels.select("auto", *tensors, params).name == "fused_cpu"
    given = params._replace(**{name: torch.ones(1, 99) if name in TENSORS else 0.5})
    assert kernels.select("auto", *tensors, given).name == "blockwise"
