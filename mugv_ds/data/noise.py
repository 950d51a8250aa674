"""Counter-based randomness: what a sample draws depends on (seed, sample id, visit, purpose) and on nothing else.

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
    """A generator of its own for each key: Philox (Salmon et al. 2011) keyed by a 128-bit hash of `key`."""
    encoded = json.dumps(key).encode()  # unambiguous: quoted strings, separated
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def gaussian(seed: int, sample_id: str, visit: int, shape: tuple[int, ...]) -> Tensor:
    """ε, the noise of a sample: float32 `shape`, standard normal, on the CPU."""
    values = generator("noise", seed, sample_id, visit).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values)


def time_normal(seed: int, sample_id: str, visit: int) -> float:
    """n ~ N(0, 1), from which the sample's timestep follows."""
    return float(generator("time", seed, sample_id, visit).standard_normal())


def quartile_uniform(seed: int, sample_id: str, visit: int) -> float:
    """Uniform in [0, 1): where in its quarter of [0, 1000] a held-out sample's timestep is."""
    return float(generator("quartile", seed, sample_id, visit).random())


def caption_uniform(seed: int, sample_id: str, visit: int) -> float:
    """Uniform in [0, 1): the caption is dropped when it is below the share of drops."""
    return float(generator("caption", seed, sample_id, visit).random())


def first_frame_uniform(seed: int, sample_id: str, visit: int) -> float:
    """Uniform in [0, 1): the first latent frame is given clean when it is below the share of such samples."""
    return float(generator("first_frame", seed, sample_id, visit).random())
