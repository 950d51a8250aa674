"""Times the encoding of a training set's clips on one GPU, end to end: H.264 → frames → VideoVAE → shard.

The clips are drawn here, and the full-size VideoVAE has random weights. Beside the whole stand decoding by itself and
the VideoVAE by itself; and NVDEC's frames are compared with those of the CPU, bit by bit.

python kernels/bench/prepare.py
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.codec.hwaccel import HWAccel
from harness import report

from mugv_ds.config.prepare_schema import BucketSection, EncodeSection
from mugv_ds.data.video import write_mp4
from mugv_ds.models.compile import compile_video_vae
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.prepare.encode import Encoder, EncodeUnit, Shot, encode_frames
from mugv_ds.prepare.frames import Crop, read_frames

DEVICE = torch.device("cuda")
FPS = 24


def draw(path: Path, height: int, width: int, frames: int, seed: int) -> None:
    """Writes a clip of drifting texture, which compresses about as film does."""
    generator = np.random.default_rng(seed)
    coarse = torch.from_numpy(generator.random((1, 3, height // 16, width // 16), np.float32))
    fine = torch.from_numpy(generator.random((1, 3, height // 2, width // 2), np.float32))
    scale = partial(torch.nn.functional.interpolate, size=(height, width), mode="bilinear")
    still = (0.75 * scale(coarse) + 0.25 * scale(fine))[0].permute(1, 2, 0)
    video = torch.stack([still.roll((2 * n, 3 * n), (0, 1)) for n in range(frames)])
    write_mp4(path, (video * 255).to(torch.uint8).numpy(), FPS)


def pts_of(path: Path) -> tuple[int, ...]:
    """Returns the presentation times of a video's frames."""
    with av.open(str(path)) as container:
        return tuple(frame.pts for frame in container.decode(video=0))


def seconds(run) -> float:
    """Returns the seconds of a call that uses the GPU."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def same_bits(path: Path) -> str:
    """Returns in words whether NVDEC, through PyAV, gives the bits that the CPU does."""
    try:
        accelerator = HWAccel("cuda", allow_software_fallback=False)
        with av.open(str(path), hwaccel=accelerator) as fast, av.open(str(path)) as slow:
            largest = count = 0
            for one, other in zip(fast.decode(video=0), slow.decode(video=0), strict=True):
                pair = [frame.reformat(format="yuv420p").to_ndarray().astype(np.int16) for frame in (one, other)]
                largest, count = max(largest, int(np.abs(pair[0] - pair[1]).max())), count + 1
        return f"{count} frames, largest difference {largest} levels"
    except (av.error.FFmpegError, RuntimeError, NotImplementedError) as error:
        return f"not usable: {error}"


def main() -> None:
    """Draws, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--frames", type=int, default=120)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--variants", nargs="*", choices=["eager", "compile"], default=["eager", "compile"])
    args = parser.parse_args()
    bucket = BucketSection(height=args.height, width=args.width, frames=args.frames, fps=FPS)
    section = EncodeSection(buckets=(bucket,))
    count, rows = args.clips * args.frames, []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = [folder / f"{n}.mp4" for n in range(args.clips)]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda n: draw(paths[n], args.height, args.width, args.frames, n), range(args.clips)))
        shots = [Shot(f"{n:032x}", path.name, pts_of(path), Crop()) for n, path in enumerate(paths)]
        bits = 8 * sum(path.stat().st_size for path in paths) / (count * args.height * args.width)
        print(f"{args.clips} clips, {bits:.3f} bits a pixel, {len(os.sched_getaffinity(0))} CPUs")
        print(f"NVDEC: {same_bits(paths[0])}")
        unit = EncodeUnit(0, bucket, tuple(shots))

        def read(shot: Shot) -> np.ndarray:
            return np.stack(read_frames(folder / shot.path, shot.pts, size=(args.height, args.width)))

        alone = seconds(lambda: read(shots[0]))
        rows.append({"work": "decode, one thread", "s": alone, "frames/s": args.frames / alone})
        with ThreadPoolExecutor(4) as threads:
            together = seconds(lambda: [len(frames) for frames in threads.map(read, shots)])
        rows.append({"work": "decode, 4 threads", "s": together, "frames/s": count / together})
        pixels = torch.from_numpy(read(shots[0])).to(DEVICE)
        for variant in args.variants:
            torch.manual_seed(0)
            with DEVICE:
                vae = VideoVAE().to(torch.bfloat16).eval().requires_grad_(False)
            if variant == "compile":
                compile_video_vae(vae)
            first = seconds(lambda vae=vae: encode_frames(vae, pixels))
            one = seconds(lambda vae=vae: encode_frames(vae, pixels))
            rows.append({"work": f"VideoVAE, {variant}, first clip", "s": first, "frames/s": args.frames / first})
            rows.append({"work": f"VideoVAE, {variant}", "s": one, "frames/s": args.frames / one})
            encoder = Encoder(vae, folder, folder, section)
            torch.cuda.reset_peak_memory_stats()
            whole = seconds(lambda encoder=encoder: encoder(unit))
            rows.append(
                {
                    "work": f"end to end, {variant}",
                    "s": whole,
                    "frames/s": count / whole,
                    "beyond the VideoVAE": 1 - one * args.clips / whole,
                    "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
                }
            )
    report(f"encoding {args.clips} clips of {args.frames} frames, {args.height} × {args.width}, bf16", rows)


if __name__ == "__main__":
    main()
