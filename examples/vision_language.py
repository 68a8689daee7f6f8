"""A vision-language model: trained on an image with its caption, then asked to describe it.

    python examples/vision_language.py --model google/gemma-3-4b-it --image cat.jpg --text "A cat."

The tokens of an image see each other both ways, and the text behind them is causal: no dense mask
is needed for that. Without a model a tiny random Gemma 3 learns to tell a dark image from a bright
one. A real model's processor needs Pillow and torchvision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    ByT5Tokenizer,
    Gemma3Config,
)

import hf_flash_two  # noqa: F401  registers "flash_two"

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
IMAGE = 300  # the id of an image token; bytes have smaller ones
IMAGE_TOKENS = 16
SIZE = 32


def tiny():
    """A model, a prompt of one image each, the same with its caption, and the labels."""
    tokenizer = ByT5Tokenizer()
    config = Gemma3Config(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
        ),
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="flash_two")
    pixels = torch.stack([torch.full((3, SIZE, SIZE), value) for value in (-1.0, 1.0)])
    prompt = [IMAGE] * IMAGE_TOKENS + tokenizer("It is ", add_special_tokens=False).input_ids
    full = [prompt + tokenizer(caption).input_ids for caption in ("dim", "lit")]
    return model, tokenizer, batch([prompt] * 2, pixels), batch(full, pixels), len(prompt)


def batch(ids: list[list[int]], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor(ids)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "token_type_ids": (input_ids == IMAGE).long(),
        "pixel_values": pixels,
    }


def real(name: str, image: Path, text: str):
    """The same of a model by name, through its processor and chat template."""
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation="flash_two")
    content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "What is this?"}]
    asked = [{"role": "user", "content": content}]
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
    options = dict(tokenize=True, return_dict=True, return_tensors="pt")
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True, **options)
    full = processor.apply_chat_template(answered, **options)
    return model, processor.tokenizer, prompt, full, prompt["input_ids"].shape[1]


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--text", help="what it shows")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(arguments)
    if len({bool(args.model), bool(args.image), bool(args.text)}) != 1:
        parser.error("--model, --image, --text: give all three, or none")

    loaded = real(args.model, args.image, args.text) if args.model else tiny()
    model, tokenizer, prompt, full, length = loaded
    model = model.to(DEVICE)
    prompt, full = ({name: x.to(DEVICE) for name, x in part.items()} for part in (prompt, full))
    labels = full["input_ids"].clone()
    labels[:, :length] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if args.model else 3e-3)
    model.train()
    for step in range(args.steps):
        loss = model(**full, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}  loss {loss.item():.3f}")

    made = model.eval().generate(**prompt, max_new_tokens=4 if args.model is None else 100)
    answers = tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
    for answer in answers:
        print(repr(answer))
    return answers


if __name__ == "__main__":
    main()
