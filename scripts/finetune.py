"""Fine-tune a causal language model with Accelerate, on packed text, with any attention.

    python scripts/finetune.py --output-dir runs/demo --compare eager
    python scripts/finetune.py --output-dir runs/notes --model MODEL --data notes.jsonl --resume
    accelerate launch --num_processes 2 scripts/finetune.py --output-dir runs/two        # GPUs
    accelerate launch --cpu --num_processes 2 scripts/finetune.py --output-dir runs/two  # CPUs
    accelerate launch --config_file fsdp.yaml scripts/finetune.py --output-dir runs/two  # sharded
    torchrun --nproc_per_node 2 scripts/finetune.py --output-dir runs/two --context-parallel 2

Without --model a small Llama over bytes is built on the spot; without --data it reads the language
reference that every Python carries. The same command gives the same losses on one process and on
several; after a kill at any moment, --resume continues to the same losses.

The output folder receives losses.jsonl (a line per step), step-N/ (the newest checkpoints) and
model/ (for from_pretrained).
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

TOLERANCE = 1e-4
"""Largest relative difference that --compare accepts between two attentions in float32."""

LAST_SEED = 2**32 - 1
# The options that a resumed run may change: the losses do not depend on them. All others must be
# those of the run that it continues. Of --data and --text-field the text itself is compared.
CHANGEABLE = ["output_dir", "resume", "data", "text_field", "attn_implementation", "compare"]
CHANGEABLE += ["micro_batch_size", "gradient_checkpointing", "eval_every", "save_every", "keep"]
CHANGEABLE += ["prompt", "sample_tokens", "context_parallel"]
PRECISIONS = ("no", "bf16", "fp16")
# What `accelerate launch` may be set up for, and why this script does not train with it.
REFUSED = {
    "DEEPSPEED": "its engine clips and accumulates gradients itself and has checkpoints of its own",
    "MEGATRON_LM": "it has models of its own",
    "PARALLELISM_CONFIG": "give --context-parallel instead",
}


# Arguments


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a ``kind`` from ``low`` to ``high``, and a message that says so."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"expected {kind.__name__} {limits}, got {text!r}")

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, help: str, default=None, **options) -> None:
        help += "" if default is None else f" ({default})"
        parser.add_argument(name, help=help, default=default, **options)

    natural, positive, share = number(int, 0), number(int, 1), number(float, 0, 0.5)
    amount = number(float, 0)
    add("--output-dir", "folder of this run", type=Path, required=True)
    add("--resume", "continue from the newest checkpoint, if there is one", action="store_true")
    add("--model", "hub id or local folder; a small model over bytes if not given")
    add("--data", ".txt or .jsonl file, or a data set; Python's own documentation if not given")
    add("--text-field", "field of each record that holds the text", "text")
    add("--attn-implementation", "attention to train with", "flash_two", metavar="ATTENTION")
    add("--compare", "check the trained model against this attention", metavar="ATTENTION")
    add("--max-length", "tokens in a packed row", 256, type=number(int, 2))
    add("--batch-size", "rows in a step, over all processes", 8, type=positive)
    add("--micro-batch-size", "rows at once in a process; all if not given", type=positive)
    add("--context-parallel", "processes that share each row", 1, type=positive)
    add("--steps", "optimizer steps", 500, type=positive)
    add("--learning-rate", "peak; 4e-3 for the small model, 2e-4 for LoRA, else 2e-5", type=amount)
    add("--warmup-steps", "steps to the peak; 20, or a tenth if that is less", type=natural)
    add("--weight-decay", "decay of matrices", 0.01, type=amount)
    add("--max-grad-norm", "limit on the gradient's norm; 0 is none", 1.0, type=amount)
    add("--precision", "autocast: no, bf16 or fp16; no, or what accelerate is set up for",
        choices=PRECISIONS, metavar="DTYPE")  # fmt: skip
    add("--gradient-checkpointing", "recompute activations", action="store_true")
    add("--lora-rank", "train adapters of this rank; 0 trains all weights", 0, type=natural)
    add("--eval-fraction", "share of the rows held out, one row at least", 0.05, type=share)
    add("--eval-every", "steps between evaluations; 0: first and last only", 0, type=natural)
    add("--save-every", "steps between checkpoints", 100, type=positive)
    add("--keep", "how many checkpoints stay", 2, type=positive)
    add("--prompt", "beginning of the sample", "The ")
    add("--sample-tokens", "length of the sample", 200, type=positive)
    add(
        "--seed", "of new weights, the order of rows and dropout", 0, type=number(int, 0, LAST_SEED)
    )
    args = parser.parse_args()
    check_launcher()
    check_arguments(args)
    return args


def refuse(argument: str, reason: str) -> NoReturn:
    sys.exit(f"error: argument --{argument}: {reason}")


def warn(reason: str) -> None:
    """Once, however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {reason}", file=sys.stderr)


