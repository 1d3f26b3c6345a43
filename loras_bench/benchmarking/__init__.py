"""The benchmark of attention kernels behind `loras-bench kernels`."""
