"""Batches in which a shared prefix stands once: prompts with completions, and trees of turns.

Segments stand in depth-first order. The first child of a segment follows it in the row. Each other
child follows a copy of the segment's last token, at that token's position and seen by that child
alone. So every token stands right after the one that predicts it, in the row as on its branch, and
a loss that shifts labels by one is right. A copy has no label. A branch sees one of the copies and
is computed as if it were alone, at the cost of a token for each further child.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that counts in no loss."""

_Columns = dict[str, list[int]]


class PrefixTreeCollator:
    """Trees of segments -> a batch for a causal model of ``attn_implementation="flash_two"``.

    Each example is a tree, in one of two forms, all tokens as lists:

    * ``prompt_ids``, and ``completion_ids``, a list of completions;
    * ``segments``, a list of them, ``parents``, for each the index of an earlier one, -1 for none,
      and ``labels``, a list for each, -100 where a token counts in no loss. Without ``labels`` all
      but segments without parent count.

    Args:
        pad_token_id: what fills rows up, on the right; it is masked, so any token will do.
        row_length: trees are laid end to end, in their order, in rows of at most so many tokens;
            None: one tree to a row.
        pad_to_multiple_of: what lengths of rows are a multiple of.
        number_completions: whether the batch has ``completions``, which models do not take.

    Returns:
        int64 [B, T] each: ``input_ids``, ``attention_mask``, ``labels``; ``position_ids``, which
        count along each branch; ``subtree_stop``, for each token the place in the row past the last
        that goes on from it, which tells ``flash_two`` of the branches. ``completions`` tells which
        segment with labels a token is in, counted through the batch, -1 for others: see
        `completion_logps`.

    Raises:
        ValueError: there is no example, or one is no tree of segments with tokens or does not fit
            in a row.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        row_length: int | None = None,
        pad_to_multiple_of: int = 1,
        number_completions: bool = False,
    ) -> None:
        if not isinstance(pad_token_id, Integral):
            raise ValueError(
                f"pad_token_id: expected an integer, got {pad_token_id}; a tokenizer without one "
                "can pass 0, which is masked"
            )
        self.pad_token_id, self.row_length = pad_token_id, row_length
        self.pad_to_multiple_of, self.number_completions = pad_to_multiple_of, number_completions

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not examples:
            raise ValueError("examples: expected at least one, got none")
        rows: list[_Columns] = []
        numbered = 0
        for example in examples:
            tree, numbered = _laid_out(*_segments(example), numbered)
            length, limit = len(tree["input_ids"]), self.row_length
            if limit is not None and length > limit:
                raise ValueError(f"row_length: a tree of {length} tokens does not fit in {limit}")
            if rows and limit is not None and len(rows[-1]["input_ids"]) + length <= limit:
                for name, column in tree.items():
                    rows[-1][name] += column
            else:
                rows.append(tree)
        length = max(len(row["input_ids"]) for row in rows)
        length += -length % self.pad_to_multiple_of
        fill = dict(input_ids=self.pad_token_id, labels=IGNORED, completions=-1)
        for row in rows:
            for name, column in row.items():
                column += [fill.get(name, 0)] * (length - len(column))
            row["subtree_stop"] = _stops(row["position_ids"])
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        if not self.number_completions:
            del batch["completions"]
        return batch


def merge_rows(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of a prompt and a completion each -> a batch in which each prompt stands once.

    A prompt is what stands before the first label of a row. Rows share it if it is the same.

    Args:
        input_ids, attention_mask, labels: [N, L], padded anywhere; labels are -100 where a token
            counts in no loss.

    Returns:
        What `PrefixTreeCollator` makes of them, one tree to a row; and int64 [N, L], where a token
        with a label stands in that batch laid flat, B * T, -1 for all others.
    """
    trees: dict[tuple[int, ...], dict[str, list]] = {}
    merged: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    columns = input_ids.cpu(), attention_mask.cpu() != 0, labels.cpu()
    for number, (ids, real, wanted) in enumerate(zip(*columns, strict=True)):
        counted = (wanted != IGNORED) & real
        first = int(counted.int().argmax()) if counted.any() else len(ids)
        prompt = tuple(ids[:first][real[:first]].tolist())
        if prompt not in trees:
            whole = [list(prompt)] if prompt else []
            unlabelled = [[IGNORED] * len(prompt)] * len(whole)
            trees[prompt] = {"segments": whole, "parents": [-1] * len(whole), "labels": unlabelled}
        places = first + real[first:].nonzero()[:, 0]
        if len(places):
            trees[prompt]["segments"].append(ids[places].tolist())
            trees[prompt]["parents"].append(0 if prompt else -1)
            trees[prompt]["labels"].append(wanted[places].tolist())
            merged.setdefault(prompt, []).append((number, places))
    batch = PrefixTreeCollator(number_completions=True)(
        [tree for tree in trees.values() if tree["segments"]]
    )
    completions = batch.pop("completions").flatten()
    index = torch.full(input_ids.shape, -1)
    in_order = (row for prompt in trees for row in merged.get(prompt, ()))
    for completion, (number, places) in enumerate(in_order):
        index[number, places] = (completions == completion).nonzero()[:, 0]
    index = index.masked_fill(columns[2] == IGNORED, -1)
    device = input_ids.device
    return {name: x.to(device) for name, x in batch.items()}, index.to(device)


