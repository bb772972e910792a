"""The parts of `benchmark.py`: its sections, what they measure with, and whom they compare with."""
