"""The config of the VideoVAE's training: what is refused, in one line that names the key and what would do."""

from pathlib import Path

import pytest

from mugv_ds.config import ConfigError, load_config
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.config.videovae import VideoVAEConfig
from tests.helpers.vae import write_vae_config

CONFIGS = Path(__file__).parents[2] / "ds_configs/vae"
FEATURES = ["loss.target=features", "model.train=temporal"]
GAN = ["gan.warmup_steps=2"]


@pytest.fixture
def path(tmp_path) -> Path:
    return write_vae_config(tmp_path, tmp_path / "train.csv")


def load(path: Path, *overrides: str) -> VaeTrainConfig:
    return load_config(path, overrides, VaeTrainConfig)


@pytest.mark.parametrize(
    "config", sorted(p for p in CONFIGS.rglob("*.json") if p.stem != "common"), ids=lambda p: p.stem
)
def test_the_configs_that_ship_are_valid(config):
    loaded = load_config(config, schema=VaeTrainConfig)
    if "debug" not in config.parts:
        assert loaded.model.videovae() == VideoVAEConfig(), "the published sizes"
    assert load_config(config, schema=VaeTrainConfig).loss.windows == (1, 4, 8)


def test_the_sizes_are_the_published_ones_with_those_of_the_section(path):
    assert load(path).model.videovae() == VideoVAEConfig((8, 8, 8, 8), 1, 4, 8, 1, 4)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["loss.percptual=0.1"], "loss.percptual: unknown key; did you mean loss.perceptual?"),
        (["gann.weight=1"], "gann: unknown key; did you mean gan?"),
        (["flow.shift=1"], "flow: unknown key"),
        (["model.preset=mugdit_10b"], "model.preset: unknown key"),
        (["deepspeed.optimizer={}"], "deepspeed.optimizer: derived"),
        (["model.norm_num_groups=3"], "model: block_out_channels = .*must be multiples of norm_num_groups = 3"),
        ([*FEATURES, "loss.perceptual=0.5"], 'loss.perceptual: has no effect with loss.target = "features"'),
        (["data.size=[24, 20]"], r"data.size = \[24, 20\]: must be multiples of 8"),
        (['data.lengths=[{"frames": 10, "share": 1.0}]'], "data.lengths: 10 frames: must be 8n or 8n . 1; use 8 or 17"),
        (["data.val_frames=7"], "data.val_frames: 7 frames: must be 8n or 8n . 1; use 1 or 9"),
        (['data.lengths=[{"frames": 8, "share": 1.0}, {"frames": 8, "share": 2.0}]'], "may be named once"),
        (["loss.mse=0.0", "loss.l1=0.0"], "nothing would be reconstructed"),
        (["loss.perceptual=0.1"], "loss.perceptual_weights: required when loss.perceptual > 0; `make lpips`"),
        (["loss.target=features"], 'model.train = "all": with loss.target = "features"'),
        ([*FEATURES, *GAN], "gan: judges pixels"),
        (["model.image_vae=a", "checkpoint.init_from=b"], "both name weights to start from"),
        (["optimizer.weight_decay=0.1"], "optimizer.weight_decay: must be 0"),
        (["optimizer.kind=muon"], "optimizer.kind: has no effect on the VideoVAE"),
        (["optimizer.width_reference=72"], "optimizer.width_reference: has no effect on the VideoVAE"),
        (["data.micro_batch_size=3"], "data.micro_batch_size = 3: does not divide data.global_batch_size = 2"),
        (["gan.warmup_steps=6"], "gan.warmup_steps = 6: the run's 6 steps end before"),
        (["gan.width=12"], "gan.width = 12: must be a multiple of 8"),
        (["preview.every=1"], "preview.dir: required"),
        (["preview.every=1", "preview.dir=p"], "data.val_manifest: required when preview.every > 0"),
        (["preview.dir=p"], "preview.dir: has no effect without preview.every"),
        (["logging.eval_every=2"], "logging.eval_every: has no effect without data.val_manifest"),
        (["data.val_window=2"], "data.val_window: has no effect without data.val_manifest"),
        (["loss.identity=1.0"], 'loss.identity: has no effect with loss.target = "pixels"'),
        ([*FEATURES, "loss.adaptive_after=1"], 'loss.adaptive_after: has no effect with loss.target = "features"'),
        ([*FEATURES, "model.activation_checkpointing=true"], "model.activation_checkpointing: has no effect"),
        (["loss.perceptual_frames=2"], "loss.perceptual_frames: has no effect with loss.perceptual = 0"),
        (["loss.l1=0.0", "loss.adaptive_after=1"], "loss.adaptive_after: has no effect with loss.l1 = 0"),
        (
            [*FEATURES, "loss.identity=1.0", 'data.lengths=[{"frames": 8, "share": 1.0}]'],
            "loss.identity: has no effect without images",
        ),
        (["schedule.final_lr_ratio=0.1"], "schedule.final_lr_ratio: has no effect"),
        (["logging.profile_step=7"], "logging.profile_step: has no effect after the last step"),
    ],
)
def test_what_cannot_be_meant_is_refused(path, overrides, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load(path, *overrides)
