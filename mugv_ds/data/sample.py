"""Reading one sample: its latent and its text features, with everything checked that training relies on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mugv_ds.data.manifest import Index, Row, Shape
from mugv_ds.data.paths import split_key
from mugv_ds.data.shards import Entry, find, read_header, read_tensor
from mugv_ds.data.storage import Files
from mugv_ds.files.tensor_file import (
    FLOAT_DTYPES,
    SampleError,
    UnsafeFileError,
    check_dense,
    check_latent,
    load_tensors,
)

__all__ = [
    "Sample",
    "SampleError",
    "UnsafeFileError",
    "normalise",
    "read_latent",
    "read_row",
    "read_text",
    "stored_latent",
    "stored_text",
]

# Statistics of the VideoVAE's latents, one value a channel; the published state dict carries the same.
LATENT_SHIFT = torch.tensor(
    [
        -0.0194091796875, 0.09619140625, -0.796875, 0.1591796875, -0.2578125, 0.359375, -0.3203125, -0.287109375,
        -0.0069580078125, 0.3046875, 0.310546875, -0.451171875, -0.1728515625, 0.369140625, 0.2177734375,
        -3.075599670410156e-05, 0.1630859375, -0.267578125, -0.1962890625, -0.1298828125, -0.28515625, -0.515625,
        0.5859375, -0.34375,
    ]
)  # fmt: skip
LATENT_SCALE = torch.tensor(
    [
        0.8817, 0.6523, 0.9152, 1.2117, 3.3516, 0.7528, 0.8177, 0.8637, 0.9075, 2.8875, 0.8980, 1.1202,
        1.0003, 2.5163, 0.6652, 1.2573, 0.7279, 1.0777, 1.5159, 0.8680, 1.1859, 1.0484, 2.4750, 1.5881,
    ]
)  # fmt: skip

_LARGEST_LATENT, _LARGEST_TEXT = 1e3, 1e5  # magnitudes; the VideoVAE's latents stay below 100, T5's features below 1e4
_MASK_DTYPES = (*FLOAT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Sample:
    """One sample, on the CPU.

    Attributes:
        latent: float32 [24, T, H, W], normalised.
        text: float32 [max_text_tokens, C], zero beyond the caption; None where it was not asked for.
        text_mask: bool [max_text_tokens], True for the caption's tokens; None where it was not asked for.
        row: its row of the manifest.
    """

    latent: Tensor
    text: Tensor | None
    text_mask: Tensor | None
    row: Row


def read_row(index: Index, i: int, *, channels: int, max_text_tokens: int, with_text: bool = True) -> Sample:
    """Reads row `i` of a manifest; latents of `source == "real"` are normalised here, once.

    Args:
        index: the manifest.
        i: row of it.
        channels: C, width of the text features.
        max_text_tokens: length that captions are padded to.
        with_text: False leaves the text features unread, for a caption that is dropped anyway.

    Raises:
        UnsafeFileError: a file asks for more than tensors.
        SampleError: a file cannot be used.
        PathError: a path leads somewhere it must not.
        OSError: the file system failed.
    """
    row = index.row(i)
    latent = stored_latent(index.files, row.latent_path, row.latent_shape, row.latent_entry)
    if row.source == "real":
        latent = normalise(latent)
    if not with_text:
        return Sample(latent, None, None, row)
    text, mask = stored_text(index.files, row.text_feat_path, channels, max_text_tokens, row.text_entry)
    return Sample(latent, text, mask, row)


def normalise(latent: Tensor) -> Tensor:
    """(z − shift) / scale of a raw latent [24, T, H, W] from the VideoVAE."""
    return (latent - LATENT_SHIFT[:, None, None, None]) / LATENT_SCALE[:, None, None, None]


def stored_latent(files: Files, path: str, expected_shape: Shape, entry: Entry | None = None) -> Tensor:
    """Reads a latent of a manifest, from a file of its own or from a shard.

    Args:
        files: where the path leads. path: as in the CSV. expected_shape: (T, H, W) that the index promises.
        entry: where it lies, if the path is into a shard; by default the shard's header says so.

    Returns:
        float32 [24, T, H, W], contiguous, as it is stored.

    Raises:
        PathError: the path leads somewhere it must not.
        SampleError: what is there is no such latent, or has NaN, Inf or values beyond all sense.
        OSError: the file system failed.
    """
    if split_key(path)[1] is not None:
        tensor, name = _from_shard(files, path, entry)
        return _latent(tensor, name, expected_shape)
    with files.whole(path) as file:
        return read_latent(file, expected_shape)


def stored_text(
    files: Files, path: str, channels: int, max_tokens: int, entry: Entry | None = None
) -> tuple[Tensor, Tensor]:
    """Reads a caption's features of a manifest, from a file of their own or, [L, C], from a shard.

    Args:
        files, path, entry: as of `stored_latent`. channels: C. max_tokens: length that the result is padded to.

    Returns:
        As `read_text`.

    Raises:
        PathError, SampleError, OSError: as of `stored_latent`.
    """
    if split_key(path)[1] is None:
        with files.whole(path) as file:
            return read_text(file, channels, max_tokens)
    y, name = _from_shard(files, path, entry)
    if y.dim() != 2 or y.shape[1] != channels:
        raise SampleError(f"{name}: shape {list(y.shape)}, expected [L, {channels}]")
    return _padded(y, torch.ones(len(y), dtype=torch.bool), name, max_tokens)


def _from_shard(files: Files, path: str, entry: Entry | None) -> tuple[Tensor, str]:
    """The tensor that a path into a shard names, and its name for messages."""
    file, key = split_key(path)
    with files.open(file) as blob:
        name = f"{blob.name}#{key}"
        return read_tensor(blob, key, find(read_header(blob), key, blob.name) if entry is None else entry), name


def read_latent(path: Path, expected_shape: Shape) -> Tensor:
    """Reads a latent as it is stored.

    Args:
        path: file of one floating tensor [24, T, H, W].
        expected_shape: (T, H, W) that the index promises.

    Returns:
        float32 [24, T, H, W], contiguous.

    Raises:
        SampleError: the file is not that, or has NaN, Inf or values beyond all sense.
        OSError: the file system failed.
    """
    return _latent(load_tensors(path), str(path), expected_shape)


def _latent(value: Any, name: str, expected_shape: Shape) -> Tensor:
    """`value` as float32, if it is a latent of that shape with values that make sense."""
    stored = check_latent(value, name)
    if tuple(stored.shape[1:]) != tuple(expected_shape):
        raise SampleError(f"{name}: T, H, W = {list(stored.shape[1:])}, but the manifest means {list(expected_shape)}")
    # A copy even of float32: the mapping, and with it the open file, must not outlive this call.
    latent = stored.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _check_range(latent, name, _LARGEST_LATENT)
    return latent


def read_text(path: Path, channels: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Reads a caption's features, {"y": [1, 1, L, C], "mask": [1, L]} with L ≤ `max_tokens`.

    Args:
        path: the file.
        channels: C.
        max_tokens: length that the result is padded to.

    Returns:
        (float32 [max_tokens, C] zero beyond L, bool [max_tokens] False beyond L).

    Raises:
        SampleError: the file is not that, has NaN, Inf or values beyond all sense, or a mask all zero or not binary.
        OSError: the file system failed.
    """
    content = load_tensors(path)
    if not isinstance(content, dict):
        raise SampleError(f"{path}: a {type(content).__name__}, expected a dict with 'y' and 'mask'")
    for key in ("y", "mask"):
        if key not in content:
            raise SampleError(f"{path}: no {key!r}; it has {list(content)[:10]}")
    y, mask = content["y"], content["mask"]
    # A caption may be saved as a view into its padded form, no more.
    y = check_dense(y, f"{path}: y", dtypes=FLOAT_DTYPES, max_storage_bytes=max_tokens * channels * 4)
    mask = check_dense(mask, f"{path}: mask", dtypes=_MASK_DTYPES, max_storage_bytes=max_tokens * 8)
    if y.dim() != 4 or y.shape[:2] != (1, 1) or y.shape[3] != channels:
        raise SampleError(f"{path}: y has shape {list(y.shape)}, expected [1, 1, L, {channels}]")
    if mask.shape != (1, y.shape[2]):
        raise SampleError(f"{path}: mask has shape {list(mask.shape)}, y has {y.shape[2]} tokens")
    return _padded(y[0, 0], mask[0], str(path), max_tokens)


