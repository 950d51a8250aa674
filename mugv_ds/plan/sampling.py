"""The device memory of each stage of sampling, before anything is loaded."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.rope import patch_grid
from mugv_ds.models.videovae.vae import FRAMES_AT_ONCE, WINDOW
from mugv_ds.parallel.layout import Layout, stage_boundaries
from mugv_ds.plan.cost import layer_parameters
from mugv_ds.plan.describe import vae_parameters
from mugv_ds.plan.memory import GIB, predict_decoding, predict_encoding, predict_sampling


def describe_text_encoder(files: Iterable[Path], itemsize: int) -> str:
    """Returns a line with the memory of a T5's weights, by the headers of its safetensors.

    Args:
        files: of the T5, see `models.text.encoder_files`. itemsize: bytes of an element, once they are loaded.

    Raises:
        InputError: a file cannot be read.
    """
    elements = 0
    for path in (path for path in files if path.suffix == ".safetensors"):
        try:
            with safe_open(path, "pt") as tensors:
                elements += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a safetensors file: {error}") from None
    return f"  text         {itemsize * elements / GIB:6.1f} GiB"


def describe_stages(
    dit: DiTConfig,
    vae: VideoVAEConfig | None,
    *,
    latent: tuple[int, int, int],
    layout: Layout,
    text_tokens: int,
    videos: int,
    itemsize: int,
    has_image: bool,
) -> Iterator[str]:
    """Yields a line for each stage after the text's, with the predicted peak of a device.

    Args:
        vae: None for the demo's codec, which takes next to nothing.
        latent: (T, h, w) of a video. layout: of the ranks. text_tokens: of a text, padded.
        videos: that a rank evaluates at once, guidance's two branches apart.
        itemsize: bytes of an element of DiT and VideoVAE while they sample and decode; first frames are in fp32.
        has_image: whether a video starts with an image.
    """
    tokens, parameters = patch_grid(*latent).tokens, layer_parameters(dit)
    if vae is not None and has_image:
        height, width = (8 * side for side in latent[1:])
        peak = predict_encoding(vae, parameters=vae_parameters(vae), height=height, width=width, itemsize=4)
        yield f"  first frames {peak / GIB:6.1f} GiB"
    boundaries = stage_boundaries(dit, layout.pipeline, tokens, text_tokens)
    weights = itemsize * max(sum(parameters[first:last]) for first, last in pairwise(boundaries))
    blocks = max(last - first for first, last in pairwise(boundaries))
    held_text = itemsize * 2.0 * videos * text_tokens * dit.hidden_size * blocks
    evaluation = predict_sampling(dit, tokens_held=-(-tokens // layout.sequence), videos=videos, itemsize=itemsize)
    yield f"  latents      {(weights + held_text + evaluation) / GIB:6.1f} GiB ({tokens:,} tokens)"
    if vae is not None:
        peak = predict_decoding(
            vae,
            parameters=vae_parameters(vae),
            latent=latent,
            window=WINDOW,
            frames_at_once=FRAMES_AT_ONCE,
            itemsize=itemsize,
        )
        yield f"  pixels       {peak / GIB:6.1f} GiB"
