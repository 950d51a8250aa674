"""What must hold before any test module is imported."""

import os

import torch

# Triton reads it while it is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
