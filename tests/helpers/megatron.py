"""Megatron training checkpoints in both published forms, made of a DiT's weights without Megatron."""

import argparse
import re
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from einops import rearrange
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import _create_write_items

RENAMED = [
    (r"^t_embedder\.", "timestep_embedder."),
    (r"^t_block\.", "timestep_block."),
    (r"^y_embedder\.y_proj\.", "context_embedder.proj."),
    (r"scale_shift_table$", "scale_shift_table.bias"),
    (r"^blocks\.", "decoder.layers."),
    (r"cross_attn_norm", "pre_cross_attn_layernorm"),
    (r"cross_attn\.([qk])_norm", r"cross_attention.\1_layernorm"),
    (r"cross_attn\.(q|kv)_linear", r"cross_attention.linear_\1"),
    (r"cross_attn\.proj", "cross_attention.linear_proj"),
    (r"\.attn\.([qk])_norm", r".self_attention.\1_layernorm"),
    (r"\.attn\.(qkv|proj)", r".self_attention.linear_\1"),
    (r"mlp\.fc", "mlp.linear_fc"),
]


def as_megatron(name: str, value: Tensor) -> tuple[str, Tensor]:
    """A published tensor as Megatron names it, a layer's index in the name, and orders its rows."""
    if ".qkv." in name or ".kv_linear." in name:
        value = rearrange(value, "(g h d) ... -> (h g d) ...", g=3 if ".qkv." in name else 2, d=72)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name, value


def write_legacy(folder: Path, state: dict[str, Tensor], ranks: int) -> Path:
    """A run's folder with an iteration in the legacy form; optimizer, arguments and random state as Megatron's."""
    for rank in range(ranks):
        model = {
            "decoder.layers.0.self_attention.linear_qkv._extra_state": None,
            "context_embedder.drop_emb": torch.ones(2),
        }
        for published, tensor in state.items():
            name, value = as_megatron(published, tensor)
            if re.search(r"linear_(qkv|q|kv|fc1)\.", name):
                value = value.chunk(ranks, 0)[rank].clone()
            elif re.search(r"linear_(proj|fc2)\.weight", name):
                value = value.chunk(ranks, 1)[rank].clone()
            model[name] = value
        target = folder / f"iter_0000100/mp_rank_{rank:02d}"
        target.mkdir(parents=True)
        beside = {
            "args": argparse.Namespace(hidden_size=288, params_dtype=torch.float32, steps=np.arange(3)),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
            "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state()}],
        }
        torch.save({"model": model, "iteration": 100, **beside}, target / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("100\n")
    return folder


class Boxes(dcp.DefaultSavePlanner):
    """Saves stacked tensors in boxes of some layers and a share of the rows, as tensor-parallel ranks do.

    Args:
        layers: in a box. ranks: over which the rows of a stacked matrix are spread.
    """

    def __init__(self, layers: int, ranks: int) -> None:
        super().__init__(flatten_state_dict=False)
        self.layers, self.ranks = layers, ranks

    def create_local_plan(self) -> SavePlan:
        return SavePlan([item for name, value in self.state_dict.items() for item in self._items(name, value)])

    def _items(self, name: str, value: object) -> Iterator[WriteItem]:
        if not (name.startswith("decoder.") and isinstance(value, Tensor)):
            yield from _create_write_items(name, value)
            return
        steps = [self.layers, value.shape[1] // (self.ranks if value.dim() == 3 else 1), *value.shape[2:]]
        for offset in product(*(range(0, n, step) for n, step in zip(value.shape, steps, strict=True))):
            size = torch.Size(min(step, n - o) for step, n, o in zip(steps, value.shape, offset, strict=True))
            box = ChunkStorageMetadata(torch.Size(offset), size)
            data = TensorWriteData(box, TensorProperties.create_from_tensor(value), value.shape)
            yield WriteItem(MetadataIndex(name, offset), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> object:
        if write_item.type != WriteItemType.SHARD:
            return super().resolve_data(write_item)
        box = write_item.tensor_data.chunk
        value = self.state_dict[write_item.index.fqn]
        return value[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))].clone()


def stack_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors as torch_dist has them: by Megatron name, those of the layers stacked. On any device."""
    stacks: dict[str, list[Tensor]] = {}
    for published, tensor in state.items():
        name, value = as_megatron(published, tensor)
        stacks.setdefault(re.sub(r"^(decoder\.layers)\.\d+", r"\1", name), []).append(value)
    return {name: torch.stack(values) if name.startswith("decoder.") else values[0] for name, values in stacks.items()}


def write_stacked(folder: Path, stacked: dict[str, Tensor], *, layers: int = 1, ranks: int = 1) -> Path:
    """An iteration's folder in the torch_dist form, of what `stack_layers` gives; other arguments as `Boxes`."""
    beside = {
        "optimizer.state.exp_avg": torch.ones(2, dtype=torch.int8),
        "rng_state/shard_0": [1, 2],
        "context_embedder.drop_emb": torch.ones(2),
        "decoder.layers.mlp.linear_fc1._extra_state": b"fp8",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(stacked | beside, checkpoint_id=folder, planner=Boxes(layers, ranks), no_dist=True)
    return folder
