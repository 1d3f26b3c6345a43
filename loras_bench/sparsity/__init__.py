"""Contextual sparsity: which channels of a layer a batch needs, estimated cheaply, and what leaving out the rest saves.

The method is SparseLoRA (Khaki et al. 2025, arXiv 2506.16500).
"""
