"""What users and disks hand in that cannot be used: one clear line that names it, status 2, soon and in little memory.

Every case is a command as a user types it. What it must name is given beside it.
"""

import json
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mugv_ds import train
from mugv_ds.cli import balance, check_hostfile, convert_hf, ema, import_hf, sample, widen
from mugv_ds.models import DiT, DiTConfig
from tests.helpers.command import answer
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.limits import GIB
from tests.helpers.saved import write_checkpoint

CONFIG = DiTConfig(144, 2, 2, caption_channels=16)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return DiT(CONFIG).state_dict()


def refused(main: Callable, arguments: list[str], *named: str) -> None:
    """Status 2, and one line of error that names what is wrong."""
    done = answer(main, [str(argument) for argument in arguments])
    lines = [line for line in done.errors.splitlines() if line.strip() and not line.startswith("usage:")]
    assert done.status == 2, (done.status, done.errors[-2000:])
    assert len(lines) == 1 and len(lines[0]) < 1000, done.errors[-2000:]
    for part in named:
        assert part in lines[0], (part, lines[0])
    assert done.grown < GIB


# Configs: values of --set, and what the line has to name.
SETTINGS = {
    "misspelt key": ("data.manifst=x", "data.manifst", "data.manifest"),
    "unknown section": ("dta.manifest=x", "dta", "data"),
    "text for a number": ("data.seed=six", "data.seed", "integer"),
    "a float for a count": ("schedule.steps=1.5", "schedule.steps"),
    "true for a count": ("schedule.steps=true", "schedule.steps"),
    "no steps": ("schedule.steps=0", "schedule.steps"),
    "negative steps": ("schedule.steps=-4", "schedule.steps"),
    "steps without end": ("schedule.steps=1e999", "schedule.steps", "finite"),
    "NaN": ("optimizer.lr=NaN", "optimizer.lr", "finite"),
    "an absurd rate": ("optimizer.lr=1e300", "optimizer.lr"),
    "a rate of zero": ("optimizer.lr=0", "optimizer.lr"),
    "betas of one": ("optimizer.betas=[1,1]", "optimizer.betas"),
    "one beta": ("optimizer.betas=[0.9]", "optimizer.betas"),
    "an absurd epsilon": ("optimizer.eps=1e300", "optimizer.eps"),
    "an absurd batch": ("data.global_batch_size=100000000000000000000", "data.global_batch_size"),
    "an absurd micro-batch": ("data.micro_batch_size=100000000000000000000", "data.micro_batch_size"),
    "a batch that does not divide": ("data.micro_batch_size=3", "data.micro_batch_size = 3", "use 1, 2 or 4"),
    "absurdly many heads": ("model.num_heads=1000000000000", "model.num_heads"),
    "a width that is no multiple of 72": ("model.hidden_size=100", "model.hidden_size"),
    "absurdly deep": ("model.depth=1000000000", "model.depth"),
    "an unknown preset": ("model.preset=mugdit_11b", "model.preset"),
    "an unknown precision": ("model.precision=fp4", "model.precision"),
    "heads that do not divide": ("parallel.sequence=5", "parallel.sequence = 5", "use 1 or 2"),
    "more stages than blocks": ("parallel.pipeline=3", "parallel.pipeline = 3", "at most 2"),
    "absurdly many ranks": ("parallel.data=100000000000000000000", "parallel.data"),
    "an unknown level": ("parallel.activation_checkpointing=some", "parallel.activation_checkpointing"),
    "a share above one": ("flow.caption_drop=1.5", "flow.caption_drop"),
    "a negative shift": ("flow.shift=-1", "flow.shift"),
    "no null text": ("data.null_text_path=null", "data.null_text_path"),
    "an average that cannot be named": ("ema.sigma_rel=[0.0505]", "ema.sigma_rel"),
    "an average wider than all steps": ("ema.sigma_rel=[0.5]", "ema.sigma_rel"),
    "previews without a manifest": ("preview.every=2", "preview.manifest"),
    "a seed beyond 64 bits": ("data.seed=99999999999999999999999", "data.seed"),
    "absurdly many workers": ("data.num_workers=1000000000", "data.num_workers"),
    "a time-out of no time": ("guard.timeout_s=0", "guard.timeout_s"),
    "a spike factor that always fires": ("guard.spike_factor=0.5", "guard.spike_factor"),
    "a DeepSpeed key of ours": ("deepspeed.train_batch_size=4", "deepspeed.train_batch_size", "data.global_batch_size"),
    "a misspelt DeepSpeed key": ("deepspeed.zero_optimisation={}", "zero_optimisation", "zero_optimization"),
    "a misspelt nested key": (
        'deepspeed.zero_optimization={"reduce_bucket_sise": 5}',
        "reduce_bucket_sise",
        "reduce_bucket_size",
    ),
    "offloading": ('deepspeed.zero_optimization={"offload_optimizer": {"device": "cpu"}}', "offload_optimizer"),
    "DeepSpeed's monitor": ('deepspeed.tensorboard={"enabled": true}', "tensorboard"),
    "a manifest that is a folder": ("data.manifest=/tmp", "/tmp"),
    "no key": ("=5", "section.key=value"),
    "no value": ("data.seed", "section.key=value"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(tmp_path, case):
    override, *named = SETTINGS[case]
    path = write_config(tmp_path, write_dataset(tmp_path, [(1, 4, 4)] * 4))
    refused(train.main, ["--dry-run", "--config", path, "--set", override], *named)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def diamond(path: Path) -> None:
    """Each of 40 files extends the next one twice."""
    for number in range(40):
        following = f"level{number + 1}.json"
        (path.parent / f"level{number}.json").write_text(json.dumps({"extends": [following, following]}))
    (path.parent / "level40.json").write_text("{}")
    path.write_text('{"extends": "level0.json"}')


FILES = {
    "missing": (lambda path: None, "no regular file"),
    "a folder": (Path.mkdir, "config.json"),
    "a FIFO": (fifo, "config.json"),
    "a socket": (socket_file, "config.json"),
    "empty": (lambda path: path.write_text(""), "config.json:1:1: not JSON"),
    "cut off": (lambda path: path.write_text('{"data": {'), "config.json:1:", "not JSON"),
    "a list": (lambda path: path.write_text("[]"), "must hold a JSON object"),
    "a key twice": (lambda path: path.write_text('{"data": {"seed": 1, "seed": 2}}'), "seed", "twice"),
    "100,000 brackets": (lambda path: path.write_text("[" * 100_000), "config.json"),
    "not UTF-8": (lambda path: path.write_bytes(b'{"a": "\xff"}'), "not UTF-8"),
    "2 MiB": (lambda path: path.write_text(" " * (1 << 21)), "config.json"),
    "extending itself": (lambda path: path.write_text('{"extends": "config.json"}'), "circle"),
    "extending nothing": (lambda path: path.write_text('{"extends": "none.json"}'), "none.json"),
    "a diamond": (diamond, "model", "required"),
    "sections missing": (lambda path: path.write_text("{}"), "required"),
}


@pytest.mark.parametrize("case", FILES)
def test_config_files(tmp_path, case):
    write, *named = FILES[case]
    write(tmp_path / "config.json")
    refused(train.main, ["--dry-run", "--config", tmp_path / "config.json"], *named)


HEADER = "sample_id,source,latent_path,text_feat_path"
SIZED = f"{HEADER},num_frames,height,width,fps"
GOOD = "a,generated,latents/a.pt,t.pt"
MANIFESTS = {
    "empty": ("", ":1: empty"),
    "only a header": (HEADER, "no samples"),
    "no sample_id": ("source,latent_path,text_feat_path\nx,y,z", ":1: missing column 'sample_id'"),
    "a column twice": (f"{HEADER},source\n{GOOD},real", ":1: duplicate column"),
    "140,000 columns": (",".join(f"c{i}" for i in range(140_000)), ":1: 140000 columns"),
    "too few values": (f"{HEADER}\na,real", ":2: 2 values"),
    "an open quote": (f'{HEADER}\n"a,real,x,y', ":2:", "quote"),
    "a NUL": (f"{HEADER}\na\0,real,x,y", ":2: contains a NUL"),
    "not UTF-8": (f"{HEADER}\n\udcff,real,x,y", ":2: not UTF-8"),
    "a line of 2 MiB": (f"{HEADER}\n{'x' * (1 << 21)}", ":2: longer"),
    "an id twice": (f"{SIZED}\n{GOOD},8,32,32,8\n{GOOD},8,32,32,8", ":3: duplicate sample_id", "line 2"),
    "a blank id": (f"{HEADER}\n ,real,x,y", ":2: blank sample_id"),
    "an unknown source": (f"{HEADER}\na,reel,x,y", ":2: unknown source 'reel'"),
    "an absolute path": (f"{HEADER}\na,real,/etc/passwd,y", ":2:", "/etc/passwd"),
    "a path that leads out": (f"{HEADER}\na,real,../x,y", ":2:", "../x"),
    "a URL": (f"{HEADER}\na,real,http://x/y,y", ":2:", "http://x/y"),
    "a height that is no multiple": (f"{SIZED}\n{GOOD},8,33,32,8", ":2: height = 33"),
    "a height beyond the positions": (f"{SIZED}\n{GOOD},8,80000,32,8", ":2: height"),
    "no frames": (f"{SIZED}\n{GOOD},0,32,32,8", ":2: num_frames"),
    "an absurd rate": (f"{SIZED}\n{GOOD},8,32,32,1e300", ":2: fps"),
    "a rate of NaN": (f"{SIZED}\n{GOOD},8,32,32,nan", ":2: fps"),
    "no latent that can be read": (f"{HEADER}\n{GOOD}", "no row has a readable latent"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(tmp_path, case):
    text, *named = MANIFESTS[case]
    path = write_config(tmp_path, tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(balance.main, ["--config", path], "bad.csv", *named)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 28))


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/should-not-be",)


def self_similar(path: Path) -> None:
    key: tuple = ()
    for _ in range(200):
        key = (key, key)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([key], protocol=2))


def nested(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b")" + b"\x85" * 500_000 + b".")


def holding(content: bytes) -> Callable:
    return lambda path, state: path.write_bytes(content)


def saving(change: Callable) -> Callable:
    """Writes what `change` makes of the state dict, with torch.save."""
    return lambda path, state: torch.save(change(state), path)


def with_end_token(value: torch.Tensor) -> Callable:
    return saving(lambda state: state | {"end_token": value})


WEIGHTS = {
    "missing": (lambda path, state: None, "holds no weights"),
    "empty": (holding(b""), "0 bytes"),
    "a Git LFS pointer": (holding(b"version https://git-lfs.github.com/spec/v1"), "git lfs"),
    "an HTML page": (holding(b"<!doctype html>"), "HTML"),
    "a pickle that runs code": (saving(lambda state: {"x": Payload()}), "system", "nothing was executed"),
    "a bare pickle": (holding(pickle.dumps(Payload())), "pickle"),
    "compressed": (lambda path, state: compressed(path), "compressed"),
    "self-similar": (lambda path, state: self_similar(path), "dit.pt"),
    "nested": (lambda path, state: nested(path), "dit.pt"),
    "truncated": (lambda path, state: (torch.save(state, path), os.truncate(path, 100_000)), "dit.pt"),
    "a FIFO": (lambda path, state: fifo(path), "holds no weights"),
    "a list": (saving(lambda state: [1]), "must hold a dict of tensors"),
    "a tensor missing": (saving(lambda state: {k: v for k, v in state.items() if k != "end_token"}), "end_token"),
    "a tensor too much": (saving(lambda state: state | {"x": torch.ones(1)}), "has x"),
    "a tensor of another shape": (with_end_token(torch.ones(3)), "end_token"),
    "integers": (with_end_token(torch.ones(144, dtype=torch.int64)), "end_token"),
    "claims of a view": (with_end_token(torch.ones(1).expand(144)), "end_token"),
    "NaN": (with_end_token(torch.full((144,), torch.nan)), "end_token", "NaN"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(tmp_path, state, case):
    write, *named = WEIGHTS[case]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/dit.pt", state)
    refused(import_hf.main, ["--weights", tmp_path / "in", "--out", tmp_path / "out"], *named)
    assert not (tmp_path / "out").exists() and not Path("/tmp/should-not-be").exists()


def flipped(folder: Path) -> None:
    file = folder / "rank-1.weight.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


CHECKPOINTS = {
    "no folder": (lambda run: None, "nowhere", "no such folder"),
    "nothing in it": (lambda run: (run / "step-00000002").rename(run / "away"), "run", "no checkpoint"),
    "a flipped bit": (lambda run: flipped(run / "step-00000002"), "run/step-00000002", "SHA-256 differs"),
    "a file missing": (
        lambda run: (run / "step-00000002/rank-0.weight.safetensors").unlink(),
        "run/step-00000002",
        "rank-0.weight.safetensors: missing",
    ),
    "half a manifest": (
        lambda run: os.truncate(run / "step-00000002/MANIFEST.json", 500),
        "run/step-00000002",
        "not a whole manifest",
    ),
    "a manifest that is a FIFO": (
        lambda run: ((run / "step-00000002/MANIFEST.json").unlink(), fifo(run / "step-00000002/MANIFEST.json")),
        "run/step-00000002",
        "MANIFEST.json",
    ),
    "latest that leads out": (lambda run: (run / "latest").write_text("../x"), "run", "latest", "'../x'"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(tmp_path, state, case):
    damage, name, *named = CHECKPOINTS[case]
    write_checkpoint(tmp_path / "run", 2, state.items())
    damage(tmp_path / "run")
    refused(convert_hf.main, ["--ckpt", tmp_path / name, "--out", tmp_path / "out"], *named)


HOSTFILES = {
    "missing": (None, "hosts"),
    "empty": ("", "hosts"),
    "an option for ssh": ("-oProxyCommand=id slots=1", "-"),
    "no slots": ("node-0", "slots"),
    "a host twice": ("a slots=1\na slots=1", "twice"),
    "a hundred billion slots": ("a slots=100000000000", "slots"),
}


@pytest.mark.parametrize("case", HOSTFILES)
def test_hostfiles(tmp_path, case):
    text, *named = HOSTFILES[case]
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    refused(check_hostfile.main, [tmp_path / "hosts"], *named)


def test_other_commands(tmp_path, state):
    run = tmp_path / "run"
    write_checkpoint(run, 2, state.items(), averages={"ema_0.100": 1.0})
    out = ["--out", tmp_path / "out"]
    (tmp_path / "weights").mkdir()
    save_file(state, tmp_path / "weights/model.safetensors")
    weights = ["--weights", tmp_path / "weights"]
    refused(ema.main, ["ensemble", "--gamma", "0", *out, run / "step-00000002"], "γ = 0.0")
    refused(ema.main, ["ensemble", "--gamma", "0.5", *out, run / "step-00000002", run / "step-00000002"], "only one")
    refused(ema.main, ["reconstruct", "--sigma-rel", "0.4", "--checkpoints", run, *out], "σ_rel = 0.4")
    refused(widen.main, [*weights, *out, "--factor", "1"], "factor 1")
    refused(widen.main, [*weights, *out, "--noise-scale", "-1"], "noise scale")
    refused(convert_hf.main, ["--ckpt", run, "--out", run], "exists already")
    prompt = ["--prompt", "x", "--codec", tmp_path / "none.safetensors"]
    refused(sample.main, [*weights, *out, *prompt], "--text-encoder")
    refused(sample.main, [*weights, *out, *prompt, "--text-encoder", "hash"], "config.json")
