"""What the last pipeline stage minimises, and what it reports of it.

A rank holds part of a sample's tokens, so its squared errors are part of the sample's loss ℓ; and DeepSpeed averages
gradients over the ranks that share a sample, whose parts have to be summed: hence the factors `sequence`.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.post_training_schema import PreferenceSection, RewardSection
from mugv_ds.objectives.flow import loss_by_quartile, weighted_error
from mugv_ds.objectives.preference import PREFERENCE_TERMS, dpo_loss, dpo_terms, kto_loss, kto_terms
from mugv_ds.objectives.reward import REWARD_TERMS, nft_errors, nft_loss, nft_terms
from mugv_ds.parallel.pipeline import Labels

QUARTILE_TERMS = tuple(f"{kind}_q{q}" for q in range(4) for kind in ("loss", "count"))


class Objective:
    """The flow loss or, for micro-batches that have roles, that of a preference or of a reward.

    Without gradients it takes notes.

    Args:
        preference, reward: sections of the config, of which one is None; both are for flow matching alone.
        group: ranks that share a sequence, None where there are none. sequence: how many they are.

    Attributes:
        terms: names of what is reported of every micro-batch.
        kl_reference_point: KTO's KL reference point z of the step; set before it.
        recorded: ℓ [B] of every micro-batch that went through without gradients, until it is taken away.
        velocities: likewise the velocities [B, n, P, 24], on the CPU, while it is a list; None: they are not kept.
        old: the velocities of the old policy for the micro-batches of rollouts of the step, in their order; set before
            it.
    """

    def __init__(
        self,
        preference: PreferenceSection | None,
        reward: RewardSection | None,
        group: dist.ProcessGroup | None,
        sequence: int,
    ) -> None:
        self.terms = QUARTILE_TERMS + (PREFERENCE_TERMS if preference else ()) + (REWARD_TERMS if reward else ())
        self.kl_reference_point = 0.0
        self.recorded: list[Tensor] = []
        self.velocities: list[Tensor] | None = None
        self.old: Iterator[Tensor] = iter(())
        self._preference, self._reward, self._group, self._sequence = preference, reward, group, sequence

    def __call__(self, velocity: Tensor, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
        """(this rank's loss, a scalar; sums to report by `terms`).

        Args:
            velocity: [B, n, P, 24], predicted for the tokens that this rank holds.
        """
        part_B = weighted_error(velocity, labels.target_BnPC, labels.weight_BnP1)
        zeros = dict.fromkeys(self.terms, part_B.new_zeros(()))
        if not torch.is_grad_enabled():
            loss_B = self._summed(part_B)
            self.recorded.append(loss_B)
            if self.velocities is not None:
                self.velocities.append(velocity.detach().to("cpu", copy=True))
            return loss_B.mean(), zeros
        if not len(labels.role):
            loss_B = part_B * self._sequence
            return (loss_B * labels.scale).mean(), zeros | loss_by_quartile(loss_B, labels.timestep)
        if self._reward is not None:
            loss, terms = self._learn(velocity, labels)
            return loss, zeros | terms
        whole_B = self._summed(part_B.detach())
        loss_B = whole_B + (part_B - part_B.detach()) * self._sequence  # the sum, with the gradient of this part
        loss, terms = self._prefer(loss_B, labels)
        return loss, zeros | terms

    def _summed(self, part_B: Tensor) -> Tensor:
        """ℓ [B] of the whole samples."""
        if self._group is not None:
            part_B = part_B.clone()
            dist.all_reduce(part_B, group=self._group)
        return part_B

    def _learn(self, velocity: Tensor, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
        """DiffusionNFT's loss of rollouts. It is linear in the errors, so that the ranks' parts of them will do."""
        old_BnPC, weight_BnP1 = next(self.old).to(velocity), labels.weight_BnP1
        errors = nft_errors(velocity, old_BnPC, labels.target_BnPC, weight_BnP1, self._reward.beta)
        positive_B, negative_B = (error_B * self._sequence for error_B in errors)
        moved_B = weighted_error(velocity.detach(), old_BnPC, weight_BnP1) * self._sequence
        loss_B = nft_loss(positive_B, negative_B, labels.optimality)
        return (loss_B * labels.scale).mean(), nft_terms(positive_B, negative_B, moved_B)

    def _prefer(self, loss_B: Tensor, labels: Labels) -> tuple[Tensor, dict[str, Tensor]]:
        section, reference_B = self._preference, labels.reference
        mean_B, good_B = loss_B, labels.role > 0
        size_B = labels.elements if section.reduction == "sum" else torch.ones_like(loss_B)
        loss_B, reference_B = loss_B * size_B, reference_B * size_B
        if section.objective == "dpo":  # better and worse take turns
            sides = loss_B[0::2], loss_B[1::2], reference_B[0::2], reference_B[1::2]
            lost_B, scale_B, better_B = dpo_loss(*sides, section.beta), labels.scale[0::2], mean_B[0::2]
            terms = dpo_terms(*sides, section.beta)
        else:
            z = loss_B.new_tensor(self.kl_reference_point)
            weights = {"good_weight": section.good_weight, "bad_weight": section.bad_weight}
            lost_B = kto_loss(loss_B, reference_B, good_B, beta=section.beta, kl_reference_point=z, **weights)
            scale_B, better_B = labels.scale, mean_B * good_B
            terms = kto_terms(loss_B, reference_B, good_B, section.beta, z)
        return ((lost_B + section.better_sft_weight * better_B) * scale_B).mean(), terms
