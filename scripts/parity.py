"""Check a model of your own under flash_two against eager, layer by layer, on your own text.

    python scripts/parity.py MODEL --dtype bfloat16
    python scripts/parity.py MODEL --text notes.txt --max-length 1024 --pack

MODEL is a hub id or a local folder. Its attention layers run under flash_two and under eager on the
same batch, and both are compared with eager in higher precision. The exit code is 0 if all is well,
1 if a check failed and 2 if the check could not be made. `hf_flash_two.check_parity` does the same
with a model and a batch at hand, such as one from your own collator.
"""

from __future__ import annotations

import argparse
import inspect
import pydoc_data.topics
import sys
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_flash_two import check_parity

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# Shares of --max-length: rows that need padding, documents that share a row.
PADDED = (1.0, 0.37, 0.83, 0.12)
PACKED = (0.23, 0.11, 0.4, 0.26)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id or local folder")
    add("--text", type=Path, help="text file; Python's own documentation if not given")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as they were saved)")
    add("--device", help="such as cpu or cuda:1; the GPU if there is one")
    add("--max-length", type=int, default=256, help="tokens in the longest row (256)")
    add("--pack", action="store_true", help="documents packed in one row, instead of padded rows")
    add("--padding-side", choices=("left", "right"), help="the tokenizer's own if not given")
    args = parser.parse_args(arguments)
    if args.max_length < 16:
        refuse("--max-length", f"expected at least 16, got {args.max_length}")
    if args.pack and args.padding_side:
        refuse("--padding-side", "packed documents have no padding; drop it or --pack")
    if args.text is not None and not args.text.is_file():
        refuse("--text", f"there is no file {args.text}")
    return args


def refuse(argument: str, reason: object) -> NoReturn:
    print(f"error: argument {argument}: {reason}", file=sys.stderr)
    sys.exit(2)


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in the class that it was saved from, and its tokenizer."""
    try:
        config = AutoConfig.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
        cls = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
        model = cls.from_pretrained(args.model, dtype=args.dtype, attn_implementation="eager")
    except (OSError, ValueError, ImportError) as reason:
        refuse("MODEL", f"cannot load {args.model!r}: {reason}")
    limit = getattr(config.get_text_config(), "max_position_embeddings", args.max_length)
    if args.max_length > limit:
        refuse("--max-length", f"{args.model} takes at most {limit}, got {args.max_length}")
    if args.pack and "position_ids" not in inspect.signature(model.forward).parameters:
        refuse("--pack", f"{type(model).__name__} takes no position_ids, so nothing is packed")
    try:
        return model.to(args.device or torch.accelerator.current_accelerator() or "cpu"), tokenizer
    except (RuntimeError, AssertionError) as reason:
        refuse("--device", reason)


def make_batch(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Pieces of the text, padded to the longest, or end to end with positions that restart."""
    topics = pydoc_data.topics.topics
    text = args.text.read_text(encoding="utf-8") if args.text else "\n".join(topics.values())
    lengths = [int(share * args.max_length) for share in (PACKED if args.pack else PADDED)]
    ids = tokenizer(text[: 100 * args.max_length], verbose=False).input_ids
    if len(ids) < sum(lengths):
        refuse("--text", f"{sum(lengths)} tokens are needed and it has {len(ids)}; take more text "
               "or a smaller --max-length")  # fmt: skip
    rows = torch.tensor(ids[: sum(lengths)]).split(lengths)
    if args.pack:
        positions = torch.cat([torch.arange(length) for length in lengths])
        return {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}
    tokenizer.padding_side = args.padding_side or tokenizer.padding_side
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer.pad({"input_ids": [row.tolist() for row in rows]}, return_tensors="pt")
    batch = {name: padded[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        batch |= {f"decoder_{name}": tensor for name, tensor in batch.items()}
    return batch


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    model, tokenizer = load(args)
    try:
        report = check_parity(model, make_batch(args, model, tokenizer))
    except ValueError as reason:
        refuse("MODEL", reason)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
