"""scripts/benchmark_hopper.py: what it counts, and how it hands documents to other libraries."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_hopper as bench

SMALL = [
    bench.Row("full", 40, 16, 2, 4, 4),
    bench.Row("causal", 40, 16, 2, 4, 4),
    bench.Row("window", 1100, 16, 1, 2, 1),
    bench.Row("left-padded", 40, 16, 3, 4, 2, (40, 31, 7)),
    bench.Row("documents", 48, 16, 1, 4, 2, (5, 1, 42)),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DEVICE", "cpu")


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_flops_count_the_visible_pairs(row: bench.Row) -> None:
    mask = row.mask().to_dense(row.length, row.length, "cpu").expand(row.batch, -1, -1, -1)
    if row.workload == "left-padded":
        starts = row.length - torch.tensor(row.documents)[:, None]
        assert not mask[:, 0][torch.arange(row.length) < starts].any(), "padding sees nothing"
    expected = int(mask.sum()) * 4 * row.heads * row.head_dim
    assert row.flops("forward") == expected and row.flops("backward") == 2.5 * expected


def test_the_rows_are_of_the_same_size() -> None:
    for row in bench.ROWS:
        assert row.batch * row.length == bench.TOKENS
        if row.workload in ("documents", "packed"):
            assert sum(row.documents) == row.length
    assert len({row.name for row in bench.ROWS}) == len(bench.ROWS)


def fake_flash_attn(calls: list[dict]) -> ModuleType:
    """FlashAttention-4's two functions by our own, document by document."""
    module = ModuleType("flash_attn.cute")

    def attend(*tensors: Tensor, causal: bool, window_size=None, deterministic: bool) -> Tensor:
        calls.append({"deterministic": deterministic, "window_size": window_size})
        mask = bench.AttentionMask.causal(window_size and window_size[0] + 1) if causal else None
        out = bench.flash_attention(*(x.transpose(1, 2) for x in tensors), mask=mask)
        return out.transpose(1, 2)

    def attend_varlen(*tensors, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **given):
        sizes = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(sizes)
        parts = zip(*(x.split(sizes) for x in tensors), strict=True)
        return torch.cat([attend(*(x[None] for x in part), **given)[0] for part in parts])

    module.flash_attn_func, module.flash_attn_varlen_func = attend, attend_varlen
    return module


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_others_are_given_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, row: bench.Row
) -> None:
    calls: list[dict] = []
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", fake_flash_attn(calls))
    tensors = row.tensors()
    ours = bench.Ours(row, tensors)
    wanted = [ours.forward(), *ours.backward()]
    other = bench.FlashAttention4(row, tensors, ordered=True)
    shown = other.shown((other.forward(), *other.backward()))
    bench._compare(row, "fa4", shown, wanted)
    assert calls[0]["deterministic"]
    assert calls[0]["window_size"] == ((1023, 0) if row.workload == "window" else None)
    other = replace(row, head_dim=32)
    with pytest.raises(RuntimeError, match="fa4 disagrees on D32 .*: out, error"):
        bench._compare(other, "fa4", [x + 1 for x in shown], wanted)
