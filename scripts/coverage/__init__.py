"""Tiny random models of every family in Transformers, their inputs, and how two are compared."""
