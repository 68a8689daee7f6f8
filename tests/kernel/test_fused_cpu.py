"""PyTorch's fused CPU op as a kernel: when it is asked, and what is kept from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import LargestTensor, check, dtype_id, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense_attention, rms
from torch import Tensor

from hf_flash_two import AttentionMask, flash_attention, kernels
from hf_flash_two.kernels.fused_cpu import additive, choice, pieces
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


def check_against_dense(rows: int, mask: AttentionMask, dtype=torch.float32, **arguments) -> None:
    """Output and gradients of the op; a bias has none."""
    tensors = inputs(rows, LENGTH, dtype=dtype, head_dim=32)
    visible = mask.to_dense(rows, LENGTH)
    offset = mask.resolve_offset(rows, LENGTH) if "alibi_slopes" in arguments else None
    check(
        "fused_cpu", *tensors, mask=mask, visible=visible, alibi_offset=offset, through_lse=False,
        constant=("bias",), **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("small", [True, False], ids=["one call", "pieces"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", MASKS)
def test_equals_the_dense_formula(
    name: str, dtype: torch.dtype, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_ONE_CALL", 2**30 if small else 0)
    check_against_dense(LENGTH, MASKS[name](), dtype)


@pytest.mark.parametrize("rows", [1, 2, 100, 430])
def test_queries_at_another_place(rows: int) -> None:
    """The last of a cache, and more queries than keys, of which some see nothing."""
    for mask in (AttentionMask.causal(), AttentionMask.causal(window=50)):
        check_against_dense(rows, mask)


def hidden_by_bias(rows: int, low: float) -> Tensor:
    """Added to the scores of every head: ``low`` for one key in three, and for all of some rows."""
    hidden = torch.arange(LENGTH) % 3 == 0
    return torch.zeros(1, 1, rows, LENGTH).masked_fill_(
        hidden | (torch.arange(rows) % 50 == 7)[:, None], low
    )


TERMS: dict[str, Callable[[int], dict]] = {
    "bias": lambda rows: {"bias": torch.randn(1, 6, rows, LENGTH)},
    "bias by batch row": lambda rows: {"bias": torch.randn(2, 1, rows, LENGTH)},
    "bias by key": lambda rows: {"bias": torch.randn(2, 6, 1, LENGTH)},
    "bias by row": lambda rows: {"bias": torch.randn(1, 6, rows, 1)},
    "bias in another layout": lambda rows: {
        "bias": torch.randn(LENGTH, rows, 6).permute(2, 1, 0)[None]
    },
    "bias of -inf": lambda rows: {"bias": hidden_by_bias(rows, -math.inf)},
    "bias of the least": lambda rows: {"bias": hidden_by_bias(rows, -3e38)},
    "alibi": lambda rows: {"alibi_slopes": torch.rand(6)},
    "alibi by batch row": lambda rows: {"alibi_slopes": torch.rand(2, 6)},
    "alibi and bias": lambda rows: {
        "alibi_slopes": torch.rand(6), "bias": torch.randn(1, 1, rows, LENGTH),
    },
    "sinks": lambda rows: {"sinks": torch.randn(6)},
    "sinks, bias and alibi": lambda rows: {
        "sinks": torch.randn(2, 6), "bias": torch.randn(1, 6, rows, LENGTH),
        "alibi_slopes": torch.rand(6),
    },
}  # fmt: skip
SOME_MASKS = ["full", "causal", "left padding", "nothing in one row", "short documents", "window"]


@pytest.mark.parametrize("rows", [2, LENGTH])
@pytest.mark.parametrize("name", SOME_MASKS)
@pytest.mark.parametrize("term", TERMS)
def test_terms(term: str, name: str, rows: int) -> None:
    mask = MASKS[name]()
    if rows < LENGTH:
        mask = mask.slice_queries(LENGTH - rows, LENGTH, LENGTH, LENGTH)
    check_against_dense(rows, mask, **TERMS[term](rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("term", TERMS)
def test_terms_in_other_dtypes(term: str, dtype: torch.dtype) -> None:
    """A bias comes in the dtype of the queries, or in float32."""
    for in_dtype in (True, False):
        arguments = TERMS[term](LENGTH)
        if "bias" in arguments and in_dtype:
            bias = arguments["bias"].to(dtype)
            lowest = (bias == -math.inf) & (arguments["bias"] > -math.inf)
            arguments["bias"] = bias.masked_fill(lowest, torch.finfo(dtype).min)
        check_against_dense(LENGTH, AttentionMask.causal(), dtype, **arguments)


@pytest.mark.parametrize("term", ["none", *TERMS])
@pytest.mark.parametrize("rows", [3, 22])
def test_a_few_tokens(rows: int, term: str) -> None:
    """The causal square is not one where rows are those of several heads."""
    arguments = {} if term == "none" else TERMS[term](rows)
    if "bias" in arguments and arguments["bias"].shape[3] > 1:
        arguments["bias"] = arguments["bias"][..., :rows]
    for mask in (AttentionMask.causal(), AttentionMask.full(), AttentionMask.causal(window=2)):
        check(
            "fused_cpu", *inputs(rows, rows), mask=mask, visible=mask.to_dense(rows, rows),
            through_lse=False, constant=("bias",), **arguments,
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 6), (2, 6)])
@pytest.mark.parametrize("rows", [2, LENGTH])
def test_dense_masks(shape: tuple[int, int], rows: int) -> None:
    """Also beside a band, and with rows that see nothing."""
    visible = torch.rand(*shape, rows, LENGTH) > 0.3
    visible[:, :, ::5] = False
    for beside in (AttentionMask.full(), AttentionMask.causal(window=100)):
        check_against_dense(rows, AttentionMask.from_dense(visible) & beside)


def test_a_dense_mask_hides_whole_blocks_of_keys() -> None:
    """Those before the first and after the last that any row sees are not computed."""
    rows, keys = torch.arange(100)[:, None], torch.arange(1600)
    for visible in (
        (keys > 600) & (keys < 900 + rows),
        (keys > 1590) & (rows > 3),
        (keys < 0) & (rows > 3),
    ):
        check(
            "fused_cpu", *inputs(100, 1600), mask=visible, visible=visible[None, None],
            through_lse=False,
        )  # fmt: skip


def test_blocks_of_terms_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows give what the whole gives; where even they are too large, tiles compute."""
    arguments = TERMS["sinks, bias and alibi"](LENGTH)
    tensors = inputs(LENGTH, LENGTH)
    monkeypatch.setattr(additive, "_FEWEST", 1)
    monkeypatch.setattr(additive, "_MOST", 6 * LENGTH * 40)
    for name in SOME_MASKS:
        check_against_dense(LENGTH, MASKS[name](), **arguments)
    monkeypatch.setattr(additive, "_FEWEST", 64)
    with pytest.raises(ValueError, match="cannot run, its bias or mask is too large"):
        flash_attention(*tensors, mask=AttentionMask.causal(), kernel="fused_cpu", **arguments)
    flash_attention(*tensors, mask=AttentionMask.causal(), **arguments)


