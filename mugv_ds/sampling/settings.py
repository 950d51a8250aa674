"""What a video is sampled by: sizes and lengths by name, and `SamplingSettings`."""

from dataclasses import dataclass

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE, MAX_LATENT_SIDE
from mugv_ds.models.text import NEGATIVE_PROMPT, PROMPT_SUFFIX

# Height × width in pixels by the published names, which are height:width. The published 3:4 and 4:3 have 1110 × 832
# pixels, of which the VideoVAE makes 1104 × 832.
SIZES = {"9:16": (720, 1280), "16:9": (1280, 720), "1:1": (960, 960), "3:4": (832, 1104), "4:3": (1104, 832)}
# Frames by the published names: at 20 a second, 105 are 5.25 s and 73 are 3.65 s.
LENGTHS = {"5s": 105, "3s": 73}

FPS_LIMITS = (0.1, 1000.0)

_MAX_FRAMES = 10_000
_MAX_STEPS = 10_000


@dataclass(frozen=True)
class SamplingSettings:
    """How videos are sampled. The defaults are the published sampler's.

    Args:
        height, width: in pixels; multiples of 8.
        frames: of the video. With 8n + 1 the first frame has a latent of its own, as published: where an image is
            given, that image is the first frame. With 8n every latent frame gives eight frames: where an image is
            given, the first eight show it.
        fps: frames a second that the model is told.
        output_fps: frames a second of the file.
        steps, guidance, shift: see `sampler.sample_latents`.
        prompt_suffix: appended to every prompt. negative_prompt: of guidance.
        guidance_interval: see `sampler.guided_velocity`; None for all times.
        first_block_cache: threshold of `models.reuse.FirstBlockCache`; None to run all blocks.

    Raises:
        InputError: a value makes no sense.
    """

    height: int
    width: int
    frames: int
    fps: float = 30.0
    output_fps: float = 20.0
    steps: int = 25
    guidance: float = 4.0
    shift: float | None = None
    prompt_suffix: str = PROMPT_SUFFIX
    negative_prompt: str = NEGATIVE_PROMPT
    guidance_interval: tuple[float, float] | None = None
    first_block_cache: float | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            side = getattr(self, name)
            if side < LATENT_STRIDE or side % LATENT_STRIDE or side > LATENT_STRIDE * MAX_LATENT_SIDE:
                raise InputError(
                    f"{name} {side}: must be a multiple of {LATENT_STRIDE} up to {LATENT_STRIDE * MAX_LATENT_SIDE}; "
                    f"take {_nearest(side)}"
                )
        if not 1 <= self.frames <= _MAX_FRAMES or self.frames % LATENT_STRIDE > 1:
            shorter = max(self.frames // LATENT_STRIDE * LATENT_STRIDE + 1, 1)
            raise InputError(
                f"frames {self.frames}: must be 8n, or 8n + 1 where the first frame has a latent of its own, up to "
                f"{_MAX_FRAMES}; take {min(shorter, _MAX_FRAMES)} or {shorter + LATENT_STRIDE - 1}"
            )
        if not 1 <= self.steps <= _MAX_STEPS:
            raise InputError(f"steps {self.steps}: must be 1 to {_MAX_STEPS}; the published sampler takes 25")
        for name, least, most in (
            ("fps", *FPS_LIMITS),
            ("output_fps", *FPS_LIMITS),
            ("guidance", 0, 1000),
            ("shift", 1e-3, 1000),
            ("first_block_cache", 0, 10),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} {value:g}: must be {least:g} to {most:g}")
        low, high = self.guidance_interval or (0, 1000)
        if not 0 <= low < high <= 1000:
            raise InputError(
                f"guidance_interval {self.guidance_interval}: must be two timesteps from 0 (clean) to 1000 (noise), "
                "the smaller first"
            )
        if not self.negative_prompt.strip():
            raise InputError("negative_prompt: is empty, and guidance needs one; leave it out for the published one")

    @property
    def still_first(self) -> bool:
        """Tells whether the first frame has a latent of its own."""
        return self.frames % LATENT_STRIDE == 1

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Returns [24, T, H, W] of a video."""
        frames = -(-self.frames // LATENT_STRIDE)
        return LATENT_CHANNELS, frames, self.height // LATENT_STRIDE, self.width // LATENT_STRIDE

    @property
    def orientation(self) -> str:
        """Returns the size in words."""
        if self.height == self.width:
            return "square"
        return "portrait" if self.height > self.width else "landscape"


def _nearest(side: int) -> int:
    multiple = round(side / LATENT_STRIDE) * LATENT_STRIDE
    return min(max(multiple, LATENT_STRIDE), LATENT_STRIDE * MAX_LATENT_SIDE)
