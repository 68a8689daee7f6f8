"""The page with the table of all families."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import torch
import transformers

from scripts.coverage.compare import FORWARD, GRADIENT, Row

_KINDS = {
    "interface": "Families that use Transformers' attention interface",
    "own": "Families that compute softmax attention themselves",
    "not softmax": "Families whose own attention is not softmax(query key + bias) value, or fixed "
    "sparse",
    "none": "Families without attention of their own",
}
_TEXT = f"""\
A tiny model of random weights for every modeling file of Transformers, under `flash_two` and under
eager, in float32 on the CPU. Families that use the interface are built with
`attn_implementation="flash_two"`, those that compute attention themselves are patched. *Layers*
counts those that called our kernel, of the attention layers that ran.

- **equal**: every attention layer that ran called our kernel, those apart that are not
  softmax(query key + bias) value between tokens, or are fixed sparse, which the remarks name; and
  all of this holds:
  - *forward*: all outputs of real tokens differ by at most {FORWARD:.0e} of the largest entry,
    plain, with left and with right padding. Packed documents, each against itself alone, where
    the model takes `position_ids` and keeps documents apart under eager;
  - *gradient*: all parameters' differ by at most {GRADIENT:.0e} of the largest entry among the
    gradients of the same module (weight and bias), or by 4 units in the last place of the
    model's largest gradient, which is as well as float32 tells. The bias of a key projection, for
    one, has a gradient of exactly 0, and whatever stands there is rounding;
  - *tokens*: 5 tokens of greedy generation, left-padded, with dynamic and static cache.
- **equal in part**: the same, but no layer called our kernel, or layers ran their own code for
  other reasons; the remarks say which and why.
- Where a limit is passed, eager is run with each weight moved by its last bit, four times in other
  ways, and in float64. If its own results move at least half as far, the family is ill-conditioned
  and counts as equal; the remarks give the numbers.
"""


def write(rows: Iterable[Row], folder: Path) -> None:
    """Write ``coverage.md``."""
    rows = sorted(rows, key=lambda row: row.family)
    versions = {
        "date": date.today().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
    }
    (folder / "coverage.md").write_text(_page(rows, versions))


def _page(rows: list[Row], versions: dict[str, str]) -> str:
    lines = [
        "# Coverage",
        "",
        f"Written by `make coverage` on {versions['date']} with transformers "
        f"{versions['transformers']}, torch {versions['torch']}, Python {versions['python']}.",
        "",
        *_summary(rows),
        "",
        "## What was compared",
        "",
        _TEXT,
    ]
    for kind, title in _KINDS.items():
        some = [row for row in rows if row.kind == kind]
        lines += [f"## {title}", "", *_table(some), ""]
    return "\n".join(lines)


def _summary(rows: list[Row]) -> list[str]:
    lines = [
        "| | families | equal | of these with layers of other kinds | exceptions |",
        "|---|---:|---:|---:|---:|",
    ]
    exceptions = []
    for kind, title in _KINDS.items():
        some = [row for row in rows if row.kind == kind]
        if kind == "none":
            title += "; those built of other families' parts are compared too"
            some = [row for row in some if row.layers]
        equal = [row for row in some if row.status == "equal"]
        mixed = sum(row.ours < row.layers for row in equal)
        others = [row for row in some if row.status != "equal"]
        lines.append(f"| {title} | {len(some)} | {len(equal)} | {mixed} | {len(others)} |")
        if kind != "not softmax":
            exceptions += others
    missing = [f"`{row.family}`" for row in rows if row.kind == "none" and _missing(row)]
    if missing:
        lines += ["", f"Not compared, the tables say why: {', '.join(missing)}."]
    if exceptions:
        lines += ["", "Exceptions:", ""]
        lines += [f"- `{row.family}`: {_status(row)}. {_remarks(row)}" for row in exceptions]
    return lines


def _missing(row: Row) -> bool:
    return row.status in ("error", "not built")


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| family | model | layers | result | forward | gradient | packed | tokens | remarks |",
        "|---|---|---:|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        forward = [error for case, error in row.forward.items() if case != "packed"]
        cells = [
            row.family,
            row.model,
            f"{row.ours}/{row.layers}" if row.layers else "",
            _status(row),
            _largest(forward),
            _largest(row.gradient.values()),
            _largest([row.forward["packed"]]) if "packed" in row.forward else "",
            _tokens(row),
            _remarks(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _status(row: Row) -> str:
    return {"partly": "equal in part", "": "nothing to compare"}.get(row.status, row.status)


def _largest(errors: Iterable[float | str]) -> str:
    errors = list(errors)
    words = next((error for error in errors if isinstance(error, str)), None)
    return words.partition(":")[0] if words else f"{max(errors):.0e}" if errors else ""


def _tokens(row: Row) -> str:
    found = {
        cache: {True: "equal", False: "differ"}.get(result, "not under eager")
        for cache, result in row.generation.items()
    }
    if len(set(found.values())) <= 1:
        return next(iter(found.values()), "")
    return ", ".join(f"{cache}: {result}" for cache, result in found.items())


def _remarks(row: Row) -> str:
    return "; ".join(row.notes).replace("|", "\\|").replace("\n", " ")
