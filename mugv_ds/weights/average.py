"""Averages weights after training, from the tensors of its checkpoints.

`ensemble` averages the weights of checkpoints; `reconstruct` makes a power-function EMA of any width from the EMAs that
training stored (post-hoc EMA, Karras et al. 2024, section 3).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mugv_ds.checkpoint.reader import CheckpointReader
from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.config.power_profile import MAX_SIGMA_REL, kind_sigma_rel
from mugv_ds.config.text_encoder import agree
from mugv_ds.weights.base import Weights
from mugv_ds.weights.coefficients import Fit, decay_coefficients, fit_profile


@dataclass(frozen=True)
class Term:
    """One term of an average: a checkpoint, the kind of its tensors ("weight" or an EMA) and their coefficient."""

    source: CheckpointReader
    kind: str
    coefficient: float


class Average(Weights):
    """The weights Σ coefficient · tensor over checkpoints.

    A tensor is summed in fp64 when it is asked for, so that only one is in memory at a time.

    Args:
        terms: at least one. dtype: of the tensors that are returned.

    Raises:
        CheckpointError: the checkpoints are not all of one model, or not trained on features of one text encoder.
    """

    def __init__(self, terms: Sequence[Term], dtype: torch.dtype) -> None:
        self.path = terms[-1].source.folder
        said = {str(term.source.folder): term.source.manifest.text_encoder for term in terms}
        self.text_encoder = agree(said, "average checkpoints that were trained on the same features", CheckpointError)
        self._terms, self._dtype = terms, dtype
        self._shapes = _common_shapes([term.source for term in terms])

    def __getitem__(self, name: str) -> Tensor:
        total = torch.zeros(self._shapes[name], dtype=torch.float64)
        for term in self._terms:
            total.add_(term.source.read(name, term.kind), alpha=term.coefficient)
        return total.to(self._dtype)

    def meta(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], dtype=self._dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def recipe(self) -> str:
        """Returns what the average is made from, as JSON."""
        terms = [
            {
                "checkpoint": str(term.source.folder),
                "step": term.source.manifest.step,
                "kind": term.kind,
                "coefficient": term.coefficient,
            }
            for term in self._terms
        ]
        return json.dumps(terms)


def ensemble(checkpoints: Sequence[CheckpointReader], gamma: float, dtype: torch.dtype) -> Average:
    """Averages the weights θ_i of N checkpoints, ordered by their steps: Σ γ^(N−i) θ_i / Σ γ^(N−i).

    Args:
        checkpoints: in any order. gamma: γ; 1 weighs all equally. dtype: of the average.
    Raises:
        InputError: γ is not in (0, 1].
        CheckpointError: a step comes twice, or the models are not all the same.
    """
    if not 0 < gamma <= 1:
        raise InputError(f"γ = {gamma}: must be above 0 and at most 1; 1 weighs all checkpoints equally")
    ordered = _by_step(checkpoints)
    coefficients = decay_coefficients(len(ordered), gamma)
    terms = [Term(source, "weight", c) for source, c in zip(ordered, coefficients, strict=True)]
    return Average(terms, dtype)


def reconstruct(checkpoints: Sequence[CheckpointReader], sigma_rel: float, dtype: torch.dtype) -> tuple[Average, Fit]:
    """Makes the power-function average of width σ_rel at the last of the checkpoints, from the averages that they hold.

    Args:
        checkpoints: in any order. sigma_rel: see `config.power_profile`. dtype: of the average.
    Returns:
        The average, and how well its profile fits the wanted one.
    Raises:
        InputError: σ_rel is not in (0, 12^-½).
        CheckpointError: the last checkpoint holds no averages, a step comes twice, or the models are not all the same.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise InputError(f"σ_rel = {sigma_rel}: must be above 0 and below {MAX_SIGMA_REL:.4f}, the mean of all steps")
    ordered = _by_step(checkpoints)
    stored = [
        (source, kind, sigma)
        for source in ordered
        for kind in sorted(source.manifest.kinds)
        if (sigma := kind_sigma_rel(kind)) is not None
    ]
    last = ordered[-1]
    if not stored or stored[-1][0] is not last:
        raise CheckpointError(
            f"{last.folder}: holds no averages of the weights; it was saved with an empty ema.sigma_rel"
        )
    fit = fit_profile([(source.manifest.step, sigma) for source, _, sigma in stored], last.manifest.step, sigma_rel)
    terms = [Term(source, kind, c) for (source, kind, _), c in zip(stored, fit.coefficients, strict=True) if c != 0]
    return Average(terms, dtype), fit


def _by_step(checkpoints: Sequence[CheckpointReader]) -> list[CheckpointReader]:
    """Returns the checkpoints ordered by step, and raises CheckpointError where two have one step."""
    ordered = sorted(checkpoints, key=lambda source: source.manifest.step)
    for before, after in pairwise(ordered):
        if before.manifest.step == after.manifest.step:
            raise CheckpointError(
                f"{after.folder}: is of step {after.manifest.step}, as {before.folder} is; name only one of them"
            )
    return ordered


def _common_shapes(sources: Sequence[CheckpointReader]) -> dict[str, tuple[int, ...]]:
    """Returns the tensors' shapes by name, and raises CheckpointError where the checkpoints' differ."""
    first, *others = ({name: tuple(source.shape(name)) for name in source.names()} for source in sources)
    for source, shapes in zip(sources[1:], others, strict=True):
        for name in [*first, *shapes]:
            if first.get(name) != shapes.get(name):
                raise CheckpointError(
                    f"{source.folder}: {name} is {_shown(shapes, name)}, in {sources[0].folder} it is "
                    f"{_shown(first, name)}; average checkpoints of one model"
                )
    return first


def _shown(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"
