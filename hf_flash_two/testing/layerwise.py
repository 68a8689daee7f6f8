"""Layer-wise runs: one model under one implementation, as a whole and each layer by itself.

An error of one attention layer moves the inputs of all layers behind it, so a run of the whole
model does not show which layer it comes from. A layer-wise run therefore has two passes. The first
captures: the model runs forward and backward, while hooks on its attention layers keep the inputs
of each and the gradient that arrives at its output. The second isolates: the model, which makes the
masks, runs again, and the hooks replace the inputs of each layer by captured ones; they keep its
output and send the captured gradient back through this layer alone. If all implementations are
given the inputs and gradients that one of them captured, what a layer returns differs by its own
error only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from hf_flash_two.hf import compat, families, forward_pass, patching
from hf_flash_two.hf.packing import document_ids, ids_of_boundaries, may_be_packed
from hf_flash_two.testing.kernel_calls import kernel_calls

Slot = tuple[str, int, str | int]
"""An attention layer's name ("" for the whole model), the number of its call, a tensor's name."""

Parts = dict[Slot, list[Tensor]]
"""For each tensor the values from each batch."""

OUTPUT, GRADIENT = "output", "gradient at the first attention layer"
# What patching, unpatching and `eval` change on a module, but for hooks.
_CHANGED = ("training", "forward", "_old_forward", patching._UNDO, forward_pass._HOOKS)
# Describe packed documents, and are dropped where each document runs by itself.
_BOUNDARIES = (
    "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
)  # fmt: skip


# The model, made ready and put back


@contextmanager
def as_it_was(model: nn.Module, configs: list[PreTrainedConfig]) -> Iterator[None]:
    """The model unpatched, in evaluation mode, all weights trained; at the end as it was before."""
    modules = [
        (
            vars(module),
            {k: x for k, x in vars(module).items() if k in _CHANGED},
            {k: dict(x) for k, x in vars(module).items() if k.startswith("_forward_")},
        )
        for module in model.modules()
    ]
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with _implementations(configs):
        try:
            patching.unpatch(model)
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(has_precision(parameter))
            yield
        finally:
            for parameter, was in trained.items():
                parameter.requires_grad_(was)
            for now, changed, hooks in modules:
                now.update(changed)
                for kind, had in hooks.items():
                    now[kind].clear()
                    now[kind].update(had)


@contextmanager
def _implementations(configs: list[PreTrainedConfig]) -> Iterator[None]:
    """At the end ``configs`` have the implementations that they had at the beginning."""
    before = [compat.implementation(config) for config in configs]
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            compat.set_implementation(config, name)


@contextmanager
def eagerly(configs: list[PreTrainedConfig]) -> Iterator[None]:
    with _implementations(configs):
        for config in configs:
            compat.set_implementation(config, families.default_implementation(config))
        yield


@contextmanager
def raised(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights and buffers in ``dtype``; at the end in the same memory as before."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if has_precision(x)]
    before = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.to(dtype)
        with _NoFloat32():
            yield
    finally:
        for x, data in zip(tensors, before, strict=True):
            x.data = data


class _NoFloat32(TorchFunctionMode):
    """Keeps float64 where a model asks for float32, as in softmax and norms.

    Tensors without a gradient are converted: rotary angles are to be rounded as usual.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.dtype != torch.float64 or not x.requires_grad:
            return function(*args, **kwargs)
        if function is Tensor.float:
            return x
        if getattr(function, "__name__", "") == "_grouped_mm":  # has no float64
            experts = zip(x.tensor_split(kwargs["offs"][:-1].long().cpu()), args[1], strict=True)
            return torch.cat([tokens @ weight for tokens, weight in experts])
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return function(*args, **kwargs)


def configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    held = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in held if isinstance(c, PreTrainedConfig)}.values())


def has_precision(x: Tensor) -> bool:
    """False for quantised weights, with which only their own modules can compute."""
    return x.is_floating_point() and x.dtype.itemsize > 1


# The batch

