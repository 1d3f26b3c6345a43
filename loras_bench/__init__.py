"""What efficient-training techniques really cost and save: joules, time, memory, FLOPs and quality, measured."""

__version__ = "0.1.0"
