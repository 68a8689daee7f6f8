"""Batch-invariant attention: a document's bits depend on nothing but the document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import check, dtype_id, inputs
from machine import INTERPRETED
from torch import Tensor

from hf_flash_two import AttentionMask, FlashAttentionTwo, batch_invariant, flash_attention
from hf_flash_two.documents import TILE, shifts, without_dropped
from hf_flash_two.invariance import is_batch_invariant
from hf_flash_two.kernels import blockwise, invariant
from hf_flash_two.kernels.params import AttentionParams
from hf_flash_two.masks import FAR
from hf_flash_two.parallel.sequence import attend_over_mesh
from hf_flash_two.tensor_cache import own

HEADS = (2, 1) if INTERPRETED else (4, 2)
TERMS: dict[str, dict] = {
    "plain": {},
    "window": {"window": 21},
    "softcap": {"softcap": 3.0},
    "all": {"window": 33, "softcap": 3.0, "alibi_slopes": True, "sinks": True},
}
SOME = ["all"] if INTERPRETED else list(TERMS)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def products_without_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's products, which the interpreter takes, round a row by its place; GPUs' do not."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = a.data.astype("float64") @ b.data.astype("float64")
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def kernel(kernel: str, device: str) -> str:
    if kernel == "blockwise" and device == "cuda":
        pytest.skip("batch-invariant on CPUs only")
    return kernel


class Document:
    """Random query, key, value and gradients of one document, and what becomes of it alone."""

    def __init__(self, kernel: str, device: str, dtype: torch.dtype, terms: str, **sizes):
        self.length = 45 if INTERPRETED else 171
        self.kernel, self.terms = kernel, dict(TERMS[terms])
        self.window = self.terms.pop("window", None)
        for name in ("alibi_slopes", "sinks"):
            if name in self.terms:
                self.terms[name] = torch.rand(HEADS[0], device=device)
        sizes = {"heads": HEADS, "head_dim": 24, "value_dim": 16} | sizes
        self.inputs = inputs(self.length, self.length, dtype=dtype, device=device, batch=1, **sizes)
        out = self.inputs[0].shape[:3]
        self.d_out = torch.randn(*out, sizes["value_dim"], device=device).to(dtype)
        self.d_lse = torch.randn(out, device=device)

    def causal(self, **settings) -> AttentionMask:
        return AttentionMask.causal(self.window, **settings)

    def attend(
        self, *tensors: Tensor, mask: AttentionMask, mode: bool | None = True, **terms
    ) -> list[Tensor]:
        """out and lse; with d_out and d_lse behind the inputs, gradients too."""
        given = [x.detach().requires_grad_(len(tensors) > 3) for x in tensors[:3]]
        settings = self.terms | terms
        out, lse = flash_attention(
            *given, mask=mask, kernel=self.kernel, return_lse=True, batch_invariant=mode, **settings
        )
        grads = torch.autograd.grad((out, lse), given, tensors[3:]) if len(tensors) > 3 else ()
        return [out.detach(), lse.detach(), *grads]

    def among(
        self, mask: AttentionMask, before: int, after: int, rows: int = 1, mode: bool = True
    ) -> list[Tensor]:
        """The document's part of a call with other tokens around it and other rows below it."""
        tensors = (*self.inputs, self.d_out, self.d_lse)
        whole = [_surrounded(x, before, after, rows) for x in tensors]
        for grad in whole[3:]:
            # Queries that stand in the padding behind it see the document.
            grad[0, :, before + self.length :] = 0
        results = self.attend(*whole, mask=mask, mode=mode)
        return [x[:1, :, before : before + self.length] for x in results]

    def alone(self, mode: bool = True) -> list[Tensor]:
        return self.attend(*self.inputs, self.d_out, self.d_lse, mask=self.causal(), mode=mode)


