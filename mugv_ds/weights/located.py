"""Weights at a URL: a copy of what is needed of them on this host's disk, which all that reads weights then reads."""

from functools import cache
from pathlib import Path, PurePosixPath

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import MANIFEST_NAME, WEIGHT, BrokenCheckpointError
from mugv_ds.checkpoint.places import ObjectPlace, fetch_file
from mugv_ds.config.console import say
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.text_encoder import TEXT_ENCODER_NAME
from mugv_ds.config.url import is_url, parent_url
from mugv_ds.files.copies import copied
from mugv_ds.files.objects import ObjectFolder
from mugv_ds.weights.save import CONFIG_NAME, MODEL_INDEX_NAME, TRANSFORMER_NAME

_KEY = "weights"  # what a URL that cannot be opened is called
_SUFFIXES = {".pt", ".bin", ".safetensors", ".json"}
_BESIDE = (CONFIG_NAME, TEXT_ENCODER_NAME, "adapter_config.json")  # what a file of weights may have beside it


def located(path: str | Path) -> Path:
    """Returns the local path of weights: `path` itself, or the copy of what is at a URL, see `files.copies`.

    Of a checkpoint the weights alone are copied, each file held against its SHA-256; of a run's URL those of its newest
    sound checkpoint.

    Raises:
        CheckpointError: there are no weights at the URL, none is sound, or the store or the disk failed.
        ConfigError: fsspec cannot open the URL.
    """
    return _copy(str(path).rstrip("/"))[1] if is_url(path) else Path(path)


def resolved(url: str) -> str:
    """Returns the URL of the newest sound checkpoint of a run's URL, after it is copied; of other weights it itself.

    Raises:
        CheckpointError, ConfigError: see `located`.
    """
    return _copy(url.rstrip("/"))[0]


@cache
def _copy(url: str) -> tuple[str, Path]:
    try:
        objects = ObjectFolder(url, _KEY)
        if objects.exists(MANIFEST_NAME):
            return url, _copy_checkpoint(objects)
        names = objects.names()
        if any(files.step_of(name) is not None for name in names):
            return _copy_newest(objects)
        if MODEL_INDEX_NAME in names:
            return url, _copy(f"{url}/{TRANSFORMER_NAME}")[1]
        wanted = [name for name in names if PurePosixPath(name).suffix in _SUFFIXES]
        folder_url, name = parent_url(url)
        folder = ObjectFolder(folder_url, _KEY)
        if not wanted and folder.exists(name):
            return url, copied(folder, (name, *_BESIDE))[0] / name
        if not wanted:
            raise CheckpointError(f"{url}: no weights are there")
        return url, copied(objects, wanted)[0]
    except OSError as error:
        raise CheckpointError(f"{error.filename or url}: {error.strerror}") from None


def _copy_newest(objects: ObjectFolder) -> tuple[str, Path]:
    for step in ObjectPlace(objects, Path(), 0).candidates()[0]:
        url = objects.url(files.step_name(step))
        try:
            return url, _copy(url)[1]
        except BrokenCheckpointError as error:
            say(f"passed over: {error}", error=True)
    raise CheckpointError(f"{objects}: holds no sound checkpoint")


def _copy_checkpoint(objects: ObjectFolder) -> Path:
    run_url, name = parent_url(str(objects))
    step = files.step_of(name)
    if step is None:
        raise CheckpointError(f"{objects}: holds a checkpoint, and is not called step-<n>")
    manifest = ObjectPlace(ObjectFolder(run_url, _KEY), Path(), 0).manifest(step)

    def download(file: str, local: Path) -> None:
        if file == MANIFEST_NAME:
            objects.download(file, local)
        else:
            fetch_file(objects, file, local, manifest.files[file])

    wanted = manifest.files_of((WEIGHT,))
    folder, there = copied(objects, (*wanted, MANIFEST_NAME), download)
    for file in wanted:
        if file not in there:
            raise BrokenCheckpointError(f"{objects.url(file)}: missing")
    return folder
