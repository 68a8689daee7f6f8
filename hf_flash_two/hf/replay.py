"""A model run with hooks on its attention layers, as a whole and each layer by itself.

"By itself" is inside the model as well, which makes the masks: what goes into a layer, and the
gradient that arrives at it, is put in from outside, the same under each implementation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from hf_flash_two.hf import compat, forward_pass, patching
from hf_flash_two.hf.packing import document_ids, may_be_packed
from hf_flash_two.kernels import select
from hf_flash_two.kernels.params import AttentionParams

Slot = tuple[str, int, str | int]
"""An attention layer's name (the whole model's is ""), which of its calls it is, a tensor of it."""

OUTPUT, GRADIENT = "output", "gradient at the first attention layer"
# What patching puts on a module.
_PATCHED = ("forward", "_old_forward", patching._UNDO, forward_pass._HOOKS)
_HOOKS = tuple(
    f"_forward_{kind}"
    for kind in ("pre_hooks", "pre_hooks_with_kwargs", "hooks", "hooks_always_called")
)
# Describe packed documents, and are dropped where each document runs by itself.
_BOUNDARIES = (
    "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
)  # fmt: skip


# The model, made ready and put back


@contextmanager
def as_it_was(model: nn.Module, configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Unpatched, in evaluation mode, all weights trained; at the end everything as it was."""
    modules = [
        (
            module,
            module.training,
            {k: vars(module)[k] for k in _PATCHED if k in vars(module)},
            {k: dict(vars(module)[k]) for k in _HOOKS},
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
            for module, training, patch, hooks in modules:
                module.training = training
                vars(module).update(patch)
                for kind, had in hooks.items():
                    vars(module)[kind].clear()
                    vars(module)[kind].update(had)


@contextmanager
def _implementations(configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Those of ``configs`` at the end are those of the beginning."""
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
            name = "sdpa" if compat.needs_its_sdpa(config) else "eager"
            compat.set_implementation(config, name)
        yield


@contextmanager
def raised(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Weights and buffers in ``dtype``; at the end in the very memory they were in."""
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
    """Leaves float64 as it is where a model asks for float32, in softmax and norms.

    Only what has a gradient: rotary angles are to be rounded as they always are.
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
    """Not so quantised weights, which only their own modules can compute with."""
    return x.is_floating_point() and x.dtype.itemsize > 1


# The batch

# What must be a tensor, and at least so many dimensions of it.
_DIMENSIONS = {"input_ids": 2, "inputs_embeds": 3, "attention_mask": 2, "position_ids": 1}


def check_batch(batch: object) -> None:
    """Refuse what is not the arguments of a model's forward by name.

    Raises:
        TypeError: no mapping, or an entry that must be a tensor is none.
        ValueError: tokens without a batch dimension.
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

    What has one entry per token, [B, T, ...], is compared and handed on as [tokens, ...]: without
    padding, and in the same order whether documents are together or apart.

    Attributes:
        whole: on the device of the model.
        documents: [B, T], to which document each token belongs; None if there is one per row.
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
            self.apart = [self._cut(row, tokens) for row, tokens in places]

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

    def place(self, layer: str, tokens: Tensor, like: Tensor, document: int | None) -> Tensor:
        """The inverse of `tokens`, for one document or the batch; zeros in padding."""
        if document is not None:
            return tokens.split(self.lengths)[document][None]
        mask = self.of(layer)
        if mask is None or like.shape[:2] != mask.shape:
            return tokens
        return tokens.new_zeros(like.shape).index_put_((mask,), tokens)

    def with_other_tokens(self, prefix: str, where: Tensor, *, special_too: bool) -> dict:
        """The input, changed where bool [B, T] says; empty if there is none to change.

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

    def _cut(self, row: int, tokens: Tensor) -> dict:
        """The packed document of these ``tokens`` of a row, as a batch by itself."""
        shape = self.documents.shape
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
    """[B, T], the number of the packed document that each token belongs to, -1 in padding.

    None if no row holds several.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        return None
    shape = tokens.shape[:2]
    ends, positions = batch.get("cu_seq_lens_q"), batch.get("position_ids")
    mask = batch.get("attention_mask")
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # the text's, before those of the rotary embedding
    if not may_be_packed(positions, *shape):
        positions = None
    if ends is not None:
        numbers = torch.zeros(shape, dtype=torch.long, device=tokens.device)
        numbers[0, ends[1:-1].long()] = 1
        numbers = numbers.cumsum(1)
    elif mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        return None  # it says itself who sees whom
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
        given: what each layer got in the model: its inputs, and as `OUTPUT` the cotangent of that.
        kernels: by layer, those of flash_two that ran in it.
        not_finite: of the tensors, padding included.
    """

    tensors: dict[Slot, Tensor]
    given: dict[Slot, Tensor]
    kernels: dict[str, set[str]]
    not_finite: list[Slot]


class Replay:
    """A model and a batch, to be run as they are, document by document, and with other tokens."""

    def __init__(
        self, model: nn.Module, layers: dict[str, nn.Module], data: Batch, working: torch.dtype
    ):
        self.model, self.layers, self.data, self.working = model, layers, data, working

    def measure(
        self,
        batches: list[dict],
        given: dict[Slot, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Measured:
        """Run ``batches`` forward and backward, as a whole and then layer by layer.

        Args:
            given: what each layer gets when it is by itself; None: what it gets in the model.
            dtype: to which the numbers in the batch are converted, if at all.
        """
        found, own, kernels = defaultdict(list), defaultdict(list), defaultdict(set)
        places = [(k if len(batches) > 1 else None, batch) for k, batch in enumerate(batches)]
        for document, batch in places:
            with _Calls(self.layers) as calls, _Kernels(calls, kernels):
                output = self._output(batch, dtype)
            ends = {slot: x for slot, x in calls.outputs.items() if x.requires_grad}
            *cotangents, gradient = torch.autograd.grad(
                output,
                [*ends.values(), next(iter(calls.inputs.values()), output)],
                self._random("", output, document),
                allow_unused=True,
            )
            for slot, cotangent in zip(ends, cotangents, strict=True):
                # None: the layer ran, as an image's pooling head may, but the output is without it.
                if cotangent is None:
                    cotangent = self._random(slot[0], ends[slot], document)
                own[slot].append(cotangent)
            for slot, x in calls.inputs.items():
                own[slot].append(x.detach())
            found["", 0, OUTPUT].append(output.detach())
            if gradient is not None:
                found["", 0, GRADIENT].append(gradient)
        own = {slot: self.data.tokens(slot[0], parts) for slot, parts in own.items()}
        given = own if given is None else given
        for document, batch in places:

            def place(slot: Slot, like: Tensor, document=document) -> Tensor:
                tokens = given.get(slot)
                if tokens is None:
                    return like
                return self.data.place(slot[0], tokens, like, document).to(like.dtype)

            with _Calls(self.layers, place) as calls:
                self._output(batch, dtype)
            for slot, output in calls.outputs.items():
                if slot not in given:
                    continue
                layer, call, _ = slot
                leaves = {s: x for s, x in calls.inputs.items() if s[:2] == slot[:2]}
                leaves |= {(layer, call, name): w for name, w in self._weights(layer).items()}
                gradients = torch.autograd.grad(
                    output, list(leaves.values()), place(slot, output), materialize_grads=True
                )
                found[slot].append(output.detach())
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    found[leaf].append(gradient)
        tensors = {
            slot: sum(x.double() for x in parts)
            if slot[2] in self._weights(slot[0])
            else self.data.tokens(slot[0], parts)
            for slot, parts in found.items()
        }
        not_finite = [s for s, parts in found.items() if not all(x.isfinite().all() for x in parts)]
        return Measured(tensors, own, kernels, not_finite)

    def moved_by_padding(self) -> float | None:
        """How far other tokens in the padding move real ones at most; None without padding."""
        changed = {}
        for prefix in ("", "decoder_"):
            mask = self.data.mask(prefix)
            if mask is not None and not mask.all():
                changed |= self.data.with_other_tokens(prefix, ~mask, special_too=True)
        if not changed:
            return None
        return self.data.tokens("", [self._movement(changed)]).max().item()

    def moved_by_documents(self) -> tuple[float, float, int] | None:
        """How far other tokens in a packed document move other documents at most, itself at least.

        Documents are told apart by the bits of their numbers: those that have a bit change and
        those that do not must stay, then the other way round. Any two of them differ in a bit.
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
        """A cotangent of ``like``, the same whatever the dtype and whether documents are apart."""
        if document is None:
            shape = self.data.tokens(layer, [like]).shape
        else:
            shape = (sum(self.data.lengths), *like.shape[2:])
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        numbers = numbers.to(like.device, self.working).to(like.dtype)
        return self.data.place(layer, numbers, like, document)

    def _movement(self, changed: dict) -> Tensor:
        """Root mean square change of the output per token, relative to the whole output's."""
        with torch.no_grad():
            before = self._output(self.data.whole)
            after = self._output(self.data.whole | changed)
        change = torch.linalg.vector_norm(after.double() - before.double(), dim=-1)
        return change / before.shape[-1] ** 0.5 / rms(before)


class _Calls:
    """Hooks on attention layers, for the length of a block.

    Attributes:
        inputs: tensors with a gradient that went into a layer, so neither masks nor positions.
        outputs: what came out, as `OUTPUT`.
        running: the calls that have begun and not ended.
    """

    def __init__(
        self, layers: dict[str, nn.Module], place: Callable[[Slot, Tensor], Tensor] | None = None
    ):
        """
        Args:
            place: gives what is put in instead of an input.
        """
        self.layers, self.place = layers, place
        self.inputs: dict[Slot, Tensor] = {}
        self.outputs: dict[Slot, Tensor] = {}
        self.running: list[Slot] = []
        self.count: dict[str, int] = defaultdict(int)

    def __enter__(self) -> _Calls:
        self.hooks = []
        for name, layer in self.layers.items():
            before = partial(self._before, name)
            self.hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self.hooks.append(layer.register_forward_hook(self._after))
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, name: str, layer: nn.Module, args: tuple, kwargs: dict):
        call = self.count[name]
        self.count[name] += 1
        self.running.append((name, call, OUTPUT))
        arguments = dict(enumerate(args)) | kwargs
        for k, x in arguments.items():
            if isinstance(x, Tensor) and x.requires_grad:
                slot = name, call, k
                if self.place is not None:
                    arguments[k] = self.place(slot, x).detach().requires_grad_()
                self.inputs[slot] = arguments[k]
        return tuple(arguments[i] for i in range(len(args))), {k: arguments[k] for k in kwargs}

    def _after(self, layer: nn.Module, args: tuple, output) -> None:
        self.outputs[self.running.pop()] = output[0] if isinstance(output, tuple) else output


class _Kernels(TorchDispatchMode):
    """Notes which kernels of flash_two run in which layer."""

    def __init__(self, calls: _Calls, found: dict[str, set[str]]):
        super().__init__()
        self.calls, self.found = calls, found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.hf_flash_two.flash_attn_fwd.default and self.calls.running:
            kernel = select(args[-1], *args[:3], AttentionParams(*args[3:-1]))
            self.found[self.calls.running[-1][0]].add(kernel.name)
        return function(*args, **(kwargs or {}))


def rms(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() / max(1, x.numel()) ** 0.5
