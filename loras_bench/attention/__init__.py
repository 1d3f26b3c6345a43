"""Attention: which pairs attend (patterns), and how that is computed (backends)."""
