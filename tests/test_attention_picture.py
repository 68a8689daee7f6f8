"""scripts/attention_picture.py: every token in every layer, as dark as it should be."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from scripts import attention_picture

SVG = "{http://www.w3.org/2000/svg}"


def test_tokens_are_as_dark_as_their_share_of_the_largest() -> None:
    picture = attention_picture.draw(["<a>", " ", "bc\n"], {"one": [1, 2, 4], "two": [3, 3, 0]}, 4)
    root = ElementTree.fromstring(picture)
    cells = root.findall(f"{SVG}g/{SVG}rect")
    assert [float(cell.attrib["fill-opacity"]) for cell in cells] == [0.25, 0.5, 1, 1, 1, 0]
    rows = [int(cell.attrib["y"]) for cell in cells]
    assert rows[0] == rows[1] < rows[2] < rows[3] == rows[4] < rows[5]
    lines = [text.text for text in root.findall(f"{SVG}text")]
    assert lines == ["one", "<a> ", "bc↵", "two", "<a> ", "bc↵"]


def test_a_model_is_drawn(tmp_path: Path) -> None:
    """Layer by layer; every token gives attention of 1 in all."""
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "text").write_text("Attention is")
    output = tmp_path / "picture.svg"
    given = [str(tmp_path / "tiny"), "--text", str(tmp_path / "text"), "--output", str(output)]
    attention_picture.main([*given, "--max-length", "9"])
    assert len(re.findall("fill-opacity", output.read_text())) == 2 * 9
    model.set_attn_implementation("flash_two")
    ids = tokenizer("Attention", return_tensors="pt").input_ids[:, :9]
    for values in attention_picture.received_by_token(model.eval(), ids).values():
        assert len(values) == 9 and sum(values) == pytest.approx(9, rel=1e-5)
