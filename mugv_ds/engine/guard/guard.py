"""Keeps a run alive and says when it cannot go on.

Between two steps all ranks exchange one small row on the host: who was asked to stop, who could not read, what the loss
was, how long each computed. Every decision is made there, from what all ranks know, so all of them decide the same.
"""

import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from signal import Signals
from typing import Any, NoReturn

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mugv_ds.config.console import say
from mugv_ds.config.errors import InputError, PeerError, Stopped, TrainingError, status_of
from mugv_ds.config.run import RunConfig
from mugv_ds.data.quarantine import Quarantined
from mugv_ds.engine.guard import signals
from mugv_ds.engine.guard.alarms import Alarm
from mugv_ds.engine.guard.history import History
from mugv_ds.engine.guard.incidents import Incidents
from mugv_ds.engine.guard.replicas import fingerprint, odd_ones
from mugv_ds.engine.guard.stopping import asked
from mugv_ds.engine.guard.stragglers import Stopwatch, Stragglers
from mugv_ds.engine.guard.watchdog import Watchdog
from mugv_ds.engine.process import Process


class Rollback(Exception):
    """The run must go on from a checkpoint of at most `before` steps, and not play again what led here."""

    def __init__(self, why: str, step: int, before: int) -> None:
        super().__init__(why)
        self.step, self.before = step, before


@dataclass(frozen=True)
class StepResult:
    """A step that was taken. loss: mean over all ranks. applied: whether it updated the weights. samples: its size."""

    loss: float
    applied: bool
    samples: int


@dataclass(frozen=True)
class Prefetched:
    """What a rank read for the next step. quarantined: samples it had to replace. failure: why it could not read."""

    quarantined: Sequence[Quarantined] = ()
    failure: Exception | None = None


