"""Draws the pictures of docs/masks.md: what each of its snippets shows, as SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from hf_flash_two import AttentionMask

PAGE = Path(__file__).parents[1] / "docs" / "masks.md"
CELL, MARGIN = 10, 14

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img">
<title>{title}</title>
<defs>
<pattern id="cell" width="{cell}" height="{cell}" patternUnits="userSpaceOnUse">
<rect width="{inner}" height="{inner}" rx="1" fill="#fff"/>
</pattern>
<mask id="grid"><rect width="{keys}" height="{queries}" fill="url(#cell)"/></mask>
</defs>
<g font-family="sans-serif" font-size="9" fill="#888" text-anchor="middle">
{labels}
</g>
<g transform="translate({margin} {margin})"><g mask="url(#grid)">
<rect width="{keys}" height="{queries}" fill="#888" fill-opacity="0.18"/>
<path fill="#4c78a8" d="{seen}"/>
</g></g>
</svg>
"""


def main() -> None:
    PAGE.with_suffix("").mkdir(exist_ok=True)
    for name, picture in pictures(PAGE.read_text()).items():
        (PAGE.parent / name).write_text(picture)


def snippets(page: str) -> list[tuple[str, str, str]]:
    """Each Python block with the title and the file of the picture below it, "" without one."""
    picture = r"(?:\n!\[([^\]]*)\]\(([^)]*)\)\n)?"
    return re.findall(r"^```python\n(.*?)^```\n" + picture, page, re.M | re.S)


def pictures(page: str) -> dict[str, str]:
    """SVG by file name, relative to the page."""
    (first, _, _), *others = snippets(page)
    names: dict = {}
    exec(first, names)
    shown: list[tuple] = []
    names["show"] = lambda *arguments, **options: shown.append((arguments, options))
    drawn = {}
    for code, title, name in others:
        exec(code, names)
        if name:
            arguments, options = shown.pop()
            drawn[name] = draw(title, *arguments, **options)
    return drawn


def draw(
    title: str,
    mask: AttentionMask | Tensor,
    queries: int,
    keys: int,
    tokens: Sequence[str] = (),
) -> str:
    """An SVG with a row for each query.

    Args:
        mask: or bool [queries, keys].
        tokens: a letter for each row and column.
    """
    seen = mask.to_dense(queries, keys)[0, 0] if isinstance(mask, AttentionMask) else mask
    runs = []
    for row, line in enumerate(seen.tolist()):
        text = "".join("x" if pair else "." for pair in line)
        for run in re.finditer("x+", text):
            start, width = run.start() * CELL, len(run[0]) * CELL
            runs.append(f"M{start} {row * CELL}h{width}v{CELL}h-{width}z")
    labels = [
        f'<text x="{MARGIN + (at + 0.5) * CELL:g}" y="{MARGIN - 3}">{escape(token)}</text>\n'
        f'<text x="{MARGIN / 2:g}" y="{MARGIN + at * CELL + 8}">{escape(token)}</text>'
        for at, token in enumerate(tokens)
    ] or [
        f'<text x="{MARGIN + keys * CELL / 2:g}" y="{MARGIN - 4}">keys</text>',
        f'<text transform="translate({MARGIN - 4} {MARGIN + queries * CELL / 2:g}) rotate(-90)">'
        "queries</text>",
    ]
    return SVG.format(
        title=escape(title),
        width=keys * CELL + MARGIN,
        height=queries * CELL + MARGIN,
        keys=keys * CELL,
        queries=queries * CELL,
        cell=CELL,
        inner=CELL - 1,
        margin=MARGIN,
        labels="\n".join(labels),
        seen="".join(runs),
    )


if __name__ == "__main__":
    main()
