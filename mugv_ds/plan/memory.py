"""Device memory of training, of its previews and of sampling by closed form.

docs/performance.md compares it with measured peaks.
"""

from dataclasses import dataclass

from mugv_ds.config.model import LATENT_STRIDE, DiTConfig
from mugv_ds.config.videovae import VideoVAEConfig

GIB = 2**30

# Tensors of [tokens held, D] that one block keeps for its backward pass, by what is recomputed. Counted from the code,
# and by a test of what autograd keeps:
# - full: its input.
# - attention: also o of self-attention, and the log-sum-exp of its softmax, 4 bytes for the 72 channels of a head.
# - selective: also q, k, v (3, and a third for the space between their rows) and o of self-attention, o as the
#   projection takes it (the same tensor where the sequence is not sharded), and the feed-forward layer's input.
# - light: also qkv as the projection gives it (3), GELU's input (4) and the feed-forward layer's output.
# - off: also the projection of o, the residual after it, q of cross-attention before and after its norm, and its o.
# Cross-attention through PyTorch keeps q and o padded to 80 channels beside: 1.2 more with "off".
KEPT = {"full": 1, "attention": 2 + 1 / 36, "selective": 7 + 1 / 3, "light": 15 + 1 / 3, "off": 20 + 1 / 3}
# Such tensors in use at once while one block runs backward, fitted to the runs; with "full" all that a block keeps is
# made again first.
WORKING = {"full": 30, "attention": 30, "selective": 15, "light": 15, "off": 15}
# The same without gradients, and nothing is kept: measured through the whole 10B model of 2 and of 4 blocks, in bf16 on
# an H200 (PyTorch 2.11), with 13,802 to 54,002 tokens.
SAMPLING = 16.4
# Tensors of a frame's full size and the second level's width while the VideoVAE's spatial half decodes it: those that
# are live, and as much as cuDNN works in. The latter was measured on an H200 (PyTorch 2.11) at 720p: 9.5 GiB in all
# with four frames at once, and 3.2 without the weights with one.
DECODING, DECODING_WORKSPACE = 3, 1.5
BUCKET_BYTES = 2 * 500_000_000  # DeepSpeed's gradient reduction, 5e8 bf16 elements


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: always there, at the start of the backward pass, in the optimizer step."""

    resident: float
    backward: float
    step: float

    @property
    def peak(self) -> float:
        return max(self.backward, self.step)


def predict_memory(
    config: DiTConfig,
    *,
    parameters: int,
    blocks: int,
    replicas: int,
    tokens_held: int,
    in_flight: int,
    recompute: str,
    fp32_accumulation: bool,
    averages: int,
    frozen: int = 0,
) -> Memory:
    """Memory of a bf16 run with ZeRO-1 and AdamW.

    Args:
        parameters, blocks: of the device's pipeline stage; of the parameters those that are trained.
        replicas: ranks over which the optimizer is sharded.
        tokens_held: tokens of a micro-batch on one rank, all its samples together.
        in_flight: micro-batches whose activations a stage holds at once: as many as stages are left, itself included.
        recompute: `parallel.activation_checkpointing`.
        fp32_accumulation: whether gradients are accumulated in fp32 beside the bf16 ones.
        averages: fp32 averages of the weights that are kept, sharded as the optimizer is.
        frozen: parameters of the stage that are not trained, the base of adapters. They have neither gradients nor
            anything in the optimizer. What adapters keep beside, [tokens, rank] each, is not counted.
    """
    tensor = 2.0 * tokens_held * config.hidden_size
    weights = 2.0 * (parameters + frozen)
    shard = (12.0 + 4.0 * averages) * parameters / replicas  # fp32 weights and two moments; averages
    accumulated = 4.0 * parameters if fp32_accumulation else 0.0
    resident = weights + shard + accumulated
    activations = (KEPT[recompute] * blocks * in_flight + WORKING[recompute]) * tensor
    # Gradients take the place of activations as the backward pass goes; the step needs its shard of them in fp32 too.
    step = resident + 2.0 * parameters + 6.0 * parameters / replicas
    return Memory(resident, resident + activations + BUCKET_BYTES, step)


def predict_sampling(config: DiTConfig, *, tokens_held: int, videos: int = 2, itemsize: int = 2) -> float:
    """Bytes that sampling takes beside what is always there: those of one evaluation.

    Args:
        tokens_held: tokens of a video on one rank.
        videos: that are evaluated at once; guidance evaluates two for one.
        itemsize: bytes of an element, 2 in bf16.
    """
    return SAMPLING * itemsize * videos * tokens_held * config.hidden_size


def predict_encoding(config: VideoVAEConfig, *, parameters: int, height: int, width: int, itemsize: int = 2) -> float:
    """Bytes that encoding one frame with a VideoVAE takes: weights, and five tensors of full size in the spatial half.

    Args:
        parameters: of the VideoVAE. height, width: in pixels. itemsize: bytes of an element, 2 in bf16.
    """
    return itemsize * (parameters + 5.0 * config.block_out_channels[0] * height * width)


def predict_decoding(
    config: VideoVAEConfig,
    *,
    parameters: int,
    latent: tuple[int, int, int],
    window: int,
    frames_at_once: int = 1,
    itemsize: int = 2,
) -> float:
    """Bytes that decoding with a VideoVAE takes beside what is always there.

    They are its weights; the features of a window (the width of the spatial half's last level, at 1/8 of the video's
    sides) and its pixels in fp32, which all ranks hold; and the larger of two: the frames at work in the spatial half
    (`DECODING`), or two more copies of the pixels, which are put together. The temporal half, before there are any,
    takes less at the published size. Counted from the code, and by a test of what is live while it runs.

    Args:
        parameters: of the VideoVAE. latent: (T, h, w). window: latent frames that are decoded together.
        frames_at_once: in the spatial half. itemsize: bytes of an element, 2 in bf16.
    """
    frames, height, width = latent
    shown = LATENT_STRIDE * min(frames, window)
    pixels = LATENT_STRIDE**2 * height * width
    features = itemsize * config.block_out_channels[-1] * shown * height * width
    video = 4.0 * 3 * shown * pixels
    full = itemsize * config.block_out_channels[1] * pixels
    working = frames_at_once * (DECODING + DECODING_WORKSPACE) * full
    return itemsize * parameters + features + video + max(working, 2 * video)
