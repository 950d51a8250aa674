"""The model card that is written beside exported weights: what they came from, and code that loads them.

The same checkpoint gives the same card. Whatever a file says is escaped: it can neither end the head nor become markup.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import Manifest
from mugv_ds.checkpoint.reader import CheckpointReader
from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.config.load import leaves
from mugv_ds.config.regular_file import open_regular, read_text_file
from mugv_ds.config.schema import TrainConfig
from mugv_ds.weights.save import Layout

_PROVENANCE_NAME, _LICENCE = "provenance.parquet", "licence"  # of a prepared set, see docs/data.md
_MAX_TABLE_BYTES = 1 << 24
_MOST_PARENTS, _MOST_LICENCES, _LONGEST = 20, 50, 300
_LOADS = """from mugv_ds.weights.published import load_dit

model = load_dit(".")  # the folder of this file
"""


def model_card(
    saved: CheckpointReader,
    layout: Layout,
    *,
    licence: str = "other",
    evaluation: Path | None = None,
    average: dict[str, str] | None = None,
) -> str:
    """Returns the card of a checkpoint's weights, Markdown with a YAML head as the hub reads it.

    Args:
        saved: the checkpoint. layout: that the weights are written in.
        licence: of the weights, an identifier of the hub such as "apache-2.0".
        evaluation: folder of `tools/evaluate.py`, or its `table.json`; None: there is none.
        average: what was averaged and how, for weights that are an average; None: they are those of the step.

    Raises:
        InputError: the table cannot be read. CheckpointError: the checkpoint's config cannot.
    """
    manifest, run = saved.manifest, saved.run_config()
    head = ModelCardData(
        license=licence, library_name="mugv_ds", pipeline_tag="text-to-video", tags=["mugv_ds", "mug-v"]
    )
    weights = "adapters merged into their base" if run.lora is not None else "the whole model"
    facts = {
        "model": f"{run.model.preset}, {sum(_sizes(saved)):,} parameters in the checkpoint, {weights}",
        "precision": run.model.dtype,
        "steps": f"{manifest.step:,} of {run.schedule.steps:,}",
        "config": f"SHA-256 {manifest.config_sha256}",
        "code": f"mugv_ds {manifest.versions.get('mugv_ds')}, commit {manifest.git_commit or 'not known'}",
        "text encoder": "not said by the data" if manifest.text_encoder is None else str(manifest.text_encoder),
        **(
            {f"average: {name}": value for name, value in average.items()}
            if average
            else {"average": "none: the last weights"}
        ),
        **{f"average kept in the checkpoint: {kind}": "" for kind in manifest.kinds if kind.startswith("ema_")},
    }
    lines = [
        "---",
        head.to_yaml().strip(),
        "---",
        "",
        "# Weights of a MUG-DiT, trained with mugv_ds",
        "",
        *_table(("what", "value"), facts.items()),
        "",
        "## Loading",
        "",
        "```python",
        *_LOADS.splitlines(),
        "```",
        "",
        "`mugv-ds sample --weights .` samples videos with them, given a codec, a text encoder and prompts.",
        *_layout_lines(layout),
        "",
        "## Lineage",
        "",
        "What training started from, the nearest first.",
        "",
        *_table(("weights", "digest"), _parents(manifest)),
        "",
        "## Data",
        "",
        *_table(("what", "value"), _data(manifest, run)),
        *_evaluation_lines(evaluation),
        "",
        "## Config",
        "",
        *_table(("key", "value"), ((key, json.dumps(value)) for key, value in leaves(manifest.config))),
    ]
    return "\n".join(lines) + "\n"


def _sizes(saved: CheckpointReader) -> Iterator[int]:
    for name in saved.names():
        size = 1
        for side in saved.shape(name):
            size *= side
        yield size


def escaped(text: Any) -> str:
    """Returns a text as it may stand in a cell of a table: on one line, with nothing that is Markdown or HTML."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
    for character in "\\`*_{}[]()#+!|~$":
        line = line.replace(character, f"\\{character}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")


def _table(heads: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield f"| {' | '.join(map(escaped, row))} |"


def _layout_lines(layout: Layout) -> Iterator[str]:
    if layout == "diffusers":
        yield ""
        yield "The folder is laid out as diffusers has it: `transformer/` holds the weights under their published"
        yield "names, and `model_index.json` says so. mugv_ds loads it; diffusers itself has no class for this model."


def _parents(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The weights that the run started from and, where those are of a run, what that one started from, and so on."""
    for _ in range(_MOST_PARENTS):
        start = manifest.start
        if start.path is None:
            yield "initial weights", f"drawn from the seed {manifest.config.get('data', {}).get('seed')}"
            return
        folder = Path(start.path)
        if not (folder / files.MANIFEST_NAME).is_file():
            yield start.path, _published_digest(folder) if start.digest is None else f"SHA-256 {start.digest}"
            return
        try:
            manifest = files.read_manifest(folder)
        except CheckpointError:
            yield start.path, "its manifest cannot be read"
            return
        yield start.path, f"step {manifest.step:,}, config SHA-256 {manifest.config_sha256}"


def _published_digest(path: Path) -> str:
    from mugv_ds.files.fingerprint import fingerprint
    from mugv_ds.weights.published import PublishedWeights  # which writes cards, too

    try:
        return f"fingerprint {fingerprint(PublishedWeights(path).files)}"
    except (InputError, OSError):
        return "not there any more"


def _data(manifest: Manifest, run: TrainConfig) -> Iterator[tuple[str, str]]:
    """What the checkpoint knows of the data, and what the sets say of themselves if they are still there."""
    yield from sorted(manifest.data.items())
    sources = run.preference.sources if run.preference else ()
    paths = [run.data.manifest, *(source.manifest for source in sources)]
    for path in map(Path, dict.fromkeys(paths)):
        try:
            with open_regular(path) as stream:
                yield str(path), f"SHA-256 {hashlib.file_digest(stream, 'sha256').hexdigest()}"
        except (InputError, OSError):
            yield str(path), "not there when this card was written"
            continue
        yield f"licences of {path}", _licences(path.parent / _PROVENANCE_NAME)


def _licences(path: Path) -> str:
    """The licences that a prepared set notes of its samples, with their number."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_regular(path) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            counts = Counter(
                str(value or "not known")
                for batch in table.iter_batches(columns=[_LICENCE])
                for value in batch.column(0).to_pylist()
            )
    except (InputError, OSError, KeyError, pyarrow.ArrowException):
        return "not said by the set"
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(counts.items())[:_MOST_LICENCES])


def _evaluation_lines(path: Path | None) -> Iterator[str]:
    """The table of an evaluation: means of the videos, with their intervals."""
    if path is None:
        return
    file = path / "table.json" if path.is_dir() else path
    try:
        table = json.loads(read_text_file(file, _MAX_TABLE_BYTES))
        names = list(table["videos"])
        rows = [
            (line["title"], *(_mean(line["means"].get(name)) for name in names), line["unit"])
            for line in table["measures"].values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{file}: no table of tools/evaluate.py: {why[:_LONGEST]}") from None
    yield from ("", "## Evaluation", "", "Means over videos, with intervals over prompts.", "")
    yield from _table(("measure", *map(escaped, names), "unit"), rows)


def _mean(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return "–"
    text = f"{float(interval['mean']):.4g}"
    if interval["low"] is None:
        return text
    return f"{text} from {float(interval['low']):.4g} to {float(interval['high']):.4g}"
