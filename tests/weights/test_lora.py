"""What becomes of a run's adapters: merged weights, peft's format, later runs; and what is refused."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mugv_ds.checkpoint.reader import open_checkpoint
from mugv_ds.cli.convert_hf import main as convert
from mugv_ds.cli.ema import main as average
from mugv_ds.config import CheckpointError, load_config
from mugv_ds.config.post_training_schema import LORA_TARGETS, LoraSection
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights
from mugv_ds.models.lora import add_adapters, is_factor
from mugv_ds.train import train
from mugv_ds.weights.lora import ADAPTER_CONFIG_NAME, ADAPTER_NAME, PREFIX, PeftAdapter, export_adapter
from mugv_ds.weights.published import export, load_dit
from mugv_ds.weights.start import find_start, load_into
from tests.helpers.dataset import CHANNELS, write_config, write_dataset
from tests.helpers.distributed import run_ranks
from tests.helpers.records import relative
from tests.helpers.saved import write_checkpoint
from tests.parallel.test_layouts import perturb

CONFIG = DiTConfig(144, 2, 2, caption_channels=CHANNELS)
LORA = {"rank": 4, "alpha": 6.0}


def base_model() -> DiT:
    model = DiT(CONFIG)
    init_weights(model, "", seed=3)
    perturb([("", model)])
    return model


def configure(root: Path, steps: int = 4, **sections: dict) -> Path:
    given = {"checkpoint": {"init_from": str(root / "base.safetensors"), "save_every": 2, "keep_every": 2}}
    given |= {"lora": LORA, "schedule": {"steps": steps, "warmup_steps": 0}, "optimizer": {"lr": 0.03}}
    return write_config(root / "run", root / "data/train.csv", **(given | sections))


def train_and_refuse(root: Path) -> None:
    """Trains; then the base is changed, and is gone, when the run wants to go on; then so is the section."""
    path = configure(root)
    train(load_config(path))
    base, longer = root / "base.safetensors", partial(load_config, path)
    kept = base.read_bytes()
    base.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"base.safetensors: not the weights that the run started from any more"):
        train(longer(["schedule.steps=6"]))
    base.unlink()
    with pytest.raises(CheckpointError, match=r"base.safetensors: the weights .* are gone; restore them"):
        train(longer(["schedule.steps=6"]))
    base.write_bytes(kept)
    with pytest.raises(
        CheckpointError, match=r'lora = \{"rank": 4, "alpha": 6.0.*this one has \{"rank": 4, "alpha": 4'
    ):
        train(longer(["schedule.steps=6", "lora.alpha=4"]))
    train(longer(["schedule.steps=6"]))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base, and a run with adapters on it of four steps and then two more; checkpoints of steps 0, 2, 4 and 6."""
    root = tmp_path_factory.mktemp("lora")
    write_dataset(root / "data", [(1, 4, 4)] * 8)
    save_file(base_model().state_dict(), root / "base.safetensors")
    run_ranks(1, train_and_refuse, root)
    return root


@pytest.fixture(scope="module")
def adapted(root) -> DiT:
    """The base with the run's adapters, as training has it."""
    model = base_model().requires_grad_(False)
    for block in model.blocks:
        add_adapters(block, LoraSection(**LORA))
    with open_checkpoint(root / "run/checkpoints") as saved:
        assert saved.manifest.step == 6
        factors = {name: saved.read(name) for name in saved.names()}
    assert all(map(is_factor, factors)) and all(factor.any() for factor in factors.values())
    missing, unexpected = model.load_state_dict(factors, strict=False)
    assert not unexpected and not any(map(is_factor, missing))
    return model


def output(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 24, 2, 4, 4, generator=generator), torch.randn(1, 5, CHANNELS, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([400.0]), text)


def test_merged_weights_give_the_adapters_output(root, adapted, tmp_path):
    whole = load_dit(export(root / "run/checkpoints", tmp_path / "dit", layout="pt"))
    assert relative(output(whole), output(adapted)) < 1e-5
    assert relative(output(base_model()), output(adapted)) > 1e-3, "the adapters must do something"


def test_peft_itself_loads_the_export_and_gives_the_same_output(root, adapted, tmp_path):
    import peft  # takes seconds

    assert convert(["--ckpt", str(root / "run/checkpoints"), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    model = peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "adapter"))
    wrapped = {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert wrapped == {f"{PREFIX}blocks.{i}.{target}" for i in range(2) for target in LORA_TARGETS}
    assert relative(output(model), output(adapted)) < 1e-5
    assert relative(output(model.merge_and_unload()), output(adapted)) < 1e-5


def test_what_peft_writes_is_what_we_read(root, adapted, tmp_path):
    """The export through peft and back, byte for byte; and what it adds to the config is no hindrance."""
    import peft  # takes seconds

    export_adapter(root / "run/checkpoints", tmp_path / "adapter")
    peft.PeftModel.from_pretrained(base_model(), str(tmp_path / "adapter")).save_pretrained(str(tmp_path / "again"))
    read = PeftAdapter(tmp_path / "again", CONFIG, LoraSection(**LORA))
    own = {name: p for name, p in adapted.named_parameters() if is_factor(name)}
    assert read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)


