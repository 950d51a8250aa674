"""Samples videos from published-format weights: an mp4 for each prompt, and a contact sheet of all."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mugv_ds.checkpoint.hf import load_dit
from mugv_ds.config import InputError
from mugv_ds.data.video import contact_sheet, read_image, video_name, write_mp4
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.prepare.demo import demo_prompts
from mugv_ds.sample import sample_videos


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folder or file, with config.json beside it")
    parser.add_argument("--codec", type=Path, required=True, help="codec.safetensors of the data that was trained on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="what to show; repeat for several videos")
    what.add_argument("--demo-prompts", action="store_true", help="the eight prompts of the demo data")
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = demo_prompts() if args.demo_prompts else args.prompt
    try:
        model = load_dit(args.weights).to(device).eval()
        videos = sample_videos(
            model,
            LinearCodec.load(args.codec).to(device),
            HashTextEncoder(model.config.caption_channels, args.max_text_tokens),
            prompts,
            frames=args.frames,
            height=args.height,
            width=args.width,
            fps=args.fps,
            seed=args.seed,
            image=None if args.image is None else read_image(args.image, args.height, args.width),
            steps=args.steps,
            guidance=args.guidance,
            shift=args.shift,
        )
        args.out.mkdir(parents=True, exist_ok=True)
        shown = list(zip(prompts, videos.cpu().numpy(), strict=True))
        for number, (prompt, frames) in enumerate(shown):
            write_mp4(args.out / f"{video_name(number, prompt)}.mp4", frames, args.fps)
        contact_sheet(args.out / "contact_sheet.png", shown)
    except (InputError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(shown)} videos and contact_sheet.png are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
