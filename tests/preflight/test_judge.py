"""Whom the preflight names, of what ranks of GPUs could report."""

import time
from dataclasses import replace

import pytest

from mugv_ds.config.operation_schema import PreflightSection
from mugv_ds.plan.calibration import load_calibration
from mugv_ds.preflight import state
from mugv_ds.preflight.judge import Expected, Report, judge, lines, table
from mugv_ds.preflight.measure import ring_partners
from mugv_ds.preflight.probes import LABELS, ON_GPU, calibrated_rates

BOUNDS = PreflightSection()
WELL = Report(
    host="a",
    local_rank=0,
    device="NVIDIA H200",
    versions={"torch": "2.13", "code": "abc"},
    is_gpu=True,
    free_share=0.98,
    card={"clock_mhz": "1700", "slowed": "Not Active", "ecc_errors": "0"},
    rates={"product": 690.0, "on_device": 2000.0, "host_all_reduce": 170.0},
    checkpoint_mib_s=300.0,
)
CALIBRATED = Expected({"product": 690.0, "host_all_reduce": 177.0}, "nvidia-h200-torch2.11")


def fleet(**of_rank_5: object) -> list[Report]:
    """Two hosts of four ranks, of which the sixth differs."""
    reports = [replace(WELL, host="ab"[rank // 4], local_rank=rank % 4) for rank in range(8)]
    return [replace(report, **of_rank_5) if rank == 5 else report for rank, report in enumerate(reports)]


def said(reports: list[Report], expected: Expected = CALIBRATED) -> list[str]:
    return list(lines(judge(reports, BOUNDS, expected), reports))


def test_nothing_is_said_of_ranks_that_are_well():
    assert said(fleet()) == [] == said(fleet(), Expected())


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"rates": {**WELL.rates, "product": 345.0}}, "matrix product: 345 TFLOP/s, 0.50 × the calibrated 690 TFLOP/s"),
        ({"rates": {**WELL.rates, "on_device": 500.0}}, "copy on the device: 500 GB/s, 0.25 × the median 2e+03 GB/s"),
        ({"versions": {**WELL.versions, "torch": "2.12"}}, "version of torch: 2.12, where others have 2.13"),
        ({"versions": {"torch": "2.13"}}, "version of code: none, where others have abc"),
        ({"card": {**WELL.card, "driver": "570"}}, "version of driver: 570, where others have none"),
        ({"free_share": 0.5}, "GPU memory: 50% free, less than preflight.free_memory_share = 0.9"),
        ({"ahead_s": -3.5}, "host's clock: 3.5 s behind the median rank's, more than preflight.clock_skew_s = 1"),
        ({"card": {**WELL.card, "clock_mhz": "850"}}, "GPU clock: 850 MHz at work, 0.50 × the median 1700 MHz"),
        ({"card": {**WELL.card, "slowed": "Active"}}, "GPU clock: the hardware slows it down"),
        ({"card": {**WELL.card, "ecc_errors": "2"}}, "ECC errors: 2 uncorrected"),
        ({"xids": [79, 48, 48]}, "Xid errors: 48, 79 in the last 24 h"),
        ({"checkpoint_mib_s": 3.0}, "checkpoint.dir: 3 MiB/s, less than preflight.checkpoint_mib_s = 20"),
        ({"failed": {"copy to the host": "out of memory"}}, "copy to the host: failed: out of memory"),
    ],
)
def test_a_rank_is_named_with_its_place(changed, text):
    (line,) = said(fleet(**changed))
    assert line.startswith(f"rank 5 (host b, local rank 1, NVIDIA H200) falls short: {text}"), line


def test_ranks_of_one_host_are_named_together():
    slow = {**WELL.rates, "host_all_reduce": 20.0}
    reports = [replace(report, rates=slow) if report.host == "b" else report for report in fleet()]
    (line,) = said(reports)
    assert line.startswith("rank 4 (host b, local rank 0, NVIDIA H200) falls short: all-reduce of the host: 20 GB/s")
    assert line.endswith("; so do ranks 5, 6, 7 of this host")


def test_of_two_ranks_the_slower_is_named_and_the_odd_version_is_rank_1s():
    reports = fleet(rates={"product": 1.0}, versions={"torch": "1"})[4:6]
    assert [line.split(": ")[1] for line in said(reports, Expected())] == [
        *("version of code", "version of torch", "matrix product"),
    ]
    assert all(line.startswith("rank 1 ") for line in said(reports, Expected()))


def test_the_table_says_what_was_not_checked():
    rows = table(fleet(unchecked=("Xid errors: no permission",)), BOUNDS, CALIBRATED)
    assert rows[-1] == "not checked on 1 of 8 ranks: Xid errors: no permission"
    assert any(" ".join(row.split()) == "matrix product 690 0 690 0.8 × calibrated 690 TFLOP/s" for row in rows), rows


def test_the_shipped_calibration_has_what_is_measured():
    rates = calibrated_rates(load_calibration("nvidia-h200-torch2.11"), ranks=4)
    assert rates.keys() == {*("product", "on_device", "to_host", "to_device", "host_all_to_all", "host_all_reduce")}
    assert rates.keys() < LABELS.keys()
    assert 500 < rates["product"] < 990  # dense bf16 peak of an H200: 989 TFLOP/s
    assert not any(name.startswith("host_") for name in calibrated_rates(load_calibration("nvidia-h200-torch2.11"), 8))
    assert ON_GPU.flops == 2 * 32768 * 3456 * 13824


def test_ranks_of_a_ring_meet_both_neighbours_and_agree_whom():
    for count in range(1, 9):
        ranks = [10 + 2 * place for place in range(count)]
        rounds = [ring_partners(ranks, rank) for rank in ranks]
        assert {len(of) for of in rounds} == {min(count - 1, 2)}
        for number in range(min(count - 1, 2)):
            meets = {rank: of[number] for rank, of in zip(ranks, rounds, strict=True)}
            assert all(meets[other] == rank for rank, other in meets.items() if other is not None)
            assert sum(other is None for other in meets.values()) == count % 2
        met = [{other for other in of if other is not None} for of in rounds]
        assert all(len(others) == min(count - 1, 2) for others in met[1:-1])


def test_xid_errors_are_those_of_the_card_that_are_recent_and_no_programs_fault():
    now = time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6
    hour = 3600e6
    log = [
        f"3,100,{now - 0.5 * hour:.0f},-;NVRM: Xid (PCI:0000:1b:00): 79, pid=1, GPU has fallen off the bus.",
        f"3,101,{now - 3 * hour:.0f},-;NVRM: Xid (PCI:0000:1b:00): 48, pid=1, DBE (double bit error)",
        f"3,102,{now:.0f},-;NVRM: Xid (PCI:0000:1c:00): 95, pid=1, uncontained ECC error",
        f"3,103,{now:.0f},-;NVRM: Xid (PCI:0000:1b:00): 31, pid=1, MMU Fault",
        f"6,104,{now:.0f},-;usb 1-1: new device",
    ]
    assert state.recent_xids("00000000:1B:00.0", 1.0, log) == [79]
    assert state.recent_xids("00000000:1B:00.0", 4.0, log) == [79, 48]
    assert state.recent_xids("00000000:1C:00.0", 1.0, log) == [95]
