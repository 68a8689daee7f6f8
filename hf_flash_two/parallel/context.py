"""`context_parallel`: a model's forward and backward over a sequence that is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING or dist.is_available():
    from hf_flash_two.parallel.layout import MOST_CHUNKS, Layout
    from hf_flash_two.parallel.sequence import EXCHANGES, Spread
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LAYOUTS = ("auto", "contiguous", "head_tail", "balanced")
IGNORED = -100
"""The label of a token that counts in no loss."""
_SMALLEST_CHUNK = 128
_SHARDED = {
    "input_ids": 0, "inputs_embeds": 0, "attention_mask": 0, "position_ids": 0, "token_type_ids": 0,
    "labels": IGNORED, "shift_labels": IGNORED, "decoder_input_ids": 0,
    "decoder_attention_mask": 0, "subtree_stop": 0,
}  # fmt: skip
"""What of a batch is sharded, and what fills it up."""
_NOT_SHARDED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

_NOT_TOLD = (
    "context parallelism: PyTorch's context_parallel is open, and flash_two does not know how it "
    "shards; use hf_flash_two.context_parallel instead, or Accelerate's cp_size with rows whose "
    "length is a multiple of it (pad_to_multiple_of)"
)

_SDPA = torch.nn.functional.scaled_dot_product_attention

# One for all threads: the backward on a GPU, which may run layers again, has a thread of its own.
_running: list[Spread] = []


def current() -> Spread | None:
    """How the sequence of the model that runs is spread; None if it is not.

    Raises:
        NotImplementedError: PyTorch has sharded it, and we were not told how.
    """
    if _running:
        return _running[-1]
    # PyTorch's context_parallel replaces this function by one of its own. The compiler of PyTorch
    # 2.13 does not read the module of the usual one.
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if sdpa is not _SDPA and "distributed" in (sdpa.__module__ or ""):
        raise NotImplementedError(_NOT_TOLD)
    return None


@contextmanager
def spread_over(spread: Spread) -> Iterator[Spread]:
    """Within the block each rank's models get this rank's shard of every sequence."""
    _running.append(spread)
    try:
        yield spread
    finally:
        _running.remove(spread)


class Shard:
    """This rank's part of a batch.

    Attributes:
        batch: what the model gets.
        spread: how sequences are spread over the ranks.
    """

    def __init__(self, batch: dict[str, Any], spread: Spread) -> None:
        self.batch, self.spread = batch, spread

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole of what every rank has a shard of along ``dim``, without gradient or filling.

        Every rank must call it.

        Raises:
            ValueError: no sequence of the batch has so many tokens on a rank.
        """
        lengths = self.spread.lengths
        if x.shape[dim] not in lengths:
            raise ValueError(
                f"gather: expected {' or '.join(map(str, lengths))} tokens along dimension {dim}, "
                f"got {x.shape[dim]}"
            )
        return self.spread.gather(x.detach(), dim).narrow(dim, 0, lengths[x.shape[dim]])

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of what each token of the whole rows has, filled up with 0.

        Raises:
            ValueError: no sequence of the batch has so many tokens.
        """
        lengths = self.spread.lengths.values()
        if x.shape[dim] not in lengths:
            raise ValueError(
                f"split: expected {' or '.join(map(str, lengths))} tokens along dimension {dim}, "
                f"got {x.shape[dim]}"
            )
        layout, x = self.spread.layout, x.movedim(dim, 0)
        missing = -x.shape[0] % layout.chunks
        x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
        return layout.split(x, self.spread.rank, 0).movedim(0, dim)

    def report(self) -> str:
        """The layout, and which exchange attention chose, and why, since the block began."""
        chosen = [f"{count} x {what}" for what, count in self.spread.decisions.items()]
        if not chosen:
            chosen = ["no attention was spread: none ran, or it is not flash_two's, or compiled"]
        return "\n".join([f"layout: {self.spread.layout.owners}", *chosen])


@contextmanager
def context_parallel(
    mesh: DeviceMesh,
    batch: Mapping[str, Any],
    *,
    layout: str = "auto",
    exchange: str = "auto",
) -> Iterator[Shard]:
    """Run a model of ``attn_implementation="flash_two"`` on one shard of each row of a batch.

    ``with context_parallel(mesh, batch) as shard:`` holds the forward and the backward of
    ``model(**shard.batch)``. The batch is the same on all ranks of the mesh. Attention reaches over
    all of them, and everything else runs on this rank's tokens.

    Gradients are right if they are averaged over the ranks of the mesh, as DDP and FSDP do: labels
    are shifted before they are cut, and the loss is divided by the number of labels on all ranks.
    So is a loss that ranks average to report it.

    Args:
        mesh: of one dimension, or of two: heads are exchanged over the inner one.
        batch: ``input_ids`` or ``inputs_embeds``, and what else the model takes: 2-D
            ``attention_mask``, ``position_ids``, ``labels``, ``cu_seq_lens_q`` and ``_k``, or
            ``subtree_stop`` of `PrefixTreeCollator`.
            Positions that are missing are counted. Rows whose length does not fit are filled up.
            A given ``num_items_in_batch`` is that of the whole batch.
        layout: "contiguous"; "head_tail", for equal work under a causal mask; "balanced", chunks
            dealt out by the work of packed documents; "auto": the last for packed rows, else
            "head_tail".
        exchange: "gather" (keys and values), "ulysses" (heads), or "auto": see `Shard.report`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange: expected one of {EXCHANGES}, got {exchange!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if getattr(mesh, "ndim", None) not in (1, 2):
        raise ValueError(f"mesh: expected a DeviceMesh of one or two dimensions, got {mesh!r}")
    _check(batch)
    whole = _completed(batch)
    name = "input_ids" if "input_ids" in whole else "inputs_embeds"
    length, ranks = whole[name].shape[1], mesh.size()
    if layout == "auto":
        layout = "balanced" if _packed(whole) else "head_tail"
    if layout == "balanced":
        chosen = _balanced(whole, ranks, length)
    else:
        chosen = Layout.named(layout, ranks)
    # Sorted: of two that are filled up to the same, the longer.
    known = sorted({x.shape[1] for name, x in whole.items() if name in _SHARDED})
    lengths = {-(-n // chosen.chunks) * len(chosen.owners[0]): n for n in known}
    tokens = -(-length // chosen.chunks) * len(chosen.owners[0])
    spread = Spread(mesh, chosen, exchange, tokens, lengths)
    _check_same(spread, whole)
    if length % chosen.chunks and "attention_mask" not in whole:
        whole["attention_mask"] = torch.ones_like(whole["position_ids"])
    filled = {name: _filled(name, x, chosen.chunks) for name, x in whole.items()}
    if "shift_labels" in filled:
        count = (filled["shift_labels"] != IGNORED).sum()
        filled["num_items_in_batch"] = filled.get("num_items_in_batch", count) / ranks
    part = {
        name: chosen.split(x, spread.rank, 1) if name in _SHARDED else x
        for name, x in filled.items()
    }
    with spread_over(spread):
        yield Shard(part, spread)


def _check(batch: Mapping[str, Any]) -> None:
    if "input_ids" not in batch and "inputs_embeds" not in batch:
        raise ValueError("batch: expected input_ids or inputs_embeds, got neither")
    for name, x in batch.items():
        if isinstance(x, Tensor) and x.dim() > 0 and name not in (*_SHARDED, *_NOT_SHARDED):
            raise ValueError(
                f"batch: {name} is not known, whether it is to be sharded; leave it out, and take "
                "this rank's part by `Shard.split` within the block"
            )
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError("attention_mask: expected [batch, keys]; others are not sharded")


def _check_same(spread: Spread, whole: Mapping[str, Any]) -> None:
    """Refuse batches that differ between ranks: attention would mix the tokens of strangers."""
    shown = []
    for name in ("input_ids", "attention_mask", "position_ids"):
        x = whole.get(name)
        x = torch.zeros(1, 1) if x is None else x
        weights = torch.arange(1, x.numel() + 1, device=x.device).view(x.shape) % 8191
        shown += [*x.shape, int((x.to(torch.int64) * weights).sum())]
    device = whole["position_ids"].device
    rows = spread.of_all(torch.tensor([shown], dtype=torch.int64, device=device))
    if bool((rows != rows[:1]).any()):
        raise ValueError(
            "batch: expected the same on all ranks of the mesh; a sampler must deal rows to groups "
            "of ranks, not to ranks"
        )


def _completed(batch: Mapping[str, Any]) -> dict[str, Any]:
    """With positions, and with labels shifted to the token that predicts them."""
    whole = {name: x for name, x in batch.items() if x is not None}
    tokens = whole["input_ids"] if "input_ids" in whole else whole["inputs_embeds"]
    if "position_ids" not in whole:
        ends = whole.get("cu_seq_lens_q")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if ends is not None:
            document = torch.searchsorted(ends.to(positions), positions, right=True) - 1
            positions = positions - ends[document.clamp(max=len(ends) - 1)].to(positions)
        whole["position_ids"] = positions.expand(tokens.shape[0], -1)
    if "labels" in whole and "shift_labels" not in whole:
        whole["shift_labels"] = pad(whole["labels"][:, 1:], (0, 1), value=IGNORED)
    if "shift_labels" in whole:
        whole.setdefault("labels", whole["shift_labels"])
    return whole


def _filled(name: str, x: Any, multiple: int) -> Any:
    missing = -x.shape[1] % multiple if name in _SHARDED else 0
    if not missing:
        return x
    if name == "position_ids":
        # They go on, so that no document starts.
        more = torch.arange(1, missing + 1, device=x.device)
        return torch.cat([x, x[:, -1:] + more.to(x.dtype)], 1)
    shape = (0, 0) * (x.dim() - 2) + (0, missing)
    return pad(x, shape, value=_SHARDED[name])


def _packed(whole: Mapping[str, Any]) -> bool:
    """Whether a row may hold several documents."""
    positions, mask = whole["position_ids"], whole.get("attention_mask")
    numbered = mask is not None and mask.dtype != torch.bool and bool((mask > 1).any())
    return numbered or bool((positions[:, 1:] <= positions[:, :-1]).any())


def _balanced(whole: Mapping[str, Any], ranks: int, length: int) -> Layout:
    """Chunks dealt out by what they compute: a token of a document sees those before it."""
    chunks = ranks * min(MOST_CHUNKS, max(2, length // (ranks * _SMALLEST_CHUNK)))
    work = _filled("position_ids", whole["position_ids"], chunks) + 1
    return Layout.balanced(ranks, work.sum(0).unflatten(0, (chunks, -1)).sum(1).tolist())