def test_causal_alibi_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long pieces are cut, so that little of what is hidden is computed."""
    monkeypatch.setattr(additive, "_LINE_ROWS", 40)
    for name in SOME_MASKS:
        check_against_dense(LENGTH, MASKS[name](), alibi_slopes=torch.rand(6))


def test_terms_take_linear_memory() -> None:
    """ALiBi and sinks of a causal mask write nothing out that has rows times keys."""
    length = 3000
    tensors = inputs(length, length, heads=(2, 2), batch=1)
    with LargestTensor() as largest:
        flash_attention(
            *tensors, mask=AttentionMask.causal(), kernel="fused_cpu",
            alibi_slopes=torch.rand(2), sinks=torch.rand(2),
        )  # fmt: skip
    assert largest.elements <= 2 * length * 16


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


@pytest.mark.parametrize("where", ["query", "key", "value", "d_out"])
@pytest.mark.parametrize("name", ["causal", "long documents", "left padding", "short documents"])
def test_dirt_goes_where_it_is_seen(name: str, where: str) -> None:
    """One number that is not finite: what is finite in tiles is so here, and equal."""
    mask = MASKS[name]()
    for dirt, at in ((math.nan, 80), (math.inf, 290), (-math.inf, 139)):
        tensors = dict(zip(("query", "key", "value"), inputs(LENGTH, LENGTH), strict=True))
        tensors["d_out"], sinks = torch.randn(2, 6, LENGTH, 16), torch.zeros(6)
        tensors[where][0, 0, at, 3] = dirt
        found = []
        for kernel in ("fused_cpu", "blockwise"):
            leaves = [tensors[x].clone().requires_grad_() for x in ("query", "key", "value")]
            leaves.append(sinks.clone().requires_grad_())
            out = flash_attention(*leaves[:3], sinks=leaves[3], mask=mask, kernel=kernel)
            assert isinstance(out, Tensor)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, tensors["d_out"])])
        for got, want in zip(*found, strict=True):
            seen = want.isfinite()
            torch.testing.assert_close(got[seen], want[seen], rtol=1e-3, atol=1e-4)


def test_dirt_in_a_later_block_of_keys() -> None:
    """The op takes keys in blocks: the first rows do not meet what pollutes later ones."""
    leaves = [x.requires_grad_() for x in inputs(700, 700, batch=1)]
    with torch.no_grad():
        leaves[2][:, :, 600] = math.nan
    out = flash_attention(*leaves, mask=AttentionMask.causal(), kernel="fused_cpu")
    assert isinstance(out, Tensor)
    assert out[:, :, :600].isfinite().all()
    d_out = torch.randn(out.shape)
    d_query, _, _ = torch.autograd.grad(out, leaves, d_out)
    assert d_query[:, :, :600].isfinite().all()


BATCHES = {
    **{name: (name, "none", LENGTH) for name in MASKS},
    **{f"{term}, causal": ("causal", term, LENGTH) for term in TERMS},
    **{f"few rows, {term}": ("left padding", term, 2) for term in ["none", *TERMS]},
    "few rows, padding with holes": ("padding with holes", "none", 1),
    "small, short documents": ("short documents", "none", LENGTH),
    "dense": ("dense", "none", LENGTH),
    "dense, few rows": ("dense", "alibi and bias", 2),
}


@pytest.mark.parametrize("small", [True, False], ids=["one call", "pieces"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", BATCHES)
def test_the_same_bits_again_and_alone(
    name: str, dtype: torch.dtype, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's result does not depend on what else is in the batch."""
    monkeypatch.setattr(pieces, "_ONE_CALL", 2**30 if small else 0)
    mask_name, term, rows = BATCHES[name]
    if mask_name == "dense":
        # One batch row sees the second half of the keys alone.
        start = torch.tensor([4 * LENGTH, 0]).view(2, 1, 1, 1)
        seen = torch.rand(2, 1, rows, 7 * LENGTH) > 0.3
        mask = AttentionMask.from_dense(seen & (torch.arange(7 * LENGTH) > start))
    else:
        mask = MASKS[mask_name]().slice_queries(LENGTH - rows, LENGTH, LENGTH, LENGTH)
    keys = 7 * LENGTH if mask_name == "dense" else LENGTH
    terms = {} if term == "none" else TERMS[term](rows)
    if keys != LENGTH and "bias" in terms:
        terms["bias"] = torch.randn(2, 6, rows, keys)
    tensors = inputs(rows, keys, dtype=dtype)
    upstream = torch.randn(2, 6, rows, 16).to(dtype)

    def results(batch: slice) -> list[Tensor]:
        def cut(x: Tensor) -> Tensor:
            return x[batch] if x.dim() > 1 and x.shape[0] > 1 else x

        leaves = [x[batch].detach().requires_grad_() for x in tensors]
        part = mask.each_tensor(cut)
        given = {name: cut(x) for name, x in terms.items()}
        out = flash_attention(*leaves, mask=part, kernel="fused_cpu", **given)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream[batch])]

    whole = results(slice(0, 2))
    for again, first in zip(results(slice(0, 2)), whole, strict=True):
        assert torch.equal(again, first)
    for row in range(2):
        for alone, together in zip(results(slice(row, row + 1)), whole, strict=True):
            assert torch.equal(alone[0], together[row])


