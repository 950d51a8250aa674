"""Device memory of training, of its previews and of sampling by closed form.

docs/performance.md compares it with measured peaks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mugv_ds.config.deepspeed import BUCKET_ELEMENTS
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
_O_TWICE = ("selective", "light", "off")  # levels that keep o of self-attention in two layouts
# Of those, what `parallel.offload` leaves on the device with "attention", and what waits in host memory.
ON_DEVICE = {"none": KEPT["attention"], "attention_output": 1.0, "all": 0.0}
ON_HOST = {how: KEPT["attention"] - left for how, left in ON_DEVICE.items()}
OFFLOAD_BUFFERS = 2  # blocks whose offloaded tensors are on the device: the one at work and the one that is copied
# Such tensors in use at once while one block runs backward, beside the text's: measured with one block on an H200
# (`tools/calibrate.py`, 65,536 and 131,072 tokens). With "full" and "attention" all that a block keeps is made again
# first. Where ranks share a sequence there are also q, k and v on their way, fitted to two runs.
WORKING = {"full": 29, "attention": 28.5, "selective": 15.5, "light": 10.5, "off": 10.5}
EXCHANGED = 2.5
READ_AHEAD = 3  # steps' batches that a reading rank holds in pinned memory: the step's own, and those that wait
# The same without gradients, and nothing is kept: measured through the whole 10B model of 2 and of 4 blocks, in bf16 on
# an H200 (PyTorch 2.11), with 13,802 to 54,002 tokens.
SAMPLING = 16.4
# Tensors of a frame's full size and the second level's width while the VideoVAE's spatial half decodes it: those that
# are live, and as much as cuDNN works in. The latter was measured on an H200 (PyTorch 2.11) at 720p: 9.5 GiB in all
# with four frames at once, and 3.2 without the weights with one.
DECODING, DECODING_WORKSPACE = 3, 1.5
BUCKETS = 3  # of gradients at once in the backward pass: one that is made, and the optimizer's two buffers
HOST_BASE = 3 * GIB  # of a process beside what is offloaded: CUDA, PyTorch, the libraries; measured, 2.8 to 3.1
# Of a device beside PyTorch's memory: CUDA's context and, in a run on several, NCCL's buffers. On 4 H200 (PyTorch 2.11)
# 4.65 GiB were taken when a run at 54,002 tokens had no more, and 4.95 at 579,602.
CONTEXT, COLLECTIVES = 0.75 * GIB, 4.0 * GIB
# Share of what is allocated that PyTorch reserves beside, in segments that nothing else fits into: 2.7% were seen where
# the levels of blocks differ. A run that left none stopped at its second step, in NCCL.
MARGIN = 0.03


def usable_bytes(total: float, devices: int) -> float:
    """Returns what a run on so many devices can allocate of one that has `total` bytes."""
    return (total - CONTEXT - COLLECTIVES * (devices > 1)) / (1 + MARGIN)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part, at their most, and those of host memory.

    Attributes:
        weights: bf16, of the stage. optimizer: the shard's fp32 weights and two moments.
        averages: the shard's. gradients: those that the shard accumulates.
        buckets: bf16 gradients that are not reduced yet. activations: kept for the backward pass.
        working: in use while a block runs backward; buffers of what is offloaded.
        host: of this rank's process.
    """

    weights: float
    optimizer: float
    averages: float
    gradients: float
    buckets: float
    activations: float
    working: float
    host: float = HOST_BASE

    @property
    def resident(self) -> float:
        """Returns what is always there."""
        return self.weights + self.optimizer + self.averages + self.gradients

    @property
    def peak(self) -> float:
        """Returns the most that is there, which is in the backward pass."""
        return self.resident + self.buckets + self.activations + self.working

    def parts(self) -> dict[str, float]:
        """Returns the device's parts by name, whose sum is the peak."""
        return {name: value for name, value in asdict(self).items() if name != "host"}


def predict_memory(
    config: DiTConfig,
    *,
    parameters: int,
    blocks: int,
    replicas: int,
    tokens_held: int,
    in_flight: int,
    recompute: str | Sequence[tuple[str, int]],
    offload: str = "none",
    fp32_accumulation: bool,
    averages: int,
    is_sharded: bool = True,
    text_held: int = 0,
    batch_bytes: float = 0.0,
    frozen: int = 0,
    matrices: int = 0,
    bucket: int = BUCKET_ELEMENTS,
) -> Memory:
    """Memory of a bf16 run with ZeRO-1, AdamW and Muon.

    Args:
        parameters, blocks: of the device's pipeline stage; of the parameters those that are trained.
        replicas: ranks over which optimizer and gradients are sharded.
        tokens_held: tokens of a micro-batch on one rank, all its samples together.
        in_flight: micro-batches whose activations a stage holds at once: as many as stages are left, itself included.
        recompute: level of all blocks, or the levels of some from the first block on, each with how many have it.
        offload: `parallel.offload`.
        fp32_accumulation: whether gradients are accumulated in fp32, in place of bf16.
        averages: fp32 averages of the weights that are kept, sharded as the optimizer is.
        is_sharded: whether ranks share a sequence; where they do not, o of self-attention is kept once.
        text_held: rows of width D of the text's keys and values that cross-attention keeps in a block, all its samples
            together: with "off" until its backward pass, else while it runs again.
        frozen: parameters of the stage that are not trained, the base of adapters. They have neither gradients nor
            anything in the optimizer. What adapters keep beside, [tokens, rank] each, is not counted.
        matrices: parameters, of those that are trained, that Muon moves: it keeps one moment of them, not two.
        batch_bytes: of a step's samples of a data rank. bucket: elements of gradients that are reduced together.
    """
    tensor = 2.0 * tokens_held * config.hidden_size
    text = 2.0 * text_held * config.hidden_size
    kept = {level: (KEPT[level] - (level in _O_TWICE and not is_sharded)) * tensor for level in KEPT}
    kept["off"] += text
    moved = 0.0
    if offload != "none":
        kept["attention"], moved = ON_DEVICE[offload] * tensor, ON_HOST[offload] * tensor
    activations = working = let_go = 0.0
    for level, count in reversed([(recompute, blocks)] if isinstance(recompute, str) else recompute):
        needed = (WORKING[level] + EXCHANGED * is_sharded) * tensor + text * (level != "off")
        working = max(working, needed - let_go)
        let_go += count * kept[level]  # once those are done, in the backward pass of this micro-batch
        activations += count * kept[level] * in_flight
    return Memory(
        weights=2.0 * (parameters + frozen),
        optimizer=(12.0 * parameters - 4.0 * matrices) / replicas,
        averages=4.0 * averages * parameters / replicas,
        gradients=(4.0 if fp32_accumulation else 2.0) * parameters / replicas,
        buckets=2.0 * min(BUCKETS * bucket, 2 * parameters),
        activations=activations,
        working=working + min(OFFLOAD_BUFFERS, blocks * in_flight) * moved,
        host=HOST_BASE + READ_AHEAD * batch_bytes + moved * blocks * in_flight,
    )


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
