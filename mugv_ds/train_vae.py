"""Trains the VideoVAE; started by `deepspeed`, one process a device.

tools/launch.py --hostfile hostfiles/localhost mugv_ds/train_vae.py --config ds_configs/vae/debug.json
"""

import os
import time

from mugv_ds.engine.guard.signals import SIGNALS

if __name__ == "__main__" and "RANK" in os.environ:
    SIGNALS.listen()  # from here on a signal ends nothing half-way: what is imported below takes seconds

from functools import partial
from typing import TYPE_CHECKING

from mugv_ds.config import Status
from mugv_ds.config.command import leave, training_command
from mugv_ds.config.console import say
from mugv_ds.config.run import overview
from mugv_ds.config.vae_schema import VaeTrainConfig

if TYPE_CHECKING:  # the rest of the package is imported when it is needed: a wrong command line answers at once
    from mugv_ds.data.clips import ClipData
    from mugv_ds.engine.process import Process
    from mugv_ds.models.videovae import VideoVAE


def own_overview(config: VaeTrainConfig, process: "Process", data: "ClipData", vae: "VideoVAE") -> dict[str, str]:
    """Returns what runs, on what and with what; see `config.run.overview`."""
    trained = sum(p.numel() for p in vae.parameters() if p.requires_grad)
    held_out = "none held out" if data.validation is None else f"{len(data.validation):,} held out"
    lengths = ", ".join(str(reader.frames) for reader in data.readers.readers)
    return {
        "model": f"VideoVAE, {sum(p.numel() for p in vae.parameters()):,} parameters, {trained:,} of them trained, "
        f"{config.model.precision}" + ("" if config.gan is None else ", with a discriminator"),
        "device": f"{process.layout.world_size} × {process.card or 'CPU'}",
        "data": f"{config.data.manifest}: {len(data.train):,} rows, clips of {lengths} frames; {held_out}",
    }


def train(config: VaeTrainConfig) -> int:
    """Runs the training that `config` describes, as one of the processes of the launch.

    Returns:
        The exit status: 0 at the end of the run, 75 when it was asked to stop and saved before.

    Raises:
        InputError: config, data, weights or checkpoint cannot be used. TrainingError: the run cannot go on.
        PeerError: another rank met an error. Stopped: a rank was asked to stop before the first step.
    """
    import torch.distributed as dist

    from mugv_ds.checkpoint.places import place_of
    from mugv_ds.checkpoint.store import Store
    from mugv_ds.data.clips import ClipData
    from mugv_ds.engine.guard.stopping import stop_if_asked
    from mugv_ds.engine.preflight import preflight
    from mugv_ds.engine.process import check_same, start_process
    from mugv_ds.engine.vae.build import build_vae_engines
    from mugv_ds.engine.vae.loop import VaeTrainer
    from mugv_ds.engine.vae.preview import VaePreviews
    from mugv_ds.weights.vae_start import find_vae_weights, put_in

    process = start_process(config)
    stop_if_asked(process.host)
    if config.guard.preflight:
        preflight(config, process, place_of(config.checkpoint, process.rank))
    data = process.host.attempt(lambda: ClipData(config.data))
    check_same(data.content(), process.host, "all hosts must read the same files; copy them anew and start again")
    start, fresh = find_vae_weights(config, process.host.first)
    engines = build_vae_engines(config, process, partial(put_in, config, start) if fresh and start.path else None)
    stop_if_asked(process.host)
    previews = None
    if config.preview.every:
        previews = process.host.attempt(lambda: VaePreviews(config, process, engines.vae.module.vae, data.held_out))
    store = Store(config, process, engines.vae, data.order(), start, shapes=engines.shapes(), others=engines.others)
    try:
        began = time.perf_counter()
        taken = store.restore()
        restored = time.perf_counter() - began
        if process.rank == 0:
            begins = f"starting fresh, from {start.path or 'initial weights'}"
            say(overview(config, own_overview(config, process, data, engines.vae.module.vae)))
            say(f"going on after step {taken}" if taken else begins)
        trainer = VaeTrainer(config, process, engines, data=data, store=store, previews=previews)
        stopped = trainer.run(taken, restored)
    finally:
        store.close()
    dist.destroy_process_group()  # without it some processes abort at exit
    return Status.AGAIN if stopped else Status.DONE


def dry_run(config: VaeTrainConfig, world_size: int | None) -> str:
    """Returns what `--dry-run` prints: sizes, what is trained, and the merged config."""
    import torch

    from mugv_ds.config.deepspeed import micro_batches
    from mugv_ds.data.clips import ClipData
    from mugv_ds.models.videovae import VideoVAE
    from mugv_ds.models.videovae.training import freeze

    data, ranks = ClipData(config.data), world_size or 1
    with torch.device("meta"):
        vae = VideoVAE(config.model.videovae())
    freeze(vae, spatial=config.model.train == "temporal")
    trained = sum(p.numel() for p in vae.parameters() if p.requires_grad)
    accumulation = micro_batches(config.data.global_batch_size, config.data.micro_batch_size, ranks)
    held_out = "no held-out clips" if data.validation is None else f"{len(data.validation)} held-out clips"
    return "\n".join(
        [
            f"parameters: {sum(p.numel() for p in vae.parameters()):,}, {trained:,} of them trained",
            f"samples a step: {config.data.global_batch_size} = ranks {ranks} × accumulation {accumulation} × "
            f"micro-batch {config.data.micro_batch_size}",
            f"data: {len(data.train):,} rows, {held_out}; lengths "
            + ", ".join(f"{reader.frames} ({len(reader.alike(0)):,} rows)" for reader in data.readers.readers),
            "config:",
            config.model_dump_json(indent=2),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Parses the command line; returns the exit status, one of `config.errors.Status`."""
    return training_command(argv, __doc__, VaeTrainConfig, train, dry_run)


if __name__ == "__main__":
    leave(main())
