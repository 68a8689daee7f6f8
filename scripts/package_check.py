#!/usr/bin/env python
"""Builds the wheel and the sdist, compares what they hold with what git tracks, tries the wheel.

It is tried in an empty environment: pip finds its dependencies, it imports, and
`python -m hf_flash_two` finds no problem.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
PACKAGE = "hf_flash_two/"
_NOT_IN_SDIST = (".ci/", ".gitignore")
_MADE = ("PKG-INFO", "setup.cfg", "hf_flash_two.egg-info/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--torch", default="", help="install this build of PyTorch first, as pip's arguments"
    )
    torch = shlex.split(parser.parse_args().torch)
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    listed = ["git", "-C", str(ROOT), "ls-files"]
    tracked = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
    differences = compared(tracked, wheel, sdist)
    print(*differences, sep="\n")
    if differences:
        return 1
    with TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        venv.create(folder, with_pip=True)
        if torch:
            run(python, "-m", "pip", "install", *torch)
        run(python, "-m", "pip", "install", wheel)
        # Without the folder that it runs in, which may hold the sources.
        run(python, "-I", "-c", "import hf_flash_two")
        run(python, "-I", "-m", "hf_flash_two")
    return 0


def run(*command: str | Path) -> None:
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], check=True, env=environment)


def compared(tracked: Sequence[str], wheel: Path, sdist: Path) -> list[str]:
    """A line for each file that one of the two lacks or should not have."""
    with ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        files = (member.name for member in archive.getmembers() if member.isfile())
        in_sdist = {name.partition("/")[2] for name in files}
    in_sdist = {name for name in in_sdist if not name.startswith(_MADE)}
    wanted = {
        wheel.name: ({name for name in tracked if name.startswith(PACKAGE)}, in_wheel),
        sdist.name: ({name for name in tracked if not name.startswith(_NOT_IN_SDIST)}, in_sdist),
    }
    lines = []
    for archive, (expected, found) in wanted.items():
        lines += [f"{archive} lacks {name}" for name in sorted(expected - found)]
        lines += [f"{archive} should not hold {name}" for name in sorted(found - expected)]
    return lines


if __name__ == "__main__":
    sys.exit(main())
