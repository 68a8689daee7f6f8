#!/usr/bin/env python
"""Write docs/benchmarks.md: the text of docs/benchmarks/page.md with a table for each run.

    python scripts/benchmark.py | tee run.txt
    python scripts/benchmarks_page.py --enter run.txt --into cpu-zen4 --machine "AMD EPYC, 2 cores"
    python scripts/benchmarks_page.py

A run is a file docs/benchmarks/NAME.json, and stands on the page where the text says
``<!-- NAME -->``. Entering a run replaces the file. What scripts/benchmark.py,
scripts/small_calls.py and scripts/bucket_sizes.py print can be entered, and the JSON that
scripts/benchmark_parallel.py writes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_HEADER = re.compile(
    r"^(?P<machine>.+) \| (?P<threads>\d+) threads \| torch (?P<torch>\S+) \| (?P<date>[\d-]+) \| "
    r"median of (?P<repeats>\d+)$",
    re.M,
)
_BUCKETS = re.compile(
    r"^(?P<machine>.+), torch (?P<torch>\S+), (?P<date>[\d-]+):\n(?P<tokens>\d+)", re.M
)
_MEMORY_ROW = re.compile(r"^(fp32|bf16|fp16) +(\d+) +\d+ +\d+ +(\d+)$", re.M)
_BUCKET_ROW = re.compile(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", re.M)
_MARK = re.compile(r"^<!-- ([\w-]+) -->$", re.M)
_MASKS = {
    "padded": "every other row left-padded by half",
    "packed": "packed documents of 512",
    "left-padded": "left padding of 0 to 3096",
    "documents": "ten packed documents of 37 to 4096",
}
_MODELS = {
    "plain": "Llama",
    "padded": "Llama, every other row left-padded by half",
    "packed": "Llama, packed documents of 512",
    "window": "Mistral, window of 512",
    "softcap": "Gemma 2, softcap",
    "sinks": "gpt-oss, sinks",
    "demo": "the small model of scripts/finetune.py, packed",
}
_MODES = ("forward", "backward", "both")
_OURS = "flash_two"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--enter", type=Path, metavar="FILE", help="the output of a run")
    parser.add_argument("--into", metavar="NAME", help="which run of the page it replaces")
    parser.add_argument("--machine", help="its name, where the output does not tell it well")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    args = parser.parse_args()
    if (args.enter is None) != (args.into is None):
        parser.error("--enter and --into: give both or none")
    folder = args.docs / "benchmarks"
    if args.enter is not None:
        try:
            run = read(args.enter.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--enter: {error}")
        run |= {} if args.machine is None else {"machine": args.machine}
        (folder / f"{args.into}.json").write_text(dumped(run))
    try:
        (args.docs / "benchmarks.md").write_text(page(folder))
    except ValueError as error:
        parser.error(str(error))
    return 0


def read(output: str) -> dict:
    """The run in what a benchmark printed: machine, PyTorch, date, and its rows.

    Raises:
        ValueError: this is no output of scripts/benchmark.py or scripts/bucket_sizes.py.
    """
    if output.startswith("{"):
        run = json.loads(output)
        return run | {"torch": f"PyTorch {run['torch']}"}
    header = _HEADER.search(output) or _BUCKETS.search(output)
    if header is None:
        raise ValueError("expected the output of scripts/benchmark.py or scripts/bucket_sizes.py")
    run = header.groupdict()
    run["torch"] = f"PyTorch {run['torch']}"
    run |= {name: int(run[name]) for name in ("threads", "repeats", "tokens") if name in run}
    last = output.strip().rpartition("\n")[2]
    if last.startswith("["):
        rows = json.loads(last)
        for row in rows:
            if "peer" in row:  # as it was called until 2026-11
                row["attention"] = row.pop("peer")
    elif header.re is _BUCKETS:
        names = ("q_bucket_size", "k_bucket_size", "ms", "peak_mib")
        rows = [dict(zip(names, map(int, row), strict=True)) for row in _BUCKET_ROW.findall(output)]
    else:
        rows = [
            {"dtype": dtype, "head_dim": int(head_dim), "beyond_mib": int(beyond)}
            for dtype, head_dim, beyond in _MEMORY_ROW.findall(output)
        ]
    if not rows:
        raise ValueError("the run has no row; was it interrupted?")
    return run | {"rows": rows}


def dumped(run: dict) -> str:
    """JSON with a line for each row, so that a new run reads well as a change."""
    head = json.dumps({k: v for k, v in run.items() if k != "rows"}, indent=1, ensure_ascii=False)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in run["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def page(folder: Path) -> str:
    """The page: every run of ``folder`` in its place.

    Raises:
        ValueError: the text asks for a run that there is not, or leaves one out.
    """
    text = (folder / "page.md").read_text()
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    marks = _MARK.findall(text)
    if missing := set(marks) ^ set(runs):
        raise ValueError(f"page.md and *.json of {folder} differ in {sorted(missing)}")
    return _MARK.sub(lambda mark: rendered(runs[mark[1]]), text)


def rendered(run: dict) -> str:
    """A line that says where and when, and the tables of the run's rows."""
    facts = [run["machine"], run.get("threads") and f"{run['threads']} threads", run["torch"]]
    tokens = run.get("tokens") or run.get("length")
    facts += [tokens and f"{tokens} tokens"]
    facts += [run["date"], run.get("repeats") and f"medians of {run['repeats']}"]
    notes = [f" {note}." for note in run.get("notes", [])]
    if run.get("transcribed"):
        notes.append(" Typed in from a run whose own output was not kept.")
    tables = []
    for applies, table in _TABLES:
        rows = [row for row in run["rows"] if applies(row)]
        tables += ["\n".join(table(rows))] if rows else []
    head = ", ".join(str(fact) for fact in facts if fact)
    return "\n\n".join([f"{head}.{''.join(notes)}", *tables])


