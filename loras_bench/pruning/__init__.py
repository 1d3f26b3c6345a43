"""Which weights become zero and when: scores, masks, the schedule of the sparsity, and blocks that share a mask."""
