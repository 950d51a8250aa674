"""The command: the same noise for all weights, nothing done twice, and a killed one goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mugv_ds.cli.compare import main as compare
from mugv_ds.cli.evaluate import main
from mugv_ds.config.text_encoder import read_text_encoder
from mugv_ds.data.manifest import open_index
from mugv_ds.data.pairs import labels, pairs
from mugv_ds.data.video import read_mp4
from mugv_ds.evaluation.results import read_results
from mugv_ds.models import DiTConfig
from mugv_ds.models.codec import LinearCodec
from mugv_ds.sampling import stages
from tests.helpers.distributed import run_ranks
from tests.helpers.published import toy_dit, write_dit
from tests.helpers.voting import ballot, build, cast, prefer

ROOT = Path(__file__).parents[2]
CONFIG = DiTConfig(144, 2, 2, caption_channels=16)
NAMES = ["00-a-red-circle-moving-left", "01-a-red-circle-moving-left", "02-green", "03-green"]
SMALL = ["--frames", "16", "--height", "16", "--width", "24", "--steps", "2", "--repeat", "2", "--output-fps", "8"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Two toy DiTs, a linear codec, an image and a list of prompts."""
    folder = tmp_path_factory.mktemp("toy")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        dit = toy_dit(CONFIG)
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        (folder / name).mkdir()
        write_dit(folder / name, dit.state_dict(), CONFIG)
    LinearCodec.fit(2 * torch.rand(20, 3, 16, 16, 24, generator=torch.Generator().manual_seed(0)) - 1).save(
        folder / "codec.safetensors"
    )
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / "first.png")
    (folder / "list.csv").write_text("prompt,image\na red circle moving left,\ngreen,first.png\n")
    return folder


def command(toy: Path, out: Path, *more: str, weights: tuple[str, ...] = ("a", "b")) -> list[str]:
    each = [argument for name in weights for argument in ("--weights", f"{name}={toy / name}")]
    models = ["--codec", str(toy / "codec.safetensors"), "--text-encoder", "hash", "--max-text-tokens", "40"]
    return [*each, *models, "--prompts", str(toy / "list.csv"), "--out", str(out), *SMALL, *more]


