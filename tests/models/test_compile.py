"""How often blocks are compiled, and what is said when that ends."""

import logging
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.compile import compile_blocks


def compilations(shapes: int, met: int) -> int:
    """Runs a model made ready for so many shapes on others, with and without gradients; counts what is compiled."""
    counter = CompileCounterWithBackend("eager")
    model = DiT(DiTConfig(72, 1, 2, caption_channels=8))
    torch._dynamo.reset()
    limits = {"recompile_limit": 8, "accumulated_recompile_limit": 256}  # PyTorch's own, which are restored
    with torch._dynamo.config.patch(**limits), patch("torch.compile", partial(torch.compile, backend=counter)):
        compile_blocks(list(model.blocks), shapes)
        for frames in range(1, met + 1):
            x, text = torch.randn(1, 24, frames, 2, 2), torch.randn(1, 3, 8)
            for with_gradients in (True, False):
                with torch.set_grad_enabled(with_gradients):
                    model(x, torch.tensor([5.0]), text)
    torch._dynamo.reset()
    return counter.frame_count


@pytest.mark.regression
def test_every_shape_is_compiled_with_and_without_gradients(caplog):
    """Ten compilations are more than PyTorch's own limit, and than one a shape."""
    assert compilations(shapes=5, met=5) == 10


@pytest.mark.regression
def test_a_limit_that_is_hit_is_said_in_one_line():
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.addHandler(handler)
    try:
        assert compilations(shapes=1, met=4) == 4
    finally:
        logger.removeHandler(handler)
    said = [line for line in lines if line.startswith("model.compile: ")]
    assert said and all("\n" not in line and "more than the 4 shapes" in line for line in said), lines
