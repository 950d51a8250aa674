"""tools/plan.py: its table, its JSON, its page, and predictions beside what runs measured."""

import gzip
import json
import re

import pytest
from torch.utils.tensorboard import SummaryWriter

from mugv_ds.cli.plan import main
from mugv_ds.config import load_config
from mugv_ds.plan import compare
from mugv_ds.plan.cost import level_name
from mugv_ds.plan.records import Measured, RunMachine, RunRecord, kernel_seconds, read_record, read_scalars, steady
from tests.helpers.browser import chromium
from tests.helpers.machine import ideal_machine

SHAPE = (15, 90, 160)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine") / "ideal.json"
    path.write_text(ideal_machine(memory_gib=140.0).to_json())
    return path


def run(capsys, calibration, *arguments, config="ds_configs/stage3.json", status=0):
    given = ["--calibration", str(calibration), *map(str, arguments)]
    given += ["--config", config] if config else []
    assert main(given) == status
    return capsys.readouterr()


def test_the_table_names_the_best_and_why_others_lose(capsys, calibration):
    out = run(capsys, calibration, "--gpus", 16, "--price", 3).out
    lines = out.splitlines()
    assert lines[0].startswith("16 × Ideal H200; times by ideal-h200-torch2.11")
    assert "40 GB/s (assumed, not measured: --network)" in lines[0]
    assert lines[1] == "missing: data/stage3/train.csv; planned for the shapes below in their place"
    table = [line for line in lines if re.match(r"\s*\d+ +\d+ × \d+ × \d+", line)]
    assert len(table) == 8
    assert all(re.search(r"[+-]\d+\.\d%: ", line) for line in table[1:])
    assert any(line.startswith("would be faster (-") for line in lines)
    assert re.search(r"^train +15×90×160 +54,002 +128 ", out, re.MULTILINE)
    terms = [
        float(line.split()[-3]) for line in lines[lines.index("") :] if re.match(r"[a-z ]+( +\d+\.\d{3}){3}$", line)
    ]
    assert terms[-1] == pytest.approx(sum(terms[:-1]), abs=0.01), "the parts add up"
    assert "cost at 3" in out
    assert lines[-1].startswith("set: parallel.")


def test_json_and_page_have_the_same_numbers(capsys, calibration, tmp_path):
    out = run(capsys, calibration, "--gpus", 8, "--json", tmp_path / "p.json", "--page", tmp_path / "p.html").out
    plan = json.loads((tmp_path / "p.json").read_text())
    best = plan["best"]
    assert best == next(way for way in plan["ways"] if way["set"] == best["set"])
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert sum(best["device_bytes"].values()) == pytest.approx(best["peak_bytes"])
    assert list(plan["by_gpus"]) == ["1", "2", "4", "8", "16"]
    assert plan["by_gpus"]["8"] == best
    page = (tmp_path / "p.html").read_text()
    assert f"{best['step_seconds']:.4g} s" in page
    assert f"{best['tokens_per_second']:,.0f}" in page
    assert " ".join(best["set"]) in out
    assert "http" not in page.replace("http-equiv", "")
    again = tmp_path / "again.html"
    run(capsys, calibration, "--gpus", 8, "--page", again)
    assert again.read_text() == page, "the same plan has the same bytes"


def test_the_page_fits_the_window_and_its_charts_have_what_they_show(capsys, calibration, tmp_path):
    run(capsys, calibration, "--gpus", 8, "--page", tmp_path / "p.html", "--json", tmp_path / "p.json")
    best = json.loads((tmp_path / "p.json").read_text())["best"]
    with chromium() as browser:
        page = browser.new_page()
        page.goto((tmp_path / "p.html").as_uri())
        for width in (1400, 800):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("svg").count() == 3
        titles = [page.locator("svg rect title").nth(i).text_content() for i in range(4)]
        label = f"{best['data']} × {best['sequence']} × {best['pipeline']}, {level_name(tuple(best['levels']))}"
        assert titles[0].startswith(f"{label}") and "weights" in titles[0]
        labels = page.evaluate("[...document.querySelectorAll('svg .label')].map(e => e.getBoundingClientRect().left)")
        assert min(labels) >= page.locator("svg").first.bounding_box()["x"], "no label is cut off"