def files(out: Path) -> dict[str, bytes]:
    """Every file of an evaluation but those that the sampler keeps for itself."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "conditions" not in path.parts
    }


@pytest.fixture(scope="module")
def done(toy, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done")
    assert main(command(toy, out, "--keep-latents")) == 0
    return out


def test_the_noise_of_a_video_is_the_same_for_all_weights_and_lists(toy, tmp_path, monkeypatch):
    drawn: dict[str, list[torch.Tensor]] = {}
    gaussian = stages.gaussian

    def keep(*key):
        drawn.setdefault(str(key[1:3]), []).append(noise := gaussian(*key))
        return noise

    monkeypatch.setattr(stages, "gaussian", keep)
    assert main(command(toy, tmp_path / "both")) == 0
    assert main(command(toy, tmp_path / "alone", "--batch", "2", weights=("b",))) == 0
    assert len(drawn) == 4 and all(len(noises) == 3 for noises in drawn.values())
    assert all(torch.equal(noises[0], other) for noises in drawn.values() for other in noises)
    assert len({noises[0].numpy().tobytes() for noises in drawn.values()}) == 4
    assert read_mp4(tmp_path / f"both/a/{NAMES[0]}.mp4")[0].tobytes() != (
        read_mp4(tmp_path / f"both/b/{NAMES[0]}.mp4")[0].tobytes()
    )


def test_what_is_there_says_what_made_it(toy, done):
    results = read_results(done)
    assert [(one.weights, one.job) for one in results] == [(weights, job) for weights in "ab" for job in NAMES]
    free, again, given, _ = results[:4]
    assert (free.prompt, free.seed, free.draw, free.image) == ("a red circle moving left", 0, 0, None)
    assert again.draw == 1 and free.text_features == again.text_features != given.text_features
    assert free.made["weights"]["fingerprint"] != results[4].made["weights"]["fingerprint"]
    assert free.made["settings"]["steps"] == 2 and free.made["codec"]["name"] == "codec.safetensors"
    assert np.asarray(Image.open(given.image)).shape == (16, 24, 3)
    for one in results:
        latent = torch.load(one.latent, weights_only=True)
        saved = load_file(one.video.with_suffix(".latent.safetensors"))["latent"]
        assert latent.dtype == torch.float32 and latent.shape == (24, 2, 2, 3) and torch.equal(latent, saved)
        features = torch.load(one.text_features, weights_only=True)
        assert features["y"].shape == (1, 1, int(features["mask"].sum()), 16)
        measures = json.loads(one.video.with_suffix(".measures.json").read_text())["measures"]
        assert ("first_frame_psnr" in measures) == (one.image is not None)
        assert ("direction" in measures) == (one.prompt == "a red circle moving left")
    assert read_text_encoder(done).kind == "hash"


def test_what_is_kept_is_a_data_set(toy, done, tmp_path):
    """As a CSV in the evaluation's folder names it."""
    from mugv_ds.data.manifest import open_index
    from mugv_ds.data.sample import read_row

    results = [one for one in read_results(done) if one.job == NAMES[0]]
    paths = [(one.latent.relative_to(done), one.text_features.relative_to(done)) for one in results]
    folder = tmp_path / "set"
    shutil.copytree(done, folder)
    lines = ["sample_id,latent_path,text_feat_path,num_frames,height,width,source"]
    lines += [f"{number},{latent},{text},16,16,24,generated" for number, (latent, text) in enumerate(paths)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    index = open_index(folder / "pairs.csv", None, None)
    for row, one in enumerate(results):
        sample = read_row(index, row, channels=16, max_text_tokens=40)
        assert torch.equal(sample.latent, torch.load(one.latent, weights_only=True)) and sample.text_mask.any()


def test_run_again_it_does_nothing(toy, done, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("nothing is to be done again")

    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    for name in ("load_dit", "load_text_encoder", "load_codec"):
        monkeypatch.setattr(f"mugv_ds.sample.{name}", fail)
    monkeypatch.setattr("mugv_ds.evaluation.run.measure", fail)
    assert main(command(toy, done, "--keep-latents")) == 0
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()} == before


def test_a_changed_setting_is_done_anew_and_nothing_old_is_taken_for_it(toy, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = {one.video: one.video.read_bytes() for one in read_results(out)}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mugv_ds.sample.load_dit", killed)
    with pytest.raises(KeyboardInterrupt):
        main(command(toy, out, "--guidance", "2"))
    assert read_results(out) == []
    monkeypatch.undo()
    assert main(command(toy, out, "--guidance", "2")) == 0
    results = read_results(out)
    assert len(results) == 8 and all(one.made["settings"]["guidance"] == 2 for one in results)
    assert all(one.video.read_bytes() != before[one.video] for one in results)
    assert all(one.latent is None for one in results)  # they were of other videos, and none were asked for
    assert main(command(toy, out, "--guidance", "2", "--keep-latents")) == 0
    assert all(one.latent is not None for one in read_results(out))


def test_text_features_of_other_texts_are_not_taken(toy, done, tmp_path):
    """The list's names are the same, its texts are not."""
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (tmp_path / "list.csv").write_text("prompt\nA red circle moving left!\ngreen\n")
    arguments = ["--prompts", str(tmp_path / "list.csv")]
    assert main([*command(toy, out, weights=("a",)), *arguments]) == 0
    results = read_results(out)
    assert [one.job for one in results] == NAMES and all(one.text_features is None for one in results)


def test_weights_that_have_changed_are_sampled_anew_and_others_are_not(toy, done, tmp_path):
    out, weights = tmp_path / "out", tmp_path / "toy"
    shutil.copytree(done, out)
    shutil.copytree(toy, weights)
    state = torch.load(weights / "b/dit.pt", weights_only=True)
    torch.save({name: 1.01 * value for name, value in state.items()}, weights / "b/dit.pt")
    times = {one.video: one.video.stat().st_mtime_ns for one in read_results(out)}
    arguments = command(weights, out, "--keep-latents")
    assert main(arguments) == 0
    made_anew = {one.weights for one in read_results(out) if one.video.stat().st_mtime_ns != times[one.video]}
    assert made_anew == {"b"}


# Evaluates as `tools/evaluate.py` does, and dies in the call of a function before which it has done so many.
DIES = """
import os, signal, sys
from importlib import import_module

module, function, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
*owner, function = function.split(".")
owner = getattr(import_module(module), owner[0]) if owner else import_module(module)
done = getattr(owner, function)

def dying(*arguments, **named):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return done(*arguments, **named)

setattr(owner, function, dying)
sys.exit(import_module("mugv_ds.cli.evaluate").main(sys.argv[4:]))
"""
KILLED = {
    "after a video": ("mugv_ds.sampling.outputs", "Outputs.save_video", 1),
    "before a contact sheet": ("mugv_ds.sampling.run", "contact_sheet", 0),
    "before the texts' encoder": ("mugv_ds.config.text_encoder", "TextEncoderInfo.to_bytes", 0),
    "in the measures": ("mugv_ds.evaluation.run", "measure", 3),
    "before the table": ("mugv_ds.evaluation.table", "write_changed", 0),
}


@pytest.mark.parametrize("point", KILLED)
def test_killed_anywhere_it_goes_on_to_the_same_files(point, toy, done, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    where = [str(one) for one in KILLED[point]]
    arguments = [sys.executable, "-c", DIES, *where, *command(toy, out, "--keep-latents")]
    assert subprocess.run(arguments, env=environment, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.mp4") if path.with_suffix(".json").exists()}
    assert times and not (out / "table.json").exists()
    assert main(command(toy, out, "--keep-latents")) == 0
    for path in out.rglob("*.tmp"):
        path.unlink()  # of the file that was being written
    found, expected = files(out), files(done)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("name", ["a/contact_sheet.png", "text_encoder.json", "table.html", "table.json"])
def test_a_file_that_was_half_written_is_made_anew(name, toy, done, tmp_path):
    """As a file system leaves it that lost power, or an older version of this program that was killed."""
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (out / name).write_bytes((out / name).read_bytes()[:100])
    assert main(command(toy, out, "--keep-latents")) == 0
    assert (out / name).read_bytes() == (done / name).read_bytes()


LAYOUTS = {
    "replicas": [],
    "guidance": ["--guidance-parallel"],
    "sequence": ["--sequence", "2"],
    "pipeline": ["--pipeline", "2"],
}
SLOW = [pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS if name != "replicas"]


def evaluate(argv: list[str]) -> None:
    assert main(argv) == 0


@pytest.mark.parametrize("layout", ["replicas", *SLOW])
def test_several_processes_give_what_one_does(layout, toy, done, tmp_path):
    run_ranks(2, evaluate, command(toy, tmp_path, "--keep-latents", *LAYOUTS[layout]))
    results, expected = read_results(tmp_path), read_results(done)
    assert [(one.weights, one.job) for one in results] == [(one.weights, one.job) for one in expected]
    for one, other in zip(results, expected, strict=True):
        latent, wanted = (torch.load(path, weights_only=True) for path in (one.latent, other.latent))
        assert float((latent - wanted).norm() / wanted.norm()) <= 1e-5
    table, wanted = (json.loads((folder / "table.json").read_text()) for folder in (tmp_path, done))
    assert table["videos"] == wanted["videos"] == {"a": 4, "b": 4} and table["measures"].keys() == (
        wanted["measures"].keys()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--weights", "a=b"], "--weights a: is there twice"),
        (["--weights", "c=nowhere"], "--weights c: nowhere: there is no such file or folder"),
        (["--weights", "../c=a"], "must be NAME=PATH"),
        (["--weights", "conditions=a"], "must be NAME=PATH"),
        (["--weights", "a"], "must be NAME=PATH"),
        (["--weights", "c=."], "config.json"),
        (["--prompts", "twice.txt"], "prompt 'red': videos 1 and 5 of the list are the same"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompts", "lost.csv"], "lost.png: No such file"),
        (["--height", "15"], "height 15"),
        (["--out", "file"], "file: File exists"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(toy, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.txt").write_text("red\ngreen\nred\n")
    (tmp_path / "lost.csv").write_text("prompt,image\nred,lost.png\n")
    (tmp_path / "file").write_text("")
    shutil.copytree(toy / "a", tmp_path / "a")
    assert main([*command(toy, tmp_path / "out"), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("out/*/*.mp4"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no evaluation.json"),
        ("{", "Invalid JSON"),
        ('{"weights": {"../a": {}}, "jobs": []}', "weights.../a"),
        ('{"weights": {}, "jobs": [{"name": "../x", "made": {}, "image": null, "text": "x"}]}', "jobs.0.name"),
        ('{"weights": {}, "jobs": [{"name": "x", "made": {}, "image": null, "text": "x"}]}', "job x has no prompt"),
    ],
)
def test_a_folder_that_is_no_evaluation(tmp_path, content, message):
    from mugv_ds.config.errors import InputError

    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match=message) as failure:
        read_results(tmp_path)
    assert str(tmp_path) in str(failure.value)


@pytest.mark.parametrize("name", [NAMES[1], NAMES[2]], ids=["measured alone", "in the contact sheet"])
def test_a_damaged_video_is_named(name, toy, done, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    (video := out / f"b/{name}.mp4").write_bytes(b"no video")
    video.with_suffix(".measures.json").write_text('{"key": 1}')
    assert main(command(toy, out)) == 2
    said = capsys.readouterr().err
    assert str(video) in said and re.search(rf"delete ({video}|it), and it is made anew", said)
    video.unlink()
    assert main(command(toy, out)) == 0
    assert video.read_bytes() == (done / f"b/{name}.mp4").read_bytes()


def test_what_is_left_can_be_compared_blindly_and_its_votes_train(done, tmp_path):
    comparison = build(done, tmp_path / "out", "a", "b")
    assert len(comparison.items) == 4 and sum(item.image is not None for item in comparison.items) == 2
    first, *others = comparison.items
    cast(tmp_path / "out", ballot(comparison, "Ana", lambda item: "both_good" if item == first else prefer("b")(item)))
    assert compare(["report", str(tmp_path / "out")]) == 0
    index = open_index(tmp_path / "out/preferences/pairs.csv")
    assert [index.row(int(better)).latent_path for better, _ in pairs(index)] == [
        f"latents/b/{item.job}.pt" for item in others
    ]
    assert index.shapes().tolist() == [[2, 2, 3]] * 6 and index.row(0).fps == 30.0
    kto = open_index(tmp_path / "out/preferences/labels.csv")
    assert labels(kto).tolist() == [True, True]
    features = tmp_path / "out/preferences" / index.row(0).text_feat_path
    assert {"y", "mask"} == set(torch.load(features, weights_only=True))
    assert (tmp_path / "out/preferences/text_encoder.json").is_file()