def check_unicode(argument: str, text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as reason:
        refuse(argument, f"{what} is no Unicode text: {reason}")


def launched_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def check_launcher() -> None:
    for what, reason in REFUSED.items():
        if launched_for(what):
            sys.exit(f"error: accelerate is set up for {what}; this script refuses it: {reason}; "
                     "FSDP with fsdp_version: 2 shards models")  # fmt: skip
    version = os.environ.get("FSDP_VERSION", "1")
    if launched_for("FSDP") and version != "2":
        sys.exit(f"error: accelerate is set up for FSDP {version}; write fsdp_version: 2 into "
                 "fsdp_config of its config file")  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Complete the arguments, and refuse what needs no library to be refused."""
    if args.warmup_steps is None:
        args.warmup_steps = min(20, args.steps // 10)
    if args.warmup_steps >= args.steps:
        refuse("warmup-steps", f"expected fewer than --steps {args.steps}, got {args.warmup_steps}")
    if args.precision is None:
        args.precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.precision not in PRECISIONS:
        refuse("precision", f"accelerate is set up for {args.precision}; pass --precision with one "
               f"of {', '.join(PRECISIONS)}")  # fmt: skip
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        refuse("lora-rank", "needs the package peft: pip install peft")
    if not args.prompt:
        refuse("prompt", "expected some text, got none")
    check_unicode("prompt", args.prompt, "it")
    if args.data is None and importlib.util.find_spec("pydoc_data") is None:
        refuse("data", "expected a .txt or .jsonl file, or a data set, as this Python carries no "
               "documentation")  # fmt: skip
    is_file = args.data is not None and Path(args.data).suffix in (".txt", ".jsonl")
    if is_file and not Path(args.data).is_file():
        refuse("data", f"there is no file {args.data}")
    if args.data and not is_file and Path(args.data).is_file():
        refuse("data", f"expected a .txt or .jsonl file, or a data set, got {args.data}")
    if args.data and not is_file and importlib.util.find_spec("datasets") is None:
        refuse("data", f"{args.data} is no .txt or .jsonl file, and a data set needs the package "
               "datasets: pip install datasets")  # fmt: skip
    if args.model is not None and not Path(args.model).is_dir():
        # A hub id is "name" or "owner/name".
        if args.model[:1] in "./~" or args.model.count("/") > 1 or Path(args.model).exists():
            refuse("model", f"there is no folder {args.model}")
    if args.learning_rate is None:
        args.learning_rate = 4e-3 if args.model is None else 2e-4 if args.lora_rank else 2e-5
    existing = next(x for x in (args.output_dir, *args.output_dir.parents) if x.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        refuse("output-dir", f"{existing} is no folder that can be written to")
    if not args.resume and args.output_dir.exists() and any(args.output_dir.iterdir()):
        refuse("output-dir", f"{args.output_dir} is not empty; pass --resume to continue that run, "
               "or name another folder")  # fmt: skip


if __name__ == "__main__":
    parse_arguments()  # a mistake is told before the imports, which take long

import psutil
import torch
import torch.nn.functional as F
from accelerate import (
    Accelerator,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from finetune_checkpoints import (
    load_checkpoint,
    newest_checkpoint,
    publish,
    remove,
    save_checkpoint,
    writing,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

import hf_flash_two
from hf_flash_two.testing.errors import gradient_errors


def check_names(args: argparse.Namespace) -> None:
    """Refuse what the libraries do not know or this machine does not have."""
    known = sorted({"eager", *AttentionInterface().valid_keys()})
    known = [name for name in known if "|" not in name]  # those of paged caches
    for name in ("attn_implementation", "compare"):
        value = getattr(args, name)
        if value is not None and value not in known and "/" not in value:
            refuse(name.replace("_", "-"), f"expected one of {', '.join(known)}, got {value!r}")
    if args.context_parallel > 1 and args.attn_implementation not in ("flash_two", "fa_two"):
        refuse("context-parallel", f"needs flash_two, got {args.attn_implementation}")
    if args.precision == "fp16" and not torch.accelerator.is_available():
        refuse("precision", "fp16 needs a GPU and none is visible; use bf16 or no")
    if args.model is not None:
        try:
            config = AutoConfig.from_pretrained(args.model).get_text_config()
        except (OSError, ValueError) as reason:
            refuse("model", f"cannot read {args.model!r}: {reason}")
        limit = getattr(config, "max_position_embeddings", args.max_length)
        if args.max_length > limit:
            refuse("max-length", f"{args.model} takes at most {limit}, got {args.max_length}")


def start_processes() -> None:
    """Start all processes where `accelerate launch` started one for several CPUs.

    That one is told where to meet the others, but not how many: only the launcher's own command
    line, which ends in this script's, and its config file say so.
    """
    if "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--config_file", "--config-file")
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--num_machines", "--num-machines", type=int)
    launcher = psutil.Process().parent().cmdline()[: -len(sys.argv)]
    asked, _ = parser.parse_known_args(launcher)
    if asked.config_file or (Path(default_config_file).is_file() and not asked.cpu):
        config = load_config_from_file(asked.config_file)
        kind = config.distributed_type.value
        if kind in ("FSDP", *REFUSED):
            sys.exit(
                f"error: with --cpu, accelerate launch leaves out the {kind} of its config file"
            )
        asked.num_processes = asked.num_processes or config.num_processes
        asked.num_machines = asked.num_machines or config.num_machines
    if (asked.num_processes or 1) > 1 and (asked.num_machines or 1) == 1:
        launch = ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={asked.num_processes}"]
        os.execv(sys.executable, [sys.executable, *launch, *sys.argv])


def make_accelerator(precision: str) -> Accelerator:
    """What `accelerate launch` asks for, on CPUs too."""
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if launched_for("FSDP") and accelerator.distributed_type is DistributedType.MULTI_CPU:
        # Accelerate shards on accelerators alone, and on CPUs leaves it out without a word.
        if not cpu:
            sys.exit("error: to shard over CPUs, hide the GPUs, as with CUDA_VISIBLE_DEVICES=")
        plugin = FullyShardedDataParallelPlugin()  # as the launcher's environment describes it
        if precision != "no":
            plugin.set_mixed_precision(precision)
        accelerator.state.fsdp_plugin = plugin
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
    return accelerator


def own_rows(args: argparse.Namespace, accelerator: Accelerator) -> slice:
    """The rows of a batch that this process takes part in; the step is how many groups there are.

    A group is one process, or those that share each row.
    """
    size = args.context_parallel
    return slice(accelerator.process_index // size, None, accelerator.num_processes // size)


@contextlib.contextmanager
def shared(
    args: argparse.Namespace, accelerator: Accelerator, tokens: Tensor, positions: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, positions, labels) of this process, from those of rows that its group shares.

    The model runs within.
    """
    labels = labels_of(tokens, positions)
    if args.context_parallel == 1:
        yield tokens, positions, labels
        return
    rows = {"input_ids": tokens, "position_ids": positions, "shift_labels": labels}
    mesh = context_mesh(accelerator.device.type, accelerator.num_processes, args.context_parallel)
    with hf_flash_two.context_parallel(mesh, rows) as shard:
        yield tuple(shard.batch[name] for name in rows)


@functools.cache
def context_mesh(device: str, processes: int, size: int) -> DeviceMesh:
    """That of the processes which share rows with this one."""
    shape, names = (processes // size, size), ("rows", "context")
    return init_device_mesh(device, shape, mesh_dim_names=names)["context"]


def check_processes(args: argparse.Namespace, accelerator: Accelerator) -> None:
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        warn("`accelerate launch` has started one process only; for more of them give it --cpu "
             "--num_processes N, or use torchrun")  # fmt: skip
    if accelerator.num_processes % args.context_parallel:
        refuse("context-parallel", f"expected a divisor of the {accelerator.num_processes} "
               f"processes, got {args.context_parallel}")  # fmt: skip
    shares = own_rows(args, accelerator).step
    rows, rest = divmod(args.batch_size, shares)
    if rest:
        groups = "processes" if args.context_parallel == 1 else "groups of processes"
        refuse("batch-size", f"expected a multiple of the {shares} {groups}, got "
               f"{args.batch_size}")  # fmt: skip
    args.micro_batch_size = args.micro_batch_size or rows
    if rows % args.micro_batch_size:
        refuse("micro-batch-size", f"expected a divisor of {rows}, each process's rows in a step, "
               f"got {args.micro_batch_size}")  # fmt: skip


# Text


def load_documents(data: str | None, text_field: str) -> list[str]:
    if data is None:
        import pydoc_data.topics

        return list(pydoc_data.topics.topics.values())

    def parse(number: int, line: str):
        try:
            return json.loads(line)
        except ValueError as reason:
            refuse("data", f"line {number} of {data} is no JSON: {reason}")

    try:
        if data.endswith(".txt"):
            records = [{text_field: Path(data).read_text(encoding="utf-8")}]
        elif data.endswith(".jsonl"):
            lines = Path(data).read_text(encoding="utf-8").split("\n")
            records = [parse(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
        else:
            import datasets

            records = datasets.load_dataset(data, split="train")
    except (OSError, ValueError) as reason:
        refuse("data", f"cannot read {data}: {reason}")
    for index, record in enumerate(records):
        fields = record if isinstance(record, dict) else {}
        if not isinstance(fields.get(text_field), str):
            refuse("text-field", f"record {index} of {data} has no text under {text_field!r}; "
                   f"its fields are {', '.join(fields) or 'none'}")  # fmt: skip
        check_unicode("data", fields[text_field], f"record {index} of {data}")
    documents = [record[text_field] for record in records]
    if not any(documents):
        refuse("data", f"there is no text in {data}")
    return documents


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each document, closed by the end-of-text token if there is one."""
    end = tokenizer.eos_token_id
    encoded = tokenizer(documents, verbose=False).input_ids
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]


def pack(documents: list[list[int]], length: int) -> tuple[Tensor, Tensor]:
    """Documents laid end to end and cut into rows of ``length`` tokens; nothing is dropped.

    Returns:
        tokens, positions: int64 [rows, length]. Positions restart at 0 with each document and each
        row. They tell the attention where documents begin, and the loss which tokens nothing
        predicts: those at position 0. The padding of the last row is documents of one token, which
        teach nothing.
    """
    tokens = torch.tensor([token for document in documents for token in document]).long()
    lengths = torch.tensor([len(document) for document in documents]).long()
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    index = torch.arange(len(tokens))
    positions = index - torch.maximum(starts, index - index % length)
    padding = -len(tokens) % length
    return tuple(F.pad(tensor, (0, padding)).view(-1, length) for tensor in (tokens, positions))


def split(tokens: Tensor, positions: Tensor, share: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows to train on, and the last ones to hold out; those without a target are in neither.

    At most one document has a part on either side.
    """
    taught = (positions != 0).any(dim=1)
    rows = int(taught.sum())
    if rows < 2:
        refuse("data", f"the text fills {('no', 'one')[rows]} row of {tokens.shape[1]} tokens and "
               "two are needed; take more text or a smaller --max-length")  # fmt: skip
    held_out = max(1, round(share * rows))
    parts = (tensor[taught].split([rows - held_out, held_out]) for tensor in (tokens, positions))
    return zip(*parts, strict=True)


@functools.lru_cache(maxsize=2)
def shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(rows), rows)


def rows_of_step(step: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """The rows of a step: a function of its number, so that resuming has nothing to restore."""
    places = [divmod(step * batch_size + i, rows) for i in range(batch_size)]
    return torch.tensor([shuffled(rows, seed, epoch)[place] for epoch, place in places])


# Model


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    if name is None:
        return ByT5Tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as reason:  # of any kind, by what the folder holds
        refuse("model", f"cannot load the tokenizer of {name!r}: {reason}")


def load_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(args.seed)
    options = {"attn_implementation": args.attn_implementation, "dtype": torch.float32}
    if args.model is None:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
            max_position_embeddings=max(2048, args.max_length), bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        load, source = AutoModelForCausalLM.from_config, config
    else:
        # Weights that are trained stay in float32 under autocast; frozen ones need not.
        if args.lora_rank and args.precision != "no":
            options["dtype"] = torch.bfloat16 if args.precision == "bf16" else torch.float16
        load, source = AutoModelForCausalLM.from_pretrained, args.model
    try:
        model = load(source, **options)
    except Exception as reason:  # of any kind, by what the folder holds
        refuse("model", f"cannot load {args.model or 'the small one'} with "
               f"{args.attn_implementation}: {reason}")  # fmt: skip
    if "position_ids" not in inspect.signature(model.forward).parameters:
        refuse("model", f"{type(model).__name__} takes no position_ids, so documents cannot be "
               "packed")  # fmt: skip
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank:
        import peft

        rank = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank}
        config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **rank)
        model = peft.get_peft_model(model, config)
    return model


def trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def logits_of(model, tokens: Tensor, positions: Tensor) -> Tensor:
    # With a cache or an attention mask, eager and sdpa would let documents see each other.
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def labels_of(tokens: Tensor, positions: Tensor) -> Tensor:
    """What each token predicts: the next one, unless that starts a document."""
    return F.pad(tokens.masked_fill(positions == 0, -100)[:, 1:], (0, 1), value=-100)


def loss_sum(model, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, summed over the targets: all tokens but the first of each document."""
    logits = logits_of(model, tokens, positions).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@torch.no_grad()
def check_model(model: PreTrainedModel, vocabulary: int, rounding: float = 1e-5) -> None:
    """Stop if logits depend on the tokens that follow, or on the document packed before."""
    model.eval()
    tokens = torch.arange(16, device=model.device) % vocabulary
    other = (tokens + max(1, vocabulary // 2)) % vocabulary
    positions = torch.arange(16, device=model.device).repeat(1, 2)

    def logits(first: Tensor, second: Tensor) -> Tensor:
        return logits_of(model, torch.cat([first, second])[None], positions)[0]

    base, name = logits(tokens, tokens), type(model).__name__
    limit = rounding * base.abs().max()
    other_end = logits(tokens, torch.cat([tokens[:1], other[1:]]))
    if (other_end - base)[:17].abs().max() > limit:
        refuse("model", f"{name} is not causal: tokens see those that follow, and it would learn "
               'to copy them; a BERT is causal with "is_decoder": true in its config.json'
        )  # fmt: skip
    if (logits(other, tokens) - base)[16:].abs().max() > limit:
        refuse("attn-implementation", f"packed documents see each other in {name} with this "
               "attention")  # fmt: skip


def make_optimizer(model: PreTrainedModel, args: argparse.Namespace) -> torch.optim.Optimizer:
    weights = list(trained_weights(model).values())
    decayed = {"params": [w for w in weights if w.dim() > 1], "weight_decay": args.weight_decay}
    others = {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, others], betas=(0.9, 0.95))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    return args.learning_rate * (1 + math.cos(math.pi * done)) / 2


# The output folder


def prepare_folder(folder: Path, lines: str) -> None:
    """Remove what a killed run left half done; the log holds ``lines``, those of the checkpoint."""
    log = folder / "losses.jsonl"
    with writing(log):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.partial"):
            remove(path)
        log.with_suffix(".partial").write_text(lines)
        publish(log.with_suffix(".partial"), log)


def identity_of(args: argparse.Namespace, tokens: Tensor) -> dict:
    """What a resumed run must share with the run that it continues."""
    identity = {name: value for name, value in vars(args).items() if name not in CHANGEABLE}
    return identity | {"text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}


# Training


def bare(accelerator: Accelerator, model) -> PreTrainedModel:
    """Without what makes it parallel or compiled; the precision stays."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


@torch.no_grad()
def perplexity(args, accelerator: Accelerator, model, rows: tuple[Tensor, Tensor]) -> float:
    """exp(mean loss) over all targets of ``rows``, which the processes share out."""
    model = bare(accelerator, model).eval()
    total = torch.zeros((), device=accelerator.device)
    own = own_rows(args, accelerator)
    # A sharded model runs on all processes or on none: rows without a target make shares equal.
    padding = (0, 0, 0, -len(rows[0]) % own.step)
    parts = (F.pad(x, padding)[own].split(args.micro_batch_size) for x in rows)
    for tokens, positions in zip(*parts, strict=True):
        whole = tokens.to(accelerator.device), positions.to(accelerator.device)
        with shared(args, accelerator, *whole) as batch:
            total += loss_sum(model, *batch)
    targets = max(1, int((rows[1] != 0).sum()))
    return (accelerator.reduce(total) / targets).exp().item()


def objective(total: Tensor, targets: int, accelerator: Accelerator) -> Tensor:
    """What a process differentiates: its part of the mean over the targets of the whole step.

    The gradients of the processes are averaged, and their sum is wanted.
    """
    return total * accelerator.num_processes / targets


def train_step(args, accelerator: Accelerator, model, optimizer, rows, step: int) -> dict:
    """One update from ``batch_size`` rows; returns its line of the log."""
    tokens, positions = rows
    device, processes = accelerator.device, accelerator.num_processes
    model.train()
    # Dropout depends on the step, not on what was drawn before it.
    torch.manual_seed((args.seed * args.steps + step) * processes + accelerator.process_index)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, args)

    batch = rows_of_step(step, args.batch_size, len(tokens), args.seed)
    targets = max(1, int((positions[batch] != 0).sum()))
    total = torch.zeros((), device=device)
    micro_batches = batch[own_rows(args, accelerator)].split(args.micro_batch_size)
    for index, chosen in enumerate(micro_batches, start=1):
        # Until they are summed over the processes, gradients of a sharded model are whole ones.
        summed = index == len(micro_batches) or accelerator.is_fsdp2
        with contextlib.nullcontext() if summed else accelerator.no_sync(model):
            whole = tokens[chosen].to(device), positions[chosen].to(device)
            with shared(args, accelerator, *whole) as part:
                loss = loss_sum(model, *part)
                accelerator.backward(objective(loss, targets, accelerator))
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    loss = accelerator.reduce(total).item() / targets
    if not math.isfinite(loss):
        refuse("learning-rate", f"the loss of step {step + 1} is {loss}; try a smaller one")
    return {"step": step + 1, "loss": loss, "grad_norm": float(norm)}


def train(args, accelerator: Accelerator, model, optimizer, training, held_out, start, identity):
    """Take the steps from ``start`` on, with a progress bar, a log and checkpoints."""
    main = accelerator.is_main_process
    bar = tqdm(total=args.steps, initial=start, unit="step", mininterval=1, disable=not main)
    path = args.output_dir / "losses.jsonl" if main else Path(os.devnull)
    log = open(path, "ab", buffering=0)
    evaluate = functools.partial(perplexity, args, accelerator, model, held_out)

    def write(entry: dict) -> None:
        with writing(path):
            log.write(f"{json.dumps(entry)}\n".encode())

    if start == 0:
        write({"step": 0, "perplexity": evaluate()})
    for step in range(start, args.steps):
        began = time.perf_counter()
        entry = train_step(args, accelerator, model, optimizer, training, step)
        speed = args.batch_size * args.max_length / (time.perf_counter() - began)
        done, finished = step + 1, step + 1 == args.steps
        if finished or (args.eval_every and done % args.eval_every == 0):
            entry["perplexity"] = evaluate()
        write(entry)
        if finished or done % args.save_every == 0:
            run = {"step": done, "identity": identity, "log": path.read_text()}
            run["scaler"] = accelerator.scaler and accelerator.scaler.state_dict()
            save_checkpoint(args.output_dir, run, model, optimizer.optimizer, args.keep)
        bar.set_postfix_str(f"loss {entry['loss']:.4f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
    bar.close()
    log.close()


# The end of a run


def whole(args: argparse.Namespace, accelerator: Accelerator, model, tokenizer) -> PreTrainedModel:
    """The trained model as it is without Accelerate; of use on the main process only."""
    if not accelerator.is_fsdp2:
        return accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # of rank 0; the others get none
    if accelerator.is_main_process:
        model = load_model(args, tokenizer)
        model.load_state_dict(weights)
    return model


def save_model(model: PreTrainedModel, tokenizer, folder: Path) -> None:
    """Write the model, adapters merged, and make sure that it comes back as it was."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    partial = folder.with_suffix(".partial")
    with writing(folder):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        publish(partial, folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
    for name, weight in model.state_dict().items():
        if not torch.equal(reloaded[name], weight.cpu()):
            sys.exit(f"error: {folder} does not give {name} back as it was saved")


def generate(model, tokenizer, prompt: str, count: int, **options) -> Tensor:
    ids = tokenizer(prompt).input_ids
    ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    ids = torch.tensor([ids], device=model.device)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)


def measure(model: PreTrainedModel, tokenizer, rows, prompt: str) -> dict:
    """What a model does with its attention: numbers, and the tokens that it writes."""
    model.eval()
    tokens, positions = (tensor.to(model.device) for tensor in rows)
    labels = labels_of(tokens, positions)
    loss = loss_sum(model, tokens, positions, labels) / (positions != 0).sum()
    loss.backward()
    named = model.named_parameters()
    gradients = {name: weight.grad for name, weight in named if weight.grad is not None}
    with torch.no_grad():
        logits = logits_of(model, tokens, positions)
    greedy = generate(model, tokenizer, prompt, 64, do_sample=False)
    loss, logits = {"loss": loss.detach()}, {"logits": logits}
    return {"loss": loss, "logits": logits, "gradients": gradients, "greedy": greedy}


def check_comparison(args: argparse.Namespace, tokenizer, rows, device: torch.device) -> None:
    """Stop now if the attention to compare with cannot do what it is asked for in the end."""
    plain = {"attn_implementation": args.compare, "precision": "no", "lora_rank": 0}
    model = load_model(argparse.Namespace(**{**vars(args), **plain}), tokenizer).to(device)
    try:
        measure(model, tokenizer, [tensor[:1] for tensor in rows], args.prompt)
    except Exception as reason:  # of any kind, by what attention it is
        refuse("compare", f"{args.compare} cannot run {type(model).__name__} in float32 on "
               f"{device.type}: {reason}")  # fmt: skip


def compare(names: tuple[str, str], folder: Path, tokenizer, rows, prompt: str, device) -> None:
    """Print how far two attentions differ on the saved model in float32; stop if they disagree."""

    def measured(name: str) -> dict:
        options = {"attn_implementation": name, "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(folder, **options).to(device)
        return measure(model, tokenizer, rows, prompt)

    ours, theirs = map(measured, names)
    same = torch.equal(ours.pop("greedy"), theirs.pop("greedy"))
    differences = {key: max(gradient_errors(ours[key], theirs[key]).values()) for key in ours}
    print(f"\n{'':<16}{names[0]:>12}{names[1]:>12}{'difference':>12}{'allowed':>10}")
    for key, value in differences.items():
        shown = [f"{float(x[key]['loss']):.6f}" if key == "loss" else "" for x in (ours, theirs)]
        print(f"{key:<16}{shown[0]:>12}{shown[1]:>12}{value:>12.1e}{TOLERANCE:>10.0e}")
    print(f"{'greedy sample':<40}{'equal' if same else 'DIFFERENT':>12}{'equal':>10}")
    if not same or not max(differences.values()) <= TOLERANCE:
        sys.exit(f"error: {names[0]} and {names[1]} disagree on the trained model")


def finish(args: argparse.Namespace, model: PreTrainedModel, tokenizer, held_out, device) -> None:
    """Save the model, show what it writes, compare attentions, sum up."""
    disable_progress_bar()
    folder = args.output_dir / "model"
    save_model(model, tokenizer, folder)
    print(f"\nsaved, and reloaded as it was: {folder}")
    options = {"attn_implementation": args.attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).to(device)
    torch.manual_seed(args.seed)
    options = {"do_sample": True, "temperature": 0.7}
    sample = generate(model, tokenizer, args.prompt, args.sample_tokens, **options)
    print(f"\nsample: {tokenizer.decode(sample[0], skip_special_tokens=True)}")
    log = (args.output_dir / "losses.jsonl").read_text().splitlines()
    before, *steps = [json.loads(line) for line in log]
    first, last = (sum(s["loss"] for s in part) / len(part) for part in (steps[:10], steps[-10:]))
    after = steps[-1]["perplexity"]
    print(f"\n{'':<28}{'before':>12}{'after':>12}")
    print(f"{'loss, mean of ten steps':<28}{first:>12.4f}{last:>12.4f}")
    print(f"{'perplexity of held-out text':<28}{before['perplexity']:>12.2f}{after:>12.2f}")
    if args.compare:
        rows = [tensor[: args.micro_batch_size] for tensor in held_out]
        names = (args.attn_implementation, args.compare)
        compare(names, folder, tokenizer, rows, args.prompt, device)


def main() -> None:
    args = parse_arguments()
    check_names(args)
    start_processes()
    accelerator = make_accelerator(args.precision)
    check_processes(args, accelerator)
    documents = load_documents(args.data, args.text_field)
    tokenizer = load_tokenizer(args.model)
    tokens, positions = pack(tokenize(documents, tokenizer), args.max_length)
    training, held_out = split(tokens, positions, args.eval_fraction)

    identity = identity_of(args, tokens)
    try:
        checkpoint, run = newest_checkpoint(args.output_dir, identity)
    except ValueError as reason:
        refuse("resume", str(reason))
    if args.compare and accelerator.is_main_process:
        check_comparison(args, tokenizer, held_out, accelerator.device)
    model = load_model(args, tokenizer)
    known, largest = model.get_input_embeddings().weight.shape[0], int(tokens.max())
    if largest >= known:
        refuse("model", f"its tokenizer gives token {largest}, and it knows {known}")
    optimizer = make_optimizer(model, args)
    model, optimizer = accelerator.prepare(model, optimizer)
    if checkpoint:
        load_checkpoint(checkpoint, model, optimizer.optimizer)
    if checkpoint and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(run["scaler"])
    rounding = 1e-5 if args.precision == "no" else 1e-3
    check_model(bare(accelerator, model), min(known, len(tokenizer)), rounding)
    if accelerator.is_main_process:
        prepare_folder(args.output_dir, run["log"])

    trained = sum(weight.numel() for weight in trained_weights(model).values())
    accelerator.print(
        f"model  {sum(w.numel() for w in model.parameters()):,} parameters, {trained:,} trained, "
        f"{args.attn_implementation}, precision {args.precision}\n"
        f"text   {len(documents):,} documents in {len(training[0]):,} rows of {args.max_length} "
        f"tokens, {len(held_out[0]):,} more held out\n"
        f"steps  {run['step']:,} to {args.steps:,}, {args.batch_size} rows each on "
        f"{accelerator.num_processes} x {accelerator.device.type}"
        f"{', sharded' if accelerator.is_fsdp2 else ''}, {args.micro_batch_size} at once"
        f"{f', each on {args.context_parallel}' if args.context_parallel > 1 else ''}"
    )
    train(args, accelerator, model, optimizer, training, held_out, run["step"], identity)
    accelerator.wait_for_everyone()
    ordinary = whole(args, accelerator, model, tokenizer)
    if accelerator.is_main_process:
        finish(args, ordinary, tokenizer, held_out, accelerator.device)
    # DDP must not outlive the process group: were it the last to hold it, it would wait for
    # Gloo's threads while holding the interpreter's lock, which they may be waiting for.
    del model, ordinary, optimizer
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    main()
