"""Supervised fine-tuning on packed rows, checked first: no document reaches another.

    python examples/packed_sft.py --model Qwen/Qwen3-0.6B --data notes.txt

Paragraphs of the file are the documents. Without a model a tiny random one over bytes learns what
Python's own help says. Needs: pip install '.[train]'
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig
from trl import SFTConfig, SFTTrainer

from hf_flash_two import check_parity  # the import registers "flash_two"

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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="flash_two"), tokenizer


def main(arguments: list[str] | None = None) -> SFTTrainer:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--output-dir", default="runs/packed")
    parser.add_argument("--max-length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(arguments)

    text = args.data.read_text() if args.data else "\n\n".join(topics[x] for x in sorted(topics))
    documents = [{"text": part} for part in text.split("\n\n") if part.strip()]
    model, tokenizer = load(args.model)
    trainer = SFTTrainer(
        model,
        SFTConfig(
            args.output_dir,
            packing=True,
            max_length=args.max_length,
            per_device_train_batch_size=args.batch_size,
            max_steps=args.steps,
            learning_rate=2e-5 if args.model else 1e-3,
            logging_steps=1,
            save_strategy="no",
            use_cpu=CPU,
            bf16=not CPU,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(documents),
        processing_class=tokenizer,
    )
    # Each layer against eager, and that changing one document changes no other.
    report = check_parity(trainer.model, next(iter(trainer.get_train_dataloader())))
    print(report)
    if not report.ok:
        raise SystemExit("the model does not compute what eager computes; see the table above")
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