def _surrounded(x: Tensor, before: int, after: int, rows: int = 1) -> Tensor:
    shape = list(x.shape)
    shape[2] += before + after
    shape[0] = rows
    whole = torch.randn(shape, device=x.device).to(x.dtype)
    whole[:1, :, before : before + x.shape[2]] = x
    return whole


def _equal(results: list[Tensor], wanted: list[Tensor], before: int = 0) -> bool:
    """Whether the rows of a document that start behind ``before`` others have these bits."""
    pairs = zip(results, wanted, strict=True)
    return all(torch.equal(x[:1, :, before : before + y.shape[2]], y) for x, y in pairs)


def _padded(document: Document, before: int, after: int) -> AttentionMask:
    keep = torch.ones(3, before + document.length + after, dtype=torch.bool)
    keep[0, :before], keep[0, before + document.length :] = False, False
    keep[1, :2] = False
    mask = AttentionMask.from_padding(keep.to(document.d_out.device))
    return mask & document.causal()


def _packed(document: Document, before: int, after: int) -> AttentionMask:
    ends = torch.tensor([0, before, before + document.length, before + document.length + after])
    ends = ends.to(document.d_out.device)
    return AttentionMask.from_documents(ends, causal=True, window=document.window)


AROUND: dict[str, Callable[[Document, bool], list[Tensor]]] = {
    "left padding": lambda x, mode: x.among(_padded(x, 5, 0), 5, 0, 3, mode),
    "long left padding": lambda x, mode: x.among(_padded(x, 70, 0), 70, 0, 3, mode),
    "right padding": lambda x, mode: x.among(_padded(x, 0, 29), 0, 29, 3, mode),
    "both": lambda x, mode: x.among(_padded(x, 11, 7), 11, 7, 3, mode),
    "packed": lambda x, mode: x.among(_packed(x, 37, 21), 37, 21, 1, mode),
}


