"""Reinforcement learning (GRPO) in which each prompt stands once with all of its completions.

    python examples/grpo.py --model Qwen/Qwen3-0.6B --data prompts.txt

Lines of the file are the prompts; the reward is the share of vowels in what the model writes: put
your own in its place. Without a model a tiny random one over bytes learns to write vowels. The loss
is that of GRPO (arXiv:2402.03300) without its KL term.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

from hf_flash_two import PrefixTreeCollator, completion_logps  # the import registers "flash_two"

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
PROMPTS = ["Say something:", "Name a colour:", "What is it?", "Sing:"]


def load(name: str | None):
    if name:
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="flash_two")
        return model.to(DEVICE), AutoTokenizer.from_pretrained(name)
    tokenizer = ByT5Tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flash_two")
    return model.to(DEVICE), tokenizer


def reward(text: str) -> float:
    return sum(letter in "aeiou" for letter in text) / max(len(text), 1)


def completions_of(model, tokenizer, prompt: list[int], count: int, new_tokens: int) -> list:
    """``count`` samples, each up to its end."""
    ids = torch.tensor([prompt] * count, device=DEVICE)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    rows = made[:, len(prompt) :].tolist()
    ends = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            for row in rows]  # fmt: skip
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def loss_of(model, batch: dict[str, Tensor], advantages: Tensor) -> Tensor:
    """On-policy: old and new probabilities are the same, and their ratio carries the gradient."""
    labels, numbers = batch.pop("labels"), batch.pop("completions")
    logits = model(**batch, use_cache=False).logits
    logps, mask = completion_logps(logits, labels, numbers)
    gain = (logps - logps.detach()).exp() * advantages[:, None]
    return -((gain * mask).sum(1) / mask.sum(1)).mean()


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--data", type=Path, help="a text file with a prompt in each line")
    parser.add_argument("--completions", type=int, default=8, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2, help="prompts in a step")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, tokenizer = load(args.model)
    lines = args.data.read_text().splitlines() if args.data else PROMPTS
    prompts = [tokenizer(line, add_special_tokens=False).input_ids for line in lines if line]
    collate = PrefixTreeCollator(tokenizer.pad_token_id or 0, number_completions=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 if args.model is None else 1e-6)
    means = []
    for step in range(args.steps):
        examples, rewards = [], []
        for at in range(args.batch_size):
            prompt = prompts[(step * args.batch_size + at) % len(prompts)]
            made = completions_of(model, tokenizer, prompt, args.completions, args.new_tokens)
            examples.append({"prompt_ids": prompt, "completion_ids": made})
            rewards.append([reward(tokenizer.decode(x, skip_special_tokens=True)) for x in made])
        # Within each prompt's group.
        scores = torch.tensor(rewards, device=DEVICE)
        advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
        batch = {name: x.to(DEVICE) for name, x in collate(examples).items()}
        loss_of(model, batch, advantages.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(scores.mean().item())
        print(f"step {step}: reward {means[-1]:.3f}, {batch['input_ids'].numel()} tokens")
    return means


if __name__ == "__main__":
    main()