def test_a_later_run_starts_from_the_merged_weights(root, adapted):
    model = DiT(CONFIG)
    load_into(find_start(root / "run/checkpoints"), CONFIG, [("", model)])
    assert relative(output(model), output(adapted)) < 1e-5
    copied = root / "copied"
    shutil.copytree(root / "run/checkpoints", copied)
    hidden = root / "base.safetensors"
    hidden.rename(root / "elsewhere")
    try:
        with pytest.raises(CheckpointError, match="the weights that the run started from are gone"):
            find_start(copied)
        with pytest.raises(CheckpointError, match="the weights that the run started from are gone"):
            export(root / "run/checkpoints", root / "unused", layout="pt")
    finally:
        (root / "elsewhere").rename(hidden)


def test_averages_of_adapters_are_merged(root, tmp_path):
    """Of A and B each, as the run's own averages are."""
    folders = [str(root / f"run/checkpoints/step-0000000{step}") for step in (4, 6)]
    assert average(["ensemble", "--gamma", "1", "--out", str(tmp_path / "mean"), *folders]) == 0
    mean = load_file(tmp_path / "mean/model.safetensors")
    factors = []
    for folder in folders:
        with open_checkpoint(Path(folder)) as saved:
            factors.append({name: saved.read(name) for name in saved.names()})
    linear = "blocks.1.mlp.fc1"
    a, b = (sum(of[f"{linear}.{factor}.weight"] for of in factors) / 2 for factor in ("lora_A", "lora_B"))
    base = base_model().state_dict()
    torch.testing.assert_close(mean[f"{linear}.weight"], base[f"{linear}.weight"] + 1.5 * b @ a, rtol=1e-5, atol=1e-6)
    assert torch.equal(mean[f"{linear}.bias"], base[f"{linear}.bias"])


def test_whole_weights_are_no_adapter(root, tmp_path, capsys):
    write_checkpoint(tmp_path / "run", 1, base_model().state_dict().items())
    assert convert(["--ckpt", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--adapter"]) == 2
    assert "holds whole weights, no adapters" in capsys.readouterr().err and not (tmp_path / "adapter").exists()


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A sound adapter in peft's format."""
    model = base_model()
    for block in model.blocks:
        add_adapters(block, LoraSection(**LORA))
    init_weights(model, "", seed=0)
    write(tmp_path, {PREFIX + name: p.detach() for name, p in model.named_parameters() if is_factor(name)})
    return tmp_path


def write(folder: Path, tensors: dict[str, Tensor], **about) -> None:
    save_file(tensors, folder / ADAPTER_NAME)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": "all-linear", **about}
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))


def read(folder: Path) -> PeftAdapter:
    return PeftAdapter(folder, CONFIG, LoraSection(**LORA))


def test_a_sound_adapter_is_read_by_its_folder_and_its_file(adapter):
    assert len(read(adapter)) == len(read(adapter / ADAPTER_NAME)) == 2 * 2 * 7


@pytest.mark.parametrize(
    ("about", "complaint"),
    [
        ({"r": 8}, "its rank r is 8; set lora.rank, which is 4, to that"),
        ({"lora_alpha": 4}, "its lora_alpha is 4; set lora.alpha to that"),
        ({"use_dora": True}, "use_dora = true: not supported"),
        ({"use_rslora": True}, "use_rslora = true: not supported"),
        ({"rank_pattern": {"qkv": 2}}, 'rank_pattern = {"qkv": 2}: not supported'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa": not supported'),
        ({"peft_type": "LOHA"}, 'peft_type = "LOHA": not supported'),
        ({"bias": "all"}, 'bias = "all": not supported'),
        ({"r": 0}, "must be the adapter_config.json of a LoRA adapter|its rank r is 0"),
        ({"r": None}, "must be the adapter_config.json of a LoRA adapter"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(adapter, about, complaint):
    write(adapter, load_file(adapter / ADAPTER_NAME), **about)
    with pytest.raises(CheckpointError, match=complaint):
        read(adapter)


def test_tensors_must_be_those_of_the_targets(adapter):
    tensors = load_file(adapter / ADAPTER_NAME)
    name = f"{PREFIX}blocks.1.attn.proj.lora_A.weight"
    cases = [
        (tensors | {name: torch.zeros(4, 145)}, r"blocks\.1\.attn\.proj\.lora_A\.weight is \[4, 145\]"),
        ({key: value for key, value in tensors.items() if key != name}, "has no blocks.1.attn.proj.lora_A.weight"),
        (tensors | {f"{PREFIX}blocks.2.attn.proj.lora_A.weight": torch.zeros(4, 144)}, "has blocks.2.attn.proj"),
        (tensors | {"lora_A.weight": torch.zeros(4, 144)}, "lora_A.weight must begin with base_model.model"),
    ]
    for given, complaint in cases:
        write(adapter, given)
        with pytest.raises(CheckpointError, match=complaint):
            read(adapter)


def test_pickles_are_not_read(adapter):
    (adapter / ADAPTER_NAME).rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="other formats of peft are not read"):
        read(adapter)
    (adapter / ADAPTER_CONFIG_NAME).unlink()
    with pytest.raises(CheckpointError, match=ADAPTER_CONFIG_NAME):
        read(adapter)
