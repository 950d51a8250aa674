"""Fused operations of the DiT block: each a Triton kernel with its plain-PyTorch reference and autograd function."""
