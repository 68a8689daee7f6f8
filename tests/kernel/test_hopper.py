"""The Hopper kernels on a Hopper GPU: every mask and term against the dense formula in float64.

"auto" takes them here, as users do, so a forward may meet the backward of another kernel; which
kernel computed what is checked beside the numbers. Without a Hopper GPU nothing runs them: see
tests/kernel/test_hopper_compile.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import BATCH, check, inputs, padded
from machine import HOPPER
from mask_cases import (
    MASKS,
    blocks,
    causal,
    chunk,
    dense,
    dense_and_window,
    full,
    holed,
    packed,
    prefix,
    tree,
    two_sided_window,
    window,
)
from oracle import dense_attention
from torch import Tensor

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.kernels import dropout
from hf_flash_two.testing import kernel_calls

pytestmark = [
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: compute capability 9.0"),
    pytest.mark.usefixtures("poisoned_memory"),
]

CONFIG = "hf_flash_two.kernels.hopper.config"
HALF = (torch.bfloat16, torch.float16)
DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))
BY_HOPPER = {"forward": "hopper", "backward": "hopper"}
HEADS = ((6, 2), (5, 1))
LENGTHS = ((513, 513), (128, 128), (300, 1111), (700, 260))
WITHOUT_DENSE = [make for make in MASKS if make not in (dense, dense_and_window)]
SOME = [full, causal, two_sided_window, padded, packed]


@pytest.fixture(autouse=True)
def taken_where_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" takes them for small calls too."""
    monkeypatch.setattr(f"{CONFIG}.forward_is_slow", lambda *call: None)
    monkeypatch.setattr(f"{CONFIG}.backward_is_slow", lambda *call: None)


@pytest.fixture
def ran() -> Iterator[Callable[[], dict[str, str]]]:
    """Which kernel computed the last forward and the last backward."""
    with kernel_calls(backward=True) as calls:
        yield lambda: {call.direction: call.kernel for call in calls}


def drawn(query_length: int, key_length: int, dims: tuple[int, int] = (128, 128), **given):
    given = {"dtype": torch.bfloat16, **given}
    return inputs(
        query_length, key_length, head_dim=dims[0], value_dim=dims[1], device="cuda", **given
    )


def matrix() -> list:
    """Masks x lengths x head dims, the heads taking turns."""
    heads = itertools.cycle(HEADS)
    return [
        pytest.param(
            make, lengths, dims, next(heads),
            id=f"{make.__name__}-{lengths[0]}x{lengths[1]}-D{dims[0]}",
        )
        for dims, make, lengths in itertools.product(DIMS, WITHOUT_DENSE, LENGTHS)
        # A tree's queries are its keys.
        if make is not tree or lengths[0] <= lengths[1]
    ]  # fmt: skip


@pytest.mark.parametrize(("make", "lengths", "dims", "heads"), matrix())
def test_masks_within_the_budget_of_the_dense_formula(
    ran: Callable,
    make: Callable,
    lengths: tuple[int, int],
    dims: tuple[int, int],
    heads: tuple[int, int],
) -> None:
    """Odd lengths, rows that see nothing, more queries than keys and fewer; every gradient."""
    mask, visible = make(*lengths)
    check("auto", *drawn(*lengths, dims, heads=heads), mask=mask.to("cuda"), visible=visible)
    assert ran() == BY_HOPPER


def often(cases: list[tuple], *chosen: tuple) -> list:
    """The cases as parameters, all but those chosen in the sweep."""
    return [
        pytest.param(*case, marks=() if case in chosen else pytest.mark.sweep) for case in cases
    ]


