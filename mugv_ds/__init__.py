"""Trains the MUG-V 10B video diffusion transformer with DeepSpeed."""