KINDS = {
    "full": (AttentionMask.full(), (1, 5, 70)),
    "causal": (AttentionMask.causal(), (1, 5, 70)),
    "window": (AttentionMask.causal(window=3), (5, 30)),
    "more keys": (AttentionMask.causal(), (1, 5, 30)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["", "grouped"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_found_out_once_gives_the_same_bits(name: str, heads, dtype: torch.dtype) -> None:
    """Prepared functions on other tensors; hidden numbers that are not finite change nothing."""
    mask, lengths = KINDS[name]
    for rows in lengths:
        keys = rows + 40 if name == "more keys" else rows
        params = settings_of(mask, rows, keys)
        first = inputs(rows, keys, heads=heads, dtype=dtype)
        kernel = kernels.select("fused_cpu", *first, params)
        for spoilt in (False, True):
            prepared = kernel.prepare(*first, params, True)
            assert prepared is not None and prepared.backward is not None
            tensors = inputs(rows, keys, heads=heads, dtype=dtype)
            d_out = torch.randn_like(tensors[0])
            if spoilt:
                tensors[0][1, 0, 0, 0] = d_out[1, 0, 0, 0] = math.nan
                tensors[1][0, 1, -1] = tensors[2][0, 1, -1] = -math.inf
            want = kernel.forward(*tensors, params)
            got = prepared.forward(*tensors, params)
            rest = (*tensors, *want, params, False)
            want += kernel.backward(d_out, None, *rest)[:3]
            got += prepared.backward(d_out, None, *rest)[:3]
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
                assert torch.equal(a.isnan(), b.isnan()) and a.stride() == b.stride()


REFUSED = {
    "softcap": ({"softcap": 3.0}, "no softcap, no dropout"),
    "dropout": ({"dropout_p": 0.1}, "no softcap, no dropout"),
    "max-logits": ({"return_max_logits": True}, "does not tell the largest scores"),
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
    ("causal", 1, "fused_cpu"),
]


@pytest.mark.parametrize(("name", "rows", "kernel"), CHOICES)
def test_choice(name: str, rows: int, kernel: str) -> None:
    tensors = inputs(rows, LENGTH)
    chosen = kernels.select("auto", *tensors, settings_of(MASKS[name](), rows, LENGTH))
    assert chosen.name == kernel


HALF = [
    # bfloat16 and float16 of CPUs that multiply them fast, and that do not
    (torch.bfloat16, True, {"few": "fused_cpu", "forward": "bfloat16", "sinks": "float32"}),
    (torch.bfloat16, False, {"few": "blockwise", "forward": "float32", "sinks": "float32"}),
    (torch.float16, True, {"few": "fused_cpu", "forward": "float16", "sinks": "float32"}),
    (torch.float16, False, {"few": "blockwise", "forward": "float32", "sinks": "float32"}),
    (torch.float32, True, {"few": "fused_cpu", "forward": "float32", "sinks": "float32"}),
    (torch.float64, True, {"few": "fused_cpu", "forward": "float64", "sinks": "float64"}),
]


@pytest.mark.parametrize(("dtype", "fast", "expected"), HALF)
def test_choice_by_cpu(dtype, fast: bool, expected: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU multiplies fast decides; the shape and the dtype do the rest."""
    monkeypatch.setattr(choice, "has_products", lambda dtype: fast)
    assert dtype_id(choice.forward_dtype(dtype, sinks=False)) == expected["forward"]
    assert dtype_id(choice.forward_dtype(dtype, sinks=True)) == expected["sinks"]
    for rows, keys, kernel in (
        (21, 4100, expected["few"]), (22, 4100, "fused_cpu"), (21, 4000, "fused_cpu"),
    ):  # fmt: skip
        # Three query heads share a key head, of which there are two.
        tensors = inputs(rows, keys, dtype=dtype)
        params = settings_of(AttentionMask.causal(), rows, keys)
        assert kernels.select("auto", *tensors, params).name == kernel


def test_gradients_in_half_precision_add_up_few_blocks() -> None:
    """In the op's own dtype, only pieces of all rows or of many."""
    table = [
        (torch.bfloat16, 300, True, torch.bfloat16), (torch.bfloat16, 767, False, torch.float32),
        (torch.bfloat16, 768, False, torch.bfloat16), (torch.float16, 5000, True, torch.float32),
        (torch.float32, 300, False, torch.float32), (torch.float64, 300, False, torch.float64),
    ]  # fmt: skip
    for dtype, rows, all_rows, expected in table:
        assert choice.backward_dtype(dtype, rows, all_rows, sinks=False) == expected
    assert choice.backward_dtype(torch.bfloat16, 5000, True, sinks=True) == torch.float32


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


EXACT = {
    **{
        name: (name, LENGTH, (4, 4), "none")
        for name in ("causal", "left padding", "long documents", "window", "prefix")
    },
    "grouped heads": ("causal", LENGTH, (8, 2), "none"),
    "one token": ("left padding", 1, (8, 2), "none"),
    "few tokens": ("causal", 4, (8, 2), "none"),
    **{term: ("causal", LENGTH, (6, 6), term) for term in ("bias", "bias by key", "alibi")},
    "few tokens, alibi and bias": ("left padding", 3, (6, 2), "alibi and bias"),
    "softcap": ("causal", LENGTH, (6, 2), "softcap"),
    "bias with a gradient": ("causal", LENGTH, (6, 6), "bias"),
    "sinks": ("causal", LENGTH, (6, 2), "sinks"),
}


@pytest.mark.parametrize("name", EXACT)
def test_as_exact_as_sdpa_in_bfloat16(name: str) -> None:
    """No result is rounded more often than PyTorch's own with the dense mask.

    What PyTorch has no word for is compared with the dense formula in bfloat16.
    """
    mask_name, rows, heads, term = EXACT[name]
    mask = MASKS[mask_name]().slice_queries(LENGTH - rows, LENGTH, LENGTH, LENGTH)
    visible = mask.to_dense(rows, LENGTH)
    terms = {"softcap": 5.0} if term == "softcap" else TERMS[term](rows) if term != "none" else {}
    if "bias" in terms:
        terms["bias"] = terms["bias"].bfloat16()
    tensors = inputs(rows, LENGTH, heads=heads, head_dim=64, dtype=torch.bfloat16)
    if name == "bias with a gradient":
        tensors.append(terms.pop("bias"))
    upstream = torch.randn(2, heads[0], rows, 64, dtype=torch.bfloat16)
    seen = visible.expand(2, 1, -1, -1).any(3, keepdim=True)

    def results(attend: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        given = {key: x.to(dtype) if key == "bias" else x for key, x in terms.items()}
        if len(leaves) == 4:
            given["bias"] = leaves[3]
        out = attend(*leaves[:3], **given)
        grads = torch.autograd.grad(out, leaves, (upstream * seen).to(dtype))
        return [out.detach() * seen, *grads]

    def dense(*tensors: Tensor, **given) -> Tensor:
        offset = LENGTH - rows if "alibi_slopes" in given else None
        return dense_attention(*tensors, visible=visible, alibi_offset=offset, **given)[0]

    def sdpa(*tensors: Tensor, bias: Tensor | None = None, alibi_slopes=None) -> Tensor:
        # Rows that see nothing would be NaN.
        added = torch.zeros(visible.shape).masked_fill(~(visible | ~seen), -math.inf)
        added = added if bias is None else added + bias
        if alibi_slopes is not None:
            position = torch.arange(LENGTH - rows, LENGTH)[:, None]
            added = added - alibi_slopes[:, None, None] * (position - torch.arange(LENGTH)).abs()
        mask = added.to(tensors[0].dtype) if bias is None else added
        return F.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)

    def ours(*tensors: Tensor, **given) -> Tensor:
        out = flash_attention(*tensors, mask=mask, **given)
        assert isinstance(out, Tensor)
        return out

    has_words = not {"sinks", "softcap"} & terms.keys() and len(tensors) == 3
    exact = results(dense, torch.float64)
    theirs = results(sdpa if has_words else dense, torch.bfloat16)
    found = results(ours, torch.bfloat16)
    names = ("out", "dq", "dk", "dv", "d_bias")
    for what, got, other, right in zip(names, found, theirs, exact, strict=False):
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
