"""Saved activations that wait in host memory come back as they were, in the order in which they are needed."""

import gc
import weakref

import psutil
import pytest
import torch

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import DiTConfig
from mugv_ds.models import DiT
from mugv_ds.models.kept_attention import KeptAttention, statistics_of
from mugv_ds.parallel.offload import Offload, check_host_memory

CPU = torch.device("cpu")


def drawn(number: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of the sizes and dtypes of o and its log-sum-exp."""
    generator = torch.Generator().manual_seed(number)
    o = torch.randn(1, size, 2, 72, generator=generator).bfloat16()
    return o, torch.randn(1, 2, size, generator=generator)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_micro_batches_in_flight_get_back_their_own(in_flight):
    """Micro-batches run backward in the order of their forward passes, each from its last block to its first."""
    offload, blocks, held = Offload(CPU), 4, {}
    sizes = {micro: 5 + 3 * (micro % 2) for micro in range(6)}
    for micro in range(6 + in_flight):
        if micro < 6:
            held[micro] = [offload.keep(drawn(10 * micro + block, sizes[micro])) for block in range(blocks)]
        if (done := micro - in_flight + 1) >= 0 and done in held:
            for block in reversed(range(blocks)):
                taken, expected = held[done][block](), drawn(10 * done + block, sizes[done])
                assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(taken, expected, strict=True))
            del held[done]
    assert len(offload._free) <= 2 * blocks * in_flight, "host memory is used again"


def test_only_what_is_used_and_what_comes_next_is_on_the_device():
    offload, alive, held = Offload(CPU), [], []
    for block in range(5):
        o, log_sum = drawn(block, 6)
        alive.append(weakref.ref(o))
        held.append(offload.keep((o, log_sum)))
        del o
        gc.collect()
        assert [reference() is not None for reference in alive] == [False] * block + [True]
    for block in reversed(range(5)):
        entries = [take.__self__ for take in held]
        held[block]()
        on_device = [entry._tensors is not None for entry in entries]
        assert on_device == [number == block - 1 for number in range(5)], "the block before is on its way"


def test_what_lies_scattered_in_memory_comes_back_right():
    tensors = torch.randn(2, 9, 4)[:, 2:7], torch.randn(3, 5).T
    offload = Offload(CPU)
    take = offload.keep(tensors)
    offload.keep((torch.zeros(1),))
    assert all(torch.equal(a, b) for a, b in zip(take(), tensors, strict=True))


def test_a_host_without_the_memory_is_refused():
    available = psutil.virtual_memory().available
    check_host_memory(available // 4, processes=2)
    with pytest.raises(ConfigError, match=r"parallel\.offload: 4 processes of this host need .* GiB"):
        check_host_memory(available // 2, processes=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash4", "flash2", "cudnn"])
def test_gradients_and_memory_on_a_gpu(backend):
    """Every backend and offload gives the gradients of "off", in the memory of what is left on the device."""
    device = torch.device("cuda")
    if backend == "flash4":
        pytest.importorskip("flash_attn.cute")
    from mugv_ds.models.attention import BACKENDS

    torch.manual_seed(0)
    with device:
        model = DiT(DiTConfig(864, 12, 8, caption_channels=64)).bfloat16()
        x = torch.randn(1, 24, 12, 48, 64)
        timestep, text = torch.tensor([400.0]), torch.randn(1, 20, 64)
    tensor = 2 * 864 * (12 * 24 * 32 + 2)

    def gradients(recompute, attention, offload=None, with_input=False):
        for block in model.blocks:
            if offload is not None:
                block.keep, block.keep_input = offload.keep, with_input
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = model(x, timestep, text, attention=attention, recompute=recompute).square().mean()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, [p.grad.float() for p in model.parameters() if p.grad is not None]

    _, exact = gradients("off", BACKENDS[backend])
    left = {}
    for name, arguments in {
        "none": (), "attention_output": (Offload(device), False), "all": (Offload(device), True)
    }.items():  # fmt: skip
        left[name], found = gradients("attention", KeptAttention(statistics_of(device)[backend]), *arguments)
        error = sum((a - b).square().sum() for a, b in zip(found, exact, strict=True)) / sum(
            b.square().sum() for b in exact
        )
        assert error.sqrt() < 2e-3, name  # the backends' own backward passes add up in no fixed order
    assert left["none"] - left["attention_output"] > 0.8 * 7 * tensor
    assert left["attention_output"] - left["all"] > 0.8 * 6 * tensor
