"""From prompts to video files: the command, from weights in published files to frames."""

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mugv_ds.cli.sample import main
from mugv_ds.config.errors import InputError
from mugv_ds.config.text_encoder import write_text_encoder
from mugv_ds.data.video import read_mp4, to_frames
from mugv_ds.models import DiTConfig
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.sampling import outputs, stages
from mugv_ds.sampling.jobs import read_jobs
from mugv_ds.sampling.settings import SIZES, SamplingSettings
from mugv_ds.weights.codec import load_codec
from tests.helpers.published import dit_config, part, read_i2v, toy_dit, write_dit, write_vae
from tests.helpers.records import GOLDEN

TOY = DiTConfig(144, 2, 2, caption_channels=16)
SMALL = ["--frames", "16", "--height", "16", "--width", "24", "--steps", "2", "--fps", "12", "--output-fps", "12"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A folder with a toy DiT, a linear codec, the record's VideoVAE and an image."""
    folder = tmp_path_factory.mktemp("toy")
    write_dit(folder, toy_dit(TOY).state_dict(), TOY)
    LinearCodec.fit(2 * torch.rand(20, 3, 16, 16, 24, generator=torch.Generator().manual_seed(0)) - 1).save(
        folder / "codec.safetensors"
    )
    write_vae(folder, *read_i2v("i2v"))
    Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(folder / "first.png")
    return folder


def command(toy: Path, out: Path, *arguments: str, codec: str = "codec.safetensors") -> list[str]:
    models = ["--weights", str(toy), "--codec", str(toy / codec), "--text-encoder", "hash", "--max-text-tokens", "40"]
    return [*models, "--out", str(out), *SMALL, *arguments]


@pytest.fixture
def frames_written(monkeypatch) -> dict[str, np.ndarray]:
    """The frames of every video, as they were handed to the encoder."""
    written = {}
    write = outputs.write_mp4_parts

    def keep(path, parts, fps):
        held = list(parts)
        written[Path(path).name.split(".mp4")[0]] = np.concatenate(held)
        write(path, held, fps)

    monkeypatch.setattr(outputs, "write_mp4_parts", keep)
    return written


@pytest.mark.parametrize("name", ["i2v", "i2v_long"])
def test_the_command_gives_the_published_frames(name, tmp_path, monkeypatch, frames_written):
    """All of it: T5, first frame, DiT, VideoVAE, in files as they are published; only the noise is the record's."""
    record, metadata = read_i2v(name)
    write_dit(tmp_path, part(record, "dit."), dit_config(metadata))
    write_vae(tmp_path, record, metadata)
    Image.fromarray(record["in.image"].numpy()).save(tmp_path / "image.png")
    monkeypatch.setattr(stages, "gaussian", lambda *key: record["in.noise"][0])
    height, width = map(str, metadata["frame_size"])
    sizes = [
        "--height",
        height,
        "--width",
        width,
        "--frames",
        str(metadata["frames"]),
        "--steps",
        str(metadata["steps"]),
    ]
    models = ["--weights", tmp_path / "dit.pt", "--codec", tmp_path / "vae.pt", "--text-encoder", GOLDEN / "tiny_t5"]
    what = ["--prompt", metadata["prompt"], "--image", tmp_path / "image.png", "--out", tmp_path / "out"]
    assert main([*map(str, [*models, *what]), *sizes]) == 0
    (frames,) = frames_written.values()
    off = np.abs(frames.astype(int) - record["out.frames"].numpy())
    assert frames.shape == record["out.frames"].shape
    assert off.max() <= 1 and (off > 0).mean() < 1e-3, ((off > 0).mean(), off.max())
    assert read_mp4(next((tmp_path / "out").glob("*.mp4")))[1] == metadata["written_fps"]


@pytest.mark.parametrize("size", ["3:4", pytest.param("4:3", marks=pytest.mark.long)])
def test_sizes_are_those_of_the_table(size, toy, tmp_path, capsys):
    """The published stack crashes on these two after all of its steps."""
    arguments = ["--size", size, "--frames", "9", "--steps", "1", "--prompt", "a circle", "--image", toy / "first.png"]
    models = ["--weights", toy, "--codec", toy / "codec.safetensors", "--text-encoder", "hash", "--out", tmp_path]
    assert main([*map(str, [*models, *arguments])]) == 0
    frames, _ = read_mp4(next(tmp_path.glob("*.mp4")))
    assert frames.shape == (9, *{"3:4": (832, 1104), "4:3": (1104, 832)}[size], 3)
    assert {"3:4": "landscape", "4:3": "portrait"}[size] in capsys.readouterr().out


def test_every_size_is_one_that_the_codec_makes_and_says_how_it_stands():
    stands = {
        size: SamplingSettings(height=height, width=width, frames=105).orientation
        for size, (height, width) in SIZES.items()
    }
    assert stands == {
        "9:16": "landscape", "16:9": "portrait", "1:1": "square", "3:4": "landscape", "4:3": "portrait"
    }  # fmt: skip


def test_videos_their_latents_and_what_made_them_are_there_and_a_list_goes_on(toy, tmp_path, monkeypatch, capsys):
    prompts = ["--prompt", "A red Circle!", "--prompt", "../../escape", "--repeat", "2", "--batch", "3"]
    arguments = command(toy, tmp_path / "out", *prompts, "--image", str(toy / "first.png"))
    assert main(arguments) == 0
    names = ["00-a-red-circle", "01-a-red-circle", "02-escape", "03-escape"]
    endings = (".json", ".latent.safetensors", ".mp4")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted([name + end for name in names for end in endings] + ["conditions", "contact_sheet.png"])
    made = json.loads((tmp_path / "out/03-escape.json").read_text())
    assert made["prompt"] == "../../escape" and made["draw"] == 1 and made["image"]["name"] == "first.png"
    assert made["settings"]["steps"] == 2 and made["weights"]["name"] == toy.name
    videos = {name: read_mp4(tmp_path / f"out/{name}.mp4") for name in names}
    assert all(frames.shape == (16, 16, 24, 3) and fps == 12 for frames, fps in videos.values())
    assert len({frames.tobytes() for frames, _ in videos.values()}) == 4
    still = LinearCodec.load(toy / "codec.safetensors").encode(torch.full((1, 3, 8, 16, 24), 200 / 127.5 - 1))
    latents = [load_file(tmp_path / f"out/{name}.latent.safetensors")["latent"] for name in names]
    torch.testing.assert_close(torch.stack(latents)[:, :, :1], still.expand(4, -1, -1, -1, -1))

    def fail(*_):
        raise AssertionError("nothing is to be loaded again")

    monkeypatch.setattr("mugv_ds.sample.load_dit", fail)
    monkeypatch.setattr("mugv_ds.sample.load_text_encoder", fail)
    before = (tmp_path / "out/01-a-red-circle.mp4").read_bytes()
    (tmp_path / "out/01-a-red-circle.mp4").unlink()
    assert main(arguments) == 0
    assert (tmp_path / "out/01-a-red-circle.mp4").read_bytes() == before
    assert main([*arguments, "--guidance", "2"]) == 2
    error = capsys.readouterr().err
    assert "00-a-red-circle.json: made with another settings" in error and "--overwrite" in error
    assert main([*arguments, "--seed", "1"]) == 2 and "another seed" in capsys.readouterr().err


def test_what_other_settings_made_is_made_anew_when_asked(toy, tmp_path):
    arguments = command(toy, tmp_path, "--prompt", "a circle")
    assert main(arguments) == 0
    before = (tmp_path / "00-a-circle.mp4").read_bytes()
    assert main([*arguments, "--seed", "1", "--overwrite"]) == 0
    assert (tmp_path / "00-a-circle.mp4").read_bytes() != before


def test_a_video_depends_on_its_prompt_seed_and_draw_and_not_on_its_neighbours(toy, tmp_path):
    def latents(folder: str, *arguments: str) -> list[torch.Tensor]:
        assert main(command(toy, tmp_path / folder, *arguments)) == 0
        return [load_file(path)["latent"] for path in sorted((tmp_path / folder).glob("*.latent.safetensors"))]

    red, again, green, more = latents("all", "--prompt", "red", "--prompt", "green", "--repeat", "2", "--batch", "4")
    (alone,) = latents("alone", "--prompt", "green")
    (other,) = latents("other", "--prompt", "green", "--seed", "1")
    torch.testing.assert_close(green, alone, rtol=1e-5, atol=1e-5)  # another batch size may round otherwise
    different = [red, again, green, more, other]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_text_to_video_with_a_first_frame_of_its_own_has_one_frame_of_that_latent(toy, tmp_path, frames_written):
    assert main(command(toy, tmp_path, "--prompt", "a circle", "--frames", "17", codec="vae.pt")) == 0
    (latent,) = (load_file(path)["latent"] for path in tmp_path.glob("*.latent.safetensors"))
    assert latent.shape == (24, 3, 2, 3)
    whole = to_frames(load_codec(toy / "vae.pt").decode(latent[None]))[0].numpy()
    assert np.array_equal(frames_written["00-a-circle"], whole[7:])


def test_saved_latents_are_decoded_alone(toy, tmp_path, capsys):
    image = ["--image", str(toy / "first.png"), "--frames", "17"]
    assert main(command(toy, tmp_path / "out", "--prompt", "a circle", *image, codec="vae.pt")) == 0
    latent, out = tmp_path / "out/00-a-circle.latent.safetensors", ["--out", str(tmp_path / "decoded")]
    assert main(["--codec", str(toy / "vae.pt"), "--decode-only", str(latent), *out]) == 0
    assert (tmp_path / "decoded/00-a-circle.mp4").read_bytes() == (tmp_path / "out/00-a-circle.mp4").read_bytes()
    for tensors, message in (
        ({"latent": torch.zeros(24, 0, 2, 2)}, r"must be [24, T, h, w]"),
        ({"latent": torch.full((24, 1, 2, 2), torch.nan)}, "no finite numbers"),
        ({"latent": torch.zeros(24, 1, 2, 2), "image": torch.zeros(3, 3)}, "must be uint8 [16, 16, 3]"),
        ({"other": torch.zeros(1)}, "must be [24, T, h, w]"),
        ({"latent": torch.zeros(24, 1, 2, 2).to(torch.float8_e4m3fn)}, "no finite numbers"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        assert main(["--codec", str(toy / "vae.pt"), "--decode-only", str(tmp_path / "bad.safetensors"), *out]) == 2
        error = capsys.readouterr().err
        assert "bad.safetensors" in error and message in error
    for made in ("[]", '{"settings": 5}', '{"settings": {"frames": 17}}', '{"settings": {"output_fps": 1e300}}'):
        save_file({"latent": torch.zeros(24, 1, 2, 2)}, tmp_path / "bad.safetensors", metadata={"made": made})
        assert main(["--codec", str(toy / "vae.pt"), "--decode-only", str(tmp_path / "bad.safetensors"), *out]) == 2
        assert "bad.safetensors" in capsys.readouterr().err
    for arguments, message in (([latent], "output_fps 1e+30"), ([latent, latent], "several files would become")):
        options = ["--output-fps", "1e30"] if len(arguments) == 1 else []
        assert main(["--codec", str(toy / "vae.pt"), "--decode-only", *map(str, arguments), *out, *options]) == 2
        assert message in capsys.readouterr().err


def test_a_list_of_a_spreadsheet_and_characters_that_end_no_line(tmp_path):
    (tmp_path / "list.csv").write_bytes("\ufeffprompt,seed\r\nred\u2028blue,1\r\n".encode())
    assert [(job.prompt, job.seed) for job in read_jobs(tmp_path / "list.csv", seed=0)] == [("red\u2028blue", 1)]
    (tmp_path / "list.txt").write_bytes("\ufeffred\x0cblue\r\n\r\ngreen".encode())
    assert [job.prompt for job in read_jobs(tmp_path / "list.txt", seed=0)] == ["red\x0cblue", "green"]


def test_features_of_another_encoder_of_the_same_name_are_not_taken(tmp_path, capsys):
    """A folder is called t5 whatever lies in it."""
    record, metadata = read_i2v("i2v")
    write_dit(tmp_path, part(record, "dit."), dit_config(metadata))
    write_vae(tmp_path, record, metadata)
    shutil.copytree(GOLDEN / "tiny_t5", tmp_path / "t5")
    models = ["--weights", tmp_path, "--codec", tmp_path / "vae.pt", "--text-encoder", tmp_path / "t5"]
    arguments = [*map(str, [*models, "--out", tmp_path / "out"]), *SMALL, "--prompt", "a circle"]
    assert main(arguments) == 0
    before = load_file(tmp_path / "out/00-a-circle.latent.safetensors")["latent"]
    file = tmp_path / "t5/model.safetensors"
    weights = {name: 1.5 * value for name, value in load_file(file).items()}
    file.unlink()  # the copy may be read-only
    save_file(weights, file, metadata={"format": "pt"})
    assert main(arguments) == 2 and "made with another text_encoder" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert not torch.equal(load_file(tmp_path / "out/00-a-circle.latent.safetensors")["latent"], before)


def test_damaged_files_are_named_and_made_anew_when_asked(toy, tmp_path, capsys):
    arguments = command(toy, tmp_path, "--prompt", "a circle")
    assert main(arguments) == 0
    video = (tmp_path / "00-a-circle.mp4").read_bytes()
    for ending in (".json", ".latent.safetensors", ".mp4"):
        if ending == ".latent.safetensors":  # which is looked at where the video is not finished
            (tmp_path / "00-a-circle.json").unlink()
        (tmp_path / f"00-a-circle{ending}").write_bytes(b"{")
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert f"00-a-circle{ending}: " in error and "delete it" in error and error.count("\n") == 1
        if ending == ".mp4":
            (tmp_path / "00-a-circle.mp4").unlink()
        assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "00-a-circle.mp4").read_bytes() == video


def test_a_video_that_is_replaced_is_not_taken_for_the_old_one(toy, tmp_path, monkeypatch):
    """Killed between video and JSON, a run with other settings leaves its video beside the old JSON."""
    arguments = command(toy, tmp_path, "--prompt", "a circle")
    assert main(arguments) == 0
    before = (tmp_path / "00-a-circle.mp4").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    write = outputs.write_video
    monkeypatch.setattr(outputs, "write_video", lambda *given: (write(*given), killed()))
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--seed", "1", "--overwrite"])
    monkeypatch.undo()
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "00-a-circle.mp4").read_bytes() == before


def test_a_csv_gives_each_prompt_its_image_and_seed(toy, tmp_path):
    Image.new("RGB", (24, 16), "red").save(tmp_path / "red.png")
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "image", "seed"], ["one, two", "red.png", "7"], ["three", "", ""]])
    first, second = read_jobs(tmp_path / "list.csv", seed=3)
    assert (first.prompt, first.image, first.seed) == ("one, two", tmp_path / "red.png", 7)
    assert (second.prompt, second.image, second.seed) == ("three", None, 3)
    assert main(command(toy, tmp_path / "out", "--prompts", str(tmp_path / "list.csv"))) == 0
    red = read_mp4(tmp_path / "out/00-one-two.mp4")[0]
    assert json.loads((tmp_path / "out/00-one-two.json").read_text())["seed"] == 7 and red.shape[0] == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prompts.txt", b" \n\n", "no prompts"),
        ("prompts.txt", b"caf\xe9\n", "not UTF-8"),
        ("prompts.txt", None, "No such file"),
        ("list.csv", b"text\nx\n", "its columns must be prompt"),
        ("list.csv", b"prompt,images\nx,y\n", "its columns must be prompt"),
        ("list.csv", b"prompt,seed\nx,-1\n", "row 2: seed '-1'"),
        ("list.csv", b"prompt,seed\nx,1\n ,2\n", "row 3: must have a prompt"),
        ("list.csv", b"prompt\nx,y\n", "row 2: must have a prompt, and no more cells"),
        ("list.csv", b"prompt\n", "no prompts"),
        ("list.csv", b"", "its columns must be prompt"),
        ("list.csv", b"prompt,prompt\nx,y\n", "its columns must be prompt"),
        ("list.csv", b"prompt\n" + b"x" * 200_000, "line 2: not a CSV: field larger"),
        ("list.csv", b'prompt\n"x\n', "line 2: not a CSV: unexpected end"),
        ("list.csv", b"prompt,image\nx,a\0b.png\n", "has NUL characters"),
        ("list.csv", b"prompt,seed\nx," + b"9" * 5000, "row 2: seed '999"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as failure:
        read_jobs(tmp_path / name, seed=0)
    assert str(tmp_path / name) in str(failure.value) and message in str(failure.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "10"], "frames 10: must be 8n, or 8n + 1"),
        (["--height", "20"], "height 20: must be a multiple of 8"),
        (["--width", "8000"], "width 8000: must be a multiple of 8 up to 6144"),
        (["--steps", "0"], "steps 0"),
        (["--fps", "0"], "fps 0: must be"),
        (["--output-fps", "nan"], "output_fps nan: must be"),
        (["--shift", "-1"], "shift -1: must be"),
        (["--negative-prompt", " "], "negative_prompt: is empty"),
        (["--prompt", " "], "a prompt is empty"),
        (["--prompt", "a\udcff"], "is not UTF-8 text"),
        (["--prompt", "word " * 1000], "text must have 1 to 40 words, got 1004: 'word word"),
        (["--frames", "0"], "frames 0: must be"),
        (["--height", "0", "--width", "0"], "height 0: must be"),
        (["--out", "no.png"], "no.png: File exists"),
        (["--codec", "no_scale.pt"], "no_scale.pt: has no scale"),
        (["--weights", "deep"], "model.depth = 1000000000: must be at most"),
        (["--weights", "broken"], "the DiT made latents that are not finite"),
        (["--codec", "broken.pt"], "the codec made pixels that are not finite"),
        (["--seed", "-1"], "seed -1"),
        (["--repeat", "0"], "repeat 0"),
        (["--guidance-interval", "5", "5"], "guidance_interval (5.0, 5.0)"),
        (["--image", "nowhere.png"], "nowhere.png: No such file"),
        (["--image", "tiny.png"], "tiny.png: an image of 3×3 pixels"),
        (["--image", "no.png"], "no.png: not a readable image"),
        (["--image", "thin.png"], "thin.png: 8×3000 pixels are too far from the video's 24×16"),
        (["--weights", "nowhere"], "nowhere"),
        (["--codec", "nowhere.pt"], "nowhere.pt"),
        (["--text-encoder", "nowhere"], "nowhere: is no folder"),
        (["--sequence", "2"], "start with torchrun or deepspeed"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(toy, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (3, 3)).save("tiny.png")
    Image.new("RGB", (8, 3000)).save("thin.png")
    Path("no.png").write_text("no")
    vae = torch.load(toy / "vae.pt", weights_only=True)
    for name, state in (
        ("no_scale", {key: value for key, value in vae.items() if key != "scale"}),
        ("broken", vae | {"temporal_vae.decoder.norm1.weight": torch.full((4,), torch.nan)}),
    ):
        torch.save(state, f"{name}.pt")
        Path(f"{name}.json").write_text((toy / "vae.json").read_text())
    for name, change in (("deep", {"depth": 10**9}), ("broken", {})):
        Path(name).mkdir()
        write_dit(Path(name), {key: value * torch.nan for key, value in toy_dit(TOY).state_dict().items()}, TOY)
        Path(name, "config.json").write_text(json.dumps(asdict(TOY) | change))
    assert main(command(toy, tmp_path / "out", "--prompt", "a circle", *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_faster_options_say_what_they_change(toy, tmp_path, capsys):
    options = ["--guidance-interval", "100", "900", "--first-block-cache", "10"]
    assert main(command(toy, tmp_path / "fast", "--prompt", "a circle", "--steps", "4", *options)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "on the first prompt" in line]
    assert [line.split()[0] for line in lines] == ["--guidance-interval", "--first-block-cache"]
    assert all(float(line.split("off by ")[1].split("%")[0]) > 0 for line in lines)
    assert main(command(toy, tmp_path / "exact", "--prompt", "a circle", "--steps", "4")) == 0
    exact, fast = (
        load_file(tmp_path / f"{name}/00-a-circle.latent.safetensors")["latent"] for name in ("exact", "fast")
    )
    assert not torch.equal(exact, fast)


def test_prompts_are_encoded_as_the_captions_of_the_training_were(toy, tmp_path, capsys):
    """Weights that say what made their text features: its length is the default, and another encoder is refused."""
    weights = tmp_path / "weights"
    weights.mkdir()
    write_dit(weights, toy_dit(TOY).state_dict(), TOY)
    write_text_encoder(weights, HashTextEncoder(TOY.caption_channels, 30).info)
    models = ["--weights", str(weights), "--codec", str(toy / "codec.safetensors"), "--text-encoder", "hash"]
    arguments = [*models, "--out", str(tmp_path / "out"), *SMALL, "--prompt", "a circle"]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out/00-a-circle.json").read_text())["text_encoder"]["max_tokens"] == 30
    assert main([*arguments, "--overwrite", "--max-text-tokens", "40"]) == 2
    error = capsys.readouterr().err
    assert "30 tokens" in error and "40 tokens" in error and "encode prompts as the captions" in error


def test_all_parts_are_taken_of_a_video_that_cannot_be_written(tmp_path):
    """Other ranks have a share in making them, and would wait."""
    taken = []

    def parts():
        for number in range(4):
            taken.append(number)
            yield np.zeros((2, 16, 16 if number else 15, 3), np.uint8)  # an odd side, in the first part

    with pytest.raises(ValueError, match="must be even"):
        outputs.write_video(tmp_path / "x.mp4", parts(), 8)
    assert taken == [0, 1, 2, 3] and list(tmp_path.iterdir()) == []

    def failing():
        yield np.zeros((2, 16, 16, 3), np.uint8)
        raise InputError("the codec failed")

    with pytest.raises(InputError, match="the codec failed"):
        outputs.write_video(tmp_path / "x.mp4", failing(), 8)
    assert list(tmp_path.iterdir()) == []
