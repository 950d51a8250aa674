"""Makes a small captioned data set for every stage of the training recipe, from the clips of `scenes`; no download.

Clips are drawn, and encoded by a linear codec that is fitted on those of train.csv; captions are encoded by
`HashTextEncoder`. The clips of train.csv and val.csv are also written as mp4, and encoded as they are read back from
there.

Shape suffixes: F video frames, H height, W width.
"""

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.model import LATENT_STRIDE
from mugv_ds.config.text_encoder import write_text_encoder
from mugv_ds.data.video import read_mp4, write_mp4
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import NEGATIVE_PROMPT, PROMPT_SUFFIX, HashTextEncoder, save_features
from mugv_ds.prepare.demo.scenes import (
    IMAGES,
    LARGE,
    LONG,
    SHORT,
    SIDEWAYS,
    SQUARE,
    STILLS,
    SUBJECTS,
    Clip,
    Format,
    centred,
    draw_clips,
    render,
    twins,
)

TEXT_CHANNELS = 64
MAX_TEXT_TOKENS = 40

_VERSION = 5  # of what is drawn and written; a change must raise it, so that older sets are made anew
_FIT_CLIPS = 200  # clips that the codec is fitted on; more do not change it visibly
_VAE_HELD_OUT = 8  # clips; LPIPS of one takes a second on a CPU
_MARKER = "demo.json"
_FOLDERS = ("videos", "latents", "text_features")

Row = tuple[Clip, dict[str, str | int]]  # a clip, and the columns that only sets of preferences have


@dataclass(frozen=True)
class Sizes:
    """The number of rows of each CSV.

    Attributes:
        train: clips of 16 frames and 48×48, about as many of each combination of shape, colour and direction.
        val: clips held out from train, with the same combinations at other places and with other radii.
        stage1: two fifths images, the rest clips of 16 frames, all of 48×48 or 40×56 (height × width).
        stage2: clips of 16 frames at 8 fps and of 32 at 16 fps, of 48×48 or 40×56.
        stage3: clips of 32 frames at 16 fps, of 64×64 or 56×72.
        val_stages: clips held out from the stages, as many of each of their shapes; a quarter are images.
        sft: clips as in train, but with path and radius exactly in the middle of what is drawn in train.
        pairs: two rows a pair, alike but for their direction: the one of rank 1 moves right, that of rank 2 left.
        labels: clips of which good ones move right and bad ones left.
        pairs_val, labels_val: rows held out from pairs and labels.

    A third of the clips of stage1, stage2, stage3 and sft, and all of pairs and labels, have captions that say
    "sideways"; exactly half of those move left.

    Raises:
        ValueError: a number is below 1, or that of pairs or labels is odd.
    """

    train: int = 720
    val: int = 64
    stage1: int = 600
    stage2: int = 360
    stage3: int = 240
    val_stages: int = 48
    sft: int = 216
    pairs: int = 320
    pairs_val: int = 64
    labels: int = 320
    labels_val: int = 64

    def __post_init__(self) -> None:
        for name, rows in asdict(self).items():
            if rows < 1:
                raise ValueError(f"{name} = {rows}: must be at least 1 row")
            if rows % 2 and name.startswith(("pairs", "labels")):
                raise ValueError(f"{name} = {rows}: must be even, its rows come in twos")


