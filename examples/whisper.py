"""Whisper: fine-tuned on recordings with their texts, then heard out.

    python examples/whisper.py --model openai/whisper-tiny --audio hello.wav --text "Hello there."

Recordings are .wav files of 16-bit samples, 16000 a second, mono. Without a model a tiny random one
learns to tell three tones apart.
"""

from __future__ import annotations

import argparse
import wave
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoProcessor,
    ByT5Tokenizer,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import hf_flash_two  # noqa: F401  registers "flash_two"

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
RATE = 16000
TONES = {"low": 220, "middle": 440, "high": 880}


def load(name: str | None):
    """The model, what turns sound into features, and the tokenizer."""
    if name:
        processor = AutoProcessor.from_pretrained(name)
        model = WhisperForConditionalGeneration.from_pretrained(
            name, attn_implementation="flash_two"
        )
        return model, processor.feature_extractor, processor.tokenizer
    tokenizer = ByT5Tokenizer()
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=100,  # two seconds
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration._from_config(config, attn_implementation="flash_two")
    return model, WhisperFeatureExtractor(chunk_length=2), tokenizer


def recording(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
            raise SystemExit(f"{path}: expected mono, 16 bits, {RATE} samples a second")
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return samples.astype(np.float32) / 2**15


def main(arguments: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a hub id or a folder")
    parser.add_argument("--audio", type=Path, nargs="+", default=[])
    parser.add_argument("--text", nargs="+", default=[], help="what is said in each recording")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(arguments)
    if len(args.audio) != len(args.text) or bool(args.model) != bool(args.audio):
        parser.error("--model, --audio, --text: give a model, its recordings and a text for each")

    model, extractor, tokenizer = load(args.model)
    model = model.to(DEVICE)
    time = np.arange(RATE) / RATE
    sounds = [recording(path) for path in args.audio] or [
        np.sin(2 * np.pi * tone * time).astype(np.float32) for tone in TONES.values()
    ]
    texts = args.text or list(TONES)
    features = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features.to(DEVICE)
    labels = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(DEVICE)
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if args.model else 3e-3)
    for step in range(args.steps):
        loss = model(input_features=features, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}  loss {loss.item():.3f}")

    made = model.eval().generate(features, max_new_tokens=12 if args.model is None else 100)
    heard = [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    for text, said in zip(texts, heard, strict=True):
        print(repr(text), "->", repr(said))
    return dict(zip(texts, heard, strict=True))


if __name__ == "__main__":
    main()
