"""Makes preference pairs of real clips, without annotators, for `make dpo`; RDPO (arXiv 2506.18655).

tools/make_rdpo_pairs.py --manifest data/set/train.csv --weights exports/sft --rows 2000 --out data/rdpo

Each clip is carried back to noise by the flow's ODE and drawn again of that noise: the better side. The worse side is a
sample of the same caption from random noise. Started by `tools/launch.py`, `torchrun` or `deepspeed`, all processes
make pairs together; a list that was killed goes on where it was.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mugv_ds.config import InputError, exit_status
from mugv_ds.config.text_encoder import agree, read_text_encoder, write_text_encoder
from mugv_ds.data.manifest import Index, Record, open_index
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.models.text import MAX_TOKENS
from mugv_ds.sample import add_device_options, add_layout_options, device_of, join, load_denoiser, workers_of
from mugv_ds.sampling.outputs import files_named
from mugv_ds.sampling.rdpo import PairFiles, PairMaker, PairSettings, Unit, cut_into_units
from mugv_ds.sampling.rdpo_manifest import held_out_videos, read_rows, write_pairs
from mugv_ds.weights.base import check_weights
from mugv_ds.weights.published import PublishedWeights, read_dit_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where an input cannot be used."""
    args = parse(argv)

    def command() -> int:
        with files_named(args.out):
            make(args)
        return 0

    return exit_status(command)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = PairSettings()
    parser.add_argument("--manifest", type=Path, required=True, help="CSV of real clips, as the trainer reads it")
    parser.add_argument("--root", help="folder or URL of the manifest's paths, as data.root; default: the CSV's folder")
    parser.add_argument("--index-dir", help="folder of the manifest's index, as data.index_dir")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; goes on where it was stopped")
    parser.add_argument("--rows", type=int, help="make pairs of the first so many rows; default: of all")
    parser.add_argument("--val-share", type=float, default=0.05, help="share of source videos for pairs_val.csv")
    parser.add_argument(
        "--video-column",
        help="names a row's source video; default: as provenance.parquet beside the CSV says, else each row is its own",
    )
    parser.add_argument(
        "--better",
        choices=["reconstructed", "real"],
        default=defaults.better,
        help="reconstructed: drawn again of the clip's noise (RDPO); real: the clip itself (RealDPO, arXiv 2510.14955)",
    )
    parser.add_argument(
        "--first-frame", action="store_true", help="give the clip's first latent frame clean to both sides"
    )
    models = parser.add_argument_group("model")
    models.add_argument("--weights", type=Path, required=True, help="the DiT's folder or file, config.json beside it")
    models.add_argument(
        "--max-text-tokens", type=int, help="default: as the weights' text_encoder.json says, else 300, as published"
    )
    add_device_options(models)
    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--seed", type=int, default=defaults.seed, help="of the worse sides' noise")
    sampler.add_argument("--batch", type=int, default=1, help="clips at once, which bounds the memory")
    sampler.add_argument("--steps", type=int, default=defaults.steps, help="both ways")
    sampler.add_argument("--shift", type=float, help="timestep shift, as flow.shift; default: the resolution's")
    sampler.add_argument("--guidance", type=float, default=defaults.guidance, help="both ways; 1: none")
    sampler.add_argument("--null-text", help="features of guidance's negative prompt, as data.null_text_path")
    sampler.add_argument(
        "--corrections",
        type=int,
        default=defaults.corrections,
        help="fixed-point rounds of each step back to noise, one more evaluation each; more reconstruct better",
    )
    sampler.add_argument("--default-fps", type=float, default=defaults.default_fps, help="of rows that do not say")
    add_layout_options(parser)
    return parser.parse_args(argv)


def make(args: argparse.Namespace) -> None:
    """Makes the pairs that the command line asks for, as one of the processes of a launch or alone.

    Raises:
        InputError: something that was given cannot be used. PeerError: another process says why.
    """
    for name in ("batch", "sequence", "pipeline"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.guidance_parallel and args.guidance == 1:
        raise InputError("--guidance-parallel: at guidance 1 there is one branch alone; leave it out")
    weights = PublishedWeights(args.weights)
    if args.max_text_tokens is None:
        args.max_text_tokens = weights.text_encoder.max_tokens if weights.text_encoder else MAX_TOKENS
    names = ("better", "steps", "guidance", "shift", "corrections", "seed", "first_frame", "default_fps")
    settings = PairSettings(**{name: getattr(args, name) for name in (*names, "max_text_tokens", "null_text")})
    process = join(args)
    workers, (device, dtype) = workers_of(process, args.guidance_parallel), device_of(args, process)
    index = workers.first_then_all(partial(open_index, args.manifest, args.index_dir, args.root))
    units, files = cut_into_units(index, args.rows, args.batch), PairFiles(args.out)
    config = read_dit_config(args.weights)

    def begin() -> None:
        check_weights(weights, config)
        files.claim(made_by(args, settings, index, units, weights, dtype))
        if (info := read_text_encoder(index.root)) is not None:
            write_text_encoder(args.out, info)

    def plan() -> tuple[dict[int, Record], dict[int, str], set[str]]:
        """What the CSVs will say, where this process leads; what is wrong with it is found before the work."""
        records, videos = read_rows(args.manifest, [row for unit in units for row in unit.rows], args.video_column)
        return records, videos, held_out_videos(videos, args.val_share, args.seed)

    said = workers.attempt(lambda: plan() if workers.leads else None)
    workers.first(begin)
    load = partial(load_denoiser, args, sorted({unit.shape for unit in units}), process, workers, device, dtype)
    PairMaker(index, config.caption_channels, settings, files, workers, device).run(units, load)
    if workers.leads:
        counts, errors = write_pairs(files, units, *said)
        pairs = ", ".join(f"{count} pairs in {name}" for name, count in counts.items())
        off = f"{sum(errors) / len(errors):.2%} of the clips' norm off them, {max(errors):.2%} at most"
        print(f"{args.out}: {pairs}; better sides are {off}", flush=True)
    workers.attempt(lambda: None)  # the others end when all is written
    if process:
        torch.distributed.destroy_process_group()


def made_by(
    args: argparse.Namespace,
    settings: PairSettings,
    index: Index,
    units: Sequence[Unit],
    weights: PublishedWeights,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Returns what the shards follow from, of JSON types.

    Raises:
        InputError: the manifest's text features are of another encoder than those that the weights were trained on.
    """
    agree(
        {str(args.manifest): read_text_encoder(index.root), str(args.weights): weights.text_encoder},
        "make the features with the encoder that the weights know",
    )
    return {
        "settings": asdict(settings),
        "manifest": {"name": args.manifest.name, "sha256": index.content},
        "clips": sum(len(unit.rows) for unit in units),
        "batch": args.batch,
        "weights": {"name": args.weights.resolve().name, "fingerprint": fingerprint(weights.files)},
        "dtype": str(dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    sys.exit(main())
