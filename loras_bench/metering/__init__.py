"""Joules, seconds, FLOPs and the circumstances of a run."""
