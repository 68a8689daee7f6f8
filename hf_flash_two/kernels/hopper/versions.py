"""The versions of Triton that the Hopper kernels are compiled with.

Gluon is experimental: every release renamed something (`gluon` has both names), and some computed
wrongly. What is known of wrong results on Hopper, and how the kernels stay clear of it:

- up to 3.8 a barrier may be missing where products of more than one warpgroup are waited for
  (triton#11047): no partition of a kernel has more than four warps;
- 3.4 to 3.7.0 multiply a transposed accumulator wrongly (triton#6124): none is transposed; dS goes
  through shared memory;
- 3.6 may load NaN where barriers are made ready after the first copy (triton#10106): all are made
  ready at the head of a kernel.
"""

from __future__ import annotations

import re

_UNFIT = (
    ("0", "3.6", "its Gluon lacks what they are written with"),
)  # fmt: skip
"""[first version, first version after them) and what is wrong with these."""
_TRIED = "3.10"
"""The first version that nobody has compiled and run them with."""


def unfit(version: str, by_name: bool) -> str | None:
    """Why this version of Triton must not compile the Hopper kernels, or None.

    Args:
        by_name: they were asked for by name; a version that is too new is given a try.
    """
    number = _number(version)
    for start, stop, reason in _UNFIT:
        if _number(start) <= number < _number(stop):
            return f"Triton {version} does not suit them: {reason}; install triton>=3.6,<{_TRIED}"
    if number >= _number(_TRIED) and not by_name:
        return (
            f"Triton {version} is newer than those that they were tried with; "
            "kernel='hopper' tries it"
        )
    return None


def _number(version: str) -> tuple[int, ...]:
    """(3, 7, 1) of 3.7.1, and of whatever stands behind it."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
