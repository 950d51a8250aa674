"""Judges weights by VBench-I2V: samples the protocol's videos, has the vbench package judge them, prints the scores.

    tools/vbench.py --info vbench2_i2v_full_info.json --images crop --environment .venv-vbench --cache vbench-weights \\
        --out vbench/sft -- --weights exports/sft --codec vae.pt --text-encoder t5-v1_1-xxl

What follows -- goes to tools/sample.py, --processes N of which sample together. What is sampled or judged is not made
again. --info and --images are the suite's (github.com/Vchitect/VBench, vbench2_beta_i2v); the package runs in an
environment of its own (`make vbench-env`), needs a GPU, and finds its weights in --cache.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.config.errors import InputError, TrainingError, exit_status
from mugv_ds.config.regular_file import open_regular
from mugv_ds.evaluation.vbench import (
    DIMENSIONS,
    SAMPLES,
    Dimension,
    Suite,
    missing_weights,
    nearest_crop,
    read_result,
    read_suite,
    scores,
    table,
)
from mugv_ds.files.atomic import write_atomically
from mugv_ds.sampling.jobs import Job, read_jobs
from mugv_ds.sampling.outputs import files_named
from mugv_ds.sampling.settings import SIZES

TOOLS = Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where something is missing or cannot be used."""
    args = parse(argv)

    def command() -> int:
        with files_named(args.out):
            return judge(args)

    return exit_status(command)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--info", type=Path, required=True, help="the suite's vbench2_i2v_full_info.json")
    parser.add_argument("--info-sha256", help="that --info must have; it is printed in any case")
    parser.add_argument("--images", type=Path, required=True, help="the suite's folder crop, with 1-1, 8-5, 7-4, 16-9")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; the same command goes on in it")
    parser.add_argument("--name", help="of the weights in the table; default: the name of --out")
    parser.add_argument("--seed", type=int, default=0, help="of the first video; those after it count on")
    parser.add_argument("--try-pairs", type=int, metavar="N", help="N pairs of each kind only: a trial")
    video = parser.add_argument_group("video; the crop of the images follows from it")
    video.add_argument("--size", choices=SIZES, help="height:width; default 9:16, landscape")
    video.add_argument("--height", type=int, help="pixels, in place of --size")
    video.add_argument("--width", type=int, help="pixels, in place of --size")
    package = parser.add_argument_group("the package")
    package.add_argument("--environment", type=Path, default=Path(".venv-vbench"), help="default: %(default)s")
    package.add_argument("--cache", type=Path, default=Path("vbench-weights"), help="its weights; default: %(default)s")
    package.add_argument("--download", action="store_true", help="let it fetch the weights that it misses")
    package.add_argument("--videos-only", action="store_true", help="make and name the videos, and stop")
    parser.add_argument("--processes", type=int, default=1, help="of tools/sample.py on this machine, one a GPU")
    parser.add_argument("sample", nargs="*", metavar="-- OPTION", help="of tools/sample.py: --weights, --codec …")
    return parser.parse_args(argv)