def test_nothing_fits(capsys, calibration):
    out = run(capsys, calibration, "--gpus", 1).out
    assert "nothing fits:" in out
    assert re.search(r"  \d+ GPUs: data .* fits, ", out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0"], "invalid positive value"),
        (["--gpus", "4", "--price", "-1"], "invalid amount value"),
        (["--gpus", "4", "--shapes", "1x2"], "invalid shape value"),
        ([], "--config and --gpus are required"),
    ],
)
def test_wrong_arguments(capsys, arguments, said):
    with pytest.raises(SystemExit):
        main(["--config", "ds_configs/stage3.json", *arguments])
    assert said in capsys.readouterr().err


def test_a_card_without_calibration(capsys):
    assert main(["--config", "ds_configs/stage3.json", "--gpus", "4", "--device", "Unheard-of 1"]) == 2
    assert "error: --device Unheard-of 1: no calibration of it is shipped" in capsys.readouterr().err


def write_run(folder, seconds, gib, waited=0.01):
    writer = SummaryWriter(folder)
    for step, value in enumerate([9.0, 8.0, *seconds], 1):
        writer.add_scalar("speed/seconds_per_step", value, step)
        writer.add_scalar("speed/data_wait_seconds", waited, step)
        writer.add_scalar("memory/peak_gib", gib, step)
    writer.close()


def write_profile(folder, kernels):
    events = [{"name": "aten::mm", "cat": "cpu_op", "dur": 7.0}, {"name": "no kernel"}]
    events += [{"name": name, "cat": "kernel", "dur": 1e6 * seconds} for name, seconds in kernels]
    with gzip.open(folder / "profile_step_5.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)


KERNELS = [
    ("nvjet_tst_128x256", 2.0),
    ("FlashAttentionForwardSm90", 1.0),
    ("FlashAttentionForwardSm90", 0.25),  # of cross-attention
    ("PipelinedBackward", 3.0),
    ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 0.5),
    ("ncclDevKernel_SendRecv", 0.125),
    ("triton_poi_fused", 0.75),
]


def test_every_part_stands_beside_its_measurement(capsys, calibration, tmp_path):
    write_run(tmp_path, [900.0, 1000.0, 1100.0], 50.0)
    write_profile(tmp_path, KERNELS)
    out = run(capsys, calibration, "--gpus", 4, "--compare", tmp_path).out
    rows = {re.split(r" {2,}", line)[0]: re.split(r" {2,}", line)[1:] for line in out.splitlines()[1:]}
    predicted, measured, off = rows["seconds of a step"]
    assert measured == "1000"
    assert float(off.rstrip("%")) == pytest.approx(100 * (float(predicted) / 1000 - 1), abs=0.1)
    expected = {"products": 2, "attention forward": 1, "attention backward": 3, "kernels": 1, "exchange": 0.125}
    for name, seconds in expected.items():
        assert float(rows[f"{name}, seconds"][1]) == seconds, name
    assert float(rows["reduction and gather, seconds"][1]) == 0.5
    assert rows["GiB of a device"][1] == "50"


def test_a_folder_without_a_run_is_refused(capsys, calibration, tmp_path):
    err = run(capsys, calibration, "--gpus", 4, "--compare", tmp_path, status=2).err
    assert "no TensorBoard scalars in it" in err
    (tmp_path / "profile_step_1.json.gz").write_bytes(b"none")
    with pytest.raises(ValueError, match="not a profile"):
        kernel_seconds(tmp_path / "profile_step_1.json.gz")


def test_steady_steps(tmp_path):
    assert steady([9.0, 5.0, 1.0, 3.0, 2.0]) == 2.0
    assert steady([9.0, 5.0]) == 5.0
    write_run(tmp_path, [1.0], 3.0)
    assert read_scalars(tmp_path)["memory/peak_gib"] == [(1, 3.0), (2, 3.0), (3, 3.0)]


