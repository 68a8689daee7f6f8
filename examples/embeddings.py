"""An embedding model over long documents: trained to find the other half of a text, then searched.

    python examples/embeddings.py --model answerdotai/ModernBERT-base --data notes.txt

Documents of a batch differ in length; padding costs nothing, because the kernels skip it.
Paragraphs of the file are the documents. Without a model a tiny random BERT over bytes reads what
Python's own help says, up to 2048 bytes at once.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, ByT5Tokenizer

import hf_flash_two  # noqa: F401  registers "flash_two"


def load(name: str | None, max_length: int):
    if name:
        model = AutoModel.from_pretrained(name, attn_implementation="flash_two")
        return model, AutoTokenizer.from_pretrained(name)
    tokenizer = ByT5Tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_length,
    )
    return AutoModel.from_config(config, attn_implementation="flash_two"), tokenizer


def embed(model, tokenizer, texts: list[str], max_length: int) -> Tensor:
    """[texts, dim] of length 1: the mean of each text's tokens."""
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    ).to(model.device)
    hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(arguments)

    texts = args.data.read_text().split("\n\n") if args.data else list(topics.values())
    texts = [text for text in texts if len(text) > 50]
    random.Random(0).shuffle(texts)
    model, tokenizer = load(args.model, args.max_length)
    model = model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if args.model is None else 2e-5)
    losses = []
    for step in range(args.steps):
        start = step * args.batch_size % max(1, len(texts) - args.batch_size)
        batch = texts[start : start + args.batch_size]
        first = embed(model, tokenizer, [text[: len(text) // 2] for text in batch], args.max_length)
        other = embed(model, tokenizer, [text[len(text) // 2 :] for text in batch], args.max_length)
        loss = F.cross_entropy(
            first @ other.T / 0.05, torch.arange(len(batch), device=first.device)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}  loss {losses[-1]:.3f}")

    model.eval()
    with torch.no_grad():
        batch = texts[: args.batch_size]
        found = embed(model, tokenizer, batch, args.max_length)
        wanted = embed(model, tokenizer, ["how an exception is raised"], args.max_length)
    nearest = int((found @ wanted.T).argmax())
    print("nearest:", " ".join(batch[nearest].split())[:90])
    return losses


if __name__ == "__main__":
    main()