def completion_logps(logits: Tensor, labels: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probability of each token of each completion, in float32 at least.

    Args:
        logits: [B, T, V]; labels, completions: [B, T], of `PrefixTreeCollator`.

    Returns:
        [N, C], a row for each completion in the order in which they came, 0 past its end and for
        tokens without label; and bool [N, C], which tokens have a label.
    """
    index = _places(completions)
    labels = labels.flatten()[index.clamp(min=0)].masked_fill(index < 0, IGNORED)
    mask = labels != IGNORED
    before = logits.flatten(0, 1)[index[mask] - 1]
    before = before.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = before.gather(1, labels[mask][:, None])[:, 0] - before.logsumexp(1)
    return torch.zeros_like(index, dtype=chosen.dtype).masked_scatter(mask, chosen), mask


def _places(completions: Tensor) -> Tensor:
    """Where the tokens of each completion stand in the batch laid flat, [N, C]; -1 past its end."""
    flat = completions.flatten()
    places = (flat >= 0).nonzero()[:, 0]
    lengths = flat[places].bincount()
    index = torch.full((len(lengths), int(lengths.max())), -1, device=flat.device)
    inside = torch.arange(index.shape[1], device=flat.device) < lengths[:, None]
    return index.masked_scatter(inside, places[flat[places].argsort(stable=True)])


def _segments(example: Mapping[str, Any]) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Tokens, parent and labels of each segment of a tree."""
    if {"prompt_ids", "completion_ids"} <= example.keys():
        segments = [_ids("prompt_ids", example["prompt_ids"])]
        segments += [_ids("each of completion_ids", x) for x in example["completion_ids"]]
        parents, labels = [-1] + [0] * (len(segments) - 1), None
    elif {"segments", "parents"} <= example.keys():
        segments = [_ids("each of segments", x) for x in example["segments"]]
        parents, labels = example["parents"], example.get("labels")
    else:
        raise ValueError(
            "examples: expected prompt_ids and completion_ids, or segments and parents, in each, "
            f"got {list(example)}"
        )
    if len(parents) != len(segments) or not all(-1 <= p < at for at, p in enumerate(parents)):
        raise ValueError(
            f"parents: expected an earlier one, or -1, for each of {len(segments)} segments, got "
            f"{list(parents)}"
        )
    if not segments or not all(segments):
        raise ValueError("segments: expected at least one token in each prompt and completion")
    if labels is None:
        labels = [
            [IGNORED] * len(segment) if parent == -1 else segment
            for segment, parent in zip(segments, parents, strict=True)
        ]
    labels = [_ids("each of labels", x) for x in labels]
    if [len(x) for x in labels] != [len(segment) for segment in segments]:
        raise ValueError("labels: expected one for each token of each segment")
    return segments, list(parents), labels


def _ids(name: str, given: Any) -> list[int]:
    ids = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(ids, (list, tuple)) or not all(hasattr(x, "__index__") for x in ids):
        raise ValueError(f"{name}: expected a list of integers, got {given!r}")
    return [operator.index(x) for x in ids]


def _laid_out(
    segments: list[list[int]], parents: list[int], labels: list[list[int]], numbered: int
) -> tuple[_Columns, int]:
    """A tree in depth-first order, and how many completions there are with its own.

    Args:
        numbered: how many there were before.
    """
    numbers = []
    for wanted in labels:
        counts = any(label != IGNORED for label in wanted)
        numbers.append(numbered if counts else -1)
        numbered += counts
    children: list[list[int]] = [[] for _ in segments]
    starts: list[int] = []
    waiting: list[int] = []
    for at, parent in enumerate(parents):
        starts.append(0 if parent < 0 else starts[parent] + len(segments[parent]))
        (waiting if parent < 0 else children[parent]).append(at)
    waiting.reverse()
    names = ("input_ids", "attention_mask", "labels", "position_ids", "completions")
    tree: _Columns = {name: [] for name in names}

    def put(tokens: list[int], wanted: list[int], start: int, number: int) -> None:
        count = len(tokens)
        columns = tokens, [1] * count, wanted, range(start, start + count), [number] * count
        for name, column in zip(names, columns, strict=True):
            tree[name] += column

    while waiting:
        at = waiting.pop()
        parent, start, wanted = parents[at], starts[at], labels[at]
        if parent < 0:
            wanted = [IGNORED, *wanted[1:]]  # nothing predicts it
        elif at != children[parent][0]:
            put(segments[parent][-1:], [IGNORED], start - 1, -1)
        put(segments[at], wanted, start, numbers[at])
        waiting += reversed(children[at])
    return tree, numbered


def _stops(positions: list[int]) -> list[int]:
    """For each token of a row the place past the last that goes on from it."""
    stops, path = [len(positions)] * len(positions), []
    for place, position in enumerate(positions):
        while path and positions[path[-1]] >= position:
            stops[path.pop()] = place
        path.append(place)
    return stops
