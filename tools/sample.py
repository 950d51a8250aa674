"""Samples videos from published-format weights: mp4 files, and a contact sheet with the first of each prompt."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mugv_ds.config import InputError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.data.video import contact_sheet, read_image, video_name, write_mp4
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.prepare.demo.sets import demo_prompts
from mugv_ds.sampling.sampler import sample_videos
from mugv_ds.weights.published import load_dit

_MAX_PROMPTS_BYTES = 1 << 24


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where an input cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder or file, with config.json beside it")
    parser.add_argument("--codec", type=Path, required=True, help="codec.safetensors of the data that was trained on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="what to show; repeat for several videos")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt a line")
    what.add_argument("--demo-prompts", action="store_true", help="the eight prompts of the demo data")
    parser.add_argument("--repeat", type=int, default=1, help="videos of each prompt, each from noise of its own")
    parser.add_argument("--batch", type=int, default=8, help="videos sampled at once, which bounds the memory")
    parser.add_argument("--image", type=Path, help="first frame of every video (image-to-video)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument(
        "--shift", type=float, help="timestep shift, as flow.shift in training; default: the resolution's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-text-tokens", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.repeat < 1 or args.batch < 1:
        parser.error(f"--repeat {args.repeat} and --batch {args.batch}: must both be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        prompts = demo_prompts() if args.demo_prompts else args.prompt or read_prompts(args.prompts)
        jobs = [(prompt, draw) for prompt in prompts for draw in range(args.repeat)]
        model = load_dit(args.weights).to(device).eval()
        codec = LinearCodec.load(args.codec).to(device)
        encoder = HashTextEncoder(model.config.caption_channels, args.max_text_tokens)
        image = None if args.image is None else read_image(args.image, args.height, args.width)
        args.out.mkdir(parents=True, exist_ok=True)
        shown = []
        for start in range(0, len(jobs), args.batch):
            batch = jobs[start : start + args.batch]
            videos = sample_videos(
                model,
                codec,
                encoder,
                [prompt for prompt, _ in batch],
                frames=args.frames,
                height=args.height,
                width=args.width,
                fps=args.fps,
                seed=args.seed,
                draws=[draw for _, draw in batch],
                image=image,
                steps=args.steps,
                guidance=args.guidance,
                shift=args.shift,
            )
            for number, ((prompt, draw), frames) in enumerate(zip(batch, videos.cpu().numpy(), strict=True), start):
                write_mp4(args.out / f"{video_name(number, prompt)}.mp4", frames, args.fps)
                if draw == 0:
                    shown.append((prompt, frames.copy()))  # a view would keep the whole batch
        contact_sheet(args.out / "contact_sheet.png", shown)
    except (InputError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(jobs)} videos and contact_sheet.png are in {args.out}")
    return 0


def read_prompts(path: Path) -> list[str]:
    """Reads the lines of a text file that are not blank.

    Raises:
        InputError: the file cannot be read, is larger than 16 MiB, not UTF-8, or all of it is blank.
    """
    prompts = [line.strip() for line in read_text_file(path, _MAX_PROMPTS_BYTES).splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompts; write one a line")
    return prompts


if __name__ == "__main__":
    sys.exit(main())
