"""Trains the MUG-V 10B video diffusion transformer with DeepSpeed."""

__version__ = "0.1.0"  # which setup.cfg reads
