"""The container and the clusters' examples: they can be read, and what they run exists and takes these options."""

import json
import re
import shlex

import pytest
import yaml

from mugv_ds.config.hostfile import parse_hostfile
from tests.helpers.pages import ROOT, check, commands


def lines_of(instruction: str) -> list[str]:
    """The arguments of a Dockerfile's instruction, wherever it stands."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{instruction} ")]


def test_the_image_s_files_are_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [word for line in lines_of("COPY") for word in line.split()[:-1] if not word.startswith("--")]
    assert copied[-1] == "." and len(copied) > 3
    for name in copied:
        assert (ROOT / name).exists() and name not in ignored


def test_the_image_is_not_root_s_and_its_base_is_an_argument():
    assert lines_of("FROM") == ["${BASE}"] and any(line.startswith("BASE=") for line in lines_of("ARG"))
    assert lines_of("USER") == ["trainer"]
    assert "--shm-size" in (ROOT / "Dockerfile").read_text()
    (command,) = lines_of("CMD")
    check(json.loads(command))


def test_the_gpu_s_versions_are_pinned_and_the_extra_has_them():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-gpu.txt").read_text(), re.MULTILINE))
    assert pins.keys() >= {"torch", "triton", "flash-attn-4"}
    page = (ROOT / "docs/performance.md").read_text().split("##")[0]
    assert all(pins[name] in page for name in ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl"))


def test_the_development_container_is_of_the_same_file():
    folder = ROOT / ".devcontainer"
    config = json.loads((folder / "devcontainer.json").read_text())
    assert (folder / config["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert config["remoteUser"] in lines_of("USER")
    check(shlex.split(config["postCreateCommand"]))


def test_the_jobset_starts_a_launcher_for_each_line_of_its_hostfile(tmp_path):
    hosts, jobset = yaml.safe_load_all((ROOT / "examples/jobset.yaml").read_text())
    (tmp_path / "hostfile").write_text(hosts["data"]["hostfile"])
    slots = parse_hostfile(tmp_path / "hostfile")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["completions"] == job["parallelism"] == len(slots) and job["completionMode"] == "Indexed"
    assert {*slots.values()} == {container["resources"]["limits"]["nvidia.com/gpu"]}
    name = jobset["metadata"]["name"]
    assert [*slots] == [f"{name}-{group['name']}-0-{n}.{name}" for n in range(len(slots))]
    assert f"--master_addr={next(iter(slots))}" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])
    words = [*container["command"], *container["args"]]
    check([word.replace(".venv/bin/", "").replace("$(JOB_COMPLETION_INDEX)", "1") for word in words])


@pytest.mark.parametrize("part", ["setup", "run"])
def test_skypilot_s_commands_can_be_typed(part):
    task = yaml.safe_load((ROOT / "examples/skypilot.yaml").read_text())
    assert task["num_nodes"] > 1 and (ROOT / task["workdir"]).is_dir()
    given = {"SKYPILOT_NODE_RANK": "1", **task["envs"]}
    script = re.sub(r"\$\(.*?\)", "10.0.0.1", task[part])
    for variable, value in given.items():
        script = script.replace(f"${variable}", value)
    typed = [words[words[0] == "exec" :] for words in commands(script) if words[0] != "echo"]
    assert typed
    for words in typed:
        check(words)
