"""LoRA with TRL's SFTTrainer: prompts and completions, packed, adapters on every linear layer.

    python examples/lora.py --model Qwen/Qwen3-0.6B --data questions.jsonl

A line of the file is {"prompt": ..., "completion": ...}. Without a model a tiny random one over
bytes learns to explain Python's keywords. Needs: pip install '.[train]'
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, Qwen3Config
from trl import SFTConfig, SFTTrainer

import hf_flash_two  # noqa: F401  registers "flash_two"

CPU = not torch.accelerator.is_available()


def load(name: str | None):
    if name:
        model = AutoModelForCausalLM.from_pretrained(
            name, attn_implementation="flash_two", dtype="float32" if CPU else "bfloat16"
        )
        return model, AutoTokenizer.from_pretrained(name)
    tokenizer = ByT5Tokenizer()
    # Documents end by themselves, and prompts do not.
    tokenizer.build_inputs_with_special_tokens = lambda ids, more=None: ids + (more or [])
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
    return AutoModelForCausalLM.from_config(config, attn_implementation="flash_two"), tokenizer


def questions(path: Path | None) -> Dataset:
    if path:
        return Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])
    return Dataset.from_list(
        [
            {"prompt": f"Python: {name}\n", "completion": text.strip()[:300]}
            for name, text in sorted(topics.items())
        ]
    )


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--data", type=Path, help="a .jsonl file")
    parser.add_argument("--output-dir", default="runs/lora")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(arguments)

    model, tokenizer = load(args.model)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            args.output_dir,
            max_length=args.max_length,
            packing=True,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=CPU,
            bf16=not CPU,
            report_to="none",
        ),
        train_dataset=questions(args.data),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