# What must be a tensor, and its least number of dimensions.
_DIMENSIONS = {"input_ids": 2, "inputs_embeds": 3, "attention_mask": 2, "position_ids": 1}


def check_batch(batch: object) -> None:
    """Refuse a ``batch`` that does not hold the arguments of a model's forward by name.

    Raises:
        TypeError: ``batch`` is no mapping, or an entry that must be a tensor is none.
        ValueError: tokens have no batch dimension.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            "batch: expected the arguments of the model's forward by name, as a tokenizer or a "
            f"collator returns them ({{'input_ids': ids, ...}}), got {type(batch).__name__}"
        )
    for name, x in batch.items():
        ending = str(name).removeprefix("decoder_")
        if ending not in _DIMENSIONS or x is None or isinstance(x, dict):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(
                f"batch[{name!r}]: expected a tensor, got {type(x).__name__}; a tokenizer returns "
                "tensors with return_tensors='pt'"
            )
        if x.dim() < _DIMENSIONS[ending]:
            shape = ["batch", "tokens", "hidden size"][: _DIMENSIONS[ending]]
            raise ValueError(f"batch[{name!r}]: expected [{', '.join(shape)}], got {list(x.shape)}")


class Batch:
    """The user's batch, whole and with each packed document by itself.

    Tensors with one entry per token, [B, T, ...], are compared and handed on as [tokens, ...]:
    without padding, and in the same order whether documents are together or apart.

    Attributes:
        whole: the batch on the device of the model.
        documents: [B, T], the document of each token; None if each row holds one.
        apart: the batch alone, or one batch for each of its packed documents.
    """

    def __init__(self, batch: Mapping[str, Any], configs: list[PreTrainedConfig], device):
        self.whole = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        self.documents = _documents(self.whole)
        self.lengths, self.apart = [], [self.whole]
        self.decodes = any(getattr(config, "is_encoder_decoder", False) for config in configs)
        self.special = {
            number
            for config in configs
            for name, number in vars(config).items()
            if name.endswith(("token_id", "token_index")) and isinstance(number, int)
        }
        if self.documents is not None:
            places = [
                (row, (numbers == number).nonzero()[:, 0])
                for row, numbers in enumerate(self.documents)
                for number in numbers[numbers >= 0].unique()
            ]
            self.lengths = [len(tokens) for _, tokens in places]
            shape = self.documents.shape
            self.apart = [self._cut(row, tokens, shape) for row, tokens in places]

    def mask(self, prefix: str) -> Tensor | None:
        """bool [B, T], True for real tokens; None if all are, one document to a row."""
        mask = self.whole.get(f"{prefix}attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask != 0
        return None if self.documents is None else self.documents >= 0

    def of(self, layer: str) -> Tensor | None:
        """The mask of the tokens in ``layer``; "" is the whole model."""
        decodes = self.decodes and (not layer or "decoder" in layer)
        return self.mask("decoder_" if decodes else "")

    def tokens(self, layer: str, parts: list[Tensor]) -> Tensor:
        """From tensors [B, T, ...], one for the batch or one for each document."""
        if len(parts) > 1:
            return torch.cat([part[0] for part in parts])
        mask = self.of(layer)
        return parts[0] if mask is None or parts[0].shape[:2] != mask.shape else parts[0][mask]

    def scatter(self, layer: str, tokens: Tensor, like: Tensor, document: int | None) -> Tensor:
        """The inverse of `tokens`, for one document or the batch; zeros in padding."""
        if document is not None:
            return tokens.split(self.lengths)[document][None]
        mask = self.of(layer)
        if mask is None or like.shape[:2] != mask.shape:
            return tokens
        return tokens.new_zeros(like.shape).index_put_((mask,), tokens)

    def with_other_tokens(self, prefix: str, where: Tensor, *, special_too: bool) -> dict:
        """The input with other tokens at ``where``, bool [B, T]; empty if there is no such input.

        Special tokens stay unless ``special_too``: some of them stand for images and sounds.
        """
        ids = self.whole.get(f"{prefix}input_ids")
        if ids is None:
            embeds = self.whole.get(f"{prefix}inputs_embeds")
            if embeds is None:
                return {}
            return {f"{prefix}inputs_embeds": embeds.where(~where[..., None], 1 - embeds)}
        special = torch.tensor(sorted(self.special), dtype=ids.dtype, device=ids.device)
        where = where if special_too else where & ~torch.isin(ids, special)
        ordinary = ids.unique()
        ordinary = ordinary[~torch.isin(ordinary, special)]
        if not len(ordinary):
            return {}
        other = ordinary[(torch.searchsorted(ordinary, ids) + 1) % len(ordinary)]
        return {f"{prefix}input_ids": ids.where(~where, other)}

    def _cut(self, row: int, tokens: Tensor, shape: torch.Size) -> dict:
        """The packed document of these ``tokens`` of a row, as a batch by itself."""
        batch = {"position_ids": tokens[None]}
        for name, x in self.whole.items():
            if name in _BOUNDARIES:
                continue
            if not isinstance(x, Tensor) or x.dim() == 0:
                batch[name] = x
            elif x.shape[:2] == shape:
                batch[name] = x[row : row + 1, tokens]
            elif x.shape[-2:] == shape:
                batch[name] = x[..., row : row + 1, tokens]
            elif name == "position_ids":
                batch[name] = x[..., tokens]
            else:
                raise ValueError(
                    f"{name}: expected a batch of text alone where documents are packed, got a "
                    f"tensor {list(x.shape)} that cannot be cut at their boundaries"
                )
        return batch


def _documents(batch: dict) -> Tensor | None:
    """[B, T], the number of each token's packed document, -1 in padding; None if rows hold one."""
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        return None
    shape = tokens.shape[:2]
    ends, mask = batch.get("cu_seq_lens_q"), batch.get("attention_mask")
    positions = forward_pass.text_positions(batch.get("position_ids"))
    if not may_be_packed(positions, *shape):
        positions = None
    if ends is not None:
        numbers = ids_of_boundaries(ends, shape[1])
    elif mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        return None  # the mask says itself who sees whom
    elif positions is None and mask is None:
        return None
    else:
        numbers = document_ids(positions, mask).expand(shape)
    if isinstance(mask, Tensor) and mask.shape == shape:
        numbers = numbers.masked_fill(mask == 0, -1)
    return numbers if (numbers > 0).any() else None