class Guard:
    """The guard of one rank; see `config.schema.GuardSection` for its bounds.

    Args:
        config: the run. process: this process.
        timed: a layer that all ranks run alike and in which none waits for another, see `Stopwatch`.
        weights: gives the tensors that must be equal on all ranks of a pipeline stage.
        explain: what is to be recorded of a data step that went wrong; called on rank 0.
        items: the (source, item)s of a data step.
    """

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        timed: nn.Module,
        weights: Callable[[], Iterable[Tensor]],
        explain: Callable[[int], dict[str, Any]],
        items: Callable[[int], list[tuple[int, int]]],
    ) -> None:
        self.history = History()
        self._section, self._process, self._weights = config.guard, process, weights
        self._explain, self._items = explain, items
        self._replaced = 0  # samples of the coming step
        name = f"rank {process.rank} (host {socket.gethostname()}, pid {os.getpid()})"
        self._watchdog = Watchdog(process.host, name, config.guard.timeout_s)
        self._stopwatch = Stopwatch(timed, process.device)
        self._stragglers = Stragglers(config.guard.straggler_factor, config.guard.straggler_window)
        self._incidents = Incidents(config.checkpoint.folder, process.rank)

    def start(self, state: dict[str, Any]) -> None:
        """Begins to watch; `state` is what `state` gave for the checkpoint that the run goes on from, or empty.

        Raises:
            InputError: it is something else.
        """
        self.history = self._read(state)
        signals.SIGNALS.listen()
        self._watchdog.start()

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, of JSON types."""
        return self.history.model_dump(mode="json")

    def alive(self, step: int) -> None:
        """A mark within the work at a step boundary that may take long. All ranks come to each together.

        Raises:
            Stopped: a rank was asked to stop; that work is given up, what follows from it is to be saved.
        """
        self._watchdog.reached(step)
        if (found := asked(self._process.host)) is not None:
            self._note_stop(step, *found)
            raise Stopped(f"step {step}")

    def close(self) -> None:
        """Ends the watch. Signals stay noted and without effect."""
        self._watchdog.close()

    def boundary(self, step: int, taken: StepResult | None, ahead: Prefetched) -> bool:
        """What all ranks decide after `step` steps; returns whether to save and stop. All ranks call it.

        Args:
            taken: the last step; None at the start. ahead: what this rank read for the next.

        Raises:
            Rollback: too many updates were skipped, or the loss jumped.
            TrainingError: the run cannot go on, says rank 0; what this rank met when reading. PeerError: on the others.
        """
        own = [
            signals.SIGNALS.received,
            0 if ahead.failure is None else status_of(ahead.failure),
            taken.loss if taken else 0.0,
            taken.applied if taken else True,
            len(ahead.quarantined),
            self._stopwatch.read(),
        ]
        rows = self._process.host.rows(torch.tensor(own, dtype=torch.float64))
        self._watchdog.reached(step)
        received, statuses, losses, applied, bad, seconds = rows.T.tolist()
        self._process.host.raise_if(statuses, ahead.failure)
        if taken is not None:
            self._count_samples(taken.samples)
            self._judge(step, losses[0], all(applied))
            self._name_stragglers(step, seconds)
            self._check_replicas(step)
        self._replaced = int(sum(bad))
        if self._replaced:
            self._name_replaced(step, ahead.quarantined)
        found = next(((rank, int(number)) for rank, number in enumerate(received) if number), None)
        if found is not None:
            self._note_stop(step, *found)
        return found is not None

    def raise_alarms(self, step: int, found: Iterable[Alarm]) -> None:
        """Says and records what the monitors found beyond its bound in the step that led to `step`; the run goes on."""
        for alarm in found:
            self._say(f"step {step}: alarm: {alarm}")
            facts = {"value": repr(alarm.value), "bound": alarm.bound, "block": alarm.block, "blocks": alarm.blocks}
            self._incidents.write("alarm", step, monitor=alarm.monitor, **facts)

    def rolled_back(self, cause: Rollback, step: int, state: dict[str, Any]) -> None:
        """The checkpoint of `step` steps, which held `state`, was loaded because of `cause`."""
        history = self._read(state)
        history.rolled_back(step, cause.step, self.history)
        self.history = history
        first, stop = history.jumped[-1]
        self._say(f"step {cause.step}: {cause}; back to step {step}, data steps {first} to {stop - 1} are not played")
        self._incidents.write("rollback", cause.step, why=str(cause), to=step, jumped=[first, stop])

    def _note_stop(self, step: int, rank: int, number: int) -> None:
        self._say(f"step {step}: rank {rank} {signals.name(number)}; stopping")
        what = None if number == signals.GONE else Signals(number).name
        self._incidents.write("stop", step, rank=rank, signal=what)

    def _read(self, state: dict[str, Any]) -> History:
        try:
            return History.model_validate_json(json.dumps(state))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise InputError(f"the checkpoint's guard state: {key}: {first['msg']}; use another checkpoint") from None

    def _name_replaced(self, step: int, own: Sequence[Quarantined]) -> None:
        """Records the samples that were replaced in the coming step, of all ranks."""
        for bad in (Quarantined(*fields) for found in self._process.host.gather(own) for fields in found):
            self._say(f"step {step}: sample {bad.sample_id} is set aside, {bad.replaced_by} taken instead: {bad.why}")
            self._incidents.write("quarantine", step, **bad._asdict())

    def _count_samples(self, samples: int) -> None:
        """Takes up the samples of the step that was taken; ends the run if too many of all were replaced."""
        self.history.seen += samples
        self.history.bad += self._replaced
        seen, bad = self.history.seen, self.history.bad
        if seen >= self._section.bad_share_after and bad > self._section.max_bad_share * seen:
            self.fail(
                f"{bad} of {seen} samples could not be read, more than guard.max_bad_share = "
                f"{self._section.max_bad_share:g}; repair the files that {self._incidents.path} names"
            )

    def _judge(self, step: int, loss: float, applied: bool) -> None:
        """Takes up the loss of the step that led to `step`."""
        before = step - 1 - self.history.skips_in_a_row
        position = self.history.position(step - 1)
        if applied and self.history.skips_in_a_row == 1:  # more than one in a row are no sample's fault
            self._suspect(step, self.history.position(step - 2))
        why = self.history.note(loss, applied, self._section)
        if applied and why is None:
            return
        before = step - 1 if applied else before
        if self._process.rank == 0:
            facts = {"loss": repr(loss), "data_step": position, **self._explain(position)}
            self._incidents.write("spike" if applied else "skip", step, **facts)
        if not applied:
            self._say(f"step {step}: no update, the loss ({loss:.4g}) or the gradient is not finite")
        if why is None:
            return
        if self.history.rollbacks >= self._section.max_rollbacks:
            self.fail(f"step {step}: {why}, and the run went back {self.history.rollbacks} times already")
        raise Rollback(why, step, before)

    def _suspect(self, step: int, position: int) -> None:
        """Takes up that a data step between two good ones made no update; sets aside what was in two such steps."""
        for source, item in self.history.suspect(self._items(position)):
            self._say(
                f"step {step}: item {item} of source {source} was in two steps without a finite loss and gradient "
                f"between good ones, the last of them data step {position}; it is set aside"
            )
            self._incidents.write("aside", step, source=source, item=item, data_step=position)

    def _name_stragglers(self, step: int, seconds: list[float]) -> None:
        for rank, times in self._stragglers.note(seconds):
            self._say(f"step {step}: rank {rank} is a straggler: computes {times:.1f} times as long as the median rank")
            self._incidents.write("straggler", step, rank=rank, times_the_median=times)

    def _check_replicas(self, step: int) -> None:
        """Compares the weights of ranks that run one stage."""
        every, layout = self._section.check_replicas_every, self._process.layout
        if not every or step % every or layout.replicas == 1:
            return
        own = torch.tensor([fingerprint(self._weights())])
        prints = self._process.host.rows(own).flatten().tolist()
        odd = odd_ones(prints, [layout.coordinates(rank).stage for rank in range(layout.world_size)])
        if odd:
            self._incidents.write("replicas", step, ranks=odd)
            self.fail(
                f"step {step}: the weights of rank {', '.join(map(str, odd))} differ from those of their replicas; "
                "start again from the last checkpoint, and on another device if this repeats"
            )

    def fail(self, message: str) -> NoReturn:
        """Ends the run on all ranks; rank 0 says why."""
        raise TrainingError(message) if self._process.rank == 0 else PeerError("rank 0 says why")

    def _say(self, line: str) -> None:
        if self._process.rank == 0:
            say(line)