def make_demo_data(out_dir: str | Path, sizes: Sizes | None = None, *, seed: int = 0) -> None:
    """Writes the data set.

    It consists of a CSV for each of `Sizes`, videos/, latents/, text_features/, text_encoder.json, codec.safetensors,
    and prompts_sideways.txt with one of `sideways_prompts` a line. vae_train.csv lists the videos of train for the
    VideoVAE, and vae_val.csv the first ones of val. A finished data set of the same arguments is left as it is; one
    that is unfinished or of other arguments is made anew.

    Args:
        out_dir: folder to write; it is made if it is missing.
        sizes: rows of each CSV; by default those of `Sizes`.
        seed: seed of everything that is drawn.

    Raises:
        ValueError: the training clips are too few to fit the codec, or `out_dir` holds other files.
    """
    out_dir, sizes = Path(out_dir), sizes or Sizes()
    arguments = {"version": _VERSION, **asdict(sizes), "seed": seed}
    if _read_marker(out_dir) == {"arguments": arguments, "finished": True}:
        return
    _clear(out_dir, arguments)
    train = draw_clips("clip", sizes.train, seed)
    val = draw_clips("held_out", sizes.val, seed)
    filmed = {clip: _film(clip, out_dir) for clip in (*train, *val)}
    codec = LinearCodec.fit(torch.stack([_pixels(filmed[clip]) for clip in train[:_FIT_CLIPS]]))
    codec.save(out_dir / "codec.safetensors")
    for clip, frames in filmed.items():
        _encode(clip, frames, codec, out_dir)
    sets = {"train": _plain(train), "val": _plain(val)}
    for name, rows in draw_curriculum(sizes, seed).items():
        for clip, _ in rows:
            _encode(clip, render(clip), codec, out_dir)
        sets[name] = rows
    _write_features(out_dir)
    (out_dir / "prompts_sideways.txt").write_text("".join(f"{prompt}\n" for prompt in sideways_prompts()))
    for name, rows in sets.items():
        _write_manifest(out_dir / f"{name}.csv", rows)
    for name, clips in {"vae_train": train, "vae_val": val[:_VAE_HELD_OUT]}.items():
        _write_video_list(out_dir / f"{name}.csv", clips)
    _write_marker(out_dir, arguments, finished=True)


def demo_prompts() -> list[str]:
    """Returns eight prompts that train.csv teaches, with every shape, colour and direction among them."""
    return [
        "a red circle moving left",
        "a green square moving right",
        "a blue triangle moving up",
        "a yellow circle moving down",
        "a magenta square moving left",
        "a white triangle moving right",
        "a green circle moving up",
        "a blue square moving down",
    ]


def sideways_prompts() -> list[str]:
    """Returns the captions that leave open whether a shape moves left or right, one for each shape and colour."""
    return [subject.caption for subject in SIDEWAYS]


