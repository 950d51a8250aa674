"""Adapters (LoRA) outside of training: merged into their base, and in peft's format, written and read.

A checkpoint of a run with adapters holds them alone. Their base, the weights that the run started from, is where the
manifest says, and has the digest that it says.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import Manifest, StartWeights
from mugv_ds.checkpoint.reader import CheckpointReader, open_checkpoint
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.post_training_schema import LoraSection
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.schema import TrainConfig
from mugv_ds.models.lora import adapter_shapes, is_factor, merged
from mugv_ds.weights.base import Weights, check_state
from mugv_ds.weights.located import located
from mugv_ds.weights.published import PublishedWeights, TrainedWeights
from mugv_ds.weights.save import new_folder

ADAPTER_CONFIG_NAME, ADAPTER_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files
_MAX_CONFIG_BYTES = 1 << 20
# What of peft's LoraConfig changes the adapter's function, with the values that mean plain LoRA.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_rslora": (False,),
    "use_dora": (False,),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, None, "gaussian"),  # others move the base's weights
}


class MergedWeights(Weights):
    """The weights of a DiT with adapters in them, W + (alpha / rank) · B·A, each made when it is asked for.

    Args:
        base: of the whole DiT, rounded to `dtype` as the run did. adapters: A and B by full name.
        scaling: alpha / rank. dtype: of the tensors; the sum is made in fp32 and rounded once.
    """

    def __init__(self, base: Weights, adapters: Weights, scaling: float, dtype: torch.dtype) -> None:
        self.path, self.text_encoder = adapters.path, adapters.text_encoder
        self._base, self._adapters, self._scaling, self._dtype = base, adapters, scaling, dtype
        self._adapted = {name.removesuffix(".lora_A.weight") for name in adapters if is_factor(name)}

    def __getitem__(self, name: str) -> Tensor:
        weight, linear = self._base[name].to(self._dtype), name.removesuffix(".weight")
        if name.endswith(".weight") and linear in self._adapted:
            a, b = (self._adapters[f"{linear}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
            return merged(weight, a, b, self._scaling).to(self._dtype)
        return weight

    def meta(self, name: str) -> Tensor:
        return self._base.meta(name).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def whole_weights(saved: CheckpointReader, trained: Weights | None = None) -> Weights:
    """Returns the weights of a checkpoint's whole DiT: its own, or its adapters merged into their base.

    Args:
        trained: taken in place of the checkpoint's own, such as an average of them.

    Raises:
        CheckpointError: the base cannot be read; `check_base` says whether it is still what it was.
    """
    run = saved.run_config()
    dtype = torch.bfloat16 if run.model.dtype == "bf16" else torch.float32
    trained = TrainedWeights(saved, dtype) if trained is None else trained
    if run.lora is None:
        return trained
    return MergedWeights(_open_base(saved.manifest), trained, run.lora.scaling, dtype)


def open_start(path: Path) -> Weights:
    """Returns the weights at a path that `weights.start.find_start` gave: published ones, or those of a checkpoint."""
    if not (path / files.MANIFEST_NAME).exists():
        return PublishedWeights(path)
    saved = CheckpointReader(path, files.read_manifest(path))
    return TrainedWeights(saved, torch.float32) if saved.run_config().lora is None else whole_weights(saved)


def _open_base(manifest: Manifest) -> Weights:
    if manifest.start.path is None:
        raise CheckpointError(
            "these adapters were trained on initial weights, which no file holds; start the run from weights "
            "(checkpoint.init_from) to be able to merge them"
        )
    return open_start(located(manifest.start.path))


def check_base(manifest: Manifest) -> None:
    """Checks that the base of a checkpoint's adapters, if it holds adapters, is what it was, and its base, and so on.

    Raises:
        CheckpointError: a base is gone, or is another now.
    """
    if manifest.config.get("lora") is not None and manifest.start.path is not None:
        check_start(manifest.start, "restore them: the checkpoint holds adapters alone")


def check_start(start: StartWeights, remedy: str) -> None:
    """Reads the weights that a run started from once and compares them with what they were then.

    Args:
        start: with path and digest. remedy: what the message tells the user to do.

    Raises:
        CheckpointError: they are gone, or are others now.
    """
    path = located(start.path)
    if not path.exists():
        raise CheckpointError(f"{path}: the weights that the run started from are gone; {remedy}")
    if weights_digest(path) != start.digest:
        raise CheckpointError(f"{path}: not the weights that the run started from any more; {remedy}")
    if (path / files.MANIFEST_NAME).exists():
        check_base(files.read_manifest(path))


def weights_digest(path: Path) -> str:
    """SHA-256 of the weights' files; of a checkpoint that of its manifest, which has its files' hashes.

    Raises:
        CheckpointError: there are no weights at `path`.
    """
    manifest = path / files.MANIFEST_NAME
    held = [manifest] if manifest.exists() else PublishedWeights(path).files
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets the interpreter go
        return hashlib.sha256(b"".join(pool.map(_sha256, held))).hexdigest()


def _sha256(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def export_adapter(checkpoint: Path, out: Path) -> Path:
    """Writes a checkpoint's adapters in peft's format, in the precision that the run computed with.

    Peft finds a model's linears by the end of their full names, which in a DiT is without doubt: `attn.proj` is none
    but `blocks.<n>.attn.proj`, as peft asks for a dot before it.

    Args:
        checkpoint: see `weights.published.export`. out: folder to make.
    Returns:
        The folder, with `adapter_config.json` and `adapter_model.safetensors`.
    Raises:
        CheckpointError: the checkpoint cannot be used or holds no adapters, or `out` cannot be made.
    """
    with open_checkpoint(checkpoint) as saved:
        run = saved.run_config()
        if run.lora is None:
            raise CheckpointError(f"{saved.folder}: holds whole weights, no adapters; export it without --adapter")
        adapters = TrainedWeights(saved, torch.bfloat16 if run.model.dtype == "bf16" else torch.float32)
        tensors = {PREFIX + name: adapters[name] for name in adapters}
        with new_folder(out, sum(tensor.nbytes for tensor in tensors.values())) as partial:
            save_file(tensors, partial / ADAPTER_NAME, metadata={"format": "pt"})
            text = json.dumps(_peft_config(run, saved.manifest.start.path), indent=2)
            (partial / ADAPTER_CONFIG_NAME).write_text(text + "\n")
    return out.absolute()


def _peft_config(run: TrainConfig, base: str | None) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    alpha = run.lora.rank * run.lora.scaling
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": run.lora.rank,
        "target_modules": list(run.lora.targets),
        "task_type": None,
    }


class PeftAdapter(Weights):
    """The tensors of an adapter in peft's format by full name in a DiT. Nothing but safetensors is read.

    Args:
        path: the folder, or the file `adapter_model.safetensors` in it.
        config: sizes of the DiT. lora: what the adapter must be.

    Raises:
        CheckpointError: there is no such adapter, it is no plain LoRA, its rank or scaling is not that of `lora`, or
            its tensors are not those of the targets of `lora`.
    """

    def __init__(self, path: str | Path, config: DiTConfig, lora: LoraSection) -> None:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        self.path = folder / ADAPTER_NAME
        _check_peft_config(folder / ADAPTER_CONFIG_NAME, lora)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path}: there is no such file; other formats of peft are not read")
        self._tensors = PublishedWeights(self.path)
        if stray := next((name for name in self._tensors if not name.startswith(PREFIX)), None):
            raise CheckpointError(f"{self.path}: {stray} must begin with {PREFIX}")
        shapes = adapter_shapes(config, lora)
        wanted = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        check_state(self, wanted, f"adapter of {', '.join(lora.targets)} (lora.targets)")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[PREFIX + name]

    def meta(self, name: str) -> Tensor:
        return self._tensors.meta(PREFIX + name)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(PREFIX) for name in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_peft_config(file: Path, lora: LoraSection) -> None:
    """Raises CheckpointError if an adapter is no plain LoRA of this rank and scaling."""
    try:
        said = json.loads(read_text_file(file, _MAX_CONFIG_BYTES))
        rank, alpha = int(said["r"]), float(said["lora_alpha"])
        odd = next((key for key, plain in _PLAIN.items() if key in said and said[key] not in plain), None)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(f"{file}: must be the adapter_config.json of a LoRA adapter: {why}") from None
    if odd is not None:
        raise CheckpointError(f"{file}: {odd} = {json.dumps(said[odd])[:100]}: not supported; only plain LoRA is")
    if rank != lora.rank:
        raise CheckpointError(f"{file}: its rank r is {rank}; set lora.rank, which is {lora.rank}, to that")
    if alpha / rank != lora.scaling:
        raise CheckpointError(f"{file}: its lora_alpha is {alpha:g}; set lora.alpha to that")


def load_adapter(
    path: str | Path, config: DiTConfig, lora: LoraSection, layers: Iterable[tuple[str, nn.Module]]
) -> None:
    """Copies an adapter in peft's format into parts of a DiT that have adapters, each with the prefix of its names.

    Raises:
        CheckpointError: see `PeftAdapter`.
    """
    adapter = PeftAdapter(located(path), config, lora)
    for prefix, layer in layers:
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if is_factor(name):
                    parameter.copy_(adapter[prefix + name])
