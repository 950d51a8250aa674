"""Previews show what the weights give, whatever the layout, and leave training as it is."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.config import load_config
from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import open_index
from mugv_ds.data.noise import gaussian
from mugv_ds.data.run_data import RunData
from mugv_ds.data.sample import read_row, read_text
from mugv_ds.data.video import read_mp4
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.loop import Trainer
from mugv_ds.engine.preview import Previews
from mugv_ds.engine.process import GlooGroup, Process, start_process
from mugv_ds.models import DiT
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.flops import SampleCost
from mugv_ds.parallel.layout import Layout
from mugv_ds.sampling.sampler import sample_latents
from mugv_ds.train import train
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, write_config, write_dataset
from tests.helpers.distributed import run_ranks

TRAINED = [(2, 4, 6), (1, 4, 4)] * 4  # the steps alternate between the two
# 47 tokens: the shares of two ranks differ. The last shape previewed is not that of the step before, but of that after.
PREVIEWED = [(1, 4, 4), (3, 6, 9), (2, 4, 6)]
STEPS, EVERY, SAMPLER_STEPS, GUIDANCE = 3, 2, 2, 3.0
DUE = ["step-000002", "step-000003"]
CASES = {
    "dp1-sp1-pp1": (1, 1, 1),
    "dp1-sp2-pp2": (1, 2, 2),
    "dp2-sp1-pp2": (2, 1, 2),
    "dp4-sp1-pp1": (4, 1, 1),  # more replicas than rows
    "bf16": (1, 2, 2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, TRAINED)
    write_dataset(root, [*PREVIEWED, (1, 4, 4)], "preview")
    LinearCodec().save(root / "codec.safetensors")
    with (root / "preview.csv").open() as file, (root / "captioned.csv").open("w", newline="") as out:
        header, first, *others = csv.reader(file)
        rows = csv.writer(out)
        rows.writerow([*header, "caption", "fps"])
        rows.writerow([*first, "../A red Circle!", "12"])
        rows.writerows([*row, "", ""] for row in others)
    return root


def configure(folder: Path, data: Path, layout: tuple[int, int, int], name: str = "", **preview) -> TrainConfig:
    path = write_config(
        folder,
        data / "train.csv",
        model={"precision": "bf16" if name == "bf16" else "fp32", "attention": "sdpa"},
        parallel=dict(zip(("data", "sequence", "pipeline"), layout, strict=True)),
        schedule={"steps": STEPS},
        checkpoint={"save_every": 0},
        logging={"every": 1},
        preview={
            "every": EVERY,
            "manifest": str(data / "preview.csv"),
            "count": len(PREVIEWED),
            "steps": SAMPLER_STEPS,
            "guidance": GUIDANCE,
            "first_frame": True,
            "dir": str(folder / "previews"),
            **preview,
        },
    )
    return load_config(path)


def unsettle(layers: list[tuple[str, torch.nn.Module]]) -> None:
    """Moves the weights that start at zero: with those at zero, no prompt would matter."""
    for prefix, layer in layers:
        for name, parameter in layer.named_parameters():
            if prefix + name == "final_layer.linear.weight" or name == "cross_attn.proj.weight":
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(prefix)))


class NoStore:
    """What a run that never saves needs of a store."""

    state: ClassVar[dict] = {}

    def poll(self) -> None: ...

    def wait(self) -> None: ...


def run_case(config: TrainConfig, folder: Path) -> None:
    """Trains; the stages' last weights go into the folder."""
    process = start_process(config)
    data = RunData(config, SampleCost.of(config), process.layout.data)
    module = (engine := build_engine(config, process, TRAINED[0], weights=unsettle)).module
    previews = None
    if config.preview.every:
        previews = Previews(config, process, module, data.previewed, sample_latents)
    ema = PowerEma([], ())
    trainer = Trainer(
        config,
        process,
        engine,
        data=data,
        reference=None,
        ema=ema,
        store=NoStore(),
        previews=previews,
    )
    trainer.run(0)
    if process.coordinates.data == process.coordinates.sequence == 0:
        weights = {prefix + name: p for prefix, layer in module.named_layers() for name, p in layer.named_parameters()}
        save_file(weights, folder / f"stage-{process.coordinates.stage}.safetensors")


def run_cases(cases: list[tuple[TrainConfig, Path]], command: TrainConfig | None) -> None:
    """Runs the cases and then, since it leaves the process group, what the command would run."""
    for case in cases:
        run_case(*case)
    if command is not None:
        train(command)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data) -> Path:
    """A folder with a run with previews and one without for each case, and one of the whole command with a codec."""
    folder = tmp_path_factory.mktemp("runs")
    worlds: dict[int, list] = {}
    for name, layout in CASES.items():
        for kind, every in (("with", EVERY), ("without", 0)):
            out = folder / name / kind
            these = worlds.setdefault(layout[0] * layout[1] * layout[2], [])
            these.append((configure(out, data, layout, name, every=every), out))
    videos = {"manifest": str(data / "captioned.csv"), "codec": str(data / "codec.safetensors")}
    commands = {1: configure(folder / "command", data, (1, 1, 1), **videos)}
    for index in ("train.csv", "preview.csv"):
        open_index(data / index)  # built once, here
    for world, these in worlds.items():
        run_ranks(world, run_cases, these, commands.get(world))
    return folder


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    return found


