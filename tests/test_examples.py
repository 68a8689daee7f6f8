"""examples/: each runs as it stands on the CPU, with a tiny model and with a folder for a model."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from hf_flash_two.testing import kernel_calls

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = "--max-length 64 --batch-size 2 --steps 3".split()

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs ``main`` of an example where it may write, and sees that the kernels ran."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str):
        main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
        with kernel_calls() as calls:
            result = main(list(arguments))
        assert calls
        return result

    return run


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model and its tokenizer as they are saved."""
    model, tokenizer = runpy.run_path(str(EXAMPLES / "serving.py"))["load"](None)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def losses(trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_all_examples_are_run_here() -> None:
    tests = Path(__file__).read_text()
    assert not [
        path.stem for path in EXAMPLES.glob("*.py") if f'example("{path.stem}"' not in tests
    ]


def test_lora(example: Callable) -> None:
    pytest.importorskip("trl")
    trainer = example("lora", *SMALL)
    assert len(losses(trainer)) == 3
    saved = Path(trainer.args.output_dir, "adapter_config.json")
    assert '"r": 16' in saved.read_text()


def test_packed_sft(example: Callable) -> None:
    pytest.importorskip("trl")
    first, *_, last = losses(example("packed_sft", *SMALL, "--steps", "8"))
    assert last < first


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["lora", "packed_sft"])
def test_of_a_folder(name: str, example: Callable, folder: str) -> None:
    pytest.importorskip("trl")
    if name == "lora":
        data = Path("questions.jsonl")
        data.write_text('{"prompt": "What? ", "completion": "That."}\n' * 9)
        assert losses(example("lora", *SMALL, "--model", folder, "--data", str(data)))
    else:
        data = Path("notes.txt")
        data.write_text("One document.\n\nAnother one.\n\n" * 9)
        assert losses(example("packed_sft", *SMALL, "--model", folder, "--data", str(data)))


def test_grpo(example: Callable, folder: str) -> None:
    rewards = example("grpo", "--steps", "16")
    assert sum(rewards[-4:]) > 2 * sum(rewards[:2])
    assert len(example("grpo", "--steps", "2", "--new-tokens", "4", "--model", folder)) == 2


def test_embeddings(example: Callable, folder: str) -> None:
    losses = example("embeddings", *SMALL, "--batch-size", "4", "--steps", "8")
    assert sum(losses[4:]) < sum(losses[:4])
    assert len(example("embeddings", *SMALL, "--model", folder)) == 3


def test_whisper(example: Callable) -> None:
    heard = example("whisper")
    assert heard and all(text == said for text, said in heard.items())


def test_vision_language(example: Callable) -> None:
    assert example("vision_language") == ["dim", "lit"]


def test_serving(example: Callable, folder: str) -> None:
    """The tokens of each prompt are those that it gets alone."""
    made = example("serving", "--model", folder, "--new-tokens", "6")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), ByT5Tokenizer()
    for prompt, tokens in made.items():
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(torch.tensor(tokens), alone[0, ids.shape[1] :])
    assert len(made) == 3