@pytest.mark.parametrize("terms", SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_neighbours_change_no_bit(kernel: str, device: str, dtype, terms: str) -> None:
    document = Document(kernel, device, dtype, terms)
    expected = document.alone()
    for name in ("packed",) if INTERPRETED else AROUND:
        results = AROUND[name](document, True)
        assert [torch.equal(*x) for x in zip(results, expected, strict=True)] == [True] * 5, name


@pytest.mark.skipif(INTERPRETED, reason="its products are exact")
def test_without_the_mode_they_do(kernel: str, device: str) -> None:
    document = Document(kernel, device, torch.float32, "plain")
    expected = document.alone(mode=False)
    for name, around in AROUND.items():
        assert not all(map(torch.equal, around(document, False), expected)), name


CHUNKS = (31,) if INTERPRETED else (1, 7, 64, 100)


@pytest.mark.parametrize("terms", SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_chunks_against_a_cache_change_no_bit(kernel: str, device: str, dtype, terms: str) -> None:
    """One that grows, one of a fixed size, and one that several requests share."""
    document = Document(kernel, device, dtype, terms)
    query, key, value = document.inputs
    expected = document.alone()[:2]
    for size in CHUNKS:
        starts = range(0, document.length, size if size > 1 else 10)
        for start in starts:
            stop = min(start + size, document.length)
            part = [query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]]
            wanted = [x[:, :, start:stop] for x in expected]
            assert _equal(document.attend(*part, mask=document.causal()), wanted)
            static = [part[0], *(_surrounded(x, 0, document.length - stop + 30) for x in part[1:])]
            fixed = document.causal(query_offset=start)
            assert _equal(document.attend(*static, mask=fixed), wanted)
            if "alibi_slopes" in document.terms or document.window is not None:
                continue  # pages do not tell where in their documents the keys stand
            others = [_surrounded(part[0], 3, 1), *(_surrounded(x, 53, 20) for x in part[1:])]
            ends = torch.tensor([0, 53, 53 + stop, 73 + stop], device=device)
            of_queries = torch.tensor([0, 3, 3 + stop - start, 4 + stop - start], device=device)
            pages = AttentionMask.from_documents(ends, query_cu_seqlens=of_queries, causal=True)
            assert _equal(document.attend(*others, mask=pages), wanted, before=3)


@pytest.mark.long
@pytest.mark.parametrize("heads", [(3, 1), (8, 1), (6, 6)], ids=str)
@pytest.mark.parametrize("dims", [(33, 33), (72, 40)], ids=str)
def test_any_number_of_heads_and_head_dim(kernel: str, device: str, heads, dims) -> None:
    sizes = {"heads": heads, "head_dim": dims[0], "value_dim": dims[1]}
    document = Document(kernel, device, torch.float32, "plain", **sizes)
    name = "packed" if dims[0] == 33 else "both"
    assert all(map(torch.equal, AROUND[name](document, True), document.alone()))


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_with_several_threads(dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        sizes = {"heads": (2, 1), "head_dim": 40, "value_dim": 24}
        document = Document("blockwise", "cpu", dtype, "plain", **sizes)
        document.d_lse = document.d_lse.to(dtype)
        expected = document.alone()
        for name, around in AROUND.items():
            assert all(map(torch.equal, around(document, True), expected)), name
    finally:
        torch.set_num_threads(1)


@pytest.mark.long
def test_what_others_hold_changes_no_bit_even_if_it_is_nan(kernel: str, device: str) -> None:
    document = Document(kernel, device, torch.float32, "plain")
    mask = _packed(document, 37, 21)
    tensors = [_surrounded(x, 37, 21) for x in (*document.inputs, document.d_out, document.d_lse)]
    for x in tensors[:3]:
        x[:, :, 5], x[:, :, -1] = torch.nan, torch.inf
    assert _equal(document.attend(*tensors, mask=mask), document.alone(), before=37)


MASKS = {
    "causal": lambda n: AttentionMask.causal(),
    "full": lambda n: AttentionMask.full(),
    "one query more": lambda n: AttentionMask.causal(query_offset=3),
    "padded": lambda n: (
        AttentionMask.causal()
        & AttentionMask.from_padding(torch.arange(n) % 17 > torch.tensor([[4], [0]]))
    ),
    "packed": lambda n: AttentionMask.from_documents(
        torch.tensor([0, 7, 8, 40, n]), causal=True, window=9
    ),
    "chunks": lambda n: AttentionMask.chunked(13, n, starts=torch.tensor([0, 5])),
    "nobody": lambda n: AttentionMask.from_padding(torch.zeros(n, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", ["padded"] if INTERPRETED else MASKS)
def test_results_are_right(kernel: str, device: str, name: str) -> None:
    """Output, lse and gradients are those of the dense formula, with a bias that moves too."""
    keys = 30 if INTERPRETED else 140
    queries = keys - 3 if name == "one query more" else keys
    mask = MASKS[name](keys).to(device)
    tensors = inputs(queries, keys, heads=HEADS, head_dim=20, value_dim=12, device=device)
    bias = torch.randn(1 if name == "padded" else 2, 1, queries, keys, device=device)
    extra = {"bias": bias, "sinks": torch.randn(HEADS[0], device=device)}
    with batch_invariant():
        check(kernel, *tensors, mask=mask, visible=mask.to_dense(queries, keys, device), **extra)


def test_a_bias_moves_with_its_pairs(kernel: str, device: str) -> None:
    document = Document(kernel, device, torch.float32, "plain")
    bias = torch.randn(1, 1, document.length, document.length, device=device)
    whole = torch.randn(1, 1, *[document.length + 58] * 2, device=device)
    whole[:, :, 37:-21, 37:-21] = bias
    expected = document.attend(*document.inputs, mask=document.causal(), bias=bias)
    tensors = [_surrounded(x, 37, 21) for x in document.inputs]
    results = document.attend(*tensors, mask=_packed(document, 37, 21), bias=whole)
    assert _equal(results, expected, before=37)


def test_max_logits_and_layout_are_as_ever(kernel: str, device: str) -> None:
    document = Document(kernel, device, torch.float32, "plain")
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in document.inputs)
    ends = torch.tensor([0, 20, document.length], device=device)
    packed = AttentionMask.from_documents(ends, causal=True)
    for given in (document.causal(), packed):
        usual, invariant_ = (
            flash_attention(
                query, key, value, mask=given, kernel=kernel, return_max_logits=True,
                batch_invariant=mode,
            )
            for mode in (False, True)
        )  # fmt: skip
        torch.testing.assert_close(invariant_, usual)
        assert invariant_[0].stride() == usual[0].stride()


def _documents(start: list[int], stop: list[int]) -> list[int]:
    """The first key of each document, by the definition."""
    found = []
    for key in range(len(start)):
        seen = [start[k] < stop[k] for k in range(len(start))]
        before = [stop[k] for k in range(key) if seen[k]]
        after = [start[k] for k in range(key, len(start)) if seen[k]]
        if seen[key] and max(before, default=-FAR) <= min(after):
            found.append(key)
    return found


def test_every_document_starts_with_a_tile() -> None:
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        keys = int(torch.randint(1, 40, (), generator=generator))
        start = torch.randint(0, 40, (1, keys), generator=generator).sort(1).values
        stop = start + torch.randint(0, 6, (1, keys), generator=generator)
        mask = AttentionMask.from_intervals(start, stop)
        shift, _ = shifts(*mask.to_intervals(keys, "cpu"))
        starts = _documents(start[0].tolist(), stop[0].tolist())
        moved = [int(key + shift[0, key]) for key in starts]
        assert all(at % TILE == 0 for at in moved)
        changes = [key for key in range(1, keys) if shift[0, key] != shift[0, key - 1]]
        assert set(changes) <= set(starts)
        assert (shift.diff(dim=1) >= 0).all() and (shift.diff(dim=1) < TILE).all()


def test_a_mask_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    arrange = invariant._arrange
    monkeypatch.setattr(invariant, "_arrange", lambda *x: calls.append(0) or arrange(*x))
    document = Document("blockwise", "cpu", torch.float32, "plain")
    mask = _packed(document, 0, 0)
    for _ in range(3):
        document.attend(*document.inputs, mask=mask)
    assert len(calls) == 1


def test_a_window_whose_cache_dropped_keys(kernel: str, device: str) -> None:
    """Nobody sees the keys in front, and bits are those of all keys."""
    document = Document(kernel, device, torch.float32, "window")
    query, key, value = document.inputs
    expected = document.alone()[:2]
    length = document.length
    dropped, start = length - 22, length - 2
    for before in (0, 9):
        whole = document.causal(query_offset=before + start)
        if before:
            keep = torch.arange(before + length, device=device) >= before
            whole = whole & AttentionMask.from_padding(keep)
        mask, lead = without_dropped(whole, before + dropped, 2, before + length)
        parts = [query[:, :, start:]]
        parts += [_surrounded(x[:, :, dropped:], lead, 0) for x in (key, value)]
        results = document.attend(*parts, mask=mask)
        assert _equal(results, [x[:, :, start:] for x in expected]), before


def test_the_block_decides_where_a_call_does_not_say() -> None:
    document = Document("blockwise", "cpu", torch.float32, "plain")

    def attend(mode: bool | None) -> Tensor:
        return document.attend(*document.inputs, mask=document.causal(), mode=mode)[0]

    usual, own_bits = attend(False), attend(True)
    assert not torch.equal(usual, own_bits)
    with pytest.raises(KeyError), batch_invariant():
        assert torch.equal(attend(None), own_bits) and torch.equal(attend(False), usual)
        with batch_invariant():
            pass
        assert is_batch_invariant()
        raise KeyError
    assert torch.equal(attend(None), usual)


def test_compiled_code_follows_the_block() -> None:
    document = Document("blockwise", "cpu", torch.float32, "plain")
    mask = _packed(document, 0, 0)
    keep = torch.arange(document.length) > 4

    def attend(*tensors: Tensor) -> Tensor:
        padded = AttentionMask.from_padding(keep) & AttentionMask.causal()
        return flash_attention(*tensors, mask=padded)

    compiled = torch.compile(attend, fullgraph=True)
    usual = compiled(*document.inputs)
    with batch_invariant():
        expected = attend(*document.inputs)
        assert torch.equal(compiled(*document.inputs), expected)
    assert not torch.equal(usual, expected) and mask.intervals is not None
    assert torch.equal(compiled(*document.inputs), usual)


def test_vmap_is_one_more_batch() -> None:
    query, key, value = (torch.stack([x, x.flip(2)]) for x in inputs(40, 40, heads=HEADS))
    mask = AttentionMask.from_padding(torch.arange(40) > 4) & AttentionMask.causal()

    def attend(*tensors: Tensor) -> Tensor:
        return flash_attention(*tensors, mask=mask, batch_invariant=True)

    expected = torch.stack([attend(*x) for x in zip(query, key, value, strict=True)])
    assert torch.equal(torch.func.vmap(attend)(query, key, value), expected)


REFUSED: dict[str, tuple[dict, str]] = {
    "dense": ({"mask": torch.ones(40, 40, dtype=torch.bool)}, "a dense mask does not tell"),
    "dropout": ({"dropout_p": 0.1}, "expected dropout_p 0, got 0.1"),
    "queries": ({"q_bucket_size": 64}, "expected no q_bucket_size"),
    "keys": ({"k_bucket_size": 1}, "expected no k_bucket_size"),
    "fused": ({"kernel": "fused_cpu"}, "not batch-invariant"),
    "flag": ({"batch_invariant": 1}, "batch_invariant: expected True or False, got 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_depend_on_others_is_refused(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        flash_attention(*inputs(40, 40), **({"batch_invariant": True} | arguments))


def test_derivatives_along_a_direction_are_refused() -> None:
    query, key, value = inputs(40, 40)

    def attend(x: Tensor) -> Tensor:
        return flash_attention(x, key, value, batch_invariant=True)

    with pytest.raises(ValueError, match="second derivatives are not batch-invariant"):
        torch.func.jvp(attend, (query,), (query,))
    query.requires_grad_()
    (gradient,) = torch.autograd.grad(attend(query).sum(), query, create_graph=True)
    with pytest.raises(ValueError, match="second derivatives are not batch-invariant"):
        gradient.sum().backward()


def test_a_sharded_sequence_is_refused() -> None:
    given: list = [*inputs(40, 40), AttentionMask.causal(), None]
    with batch_invariant(), pytest.raises(NotImplementedError, match="a sharded sequence"):
        attend_over_mesh(*given)


def test_kernels_that_are_not_invariant_decline() -> None:
    """On GPUs matrix products of PyTorch follow from the shape of the whole batch."""
    query = torch.empty(1, 1, 4, 8, device="meta")
    nothing: Any = [None] * len(AttentionParams._fields)
    params = AttentionParams(*nothing)._replace(batch_invariant=True)
    assert "on CPUs only" in (blockwise.declines(query, query, query, params, True) or "")


def test_limits_that_change_no_tile_are_taken() -> None:
    module = FlashAttentionTwo(dim=32, heads=2, dim_head=16, causal=True)
    x = torch.randn(2, 40, 32)
    with batch_invariant():
        torch.testing.assert_close(module(x), module(x, q_bucket_size=TILE))
        with pytest.raises(ValueError, match="expected no k_bucket_size"):
            module(x, k_bucket_size=TILE - 1)


def test_capturing_a_graph_with_an_unknown_mask_is_refused(monkeypatch) -> None:
    class Captured(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    found = own(torch.zeros(1, 4, dtype=torch.int32)).as_subclass(Captured)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        invariant._arrange(found, found + 1, 0, 4, 4, True, 1, 1)
