"""Samples the same prompts from several weights with the same noise, measures the videos and compares the weights.

tools/evaluate.py --weights sft=exports/sft --weights dpo=exports/dpo --prompts list.csv \\
    --codec vae.pt --text-encoder t5-v1_1-xxl --size 9:16 --out evaluations/dpo

Started by `torchrun` or `deepspeed`, all processes sample together, as with tools/sample.py. The same command goes on
where it was stopped; what other settings or weights made is made anew.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mugv_ds.config import exit_status
from mugv_ds.config.text_encoder import TextEncoderInfo
from mugv_ds.config.url import is_url
from mugv_ds.evaluation.measures import DEMO_MEASURES, MEASURES
from mugv_ds.evaluation.results import read_listing, read_results
from mugv_ds.evaluation.run import Evaluation, KeptOutputs, check_jobs, parse_weights
from mugv_ds.evaluation.table import make_table, text_lines, write_table
from mugv_ds.prepare.demo.judge import demo_measures
from mugv_ds.sample import Session, add_options, check, images_of, join_session, of_job
from mugv_ds.sampling.jobs import Job, read_jobs
from mugv_ds.sampling.outputs import files_named
from mugv_ds.sampling.run import Conditions, Workers, write_contact_sheet
from mugv_ds.weights.located import located


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where an input cannot be used."""
    args = parse(argv)

    def command() -> int:
        check(args)
        args.codec = located(args.codec)
        with files_named(args.out):
            return evaluate(args)

    return exit_status(command)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="as of tools/sample.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluation")
    parser.add_argument("--keep-latents", action="store_true", help="also latents and text features as data sets do")
    add_options(parser).add_argument(
        "--weights",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="a DiT's folder or file, config.json beside it, or its URL; those after the first are compared with it",
    )
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> int:
    """Samples, measures and compares, as one of the processes of a launch or alone."""
    weights = parse_weights([_on_disk(given) for given in args.weights])
    jobs = read_jobs(args.prompts, seed=args.seed, repeat=args.repeat, image=args.image)
    check_jobs(jobs)
    options = {name: argparse.Namespace(**vars(args) | {"weights": path}) for name, path in weights.items()}
    first = next(iter(options.values()))
    session = join_session(first)
    workers = session.workers
    made = {}
    for name, own in options.items():
        own.max_text_tokens = first.max_text_tokens
        _say(workers, f"{name}: {own.weights}")
        made[name] = session.prepare(own, jobs)
    images = workers.first(lambda: images_of(jobs))
    of_jobs = {job.name: of_job(job, images) for job in jobs}
    evaluation = Evaluation(args.out, jobs, session.settings, workers)
    workers.first(lambda: evaluation.prepare(made, of_jobs))
    of_all = next(iter(made.values()))  # text encoder and codec are the same for all
    conditions = Conditions(args.out, text_encoder=of_all["text_encoder"], codec=of_all["codec"])
    for name, own in options.items():
        makes = {job: made[name] | of_job for job, of_job in of_jobs.items()}
        outputs = KeptOutputs(args.out, name, makes, keep=args.keep_latents)
        sample(session, own, jobs, outputs, conditions)
    if args.keep_latents:
        loaders, encoder = session.loaders(first, jobs), TextEncoderInfo.model_validate(of_all["text_encoder"])
        keep = partial(evaluation.keep_texts, conditions, encoder, loaders, session.device)
        workers.first_then_all(lambda: keep() if workers.leads else None)
    measured = evaluation.measure(demo_measures)
    workers.first(lambda: compare(args.out, measured, of_all))
    session.close()
    return 0


def _on_disk(given: str) -> str:
    """Returns NAME=PATH of weights as they were given, with a local path in the place of a URL."""
    name, equals, path = given.partition("=")
    return f"{name}{equals}{located(path)}" if is_url(path) else given


def sample(
    session: Session, args: argparse.Namespace, jobs: Sequence[Job], outputs: KeptOutputs, conditions: Conditions
) -> None:
    """Samples what is not there of the videos of some weights, and writes their contact sheet."""
    workers, name = session.workers, outputs.folder.name
    timer = session.sampling(session.loaders(args, jobs), outputs, conditions).run(jobs, args.batch)
    workers.first_then_all(lambda: outputs.complete(jobs) if workers.leads else None)
    workers.first(lambda: write_contact_sheet(jobs, outputs) and None)
    lines = timer.lines() if timer.stages else [f"all {len(jobs)} videos are there"]
    _say(workers, "\n".join(f"{name}: {line}" for line in lines))


def compare(folder: Path, measured: dict[tuple[str, str], dict[str, float]], made: dict[str, Any]) -> None:
    """Writes and prints the table of an evaluation. made: what makes all videos of some of the weights."""
    listing = read_listing(folder)
    table = make_table(
        read_results(folder),
        measured,
        MEASURES | DEMO_MEASURES,
        weights=list(listing.weights),
        wanted=len(listing.jobs),
    )
    facts = {
        **{f"weights {name}": _identity(own["weights"]) for name, own in listing.weights.items()},
        "codec": _identity(made["codec"]),
        "text encoder": TextEncoderInfo.model_validate(made["text_encoder"]),
        "dtype": made["dtype"],
        **{name.replace("_", " "): value for name, value in made["settings"].items() if value is not None},
    }
    write_table(folder, table, facts)
    print("\n".join(["", *text_lines(table), "", f"videos and table.html are in {folder}"]), flush=True)


def _identity(weights: dict[str, str]) -> str:
    return f"{weights['name']}, fingerprint {weights['fingerprint'][:12]}"


def _say(workers: Workers, line: str) -> None:
    if workers.leads:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
