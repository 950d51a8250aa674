"""Previews show what the weights give, whatever the layout, and leave training as it is."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.checkpoint.fragments import Fragment, fragments, refresh_weights
from mugv_ds.config import load_config
from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import open_index
from mugv_ds.data.noise import gaussian
from mugv_ds.data.run_data import RunData
from mugv_ds.data.sample import read_row, read_text
from mugv_ds.data.video import read_mp4, to_frames
from mugv_ds.engine import preview_codec
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.loop import Trainer
from mugv_ds.engine.preview import Previews
from mugv_ds.engine.preview_codec import PreviewCodec
from mugv_ds.engine.process import GlooGroup, Process, start_process
from mugv_ds.models import DiT
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.flops import SampleCost
from mugv_ds.parallel.layout import Layout
from mugv_ds.sampling.sampler import sample_latents
from mugv_ds.train import train
from mugv_ds.weights.codec import load_codec
from mugv_ds.weights.videovae import load_video_vae
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, write_config, write_dataset
from tests.helpers.distributed import run_ranks
from tests.helpers.records import load_vae_record

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
# Previews alone: with the VideoVAE, and by an average of the weights.
MORE = {"vae": (1, 2, 2), "ema": (1, 2, 2), "ema-bf16": (2, 1, 2)}
SIGMA = 0.25  # so long that after three steps the average is far from the weights


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, TRAINED)
    write_dataset(root, [*PREVIEWED, (1, 4, 4)], "preview")
    LinearCodec().save(root / "codec.safetensors")
    vae, *_ = load_vae_record("vae_lengths")
    torch.save(vae.state_dict(), root / "vae.pt")
    (root / "vae.json").write_text(json.dumps(asdict(vae.config)))
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
        model={"precision": "bf16" if name.endswith("bf16") else "fp32", "attention": "sdpa"},
        parallel=dict(zip(("data", "sequence", "pipeline"), layout, strict=True)),
        schedule={"steps": STEPS},
        ema={"sigma_rel": [SIGMA]},
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


class CheckedPreviews(Previews):
    """Previews after which everything is as before, bit for bit."""

    def __init__(self, *given, watched: list[torch.Tensor], **options) -> None:
        super().__init__(*given, **options)
        self._watched = watched

    def write(self, *given) -> None:
        before = [tensor.detach().clone() for tensor in self._watched]
        super().write(*given)
        assert all(torch.equal(*pair) for pair in zip(before, self._watched, strict=True))


def check_decoding(config: TrainConfig, process: Process) -> None:
    """The ranks' frames are those of one, bit for bit, in windows that begin behind a frame that was given."""
    vae = load_video_vae(config.preview.codec)
    latent = torch.randn(24, 8, 4, 6, generator=torch.Generator().manual_seed(3))
    expected = vae.decode(latent[None], frames_at_once=1)
    still, rest = (vae.decode(part[None], frames_at_once=1) for part in (latent[:, :1], latent[:, 1:]))
    codec, marks = PreviewCodec(config.preview.codec, load_codec, process, {(32, 48)}), []
    for given, video in ((False, expected), (True, torch.cat([still[:, :, 7:], rest], dim=2))):
        with codec.on_device():
            frames = codec.decode(latent, given, partial(marks.append, given))
        assert frames is None if process.rank else torch.equal(torch.from_numpy(frames), to_frames(video)[0])
    assert marks == [False] * 2 + [True] * 3, "one a window: 6 + 2, and 1 + 6 + 1"


def save_averages(owned: list[Fragment], ema: PowerEma, path: Path) -> None:
    (averages,) = ema.averages.values()
    pieces = {f"{f.name} {f.start}": average for f, average in zip(owned, averages, strict=True)}
    save_file(pieces, path)


