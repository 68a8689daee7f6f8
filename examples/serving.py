"""Serving with continuous batching: requests of any length share a batch and leave when done.

    python examples/serving.py --model Qwen/Qwen3-0.6B "Attention is" "The cache holds"

Without a model a tiny random one over bytes answers, with whatever comes to its mind.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, Qwen3Config
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hf_flash_two  # noqa: F401  registers "flash_two"

PROMPTS = ["Attention is", "A cache of keys and values holds what was", "Why?"]


def load(name: str | None):
    if name:
        options = {"attn_implementation": "flash_two", "device_map": "auto"}
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        return model, AutoTokenizer.from_pretrained(name)
    tokenizer = ByT5Tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="flash_two"), tokenizer


def main(arguments: list[str] | None = None) -> dict[str, list[int]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--new-tokens", type=int, default=20)
    args = parser.parse_args(arguments)

    model, tokenizer = load(args.model)
    # Without these the cache takes most of the memory there is.
    settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    results = model.eval().generate_batch(
        [tokenizer(prompt).input_ids for prompt in args.prompts],
        max_new_tokens=args.new_tokens,
        do_sample=False,
        continuous_batching_config=settings,
    )
    tokens = [result.generated_tokens for result in results.values()]
    for prompt, made in zip(args.prompts, tokens, strict=True):
        print(repr(prompt), "->", repr(tokenizer.decode(made)))
    return dict(zip(args.prompts, tokens, strict=True))


if __name__ == "__main__":
    main()
