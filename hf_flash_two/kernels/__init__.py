"""Interchangeable kernels. Each module offers the same two functions over the same `Problem`:

``forward(query, key, value, problem) -> (out, lse)`` and
``backward(d_out, d_lse, query, key, value, out, lse, problem) -> (dq, dk, dv, d_bias, d_sinks)``.
"""