@pytest.mark.parametrize(
    ("dtype", "heads", "make", "dims"),
    often(
        list(itertools.product(HALF, ((4, 4), (8, 2), (16, 1)), (causal, padded), DIMS)),
        (torch.float16, (4, 4), causal, (64, 64)),
        (torch.float16, (8, 2), padded, (128, 128)),
        (torch.bfloat16, (4, 4), causal, (128, 128)),
        (torch.bfloat16, (8, 2), causal, (128, 128)),
        (torch.bfloat16, (8, 2), padded, (64, 64)),
    ),
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_dtypes_and_groups(
    ran: Callable,
    dtype: torch.dtype,
    heads: tuple[int, int],
    make: Callable,
    dims: tuple[int, int],
) -> None:
    """Where that makes fewer tiles, several heads of a group share one."""
    for lengths in ((513, 513), (100, 900)):
        mask, visible = make(*lengths)
        tensors = drawn(*lengths, dims, heads=heads, dtype=dtype)
        check("auto", *tensors, mask=mask.to("cuda"), visible=visible)
        assert ran() == BY_HOPPER


OTHER_DIMS = (
    *((n, n) for n in (8, 40, 72, 80, 112, 160, 200, 248)), (128, 64), (64, 128), (40, 96),
)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "dims"),
    often(
        list(itertools.product((causal, padded), OTHER_DIMS)),
        (causal, (80, 80)), (causal, (200, 200)), (padded, (40, 40)), (padded, (128, 64)),
        (padded, (64, 128)),
    ),
    ids=lambda x: getattr(x, "__name__", str(x)),
)  # fmt: skip
def test_other_head_dims_are_padded(ran: Callable, make: Callable, dims: tuple[int, int]) -> None:
    mask, visible = make(300, 300)
    check("auto", *drawn(300, 300, dims), mask=mask.to("cuda"), visible=visible)
    assert ran() == BY_HOPPER


def terms(heads: int, query_length: int, key_length: int) -> dict[str, dict]:
    p, seed = 0.2, 2**40 + 11
    index = [torch.arange(n) for n in (heads, query_length, key_length)]
    keep = [dropout.keep(torch.tensor([seed]), b, *index, p) for b in range(BATCH)]
    return {
        "softcap": {"softcap": 5.0},
        "sinks": {"sinks": torch.randn(heads)},
        "alibi": {"alibi_slopes": torch.rand(BATCH, heads) / 8},
        "negative": {"scale": -0.1},
        "zero": {"scale": 0.0},
        "dropout": {"dropout_p": p, "dropout_seed": seed, "keep": torch.stack(keep)},
        "all": {
            "softcap": 20.0,
            "sinks": torch.randn(BATCH, heads),
            "alibi_slopes": torch.rand(heads) / 8,
            "dropout_p": p,
            "dropout_seed": seed,
            "keep": torch.stack(keep),
        },
    }


@pytest.mark.parametrize(
    ("term", "make", "dims"),
    often(
        list(itertools.product(terms(1, 1, 1), (full, causal, padded, window), DIMS)),
        ("all", causal, (64, 64)), ("all", padded, (128, 128)), ("all", causal, (256, 256)),
        ("sinks", causal, (128, 128)), ("alibi", padded, (64, 64)), ("zero", causal, (128, 128)),
        ("negative", causal, (128, 128)), ("dropout", padded, (128, 128)),
    ),
    ids=lambda x: getattr(x, "__name__", str(x)),
)  # fmt: skip
def test_terms(term: str, make: Callable, dims: tuple[int, int]) -> None:
    length = 333
    mask, visible = make(length, length)
    given = terms(6, length, length)[term]
    given = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in given.items()}
    tensors = drawn(length, length, dims)
    check(
        "auto", *tensors, mask=mask.to("cuda"), visible=visible, **given,
        vanishing_gradients=term == "zero",
    )  # fmt: skip


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_slopes_that_raise_the_scores_of_what_is_far(dims: tuple[int, int]) -> None:
    """Behind the last query, scores of zeros would be above all others."""
    mask, visible = full(333, 333)
    slopes = torch.linspace(-2, 1, 6, device="cuda")[None]
    check("auto", *drawn(333, 333, dims), mask=mask, visible=visible, alibi_slopes=slopes)


def test_dropped_are_the_pairs_that_the_other_kernels_drop() -> None:
    """Or none at all are dropped here: the bits are those of the seed, whoever computes."""
    tensors = drawn(300, 300)
    given = dict(dropout_p=0.5, dropout_seed=5, mask=AttentionMask.causal())
    got = flash_attention(*tensors, **given)
    want = flash_attention(*tensors, kernel="triton", **given)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
