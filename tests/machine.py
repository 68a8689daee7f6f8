"""What there is to test on: a GPU, Triton's interpreter, or the CPU alone."""

from __future__ import annotations

import os

import torch

# A process either interprets Triton's kernels or compiles them: `make test` runs one of each.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
KERNELS = ["triton"] if INTERPRETED else ["blockwise", "triton"] if GPU else ["blockwise"]
HOPPER = GPU and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
