"""Sampling as a command does it: its options, and the models and processes that they stand for.

`tools/sample.py` and `tools/evaluate.py` share it, and `tools/make_rdpo_pairs.py` takes its models and processes.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mugv_ds.config import InputError
from mugv_ds.config.environment import given_world_size
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.text_encoder import check_text_encoder
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.models.attention import BACKENDS
from mugv_ds.models.choose_attention import fastest_masked_attention, named_attention
from mugv_ds.models.compile import compile_blocks, compile_video_vae
from mugv_ds.models.rope import patch_grid
from mugv_ds.models.text import MAX_TOKENS, encoder_files, load_text_encoder, read_text_encoder_info
from mugv_ds.models.videovae import VideoVAE, check_conv3d
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan.sampling import describe_stages, describe_text_encoder
from mugv_ds.sampling.jobs import Job
from mugv_ds.sampling.outputs import Outputs, files_named
from mugv_ds.sampling.run import Conditions, Denoiser, Sampling, Workers
from mugv_ds.sampling.settings import LENGTHS, SIZES, SamplingSettings
from mugv_ds.sampling.stages import Codec, TextEncoder
from mugv_ds.weights.base import check_weights
from mugv_ds.weights.codec import load_codec, read_codec_sizes
from mugv_ds.weights.published import PublishedWeights, load_dit, read_dit_config
from mugv_ds.weights.start import load_into

if TYPE_CHECKING:  # DeepSpeed is imported where several processes sample
    from mugv_ds.engine.process import Process

# Videos of a process from which on compiling the VideoVAE pays: at 720p that takes 40 s, and saves 3.8 s of each.
COMPILED_FROM = 12
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MAX_TEXT_TOKENS = 10_000
_TIMEOUT_S = 4 * 3600.0  # for which replicas wait for one that has a video more, or a slower device


def add_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of models, video, sampler and processes to a command; returns the group of the models."""
    models = parser.add_argument_group("models")
    models.add_argument("--codec", required=True, help="vae.pt, or the demo data's codec.safetensors, or its URL")
    models.add_argument(
        "--text-encoder", help="folder of a T5 encoder, or its name in the hub's cache; hash: the demo's"
    )
    models.add_argument("--text-revision", help="of a name; best a commit's hash")
    models.add_argument(
        "--text-dtype", choices=DTYPES, default="fp32", help="of T5; take that of the training features"
    )
    models.add_argument("--text-device", help="where T5 runs; auto spreads it over GPU, memory and disk (accelerate)")
    models.add_argument(
        "--max-text-tokens", type=int, help="default: as the weights' text_encoder.json says, else 300, as published"
    )
    add_device_options(models)

    video = parser.add_argument_group("video")
    video.add_argument(
        "--size", choices=SIZES, help="height:width, so that 16:9 is portrait; default 16:9, as published"
    )
    video.add_argument("--height", type=int, help="pixels, in place of --size")
    video.add_argument("--width", type=int, help="pixels, in place of --size")
    video.add_argument("--length", choices=LENGTHS, help="default 5s (105 frames), as published")
    video.add_argument("--frames", type=int, help="in place of --length; 8n, or 8n + 1: the first has its own latent")
    video.add_argument("--image", type=Path, help="first frame of every video (image-to-video)")
    video.add_argument("--fps", type=float, default=30.0, help="frames a second that the model is told")
    video.add_argument("--output-fps", type=float, help="frames a second of the files; default 20, as published")
    video.add_argument("--prompt-suffix", help="appended to every prompt; default: the published one")
    video.add_argument("--negative-prompt", help="default: the published one")

    sampler = parser.add_argument_group("sampler")
    sampler.add_argument("--seed", type=int, default=0)
    sampler.add_argument("--repeat", type=int, default=1, help="videos of each prompt, each from noise of its own")
    sampler.add_argument("--batch", type=int, default=1, help="videos sampled at once, which bounds the memory")
    sampler.add_argument("--steps", type=int, default=25)
    sampler.add_argument("--guidance", type=float, default=4.0)
    sampler.add_argument("--shift", type=float, help="timestep shift, as flow.shift; default: the resolution's")
    approximate = parser.add_argument_group("faster and not exact; the error on the first prompt is printed")
    approximate.add_argument("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="in 0 … 1000")
    approximate.add_argument("--first-block-cache", type=float, metavar="THRESHOLD", help="such as 0.05")

    add_layout_options(parser)
    return models


def add_device_options(models: argparse._ArgumentGroup) -> None:
    """Adds the options of how a device computes."""
    models.add_argument("--dtype", choices=DTYPES, help="of DiT and VAE; default: bf16 on a GPU, fp32 on a CPU")
    models.add_argument("--attention", choices=["auto", *BACKENDS], default="auto", help="as model.attention")
    models.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")


def add_layout_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of several processes."""
    parallel = parser.add_argument_group("several processes")
    parallel.add_argument("--sequence", type=int, default=1, help="processes that share a sample's tokens")
    parallel.add_argument("--pipeline", type=int, default=1, help="stages, where the weights do not fit one device")
    parallel.add_argument("--guidance-parallel", action="store_true", help="guidance's two branches side by side")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher gives it; it is in the environment too


def check(args: argparse.Namespace) -> None:
    """Checks what the options' types do not.

    Raises:
        InputError: a value makes no sense, or options contradict each other.
    """
    for name in ("batch", "sequence", "pipeline"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.max_text_tokens is not None and not 2 <= args.max_text_tokens <= _MAX_TEXT_TOKENS:
        raise InputError(f"--max-text-tokens {args.max_text_tokens}: must be 2 to {_MAX_TEXT_TOKENS}")
    if args.text_device not in (None, "auto") and not _is_device(args.text_device):
        raise InputError(f"--text-device {args.text_device}: must be auto, cpu, or a GPU that is here, such as cuda:0")
    sides = [side is not None for side in (args.height, args.width)]
    if (args.size and any(sides)) or any(sides) != all(sides):
        raise InputError("give --size, or both --height and --width")
    if args.length and args.frames is not None:
        raise InputError("give --length or --frames")
    if args.first_block_cache is not None and args.pipeline > 1:
        raise InputError("--first-block-cache takes all blocks on one device; leave out --pipeline")


def _is_device(name: str) -> bool:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # torch knows no such name, or is built without it
        return False
    return torch.device(name).type != "meta"


def settings_of(args: argparse.Namespace) -> SamplingSettings:
    """Returns what the command line says of the videos; what it does not say is as published."""
    height, width = SIZES[args.size or "16:9"] if args.height is None else (args.height, args.width)
    given = {
        "output_fps": args.output_fps,
        "prompt_suffix": args.prompt_suffix,
        "negative_prompt": args.negative_prompt,
        "guidance_interval": args.guidance_interval and tuple(args.guidance_interval),
    }
    return SamplingSettings(
        height=height,
        width=width,
        frames=LENGTHS[args.length or "5s"] if args.frames is None else args.frames,
        fps=args.fps,
        steps=args.steps,
        guidance=args.guidance,
        shift=args.shift,
        first_block_cache=args.first_block_cache,
        **{name: value for name, value in given.items() if value is not None},
    )


@dataclass(frozen=True)
class Session:
    """This process of a launch, or alone, which samples lists of videos one after the other.

    Attributes:
        settings: of all videos. process: None where it is alone. workers: the processes of the launch.
        device: of this process. dtype: of DiT and VAE.
    """

    settings: SamplingSettings
    process: "Process | None"
    workers: Workers
    device: torch.device
    dtype: torch.dtype

    def prepare(self, args: argparse.Namespace, jobs: Sequence[Job]) -> dict[str, Any]:
        """Prints the plan, checks the weights and returns what makes their videos, see `provenance`; on all processes.

        Raises:
            InputError: something cannot be read or used. PeerError: the process that leads says why.
        """
        layout = self.process.layout if self.process else Layout()

        def look() -> dict[str, Any]:
            print("\n".join(plan(args, self.settings, jobs, layout, self.dtype)), flush=True)
            check_weights(PublishedWeights(args.weights), read_dit_config(args.weights))
            with files_named(args.out):
                return provenance(args, self.settings, self.dtype)

        return self.workers.first(look)

    def loaders(self, args: argparse.Namespace, jobs: Sequence[Job]) -> "Loaders":
        """Returns what loads the models that sample the jobs."""
        videos = -(-len(jobs) // self.workers.replicas)
        return Loaders(args, self.settings, self.process, self.workers, self.device, self.dtype, videos)

    def sampling(self, loaders: "Loaders", outputs: Outputs, conditions: Conditions) -> Sampling:
        """Returns what samples lists of videos."""
        return Sampling(self.settings, outputs, conditions, loaders, self.workers, self.device)

    def close(self) -> None:
        """Leaves the launch."""
        if self.process:
            torch.distributed.destroy_process_group()


def join_session(args: argparse.Namespace) -> Session:
    """Joins the launch that this process belongs to, with the settings that the command line says.

    Raises:
        InputError: the settings or the layout cannot be used.
    """
    settings = settings_of(args)
    if args.max_text_tokens is None:
        trained = PublishedWeights(args.weights).text_encoder
        args.max_text_tokens = trained.max_tokens if trained else MAX_TOKENS
    process = join(args)
    device, dtype = device_of(args, process)
    return Session(settings, process, workers_of(process, args.guidance_parallel), device, dtype)


def device_of(args: argparse.Namespace, process: "Process | None") -> tuple[torch.device, torch.dtype]:
    """Returns the device of this process, and the dtype of the models on it."""
    device = process.device if process else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]


def plan(
    args: argparse.Namespace, settings: SamplingSettings, jobs: Sequence[Job], layout: Layout, dtype: torch.dtype
) -> Iterator[str]:
    """Says what is to be sampled, and what memory each stage will take."""
    yield (
        f"{len(jobs)} videos of {settings.frames} frames, {settings.height} high × {settings.width} wide "
        f"({settings.orientation})"
    )
    yield "predicted peak of a device, beside what PyTorch and its libraries take:"
    if args.text_encoder != "hash":
        files = encoder_files(args.text_encoder, args.text_revision)
        yield describe_text_encoder(files, DTYPES[args.text_dtype].itemsize)
    yield from describe_stages(
        read_dit_config(args.weights),
        read_codec_sizes(args.codec),
        latent=settings.latent_shape[1:],
        layout=layout,
        text_tokens=args.max_text_tokens,
        videos=args.batch * (1 if args.guidance_parallel else 2),
        itemsize=dtype.itemsize,
        has_image=any(job.image is not None for job in jobs),
    )


def join(args: argparse.Namespace) -> "Process | None":
    """Joins the launch that this process belongs to; None if it is alone."""
    if given_world_size() is None:
        if max(args.sequence, args.pipeline) > 1 or args.guidance_parallel:
            raise InputError(
                "--sequence, --pipeline, --guidance-parallel: start with torchrun or deepspeed to use them"
            )
        return None
    from mugv_ds.config.schema import ParallelSection
    from mugv_ds.engine.process import join_launch

    parallel = ParallelSection(sequence=args.sequence, pipeline=args.pipeline)
    given = {name: str(value) for name, value in vars(args).items() if name != "local_rank"}
    return join_launch(parallel, _TIMEOUT_S, given)


def workers_of(process: "Process | None", guidance_parallel: bool) -> Workers:
    """Makes replicas of the launch's data ranks: of each one, or of two that share guidance's branches."""
    if process is None:
        return Workers()
    from mugv_ds.parallel.guidance import join_pair

    branches = 2 if guidance_parallel else 1
    pair = join_pair(process.layout, process.coordinates) if guidance_parallel else None
    stage, data, sequence = process.coordinates
    return Workers(
        replica=data // branches,
        replicas=process.layout.data // branches,
        leads=process.rank == 0,
        writes=stage == sequence == data % branches == 0,
        attempt=process.host.attempt,
        first_then_all=process.host.first_then_all,
        first=process.host.first,
        pair=pair,
    )


class Loaders:
    """Loads the sampler's parts; see `sampling.run.Loaders`."""

    def __init__(
        self,
        args: argparse.Namespace,
        settings: SamplingSettings,
        process: "Process | None",
        workers: Workers,
        device: torch.device,
        dtype: torch.dtype,
        videos: int,
    ) -> None:
        self._args, self._settings, self._process, self._workers = args, settings, process, workers
        self._device, self._dtype, self._config = device, dtype, read_dit_config(args.weights)
        self._videos = videos

    def text_encoder(self) -> TextEncoder:
        args = self._args
        spread = {"device_map": "auto"} if args.text_device == "auto" else {"device": args.text_device or self._device}
        return load_text_encoder(
            args.text_encoder,
            channels=self._config.caption_channels,
            max_tokens=args.max_text_tokens,
            revision=args.text_revision,
            dtype=DTYPES[args.text_dtype],
            **spread,
        )

    def image_codec(self) -> Codec:
        return load_codec(self._args.codec, dtype=torch.float32, device=self._device)  # one frame: cheap in fp32

    def denoiser(self) -> Denoiser:
        shape = self._settings.latent_shape[1:]
        return load_denoiser(self._args, [shape], self._process, self._workers, self._device, self._dtype)

    def decode(self) -> Callable[[Tensor], Iterator[Tensor]]:
        codec = load_decoder(self._args, self._dtype, self._device, self._videos)
        check_decoder(codec, self._dtype, self._device, *self._settings.latent_shape[2:])
        if not self._process or not isinstance(codec, VideoVAE):
            return codec.decode_windows
        from mugv_ds.parallel.codec import decode_windows_parallel
        from mugv_ds.parallel.guidance import replica_group

        branches = self._process.layout.data // self._workers.replicas
        group = replica_group(self._process.layout, self._process.coordinates, branches)
        return partial(decode_windows_parallel, codec, group=group)


def load_denoiser(
    args: argparse.Namespace,
    shapes: Sequence[tuple[int, int, int]],
    process: "Process | None",
    workers: Workers,
    device: torch.device,
    dtype: torch.dtype,
) -> Denoiser:
    """Loads the DiT, or this process's stage of it, ready to sample latents of some shapes (T, H, W).

    Attention is chosen, and stages are balanced, for the shape with the most tokens. All processes call it together.
    """
    config, shape = read_dit_config(args.weights), max(shapes, key=lambda shape: patch_grid(*shape).tokens)
    if process:
        model = _stage(args, config, shape, process, device, dtype)
    else:
        model = load_dit(args.weights).to(device, dtype).eval()
    run = {"dtype": dtype, "device": device, "first": workers.first}
    attention, tokens = BACKENDS["sdpa"], patch_grid(*shape).tokens
    if device.type == "cuda":
        attention = named_attention(args.attention, tokens=tokens, heads=config.num_heads // args.sequence, **run)
        cross_attention = fastest_masked_attention(
            tokens=-(-tokens // args.sequence),
            text_tokens=args.max_text_tokens,
            heads=config.num_heads,
            **run,
        )
        for block in model.blocks:
            block.cross_attn.attend = cross_attention
    if args.compile or (args.compile is None and device.type == "cuda"):
        compile_blocks(list(model.blocks), shapes=len(shapes))
    if not process:
        return Denoiser(partial(model, attention=attention), model)
    from mugv_ds.parallel.inference import PipelinedModel

    model.ulysses.attention = attention
    return Denoiser(PipelinedModel(model), model, model.ulysses.total)


def _stage(
    args: argparse.Namespace,
    config: DiTConfig,
    shape: tuple[int, int, int],
    process: "Process",
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Returns the stage of the DiT that this process runs."""
    from mugv_ds.parallel.inference import inference_stage

    stage = inference_stage(
        config,
        layout=process.layout,
        coordinates=process.coordinates,
        group=process.group,
        shape=shape,
        text_tokens=args.max_text_tokens,
        dtype=dtype,
        device=device,
    )
    load_into(args.weights, config, stage.named_layers())
    return stage


def load_decoder(args: argparse.Namespace, dtype: torch.dtype, device: torch.device, videos: int) -> Codec:
    """Loads the codec that decodes so many videos in this process; where compiling it pays, it is compiled."""
    codec = load_codec(args.codec, dtype=dtype, device=device)
    pays = device.type == "cuda" and videos >= COMPILED_FROM
    if isinstance(codec, VideoVAE) and (args.compile or (args.compile is None and pays)):
        compile_video_vae(codec)
    return codec


def check_decoder(codec: Codec, dtype: torch.dtype, device: torch.device, height: int, width: int) -> None:
    """Checks, where it is a GPU, that the device computes a VideoVAE's bf16 right; for latents of these sides."""
    if isinstance(codec, VideoVAE) and dtype == torch.bfloat16 and device.type == "cuda":
        check_conv3d(device, height=8 * height, width=8 * width, config=codec.config)


def provenance(args: argparse.Namespace, settings: SamplingSettings, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what makes every video of the list, of JSON types.

    Raises:
        InputError: something cannot be read, or the text encoder is not that of the weights' training.
    """

    def weights(path: Path) -> dict[str, str]:
        return {"name": path.resolve().name, "fingerprint": fingerprint(PublishedWeights(path).files)}

    text_encoder = read_text_encoder_info(
        args.text_encoder,
        channels=read_dit_config(args.weights).caption_channels,
        max_tokens=args.max_text_tokens,
        revision=args.text_revision,
        dtype=DTYPES[args.text_dtype],
    )
    check_text_encoder(args.weights, text_encoder)
    return {
        "settings": asdict(settings),
        "weights": weights(args.weights),
        "codec": weights(args.codec),
        "text_encoder": text_encoder.model_dump(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def images_of(jobs: Sequence[Job]) -> dict[str, dict[str, str]]:
    """Returns by its path what each image of the list is, of JSON types."""
    paths = dict.fromkeys(job.image for job in jobs if job.image is not None)
    return {str(path): {"name": path.name, "fingerprint": fingerprint([path])} for path in paths}


def of_job(job: Job, images: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Returns what makes one video of the list, of JSON types; `images` are those of `images_of`."""
    return {"prompt": job.prompt, "seed": job.seed, "draw": job.draw, "image": images.get(str(job.image))}
