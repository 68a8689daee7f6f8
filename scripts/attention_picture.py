"""Draw which tokens of a text the layers of a causal model look at, as an SVG.

    python scripts/attention_picture.py MODEL --text notes.txt --output picture.svg

MODEL is a hub id or a local folder. The darker a token, the more attention it received: the sum
over all tokens, the mean over all heads, relative to the largest of the layer.
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flash_two import watch_attention

LETTER, LINE, MARGIN = 9, 22, 12
"""Pixels: the width of a letter, the height of a line, the space around all."""


def received_by_token(model, ids: Tensor) -> dict[str, list[float]]:
    """For each layer one number per token of ``ids`` [1, T]."""
    with torch.no_grad(), watch_attention(model) as seen:
        model(input_ids=ids, use_cache=False)
    return {name: received[0].mean(0).tolist() for name, (received,) in seen.items()}


def draw(tokens: list[str], layers: dict[str, list[float]], width: int = 72) -> str:
    """The SVG.

    Args:
        tokens: as they read.
        layers: by name how dark each token is, relative to the largest.
        width: letters in a line.
    """
    cells, texts, y = [], [], MARGIN
    for name, values in layers.items():
        texts.append(f'<text x="{MARGIN}" y="{y + 16}" fill="#555">{escape(name)}</text>')
        lines, largest = [""], max(values)
        for token, value in zip(tokens, values, strict=True):
            shown = token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") or " "
            if len(lines[-1]) + len(shown) > width:
                lines.append("")
            at = f'x="{MARGIN + len(lines[-1]) * LETTER}" y="{y + len(lines) * LINE}"'
            size = f'width="{len(shown) * LETTER}" height="{LINE - 2}"'
            cells.append(f'<rect {at} {size} fill-opacity="{value / largest:.2g}"/>')
            lines[-1] += shown
        for number, line in enumerate(lines, 1):
            at = f'x="{MARGIN}" y="{y + number * LINE + 15}" textLength="{len(line) * LETTER}"'
            texts.append(f"<text {at}>{escape(line)}</text>")
        y += (len(lines) + 1) * LINE + MARGIN
    size = f'width="{2 * MARGIN + width * LETTER}" height="{y + MARGIN}"'
    style = 'font-family="monospace" font-size="14" xml:space="preserve"'
    cells, texts = "\n".join(cells), "\n".join(texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        f'<g fill="#e8590c">\n{cells}\n</g>\n{texts}\n</svg>\n'
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id or local folder")
    add("--text", type=Path, required=True, help="text file")
    add("--max-length", type=int, default=256, help="tokens of it (256)")
    add("--output", type=Path, default=Path("attention.svg"), help="(attention.svg)")
    args = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="flash_two")
    text = args.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.max_length]
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    args.output.write_text(draw(tokens, received_by_token(model.eval(), ids)), encoding="utf-8")


if __name__ == "__main__":
    main()
