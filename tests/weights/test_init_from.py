"""A run that starts from imported weights, on two pipeline stages."""

from pathlib import Path

import pytest
import torch

from mugv_ds.config import load_config
from mugv_ds.config.errors import CheckpointError, PeerError
from mugv_ds.config.text_encoder import read_text_encoder, write_text_encoder
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.train import train
from mugv_ds.weights.convert import import_weights
from mugv_ds.weights.published import export, load_dit
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, write_config, write_dataset
from tests.helpers.distributed import run_ranks
from tests.helpers.megatron import write_legacy


def start(config: Path) -> None:
    train(load_config(config, []))


def start_in_vain(config: Path) -> None:
    with pytest.raises((CheckpointError, PeerError), match=r"init_from = .*6 tokens.*the data: .*7 tokens|rank 0 fail"):
        train(load_config(config, []))
    with pytest.raises(CheckpointError, match=r"has blocks\.2\."):  # on both ranks, and none waits for the other
        train(load_config(config, ["checkpoint.accept_changed_data=true"]))


def run_from(tmp_path: Path, depth: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """Config of a run, of two blocks and one step, from Megatron weights of so many blocks; and those weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = DiT(DiTConfig(144, 2, depth, caption_channels=CHANNELS)).state_dict()
    state = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in shapes.items()}
    import_weights(write_legacy(tmp_path / "megatron", state, 2), tmp_path / "weights")
    config = write_config(
        tmp_path / "run",
        write_dataset(tmp_path / "data", [(1, 4, 4)] * 4),
        parallel={"pipeline": 2},
        optimizer={"lr": 1e-30},
        schedule={"steps": 1, "warmup_steps": 0},
        checkpoint={"init_from": str(tmp_path / "weights")},
    )
    return config, state


def test_a_run_starts_from_the_weights_that_were_imported(tmp_path):
    """With a learning rate that rounds away, the weights after a step are those that went in."""
    config, state = run_from(tmp_path, depth=2)
    info = HashTextEncoder(CHANNELS, TEXT_TOKENS).info
    write_text_encoder(tmp_path / "data", info)
    run_ranks(2, start, config)
    export(tmp_path / "run/checkpoints", tmp_path / "out", layout="pt")
    assert read_text_encoder(tmp_path / "out") == info
    trained = load_dit(tmp_path / "out").state_dict()
    assert trained.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-25, msg=name)


def test_weights_of_another_text_encoder_or_depth_end_the_run_on_every_rank(tmp_path):
    config, _ = run_from(tmp_path, depth=3)
    write_text_encoder(tmp_path / "weights", HashTextEncoder(CHANNELS, 6).info)
    write_text_encoder(tmp_path / "data", HashTextEncoder(CHANNELS, 7).info)
    run_ranks(2, start_in_vain, config)
