"""What held-out samples say of a run: at fixed samples, timesteps and noise, comparable across layouts and stages."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mugv_ds.config.post_training_schema import PreferenceSection
from mugv_ds.data.readers import AnnotatedSamples, Reader
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.evaluate.evaluate import Evaluator, Measured
from mugv_ds.engine.metrics import preference_means
from mugv_ds.objectives.preference import dpo_terms, kl_reference_point, kto_terms


class Validation:
    """Measures the held-out manifests of a run. All ranks call it together.

    Args:
        preference: section of the config. data: of the run; held-out sets that are not given are not measured.
        references: losses of the reference on the held-out annotations, by source; None where there are none.
        evaluator: runs the samples.
    """

    def __init__(
        self,
        preference: PreferenceSection | None,
        data: RunData,
        references: Sequence[np.ndarray | None],
        evaluator: Evaluator,
    ) -> None:
        self._section, self._data, self._evaluator = preference, data, evaluator
        self._flows = data.held_out_flows()
        self._preferences: dict[str, AnnotatedSamples] = {}
        for number, reference in enumerate(references):
            reader = data.held_out_annotations(number, reference)
            if reader is not None:
                self._preferences[preference.sources[number].name] = reader

    def run(self, alive: Callable[[], None]) -> dict[str, float]:
        """Scalars by tag: the mean flow loss, also by quarter of the timesteps and by latent shape; preferences.

        A model that trains in fp8 is measured in bf16.

        Args:
            alive: called between the parts of the work.

        Raises:
            SampleError: a held-out sample cannot be used. PeerError: another rank met an error.
        """
        results = {}
        with self._evaluator.in_bf16():
            if self._flows is not None:
                results |= self._flow_losses(alive)
            for name, reader in self._preferences.items():
                measured = Measured.concatenate(part for _, part in self._measure(reader, alive))
                means = preference_means(self._terms(reader, measured))
                results |= {f"validation/preference/{name}/{key}": value for key, value in means.items()}
        return results

    def _measure(self, reader: Reader, alive: Callable[[], None]):
        sizes = self._data.batch_sizes(reader)
        for shape, measured, _ in self._evaluator.measure(reader, lambda shape: sizes[shape].micro, alive=alive):
            yield shape, measured

    def _flow_losses(self, alive: Callable[[], None]) -> dict[str, float]:
        by_shape: dict[str, list[Measured]] = {}
        for shape, measured in self._measure(self._flows, alive):
            by_shape.setdefault("x".join(map(str, shape)), []).append(measured)
        shapes = {name: Measured.concatenate(parts) for name, parts in by_shape.items()}
        whole = Measured.concatenate(shapes.values())
        results = {"validation/loss": whole.loss.mean()}
        for q in range(4):
            quarter = (whole.timestep // 250).clip(max=3) == q
            if quarter.any():
                results[f"validation/loss_t{250 * q}-{250 * (q + 1)}"] = whole.loss[quarter].mean()
        return results | {f"validation/loss_{name}": part.loss.mean() for name, part in shapes.items()}

    def _terms(self, reader: AnnotatedSamples, measured: Measured) -> dict[str, torch.Tensor]:
        """Sums of the preference terms over held-out items."""
        section = self._section
        size = measured.elements if section.reduction == "sum" else np.ones_like(measured.elements)
        loss, reference = (torch.from_numpy(values * size) for values in (measured.loss, measured.reference))
        rows = measured.row.astype(np.int64)
        if section.objective == "dpo":
            place = np.empty(rows.max() + 1, np.int64)
            place[rows] = np.arange(len(rows))
            better, worse = place[reader.rows].T
            return dpo_terms(loss[better], loss[worse], reference[better], reference[worse], section.beta)
        good = torch.from_numpy(reader.roles[rows, 0] > 0)
        return kto_terms(loss, reference, good, section.beta, kl_reference_point(reference - loss))
