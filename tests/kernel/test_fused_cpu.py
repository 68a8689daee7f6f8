"""PyTorch's fused CPU op as a kernel: when it is asked, and what is kept from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import check, dtype_id, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention, rms
from torch import Tensor

from hf_flash_two import AttentionMask, flash_attention, kernels
from hf_flash_two.kernels.fused_cpu.pieces import Plan, plan_of
from hf_flash_two.kernels.params import AttentionParams

LENGTH = 300
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def keep(*runs: tuple[int, int]) -> Tensor:
    """bool [2, LENGTH], True in the run of each batch row."""
    index = torch.arange(LENGTH)
    return torch.stack([(index >= start) & (index < stop) for start, stop in runs])


def documents(*lengths: int, causal: bool = True) -> AttentionMask:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return AttentionMask.from_documents(ends, causal=causal)


SCATTERED = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.1
MASKS: dict[str, Callable[[], AttentionMask]] = {
    "full": AttentionMask.full,
    "causal": AttentionMask.causal,
    "left padding": lambda: (
        AttentionMask.causal() & AttentionMask.from_padding(keep((70, 300), (0, 300)))
    ),
    "right padding": lambda: AttentionMask.from_padding(keep((0, 170), (0, 300))),
    "nothing in one row": lambda: AttentionMask.from_padding(keep((0, 0), (0, 300))),
    "padding with holes": lambda: AttentionMask.causal() & AttentionMask.from_padding(SCATTERED),
    "long documents": lambda: documents(140, 160),
    "short documents": lambda: documents(40, 1, 59, 100, 100),
    "documents both ways": lambda: documents(140, 160, causal=False),
    "window": lambda: AttentionMask.causal(window=37),
    "window both ways": lambda: AttentionMask.window(20, 30),
    "prefix": lambda: AttentionMask.from_prefix(torch.tensor([70, 0]), LENGTH),
    "chunks": lambda: AttentionMask.chunked(64, LENGTH),
    "blocks": lambda: AttentionMask.from_blocks(torch.arange(LENGTH) // 64 % 2 - 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", MASKS)
def test_equals_the_dense_formula(name: str, dtype: torch.dtype) -> None:
    mask = MASKS[name]()
    tensors = inputs(LENGTH, LENGTH, dtype=dtype, head_dim=32)
    check("fused_cpu", *tensors, mask=mask, visible=mask.to_dense(LENGTH, LENGTH))


@pytest.mark.parametrize("rows", [1, 100, 430])
def test_queries_at_another_place(rows: int) -> None:
    """The last of a cache, and more queries than keys, of which some see nothing."""
    for mask in (AttentionMask.causal(), AttentionMask.causal(window=50)):
        check("fused_cpu", *inputs(rows, LENGTH), mask=mask, visible=mask.to_dense(rows, LENGTH))


@pytest.mark.parametrize("scale", [-0.3, 0.7])
def test_scale(scale: float) -> None:
    check("fused_cpu", *inputs(70, 70), scale=scale)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "length before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last axis strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one batch row for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout_gives_the_same_bits(lay_out: Callable) -> None:
    def results(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = flash_attention(*leaves, mask=AttentionMask.causal(), kernel="fused_cpu")
        return [out, *torch.autograd.grad(out, leaves, lay_out(upstream))]

    given, upstream = [lay_out(x) for x in inputs(90, 90)], torch.randn(2, 6, 90, 16)
    upstream = lay_out(upstream).contiguous()
    for strided, plain in zip(
        results(given), results([x.contiguous() for x in given]), strict=True
    ):
        assert torch.equal(strided, plain)


def test_gradients_of_lse() -> None:
    """The op has none: tiles compute the backward."""
    leaves = [x.requires_grad_() for x in inputs(90, 90)]
    grads = []
    for kernel in ("fused_cpu", "blockwise"):
        out, lse = flash_attention(
            *leaves, mask=AttentionMask.causal(), return_lse=True, kernel=kernel
        )
        grads.append(torch.autograd.grad(out.sum() + lse.sin().sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dirt", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["causal", "left padding", "padding with holes", "window"])
def test_what_is_hidden_touches_nothing(name: str, dirt: float) -> None:
    """And rows beside one that holds dirt keep their bits."""
    mask = MASKS[name]()
    visible = mask.to_dense(LENGTH, LENGTH).expand(2, 1, -1, -1).clone()
    last = LENGTH - 1 if name != "padding with holes" else int((~SCATTERED[0]).nonzero()[0])
    query, key, value = inputs(LENGTH, LENGTH)
    upstream = torch.randn(2, 6, LENGTH, 16)

    def results(key: Tensor, value: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out, lse = flash_attention(*leaves, mask=mask, kernel="fused_cpu", return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]

    clean = results(key, value)
    dirty = results(
        *(
            x.index_fill(2, torch.tensor(last), dirt).where(
                torch.tensor([True, False]).view(2, 1, 1, 1), x
            )
            for x in (key, value)
        )
    )
    blind = ~visible[0, 0, :, last]
    for got, want in zip(dirty[:2], clean[:2], strict=True):
        torch.testing.assert_close(got[0][:, blind], want[0][:, blind], rtol=1e-4, atol=1e-5)
    for got, want in zip(dirty, clean, strict=True):
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("name", MASKS)
def test_the_same_bits_again_and_alone(name: str) -> None:
    """A row's result does not depend on what else is in the batch."""
    mask, tensors = MASKS[name](), inputs(LENGTH, LENGTH)
    upstream = torch.randn(2, 6, LENGTH, 16)

    def results(batch: slice) -> list[Tensor]:
        leaves = [x[batch].detach().requires_grad_() for x in tensors]
        part = mask.each_tensor(lambda x: x[batch] if x.shape[0] > 1 else x)
        out = flash_attention(*leaves, mask=part, kernel="fused_cpu")
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream[batch])]

    whole = results(slice(0, 2))
    for again, first in zip(results(slice(0, 2)), whole, strict=True):
        assert torch.equal(again, first)
    for row in range(2):
        for alone, together in zip(results(slice(row, row + 1)), whole, strict=True):
            assert torch.equal(alone[0], together[row])


