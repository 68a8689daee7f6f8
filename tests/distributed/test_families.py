"""The families of `families.SHARDABLE` on one shard of each row, against one process.

Rows that are plain and padded, and packed ones for causal models: logits, and the gradient of every
parameter. Another language model joins the list once its check passes: add its name and run
`make test-sweep`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from ranks import assert_passed, launch, run
from test_context import check_logits
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.auto import modeling_auto

from hf_flash_two.hf.families import SHARDABLE
from scripts.coverage.build import families, shrunk, spread_out
from scripts.coverage.inputs import find

TOKENS = 48
HEADS = {
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
SAMPLE = ["cohere2", "t5gemma"]
# Older versions of Transformers lack some.
FAMILIES = sorted(x for x in SHARDABLE if any(x in names for names in HEADS.values()))
ASKED = "FLASH_TWO_FAMILIES"


def check_family(family: str, mesh: DeviceMesh) -> None:
    kind = next(kind for kind, names in HEADS.items() if family in names)
    named = HEADS[kind][family]
    cls = getattr(transformers, named if isinstance(named, str) else named[0])
    written = {each.name: each.override.config for each in families()}
    config_class = type(transformers.AutoConfig.for_model(family))
    config = shrunk(config_class, written.get(family, {}))
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="flash_two").eval()
    spread_out(model)
    model.config.use_cache = False
    ids = torch.randint(3, min(90, find(config, "vocab_size")), (2, TOKENS))
    left, right = torch.ones(2, 2, TOKENS, dtype=torch.int64)
    left[0, :13], right[1, 30:] = 0, 0
    batches = [{"input_ids": ids}, {"input_ids": ids, "attention_mask": right}]
    if kind == "causal":
        positions = torch.cat([torch.arange(n) for n in (5, 20, TOKENS - 25)])[None]
        batches += [
            {"input_ids": ids, "attention_mask": left},
            {"input_ids": ids[:1], "position_ids": positions},
        ]
    elif kind == "seq2seq":
        batches = [batch | {"decoder_input_ids": ids[:, :32]} for batch in batches]
    for batch in batches:
        check_logits(model, batch, mesh, rtol=2e-5, worst=2e-4)


def named(family: str) -> Callable[[DeviceMesh], None]:
    check = partial(check_family, family)
    check.__name__ = family  # pyright: ignore[reportAttributeAccessIssue]
    return check


@pytest.fixture(scope="module")
def raised(request, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """Those of this session run, in one set of processes."""
    asked = {
        item.callspec.params["family"]
        for item in request.session.items
        if item.path == request.path
    }
    os.environ[ASKED] = " ".join(sorted(asked))
    return launch(__file__, 2, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=() if x in SAMPLE else pytest.mark.sweep) for x in FAMILIES],
)
def test_family(raised: list[dict[str, str | None]], family: str) -> None:
    assert_passed(raised, family)


if __name__ == "__main__":
    run([named(family) for family in os.environ[ASKED].split()], Path(sys.argv[1]))
