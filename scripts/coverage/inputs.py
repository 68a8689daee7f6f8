"""Inputs for a tiny model, guessed from the signature of its forward and its configuration."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from scripts.coverage.overrides import SMALL, Override

BATCH, LENGTH, DECODER_LENGTH, PADDING = 2, 21, 9, 5
_HIGHEST = 90
END = SMALL["eos_token_id"]
_MEDIA = {
    "image": ("image_token_id", "image_token_index", "im_patch_id", "image_patch_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}


class NoInputs(ValueError):
    """None of the inputs tried is what the model takes."""


def example(model: PreTrainedModel, override: Override) -> dict[str, Tensor]:
    """Inputs without padding on which the model runs."""
    names = inspect.signature(model.forward).parameters
    errors = []
    for candidate in _candidates(model, names, override):
        try:
            inputs = candidate()
            run(model, inputs)
        except Exception as error:
            errors.append((candidate, error))
        else:
            return inputs
    raise NoInputs(" / ".join(dict.fromkeys(_describe(e) for _, e in errors))) from errors[0][1]


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def run(model: PreTrainedModel, inputs: dict[str, Tensor], seed: int = 1):
    """A forward without gradients; models that draw random numbers draw the same each time."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**copy.deepcopy(inputs))


def find(config: PreTrainedConfig, *names: str):
    """The first of these values in a configuration or the parts of it, None without."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    found = (find(part, *names) for part in parts if isinstance(part, PreTrainedConfig))
    return next((value for value in found if value is not None), None)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, _HIGHEST, shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int, length: int) -> Tensor:
    """Tokens whose end is neither padded on the left nor on the right: towers pool there."""
    ids = tokens(batch, length)
    ids[:, -PADDING - 3] = END
    return ids


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _given(override: Override) -> dict[str, Tensor | None]:
    values = {}
    for name, value in override.inputs.items():
        if isinstance(value, tuple):
            value = normal(*value)
        elif isinstance(value, list):
            value = torch.tensor(value)
        elif callable(value):
            value = value(torch.Generator().manual_seed(5))
        values[name] = value
    return values


def _candidates(model: PreTrainedModel, names, override: Override) -> Iterator:
    given = _given(override)
    config = model.config
    media = _images(config, names, model) if "pixel_values" not in given else [{}]
    audio = _audio(config, names) if "input_features" not in given else [{}]
    for pixels, sound, told in itertools.product(media, audio, (True, False)):

        def build(pixels=pixels, sound=sound, told=told):
            inputs: dict[str, Tensor | None] = {}
            if "input_ids" in names:
                inputs["input_ids"] = text(BATCH, LENGTH)
            if config.is_encoder_decoder and "decoder_input_ids" in names:
                inputs["decoder_input_ids"] = tokens(BATCH, DECODER_LENGTH, seed=1)
            inputs |= {**pixels, **sound, **(_sizes(pixels, sound, names) if told else {}), **given}
            inputs = {name: value for name, value in inputs.items() if value is not None}
            return _with_media_tokens(model, inputs, names)

        yield build


def _images(config, names, model) -> list[dict[str, Tensor]]:
    if "pixel_values" not in names:
        if "pixel_values_videos" in names and names["pixel_values_videos"].default is not None:
            size = _image_size(config)
            return [{"pixel_values_videos": normal(BATCH, _frames(config), 3, size, size)}]
        return [{}]
    size, channels = _image_size(config), find(config, "num_channels", "in_channels") or 3
    optional = names["pixel_values"].default is None and "input_ids" in names
    if "image_grid_thw" in names or "grid_thw" in names:
        patch, merge = find(config, "patch_size") or 8, find(config, "spatial_merge_size") or 1
        time = find(config, "temporal_patch_size") or 1
        grid = torch.tensor([[1, 2 * merge, 2 * merge], [1, 2 * merge, 3 * merge]])
        patches = int(grid.prod(1).sum())
        key = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
        flat = normal(patches, channels * time * patch * patch)
        found = [{"pixel_values": flat, key: grid}]
    else:
        found = [
            {"pixel_values": normal(BATCH, channels, size, size)},
            {"pixel_values": normal(BATCH, 1, channels, size, size)},
            {"pixel_values": normal(BATCH, _frames(config), channels, size, size)},
        ]
        if size < 64:
            found.append({"pixel_values": normal(BATCH, channels, 64, 64)})
    return found + ([{}] if optional else [])


def _image_size(config) -> int:
    size = find(config, "image_size") or 64
    return size if isinstance(size, int) else size[0]


def _frames(config) -> int:
    return find(config, "num_frames", "frames_per_clip") or 4


def _audio(config, names) -> list[dict[str, Tensor]]:
    mel = find(config, "num_mel_bins", "input_feat_per_channel", "feature_size") or 80
    if "input_values" in names:
        return [
            {"input_values": normal(BATCH, 4000)},
            {"input_values": normal(BATCH, 1, 4000)},
            {"input_values": normal(BATCH, 64, mel)},
        ]
    if "input_features" in names:
        found = [
            {"input_features": normal(BATCH, mel, 128)},
            {"input_features": normal(BATCH, 128, mel)},
        ]
        optional = names["input_features"].default is None and "input_ids" in names
        return found + ([{}] if optional else [])
    return [{}]


def _sizes(pixels: dict[str, Tensor], sound: dict[str, Tensor], names) -> dict[str, Tensor]:
    """What some models want to know of their media: their sizes, and that all of it counts."""
    found = {}
    if "pixel_values" in pixels and "image_sizes" in names:
        found["image_sizes"] = torch.tensor([pixels["pixel_values"].shape[-2:]] * BATCH)
    for name in ("input_features_mask", "feature_attention_mask"):
        if "input_features" in sound and name in names:
            length = max(sound["input_features"].shape[1:])
            found[name] = torch.ones(BATCH, length, dtype=torch.long)
    return found


def _shares(count: int, inputs: dict[str, Tensor]) -> list[int]:
    """How many of ``count`` features belong to each row: by the sizes of its picture."""
    grid = inputs.get("image_grid_thw", inputs.get("grid_thw"))
    if grid is not None and len(grid) == BATCH:
        sizes = (grid.prod(1) * count).tolist()
        if all(size % int(grid.prod(1).sum()) == 0 for size in sizes):
            return [size // int(grid.prod(1).sum()) for size in sizes]
    first = -(-count // BATCH)
    return [first, count - first]


def _with_media_tokens(model, inputs: dict[str, Tensor], names) -> dict[str, Tensor]:
    """As many placeholders in ``input_ids`` as the model makes features of its media."""
    if "input_ids" not in inputs:
        return inputs
    kinds = torch.zeros_like(inputs["input_ids"])
    for code, (kind, keys) in enumerate(_MEDIA.items(), 1):
        count = _features(model, kind, inputs)
        token = find(model.config, *keys)
        if not count or token is None:
            continue
        shares = _shares(count, inputs)
        ids = tokens(BATCH, LENGTH + max(shares))
        kinds = torch.zeros_like(ids)
        for row, n in enumerate(shares):
            ids[row, PADDING + 2 : PADDING + 2 + n] = token
            kinds[row, PADDING + 2 : PADDING + 2 + n] = code
        inputs["input_ids"] = ids
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names and (kinds.any() or name == "mm_token_type_ids"):
            inputs.setdefault(name, kinds)
    return inputs


def _features(model, kind: str, inputs: dict[str, Tensor]) -> int:
    for owner in (model, model.base_model):  # the outer one may hand on whatever it is given
        function = getattr(owner, f"get_{kind}_features", None)
        accepted = inspect.signature(function).parameters if function else {}
        values = {
            name: value
            for name, value in inputs.items()
            if name in accepted and name not in ("input_ids", "attention_mask")
        }
        if values:
            break
    else:
        return 0
    with torch.no_grad():
        found = function(**values)
    pooled = getattr(found, "pooler_output", found)
    if pooled is None:
        deep = getattr(found, "deepstack_features", None)
        pooled = found.last_hidden_state if deep is None else deep[0][1]
    found = pooled
    if isinstance(found, (list, tuple)):
        return sum(x.numel() // x.shape[-1] for x in found)
    return found.numel() // found.shape[-1]


def padded(inputs: dict[str, Tensor], side: str) -> dict[str, Tensor] | None:
    """The first row with ``PADDING`` tokens fewer; None if there is nothing to pad."""
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2:
        return None
    mask = torch.ones_like(ids)
    mask[0, (slice(None, PADDING) if side == "left" else slice(-PADDING, None))] = 0
    return {**inputs, "attention_mask": mask}
