"""`check_parity` checks a model under flash_two; `kernel_calls` records which kernels ran."""

from hf_flash_two.testing.kernel_calls import KernelCall, kernel_calls
from hf_flash_two.testing.parity import check_parity

__all__ = ["KernelCall", "check_parity", "kernel_calls"]
