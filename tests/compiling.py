"""Kernels of Triton and Gluon compiled for GPUs that this machine does not have."""

from __future__ import annotations

import triton
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import create_function_from_signature

from hf_flash_two import AttentionMask
from hf_flash_two.kernels.params import AttentionParams


def compile_launch(kernel, args, kwargs, target):
    """Compiled for ``target`` as Triton would specialise it for these arguments."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    of = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = of(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=vars(options))


def params(mask: AttentionMask, length: int, **changes) -> AttentionParams:
    settings = dict.fromkeys(("bias", "alibi_slopes", "sinks", "seed", "block_q", "block_k"))
    settings |= dict(
        query_start=mask.query_start, query_stop=mask.query_stop, key_bounds=mask.key_bounds(),
        dense=mask.dense, query_offset=0, window_left=mask.window_left,
        window_right=mask.window_right, scale=0.1, softcap=0.0, dropout_p=0.0,
    )  # fmt: skip
    return AttentionParams(**(settings | changes))
