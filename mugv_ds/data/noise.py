"""Counter-based random numbers: what a sample draws depends on (seed, sample id, visit, purpose) and on nothing else.

No ambient state is read or written, so every pipeline stage and sequence rank can recompute a sample's draws, a resumed
run repeats none, and the parallel layout changes none. Each purpose has its own stream: adding one shifts no other.
Everything is drawn on the CPU, so the numbers are the same whatever device uses them afterwards.
"""

import hashlib
import json

import numpy as np
import torch
from torch import Tensor


def generator(*key: int | str) -> np.random.Generator:
    """Returns the generator of a key: Philox (Salmon et al. 2011), keyed by a 128-bit hash of `key`."""
    encoded = json.dumps(key).encode()  # unambiguous: quoted strings, separated
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def gaussian(seed: int, sample_id: str, visit: int, shape: tuple[int, ...]) -> Tensor:
    """Draws ε, the noise of a sample: standard normal, float32, of this shape, on the CPU."""
    values = generator("noise", seed, sample_id, visit).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)


def time_normal(seed: int, sample_id: str, visit: int) -> float:
    """Draws a standard normal number, from which `objectives.flow.draw_time` makes the sample's timestep."""
    return float(generator("time", seed, sample_id, visit).standard_normal())


def quartile_uniform(seed: int, sample_id: str, visit: int) -> float:
    """Draws a uniform number in [0, 1): where in its quarter of [0, 1000] a held-out sample's timestep lies."""
    return float(generator("quartile", seed, sample_id, visit).random())


def caption_uniform(seed: int, sample_id: str, visit: int) -> float:
    """Draws a uniform number in [0, 1): the caption is dropped where it is below `flow.caption_drop`."""
    return float(generator("caption", seed, sample_id, visit).random())


def first_frame_uniform(seed: int, sample_id: str, visit: int) -> float:
    """Draws a uniform number in [0, 1): the first frame is given clean where it is below `flow.first_frame_share`."""
    return float(generator("first_frame", seed, sample_id, visit).random())
