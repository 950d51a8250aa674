"""Writes a checkpoint as a run would, without one: tensors cut into pieces over the files of some ranks."""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import (
    Counters,
    Manifest,
    Parameter,
    Piece,
    SavedLayout,
    StartWeights,
    digest,
    file_name,
)
from mugv_ds.config import load_config
from mugv_ds.config.text_encoder import TextEncoderInfo
from tests.helpers.dataset import write_config


def write_checkpoint(
    run: Path,
    step: int,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    averages: Mapping[str, float] | None = None,
    ranks: int = 2,
    model: dict | None = None,
    began: Mapping[str, int] | None = None,
    text_encoder: TextEncoderInfo | None = None,
) -> Path:
    """Writes fp32 tensors as the kind "weight", cut into a piece for each rank, and `latest`; returns the folder.

    Each of the averages is a kind too, whose tensors are the weights times its number.
    """
    averages = averages or {}
    run.mkdir(parents=True, exist_ok=True)
    config = load_config(write_config(run / "config", Path("unused"), **({"model": model} if model else {})))
    kinds = {"weight": 1.0, **averages}
    held: dict[str, dict[str, Tensor]] = {file_name(rank, kind): {} for rank in range(ranks) for kind in kinds}
    parameters = {}
    for name, tensor in tensors:
        cuts = [tensor.numel() * rank // ranks for rank in range(ranks + 1)]
        pieces = []
        for rank, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                piece = tensor.reshape(-1)[start:stop]
                for kind, factor in kinds.items():
                    held[file_name(rank, kind)][name] = piece * factor
                pieces.append(Piece(rank=rank, start=start, numel=stop - start))
        parameters[name] = Parameter(shape=tuple(tensor.shape), pieces=tuple(pieces))
    files.start_folder(run, step, 0)
    folder = files.unfinished_folder(run, step)
    run_config = json.loads(config.model_dump_json())
    manifest = Manifest(
        step=step,
        kinds=tuple(sorted(("weight", *averages))),
        files={name: files.write_tensors(folder / name, part) for name, part in held.items()},
        parameters=parameters,
        counters=Counters(global_steps=step, skipped_steps=0, schedule_steps=step, optimizer_steps=step),
        began=began or {},
        start=StartWeights(path=None, digest=None),
        data={"the sample ids": "0" * 64},
        text_encoder=text_encoder,
        layout=SavedLayout(data=ranks, sequence=1, pipeline=1),
        state={},
        config=run_config,
        config_sha256=digest(run_config),
        versions={"mugv_ds": "0.1.0"},
        git_commit=None,
    )
    files.commit(run, step, manifest)
    files.point_latest(run, step)
    return files.step_folder(run, step)
