"""Pairs of real clips and samples: what they hold, under every layout, and after a kill at any place."""

import csv
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from mugv_ds.cli.make_rdpo_pairs import main
from mugv_ds.data.manifest import open_index
from mugv_ds.data.noise import gaussian
from mugv_ds.data.pairs import pairs
from mugv_ds.data.sample import read_row
from mugv_ds.models import DiTConfig
from mugv_ds.sampling.rdpo import PARTS, PairFiles, cut_into_units
from mugv_ds.sampling.sampler import euler, invert, sample_latents
from mugv_ds.weights.published import load_dit
from tests.engine.test_preference import scalars
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, shard_dataset, write_dataset
from tests.helpers.distributed import free_port, run_ranks
from tests.helpers.launcher import ROOT
from tests.helpers.published import toy_dit, write_dit

SHAPES = [(2, 4, 6), (1, 4, 4), (2, 4, 6), (2, 4, 6), (1, 4, 4)]
LAYOUTS = {"replicas": [], "pipeline": ["--pipeline", "2"]}  # "sequence" is killed below


def test_corrections_undo_the_sampler_s_own_steps():
    """For v = −a·z a step back has the closed form z' / (1 − a·Δ), which DDIM inversion misses at first order."""
    times, a = torch.linspace(1000, 0, 11), 2.0
    noise = torch.ones(1, 24, 1, 1, 1, dtype=torch.float64)
    clean = euler(lambda z, t: -a * z, noise, times)
    assert clean.flatten()[0] == pytest.approx((1 - a / 10) ** 10)
    off = [float((invert(lambda z, t: -a * z, clean, times, k) - noise).abs().max()) for k in (0, 1, 2, 4, 40)]
    assert off[0] == pytest.approx(1 - (0.8 * 1.2) ** 10)
    assert all(after < before / 4 for before, after in pairwise(off)) and off[-1] < 1e-12


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Five clips of two shapes, three in shards, with a column of somebody's own, and a model."""
    folder = tmp_path_factory.mktemp("rdpo")
    manifest = shard_dataset(write_dataset(folder, SHAPES), range(3))
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row |= {"fps": 24 if i else "", "caption": f"caption, {i}", "film": f"film {i // 2}", "label": "bad"}
    with (folder / "real.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    origins = {"sample": ["train-0", "train-3"], "video": ["a", "a"], "licence": ["CC0", "MIT"], "origin": ["x", "y"]}
    pq.write_table(pa.table(origins), folder / "provenance.parquet")
    config = DiTConfig(144, 2, 2, caption_channels=CHANNELS)
    write_dit(folder, toy_dit(config).state_dict(), config)
    return folder


def arguments(given: Path, out: Path, *more: str) -> list[str]:
    model = ["--weights", given / "dit.pt", "--max-text-tokens", TEXT_TOKENS]
    what = ["--manifest", given / "real.csv", "--out", out, "--batch", 2, "--steps", 4, "--shift", 2, "--val-share", 0]
    return [*map(str, [*model, *what]), *more]


def make(argv: list[str]) -> None:
    assert main(argv) == 0


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    make(arguments(given, out))
    return out


def read(out: Path, name: str = "pairs.csv") -> tuple[list[dict[str, str]], list[torch.Tensor]]:
    with (out / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    index = open_index(out / name)
    read = {"channels": CHANNELS, "max_text_tokens": TEXT_TOKENS}
    return rows, [read_row(index, i, **read).latent for i in range(len(index))]


def content(out: Path) -> dict[str, bytes]:
    files = sorted(path for path in out.rglob("*") if path.is_file() and ".index" not in path.parts)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_the_sides_are_drawn_of_the_clip_s_noise_and_of_random_noise(given, alone):
    """By the sampler itself, each clip alone; what the manifest says of the clip goes with both."""
    rows, latents = read(alone)
    assert pairs(open_index(alone / "pairs.csv")).tolist() == [[2 * i, 2 * i + 1] for i in range(5)]
    clips, model = open_index(given / "real.csv"), load_dit(given / "dit.pt")
    unit_of = {row: unit for unit in cut_into_units(clips, None, 2) for row in unit.rows}
    for i, shape in enumerate(SHAPES):
        clip = read_row(clips, i, channels=CHANNELS, max_text_tokens=TEXT_TOKENS)
        text = {"text": clip.text[None], "text_mask": clip.text_mask[None]}
        negative = {f"negative_{name}": tensor for name, tensor in zip(("text", "mask"), text.values(), strict=True)}
        (noise,) = PairFiles(alone).load("noise", unit_of[i], [f"{i:08d}"])
        for side, start in enumerate((noise, gaussian(0, f"worse train-{i}", 0, (24, *shape)))):
            drawn = sample_latents(
                model,
                noise=start[None],
                reference=start[None],
                frame_mask=torch.ones(1, shape[0]),
                **text,
                **negative,
                fps=torch.tensor([24.0 if i else 30.0]),
                height=0,
                width=0,
                steps=4,
                guidance=1.0,
                shift=2.0,
            )
            torch.testing.assert_close(latents[2 * i + side], drawn[0], rtol=1e-4, atol=1e-4)
            row = rows[2 * i + side]
            assert (row["sample_id"], row["rank"]) == (f"train-{i}-{('better', 'worse')[side]}", str(1 + side))
            assert (row["pair_id"], row["real_id"], row["film"]) == (f"train-{i}", f"train-{i}", f"film {i // 2}")
            assert row["caption"] == f"caption, {i}" and "label" not in row
            assert row["licence"] == {0: "CC0", 3: "MIT"}.get(i, "")
        off = float((latents[2 * i] - clip.latent).norm() / clip.latent.norm())
        assert float(rows[2 * i]["reconstruction_error"]) == pytest.approx(off, rel=1e-4)


def compare(out: Path, other: Path) -> None:
    """Holds that two folders have the same pairs, up to rounding."""
    (rows, latents), (other_rows, other_latents) = read(out), read(other)
    for one, another in zip(latents, other_latents, strict=True):
        assert float((one - another).norm() / another.norm()) <= 1e-5
    for one, another in zip(rows, other_rows, strict=True):
        assert one | {"reconstruction_error": ""} == another | {"reconstruction_error": ""}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_processes_make_what_one_does(layout, given, alone, tmp_path):
    run_ranks(2, make, arguments(given, tmp_path, *LAYOUTS[layout]))
    compare(tmp_path, alone)


def make_until(argv: list[str], saves: int) -> None:
    """Makes pairs until the process that saves the so manieth shard kills itself instead, as `kill -9` does."""
    save, done = PairFiles.save, []

    def save_or_die(self, part, unit, tensors) -> None:
        if len(done) == saves:
            (self.folder / f"half.{'0' * 32}.tmp").rename(self.folder / part / f"half.{'0' * 32}.tmp")
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(part)
        save(self, part, unit, tensors)

    PairFiles.save = save_or_die
    make(argv)


def test_a_killed_list_goes_on_where_it_was_with_the_same_bytes(given, alone, tmp_path):
    """Two processes; each kill is at another part of a unit, and what is there is not made again."""
    argv, whole = ["--sequence", "2"], tmp_path / "whole"
    run_ranks(2, make, arguments(given, whole, *argv))
    compare(whole, alone)
    out = tmp_path / "killed"
    out.mkdir()
    for saves in (5, 2):  # in the second unit the noise is lost, then the worse side
        (out / f"half.{'0' * 32}.tmp").touch()
        with pytest.raises(ProcessExitedException):
            run_ranks(2, make_until, arguments(given, out, *argv), saves)
    kept = {path: path.stat().st_ino for part in PARTS for path in (out / part).glob("*.safetensors")}
    assert len(kept) == 7 and not (out / "pairs.csv").exists()
    run_ranks(2, make, arguments(given, out, *argv))
    assert {path: path.stat().st_ino for path in kept} == kept
    assert content(out) == content(whole)


def test_whole_source_videos_are_held_out(given, tmp_path):
    for name, options, by in (("own", ["--video-column", "film"], "film"), ("known", [], "video")):
        make(arguments(given, tmp_path / name, "--better", "real", "--val-share", "0.34", *options))
        sides = [read(tmp_path / name, file)[0] for file in ("pairs.csv", "pairs_val.csv")]
        train, val = ({row[by] or row["real_id"] for row in rows} for rows in sides)
        assert train and val and not train & val and sum(map(len, sides)) == 10


def test_the_clip_itself_is_better_on_demand_and_its_first_frame_may_be_given(given, alone, tmp_path):
    make(arguments(given, tmp_path, "--better", "real", "--first-frame"))
    assert not [*(tmp_path / "noise").iterdir()]
    clips, (_, latents), (_, free) = open_index(given / "real.csv"), read(tmp_path), read(alone)
    for i, (frames, _, _) in enumerate(SHAPES):
        clip = read_row(clips, i, channels=CHANNELS, max_text_tokens=TEXT_TOKENS).latent
        assert torch.equal(latents[2 * i], clip)
        if frames > 1:
            assert torch.equal(latents[2 * i + 1][:, 0], clip[:, 0])
            assert not torch.allclose(latents[2 * i + 1][:, 1], free[2 * i + 1][:, 1], atol=1e-3)
        else:
            assert torch.equal(latents[2 * i + 1], free[2 * i + 1])


def test_guidance_takes_a_null_text_and_gives_other_samples(given, alone, tmp_path):
    make(arguments(given, tmp_path, "--guidance", "3", "--null-text", "text_features/negative.pt", "--rows", "1"))
    assert not torch.allclose(read(tmp_path)[1][1], read(alone)[1][1], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--seed", "1"], "rdpo.json: made with another settings; name another --out"),
        (["--rows", "4"], "rdpo.json: made with another clips"),
        (["--rows", "6"], "--rows 6: must be 1 to 5"),
        (["--guidance", "3"], "takes the features of a null text"),
        (["--video-column", "reel"], "no column 'reel'"),
        (["--val-share", "0.95"], "--val-share 0.95: must be 0 to 0.9"),
        (["--batch", "100000000"], "take less"),
        (["--sequence", "2"], "start with torchrun or deepspeed"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(options, complaint, given, alone, capsys):
    before = content(alone)
    assert main(arguments(given, alone, *options)) == 2
    assert complaint in capsys.readouterr().err and content(alone) == before


def test_a_damaged_shard_is_named(given, alone, tmp_path, capsys):
    for path in alone.rglob("*"):
        if path.is_file() and ".index" not in path.parts:
            (copy := tmp_path / path.relative_to(alone)).parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    shard = tmp_path / "better/u000000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    assert main(arguments(given, tmp_path)) == 2
    assert f"delete {shard}, and it is made anew" in capsys.readouterr().err
    shard.unlink()
    make(arguments(given, tmp_path))
    assert content(tmp_path) == content(alone)


@pytest.mark.long
def test_the_demo_learns_from_pairs_of_64_real_clips(tmp_path):
    """The debug stages, pairs on two processes, and DPO on them: held-out clips have the higher implicit reward."""
    for name in ("ds_configs", "hostfiles", "kernels", "mugv_ds", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)

    def command(*words: str) -> str:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = os.environ | {"PYTHONPATH": paths}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def launched(*words: str) -> str:
        port = ("--master_port", str(free_port()))
        return command("tools/launch.py", "--hostfile", "hostfiles/localhost", *port, *words)

    command("tools/make_demo_data.py", "--out", "data/demo")
    for stage in ("stage1", "stage2", "stage3", "sft"):
        launched("mugv_ds/train.py", "--config", f"ds_configs/debug/{stage}.json", "--set", "preview.every=0")
    command("tools/convert_hf.py", "--ckpt", "runs/debug/sft/checkpoints", "--out", "exports/sft")
    clips = ["--manifest", "data/demo/train.csv", "--rows", "128", "--val-share", "0.5"]
    how = ["--weights", "exports/sft", "--batch", "16", "--shift", "1", "--out", "data/demo_rdpo"]
    said = launched("tools/make_rdpo_pairs.py", *clips, *how)
    assert "64 pairs in pairs.csv, 64 pairs in pairs_val.csv" in said
    launched("mugv_ds/train.py", "--config", "ds_configs/debug/rdpo.json", "--set", "preview.every=0")
    accuracy = scalars(tmp_path / "runs/debug/rdpo", "validation/preference/rdpo/accuracy")
    loss = scalars(tmp_path / "runs/debug/rdpo", "validation/loss")
    last = max(loss)
    print(f"held-out accuracy {accuracy[last]:.3f}, held-out flow loss {loss[0]:.5f} → {loss[last]:.5f}")
    assert accuracy[last] >= 0.9
    assert loss[last] <= 1.01 * loss[0]
