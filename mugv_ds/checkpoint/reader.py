"""Reads tensors of a checkpoint by name, whatever layout saved them."""

import json
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import WEIGHT, BrokenCheckpointError, Manifest, file_name
from mugv_ds.config.console import say
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.load import Schema
from mugv_ds.config.schema import TrainConfig


class CheckpointReader:
    """The tensors of one checkpoint; its files are mapped, and only what is asked for is read.

    Args:
        folder: of the checkpoint. manifest: its manifest, whose files have been verified.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open = ExitStack()
        self._files: dict[str, safe_open] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_) -> None:
        self._open.close()
        self._files.clear()

    def run_config(self, schema: type[Schema] = TrainConfig) -> Schema:
        """The config of the run that saved it.

        Args:
            schema: what it must be.

        Raises:
            CheckpointError: it is of another kind of run, or this version does not know a key or takes another value.
        """
        try:
            return schema.model_validate_json(json.dumps(self.manifest.config))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"{self.folder}: its config: {key}: {first['msg']}; it is of another kind of run (a DiT's, or a "
                f"VideoVAE's), or must be read with mugv_ds {self.manifest.versions.get('mugv_ds')}, which wrote it"
            ) from None

    def names(self) -> list[str]:
        """Published names of all parameters."""
        return list(self.manifest.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self.manifest.parameters[name].shape

    def read(self, name: str, kind: str = WEIGHT) -> Tensor:
        """The whole tensor of a parameter and a kind, fp32.

        Raises:
            CheckpointError: see `read_into`.
        """
        whole = torch.empty(self.shape(name))
        self.read_into(whole.view(-1), name, kind, 0)
        return whole

    def read_into(self, out: Tensor, name: str, kind: str, start: int) -> None:
        """Fills `out` [n] with elements `start` … `start + n - 1` of a flattened parameter.

        Raises:
            CheckpointError: the checkpoint does not hold this kind. BrokenCheckpointError: a file cannot be read.
        """
        if kind not in self.manifest.kinds:
            raise CheckpointError(f"{self.folder}: holds no {kind}; it has {', '.join(self.manifest.kinds)}")
        stop = start + out.numel()
        for piece in self.manifest.parameters[name].pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first < last:
                file = file_name(piece.rank, kind)
                try:
                    saved = self._file(file).get_slice(name)[first - piece.start : last - piece.start]
                except (SafetensorError, OSError) as error:
                    raise BrokenCheckpointError(f"{self.folder / file}: {error}") from None
                out[first - start : last - start].copy_(saved)

    def _file(self, name: str) -> safe_open:
        if name not in self._files:
            self._files[name] = self._open.enter_context(safe_open(self.folder / name, "pt"))
        return self._files[name]


def open_checkpoint(path: Path, kinds: Collection[str] | None = (WEIGHT,)) -> CheckpointReader:
    """Opens the checkpoint in `path`: a `step-<n>` folder, or a run's folder, whose newest sound one is taken.

    Of a run's folder the broken ones are named.

    Args:
        kinds: what will be read, whose files are verified; None: all.

    Raises:
        CheckpointError: there is none, or none is sound.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    if not is_run(path):
        return _verified(path, kinds)
    steps, _ = files.candidates(path)
    for step in steps:
        try:
            return _verified(files.step_folder(path, step), kinds)
        except BrokenCheckpointError as error:
            say(f"passed over: {error}", error=True)
    raise CheckpointError(f"{path}: holds no {'sound ' if steps else ''}checkpoint")


def open_run(run: Path, wanted: Callable[[str], bool]) -> list[CheckpointReader]:
    """Opens all checkpoints in a run's folder, newest first, the files of the wanted kinds verified.

    Raises:
        CheckpointError: there are none, or one is broken.
    """
    folders = [files.step_folder(run, step) for step in files.saved_steps(run)]
    if not folders:
        raise CheckpointError(f"{run}: holds no checkpoint")
    manifests = [files.read_manifest(folder) for folder in folders]
    return [
        _verified(folder, list(filter(wanted, manifest.kinds)))
        for folder, manifest in zip(folders, manifests, strict=True)
    ]


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run's checkpoints, rather than one checkpoint."""
    return not (path / files.MANIFEST_NAME).exists() and not path.name.startswith("step-")


def _verified(folder: Path, kinds: Collection[str] | None) -> CheckpointReader:
    manifest = files.read_manifest(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets the interpreter go
        for _ in pool.map(lambda name: files.verify(folder / name, manifest.files[name]), manifest.files_of(kinds)):
            pass
    return CheckpointReader(folder, manifest)
