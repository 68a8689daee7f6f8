"""Attention over several devices or processes."""
