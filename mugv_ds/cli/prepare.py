"""Makes a training set of a folder of raw videos: verified latents and text features, and a reason for every rejection.

    python tools/prepare.py run --videos raw --work work --out data/set --config ds_configs/prepare.json

run does all steps and goes on where an earlier run was ended, however that was. A step's name does that step alone.
Questions change nothing: status; what-if --set select.sharp.low=100; explain CLIP, VIDEO or PATH. withdraw takes videos
or licences out of the set, gc removes what is stale, repair has damaged or failed units made anew by the next run.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mugv_ds.config.errors import InputError, Status, exit_status
from mugv_ds.config.load import load_config
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare import inspect
from mugv_ds.prepare.chain import Folders
from mugv_ds.prepare.executors import Executor, Local, Ray, Stop
from mugv_ds.prepare.manifest import withdraw
from mugv_ds.prepare.run import STEPS, Loaders, Preparation, locked
from mugv_ds.prepare.verify import Verified
from mugv_ds.weights.codec import codec_fingerprint, load_codec

LAST = ("verify", "report")
QUESTIONS = ("status", "what-if", "explain")
CHANGES = ("withdraw", "gc", "repair")


def prepare(args: argparse.Namespace) -> int:
    """Does what the command line asks; returns the exit status.

    Raises:
        InputError, TrainingError, Stopped: see `Preparation.run`.
    """
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: must be at least 1")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: is no folder; name one for the set")
    for name, folder in (("work", args.work), ("out", args.out)):
        if folder.resolve().is_relative_to(args.videos.resolve()):
            raise InputError(f"--{name} {folder}: is, or lies in, the folder of videos; name another")
    stop = Stop()
    config = load_config(args.config, () if args.do == "what-if" else args.set, PrepareConfig)
    with locked(args.work), executor_of(args, stop) as executor:
        stop.listen()
        folders = Folders(args.videos, args.work, args.out)
        preparation = Preparation(config, folders, executor, Loaders(load_codec, codec_fingerprint), say)
        if args.do in QUESTIONS:
            return ask(args, preparation)
        if args.do in CHANGES:
            return change(args, preparation)
        wanted = (*STEPS, *LAST) if args.do == "run" else (args.do,)
        if steps := [step for step in wanted if step in STEPS]:
            preparation.run(steps, listed=args.list, limit=args.limit)
        return look_back(args, preparation) if set(wanted) & set(LAST) else Status.DONE


def look_back(args: argparse.Namespace, preparation: Preparation) -> int:
    """Verifies the set, and unless only that is asked for, writes the report."""
    verified = inspect.verify(preparation)
    for name, found in verified.items():
        say(f"    verify: {name}.csv: {told(found)}")
    if args.do != "verify":
        say(f"    report: {inspect.write_report(preparation, verified, command_of(args))}")
    return Status.DONE if all(found.passed for found in verified.values()) else Status.FAILED


def told(found: Verified) -> str:
    """Returns in words what verifying found."""
    failed = [check for check in found.checks if check.status == "fail"]
    if failed:
        return "; ".join(f"{check.name} FAILED: {check.message}" for check in failed)
    passed = sum(check.status == "pass" for check in found.checks)
    return f"{passed} of {len(found.checks)} checks passed, none failed"


def ask(args: argparse.Namespace, preparation: Preparation) -> int:
    """Answers a question."""
    if args.do == "status":
        lines = inspect.status(preparation)
    elif args.do == "what-if":
        if not args.set:
            raise InputError("what-if: give --set select.…, the bounds to try")
        lines = inspect.ask_what_if(preparation, load_config(args.config, args.set, PrepareConfig)).lines()
    else:
        if args.target is None:
            raise InputError("explain: name a clip, a video's SHA-256, or a path relative to --videos")
        lines = []
        for one, frames in inspect.ask_why(preparation, args.target):
            lines += one.lines()
            if frames is not None:
                path = args.work / "report" / f"{one.clip['clip']}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(frames.transpose(1, 0, 2, 3).reshape(frames.shape[1], -1, 3)).save(path)
                lines.append(f"  frames: {path}")
    for line in lines:
        say(line)
    return Status.DONE


def change(args: argparse.Namespace, preparation: Preparation) -> int:
    """Takes videos out of the set, or cleans up."""
    if args.do == "gc":
        files, size = inspect.collect_garbage(preparation)
        say(f"{files:,} files, {size / 2**20:,.1f} MiB removed")
    elif args.do == "repair":
        removed = inspect.repair(preparation)
        say(f"{len(removed):,} fragments removed; run makes them anew")
    else:
        if not args.video and not args.licence:
            raise InputError("withdraw: give --video PATH or SHA-256, or --licence NAME")
        ids = [video for name in args.video for video in inspect.videos_called(preparation, name)]
        ids += inspect.videos_of(preparation, args.licence)
        samples, shards = withdraw(args.out, ids, args.licence, purge=args.purge, work=args.work)
        say(f"{samples:,} samples taken out; {'rewritten' if args.purge else 'they lie in'}: {', '.join(shards)}")
    return Status.DONE


def command_of(args: argparse.Namespace) -> str:
    """Returns the command that makes the set again."""
    given = ["--videos", args.videos, "--work", args.work, "--out", args.out, "--config", args.config]
    given += [part for value in args.set for part in ("--set", value)]
    return shlex.join(["python", "tools/prepare.py", "run", *map(str, given)])


def executor_of(args: argparse.Namespace, stop: Stop) -> Executor:
    """Makes what runs the units."""
    return Ray(args.ray, stop) if args.ray else Local(args.workers, stop)


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["run", *STEPS, *LAST, *QUESTIONS, *CHANGES], metavar="DO", help="see above")
    parser.add_argument("target", nargs="?", help="what to explain: clip, video or path")
    parser.add_argument("--videos", type=Path, required=True, help="folder of raw videos")
    parser.add_argument("--work", type=Path, required=True, help="working folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the set, which the trainer reads")
    parser.add_argument("--config", default="ds_configs/prepare.json", help="JSON file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="put a value on top of the config")
    parser.add_argument("--list", type=Path, help="file of paths, one a line, to take instead of the whole folder")
    parser.add_argument("--limit", type=int, help="take at most so many files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: CPUs)")
    parser.add_argument("--ray", metavar="ADDRESS", help="run the units on a Ray cluster; auto: one of this machine")
    gone = parser.add_argument_group("withdraw")
    gone.add_argument("--video", action="append", default=[], help="path relative to --videos, or SHA-256")
    gone.add_argument("--licence", action="append", default=[], help="all videos of this licence")
    gone.add_argument("--purge", action="store_true", help="also rewrite the shards that hold them")
    args = parser.parse_intermixed_args(argv)  # the target may come last, too
    return exit_status(lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
