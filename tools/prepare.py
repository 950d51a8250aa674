"""Makes a training set of a folder of raw videos: verified latents and text features, and a reason for every rejection.

run does all steps, and goes on where an earlier run was ended, however that was; a step's name does that step alone:

    python tools/prepare.py run --videos raw --work work/raw --out data/raw --config ds_configs/prepare.json
"""

import argparse
import os
import sys
from pathlib import Path

from mugv_ds.config.errors import InputError, exit_status
from mugv_ds.config.load import load_config
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.prepare.chain import Folders
from mugv_ds.prepare.executors import Executor, Local, Ray, Stop
from mugv_ds.prepare.run import STEPS, Loaders, Preparation, locked
from mugv_ds.weights.codec import load_codec
from mugv_ds.weights.published import PublishedWeights


def codec_hash(path: str) -> str:
    """Returns what tells a codec's weights apart."""
    return fingerprint(PublishedWeights(path).files)


def main() -> int:
    """Parses the command line and does what it asks; returns the exit status."""
    args = parse()
    folders = Folders(*(Path(path) if path else None for path in (args.videos, args.work, args.out)))
    config = load_config(args.config, args.set, PrepareConfig) if args.config else PrepareConfig()
    stop = Stop()
    with locked(folders.work), executor_of(args, stop) as executor:
        stop.listen()
        preparation = Preparation(config, folders, executor, Loaders(load_codec, codec_hash), say)
        preparation.run(STEPS if args.step == "run" else [args.step], listed=args.list, limit=args.limit)
    return 0


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["run", *STEPS], help="all steps, or one of them")
    parser.add_argument("--videos", required=True, help="folder of raw videos")
    parser.add_argument("--work", required=True, help="working folder")
    parser.add_argument("--out", required=True, help="folder of the set, which the trainer reads")
    parser.add_argument("--config", help="JSON file; default: the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="put a value on top of the config")
    parser.add_argument("--list", type=Path, help="file of paths, one a line, to take instead of the whole folder")
    parser.add_argument("--limit", type=int, help="take at most so many files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: CPUs)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run the units on a Ray cluster; auto: of this machine")
    return parser.parse_args()


def executor_of(args: argparse.Namespace, stop: Stop) -> Executor:
    """Makes what runs the units."""
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: must be at least 1")
    return Ray(args.ray, stop) if args.ray else Local(args.workers, stop)


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