def run_case(config: TrainConfig, folder: Path) -> None:
    """Trains; the stages' last weights go into the folder, and the ranks' parts of the average."""
    process = start_process(config)
    data = RunData(config, SampleCost.of(config), process.layout.data)
    module = (engine := build_engine(config, process, TRAINED[0], weights=unsettle)).module
    owned = fragments(engine)
    ema = PowerEma([fragment.tensors["weight"] for fragment in owned], config.ema.sigma_rel)
    previews = None
    if config.preview.every:
        watched = [*module.parameters(), *(f.tensors["weight"] for f in owned), *next(iter(ema.averages.values()))]
        given = (config, process, module, data.previewed, sample_latents, load_codec)
        average = partial(ema.in_model, SIGMA, partial(refresh_weights, engine))
        options = {} if config.preview.ema is None else {"weights": average}
        previews = CheckedPreviews(*given, watched=watched, **options)
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
    folder.mkdir(exist_ok=True)
    save_averages(owned, ema, folder / f"average-{process.rank}.safetensors")
    if config.preview.codec is not None:
        check_decoding(config, process)
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
    """A folder with a run with previews and one without for each case, and one of the whole command."""
    folder = tmp_path_factory.mktemp("runs")
    worlds: dict[int, list] = {}
    for name, layout in CASES.items():
        for kind, every in (("with", EVERY), ("without", 0)):
            out = folder / name / kind
            these = worlds.setdefault(layout[0] * layout[1] * layout[2], [])
            these.append((configure(out, data, layout, name, every=every), out))
    for name, layout in MORE.items():
        preview = {"codec": str(data / "vae.pt")} if name == "vae" else {"ema": SIGMA}
        worlds[4].append((configure(folder / name, data, layout, name, **preview), folder / name))
    videos = {"manifest": str(data / "captioned.csv"), "codec": str(data / "codec.safetensors"), "ema": SIGMA}
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
    return plain_latents(folder, weights, data, dtype)


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    """The whole average, of the parts that the ranks kept."""
    pieces = {k: v for file in folder.glob("average-*.safetensors") for k, v in load_file(file).items()}
    in_order = sorted((key.rpartition(" ") for key in pieces), key=lambda key: int(key[2]))
    whole = DiT(load_config(folder / "config.json").model.dit()).state_dict()
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in whole}
    for name, _, start in in_order:
        parts[name].append(pieces[f"{name} {start}"])
    return {name: torch.cat(held).view(whole[name].shape) for name, held in parts.items()}


def plain_latents(folder: Path, weights: dict[str, torch.Tensor], data: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """By the plain sampler with the plain model of these weights."""
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


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"), [("ema", torch.float32, 1e-5), ("ema-bf16", torch.bfloat16, 3e-2)]
)
def test_latents_are_those_of_the_averaged_weights(case, dtype, tolerance, runs, data):
    folder = runs / case
    expected = plain_latents(folder, averaged(folder), data, dtype)
    others = expected_latents(folder, data, dtype)
    for i, (latent, other) in enumerate(zip(expected, others, strict=True)):
        last = load_file(folder / "previews" / DUE[-1] / f"{i:02d}-preview-{i}.safetensors")["latent"]
        assert float((last - latent).norm() / latent.norm()) <= tolerance, i
        assert float((last - other).norm() / latent.norm()) > 2 * tolerance, "the average is not the weights"


