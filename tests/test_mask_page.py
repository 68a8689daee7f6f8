"""docs/masks.md: its pictures are what its snippets show, its recipes equal the dense formula."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import dense_attention, dense_mask
from torch import Tensor

from hf_flash_two import AttentionMask, flash_attention
from hf_flash_two.testing import kernel_calls

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import mask_pictures  # noqa: E402

PAGE = ROOT / "docs" / "masks.md"


@pytest.fixture(scope="module")
def page() -> dict:
    """The names that the snippets define, run one after the other."""
    torch.manual_seed(0)
    names: dict = {}
    for code, _, _ in mask_pictures.snippets(PAGE.read_text()):
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def inputs(queries: int, keys: int) -> list[Tensor]:
    """Of two batch rows, with four heads over two."""
    shapes = [(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 6)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_equal(attend: Callable, visible: Tensor) -> None:
    """Outputs and all gradients, in float64."""
    tensors = inputs(*visible.shape[2:])
    out, exact = attend(*tensors), dense_attention(*tensors, visible=visible)[0]
    torch.testing.assert_close(out, exact)
    d_out = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, d_out)
    torch.testing.assert_close(gradients, torch.autograd.grad(exact, tensors, d_out))


def test_the_pictures_are_what_the_script_draws() -> None:
    drawn = mask_pictures.pictures(PAGE.read_text())
    assert len(drawn) > 15
    committed = {f"masks/{path.name}": path.read_text() for path in (ROOT / "docs/masks").iterdir()}
    assert committed == drawn


def test_a_picture_has_a_dark_run_for_each_run_of_keys() -> None:
    svg = mask_pictures.draw("a & b", AttentionMask.causal(window=2), 3, 3, tokens="<bc")
    assert "<title>a &amp; b</title>" in svg and ">&lt;</text>" in svg
    assert 'd="M0 0h10v10h-10zM0 10h20v10h-20zM10 20h20v10h-20z"' in svg


def test_block_diffusion_is_that_of_all_noisy_and_then_all_clean_tokens() -> None:
    """The published rule, in the published order; the last block is shorter than the others."""
    length, size = 37, 5
    block = (torch.arange(length) // size).repeat(2)
    noisy = torch.arange(2 * length) < length

    def sees(b, i, j):
        of_query, of_key = block[i], block[j]
        own = (of_query == of_key) & (noisy[i] == noisy[j])
        earlier = (of_query > of_key) & ~noisy[j]
        return own | earlier

    order = (2 * block + ~noisy).argsort(stable=True)
    mask = AttentionMask.from_block_diffusion(block[order], noisy[order])

    def attend(query, key, value):
        query, key, value = (x[:, :, order] for x in (query, key, value))
        return flash_attention(query, key, value, mask=mask)[:, :, order.argsort()]

    assert_equal(attend, dense_mask(2, 2 * length, 2 * length, sees))


def test_block_diffusion_of_packed_documents() -> None:
    """Each document by itself: two blocks of the first, a clean prompt and a block of the other."""
    block = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    noisy = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0]).bool()
    document = (block > 1).long()
    apart = AttentionMask.from_documents(segment_ids=document)
    mask = AttentionMask.from_block_diffusion(block, noisy) & apart

    def sees(b, i, j):
        own = (block[i] == block[j]) & (noisy[i] == noisy[j])
        return (document[i] == document[j]) & (own | (block[i] > block[j]) & ~noisy[j])

    attend = lambda *tensors: flash_attention(*tensors, mask=mask)  # noqa: E731
    assert_equal(attend, dense_mask(2, 13, 13, sees))


def test_sink_tokens() -> None:
    lengths = torch.tensor([3, 41, 1, 26])
    document = torch.arange(4).repeat_interleave(lengths)
    begin = (lengths.cumsum(0) - lengths)[document]
    cu_seqlens = torch.tensor([0, *lengths.cumsum(0)])
    mask = AttentionMask.from_documents(cu_seqlens, causal=True, window=7, sink_tokens=4)

    def sees(b, i, j):
        near = (i - j < 7) | (j - begin[j] < 4)
        return (document[i] == document[j]) & (j <= i) & near

    attend = lambda *tensors: flash_attention(*tensors, mask=mask)  # noqa: E731
    assert_equal(attend, dense_mask(2, 71, 71, sees))


def test_global_tokens_that_see_everything(page: dict) -> None:
    is_global = torch.arange(67) % 20 == 3
    visible = dense_mask(
        2, 67, 67, lambda b, i, j: ((i - j).abs() <= 5) | is_global[i] | is_global[j]
    )
    assert_equal(lambda *qkv: page["with_global_tokens"](*qkv, is_global, 5), visible)


def test_documents_and_a_question(page: dict) -> None:
    document = torch.tensor([0] * 13 + [1] * 1 + [2] * 30 + [3] * 21)
    visible = dense_mask(
        2, 65, 65, lambda b, i, j: (j <= i) & ((document[i] == document[j]) | (document[i] == 3))
    )
    boundaries = torch.tensor([0, 13, 14, 44])
    assert_equal(lambda *qkv: page["documents_and_question"](*qkv, boundaries), visible)


@pytest.mark.parametrize("stride", [1, 6, 100])
def test_strided_attention(page: dict, stride: int) -> None:
    visible = dense_mask(
        2, 59, 59, lambda b, i, j: (j <= i) & ((i - j < stride) | ((i - j) % stride == 0))
    )
    assert_equal(lambda *qkv: page["strided"](*qkv, stride), visible)


def test_merged_rows_that_see_no_key(page: dict) -> None:
    """Rows without any key, with keys in one call only, and in both."""
    keep = torch.arange(45) % 10 > 4
    keep[:9] = False

    def attend(query, key, value):
        mask = AttentionMask.causal() & AttentionMask.from_padding(keep)
        parts = []
        for start, stop in ((0, 20), (20, 45)):
            part = mask.slice_keys(start, stop, 45, 45)
            keys = key[:, :, start:stop], value[:, :, start:stop]
            parts.append(flash_attention(query, *keys, mask=part, return_lse=True))
        return page["merge"](*parts)

    assert_equal(attend, dense_mask(2, 45, 45, lambda b, i, j: (j <= i) & keep[j]))


def test_merged_in_the_dtype_of_the_calls(page: dict) -> None:
    tensors = [tensor.detach().bfloat16() for tensor in inputs(9, 9)]
    assert page["strided"](*tensors, 2).dtype == torch.bfloat16


def test_runs_are_found_in_a_mask_handed_to_a_model(page: dict) -> None:
    model, visible = page["model"], page["mask"].to_dense(24, 24)
    inputs = {"input_ids": page["ids"], "position_ids": page["positions"]}
    with torch.no_grad(), kernel_calls() as calls:
        logits = model(**inputs, attention_mask=visible).logits
        model.set_attn_implementation("eager")
        hidden = torch.zeros(1, 1, 24, 24).masked_fill(~visible, -torch.inf)
        exact = model(**inputs, attention_mask=hidden).logits
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-5)
    assert [call.mask for call in calls] == ["intervals"] * 2
