"""Times a block of the 10B, forward and backward, at 54,002 tokens: ours and the published one, eager and compiled."""

import argparse
import functools
from collections.abc import Callable

import torch
from baseline import PublishedBlock
from harness import median_ms, peak_gib, relative_error, report
from torch import Tensor
from torch.nn.attention import SDPBackend

from mugv_ds.config import PRESETS, ConfigError
from mugv_ds.models.attention import BACKENDS, MASKED_BACKENDS, installed_backends, installed_masked_backends
from mugv_ds.models.choose_attention import choose_attention, choose_masked_attention
from mugv_ds.models.dit import describe_tokens, init_weights
from mugv_ds.models.flops import block_flops, recomputed_flops
from mugv_ds.models.fp8 import check_fp8, use_fp8
from mugv_ds.models.layers import Block, Condition
from mugv_ds.models.rope import patch_grid, positions
from mugv_kernels.dispatch import use

TEXT_TOKENS = 300
PEAK_TFLOPS = 989.0  # dense bf16 of an H100 or H200 (SXM)


def make_inputs(frames: int, device: torch.device) -> tuple[Block, Tensor, Condition]:
    """Makes a 10B block and its inputs for a 720p clip whose first frame is given clean.

    Args:
        frames: latent frames of the clip.
    Returns:
        The block, x [1, N, D], and the condition; all that can have gradients requires them.
    """
    config = PRESETS["mugdit_10b"]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()

    with device:
        block = Block(config).bfloat16()
    init_weights(block, "blocks.0.", seed=0)
    torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.02)
    grid = patch_grid(frames, 90, 160)
    x_mask = torch.arange(frames, device=device)[None] > 0
    token_N = torch.arange(grid.tokens, device=device)
    frame_index = torch.arange(frames + 2, device=device)[None]
    condition = Condition(
        normal(1, 2, 6 * config.hidden_size),
        normal(1, 2, config.hidden_size),
        normal(1, TEXT_TOKENS, config.hidden_size),
        torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device),
        *describe_tokens(positions(token_N, grid), x_mask, frame_index),
    )
    return block, normal(1, grid.tokens, config.hidden_size), condition


def fp8_runs_on(device: torch.device) -> bool:
    """Tells whether the device can run fp8 linears, and prints why it cannot."""
    try:
        check_fp8(device)
    except ConfigError as error:
        print(error)
        return False
    return True


def profile(call: Callable[[], None]) -> None:
    """Prints where the device's time goes in one call, by kernel."""
    for _ in range(3):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))


def main() -> None:
    """Measures every variant of the block in one process and reports time, FLOP/s, peak memory and difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=15, help="latent frames of 720p; 15 are 54,002 tokens")
    parser.add_argument("--profile", action="store_true", help="print the kernels of our compiled block instead")
    args = parser.parse_args()
    device = torch.device("cuda")
    block, x, condition = make_inputs(args.frames, device)
    gradient = torch.randn_like(x)
    tokens, heads = x.shape[1], block.attn.qkv.in_features // 72
    name, trials = choose_attention(
        installed_backends(device), tokens=tokens, heads=heads, dtype=torch.bfloat16, device=device
    )
    cross_name, cross_trials = choose_masked_attention(
        installed_masked_backends(device),
        tokens=tokens,
        text_tokens=TEXT_TOKENS,
        heads=heads,
        dtype=torch.bfloat16,
        device=device,
    )
    print("\n".join(map(str, [*trials, "cross-attention:", *cross_trials])))
    attention, block.cross_attn.attend = BACKENDS[name], MASKED_BACKENDS[cross_name]
    ours = functools.partial(block, attention=attention)

    def plain(*args) -> Tensor:
        with use("reference"):
            return block(*args, attention=attention)

    # By title: what to call, and what it recomputes.
    variants = {
        "published, eager, FlashAttention-2": (PublishedBlock(block, SDPBackend.FLASH_ATTENTION), "off"),
        "published, torch.compile, cuDNN": (torch.compile(PublishedBlock(block, SDPBackend.CUDNN_ATTENTION)), "off"),
        f"ours, eager, no kernels, {name}": (plain, "off"),
        f"ours, eager, {name}": (ours, "off"),
        f"ours, compiled, {name}": (ours, "off"),
        **{
            f"ours, compiled, {name}, {mode}": (functools.partial(ours, recompute=mode), mode)
            for mode in ("light", "selective")
        },
    }
    if fp8_runs_on(device):
        variants[f"ours, compiled, {name}, fp8"] = (ours, "off")
    sizes = PRESETS["mugdit_10b"], tokens, TEXT_TOKENS
    flops = 3 * block_flops(*sizes)
    if args.profile:
        block.compile_segments()
        profile(lambda: ours(x, condition).backward(gradient))
        return
    rows, first = [], None
    for title, (variant, recompute) in variants.items():
        if title.endswith("fp8"):
            use_fp8(block)
        if title.startswith("ours, compiled"):
            block.compile_segments()

        def call(variant=variant) -> Tensor:
            for tensor in (x, *condition[:3], *block.parameters()):
                tensor.grad = None
            y = variant(x, condition)
            y.backward(gradient)
            return y.detach()

        y = call()
        gradients = [tensor.grad for tensor in (x, condition[0], condition[2], *block.parameters())]
        if first is None:
            first = [tensor.cpu() for tensor in (y, *gradients)]  # out of the way of the peaks below
        difference, *of_gradients = (
            relative_error(tensor, other.to(device)) for tensor, other in zip((y, *gradients), first, strict=True)
        )
        del y, gradients
        milliseconds = median_ms(call, seconds=4.0)
        percent = 100 / milliseconds / 1e9 / PEAK_TFLOPS
        rows.append(
            {
                "block": title,
                "ms": milliseconds,
                "model TFLOP/s": flops / milliseconds / 1e9,
                "MFU %": percent * flops,
                "HFU %": percent * (flops + recomputed_flops(*sizes, recompute)),
                "peak GiB": peak_gib(call),
                "difference": difference,
                "of gradients": max(of_gradients),
            }
        )
    eager, compiled = (rows[i]["ms"] for i in range(2))
    for row in rows:
        row["× eager"], row["× compiled"] = eager / row["ms"], compiled / row["ms"]
    report(f"block of the 10B, forward+backward, {tokens} tokens, {TEXT_TOKENS} text tokens, bf16", rows)


if __name__ == "__main__":
    main()
