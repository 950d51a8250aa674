"""What is decided from losses alone."""

import pytest
from pydantic import ValidationError

from mugv_ds.config.schema import GuardSection
from mugv_ds.engine.guard.history import History

SECTION = GuardSection(max_skips=2, spike_factor=3.0, spike_window=4)
NAN = float("nan")


def played(history: History, losses: list[float], section: GuardSection = SECTION) -> list[str | None]:
    return [history.note(loss, loss == loss, section) for loss in losses]


def test_skips_count_in_a_row():
    history = History()
    assert played(history, [1.0, NAN, 1.0, NAN]) == [None] * 4
    assert (history.skips, history.skips_in_a_row, history.losses) == (2, 1, [1.0, 1.0])
    assert "2 steps in a row" in history.note(NAN, False, SECTION)


@pytest.mark.parametrize(("loss", "spike"), [(3.1, True), (3.0, False), (0.1, False)])
def test_a_spike_is_above_the_factor_times_the_median(loss, spike):
    history = History()
    played(history, [0.5, 1.0, 1.0, 2.0])
    why = history.note(loss, True, SECTION)
    assert (why is not None) == spike
    assert history.losses == ([0.5, 1.0, 1.0, 2.0] if spike else [1.0, 1.0, 2.0, loss])


def test_there_is_no_spike_before_the_window_is_full_or_when_switched_off():
    assert played(History(), [1.0, 1.0, 1.0, 100.0]) == [None] * 4
    off = SECTION.model_copy(update={"spike_factor": 0.0})
    assert played(History(), [1.0, 1.0, 1.0, 1.0, 100.0], off) == [None] * 5


def test_positions_jump_over_what_went_wrong():
    """Step 12 was bad, the run went back to 8; then 10 was, and it went back to 8 again, and to 9 in the end."""
    saved = History(losses=[1.0])
    before = History(skips=3, skips_in_a_row=2, seen=48, bad=1)
    saved.rolled_back(8, 12, before)
    assert saved.jumped == [(8, 12)] and [saved.position(step) for step in (8, 9)] == [12, 13]
    assert (saved.rollbacks, saved.skips, saved.skips_in_a_row, saved.seen, saved.bad) == (1, 3, 0, 48, 1)
    assert saved.losses == [1.0], "the median is that of the checkpoint"

    again = History()
    again.rolled_back(8, 10, saved)
    assert again.jumped == [(8, 14)] and again.position(8) == 14 and again.rollbacks == 2
    later = again.model_copy(deep=True)
    later.rolled_back(9, 11, again)
    assert later.jumped == [(8, 14), (15, 17)] and later.position(9) == 17


def test_what_a_checkpoint_holds_is_checked():
    history = History(jumped=[(8, 14)], losses=[0.1, 0.2], rollbacks=1)
    assert History.model_validate_json(history.model_dump_json()) == history
    for wrong in ('{"jumped": [[8]]}', '{"rollbacks": -1}', '{"losses": ["1"]}', '{"other": 1}'):
        with pytest.raises(ValidationError):
            History.model_validate_json(wrong)


def test_counters_of_steps_without_an_update():
    """Skips add up over the run, those in a row end with an update, and their losses take no part."""
    history = History()
    counts = []
    for loss, applied in ((1.0, True), (2.0, False), (3.0, True), (NAN, False), (4.0, True)):
        assert history.note(loss, applied, SECTION) is None
        counts.append((history.skips, history.skips_in_a_row))
    assert counts == [(0, 0), (1, 1), (1, 0), (2, 1), (2, 0)]
    assert history.losses == [1.0, 3.0, 4.0]
    assert history.note(float("inf"), True, SECTION) is None and history.losses == [1.0, 3.0, 4.0]
    assert (history.seen, history.bad, history.rollbacks, history.jumped) == (0, 0, 0, [])


def test_the_window_holds_the_last_losses():
    history = History()
    played(history, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert history.losses == [3.0, 4.0, 5.0, 6.0]


def test_an_item_of_two_steps_without_an_update_is_set_aside_once():
    history = History()
    assert history.suspect([(0, 7), (1, 2), (0, 5)]) == [] and history.aside() == frozenset()
    assert history.suspect([(0, 7), (0, 5), (0, 9)]) == [(0, 5), (0, 7)]
    assert history.aside() == {(0, 5), (0, 7)}
    assert history.suspect([(0, 7), (0, 9)]) == [(0, 9)], "what is set aside already is not named again"
    assert history.suspects == {"1:2": 1, "0:5": 2, "0:7": 3, "0:9": 2}


def test_the_last_10_000_suspects_are_kept():
    history = History()
    history.suspect((0, i) for i in range(10_000))
    history.suspect([(0, 0), (1, 0)])  # the first becomes one of the newest
    assert len(history.suspects) == 10_000 and "0:1" not in history.suspects
    first, *_, last_but_one, last = history.suspects
    assert (first, last_but_one, last) == ("0:2", "0:0", "1:0")


def test_a_rollback_keeps_what_was_counted_over_the_run():
    saved = History(skips=1, seen=8, suspects={"0:1": 1}, losses=[2.0])
    before = History(rollbacks=4, skips=6, skips_in_a_row=3, seen=32, bad=2, suspects={"0:1": 2, "0:3": 1})
    saved.rolled_back(2, 8, before)
    assert (saved.rollbacks, saved.skips, saved.skips_in_a_row, saved.seen, saved.bad) == (5, 6, 0, 32, 2)
    assert saved.suspects == {"0:1": 2, "0:3": 1} and saved.losses == [2.0]
