"""Whole training steps and generation of Transformers models; run by ``benchmark.py --model``.

Every implementation runs the same model with the same weights in turn, so that a ratio holds when
the machine's speed drifts. A row is timed only if its loss, or its tokens, are those of flash_two.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

WORKLOADS = ("plain", "padded", "packed", "window", "softcap", "sinks", "demo")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMPLEMENTATIONS = ("flash_two", "sdpa", "flex_attention", "eager")
WINDOW = DOCUMENT = 512
OUT_OF_MEMORY = "out of memory"
_FAMILIES = {
    "window": "MistralConfig", "softcap": "Gemma2Config", "sinks": "GptOssConfig",
}  # fmt: skip


# What scripts/finetune.py trains without --model: 8 rows of 256 bytes, 4 layers.
_DEMO = {"length": 256, "batch": 8, "layers": 4, "width": 128}


@dataclass(frozen=True)
class Case:
    """One row: a model and its batch, and whether it trains or generates."""

    workload: str
    mode: str
    dtype: torch.dtype
    device: str
    length: int
    batch: int
    layers: int
    width: int
    new_tokens: int

    @property
    def vocab_size(self) -> int:
        return 384 if self.workload == "demo" else 4096

    def model(self) -> transformers.PreTrainedModel:
        heads = self.width // 128 if self.width >= 1024 else self.width // 64
        if self.workload == "demo":
            heads = self.width // 32
        sizes = {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // (2 if self.workload == "demo" else 4)),
            "head_dim": self.width // heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": max(4096, self.length + self.new_tokens),
            "pad_token_id": 0,
        }
        if self.workload == "demo":
            sizes |= {"intermediate_size": 3 * self.width, "tie_word_embeddings": True}
        if self.workload in ("window", "softcap", "sinks"):
            sizes["sliding_window"] = WINDOW
        if self.workload == "sinks":
            sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
            sizes["intermediate_size"] = self.width
        config = getattr(transformers, _FAMILIES.get(self.workload, "LlamaConfig"))(**sizes)
        torch.manual_seed(0)
        with torch.device(self.device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        # No token ends a generation.
        model.generation_config.eos_token_id = None
        return model.train(self.mode == "train")

    def inputs(self) -> dict[str, Tensor]:
        """One batch; "padded" rows are left-padded in turn by 0 and by half of their length."""
        generator = torch.Generator().manual_seed(0)
        rows = 1 if self.workload == "packed" else self.batch
        length = self.length * self.batch // rows
        tokens = torch.randint(1, self.vocab_size, (rows, length), generator=generator)
        inputs = {"input_ids": tokens}
        if self.workload == "padded":
            start = torch.arange(rows)[:, None] % 2 * (length // 2)
            inputs["attention_mask"] = (torch.arange(length) >= start).long()
        if self.workload == "packed":
            inputs["position_ids"] = torch.arange(length)[None] % DOCUMENT
        if self.workload == "demo":
            # In every row a document ends, each at another place.
            start = (torch.arange(rows)[:, None] * 37 + 20) % length
            position = torch.arange(length)
            inputs["position_ids"] = torch.where(position < start, position, position - start)
        if self.mode == "train":
            seen = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
            # What padding predicts differs between implementations, and is nobody's loss.
            seen[:, 1:] &= seen[:, :-1].clone()
            inputs |= {"labels": tokens.masked_fill(~seen, -100), "use_cache": False}
        return {
            name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in inputs.items()
        }

    def tokens(self) -> int:
        """Real tokens trained on, or new tokens written."""
        if self.mode == "generate":
            return self.batch * self.new_tokens
        inputs = self.inputs()
        return int(inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum())


def cases(args: argparse.Namespace) -> list[Case]:
    large = args.device == "cuda"
    found = []
    for workload in args.workloads:
        for mode in args.modes or ["train", "generate"]:
            if workload in ("packed", "demo") and mode == "generate":
                continue
            for dtype in args.dtypes or (["bf16"] if large else ["fp32"]):
                for length in args.lengths or [4096 if large else 1024]:
                    sizes = {
                        "length": length, "batch": args.batch,
                        "layers": args.layers or (8 if large else 2),
                        "width": args.width or (2048 if large else 256),
                    }  # fmt: skip
                    sizes |= _DEMO if workload == "demo" else {}
                    case = Case(workload, mode, DTYPES[dtype], args.device, **sizes,
                                new_tokens=args.new_tokens)  # fmt: skip
                    found += [case] if case not in found else []
    return found


def measure(case: Case, repeats: int, wanted: list[str] | None = None) -> list[dict]:
    """One result per implementation: ms, tokens per second, peak memory on a GPU, or why not."""
    model, inputs = case.model(), case.inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0) if case.mode == "train" else None
    row = {
        "workload": case.workload, "mode": case.mode, "dtype": str(case.dtype).split(".")[1],
        "length": case.length, "batch": case.batch, "layers": case.layers, "width": case.width,
    }  # fmt: skip
    results, runs, expected = [], {}, None
    # Of those wanted, any that this version of Transformers knows: flash_attention_4 perhaps.
    others = IMPLEMENTATIONS[1:] if wanted is None else wanted
    for name in dict.fromkeys((IMPLEMENTATIONS[0], *others)):
        results.append(row | {"attention": name})
        run = _runner(case, model, inputs, optimizer, name)
        try:
            got = run()
        except Exception as error:  # whatever it cannot do is a row
            if name == IMPLEMENTATIONS[0]:
                raise
            results[-1]["failed"] = failure(error)
            gc.collect()
            continue
        expected = got if expected is None else expected
        if not _agree(case, got, expected):
            results[-1]["failed"] = f"disagrees: {_words(got)}, flash_two {_words(expected)}"
            continue
        runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_seconds(run, case.device))
    base = statistics.median(times[IMPLEMENTATIONS[0]])
    for result in results:
        if result["attention"] in times:
            seconds = statistics.median(times[result["attention"]])
            result |= {"ms": seconds * 1e3, "tokens_per_s": case.tokens() / seconds}
            result["ratio"] = seconds / base
            if case.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                runs[result["attention"]]()
                result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return results


def failure(error: Exception) -> str:
    """Why an implementation has no time, in a sentence; "out of memory" of a GPU and of a CPU."""
    text = str(error).strip()
    if "out of memory" in text or "allocate memory" in text:
        return OUT_OF_MEMORY
    # Not where in the source of an extension it was raised.
    line = re.sub(r"^.*\.\w+:\d+, ", "", text.split("\n")[0])
    return line.split(". ")[0] or type(error).__name__


def _runner(case: Case, model, inputs, optimizer, name: str) -> Callable[[], Tensor]:
    def train() -> Tensor:
        model.set_attn_implementation(name)
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def generate() -> Tensor:
        model.set_attn_implementation(name)
        return model.generate(**inputs, max_new_tokens=case.new_tokens, do_sample=False)

    return train if case.mode == "train" else generate


def _agree(case: Case, got: Tensor, expected: Tensor) -> bool:
    if case.mode == "train":
        return bool((got - expected).abs() < (1e-4 if case.dtype == torch.float32 else 2e-2))
    if case.dtype == torch.float32:
        return torch.equal(got, expected)
    # Rounding decides near ties, and then all that follows.
    first = got[:, case.length] == expected[:, case.length]
    return bool(first.float().mean() > 0.7)


def _words(got: Tensor) -> str:
    return f"loss {got.item():.4f}" if got.dim() == 0 else f"tokens {got[0, -3:].tolist()}"


def _seconds(run: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(results: list[dict]) -> None:
    names, times = "{:8} {:8} {:8} {:>6} {:>3}  {:14} ", "{:>9} {:>9} {:>9} {:>13}"
    head = names.format("workload", "mode", "dtype", "T", "B", "attention")
    print("\n" + head + times.format("ms", "tokens/s", "peak MiB", "flash_two is"))
    for row in results:
        line = names.format(*(row[x] for x in "workload mode dtype length batch attention".split()))
        if "failed" in row:
            print(f"{line}{row['failed'][:70]}")
            continue
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        ratio = "" if row["attention"] == "flash_two" else compared(row["ratio"])
        numbers = f"{row['ms']:.1f}", f"{row['tokens_per_s']:.0f}"
        print(line + times.format(*numbers, peak, ratio))


def compared(ratio: float) -> str:
    """In words, what flash_two is beside a baseline that takes ``ratio`` times as long."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