# Runs


@dataclass(frozen=True)
class Measured:
    """What one implementation computed.

    Attributes:
        tensors: outputs and gradients.
        given: what each layer got in the model: its inputs, and as `OUTPUT` its output's gradient.
        kernels: for each layer the kernels of flash_two that ran in it.
        not_finite: the tensors that hold NaN or infinity, padding included.
    """

    tensors: dict[Slot, Tensor]
    given: dict[Slot, Tensor]
    kernels: dict[str, set[str]]
    not_finite: list[Slot]


@dataclass(frozen=True)
class LayerwiseRuns:
    """A model and a batch, to be run as they are, document by document, and with other tokens."""

    model: nn.Module
    layers: dict[str, nn.Module]
    data: Batch
    working: torch.dtype

    def measure(
        self,
        batches: list[dict],
        given: dict[Slot, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Measured:
        """Run ``batches`` forward and backward, as a whole and then layer by layer.

        Args:
            given: what each layer gets when it runs by itself; None: what it got in the model.
            dtype: what floating-point tensors of the batch are converted to; None: nothing.
        """
        documents = range(len(batches)) if len(batches) > 1 else [None]
        runs = list(zip(documents, batches, strict=True))
        found: Parts = defaultdict(list)
        captured: Parts = defaultdict(list)
        kernels: dict[str, set[str]] = defaultdict(set)
        for document, batch in runs:
            hooks = self._capture(found, captured, document, batch, dtype)
            for layer, ran in hooks.kernels.items():
                kernels[layer] |= ran
        own = {slot: self.data.tokens(slot[0], parts) for slot, parts in captured.items()}
        for document, batch in runs:
            self._isolate(found, own if given is None else given, document, batch, dtype)
        not_finite = [s for s, parts in found.items() if not all(x.isfinite().all() for x in parts)]
        tensors = {slot: self._joined(slot, parts) for slot, parts in found.items()}
        return Measured(tensors, own, kernels, not_finite)

    def _capture(
        self,
        found: Parts,
        given: Parts,
        document: int | None,
        batch: dict,
        dtype: torch.dtype | None,
    ) -> _LayerHooks:
        """Add the model's output and gradient to ``found``, what its layers get to ``given``."""
        hooks = _LayerHooks()
        with hooks.on(self.layers):
            output = self._output(batch, dtype)
        ends = {slot: x for slot, x in hooks.outputs.items() if x.requires_grad}
        *cotangents, gradient = torch.autograd.grad(
            output,
            [*ends.values(), next(iter(hooks.inputs.values()), output)],
            self._random("", output, document),
            allow_unused=True,
        )
        for slot, cotangent in zip(ends, cotangents, strict=True):
            # None: the layer ran, as an image's pooling head may, but the output is without it.
            if cotangent is None:
                cotangent = self._random(slot[0], ends[slot], document)
            given[slot].append(cotangent)
        for slot, x in hooks.inputs.items():
            given[slot].append(x.detach())
        found["", 0, OUTPUT].append(output.detach())
        if gradient is not None:
            found["", 0, GRADIENT].append(gradient)
        return hooks

    def _isolate(
        self,
        found: Parts,
        given: dict[Slot, Tensor],
        document: int | None,
        batch: dict,
        dtype: torch.dtype | None,
    ) -> None:
        """Add each layer's output and gradients for the inputs and output gradient ``given``."""

        def replace(slot: Slot, like: Tensor) -> Tensor:
            tokens = given.get(slot)
            if tokens is None:
                return like
            return self.data.scatter(slot[0], tokens, like, document).to(like.dtype)

        hooks = _LayerHooks(replace)
        with hooks.on(self.layers):
            self._output(batch, dtype)
        for slot, output in hooks.outputs.items():
            if slot not in given:
                continue
            layer, call, _ = slot
            leaves = {s: x for s, x in hooks.inputs.items() if s[:2] == slot[:2]}
            leaves |= {(layer, call, name): w for name, w in self._weights(layer).items()}
            gradients = torch.autograd.grad(
                output, list(leaves.values()), replace(slot, output), materialize_grads=True
            )
            found[slot].append(output.detach())
            for leaf, gradient in zip(leaves, gradients, strict=True):
                found[leaf].append(gradient)

    def _joined(self, slot: Slot, parts: list[Tensor]) -> Tensor:
        """Those of all documents: a weight's gradients summed, other tensors one after another."""
        if slot[2] in self._weights(slot[0]):
            return torch.stack([part.double() for part in parts]).sum(0)
        return self.data.tokens(slot[0], parts)

    def moved_by_padding(self) -> float | None:
        """The furthest that other tokens in the padding move real ones; None without padding."""
        changed = {}
        for prefix in ("", "decoder_"):
            mask = self.data.mask(prefix)
            if mask is not None and not mask.all():
                changed |= self.data.with_other_tokens(prefix, ~mask, special_too=True)
        if not changed:
            return None
        return self.data.tokens("", [self._movement(changed)]).max().item()

    def moved_by_documents(self) -> tuple[float, float, int] | None:
        """How far new tokens move other documents at most, their own at least; how many there are.

        For each bit of the documents' numbers, those that have it change and those that do not must
        stay, then the other way round. Any two documents differ in a bit.
        """
        documents = self.data.documents
        if documents is None:
            return None
        others, itself = [], []
        for bit in range(int(documents.max()).bit_length()):
            for value in (0, 1):
                where = (documents >= 0) & ((documents >> bit) & 1 == value)
                changed = self.data.with_other_tokens("", where, special_too=False)
                moved = self._movement(changed)
                others.append(moved[(documents >= 0) & ~where].max())
                itself.append(moved[where].max())
        most, least = torch.stack(others).max(), torch.stack(itself).min()
        return most.item(), least.item(), len(self.data.apart)

    def _weights(self, layer: str) -> dict[str, Tensor]:
        module = self.layers.get(layer)
        named = module.named_parameters() if module is not None else ()
        return {name: weight for name, weight in named if weight.requires_grad}

    def _output(self, batch: dict, dtype: torch.dtype | None = None) -> Tensor:
        """Logits, or else the first tensor of numbers that the model returns."""
        if dtype is not None:
            batch = {
                name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
                for name, x in batch.items()
            }
        outputs = self.model(**batch)
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        for x in (getattr(outputs, "logits", None), *values):
            if isinstance(x, Tensor) and x.is_floating_point() and x.dim():
                return x
        raise ValueError(f"model: {type(self.model).__name__} returns nothing to compare")

    def _random(self, layer: str, like: Tensor, document: int | None) -> Tensor:
        """A gradient for ``like``, the same for all dtypes and whether documents are apart."""
        if document is None:
            shape = self.data.tokens(layer, [like]).shape
        else:
            shape = (sum(self.data.lengths), *like.shape[2:])
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        numbers = numbers.to(like.device, self.working).to(like.dtype)
        return self.data.scatter(layer, numbers, like, document)

    def _movement(self, changed: dict) -> Tensor:
        """Root mean square change of the output per token, relative to the whole output's."""
        with torch.no_grad():
            before = self._output(self.data.whole)
            after = self._output(self.data.whole | changed)
        change = torch.linalg.vector_norm(after.double() - before.double(), dim=-1)
        return change / before.shape[-1] ** 0.5 / rms(before)


class _LayerHooks:
    """Hooks on attention layers.

    Attributes:
        inputs: the tensors with a gradient that a layer got: neither masks nor positions.
        outputs: what layers returned, as `OUTPUT`.
        kernels: for each layer the kernels of flash_two that ran in it.
    """

    def __init__(self, replace: Callable[[Slot, Tensor], Tensor] | None = None):
        self._replace = replace
        self.inputs: dict[Slot, Tensor] = {}
        self.outputs: dict[Slot, Tensor] = {}
        self.kernels: dict[str, set[str]] = defaultdict(set)
        self._running: list[Slot] = []
        self._count: dict[str, int] = defaultdict(int)

    @contextmanager
    def on(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """Hook ``layers``, by name, for the length of a block."""
        with kernel_calls() as self._calls, ExitStack() as stack:
            for name, layer in layers.items():
                before = partial(self._before, name)
                hook = layer.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(layer.register_forward_hook(self._after).remove)
            yield

    def _before(self, name: str, layer: nn.Module, args: tuple, kwargs: dict):
        self._note_kernels()
        call = self._count[name]
        self._count[name] += 1
        self._running.append((name, call, OUTPUT))
        arguments, replace = dict(enumerate(args)) | kwargs, self._replace
        for k, x in arguments.items():
            if isinstance(x, Tensor) and x.requires_grad:
                slot = name, call, k
                if replace is not None:
                    arguments[k] = replace(slot, x).detach().requires_grad_()
                self.inputs[slot] = arguments[k]
        return tuple(arguments[i] for i in range(len(args))), {k: arguments[k] for k in kwargs}

    def _after(self, layer: nn.Module, args: tuple, output) -> None:
        self._note_kernels()
        self.outputs[self._running.pop()] = output[0] if isinstance(output, tuple) else output

    def _note_kernels(self) -> None:
        """Kernels that ran since the last hook ran in the innermost layer that is running."""
        if self._running:
            self.kernels[self._running[-1][0]] |= {call.kernel for call in self._calls}
        self._calls.clear()


def rms(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() / max(1, x.numel()) ** 0.5
