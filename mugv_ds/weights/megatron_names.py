"""Maps names and layouts of a DiT's tensors in the published Megatron checkpoints to those of its published weights."""

import re

from einops import rearrange
from torch import Tensor

from mugv_ds.config.model import HEAD_DIM
from mugv_ds.weights.base import UNUSED

# Megatron's name of a tensor or module → the published one, outside and inside of a block.
_OUTSIDE = {
    "start_token": "start_token",
    "end_token": "end_token",
    "x_embedder": "x_embedder",
    "fps_embedder": "fps_embedder",
    "timestep_embedder": "t_embedder",
    "timestep_block": "t_block",
    "context_embedder.proj": "y_embedder.y_proj",
    "context_embedder.drop_emb": UNUSED,
    "final_layer.linear": "final_layer.linear",
    "final_layer.scale_shift_table.bias": "final_layer.scale_shift_table",
}
_IN_BLOCK = {
    "scale_shift_table.bias": "scale_shift_table",
    "self_attention.linear_qkv": "attn.qkv",
    "self_attention.linear_proj": "attn.proj",
    "self_attention.q_layernorm": "attn.q_norm",
    "self_attention.k_layernorm": "attn.k_norm",
    "pre_cross_attn_layernorm": "cross_attn_norm",
    "cross_attention.linear_q": "cross_attn.q_linear",
    "cross_attention.linear_kv": "cross_attn.kv_linear",
    "cross_attention.linear_proj": "cross_attn.proj",
    "cross_attention.q_layernorm": "cross_attn.q_norm",
    "cross_attention.k_layernorm": "cross_attn.k_norm",
    "mlp.linear_fc1": "mlp.fc1",
    "mlp.linear_fc2": "mlp.fc2",
}
# Column-parallel linears, whose rows (outputs) ranks split, and row-parallel ones, whose columns (inputs) ranks split.
_ROWS_SPLIT = re.compile(r"linear_(qkv|q|kv|fc1)\.(weight|bias)$")
_COLUMNS_SPLIT = re.compile(r"linear_(proj|fc2)\.weight$")
_ROW_GROUPS = {"attn.qkv": 3, "cross_attn.kv_linear": 2}  # q, k, v; k, v

STACKED = "decoder.layers."  # what precedes the names of a block's tensors


def is_weight(name: str) -> bool:
    """Tells weights from what else a training checkpoint holds: optimizer, random state, state of fp8 layers."""
    return not (name.startswith(("optimizer.", "rng_state")) or name.endswith("_extra_state"))


def published_name(name: str) -> str | None:
    """Returns the published name of a Megatron tensor (with its layer's index), None if a DiT has no such tensor."""
    in_block = re.fullmatch(rf"{re.escape(STACKED)}(0|[1-9]\d*)\.(.+)", name)
    prefix, local, table = (f"blocks.{in_block[1]}.", in_block[2], _IN_BLOCK) if in_block else ("", name, _OUTSIDE)
    for theirs, ours in table.items():
        if local == theirs or local.startswith(f"{theirs}."):
            return prefix + ours + local.removeprefix(theirs)
    return None


def split_dimension(name: str) -> int | None:
    """Returns the dimension along which tensor-parallel ranks split a Megatron tensor; None if each holds all of it."""
    if _ROWS_SPLIT.search(name):
        return 0
    return 1 if _COLUMNS_SPLIT.search(name) else None


def published_rows(name: str, value: Tensor) -> Tensor:
    """Reorders a tensor's rows as the published `name` has them.

    Megatron's rows are q, k, v of the first head, then of the second; the published ones are q of all heads, then k, v.
    """
    groups = next((count for module, count in _ROW_GROUPS.items() if f".{module}." in name), 1)
    return value if groups == 1 else rearrange(value, "(h g d) ... -> (g h d) ...", g=groups, d=HEAD_DIM)
