"""Tells T5 encoders apart by what they compute, not by where or in which files they lie."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# Of transformers' config, what the encoder's arithmetic depends on.
_SIZES = (
    *("model_type", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj"),
    *("layer_norm_epsilon", "relative_attention_num_buckets", "relative_attention_max_distance"),
)
# Ids of a text in which case, numbers, tags, accents and spaces show how the tokenizer treats them.
_PROBE = "A red Circle, 3.5 × <b>BOLD</b>  naïve — straße;\taesthetic score: 6.0."
_EMBEDDING = "shared.weight"  # tied to `encoder.embed_tokens.weight`; files hold either or both


def t5_fingerprint(folder: Path, config, tokenizer) -> tuple[str, set[torch.dtype]]:
    """Returns the hex SHA-256 of an encoder, and the dtypes that its weights are stored in.

    It covers sizes, vocabulary, the ids of a probe, and of every tensor of the encoder name, shape and the first and
    the last row, rounded to bf16. Training moves every tensor, so these rows tell versions apart; reading them takes
    megabytes where XXL has 19 GB. Rounding makes copies in bf16 and in fp32 the same encoder, and neither the decoder
    nor the cut into shards matters. It does not show damage: that is what checksums are for.

    Args:
        folder: with `model.safetensors` or its shards. config, tokenizer: of transformers.

    Raises:
        OSError, SafetensorError: a file cannot be read.
    """
    about = {
        "sizes": {name: getattr(config, name, None) for name in _SIZES},
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": tokenizer(_PROBE, verbose=False)["input_ids"],
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    sampled: dict[str, tuple[list[int], Tensor]] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name == _EMBEDDING or name.startswith("encoder."):
                    known = _EMBEDDING if name == "encoder.embed_tokens.weight" else name
                    sampled[known] = _sample(tensors.get_slice(name))
    for name, (shape, rows) in sorted(sampled.items()):
        digest.update(f"{name} {shape}".encode())
        digest.update(rows.bfloat16().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest(), {rows.dtype for _, rows in sampled.values()}


def _sample(stored) -> tuple[list[int], Tensor]:
    """Returns a stored tensor's shape, and its first and last row, or a vector whole."""
    shape = stored.get_shape()
    if len(shape) < 2:
        return shape, stored[:]
    return shape, torch.cat([stored[:1], stored[shape[0] - 1 :]])
