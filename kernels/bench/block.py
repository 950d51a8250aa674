"""Times a block of the 10B, forward and backward, on the samples of every stage: ours, in bf16 and fp8, and the
published one, compiled and, with --all, eager."""

import argparse
import copy
import functools
from collections.abc import Callable

import torch
from baseline import PublishedBlock
from harness import median_ms, peak_gib, relative_error, report, watched
from torch import Tensor
from torch.nn.attention import SDPBackend

from mugv_ds.config import PRESETS
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
# Latents (T, H, W) of a micro-batch, and how many.
CASES = {
    "images": ((1, 45, 80), 17),
    "360p-2s": ((6, 45, 80), 3),
    "360p-5s": ((15, 45, 80), 1),
    "720p-5s": ((15, 90, 160), 1),
}


def make_inputs(
    frames: int, device: torch.device, height: int = 90, width: int = 160, batch: int = 1
) -> tuple[Block, Tensor, Condition]:
    """Makes a 10B block and its inputs for clips whose first frame is given clean.

    Args:
        frames, height, width: of the clips' latents, by default of 720p. batch: clips.
    Returns:
        The block, x [B, N, D], and the condition; all that can have gradients requires them.
    """
    config = PRESETS["mugdit_10b"]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()

    with device:
        block = Block(config).bfloat16()
    init_weights(block, "blocks.0.", seed=0)
    torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.02)
    grid = patch_grid(frames, height, width)
    x_mask = torch.arange(frames, device=device).expand(batch, -1) > 0
    token_N = torch.arange(grid.tokens, device=device)
    frame_index = torch.arange(frames + 2, device=device).expand(batch, -1)
    condition = Condition(
        normal(batch, 2, 6 * config.hidden_size),
        normal(batch, 2, config.hidden_size),
        normal(batch, TEXT_TOKENS, config.hidden_size),
        torch.ones(batch, TEXT_TOKENS, dtype=torch.bool, device=device),
        *describe_tokens(positions(token_N, grid), x_mask, frame_index),
    )
    return block, normal(batch, grid.tokens, config.hidden_size), condition


def profile(call: Callable[[], object], seconds: float) -> None:
    """Prints where the device's time goes in one call, by kernel, after as long under load as timing takes."""
    median_ms(call, seconds=seconds)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))


def measure(case: str, args: argparse.Namespace) -> None:
    """Measures every variant of the block on a case and reports time, FLOP/s, peak memory and differences."""
    (frames, height, width), batch = CASES[case]
    device = torch.device("cuda")
    block, x, condition = make_inputs(frames, device, height, width, batch)
    gradient = torch.randn_like(x)
    tokens, heads = x.shape[1], block.attn.qkv.in_features // 72
    name, cross_name = args.attention, args.cross_attention
    if name == "auto":
        name, trials = choose_attention(
            installed_backends(device), tokens=tokens, heads=heads, dtype=torch.bfloat16, device=device
        )
        print("\n".join(map(str, trials)))
    if cross_name == "auto":
        cross_name, trials = choose_masked_attention(
            installed_masked_backends(device),
            tokens=tokens,
            text_tokens=TEXT_TOKENS,
            heads=heads,
            dtype=torch.bfloat16,
            device=device,
        )
        print("\n".join(map(str, ["cross-attention:", *trials])))
    attention, block.cross_attn.attend = BACKENDS[name], MASKED_BACKENDS[cross_name]
    eager, in_fp8 = copy.deepcopy(block), copy.deepcopy(block)
    check_fp8(device, args.fp8_backend)
    use_fp8(in_fp8, args.fp8_backend)
    sizes = PRESETS["mugdit_10b"], tokens, TEXT_TOKENS
    flops = 3 * batch * block_flops(*sizes)
    for ours in (block, in_fp8):
        ours.compile_segments()

    def run(parameters: Block, variant: Callable[..., Tensor]) -> Tensor:
        for tensor in (x, *condition[:3], *parameters.parameters()):
            tensor.grad = None
        y = variant(x, condition)
        y.backward(gradient)
        return y.detach()

    if args.profile:
        for title, ours in (("bf16", block), ("fp8", in_fp8)):
            print(f"{case}, {title}")
            profile(functools.partial(run, ours, functools.partial(ours, attention=attention)), args.seconds)
        return

    def plain(*args) -> Tensor:
        with use("reference"):
            return eager(*args, attention=attention)

    # By title: the module that has the parameters, what to call, and what it recomputes. The first is what the others
    # are compared with.
    variants = {
        "published, torch.compile, cuDNN": (
            block,
            torch.compile(PublishedBlock(block, SDPBackend.CUDNN_ATTENTION), dynamic=False),
            "off",
        )
    }
    if args.all:
        variants |= {
            "published, eager, FlashAttention-2": (block, PublishedBlock(block, SDPBackend.FLASH_ATTENTION), "off"),
            f"ours, eager, no kernels, {name}": (eager, plain, "off"),
            f"ours, eager, {name}": (eager, functools.partial(eager, attention=attention), "off"),
        }
    variants |= {
        f"ours, {name}, {precision}, {mode}": (
            ours,
            functools.partial(ours, attention=attention, recompute=mode),
            mode,
        )
        for precision, ours in (("bf16", block), ("fp8", in_fp8))
        for mode in args.levels
    }
    rows, first = [], None
    for title, (parameters, variant, recompute) in variants.items():
        call, leaves = functools.partial(run, parameters, variant), [x, *condition[:3], *parameters.parameters()]
        y = call()
        found = [y, *(tensor.grad for tensor in leaves if tensor.grad is not None)]
        if first is None:
            first = [tensor.cpu() for tensor in found]  # out of the way of the peaks below
        difference, *of_gradients = (
            relative_error(tensor, other.to(device)) for tensor, other in zip(found, first, strict=True)
        )
        del y, found
        with watched() as card:
            milliseconds = median_ms(call, seconds=args.seconds)
        percent = 100 / milliseconds / 1e9 / PEAK_TFLOPS
        rows.append(
            {
                "block": title,
                "ms": milliseconds,
                "model TFLOP/s": flops / milliseconds / 1e9,
                "MFU %": percent * flops,
                "HFU %": percent * (flops + batch * recomputed_flops(*sizes, recompute)),
                **card,
                "peak GiB": peak_gib(call),
                "difference": difference,
                "of gradients": max(of_gradients),
            }
        )
    for row in rows:
        row["× published"] = rows[0]["ms"] / row["ms"]
    report(f"block of the 10B, forward+backward, {case}: {batch} × {tokens} tokens, {TEXT_TOKENS} text tokens", rows)


def main() -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--levels", nargs="+", default=["off", "light"], help="of recomputation, of our block")
    parser.add_argument("--attention", default="auto", help="backend of self-attention")
    parser.add_argument("--cross-attention", default="auto", help="backend of cross-attention")
    parser.add_argument("--fp8-backend", choices=["native", "te"], default="native")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing, each variant")
    parser.add_argument("--all", action="store_true", help="eager variants too")
    parser.add_argument("--profile", action="store_true", help="print the kernels of our block instead")
    args = parser.parse_args()
    for case in args.cases:
        measure(case, args)


if __name__ == "__main__":
    main()