def _attention_in_tflops(rows: list[dict]) -> Iterator[str]:
    """TFLOP/s of each implementation, or how many times faster flash_two is than it."""
    names = _distinct(row["attention"] for row in rows)
    yield _line("TFLOP/s", "batch x T", "heads", "D", *(f"`{name}`" for name in names))
    yield "|---|---|---|---:" + "|---" * len(names) + "|"

    def cell(found: list[dict], modes: list[str]) -> str:
        if found and all("failed" in row for row in found):
            return " / ".join(_distinct(row["failed"] for row in found))
        if found and all("ratio" in row and "gflops" not in row for row in found):
            found = sorted(found, key=lambda row: _MODES.index(row["mode"]))
            return f"{' / '.join(map(_times, found))} x slower"
        by_mode = {row["mode"]: row for row in found}
        values = (_tflops(by_mode[mode]) if mode in by_mode else "-" for mode in modes)
        return " / ".join(values) if found else "-"

    for case, group in _grouped(rows, _shape):
        modes = [mode for mode in _MODES if any(row["mode"] == mode for row in group)]
        cells = (cell([row for row in group if row["attention"] == name], modes) for name in names)
        yield _line(*case, *cells)


def _tflops(row: dict) -> str:
    return row.get("failed") or f"{row['gflops'] / 1e3:.0f}"


def _attention_in_ratios(rows: list[dict]) -> Iterator[str]:
    """How many times faster flash_two is, a table for each baseline."""
    names = [name for name in _distinct(row["attention"] for row in rows) if name != _OURS]
    for number, name in enumerate(names):
        ours = [row for row in rows if row["attention"] == name]
        seen = {(row["dtype"], row["mode"]) for row in ours}
        dtypes = _distinct(row["dtype"] for row in ours)
        columns = [(dtype, mode) for dtype in dtypes for mode in _MODES if (dtype, mode) in seen]
        titles = (
            f"{dtype} {mode.replace('both', 'forward + backward')}" for dtype, mode in columns
        )
        if number:
            yield ""
        yield _line(f"times faster than `{name}`", "batch x T", "heads", "D", *titles)
        yield "|---|---|---|---:" + "|---:" * len(columns) + "|"
        for case, group in _grouped(ours, _shape):
            found = {(row["dtype"], row["mode"]): row for row in group}
            cells = (
                row.get("failed") or _times(row) if (row := found.get(column)) else ""
                for column in columns
            )
            yield _line(*case, *cells)


def _decode(rows: list[dict]) -> Iterator[str]:
    """How fast the cache is read: a byte in bfloat16 serves one FLOP per query head of a group."""
    names = _distinct(row["attention"] for row in rows)
    yield _line("decode, TB/s", "keys", "heads", "D", *(f"`{name}`" for name in names))
    yield "|---|---:|---|---:" + "|---:" * len(names) + "|"
    for case, group in _grouped(rows, lambda row: (row["batch"], row["length"], row["head_dim"])):
        batch, length, head_dim = case
        found = {row["attention"]: row for row in group}
        cells = (_bandwidth(found[name]) if name in found else "" for name in names)
        rows_of = f"{batch} row{'s' if batch > 1 else ''}"
        yield _line(rows_of, length, _heads(group[0]), head_dim, *cells)


def _bandwidth(row: dict) -> str:
    if "failed" in row:
        return row["failed"]
    size = 4 if row["dtype"] == "fp32" else 2
    return f"{row['gflops'] / 1e3 * row['key_heads'] / row['heads'] * size / 2:.1f}"


