"""Check a model of your own under flash_two against eager, layer by layer, on your own text.

    python scripts/parity.py MODEL --dtype bfloat16
    python scripts/parity.py MODEL --text notes.txt --max-length 1024 --pack
    python scripts/parity.py MODEL --batch batch.pt

MODEL is a hub id or a local folder. Its attention layers run under flash_two and under eager on the
same batch, and both are compared with eager in higher precision. The exit code is 0 if all is well,
1 if a check failed and 2 if the check could not be made. A batch of your own, such as one from your
collator, is saved by `torch.save(dict(batch), "batch.pt")`; `hf_flash_two.check_parity` takes it as
it is, and a model.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

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
    add("--batch", type=Path, help="the arguments of the model's forward, instead of a text")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: as they were saved)")
    add("--device", help="such as cpu or cuda:1; the GPU if there is one")
    add("--max-length", type=int, default=256, help="tokens in the longest row (256)")
    add("--pack", action="store_true", help="documents packed in one row, instead of padded rows")
    add("--padding-side", choices=("left", "right"), help="the tokenizer's own if not given")
    args = parser.parse_args(arguments)
    if not Path(args.model).is_dir():
        # A hub id is "name" or "owner/name".
        if args.model[:1] in "./~" or args.model.count("/") > 1 or Path(args.model).exists():
            refuse("MODEL", f"there is no folder {args.model}")
    if args.max_length < 16:
        refuse("--max-length", f"expected at least 16, got {args.max_length}")
    if args.pack and args.padding_side:
        refuse("--padding-side", "packed documents have no padding; drop it or --pack")
    for name in ("text", "batch"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            refuse(f"--{name}", f"there is no file {path}")
    if args.batch and (args.text or args.pack or args.padding_side):
        refuse("--batch", "it stands instead of --text, --pack and --padding-side")
    return args


def refuse(argument: str, reason: object) -> NoReturn:
    print(f"error: argument {argument}: {reason}", file=sys.stderr)
    sys.exit(2)


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The model in the class that it was saved from."""
    try:
        config = AutoConfig.from_pretrained(args.model)
        architecture = (config.architectures or ["AutoModelForCausalLM"])[0]
        cls = getattr(transformers, architecture, transformers.AutoModelForCausalLM)
        model = cls.from_pretrained(args.model, dtype=args.dtype, attn_implementation="eager")
    except Exception as reason:  # of any kind, by what the folder holds
        refuse("MODEL", f"cannot load {args.model!r}: {reason}")
    try:
        device = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device(args.device or device or "cpu")
        return model.to(device)  # pyright: ignore[reportArgumentType]  (a decorator hides self)
    except (RuntimeError, AssertionError) as reason:
        refuse("--device", reason)


def load_batch(path: Path, model: PreTrainedModel) -> dict:
    expected = f"expected a dict in {path}, as torch.save(dict(batch), {path.name!r}) writes it"
    try:
        batch = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as reason:  # whatever the bytes of another file happen to mean
        refuse("--batch", f"{expected} ({type(reason).__name__})")
    if not isinstance(batch, dict):
        refuse("--batch", f"{expected}, got {type(batch).__name__}")
    if not {model.main_input_name, "inputs_embeds"} & batch.keys():
        refuse("--batch", f"{type(model).__name__} needs {model.main_input_name}, and {path} has "
               f"{', '.join(map(str, batch)) or 'nothing'}")  # fmt: skip
    for name, tensor in batch.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel() == 0:
            refuse("--batch", f"{name} of {path} is empty: its shape is {list(tensor.shape)}")
    return batch


def check_tokens(argument: str, ids: object, model: PreTrainedModel) -> None:
    """Refuse those for which the model has no embedding."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is None or not isinstance(ids, torch.Tensor):
        return
    wrong = ids[(ids < 0) | (ids >= known)]
    if len(wrong):
        refuse(argument, f"expected tokens from 0 to {known - 1}, got {wrong[0]}")


def read_text(path: Path | None) -> str:
    if path is None:
        try:
            import pydoc_data.topics
        except ImportError:
            refuse("--text", "expected a file, as this Python carries no documentation")
        return "\n".join(pydoc_data.topics.topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as reason:
        refuse("--text", f"expected text in UTF-8, and cannot read {path}: {reason}")


def make_batch(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Pieces of the text, padded to the longest, or end to end with positions that restart."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except Exception as reason:  # of any kind, by what the folder holds
        refuse("MODEL", f"no tokenizer in {args.model!r}; give --batch instead: {reason}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", args.max_length)
    if args.max_length > limit:
        refuse("--max-length", f"{args.model} takes at most {limit}, got {args.max_length}")
    if args.pack and "position_ids" not in inspect.signature(model.forward).parameters:
        refuse("--pack", f"{type(model).__name__} takes no position_ids, so nothing is packed")
    text = read_text(args.text)
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
    model = load(args)
    batch = load_batch(args.batch, model) if args.batch else make_batch(args, model)
    check_tokens("--batch" if args.batch else "MODEL", batch.get("input_ids"), model)
    try:
        report = check_parity(model, batch)
    except ValueError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        traceback.print_exc()
        sys.exit(2)  # 1 says that a check failed