def judge(args: argparse.Namespace) -> int:
    """Does all that the command line asks for.

    Raises:
        InputError: something is missing or cannot be used. TrainingError: the sampler or the package failed.
    """
    if (args.height is None) != (args.width is None) or (args.size and args.height is not None):
        raise InputError("give --size, or both --height and --width")
    for name in ("height", "width", "processes", "try_pairs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    height, width = (args.height, args.width) if args.height else SIZES[args.size or "9:16"]
    crop = nearest_crop(height, width)
    suite = read_suite(args.info, args.info_sha256)
    if args.try_pairs:
        suite = suite.first(args.try_pairs)
    print(
        f"suite: SHA-256 {suite.digest}\n{len(suite.pairs)} pairs, {SAMPLES * len(suite.sampled)} videos of "
        f"{width}×{height}, images of the crop {crop}",
        flush=True,
    )
    suite.check_images(args.images / crop)
    if not args.videos_only:
        check_package(args)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = sample(args, suite, crop, ["--height", str(height), "--width", str(width)])
    suite.link(jobs, args.out / "samples", args.out / "videos")
    print(f"videos, named as the protocol does: {args.out / 'videos'}", flush=True)
    if args.videos_only:
        return 0
    results = run_package(args, suite, crop, jobs)
    write_scores(args, suite, crop, results)
    return 0


def check_package(args: argparse.Namespace) -> None:
    """Checks that the package and its weights are there, before hours are spent on videos.

    Raises:
        InputError: they are not; the message says what to give.
    """
    if not python_of(args.environment).exists():
        raise InputError(
            f"{args.environment}: no environment of the vbench package; `make vbench-env` makes one (Python 3.11), "
            "or make the videos alone with --videos-only"
        )
    if not args.download and (missing := missing_weights(args.cache)):
        raise InputError(
            f"{args.cache}: weights of the vbench package are missing: {', '.join(missing)}; put them there, or have "
            "them fetched with --download"
        )


def python_of(environment: Path) -> Path:
    """Returns the interpreter of a virtual environment: a link, and called by another name it would be of none."""
    return environment.resolve() / "bin" / "python"


def sample(args: argparse.Namespace, suite: Suite, crop: str, size: Sequence[str]) -> list[Job]:
    """Writes the list of videos and has tools/sample.py make what of it is not there; returns the list.

    Raises:
        TrainingError: the sampler failed; it said why.
    """
    wanted = args.out / "list.csv"
    suite.write_list(wanted, args.images / crop, args.seed)
    python = [sys.executable]
    if args.processes > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    own = [*size, "--prompts", str(wanted), "--repeat", "1", "--out", str(args.out / "samples")]
    ended = subprocess.run([*python, str(TOOLS / "sample.py"), *args.sample, *own], check=False)
    if ended.returncode == InputError.status:
        raise InputError("tools/sample.py cannot sample with what is given after --; its line above says why")
    if ended.returncode:
        raise TrainingError(f"tools/sample.py ended with status {ended.returncode}; what it said is above")
    return read_jobs(wanted, seed=args.seed)


def run_package(args: argparse.Namespace, suite: Suite, crop: str, jobs: Sequence[Job]) -> dict[str, float]:
    """Has the package judge each dimension that it has not judged yet; returns the results by dimension.

    Results lie in a folder that is named after all that was judged, so that those of other videos are never taken.

    Raises:
        InputError: a result is not what it must be. TrainingError: the package failed.
    """
    suite.write_info(args.out / "info.json")
    digest = hashlib.sha256(f"{suite.digest} {crop} ".encode() + (args.out / "info.json").read_bytes())
    for job in jobs:
        with open_regular(args.out / "samples" / f"{job.name}.json") as made:
            digest.update(hashlib.sha256(made.read()).digest())
    folder = (args.out / "results" / digest.hexdigest()[:16]).resolve()
    # The package reads images and DreamSim's weights at these paths of the working folder.
    for link, target in (("vbench2_beta_i2v/data/crop", args.images), ("models", args.cache / "dreamsim")):
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(target.resolve())
    results = {}
    for dimension in DIMENSIONS:
        kept = folder / f"{dimension.name}_eval_results.json"
        written = kept if kept.exists() else run_dimension(args, dimension, crop, folder)
        videos = [name for pair in suite.of(dimension) for name in pair.videos]
        results[dimension.name] = read_result(written, dimension, videos)
        written.replace(kept)
        print(f"{dimension.name}: {100 * results[dimension.name]:.2f}", flush=True)
    return results


def run_dimension(args: argparse.Namespace, dimension: Dimension, crop: str, folder: Path) -> Path:
    """Runs the package on one dimension, in its own environment, with a log; returns the file of its result.

    Raises:
        TrainingError: it failed; the message holds its last line.
    """
    log, made = folder / f"{dimension.name}.log", folder / dimension.name
    cache, written = args.cache.resolve(), made / f"{dimension.name}_eval_results.json"
    written.unlink(missing_ok=True)
    # -I keeps our modules and variables out of it, and this folder, in which a file is named like the package.
    command = [str(python_of(args.environment)), "-I", str(TOOLS / "vbench_package.py"), dimension.name]
    command += ["--info", str((args.out / "info.json").resolve()), "--videos", str((args.out / "videos").resolve())]
    command += ["--crop", crop, "--out", str(made), *(["--download"] if args.download else [])]
    environment = {**os.environ, "VBENCH_CACHE_DIR": str(cache), "TORCH_HOME": str(cache / "torch")}
    print(f"{dimension.name}: the package judges; its log is {log}", flush=True)
    with log.open("wb") as output:
        ended = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if ended.returncode or not written.exists():
        with log.open(errors="replace") as said:
            last = "".join(deque(said, 1)).strip()[-300:]
        raise TrainingError(
            f"the vbench package failed on {dimension.name} with status {ended.returncode}: {last!r}; see {log}"
        )
    return written


def write_scores(args: argparse.Namespace, suite: Suite, crop: str, results: dict[str, float]) -> None:
    """Prints the table with the published rows and writes `vbench.json`."""
    sums = scores(results)
    name = args.name or args.out.resolve().name
    made = {"name": name, "info_sha256": suite.digest, "pairs": len(suite.pairs), "crop": crop, "results": results}
    with write_atomically(args.out / "vbench.json") as stream:
        stream.write((json.dumps(made | {"scores": sums._asdict()}, indent=2) + "\n").encode())
    print("\n".join(table(name, results)))
    if args.try_pairs:
        print(f"a trial of {len(suite.pairs)} pairs: its numbers compare with nothing")
    print(f"scores: {args.out / 'vbench.json'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