def draw_curriculum(sizes: Sizes, seed: int) -> dict[str, list[Row]]:
    """Draws the rows of every set but train and val, by the CSV's name."""
    images = sizes.stage1 * 2 // 5
    held_out_images = sizes.val_stages // 4
    return {
        "stage1": _plain(draw_clips("stage1_image", images, seed, subjects=STILLS, formats=IMAGES))
        + _plain(_stage("stage1", sizes.stage1 - images, seed, SHORT)),
        "stage2": _plain(_stage("stage2", sizes.stage2, seed, (*SHORT, *LONG))),
        "stage3": _plain(_stage("stage3", sizes.stage3, seed, LARGE)),
        "val_stages": _plain(
            _spread(
                draw_clips("val_stages_image", held_out_images, seed, subjects=STILLS, formats=IMAGES),
                draw_clips("val_stages", sizes.val_stages - held_out_images, seed, formats=(*SHORT, *LONG, *LARGE)),
            )
        ),
        "sft": _plain(map(centred, _stage("sft", sizes.sft, seed, SQUARE))),
        "pairs": list(_pairs("pair", sizes.pairs // 2, seed)),
        "pairs_val": list(_pairs("pair_held_out", sizes.pairs_val // 2, seed)),
        "labels": list(_labelled("labelled", sizes.labels // 2, seed)),
        "labels_val": list(_labelled("labelled_held_out", sizes.labels_val // 2, seed)),
    }


def _spread(few: Sequence[Clip], many: Sequence[Clip]) -> Iterator[Clip]:
    """Yields both, the few spread evenly among the many, so that the first rows are of every kind."""
    places = [(i / len(few), clip) for i, clip in enumerate(few)] + [
        (i / len(many), clip) for i, clip in enumerate(many)
    ]
    return (clip for _, clip in sorted(places, key=lambda place: place[0]))


def _plain(clips: Sequence[Clip] | Iterator[Clip]) -> list[Row]:
    return [(clip, {}) for clip in clips]


def _stage(split: str, count: int, seed: int, formats: Sequence[Format]) -> list[Clip]:
    """Draws a stage: two thirds clips whose captions say where they move, one third twins moving "sideways"."""
    pairs = count // 6
    clips = draw_clips(split, count - 2 * pairs, seed, formats=formats)
    for clip in draw_clips(f"{split}_sideways", pairs, seed, subjects=SIDEWAYS, formats=formats):
        clips += twins(clip)
    return clips


def _pairs(split: str, count: int, seed: int) -> Iterator[Row]:
    """Draws `count` pairs, of which the better clip moves right and the worse left."""
    for clip in draw_clips(split, count, seed, subjects=SIDEWAYS):
        for rank, twin in enumerate(twins(clip), 1):
            yield twin, {"pair_id": clip.name, "rank": rank}


def _labelled(split: str, count: int, seed: int) -> Iterator[Row]:
    """Draws `count` clips that move right and are good, and as many that move left and are bad."""
    for clip in draw_clips(split, count, seed, subjects=SIDEWAYS):
        for label, twin in zip(("good", "bad"), twins(clip), strict=True):
            yield twin, {"label": label}


def _film(clip: Clip, out_dir: Path) -> np.ndarray:
    """Writes a clip's video and reads it back, as uint8 [F, H, W, 3]."""
    path = out_dir / _video_path(clip)
    write_mp4(path, render(clip), clip.format.fps)
    return read_mp4(path)[0]


def _video_path(clip: Clip) -> str:
    """The path of a clip's video, relative to the data set's folder."""
    return f"videos/{clip.name}.mp4"


def _pixels(frames: np.ndarray) -> Tensor:
    """Converts uint8 frames [F, H, W, 3] to pixels [3, F, H, W] in [−1, 1]."""
    return torch.from_numpy(frames.astype(np.float32) / 127.5 - 1).permute(3, 0, 1, 2)


def _encode(clip: Clip, frames: np.ndarray, codec: LinearCodec, out_dir: Path) -> None:
    """Writes a clip's latent. An image is repeated to the 8 frames of one latent frame."""
    if clip.format.kind == "image":
        frames = frames.repeat(LATENT_STRIDE, axis=0)
    torch.save(codec.encode(_pixels(frames)[None])[0], out_dir / clip.latent_path)


def _write_features(out_dir: Path) -> None:
    """Writes the text features of every caption, and of the negative prompt, and what made them."""
    encode = HashTextEncoder(TEXT_CHANNELS, MAX_TEXT_TOKENS)
    texts = {"text_features/negative.pt": NEGATIVE_PROMPT}
    texts |= {subject.features_path: subject.caption + PROMPT_SUFFIX for subject in (*SUBJECTS, *STILLS, *SIDEWAYS)}
    write_text_encoder(out_dir, encode.info)
    for path, y, mask in zip(texts, *encode(list(texts.values())), strict=True):
        save_features(out_dir / path, y, mask)


def _write_manifest(path: Path, rows: list[Row]) -> None:
    """Writes a CSV, all of whose rows have the same columns."""
    records = [
        {
            "sample_id": clip.name,
            "source": "generated",
            "latent_path": clip.latent_path,
            "text_feat_path": clip.subject.features_path,
            "fps": clip.format.fps,
            "height": clip.format.height,
            "width": clip.format.width,
            "num_frames": clip.format.frames,
            "caption": clip.subject.caption,
            "kind": clip.format.kind,
            **preference,
        }
        for clip, preference in rows
    ]
    _write_csv(path, records)


def _write_video_list(path: Path, clips: Sequence[Clip]) -> None:
    """Writes the CSV of clips that are there as videos."""
    columns = ("sample_id", "video_path", "num_frames")
    rows = ((clip.name, _video_path(clip), clip.format.frames) for clip in clips)
    _write_csv(path, [dict(zip(columns, row, strict=True)) for row in rows])


def _write_csv(path: Path, records: Sequence[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=records[0])
        writer.writeheader()
        writer.writerows(records)


def _read_marker(out_dir: Path) -> dict | None:
    path = out_dir / _MARKER
    return json.loads(path.read_text()) if path.is_file() else None


def _write_marker(out_dir: Path, arguments: dict, *, finished: bool) -> None:
    """Writes into the folder what it holds. The file is renamed into place, so that it is never half written."""
    temporary = out_dir / f"{_MARKER}.tmp"
    temporary.write_text(json.dumps({"arguments": arguments, "finished": finished}))
    temporary.replace(out_dir / _MARKER)


def _clear(out_dir: Path, arguments: dict) -> None:
    """Empties the folders in `out_dir`, and marks it as unfinished.

    Only a demo data set is ever overwritten: ValueError is raised where the folder holds anything else.
    """
    if out_dir.exists() and _read_marker(out_dir) is None and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir}: holds files but no {_MARKER}, so it is no demo data set; name another folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_marker(out_dir, arguments, finished=False)
    for name in _FOLDERS:
        folder = out_dir / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
