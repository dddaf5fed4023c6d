"""The parts of `scripts/benchmark.py`, one concept a file."""