def record(calibration_name="Ideal H200", name="one", times=1.0, memory=1.0, level="attention"):
    """A run that took so many times what is predicted of it."""
    settings = ["data.global_batch_size=4", "parallel.data=2", "parallel.sequence=2", "model.depth=4"]
    settings += [
        f"parallel.activation_checkpointing={level}",
        "data.budget=null",
        "data.micro_batch_size=1",
        "ema.sigma_rel=[]",
    ]
    config = load_config("ds_configs/stage3.json", settings)
    machine = RunMachine(
        device=calibration_name, devices=4, torch="2.11", cuda=None, triton=None, deepspeed="0.19.8", commit=None
    )
    measured = {"steps": (1.0,), "reserved_gib": 1.0, "host_gib": 6.0, "pinned_gib": 0.0, "data_wait_seconds": 0.0}
    blank = RunRecord(
        name=name,
        config=config.model_dump(mode="json", exclude_unset=True),
        world_size=4,
        shape=SHAPE,
        machine=machine,
        measured=Measured(step_seconds=1.0, peak_gib=1.0, losses=(1.0,), **measured),
    )
    (held,) = compare.hold([blank], [ideal_machine()])
    found = Measured(step_seconds=times * held.seconds, peak_gib=memory * held.gib, losses=(1.0,), **measured)
    return blank.model_copy(update={"measured": found})


def test_recorded_runs_hold_the_planner_to_its_bounds(capsys, calibration, tmp_path):
    good = [record(name="exact"), record(name="near", times=1.04, memory=0.97), record(name="slow", times=1.09)]
    for one in good:
        (tmp_path / f"{one.name}.json").write_text(one.to_json())
        assert read_record(tmp_path / f"{one.name}.json") == one
    printed = run(capsys, calibration, "--validate", *sorted(tmp_path.glob("*.json")), config=None)
    assert "| near | 4 | 2 × 2 × 1 | attention | 4 | 54,002 | 1 × 2 |" in printed.out
    assert "Step time: off by 3.8% in the median and 8.3% at worst; memory: from +0.0% to +3.1%." in printed.out
    for bad, said in (
        (record(name="bad", times=1.2), "bad: step time off by -16.7%, more than 10%"),
        (record(name="bad", memory=1.05), "bad: memory off by -4.8%, not within"),
        (record(name="bad", memory=0.9), "bad: memory off by +11.1%, not within"),
    ):
        (tmp_path / "bad.json").write_text(bad.to_json())
        files = sorted(tmp_path.glob("*.json"))
        assert said in run(capsys, calibration, "--validate", *files, config=None, status=1).err
    (tmp_path / "bad.json").write_text(record(name="bad").to_json().replace("Ideal H200", "Other"))
    err = run(capsys, calibration, "--validate", tmp_path / "bad.json", config=None, status=2).err
    assert "record bad: ran on Other, of which there is no calibration" in err
    (tmp_path / "bad.json").write_text("{}")
    assert (
        "bad.json: name: " in run(capsys, calibration, "--validate", tmp_path / "bad.json", config=None, status=2).err
    )


def test_of_several_ways_the_one_that_is_chosen_must_be_nearly_the_fastest():
    """Ways of the same work whose measured order is another than the predicted one."""
    ways = {level: record(name=level, level=level) for level in ("off", "light", "full")}
    machine = [ideal_machine()]
    assert [(a.record.name, b.record.name) for a, b in compare.choices(compare.hold([*ways.values()], machine))] == [
        ("off", "off")
    ]
    ways["off"] = record(name="off", level="off", times=1.09)
    ways["light"] = record(name="light", level="light", times=0.98)
    (found,) = compare.broken(compare.hold([*ways.values()], machine))
    assert found.startswith("off would be chosen, and is ") and found.endswith("slower than light")
    other = record(name="other", level="light").model_copy(update={"shape": (2, 90, 160)})
    assert compare.choices(compare.hold([ways["off"], ways["light"], other], machine)) == []


def test_the_median_has_a_bound_of_its_own():
    held = compare.hold([record(times=1.07)] * 3, [ideal_machine()])
    assert compare.broken(held) == ["step time: off by 6.5% in the median, more than 5%"]