def _padded(y: Tensor, mask: Tensor, name: str, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Features [L, C] and their mask [L] as float32 [max_tokens, C] and bool [max_tokens], if they make sense."""
    length = len(y)
    if length > max_tokens:
        raise SampleError(f"{name}: {length} tokens, at most {max_tokens} are allowed (data.max_text_tokens)")
    if not ((mask == 0) | (mask == 1)).all():
        raise SampleError(f"{name}: mask has values other than 0 and 1")
    if not mask.any():
        raise SampleError(f"{name}: mask is all zero")
    text = torch.zeros(max_tokens, y.shape[1])
    text[:length] = y
    _check_range(text, f"{name}: y", _LARGEST_TEXT)
    text_mask = torch.zeros(max_tokens, dtype=torch.bool)
    text_mask[:length] = mask == 1
    return text, text_mask


def _check_range(values: Tensor, name: str, largest: float) -> None:
    """Raises SampleError if a value is not finite, or so large that it would cost the step."""
    low, high = torch.aminmax(values)  # both NaN if a value is
    most = torch.maximum(-low, high)
    if not torch.isfinite(most):
        nans, infs = int(values.isnan().sum()), int(values.isinf().sum())
        raise SampleError(f"{name}: {nans} NaN and {infs} Inf of {values.numel()} values")
    if most > largest:
        raise SampleError(f"{name}: has values up to {most:.3g}, and at most {largest:g} makes sense")
