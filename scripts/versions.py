#!/usr/bin/env python
"""Enters a test run into the package's record of tested versions; writes docs/versions.md from it.

Without a report it only writes the page anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RECORD, PAGE = ROOT / "hf_flash_two/tested_versions.json", ROOT / "docs/versions.md"
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "peft", "numpy")
_COUNTS = ("passed", "failed", "skipped")
_PAGE = """\
# Tested versions

Written by `make versions`, which enters the last run of `make test`, or of `make test-gpu`, in the
same environment: the whole test suite, with the kernels for GPUs in Triton's interpreter where
there is no GPU. Skipped are tests of what a version or a machine does not have; each says why.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "reports", nargs="*", type=Path, metavar="REPORT", help="what pytest --junitxml wrote"
    )
    parser.add_argument("--record", type=Path, default=RECORD, help="the runs, as JSON")
    parser.add_argument("--page", type=Path, default=PAGE, help="where their table is written")
    args = parser.parse_args()
    runs = json.loads(args.record.read_text()) if args.record.exists() else []
    if args.reports:
        missing = [str(path) for path in args.reports if not path.exists()]
        if missing:
            parser.error(f"no such report: {', '.join(missing)}; run `make test` first")
        runs = entered(runs, installed() | counted(args.reports))
        args.record.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")
    args.page.write_text(page(runs))
    return 0


def installed() -> dict[str, str]:
    """What the tests ran with: Python, packages and the machine."""
    found = {"python": platform.python_version(), "platform": machine()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def machine() -> str:
    """The GPU, or else the system and its CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    build = "" if torch.version.cuda is None else ", CUDA build without a GPU"
    return f"{platform.system()} {platform.machine()}{build}"


def counted(reports: list[Path]) -> dict[str, int | str]:
    """How many tests of these runs passed, failed (or had an error) and were skipped, and when."""
    suites = [suite for path in reports for suite in ElementTree.parse(path).iter("testsuite")]
    total, failed, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    return {
        "date": date.today().isoformat(),
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": skipped,
    }


def entered(runs: list[dict], run: dict) -> list[dict]:
    """With ``run`` in the place of an earlier one of the same versions; the newest first."""

    def same(other: dict) -> bool:
        return all(other.get(name) == run[name] for name in ("python", "platform", *_PACKAGES))

    kept = [other for other in runs if not same(other)]
    return sorted([*kept, run], key=_order, reverse=True)


def _order(run: dict) -> tuple:
    names = ("transformers", "torch", "python")
    versions = (run[name].partition("+")[0].split(".") for name in names)
    return *([int(x) for x in parts if x.isdigit()] for parts in versions), run["platform"]


def page(runs: list[dict]) -> str:
    names = ("python", *_PACKAGES, "platform", *_COUNTS, "date")
    titles = ["Python", "PyTorch", "Triton", "Transformers", "Accelerate", "TRL", "PEFT", "NumPy"]
    titles += ["on", *_COUNTS, "date"]
    lines = [f"| {' | '.join(titles)} |", "|---" * (len(names) - 4) + "|---:" * 3 + "|---|"]
    lines += [f"| {' | '.join(str(run[name]) for name in names)} |" for run in runs]
    return _PAGE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