def expected_latents(folder: Path, data: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """By the plain sampler with the plain model, from the weights that the run ended with."""
    weights = {k: v for file in folder.glob("stage-*.safetensors") for k, v in load_file(file).items()}
    model = DiT(load_config(folder / "config.json").model.dit()).to(dtype)
    model.load_state_dict(weights, strict=True)
    index, latents = open_index(data / "preview.csv"), []
    null_text, null_mask = read_text(data / "text_features/negative.pt", CHANNELS, TEXT_TOKENS)
    for i, shape in enumerate(PREVIEWED):
        given = read_row(index, i, channels=CHANNELS, max_text_tokens=TEXT_TOKENS)
        latent = sample_latents(
            model,
            noise=gaussian(6309, f"preview-{i}", 0, (24, *shape))[None],
            reference=given.latent[None],
            frame_mask=torch.tensor([[shape[0] == 1] + [True] * (shape[0] - 1)]),
            text=given.text[None],
            text_mask=given.text_mask[None],
            negative_text=null_text[None],
            negative_mask=null_mask[None],
            fps=torch.tensor([30.0]),
            height=8 * shape[1],
            width=8 * shape[2],
            steps=SAMPLER_STEPS,
            guidance=GUIDANCE,
        )
        latents.append(latent[0])
    return latents


@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_one_plain_model(case, runs, data):
    dtype, tolerance = (torch.bfloat16, 3e-2) if case == "bf16" else (torch.float32, 1e-5)
    expected = expected_latents(runs / case / "with", data, dtype)
    folder = runs / case / "with" / "previews"
    assert sorted(path.name for path in folder.iterdir()) == DUE
    for i, latent in enumerate(expected):
        first, last = (load_file(folder / step / f"{i:02d}-preview-{i}.safetensors")["latent"] for step in DUE)
        assert float((last - latent).norm() / latent.norm()) <= tolerance, i
        assert not torch.equal(first, last), "the weights must move, or the comparison shows nothing"


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_without_previews(case, runs):
    curves = [
        {event.step: event.value for event in events(runs / case / kind).Scalars("train/loss")}
        for kind in ("with", "without")
    ]
    assert curves[0] == curves[1] and list(curves[0]) == list(range(1, STEPS + 1))


def test_videos_are_on_disk_and_in_tensorboard(runs):
    """The first clip's caption names its file, the others their samples."""
    out = runs / "command"
    names = ["00-a-red-circle", "01-preview-1", "02-preview-2"]
    for folder in DUE:
        written = sorted(path.name for path in (out / "previews" / folder).iterdir())
        assert written == [f"{name}.mp4" for name in names]
    sizes = [(8, 32, 32), (24, 48, 72), (16, 32, 48)]
    shown = events(out)
    assert shown.Tags()["images"] == [f"preview/{name}" for name in names]
    for name, size, fps in zip(names, sizes, (12, 30, 30), strict=True):
        frames, rate = read_mp4(out / "previews" / DUE[-1] / f"{name}.mp4")
        assert frames.shape == (*size, 3) and rate == fps
        images = shown.Images(f"preview/{name}")
        assert [event.step for event in images] == [2, 3]
        with Image.open(io.BytesIO(images[-1].encoded_image_string)) as image:
            assert (image.format, image.size) == ("GIF", (images[-1].width, images[-1].height)) == ("GIF", size[:0:-1])


@pytest.fixture
def alone() -> Iterator[Process]:
    """This process, without the others."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    host = GlooGroup(dist.group.WORLD)
    yield Process(0, Layout(), Layout().coordinates(0), torch.device("cpu"), None, host, host)
    dist.destroy_process_group()


def test_what_cannot_be_previewed_is_named(tmp_path, data, alone):
    (tmp_path / "file").write_text("not a folder, nor a codec")
    file = str(tmp_path / "file")
    broken = write_dataset(tmp_path / "broken", PREVIEWED)
    (tmp_path / "broken/text_features/train-1_text.pt").write_bytes(b"PK")
    no_null = write_dataset(tmp_path / "no_null", PREVIEWED)
    (tmp_path / "no_null/text_features/negative.pt").unlink()
    settings = [
        ({"count": 9}, "preview.count = 9: .*preview.csv has 4 rows"),
        ({"codec": file}, f"preview.codec = {file}: not a codec"),
        ({"codec": str(tmp_path / "nowhere")}, "preview.codec = .*nowhere: not a codec"),
        ({"manifest": str(broken)}, "preview.manifest: .*train-1_text.pt.*repair"),
        ({"manifest": str(no_null)}, "data.null_text_path: .*negative.pt: missing"),
    ]
    for values, complaint in settings:
        config = configure(tmp_path / "run", data, (1, 1, 1), **values)
        with pytest.raises(ConfigError, match=complaint):
            Previews(config, alone, None, open_index(config.preview.manifest), sample_latents)


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path, data, alone, capsys):
    config = configure(tmp_path, data, (1, 1, 1))
    previews = Previews(config, alone, None, open_index(config.preview.manifest), lambda _, noise, **given: noise)
    (tmp_path / "previews/step-000002").write_text("in the way")
    for step in (2, 2, 3):
        previews.write(step, None, lambda: None)
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"warning: preview.dir = {tmp_path}/previews: " in warning and "step-000002" in warning
    assert len(list((tmp_path / "previews/step-000003").iterdir())) == len(PREVIEWED), "it is tried again each time"


def test_a_folder_that_cannot_be_made_is_warned_of_at_the_start(tmp_path, data, alone, capsys):
    (tmp_path / "file").write_text("in the way")
    config = configure(tmp_path / "run", data, (1, 1, 1), dir=str(tmp_path / "file"))
    Previews(config, alone, None, open_index(config.preview.manifest), sample_latents)
    assert f"warning: preview.dir = {tmp_path}/file: " in capsys.readouterr().err
