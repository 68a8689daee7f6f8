"""Whether continuous batching can serve a model: not all of them use its paged cache."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_flash_two.hf import compat
from hf_flash_two.hf.patching import report_layers


class _Probe(compat.PagedCache):
    """A paged cache that counts which layers ask it, while a model takes one token."""

    def __init__(self):
        self.asked: Counter[int | None] = Counter()
        self.layer_to_allocator = defaultdict(lambda: None)

    def update(self, key_states, value_states, layer_idx, kwargs=None):
        # Without these the cache does not know whose tokens it is given.
        self.asked[layer_idx] += "cu_seq_lens_k" in (kwargs or {})
        return key_states, value_states


def check_serving(model: PreTrainedModel) -> None:
    """Refuse continuous batching where its answers would be wrong.

    If layers of the decoder use flash_two, the model takes one token with a cache that counts.

    Raises:
        NotImplementedError: a layer does not ask the cache, or asks it twice, or the model takes no
            positions.
    """
    refuse = partial(compat.refuse_serving, model)
    decoder = model.get_decoder()
    layers = [layer for layer in report_layers(decoder) if layer.ok]
    if not layers:
        return
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        refuse("takes no position_ids, so it cannot know where in its request a token stands")
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=model.device)
    given = {
        "input_ids": token, "position_ids": token, "read_index": [], "write_index": [],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 1, "max_length_k": 1,
    }  # fmt: skip
    probe = _Probe()
    try:
        with torch.no_grad():
            model(**given, use_cache=False, cache=probe)
    except AttributeError as error:
        refuse(f"asks more of its cache than the paged one has ({error})")
    for layer in layers:
        asked = probe.asked[getattr(decoder.get_submodule(layer.name), "layer_idx", None)]
        where = f"{layer.name} ({layer.kind})"
        if asked == 0:
            refuse(f"does not give {where} the paged cache: it would see single steps only")
        if asked > 1:
            refuse(f"lets {where} write to the paged cache more than once in a step")