@pytest.mark.parametrize("wanted", ["out", "lse", "both"])
def test_gradients_of_out_and_of_lse(dims: tuple[int, int], wanted: str) -> None:
    mask, visible = causal(200, 300)
    tensors = drawn(200, 300, dims)
    given = {"d_out": torch.zeros(BATCH, 6, 200, dims[1], dtype=torch.bfloat16, device="cuda")}
    check(
        "auto", *tensors, mask=mask, visible=visible, through_lse=wanted != "out",
        **(given if wanted == "lse" else {}),
    )  # fmt: skip


STRIDES = {
    "transposed": lambda b, h, t, d: torch.randn(b, t, h, d).transpose(1, 2),
    "time-first": lambda b, h, t, d: torch.randn(t, b, h, d).permute(1, 2, 0, 3),
    "dim-outside": lambda b, h, t, d: torch.randn(b, h, d, t).transpose(2, 3),
    "expanded-batch": lambda b, h, t, d: torch.randn(1, h, t, d).expand(b, h, t, d),
    "expanded-heads": lambda b, h, t, d: torch.randn(b, 1, t, d).expand(b, h, t, d),
    "odd-start": lambda b, h, t, d: torch.randn(b, h + 1, t + 5, 2 * d)[:, 1:, 2:-3, 3 : 3 + d],
    "sliced": lambda b, h, t, d: torch.randn(b, h + 1, t + 5, 2 * d)[:, 1:, 2:-3, 8 : 8 + d],
    "last-stride-2": lambda b, h, t, d: torch.randn(b, h, t, 2 * d)[..., ::2],
    "qkv-in-one": lambda b, h, t, d: torch.randn(b, t, 3, h, d)[:, :, 1].transpose(1, 2),
}


@pytest.mark.parametrize(
    ("stride", "dims"),
    often(
        list(itertools.product(STRIDES, ((64, 64), (128, 128), (192, 128)))),
        *((stride, (128, 128)) for stride in STRIDES),
    ),
    ids=str,
)
def test_strides(stride: str, dims: tuple[int, int]) -> None:
    """Of the inputs and of what arrives from above."""
    make, (head_dim, value_dim) = STRIDES[stride], dims
    shapes = (
        (BATCH, 6, 133, head_dim), (BATCH, 2, 270, head_dim), (BATCH, 2, 270, value_dim),
    )  # fmt: skip
    # A copy would have strides of its own.
    tensors = [make(*shape).to("cuda", torch.bfloat16) for shape in shapes]
    d_out = make(BATCH, 6, 133, value_dim).to("cuda", torch.bfloat16)
    mask, visible = causal(133, 270)
    check("auto", *tensors, mask=mask, visible=visible, d_out=d_out)


@pytest.mark.parametrize("offset", [-200, -1, 0, 7, 300, 900])
@pytest.mark.parametrize("length", [(200, 500), (500, 200)], ids=str)
def test_query_offset(length: tuple[int, int], offset: int) -> None:
    """Caches longer than what was written to them, and queries that stand before all keys."""
    rows, keys = length
    mask = AttentionMask.causal(window=150, query_offset=offset)
    position, key = torch.arange(offset, offset + rows)[:, None], torch.arange(keys)
    visible = ((key <= position) & (position - key < 150))[None, None]
    check("auto", *drawn(rows, keys), mask=mask, visible=visible)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_rows_that_see_nothing(ran: Callable, dims: tuple[int, int]) -> None:
    """Out 0, lse -inf, gradients exactly 0 whatever arrives from above."""
    leaves = [x.requires_grad_() for x in drawn(200, 200, dims)]
    keep = torch.ones(BATCH, 200, dtype=torch.bool, device="cuda")
    keep[1] = False
    out, lse = flash_attention(*leaves, mask=AttentionMask.from_padding(keep), return_lse=True)
    assert not out[1].any() and (lse[1] == -math.inf).all()
    upstream = (torch.full_like(out, math.nan), torch.full_like(lse, math.nan))
    for x in upstream:
        x[0] = 1
    for grad in torch.autograd.grad((out, lse), leaves, upstream):
        assert grad[0].any() and not grad[1].any()
    assert ran() == BY_HOPPER


