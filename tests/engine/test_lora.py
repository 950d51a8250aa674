"""Runs with adapters: the same gradients under every layout, with the base as the reference, which stays as it is."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mugv_ds.config import load_config
from mugv_ds.config.post_training_schema import LORA_TARGETS, LoraSection
from mugv_ds.data.run_data import RunData
from mugv_ds.models import DiT
from mugv_ds.models.dit import init_weights
from mugv_ds.models.flops import SampleCost
from mugv_ds.models.lora import adapters_off, add_adapters, is_factor
from mugv_ds.objectives.flow import flow_loss
from mugv_ds.objectives.preference import dpo_loss, kl_reference_point, kto_loss
from tests.engine.test_preference import BETA, LAYOUTS, SFT_WEIGHT, SHAPES, annotate, configure, policy
from tests.helpers import trainer
from tests.helpers.dataset import write_dataset
from tests.helpers.distributed import run_ranks

LORA = {"rank": 4, "alpha": 6.0}
RECOMPUTE = {  # every level somewhere
    ("dpo", "one"): "light",
    ("dpo", "dp2"): "full",
    ("dpo", "sp2-pp2"): "selective",
    ("kto", "sp2-pp2"): "off",
}
PLAIN = dict(reversed(RECOMPUTE))  # objective → layout whose config says what is expected


def adapted() -> DiT:
    """The model that the runs start with: its base and, off their initial zeros, adapters."""
    model = policy()
    model.requires_grad_(False)
    for block in model.blocks:
        add_adapters(block, LoraSection(**LORA))
    for name, parameter in model.named_parameters():
        if is_factor(name):
            init_weights(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[0] + ".", seed=0)
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def write_peft(folder: Path, model: DiT) -> None:
    """The adapters of a model as peft writes them."""
    folder.mkdir()
    tensors = {f"base_model.model.{name}": p.detach() for name, p in model.named_parameters() if is_factor(name)}
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(LORA_TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    manifest = write_dataset(root, SHAPES * 12)
    for objective in ("dpo", "kto"):
        annotate(manifest, objective)
    save_file(policy().state_dict(), root / "policy.safetensors")
    write_peft(root / "adapter", adapted())
    return root


def configured(root: Path, objective: str, layout: str) -> Path:
    path = configure(root / f"{objective}-{layout}", root, objective, LAYOUTS[layout])
    config = json.loads(path.read_text())
    config["lora"] = LORA | {"init_from": str(root / "adapter")}
    config["parallel"]["activation_checkpointing"] = RECOMPUTE[objective, layout]
    path.write_text(json.dumps(config))
    return path


def train_one_step(paths: list[Path]) -> None:
    """Beside the step it checks that the base is as it was, and has no gradient."""
    base = policy().state_dict()
    for path in paths:
        module = trainer.run(path, path.parent / "out", 1).engine.module
        for prefix, layer in module.named_layers():
            for name, parameter in layer.named_parameters():
                if not is_factor(name):
                    assert torch.equal(parameter, base[prefix + name]) and parameter.grad is None


@pytest.fixture(scope="module")
def results(root) -> dict[tuple[str, str], list[dict]]:
    paths = {(objective, layout): configured(root, objective, layout) for objective, layout in RECOMPUTE}
    for layout, (data, sequence, pipeline) in LAYOUTS.items():
        these = [path for (_, of), path in paths.items() if of == layout]
        run_ranks(data * sequence * pipeline, train_one_step, these)
    return {
        case: [torch.load(file, weights_only=True) for file in sorted((path.parent / "out").iterdir())]
        for case, path in paths.items()
    }


@cache
def expected(path: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and the adapters' gradients of step 0 by the formulas; the reference is the model without adapters."""
    config = load_config(path)
    data = RunData(config, SampleCost.of(config), 1)
    sources, step, model = data.readers, data.plan.step(0), adapted()

    def losses(refs) -> torch.Tensor:
        batch = sources(refs)
        out = model(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)
        return flow_loss(out, batch.target, batch.x_mask)

    now = losses(step.refs)
    with torch.no_grad(), adapters_off(model):
        then = losses(step.refs)
    assert (now - then).abs().mean() > 1e-3 * then.mean(), "the policy must differ from the reference"
    if config.preference.objective == "dpo":
        loss = dpo_loss(now[0::2], now[1::2], then[0::2], then[1::2], BETA).mean()
    else:
        good = sources(step.refs).role > 0
        weights = {"good_weight": 1.0, "bad_weight": 1.5}
        point = kl_reference_point(then - now.detach())
        loss = kto_loss(now, then, good, beta=BETA, kl_reference_point=point, **weights).mean()
    loss = loss + SFT_WEIGHT * losses(step.companions).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("objective", "layout"), RECOMPUTE)
def test_loss_and_gradients_are_those_of_the_formula(root, results, objective, layout):
    loss, gradients = expected(root / f"{objective}-{PLAIN[objective]}/config.json")
    ranks = results[objective, layout]
    for rank in ranks:
        assert rank["losses"] == pytest.approx([loss], rel=1e-5)
    found = {name: gradient for rank in ranks for name, gradient in rank["gradients"].items()}
    assert found.keys() == gradients.keys() and all(map(is_factor, found))
    errors = {name: float((found[name] - g).norm() / g.norm()) for name, g in gradients.items()}
    assert max(errors.values()) <= 1e-5, max(errors.items(), key=lambda item: item[1])
