"""Verifies a training set: files, headers, values, normalisation, text features, duplicates, leaks, decoded pixels.

tools/verify_dataset.py data/set/train.csv --codec vae.pt --videos films --text-encoder t5-v1_1-xxl

It takes sets that `prepare.py` made, and others in the published format. What a check needs and is not given or not
there is said. Exit status 0 if nothing failed, 1 if something did, 2 if an option cannot be used.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mugv_ds.config import InputError, exit_status
from mugv_ds.config.errors import Status
from mugv_ds.config.text_encoder import read_text_encoder
from mugv_ds.files.atomic import write_atomically
from mugv_ds.models.text import MAX_TOKENS, load_text_encoder
from mugv_ds.prepare.compare import write_sheet
from mugv_ds.prepare.verify import LEAST_PSNR, Verification
from mugv_ds.weights.codec import codec_fingerprint, load_codec

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def verify(args: argparse.Namespace) -> int:
    """Verifies what the command line names; returns the exit status.

    Raises:
        InputError: an option cannot be used.
    """
    if not args.csv.is_file():
        raise InputError(f"{args.csv}: no such file; name the train.csv or val.csv of a set")
    if args.decode < 0 or args.sample < 1:
        raise InputError(f"--decode {args.decode}, --sample {args.sample}: must be at least 0 and 1")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    codec = encoder = None
    if args.codec is not None:
        codec = load_codec(args.codec, dtype=DTYPES[args.dtype], device=device)
    if args.text_encoder is not None:
        said = read_text_encoder(args.csv.parent)
        encoder = load_text_encoder(
            args.text_encoder,
            channels=args.text_channels,
            max_tokens=said.max_tokens if said else MAX_TOKENS,
            revision=args.text_revision,
            dtype=DTYPES[args.text_dtype],
            device=device,
        )
    verified = Verification(
        args.csv,
        codec,
        None if args.codec is None else codec_fingerprint(args.codec),
        encoder,
        args.videos,
        args.decode,
        None if args.all else args.sample,
        args.psnr,
    ).run()
    print("\n".join(verified.lines()))
    if args.json is not None:
        with write_atomically(args.json) as stream:
            stream.write(f"{json.dumps(verified.report(), indent=1)}\n".encode())
    if args.sheet is not None and verified.compared:
        write_sheet(args.sheet, verified.compared)
    return Status.DONE if verified.passed else Status.FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="train.csv or val.csv of a set, or another CSV in the published format")
    parser.add_argument("--codec", type=Path, help="vae.pt or the demo's codec, to decode with and for its statistics")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the VideoVAE (default: %(default)s)")
    parser.add_argument("--videos", type=Path, help="folder of the videos that the set was made of")
    parser.add_argument("--text-encoder", help="folder or cached name of a T5 encoder, or hash (the demo's)")
    parser.add_argument("--text-revision", help="of a name; best a commit's hash")
    parser.add_argument("--text-dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--text-channels", type=int, default=4096, help="width of the features (default: %(default)s)")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--decode", type=int, default=8, help="samples to decode (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=200, help="rows to read, evenly spread (default: %(default)s)")
    parser.add_argument("--psnr", type=float, default=LEAST_PSNR, help="least of the median (default: %(default)s dB)")
    parser.add_argument("--all", action="store_true", help="read all rows, and hash all shards")
    parser.add_argument("--json", type=Path, help="file to write the outcome to")
    parser.add_argument("--sheet", type=Path, help="PNG to write of decoded frames below those of their source")
    args = parser.parse_args(argv)
    return exit_status(lambda: verify(args))


if __name__ == "__main__":
    sys.exit(main())
