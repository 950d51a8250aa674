"""Times a compiled block of the 10B under Ulysses on 1, 2 and 4 GPUs of a host: efficiency, and the all-to-all's share.

torchrun --nproc-per-node 4 kernels/bench/scaling.py
"""

import argparse
import os

import deepspeed
import torch
import torch.distributed as dist
from block import TEXT_TOKENS, make_inputs
from harness import median_ms, peak_gib, report

from mugv_ds.config import PRESETS
from mugv_ds.models.attention import BACKENDS, installed_backends, installed_masked_backends
from mugv_ds.models.choose_attention import choose_attention
from mugv_ds.models.flops import RECOMPUTED, block_flops, recomputed_flops
from mugv_ds.models.layers import Condition
from mugv_ds.parallel.layout import Layout, sequence_group
from mugv_ds.parallel.ulysses import Ulysses
from mugv_kernels.qk_norm_rope import ROW

PEAK_TFLOPS = 989.0  # dense bf16 of an H100 or H200 (SXM)


def measure(size: int, frames: int, name: str, recompute: str) -> dict[str, object]:
    """Measures one layout, in which every group of `size` ranks shares a sequence; times are the slowest rank's.

    Args:
        frames: latent frames of the clip. name: the attention backend. recompute: see `Block.forward`.
    Returns:
        The row of the report.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    group = sequence_group(Layout(data=world // size, sequence=size), rank)
    ulysses = Ulysses(group, size, rank % size, BACKENDS[name])
    block, x, condition = make_inputs(frames, device)
    block.cross_attn.attend = next(iter(installed_masked_backends(device).values()))
    tokens = x.shape[1]
    block.compile_segments()
    ulysses.tokens = tokens
    held = ulysses.local_tokens(device).clamp(max=tokens - 1)
    x = x.detach()[:, held].clone().requires_grad_()
    condition = Condition(*condition[:4], *(part[:, held] for part in condition[4:]))
    gradient = torch.randn_like(x)

    def call() -> None:
        for tensor in (x, *condition[:3], *block.parameters()):
            tensor.grad = None
        block(x, condition, ulysses, recompute).backward(gradient)

    def exchange_only() -> None:
        """Runs the same exchanges, forward and backward, around an attention that does next to nothing."""
        bare.grouped(qkv.detach().requires_grad_()).backward(o_gradient)

    bare = Ulysses(group, size, rank % size, lambda q, k, v: q + k + v)
    bare.tokens = tokens
    qkv = torch.randn(size, 1, len(held), 3, 48 // size, ROW, device=device, dtype=torch.bfloat16)[..., :72]
    o_gradient = torch.randn(1, len(held), 48, 72, device=device, dtype=torch.bfloat16)
    call()
    dist.barrier()
    milliseconds, peak = median_ms(call, seconds=5.0), peak_gib(call)
    exchange = median_ms(exchange_only) if size > 1 else 0.0
    worst = torch.tensor([milliseconds, peak, exchange], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    milliseconds, peak, exchange = worst.tolist()
    sizes = PRESETS["mugdit_10b"], tokens, TEXT_TOKENS
    flops = 3 * block_flops(*sizes) / size
    percent = 100 / milliseconds / 1e9 / PEAK_TFLOPS
    return {
        "sequence": size,
        "recompute": recompute,
        "tokens": tokens,
        "ms": milliseconds,
        "MFU %": percent * flops,
        "HFU %": percent * (flops + recomputed_flops(*sizes, recompute) / size),
        "peak GiB": peak,
        "exchange ms": exchange,
        "exchange %": 100 * exchange / milliseconds,
    }


def main() -> None:
    """Chooses the attention on rank 0 for all ranks, measures every layout, and reports them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=15, help="latent frames of 720p; 15 are 54,002 tokens")
    parser.add_argument("--recompute", default="light", choices=list(RECOMPUTED))
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed("nccl", verbose=False)
    device, names = torch.device("cuda", torch.cuda.current_device()), list(BACKENDS)
    chosen = torch.zeros((), dtype=torch.int32, device=device)
    if dist.get_rank() == 0:
        name, trials = choose_attention(
            installed_backends(device), tokens=3600 * args.frames + 2, heads=12, dtype=torch.bfloat16, device=device
        )
        print("\n".join(map(str, trials)))
        chosen.fill_(names.index(name))
    dist.broadcast(chosen, 0)
    name = names[chosen.item()]
    sizes = [size for size in (1, 2, 4) if dist.get_world_size() % size == 0]
    rows = [measure(size, args.frames, name, args.recompute) for size in sizes]
    for row in rows:
        row["efficiency %"] = 100 * rows[0]["ms"] / (row["ms"] * row["sequence"])
    if dist.get_rank() == 0:
        report(f"block of the 10B under Ulysses, forward+backward, {name}", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
