"""The step `aesthetic`: how well people would like a clip, by LAION's heads on the image embedding of CLIP ViT-L/14.

A head is linear (`sa_0_4_vit_l_14_linear`) or, in the later predictor (`sac+logos+ava1-l14-linearMSE`), several linear
layers with dropout and nothing else between them. So both are a chain of matrices.

Shape suffixes: N frames, E width of the embedding, H and W height and width.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.config.regular_file import open_regular
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.files.tensor_archive import ArchiveError, read_archive
from mugv_ds.prepare.units import Step
from mugv_ds.prepare.views import ClipView, Row, Score, WeightsError, score_each, words

STEP = Step("aesthetic", 1, fields=("aesthetic.batch",))  # the batch changes the last bits

_FRAMES = 3  # first, middle, last; Open-Sora 2.0 takes their mean
_DECODED = 2  # times the side that CLIP takes; it makes the rest smaller itself, as it was trained
_MOST_LAYERS, _WIDEST = 32, 1 << 16
_LAYER = re.compile(r"(?:(?:\w+\.)*(\d+)\.)?(weight|bias)")


def why_skipped(config: PrepareConfig) -> str | None:
    """Returns in words why the step cannot or shall not run; None if it runs."""
    absent = [name for name in ("clip", "head") if getattr(config.aesthetic, name) is None]
    return " and ".join(f"aesthetic.{name}" for name in absent) + " not given" if absent else None


def weights(config: PrepareConfig) -> str:
    """Returns a hash of CLIP's weights and of the head's.

    Raises:
        WeightsError: they are missing.
    """
    folder = Path(config.aesthetic.clip)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no folder with safetensors; aesthetic.clip must be one of CLIP ViT-L/14")
    try:
        return fingerprint([folder / "config.json", *files, _head_file(config.aesthetic.head)])
    except OSError as error:
        raise WeightsError(f"{error.filename}: {error.strerror}") from None
    except InputError as error:
        raise WeightsError(str(error)) from None


def load(config: PrepareConfig, device: str = "cpu") -> Score:
    """Loads CLIP and the head; returns what scores clips.

    `aesthetic` is the mean score of the first, the middle and the last frame; `embedding` the mean of their embeddings,
    again of length 1. Frames are embedded in batches that depend on the clips given alone: a frame's last bits depend
    on those beside it, so the same bytes come only of the same list of clips.

    Args:
        device: where to; `aesthetic.device` says which there are to choose from.

    Raises:
        WeightsError: the files are not CLIP's or the head's, or are not whole.
    """
    section = config.aesthetic
    model = _load_clip(Path(section.clip)).to(device)
    head = load_head(_head_file(section.head), model.config.projection_dim).to(device)
    prepare, side = _preparation(model.config.image_size)

    @torch.no_grad()
    def score_together(clips: Sequence[ClipView]) -> list[Row]:
        frames: list[Tensor] = []

        def read(clip: ClipView) -> Row:
            frames.append(prepare(clip.frames(_FRAMES, shortest=_DECODED * side)))
            return {}

        rows = score_each(clips, read)
        if not frames:
            return rows
        embedding_NE = nn.functional.normalize(model(pixel_values=torch.cat(frames).to(device)).image_embeds, dim=-1)
        scores = head(embedding_NE).view(-1, _FRAMES).mean(dim=1).tolist()
        means = nn.functional.normalize(embedding_NE.unflatten(0, (-1, _FRAMES)).mean(dim=1), dim=-1)
        good = [row for row in rows if row["error"] is None]
        for row, value, embedding in zip(good, scores, means.half().cpu().numpy(), strict=True):
            if np.isfinite(value) and np.isfinite(embedding).all():
                row |= {"aesthetic": value, "embedding": embedding}
            else:
                row["error"] = f"an aesthetic score of {value}"
        return rows

    together = max(1, section.batch // _FRAMES)  # clips

    def score(clips: Sequence[ClipView]) -> list[Row]:
        starts = range(0, len(clips), together)
        return [row for start in starts for row in score_together(clips[start : start + together])]

    return score


def load_head(path: Path, channels: int) -> nn.Sequential:
    """Reads a head: a chain of linear layers from embeddings [N, E] to scores [N, 1].

    Args:
        path: .safetensors, or another file as one of `torch.save`. channels: E, the width of the embedding.

    Raises:
        WeightsError: it cannot be read, or is something else.
    """
    try:
        if path.suffix == ".safetensors":
            open_regular(path).close()
            state = load_file(path)
        else:
            state = read_archive(path)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or words(error)}") from None
    except (SafetensorError, ArchiveError, InputError) as error:
        raise WeightsError(f"{path}: not weights of a head: {words(error)}") from None
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        match = _LAYER.fullmatch(str(name))
        if match is None or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise WeightsError(f"{path}: holds {str(name)[:80]!r}; a head has layers with weight and bias only")
        layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor
    chain, width = nn.Sequential(), channels
    for number in sorted(layers):
        shapes = {name: list(tensor.shape) for name, tensor in layers[number].items()}
        out = shapes["weight"][0] if len(shapes.get("weight", ())) == 2 else 0
        if shapes != {"weight": [out, width], "bias": [out]} or not 0 < out <= _WIDEST or len(chain) >= _MOST_LAYERS:
            raise WeightsError(f"{path}: layer {number} has {shapes}; expected a linear layer of {width} inputs")
        linear = nn.Linear(width, out, device="meta")
        linear.load_state_dict({name: tensor.float() for name, tensor in layers[number].items()}, assign=True)
        chain.append(linear)
        width = out
    if width != 1 or not chain:
        raise WeightsError(f"{path}: ends in {width} values for embeddings of width {channels}; a head gives one score")
    return chain.requires_grad_(False)


def _head_file(given: str) -> Path:
    """Returns the file of the head; of a folder, its only file of weights."""
    path = Path(given)
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt"))
    if len(files) != 1:
        raise WeightsError(f"{path}: has {len(files)} files of weights; aesthetic.head must name one")
    return files[0]


def _load_clip(folder: Path):
    """Returns CLIP's image tower, of whose folder no code is run and from which nothing leads to the network."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
        model, report = CLIPVisionModelWithProjection.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
        )
    except Exception as error:  # of bad files transformers raises many kinds
        raise WeightsError(f"{folder}: is no CLIP with safetensors that is here whole: {words(error)}") from None
    if absent := sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])):
        raise WeightsError(f"{folder}: has no {absent[0]} of the right shape ({len(absent)} such weights)")
    return model.eval().requires_grad_(False)


def _preparation(side: int):
    """Returns what makes frames, uint8 [N, H, W, 3], into CLIP's input [N, 3, side, side]; and the side."""
    from transformers import CLIPImageProcessorPil  # the other one needs torchvision

    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def prepare(frames: np.ndarray) -> Tensor:
        return processor(list(frames), return_tensors="pt")["pixel_values"]

    return prepare, side
