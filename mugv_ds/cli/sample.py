"""Samples videos from published-format weights: mp4 files, their latents, what made them, and a contact sheet.

tools/sample.py --weights dit.pt --codec vae.pt --text-encoder t5-v1_1-xxl --size 9:16 --image first.png \\
    --prompt "A penguin walks on a beach." --out samples

Started by `torchrun` or `deepspeed`, all processes sample together: prompts are spread over replicas of --sequence ×
--pipeline processes, twice as many with --guidance-parallel.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mugv_ds.config import InputError, exit_status
from mugv_ds.config.environment import given_world_size
from mugv_ds.prepare.demo.sets import demo_prompts
from mugv_ds.sample import DTYPES, add_options, check, check_decoder, images_of, join_session, load_decoder, of_job
from mugv_ds.sampling.jobs import Job, make_jobs, read_jobs
from mugv_ds.sampling.outputs import Outputs, files_named, read_latent_file, write_video
from mugv_ds.sampling.run import Conditions, write_contact_sheet
from mugv_ds.sampling.settings import FPS_LIMITS, SamplingSettings
from mugv_ds.sampling.stages import video_parts
from mugv_ds.weights.located import located


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where an input cannot be used."""
    args = parse(argv)

    def command() -> int:
        check(args)
        args.codec = located(args.codec)
        with files_named(args.out):
            return decode_only(args) if args.decode_only else sample(args)

    return exit_status(command)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="what to show; repeat for several videos")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or CSV: prompt, image, seed")
    what.add_argument("--demo-prompts", action="store_true", help="the eight prompts of the demo data")
    what.add_argument("--decode-only", type=Path, nargs="+", metavar="LATENT", help="make videos of saved latents")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a list goes on where it was stopped")
    parser.add_argument("--overwrite", action="store_true", help="make anew what other settings have made in --out")

    add_options(parser).add_argument(
        "--weights", help="the DiT's folder or file, with config.json beside it, or its URL"
    )
    return parser.parse_args(argv)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Returns the videos that the command line asks for."""
    every = {"seed": args.seed, "repeat": args.repeat, "image": args.image}
    if args.prompts is not None:
        return read_jobs(args.prompts, **every)
    return make_jobs(demo_prompts() if args.demo_prompts else args.prompt, **every)


def sample(args: argparse.Namespace) -> int:
    """Samples what the command line asks for, as one of the processes of a launch or alone."""
    if not (args.weights and args.text_encoder):
        raise InputError("--weights and --text-encoder are needed to sample")
    args.weights = located(args.weights)
    jobs, session = jobs_of(args), join_session(args)
    made, images = session.prepare(args, jobs), session.workers.first(lambda: images_of(jobs))
    outputs = Outputs(args.out, {job.name: made | of_job(job, images) for job in jobs}, overwrite=args.overwrite)
    conditions = Conditions(args.out, text_encoder=made["text_encoder"], codec=made["codec"])
    timer = session.sampling(session.loaders(args, jobs), outputs, conditions).run(jobs, args.batch)
    if session.workers.leads:
        sheet = write_contact_sheet(jobs, outputs)
        print("\n".join([*timer.lines(), f"{len(jobs)} videos and {sheet.name} are in {args.out}"]), flush=True)
    session.close()
    return 0


def decode_only(args: argparse.Namespace) -> int:
    """Makes videos of saved latents."""
    if (given_world_size() or 1) > 1:
        raise InputError("--decode-only: runs in one process; start it without torchrun or deepspeed")
    if args.output_fps is not None and not FPS_LIMITS[0] <= args.output_fps <= FPS_LIMITS[1]:
        raise InputError(f"output_fps {args.output_fps:g}: must be {FPS_LIMITS[0]:g} to {FPS_LIMITS[1]:g}")
    names = [path.name.removesuffix(".safetensors").removesuffix(".latent") for path in args.decode_only]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--decode-only: several files would become {twice[0]}.mp4; decode them to different folders")
    for path in args.decode_only:
        read_latent_file(path)  # so that a wrong one is found before any is decoded
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    args.out.mkdir(parents=True, exist_ok=True)
    codec = load_decoder(args, dtype, device, len(args.decode_only))
    checked = set()
    for path, name in zip(args.decode_only, names, strict=True):
        saved = read_latent_file(path)
        if (size := tuple(saved.latent.shape[2:])) not in checked:
            check_decoder(codec, dtype, device, *size)
            checked.add(size)
        latent = saved.latent.to(device)
        parts = video_parts(codec.decode_windows, latent, still_first=saved.still_first, image=saved.image)
        fps = args.output_fps or saved.output_fps or SamplingSettings.output_fps
        write_video(args.out / f"{name}.mp4", parts, fps)
        print(args.out / f"{name}.mp4", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