@pytest.mark.parametrize("make", SOME, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("size", [40.0, 1e4])
def test_large_scores(make: Callable, dims: tuple[int, int], size: float) -> None:
    query, key, value = drawn(300, 300, dims, dtype=torch.bfloat16)
    mask, visible = make(300, 300)
    out, lse = flash_attention(query * size, key, value, mask=mask.to("cuda"), return_lse=True)
    visible = None if visible is None else visible.to("cuda")
    exact, exact_lse = dense_attention(
        *((x * factor).double() for x, factor in ((query, size), (key, 1), (value, 1))),
        visible=visible,
    )
    torch.testing.assert_close(out.double(), exact, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("make", SOME)
def test_gradients_in_any_order(ran: Callable, make: Callable, dims: tuple[int, int]) -> None:
    """Equal to those in a fixed order but for rounding; the same where both are computed alike."""
    mask, _ = make(700, 700)
    tensors = [x.requires_grad_() for x in drawn(700, 700, dims)]
    found = []
    for deterministic in (True, False):
        out = flash_attention(*tensors, mask=mask.to("cuda"), deterministic=deterministic)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(out, tensors, torch.randn_like(out)))
        assert ran() == BY_HOPPER
    most = 0 if max(dims) > (64 if mask.query_start is not None else 128) else 2**-8
    for want, got in zip(*found, strict=True):
        assert (got - want).float().norm() <= most * want.float().norm()


@pytest.mark.parametrize("make", WITHOUT_DENSE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_repeats_bit_for_bit(make: Callable, dims: tuple[int, int]) -> None:
    """Thirty times, with the GPU busy in another order each time."""
    length = 777
    mask = make(length, length)[0].to("cuda")
    tensors = drawn(length, length, dims, heads=(6, 2))
    upstream = torch.randn(BATCH, 6, length, dims[1], device="cuda").bfloat16()

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = flash_attention(*leaves, mask=mask, return_lse=True)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]

    first = run()
    other = torch.randn(512, 512, device="cuda")
    for turn in range(29):
        for _ in range(turn % 4):
            other = other @ other / 512
        for again, before in zip(run(), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize(
    ("make", "dims"),
    often(
        list(itertools.product(SOME, DIMS)), (causal, (64, 64)), (packed, (128, 128)),
        (causal, (128, 128)), (full, (256, 256)),
    ),
    ids=lambda x: getattr(x, "__name__", str(x)),
)  # fmt: skip
def test_many_tiles(make: Callable, dims: tuple[int, int]) -> None:
    """More tiles than processors, so that a processor computes several, one after another."""
    mask, _ = make(4000, 4000)
    tensors = drawn(4000, 4000, dims, heads=(12, 4))
    upstream = torch.randn(BATCH, 12, 4000, dims[1], device="cuda").bfloat16()
    found = []
    for kernel in ("auto", "triton"):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, lse = flash_attention(*leaves, mask=mask.to("cuda"), kernel=kernel, return_lse=True)
        found.append([out, lse, *torch.autograd.grad((out, lse), leaves, (upstream, lse * 0 + 1))])
    for got, want in zip(*found, strict=True):
        assert got.isfinite().equal(want.isfinite())
        got, want = got.nan_to_num(neginf=0).float(), want.nan_to_num(neginf=0).float()
        assert (got - want).norm() <= 1e-2 * want.norm()


def test_more_heads_than_a_grid_has_rows() -> None:
    query, key, value = drawn(65, 65, (64, 64), heads=(2, 1), batch=35000)
    out = flash_attention(query, key, value, mask=AttentionMask.causal())
    at = slice(34990, None)
    want = flash_attention(query[at], key[at], value[at], mask=AttentionMask.causal())
    assert torch.equal(out[at], want)


def test_out_is_laid_out_as_the_query() -> None:
    query = torch.randn(BATCH, 300, 6, 64, device="cuda").bfloat16().transpose(1, 2)
    _, key, value = drawn(300, 300, (64, 64))
    out = flash_attention(query, key, value)
    assert out.transpose(1, 2).is_contiguous()


def test_remembered_launches_take_new_values() -> None:
    """Same layout, other tensors, other mask: each call is computed from its own."""
    for seed in range(3):
        torch.manual_seed(seed)
        keep = torch.rand(BATCH, 300, device="cuda") > 0.3
        mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
        visible = mask.to_dense(300, 300, "cuda")
        given = dict(softcap=float(seed + 1), sinks=torch.randn(6, device="cuda"))
        check("auto", *drawn(300, 300), mask=mask, visible=visible, **given)


@pytest.mark.parametrize("make", [causal, padded], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_cuda_graph(make: Callable, dims: tuple[int, int]) -> None:
    """Nothing in a call waits for the GPU, so a graph takes it and replays it on other values."""
    mask = make(500, 500)[0].to("cuda")
    leaves = [x.requires_grad_() for x in drawn(500, 500, dims, heads=(8, 2))]
    upstream = torch.randn(BATCH, 8, 500, dims[1], device="cuda").bfloat16()

    def step() -> list[Tensor]:
        out = flash_attention(*leaves, mask=mask)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.normal_()
    for _ in range(3):
        graph.replay()
    for got, want in zip(replayed, step(), strict=True):
        assert torch.equal(got, want)


# Hidden pairs, whatever they hold


class Hidden:
    """One call with a mask, to be repeated with some of its numbers replaced."""

    def __init__(self, make: Callable, dims: tuple[int, int], deterministic: bool = True) -> None:
        length, self.deterministic = 300, deterministic
        self.mask = make(length, length)[0].to("cuda")
        self.visible = self.mask.to_dense(length, length, "cuda")[:, 0].expand(BATCH, -1, -1)
        query, key, value = drawn(length, length, dims, heads=(3, 1))
        d_out = torch.randn(BATCH, 3, length, dims[1]).to("cuda", torch.bfloat16)
        self.tensors = {"query": query, "key": key, "value": value, "d_out": d_out}

    def run(self, change: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        change(tensors)
        d_out = tensors.pop("d_out")
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        out, lse = flash_attention(
            **leaves, mask=self.mask, return_lse=True, deterministic=self.deterministic
        )
        grads = torch.autograd.grad(out, list(leaves.values()), d_out)
        found = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return found | {"out": out.detach(), "lse": lse.detach()}


HIDING = [causal, window, two_sided_window, padded, holed, packed, prefix, blocks, tree, chunk]


def assert_unmoved(name: str, got: Tensor, clean: Tensor, apart: Tensor) -> None:
    """Where ``apart``, results are finite and what they were; a tile that is computed again is
    rounded in another order.

    Args:
        apart: bool [B, T].
    """
    where = apart[:, None].expand(got.shape[:3])
    if not where.any():  # under a causal mask each key shares a row with each
        return
    got, clean = got[where].float(), clean[where].float()
    assert torch.equal(got == -math.inf, clean == -math.inf), name
    got, clean = (x.masked_fill(x == -math.inf, 0) for x in (got, clean))
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} not finite"
    assert (got - clean).abs().max() <= 2e-2 * clean.abs().max(), name


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("make", HIDING, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_who_is_seen_by_nobody_does_not_matter(
    make: Callable, dims: tuple[int, int], poison: float
) -> None:
    """Padding keys and rows that see nothing may hold anything."""
    call = Hidden(make, dims)
    keys_seen, rows_see = call.visible.any(1), call.visible.any(2)

    def change(tensors: dict[str, Tensor]) -> None:
        for names, used in ((("key", "value"), keys_seen), (("query", "d_out"), rows_see)):
            for each in names:
                tensors[each].masked_fill_(~used[:, None, :, None], poison)

    clean, found = call.run(lambda tensors: None), call.run(change)
    everywhere = torch.ones_like(rows_see)
    for what, tensor in found.items():
        assert_unmoved(what, tensor, clean[what], everywhere)
    for what, used in (("d_key", keys_seen), ("d_value", keys_seen), ("d_query", rows_see)):
        assert not found[what].masked_fill(used[:, None, :, None], 0).any(), what


@pytest.mark.parametrize("what", ["key", "value", "row"])
@pytest.mark.parametrize("make", [causal, window, padded, packed], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("dims", "deterministic"),
    [*itertools.product(DIMS, [True]), ((64, 64), False), ((128, 128), False)],
    ids=str,
)
def test_what_is_not_finite_reaches_only_who_sees_it(
    make: Callable, dims: tuple[int, int], deterministic: bool, what: str
) -> None:
    """One key, one value or one row: what does not meet it stays as it was, what does is NaN."""
    call = Hidden(make, dims, deterministic)
    visible, key, row = call.visible, 130, 140
    rows = visible[..., key] if what != "row" else torch.zeros_like(visible[..., 0])
    if what == "row":
        rows[:, row] = True

    def change(tensors: dict[str, Tensor]) -> None:
        if what == "value":
            tensors["value"][:, :, key, 3] = math.nan
            tensors["value"][:, :, key, 5] = math.inf
        elif what == "key":
            tensors["key"][:, :, key] = math.nan
        else:
            tensors["query"][:, :, row] = math.inf
            tensors["d_out"][:, :, row] = math.nan

    clean, found = call.run(lambda tensors: None), call.run(change)
    keys = (visible & rows[..., None]).any(1)  # that share a row with it
    for names, apart in (
        (("out", "lse", "d_query"), ~rows), (("d_key", "d_value"), ~keys),
    ):  # fmt: skip
        for each in names:
            assert_unmoved(each, found[each], clean[each], apart)
    if what == "value":
        seen = rows[:, None].expand(-1, 3, -1)
        assert torch.equal(found["out"][..., 3].isnan(), seen)
        assert torch.equal(~found["out"][..., 5].isfinite(), seen)
        others = [column for column in range(dims[1]) if column not in (3, 5)]
        everywhere = torch.ones_like(rows)
        assert_unmoved("out", found["out"][..., others], clean["out"][..., others], everywhere)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_bad_batch_row_stays_alone(dims: tuple[int, int], name: str) -> None:
    tensors = dict(zip(("query", "key", "value"), drawn(200, 300, dims), strict=True))
    upstream = torch.randn(BATCH, 6, 200, dims[1], device="cuda").bfloat16()

    def run() -> list[Tensor]:
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in tensors.items()}
        out, lse = flash_attention(**leaves, mask=AttentionMask.causal(), return_lse=True)
        return [out, lse, *torch.autograd.grad(out, list(leaves.values()), upstream)]

    clean = run()
    tensors[name][1] = math.nan
    for got, want in zip(run(), clean, strict=True):
        assert torch.equal(got[0], want[0])


# What they decline


def test_by_name_they_compute_or_say_why(ran: Callable) -> None:
    tensors = drawn(300, 300)
    torch.testing.assert_close(
        flash_attention(*tensors, kernel="hopper"), flash_attention(*tensors), rtol=0, atol=0
    )
    assert ran()["forward"] == "hopper"
    for changed, given in (
        ([x.float() for x in tensors], {}),
        (tensors, {"mask": torch.ones(300, 300, dtype=torch.bool, device="cuda")}),
        (tensors, {"bias": torch.zeros(300, 300, device="cuda")}),
        ([x[..., :57] for x in tensors], {}),
        ([tensors[0][:, :, :1], *tensors[1:]], {}),
        (tensors, {"k_bucket_size": 16}),
    ):
        with pytest.raises(ValueError, match="kernel: 'hopper' cannot run, .*; use 'auto'"):
            flash_attention(*changed, kernel="hopper", **given)
        flash_attention(*changed, **given)
        assert ran()["forward"] == "triton"


@pytest.mark.parametrize("term", ["dense", "bias", "few"])
def test_what_they_decline_is_computed(ran: Callable, term: str) -> None:
    rows = 1 if term == "few" else 200
    tensors = drawn(rows, 300)
    visible = torch.rand(BATCH, 6, rows, 300) > 0.4
    given: dict = {"bias": torch.randn(BATCH, 6, rows, 300, device="cuda")}
    if term == "dense":
        given = {"mask": visible.cuda(), "visible": visible}
    check("auto", *tensors, **(given if term != "few" else {}))
    assert ran()["forward"] == "triton"
