"""docs/moving.md: each snippet against a plain formula, and against PyTorch's own function."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from documentation import ROOT, snippets
from oracle import dense_attention, dense_mask
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from hf_flash_two import AttentionMask, flash_attention

PAGE = ROOT / "docs" / "moving.md"
SNIPPETS = {case.id.split(maxsplit=2)[2]: case.values[0] for case in snippets(PAGE)}


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def flash_attn_func(s) -> Tensor:
    """As flash-attn documents it, in its layout."""
    seen = dense_mask(2, 50, 50, lambda b, i, j: (j <= i) & (i - j <= 15))
    tensors = map(heads_first, (s.q, s.k, s.v))
    return heads_first(dense_attention(*tensors, visible=seen, scale=0.1)[0])


def flash_attn_varlen_func(s) -> Tensor:
    """Each document alone."""
    parts = []
    for start, stop in ((0, 30), (30, 37), (37, 100)):
        document = (x[None, start:stop].transpose(1, 2) for x in (s.q, s.k, s.v))
        causal = torch.ones(stop - start, stop - start).tril().bool()
        parts.append(dense_attention(*document, visible=causal)[0])
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def flash_attn_with_kvcache(s) -> Tensor:
    rows = [
        dense_attention(s.new[b : b + 1], s.key[b : b + 1, :, :n], s.value[b : b + 1, :, :n])[0]
        for b, n in enumerate((20, 50))
    ]
    return heads_first(torch.cat(rows))


def top_left(s) -> Tensor:
    seen = torch.ones(20, 50).tril().bool()
    exact = dense_attention(s.query[:, :, :20], s.key, s.value, visible=seen)[0]
    theirs = F.scaled_dot_product_attention(s.query[:, :, :20], s.key, s.value, is_causal=True)
    torch.testing.assert_close(theirs, exact)
    return exact


def float_mask(s) -> Tensor:
    exact = dense_attention(s.query, s.key, s.value, bias=s.bias)[0]
    theirs = F.scaled_dot_product_attention(s.query, s.key, s.value, attn_mask=s.bias)
    torch.testing.assert_close(theirs, exact)
    return exact


def packed_window(s) -> Tensor:
    place = torch.arange(50)
    seen = dense_mask(2, 50, 50, lambda b, i, j: (i // 17 == j // 17) & (j <= i) & (i - j < 9))
    assert torch.equal(s.mask_mod(0, 0, place[:, None], place), seen[0, 0])
    return dense_attention(s.query, s.key, s.value, visible=seen)[0]


def alibi(s) -> Tensor:
    exact = dense_attention(
        s.query, s.key, s.value, visible=torch.ones(50, 50).tril().bool(), alibi_slopes=s.slopes
    )[0]
    block_mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 50, 50, device="cpu")
    theirs = flex.flex_attention(
        s.query, s.key, s.value, score_mod=s.score_mod, block_mask=block_mask
    )
    torch.testing.assert_close(theirs, exact)
    return exact


def block_diagonal(s) -> Tensor:
    """Each block of queries with its own keys."""
    tensors = [
        x.split(lengths, dim=1)
        for x, lengths in zip((s.q, s.k, s.v), (s.queries, s.keys, s.keys), strict=True)
    ]
    parts = [dense_attention(*map(heads_first, part))[0] for part in zip(*tensors, strict=True)]
    return torch.cat([heads_first(part) for part in parts], dim=1)


def the_module(s) -> Tensor:
    query = s.model.to_q(s.x)
    key, value = s.model.to_kv(s.x).chunk(2, dim=-1)
    query, key, value = (x.unflatten(-1, (4, 16)).transpose(1, 2) for x in (query, key, value))
    seen = torch.ones(10, 10).tril().bool() & s.keep.bool()[:, None, None]
    return s.model.to_out(
        dense_attention(query, key, value, visible=seen)[0].transpose(1, 2).flatten(2)
    )


# What the tables give for a mask, by the rule of the other library: query i, key j.
CUTS = torch.tensor([0, 8, 11, 24])
OF_CUTS = torch.bucketize(torch.arange(24), CUTS[1:], right=True)
MASKS = {
    "AttentionMask.causal()": ((15, 24), lambda i, j: j - 9 <= i),
    "AttentionMask.causal(query_offset=0)": ((15, 24), lambda i, j: j <= i),
    "AttentionMask.causal(window=left + 1)": (
        (15, 24), lambda i, j: (i - 4 <= j - 9) & (j - 9 <= i)
    ),
    "AttentionMask.causal(window=window + 1, query_offset=0)": (
        (15, 24), lambda i, j: (j <= i) & (i - j <= 5)
    ),
    "AttentionMask.window(left, right)": (
        (15, 24), lambda i, j: (i - 4 <= j - 9) & (j - 9 <= i + 2)
    ),
    "from_documents(cu_seqlens, causal=True)": (
        (24, 24), lambda i, j: (OF_CUTS[i] == OF_CUTS[j]) & (j <= i)
    ),
    "from_documents(cu_seqlens, causal=True, window=window)": (
        (24, 24), lambda i, j: (OF_CUTS[i] == OF_CUTS[j]) & (j <= i) & (i - j < 5)
    ),
    "AttentionMask.from_documents(segment_ids=document)": (
        (24, 24), lambda i, j: OF_CUTS[i] == OF_CUTS[j]
    ),
}  # fmt: skip


PLAIN = {
    "flash_attn_func": flash_attn_func,
    "flash_attn_varlen_func": flash_attn_varlen_func,
    "flash_attn_with_kvcache": flash_attn_with_kvcache,
    "Causal, with fewer queries than keys": top_left,
    "A float mask": float_mask,
    "Packed documents with a window": packed_window,
    "ALiBi": alibi,
    "BlockDiagonalMask": block_diagonal,
    "The module": the_module,
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heading", SNIPPETS)
def test_snippet(heading: str) -> None:
    names: dict = {}
    exec(compile(SNIPPETS[heading], heading, "exec"), names)
    if heading == "flash_attn_func":
        assert names["out"].is_contiguous()
    torch.testing.assert_close(names["out"], PLAIN[heading](SimpleNamespace(**names)))


@pytest.mark.parametrize("code", MASKS)
def test_masks_of_the_tables(code: str) -> None:
    assert f"`{code}`" in PAGE.read_text() or f"mask={code}`" in PAGE.read_text()
    (queries, keys), sees = MASKS[code]
    names = {"cu_seqlens": CUTS, "document": OF_CUTS, "left": 4, "right": 2, "window": 5}
    names |= {"AttentionMask": AttentionMask, "from_documents": AttentionMask.from_documents}
    mask = eval(code, names)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    assert torch.equal(mask.to_dense(queries, keys)[0, 0], sees(i, j))


def test_arguments_of_other_libraries_say_what_to_pass() -> None:
    """Those that stand in the left columns."""
    left = "\n".join(re.findall(r"^\| (.*?) \|", PAGE.read_text(), re.M))
    named = set(re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", left)) - set(
        inspect.signature(flash_attention).parameters
    )
    functions = {"flash_attn_func", "scaled_dot_product_attention", "parallel", "mixed_precision"}
    named -= functions
    assert {"cu_seqlens_q", "is_causal", "mask_mod", "attn_bias", "p"} <= named
    x = torch.zeros(1, 1, 1, 1)
    for name in named:
        with pytest.raises(TypeError, match=f"{name}'; here it is "):
            flash_attention(x, x, x, **{name: None})
