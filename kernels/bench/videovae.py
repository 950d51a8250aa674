"""Times the full-size VideoVAE with random weights: encoding, decoding and a training step, with the memory they take.

First the device's bf16 convolutions are checked. Each time stands beside the floor: that of the four blocks measured by
themselves, times how often they run. "TFLOP/s" counts what the blocks must compute.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from harness import median_ms, peak_gib, relative_error, report
from torch import Tensor

from mugv_ds.models.compile import compile_video_vae
from mugv_ds.models.videovae import VideoVAE, VideoVAEConfig, check_conv3d
from mugv_ds.models.videovae.training import autoencode, freeze
from mugv_ds.models.videovae.vae import FRAMES_AT_ONCE, WINDOW
from mugv_ds.objectives import reconstruction as of

DEVICE = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VARIANTS = ("eager", "channels_last", "compile", "both")
BLOCKS = ("spatial encode", "spatial decode", "temporal encode", "temporal decode")
# TFLOP at 720 × 1280 of a frame, a frame, a chunk and a latent frame; they grow with the pixels, attention apart.
TFLOP = dict(zip(BLOCKS, (3.80, 8.72, 6.94, 80.3 / WINDOW), strict=True))


class Work(NamedTuple):
    """What is timed: how often it runs each block, and the function, which yields its results part by part."""

    name: str
    counts: dict[str, int]
    frames: int
    run: Callable[[], Iterator[Tensor]]


def make(dtype: torch.dtype, variant: str) -> VideoVAE:
    """Makes a VideoVAE with the same random weights each time, and compiles its blocks or lays them out as asked."""
    torch.manual_seed(0)
    with DEVICE:
        vae = VideoVAE(VideoVAEConfig())
    vae = vae.to(dtype).eval().requires_grad_(False)
    if variant in ("channels_last", "both"):
        vae.spatial_vae.to(memory_format=torch.channels_last)
        vae.temporal_vae.to(memory_format=torch.channels_last_3d)
    if variant in ("compile", "both"):
        compile_video_vae(vae)
    return vae


def works(vae: VideoVAE, sizes: argparse.Namespace, dtype: torch.dtype) -> list[Work]:
    """Encoding a clip, and decoding latents of two lengths; inputs are the same for every dtype."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    h, w = sizes.height // 8, sizes.width // 8

    def frames() -> Iterator[Tensor]:
        again = torch.Generator(DEVICE).manual_seed(2)
        for _ in range(sizes.frames):
            frame = torch.rand(1, 3, sizes.height, sizes.width, generator=again, device=DEVICE)
            yield (2 * frame - 1).to(dtype)

    chunks = -(-sizes.frames // 8)
    encoded = {"spatial encode": sizes.frames, "temporal encode": chunks}
    still_first = sizes.frames % 8 == 1
    made = [Work("encode", encoded, sizes.frames, lambda: vae.encode_chunks(frames(), still_first=still_first))]
    for count in sizes.latents:
        latent = torch.randn(1, 24, count, h, w, generator=generator, device=DEVICE)
        decoded = {"spatial decode": 8 * count, "temporal decode": count}
        made.append(Work("decode", decoded, 8 * count, lambda latent=latent: vae.decode_windows(latent)))
    return made


def once(work: Work) -> tuple[float, float]:
    """Milliseconds and peak GiB of one run to the end that holds one part at a time, as who writes a file does."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> None:
        start.record()
        with torch.no_grad():
            for _ in work.run():
                pass
        end.record()

    peak = peak_gib(run)  # which waits for the device
    return start.elapsed_time(end), peak


def block_ms(vae: VideoVAE, sizes: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of each block by itself: for one frame, one frame, one chunk and one latent frame of a window."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    h, w, width = sizes.height // 8, sizes.width // 8, vae.config.block_out_channels[-1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    at_once = FRAMES_AT_ONCE
    given = {
        "spatial encode": (vae.spatial_vae.encode, normal(at_once, 3, sizes.height, sizes.width), at_once),
        "spatial decode": (vae.spatial_vae.decode, normal(at_once, width, h, w), at_once),
        "temporal encode": (vae.temporal_vae.encode, normal(1, width, 8, h, w), 1),
        "temporal decode": (vae.temporal_vae.decode, normal(1, 24, WINDOW, h, w), WINDOW),
    }
    with torch.no_grad():
        return {
            name: median_ms(lambda block=block, x=x: block(x), seconds=0.5) / count
            for name, (block, x, count) in given.items()
        }


def sample_of(work: Work) -> Tensor:
    """The second latent, as the first may be that of a still, or the second window."""
    with torch.no_grad():
        *_, last = islice(work.run(), 2)
        return last.float().cpu()


def inference(sizes: argparse.Namespace) -> None:
    """Reports encoding and decoding in every dtype and variant."""
    exact = [sample_of(work) for work in works(make(torch.float32, "eager"), sizes, torch.float32)]
    scale = sizes.height * sizes.width / (720 * 1280)
    for dtype_name in sizes.dtypes:
        dtype, rows, blocks = DTYPES[dtype_name], [], []
        for variant in sizes.variants:
            torch._dynamo.reset()
            vae = make(dtype, variant)
            began = time.perf_counter()
            floor = block_ms(vae, sizes, dtype)
            taken = {"all s, compiling included": time.perf_counter() - began}
            blocks.append({"variant": variant, **{f"{name} ms": value for name, value in floor.items()}, **taken})
            # The long one, which is there for its memory, once.
            given = list(zip(works(vae, sizes, dtype), exact, strict=True))
            for work, wanted in given if variant == "eager" else given[:2]:
                error = relative_error(sample_of(work), wanted)
                if work.frames <= sizes.frames:
                    once(work)  # algorithms are chosen for every shape
                milliseconds, peak = once(work)
                least = sum(count * floor[name] for name, count in work.counts.items())
                flops = scale * sum(count * TFLOP[name] for name, count in work.counts.items())
                rows.append(
                    {
                        "variant": variant,
                        "work": f"{work.name} {work.frames} frames",
                        "seconds": milliseconds / 1e3,
                        "frames/s": work.frames / milliseconds * 1e3,
                        "× floor": milliseconds / least,
                        "TFLOP/s": flops / milliseconds * 1e3,
                        "peak GiB": peak,
                        "error": error,
                    }
                )
            del vae
            torch.cuda.empty_cache()
        size = f"{sizes.height} × {sizes.width}, {dtype_name}"
        report(f"blocks of the VideoVAE, {size}: a frame, a frame, a chunk, a latent frame", blocks)
        report(f"VideoVAE, {size}; error against fp32", rows)


def training(sizes: argparse.Namespace) -> None:
    """Reports forward and backward of a clip without perceptual loss and GAN, with and without checkpointing."""
    rows = []
    for recompute in (False, True):
        vae = make(torch.bfloat16, "eager").train().requires_grad_(True)
        freeze(vae, spatial=False)
        vae.spatial_vae.recompute = recompute
        side, frames = sizes.train_side, sizes.train_frames
        video = 2 * torch.rand(1, 3, frames, side, side, device=DEVICE) - 1
        noise = torch.randn(1, 24, frames // 8, side // 8, side // 8, device=DEVICE)

        def step(vae: VideoVAE = vae, video: Tensor = video, noise: Tensor = noise) -> None:
            made = autoencode(vae, video, noise, sizes.train_window, with_pixels=True)
            rec = of.squared_error(made.video, video) + of.absolute_error(made.video, video)
            kl = of.kl_divergence(made.mean, made.logvar) / video[0].numel()
            (of.negative_log_likelihood(rec, vae.logvar.float()) + 1e-6 * kl).mean().backward()
            vae.zero_grad()

        row: dict[str, object] = {"2D blocks": "checkpointed" if recompute else "saved"}
        try:
            row |= {"seconds": median_ms(step, warmup=1) / 1e3, "peak GiB": peak_gib(step)}
        except torch.cuda.OutOfMemoryError:
            row["seconds"] = "out of memory"
        rows.append(row)
        del vae
        torch.cuda.empty_cache()
    title = f"training pass of the VideoVAE, {side} × {side}, {frames} frames, bf16, windows of {sizes.train_window}"
    report(title, rows)


def main() -> None:
    """Checks the device, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--frames", type=int, default=105, help="that are encoded, 8n or 8n + 1")
    parser.add_argument("--latents", type=int, nargs="*", default=[13, 60], help="that are decoded")
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="in bf16")
    parser.add_argument("--train-side", type=int, default=256)
    parser.add_argument("--train-frames", type=int, default=64)
    parser.add_argument("--train-window", type=int, default=8)
    parser.add_argument("--only", choices=["inference", "training"], help="leave the other out")
    sizes = parser.parse_args()
    for height, width in ((sizes.height, sizes.width), (sizes.train_side, sizes.train_side)):
        error = check_conv3d(DEVICE, height=height, width=width)
        print(f"bf16 conv3d at {height} × {width}: {error:.2g} off fp32; cuDNN {torch.backends.cudnn.version()}")
    print(f"fp32 convolutions in TF32: {torch.backends.cudnn.allow_tf32}")
    if sizes.only != "training":
        inference(sizes)
    if sizes.only != "inference":
        training(sizes)


if __name__ == "__main__":
    main()