def test_the_video_vae_shows_the_frames_of_the_clips(runs):
    """One frame of what was given, and eight of each latent frame behind it; an image has eight."""
    for folder in DUE:
        for i, shape in enumerate([(8, 32, 32), (17, 48, 72), (9, 32, 48)]):
            frames, rate = read_mp4(runs / "vae/previews" / folder / f"{i:02d}-preview-{i}.mp4")
            assert frames.shape == (*shape, 3) and rate == 30
    assert events(runs / "vae").Tags()["images"] == [f"preview/{i:02d}-preview-{i}" for i in range(len(PREVIEWED))]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((f"{case}/with", f"{case}/without") for case in CASES),
        *((case, "dp1-sp2-pp2/without") for case in ("vae", "ema")),
    ],
)
def test_training_goes_on_as_without_previews(one, other, runs):
    curves = [{event.step: event.value for event in events(runs / kind).Scalars("train/loss")} for kind in (one, other)]
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
    vae = torch.load(data / "vae.pt", weights_only=True)
    torch.save({name: value for name, value in vae.items() if name != "scale"}, tmp_path / "vae.pt")
    (tmp_path / "vae.json").write_text((data / "vae.json").read_text())
    no_null = write_dataset(tmp_path / "no_null", PREVIEWED)
    (tmp_path / "no_null/text_features/negative.pt").unlink()
    settings = [
        ({"count": 9}, "preview.count = 9: .*preview.csv has 4 rows"),
        ({"codec": file}, f"preview.codec: {file}: cannot be read as plain tensors"),
        ({"codec": str(tmp_path / "nowhere")}, "preview.codec: .*nowhere: holds no weights"),
        ({"codec": str(tmp_path / "vae.pt")}, "preview.codec: .*vae.pt: has no scale, without which"),
        ({"manifest": str(broken)}, "preview.manifest: .*train-1_text.pt.*repair"),
        ({"manifest": str(no_null)}, "data.null_text_path: .*negative.pt: missing"),
    ]
    for values, complaint in settings:
        config = configure(tmp_path / "run", data, (1, 1, 1), **values)
        with pytest.raises(ConfigError, match=complaint) as error:
            Previews(config, alone, torch.nn.Module(), open_index(config.preview.manifest), sample_latents, load_codec)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"preview.ema = 0.1: must be one of ema.sigma_rel = \[0.25\]$"):
        configure(tmp_path / "run", data, (1, 1, 1), ema=0.1)


@pytest.mark.parametrize("right", [True, False])
def test_a_gpu_decodes_in_bf16_where_it_computes_that_right(data, alone, monkeypatch, capsys, right):
    checked = []

    def check(device, *, height, width, config):
        checked.append((height, width))
        if not right:
            raise InputError("conv3d in bf16 is wrong")

    monkeypatch.setattr(preview_codec, "check_conv3d", check)
    read = []

    def load(path, dtype):
        read.append(load_codec(path, dtype=dtype))
        return read[-1]

    codec = PreviewCodec(str(data / "vae.pt"), load, replace(alone, device=torch.device("cuda")), {(48, 72), (32, 48)})
    assert codec._codec is read[-1] and read[-1].logvar.dtype == (torch.bfloat16 if right else torch.float32)
    assert checked == [(32, 48), (48, 72)][: 2 if right else 1]
    assert ("preview.codec: conv3d in bf16 is wrong; it decodes in float32" in capsys.readouterr().err) != right


def test_a_latent_that_is_not_finite_is_written_as_it_is(tmp_path, data, alone, capsys):
    config = configure(tmp_path, data, (1, 1, 1), codec=str(data / "vae.pt"), count=1)
    index = open_index(config.preview.manifest)
    module = torch.nn.Module()
    previews = Previews(config, alone, module, index, lambda _, noise, **given: noise * torch.nan, load_codec)
    previews.write(2, None, lambda: None)
    (written,) = (tmp_path / "previews/step-000002").iterdir()
    assert (
        load_file(written)["latent"].isnan().all() and "preview-0: the latent is not finite" in capsys.readouterr().err
    )


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path, data, alone, capsys):
    config = configure(tmp_path, data, (1, 1, 1))
    index = open_index(config.preview.manifest)
    previews = Previews(config, alone, torch.nn.Module(), index, lambda _, noise, **given: noise, load_codec)
    (tmp_path / "previews/step-000002").write_text("in the way")
    for step in (2, 2, 3):
        previews.write(step, None, lambda: None)
    (warning,) = capsys.readouterr().err.splitlines()
    assert f"warning: preview.dir = {tmp_path}/previews: " in warning and "step-000002" in warning
    assert len(list((tmp_path / "previews/step-000003").iterdir())) == len(PREVIEWED), "it is tried again each time"


def test_a_folder_that_cannot_be_made_is_warned_of_at_the_start(tmp_path, data, alone, capsys):
    (tmp_path / "file").write_text("in the way")
    config = configure(tmp_path / "run", data, (1, 1, 1), dir=str(tmp_path / "file"))
    Previews(config, alone, torch.nn.Module(), open_index(config.preview.manifest), sample_latents, load_codec)
    assert f"warning: preview.dir = {tmp_path}/file: " in capsys.readouterr().err
