"""Compares weights blindly: a page of their videos side by side, the votes, a report, and training sets of the votes.

tools/compare.py build evaluations/may/sft evaluations/may/dpo --out runs/compare
tools/compare.py serve runs/compare                    people vote in the browser; Ctrl-C ends it with the report
tools/compare.py import runs/compare votes-ana.json    or send them runs/compare/page and import what they export
tools/compare.py report runs/compare
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.config import InputError, exit_status
from mugv_ds.evaluation.compare.draw import QUESTIONS, Comparison, draw, read_comparison, write_comparison
from mugv_ds.evaluation.compare.outcomes import outcomes, summarise
from mugv_ds.evaluation.compare.page import PAGE, write_page, write_single_page
from mugv_ds.evaluation.compare.preferences import write_preferences
from mugv_ds.evaluation.compare.report import describe, write_report
from mugv_ds.evaluation.compare.serve import start_server
from mugv_ds.evaluation.compare.votes import Box, import_votes

_PORT = 8765  # always the same, as browsers keep what they keep by address and port


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where an input cannot be used."""
    args = parse(argv)

    def command() -> int:
        try:
            return COMMANDS[args.command](args)
        except OSError as error:
            raise InputError(f"{error.filename or args.folder}: {error.strerror or error}") from None

    return exit_status(command)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser("build", help="draw what is compared, and write the page")
    build.add_argument(
        "weights", nargs="+", help="folders of evaluated weights of one evaluation, or names in --results"
    )
    build.add_argument("--results", type=Path, help="folder that `make eval` wrote; default: that of the folders")
    build.add_argument("--out", type=Path, required=True, dest="folder", metavar="DIR", help="folder to write")
    build.add_argument("--questions", nargs="+", choices=QUESTIONS, default=QUESTIONS, help="default: all")
    build.add_argument("--seed", type=int, default=0, help="of the draw of sides and order")
    build.add_argument("--items", type=int, help="the most pairs of videos; default: every prompt, every two weights")
    build.add_argument("--single", action="store_true", help="also page.html with all videos in it")

    serve = commands.add_parser("serve", help="serve the page on this machine and keep the votes, then report")
    serve.add_argument("--port", type=int, default=_PORT, help=f"of 127.0.0.1, 0 for any; default {_PORT}")

    load = commands.add_parser("import", help="take votes that browsers have exported")
    load.add_argument("--as", dest="name", help="name of the annotator, in place of the one in the file")

    report = commands.add_parser("report", help="write the report, pairs.csv and labels.csv")
    for command in (serve, report):
        command.add_argument("--question", choices=QUESTIONS, help="whose votes train; default: the first asked")
        command.add_argument("--results", type=Path, help="folder of the evaluation, if it was moved")
        command.add_argument("--no-preferences", action="store_true", help="write no pairs.csv and labels.csv")
    for command in (serve, load, report):
        command.add_argument("folder", type=Path, metavar="DIR", help="that `build` wrote")
    load.add_argument("files", type=Path, nargs="+", metavar="FILE")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> int:
    """Draws the comparison and writes its page."""
    if args.items is not None and args.items < 1:
        raise InputError(f"--items {args.items}: must be at least 1")
    results, names = _named(args.weights, args.results)
    comparison, files = draw(results, names, args.questions, seed=args.seed, limit=args.items)
    votes = args.folder / "votes"
    if any(votes.glob("*.json")) and read_comparison(args.folder).id != comparison.id:
        raise InputError(f"{args.folder}: holds votes of another comparison; name another --out")
    args.folder.mkdir(parents=True, exist_ok=True)
    write_comparison(args.folder, comparison)
    page = write_page(args.folder / "page", comparison, files)
    print(f"{len(comparison.items)} pairs of videos: {page}")
    if args.single:
        write_single_page(args.folder / "page.html", comparison, args.folder / "page")
        print(f"the same in one file: {args.folder / 'page.html'}")
    return 0


def _named(given: Sequence[str], results: Path | None) -> tuple[Path, list[str]]:
    """Returns the folder of the evaluation and the weights' names in it.

    Raises:
        InputError: there is no telling which evaluation is meant.
    """
    if results is not None:
        return results, [Path(name).name for name in given]
    folders = {Path(name).parent for name in given}
    if len(folders) > 1 or not all(Path(name).is_dir() for name in given):
        raise InputError(
            f"{', '.join(given)}: name folders of weights in one evaluation, such as evaluations/x/a, or give --results"
        )
    return folders.pop(), [Path(name).name for name in given]


def serve(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C, then reports."""
    comparison = read_comparison(args.folder)
    if not (args.folder / "page" / PAGE).is_file():
        raise InputError(f"{args.folder}: has no page; build it again")
    box = Box(args.folder / "votes", comparison)
    box.read()
    server, address = start_server(args.folder / "page", comparison, box, args.port)
    print(f"vote at  {address}\nCtrl-C ends this and writes the report; votes are kept in {box.folder}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return report(args)


def load(args: argparse.Namespace) -> int:
    """Takes exported votes."""
    for votes in import_votes(Box(args.folder / "votes", read_comparison(args.folder)), args.files, args.name):
        print(f"{votes.annotator}: {len(votes.votes)} votes")
    return 0


def report(args: argparse.Namespace) -> int:
    """Writes the report and the training sets, and prints the former."""
    comparison = read_comparison(args.folder)
    votes = Box(args.folder / "votes", comparison).read()
    numbers = summarise(comparison, votes)
    path = write_report(args.folder / "report", numbers)
    print("\n".join([*describe(numbers), f"report: {path}"]), flush=True)
    if numbers["questions"] and not args.no_preferences:
        write_sets(args, comparison, votes)
    return 0


def write_sets(args: argparse.Namespace, comparison: Comparison, votes: Sequence) -> None:
    """Writes the training sets and says what is in them."""
    question = args.question or comparison.questions[0]
    found = outcomes(comparison, votes, question)
    folder = args.folder / "preferences"
    rows, divided = write_preferences(folder, args.results or Path(comparison.results), comparison, found)
    for line in divided:
        print(f"left out, annotators are divided: {line}")
    for name, count in rows.items():
        print(f"{folder / name}: {count} rows" if count else f"no {name}: nothing in the votes makes a row of it")


COMMANDS = {"build": build, "serve": serve, "import": load, "report": report}


if __name__ == "__main__":
    sys.exit(main())