REFUSED = {
    "bias": ({"bias": torch.zeros(1, 1, 9, 9)}, "no bias"),
    "softcap": ({"softcap": 3.0}, "softcap"),
    "alibi": ({"alibi_slopes": torch.ones(6)}, "ALiBi"),
    "sinks": ({"sinks": torch.zeros(6)}, "sinks"),
    "dropout": ({"dropout_p": 0.1}, "dropout"),
    "dense": ({"mask": torch.eye(9).bool()}, "dense mask"),
    "scale": ({"scale": 0.0}, "no scale of 0"),
    "tiles": ({"q_bucket_size": 4}, "does not take q_bucket_size"),
}


@pytest.mark.parametrize(("arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_say_is_refused_by_name(arguments: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"kernel: 'fused_cpu' cannot run, .*{reason}"):
        flash_attention(*inputs(9, 9), kernel="fused_cpu", **arguments)
    flash_attention(*inputs(9, 9), **arguments)


def test_shapes_it_cannot_take_are_refused_by_name() -> None:
    """Without keys the op would end the process."""
    for tensors, reason in (
        (inputs(9, 0), "there are no keys"),
        (inputs(9, 9, value_dim=8), "same head_dim"),
    ):
        with pytest.raises(ValueError, match=f"'fused_cpu' cannot run, .*{reason}"):
            flash_attention(*tensors, kernel="fused_cpu")
        assert flash_attention(*tensors).isfinite().all()


def settings_of(mask: AttentionMask, query_length: int, key_length: int) -> AttentionParams:
    return AttentionParams(
        mask.query_start, mask.query_stop, mask.key_bounds(), mask.dense, *[None] * 4,
        query_offset=mask.resolve_offset(query_length, key_length), window_left=mask.window_left,
        window_right=mask.window_right, scale=1.0, softcap=0.0, dropout_p=0.0, block_q=None,
        block_k=None,
    )  # fmt: skip


CHOICES = [
    ("full", 300, "fused_cpu"),
    ("causal", 300, "fused_cpu"),
    ("left padding", 300, "fused_cpu"),
    ("short documents", 300, "fused_cpu"),
    ("window", 300, "fused_cpu"),
    ("causal", 21, "blockwise"),  # three query heads share a key head
    ("causal", 22, "fused_cpu"),
]


@pytest.mark.parametrize(("name", "rows", "kernel"), CHOICES)
def test_choice(name: str, rows: int, kernel: str) -> None:
    tensors = inputs(rows, LENGTH)
    chosen = kernels.select("auto", *tensors, settings_of(MASKS[name](), rows, LENGTH))
    assert chosen.name == kernel


def test_a_mask_with_holes_is_for_tiles() -> None:
    """The first and the last keys, and nothing between."""
    ends = torch.tensor([0, 4000, 8000])
    first = torch.where(torch.arange(8000) < 64, 0, torch.arange(8000))
    mask = AttentionMask.from_intervals(first, torch.where(first == 0, 8000, first + 64))
    plan = plan_of(settings_of(mask, 8000, 8000), 1, 8000, 8000, 64)
    assert isinstance(plan, str) and "holes" in plan
    plan = plan_of(settings_of(AttentionMask.from_documents(ends), 8000, 8000), 1, 8000, 8000, 64)
    assert isinstance(plan, Plan) and len(plan.pieces) == 2


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_pieces_show_what_the_mask_shows(data: st.DataObject) -> None:
    """Each row is in one piece at most, and all that it sees is in there."""
    batch, rows, keys = (data.draw(st.integers(1, most)) for most in (3, 400, 400))
    step = data.draw(st.sampled_from([1, 0, 7]))
    numbers = st.integers(-20, 420)
    start = torch.tensor([[data.draw(numbers)] for _ in range(batch)]) + step * torch.arange(keys)
    stop = torch.tensor([[data.draw(numbers)] for _ in range(batch)]).expand(-1, keys)
    if data.draw(st.booleans()):
        stop = start + data.draw(st.integers(0, 90))
    mask = AttentionMask.from_intervals(start, stop, query_offset=data.draw(st.integers(-9, 60)))
    if data.draw(st.booleans()):
        hidden = torch.rand(batch, keys) < data.draw(st.sampled_from([0.02, 0.5]))
        mask = mask & AttentionMask.from_padding(~hidden)
    params = settings_of(mask, rows, keys)
    plan = plan_of(params, batch, rows, keys, 64)
    if isinstance(plan, str):
        return
    visible = mask.to_dense(rows, keys).expand(batch, 1, rows, keys)[:, 0]
    shown = torch.zeros(batch, rows, keys, dtype=torch.bool)
    times = torch.zeros(batch, rows)
    for piece in plan.pieces:
        size = (piece.rows.stop - piece.rows.start, piece.keys.stop - piece.keys.start)
        seen = torch.ones(size, dtype=torch.bool)
        if piece.causal:
            assert size[0] == size[1]
            seen = seen.tril()
        part = visible[piece.batch, piece.rows, piece.keys]
        assert (part == seen).all() or piece.masked
        shown[piece.batch, piece.rows, piece.keys] |= part
        times[piece.batch, piece.rows] += 1
    assert torch.equal(shown, visible) and times.max() <= 1
    blind = ~visible.any(2)
    assert torch.equal(blind, plan.blind.expand(batch, 1, rows)[:, 0]) if blind.any() else True
    assert (plan.blind is not None) == bool(blind.any())


@pytest.mark.parametrize("name", ["causal", "left padding", "long documents", "window", "prefix"])
def test_as_exact_as_sdpa_in_bfloat16(name: str) -> None:
    """No result is rounded more often than PyTorch's own with the dense mask."""
    mask = MASKS[name]()
    visible = mask.to_dense(LENGTH, LENGTH)
    tensors = inputs(LENGTH, LENGTH, heads=(4, 4), head_dim=64, dtype=torch.bfloat16)
    upstream = torch.randn(2, 4, LENGTH, 64, dtype=torch.bfloat16)
    seen = visible.expand(2, 1, -1, -1).any(3, keepdim=True)

    def results(attend: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, (upstream * seen).to(dtype))
        return [out.detach() * seen, *grads]

    exact = results(lambda *x: dense_attention(*x, visible=visible)[0], torch.float64)
    ours = results(lambda *x: flash_attention(*x, mask=mask, kernel="fused_cpu"), torch.bfloat16)
    # Rows that see nothing would be NaN.
    shown = visible | ~seen
    theirs = results(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=shown), torch.bfloat16)
    for what, got, other, right in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        error, allowed = (rms(x.double() - right) for x in (got, other))
        assert error <= 1.1 * allowed, f"{what}: {error:.2e} > 1.1 * {allowed:.2e}"


def test_the_gradient_of_a_lone_key_is_zero() -> None:
    """Its weight is 1 whatever the query: what is left of the query's gradient is rounding."""
    query, key, value = (
        x.requires_grad_() for x in inputs(LENGTH, LENGTH, dtype=torch.bfloat16, head_dim=64)
    )
    mask = AttentionMask.causal(window=1)
    for kernel in ("fused_cpu", "blockwise"):
        out = flash_attention(query, key, value, mask=mask, kernel=kernel)
        (d_query,) = torch.autograd.grad(out, query, torch.randn_like(out))
        assert d_query.abs().max() < 1e-4