def _models(rows: list[dict]) -> Iterator[str]:
    """Milliseconds and peak memory of whole models."""
    names = _distinct(row["attention"] for row in rows)
    yield _line("ms, peak MiB", "step", "batch x T", *(f"`{name}`" for name in names))
    yield "|---|---|---" + "|---:" * len(names) + "|"

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        peak = f", {row['peak_mib']:.0f}" if "peak_mib" in row else ""
        return row.get("failed") or f"{row['ms']:.0f}{peak}"

    def case(row: dict) -> tuple[str, str, str]:
        batch, length = row["batch"], row["length"]
        if row["workload"] == "packed":  # the batch's tokens are one row
            batch, length = 1, batch * length
        return _MODELS[row["workload"]], row["mode"], f"{batch} x {length}"

    for labels, group in _grouped(rows, case):
        found = {row["attention"]: row for row in group}
        yield _line(*labels, *(cell(found.get(name)) for name in names))


def _small_calls(rows: list[dict]) -> Iterator[str]:
    """Microseconds that the host takes."""
    names = [name for name in rows[0]["us"] if name != "floor"]
    yield _line("us", "T", *(f"`{name}`" for name in names), "autograd alone")
    yield "|---|---:" + "|---:" * (len(names) + 1) + "|"
    for row in rows:
        call = row["call"].replace("both", "forward + backward")
        yield _line(call, row["length"], *(row["us"][name] for name in (*names, "floor")))


def _ways_to_spread(rows: list[dict]) -> Iterator[str]:
    """Training steps over a sequence that several GPUs share."""
    yield _line("row", "spread by", "ms", "scaling", "GiB each", "MiB sent per layer")
    yield "|---|---|---:|---:|---:|---:|"
    for row in rows:
        if row["ms"] is None:
            yield _line(row["row"], row["way"], row["note"], "", "", "")
            continue
        scaling = f"{row['scaling']:.2f}" if "scaling" in row else ""
        # What other code sends is not counted.
        sent = f"{row['MiB sent per layer']:.0f}" if row["way"] in ("gather", "ulysses") else ""
        yield _line(row["row"], row["way"], f"{row['ms']:.0f}", scaling, f"{row['GiB']:.1f}", sent)


def _memory(rows: list[dict]) -> Iterator[str]:
    yield _line("MiB beyond inputs, output and gradients", "D", "peak")
    yield "|---|---:|---:|"
    for row in rows:
        yield _line(row["dtype"], row["head_dim"], f"{row['beyond_mib']:.0f}")


def _buckets(rows: list[dict]) -> Iterator[str]:
    names = ("q_bucket_size", "k_bucket_size", "ms", "peak_mib")
    yield _line(*names[:3], "peak MiB")
    yield "|---:|---:|---:|---:|"
    for row in rows:
        yield _line(*(row[name] for name in names))


_TABLES: list[tuple[Callable[[dict], bool], Callable[[list[dict]], Iterator[str]]]] = [
    (lambda row: "beyond_mib" in row, _memory),
    (lambda row: "q_bucket_size" in row, _buckets),
    (lambda row: "us" in row, _small_calls),
    (lambda row: "way" in row, _ways_to_spread),
    (lambda row: "layers" in row, _models),
    (lambda row: row.get("device") == "cuda" and row["workload"] != "decode", _attention_in_tflops),
    (lambda row: row.get("device") == "cuda" and row["workload"] == "decode", _decode),
    (lambda row: row.get("device") == "cpu", _attention_in_ratios),
]
"""Which rows stand in which table; a run of several kinds has several."""


def _shape(row: dict) -> tuple[str, str, str, int]:
    workload: str = row["workload"]
    mask = _MASKS.get(workload, workload)
    if workload == "window":
        mask = f"window of {1024 if row['device'] == 'cuda' else 512}"
    return mask, f"{row['batch']} x {row['length']}", _heads(row), row["head_dim"]


def _times(row: dict) -> str:
    return str(round(row["ratio"], 1 if row["ratio"] >= 1.5 else 2))


def _heads(row: dict) -> str:
    heads, key_heads = row["heads"], row["key_heads"]
    return str(heads) if heads == key_heads else f"{heads} over {key_heads}"


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _distinct(values) -> list:
    return list(dict.fromkeys(values))


def _grouped(rows: list[dict], case: Callable[[dict], tuple]) -> Iterator[tuple[tuple, list]]:
    for wanted in _distinct(case(row) for row in rows):
        yield wanted, [row for row in rows if case(row) == wanted]


if __name__ == "__main__":
    sys.exit(main())
