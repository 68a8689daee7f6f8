"""What the assembler made of a kernel: uniform registers that are read before they are written.

ptxas 12.8 moved what a loop prepares into the branch to another loop before it, and read it where
that branch was not taken: wrong numbers, without a warning. So each read of a uniform register,
which is where addresses of products stand, is followed back here.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from triton.backends.nvidia.compiler import get_ptxas

_WRITERS = {
    "UIADD3", "ULEA", "UMOV", "ULOP3", "USHF", "USGXT", "UIMAD", "USEL", "ULDC", "R2UR", "S2UR",
    "REDUX", "VOTEU", "UFLO", "UPOPC", "UBREV", "UPRMT",
}  # fmt: skip


class _Step(NamedTuple):
    """An instruction: its text, the uniform registers it reads and writes, what may follow it."""

    text: str
    reads: set[int]
    writes: set[int]
    following: tuple[int, ...]


def disassembled(cubin: Path) -> str:
    tool = Path(get_ptxas(90).path).with_name("nvdisasm")
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def read_before_written(sass: str) -> list[str]:
    """The instructions that read a uniform register which some way to them has not written."""
    steps = _steps(sass)
    known: list[frozenset[int] | None] = [None] * len(steps)
    known[0] = frozenset()
    todo = [0]
    while todo:
        at = todo.pop()
        written = (known[at] or frozenset()) | steps[at].writes
        for following in steps[at].following:
            before = known[following]
            after = written if before is None else before & written
            if after != before:
                known[following] = after
                todo.append(following)
    pairs = zip(steps, known, strict=True)
    return [step.text for step, ready in pairs if ready is not None and step.reads - ready]


def _steps(sass: str) -> list[_Step]:
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(texts)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            texts.append(instruction[1].strip())
    return [_step(at, text, len(texts), labels) for at, text in enumerate(texts)]


def _step(at: int, text: str, count: int, labels: dict[str, int]) -> _Step:
    predicate, operation, operands = re.match(r"(@\S+)?\s*(\S+)\s*(.*)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
    name = operation.split(".")[0]
    wide = ".WIDE" in operation
    size = 2 if ".64" in operation and name.startswith("U") else 1
    reads: set[int] = set()
    writes: set[int] = set()
    parts = operands.split(",")
    for place, operand in enumerate(parts):
        # Two descriptors side by side, or the second alone if the first factor is in registers.
        described = "gdesc" in operand
        skipped = 2 if described and re.match(r"R\d+, R\d+, gdesc", operands) else 0
        for register in map(int, re.findall(r"UR(\d+)", operand)):
            into = writes if place == 0 and name in _WRITERS else reads
            # A product of 32 bits each has 64, and so has what is added to it.
            double = 2 if wide and place in (0, len(parts) - 1) else size
            into.update(range(register + skipped, register + (4 if described else double)))
    following = [at + 1] if at + 1 < count else []
    if name in ("BRA", "EXIT"):
        conditional = predicate is not None or re.search(r"\bU?P\d", operands) is not None
        following = following if conditional else []
        target = re.search(r"\.L_\w+", operands)
        if name == "BRA" and target and labels.get(target[0], count) < count:
            following.append(labels[target[0]])
    return _Step(text, reads, writes, tuple(following))
