"""Fused operations of the DiT block.

Each file holds one operation: a Triton kernel, its plain-PyTorch reference, and its gradient. `dispatch` picks.
"""
