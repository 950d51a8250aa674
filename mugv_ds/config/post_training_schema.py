"""The sections of post-training: preferences, rewards, adapters. See `schema`, whose configs hold them."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mugv_ds.config.section import Count, Decay, Name, Samples, Section, Weight
from mugv_ds.config.url import Place

# The linears of a block, by published name.
LORA_TARGETS = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp.fc1",
    "mlp.fc2",
)
LoraTarget = Literal[LORA_TARGETS]


class SourceSection(Section):
    """One set of preference annotations."""

    name: str = Field(description="What TensorBoard calls it.", pattern="^[A-Za-z0-9_-]+$")
    manifest: Place = Field(description="CSV with pair_id and rank (dpo; the lower rank is the better) or label (kto).")
    weight: Weight = Field(1.0, description="Share of the preference samples, relative to the other sources'.")
    reference: str | None = Field(
        None,
        description="Parquet file of the reference's errors, which `make reference` writes. null: they are computed at "
        "the start of the run, before the weights change; for small sets.",
    )
    val_manifest: Place | None = Field(
        None, description="CSV of held-out annotations; their reference is always computed."
    )


class PreferenceSection(Section):
    """Post-training on preferences; data.manifest is then the SFT set that regularises.

    The recipe is that of Seaweed-7B (2025, arXiv 2504.08685) where it says one: a fixed reference, one round, an SFT
    loss, and given first frames in no side's error. λ and bounds are ours.
    """

    objective: Literal["dpo", "kto"] = Field(description="Flow-DPO on pairs, or Flow-KTO on single labelled clips.")
    sources: tuple[SourceSection, ...] = Field(
        description="Annotation sources, interleaved step by step.", min_length=1
    )
    beta: float = Field(
        5000.0,
        gt=0,
        le=1e9,
        description="β, constant over timesteps. 5000 with mean-reduced errors is that of Wallace et al. 2024 "
        "(Diffusion-DPO). The 100 of Seaweed-7B (2025) comes without the reduction that it goes with; taken with means "
        "it would be 50 times weaker.",
    )
    reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="Whether a sample's error, in the objective, is the mean over its noised elements or their sum; "
        "with sum, β has to be smaller by their number.",
    )
    good_weight: Weight = Field(1.0, description="λ of good samples (kto). Ours.")
    bad_weight: Weight = Field(1.0, description="λ of bad samples (kto). Ours.")
    sft_weight: float = Field(
        0.1,
        ge=0,
        le=1e6,
        description="λ of the SFT loss on data.manifest in the total, as the source has it for DPO and KTO. The weight "
        "is ours: the source gives none; 0: no SFT samples.",
    )
    better_sft_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="λ of the SFT loss on the better (good) samples themselves, as in Seaweed-7B (2025), which costs "
        "nothing: a step has it anyway. 0 by default, as better samples are mostly a model's own and hand-picked clips "
        "regularise; for real clips (RealDPO) give it some.",
    )
    sft_ratio: float = Field(
        0.5,
        gt=0,
        le=1000,
        description="SFT samples for each preference sample of a step, of the same latent shape. Ours.",
    )
    max_better_ratio: float = Field(
        2.0,
        gt=1,
        le=1e6,
        description="The run stops when, between two records, the better (good) side's mean error exceeds the "
        "reference's this many times: both sides rising is the known failure. Ours.",
    )
    max_worse_ratio: float = Field(
        5.0,
        gt=1,
        le=1e6,
        description="Likewise for the worse (bad) side, whose error is meant to rise, but not without end: what no "
        "objective holds back destroys the samples on both sides. Ours.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "PreferenceSection":
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"preference.sources: names must differ, these are {', '.join(names)}")
        return self


class RewardFunctionSection(Section):
    """What judges rollouts: a command, an HTTP endpoint or a Python function, by one protocol; see docs/reward.md."""

    name: Name = Field(description="What messages and files call it.")
    weights: dict[Name, Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        description="Names of the numbers that it gives for a video, and their weights in the reward, in which each is "
        "measured in units of its own spread. A negative weight asks for less; 0 only records the number.",
        min_length=1,
    )
    command: tuple[str, ...] | None = Field(
        None,
        description="Program and arguments, where the program python is the one that trains. It reads the request from "
        "stdin and writes the answer to stdout.",
        min_length=1,
    )
    url: str | None = Field(
        None, description="http:// or https:// address that the request is posted to.", pattern="^https?://"
    )
    entry_point: str | None = Field(
        None,
        description="package.module:function, called with the list of videos; it returns the numbers by id and name.",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
    )
    in_process: bool = Field(
        False,
        description="Call the entry point in rank 0's own process, where it can hold a model but also take memory or "
        "end the run, and cannot be timed out; by default it has a process of its own for every request.",
    )
    batch: Count = Field(32, description="Videos of a request.")
    timeout_s: float = Field(600.0, gt=0, le=7 * 24 * 3600, description="Seconds that a request may take.")
    retries: int = Field(2, ge=0, le=100, description="How many times a request that failed is made again.")

    @model_validator(mode="after")
    def _is_one(self) -> "RewardFunctionSection":
        given = [name for name in ("command", "url", "entry_point") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"reward.functions.{self.name}: must have one of command, url and entry_point, "
                f"{' and '.join(given) or 'none'} given"
            )
        if self.in_process and self.entry_point is None:
            raise ValueError(
                f"reward.functions.{self.name}.in_process: has no effect without entry_point; leave it out"
            )
        return self


class RewardSection(Section):
    """Online learning from a reward, in rounds of rollouts, rewards and updates by DiffusionNFT (arXiv 2509.16117).

    data.manifest is then the real data whose flow loss keeps the policy near to them, as in DDRL (arXiv 2512.04332).
    """

    manifest: Place = Field(
        description="CSV of prompts: a rollout takes a row's text features, size, fps and, if asked, first frame."
    )
    dir: str = Field(description="Folder of the rounds' rollouts and rewards, which all hosts share.")
    codec: str = Field(description="What makes pixels of rollouts, see preview.codec.")
    functions: tuple[RewardFunctionSection, ...] = Field(description="What judges the rollouts.", min_length=1)
    prompts: Samples = Field(description="Rows of a round, all of one latent shape.")
    rollouts: int = Field(ge=2, le=1 << 16, description="Rollouts of each row, among which its rewards are compared.")
    passes: Count = Field(1, description="How often each rollout is trained on in its round.")
    steps: Count = Field(10, description="Evaluations of the model for a rollout (10: as in the paper's training).")
    guidance: float = Field(
        1.0, ge=0, le=1000, description="Weight of the caption in rollouts; the method needs none: 1."
    )
    first_frame: bool = Field(False, description="Give the first latent frame of the row clean (image-to-video).")
    sample_batch: Samples = Field(1, description="Rollouts that a replica samples at once.")
    beta: float = Field(
        1.0,
        gt=0,
        le=1e3,
        description="β of the loss: how far v⁺ and v⁻ lie from the old policy. The paper finds values near 1 stable, "
        "and smaller ones faster.",
    )
    advantage_clip: float = Field(
        5.0,
        gt=0,
        le=1e3,
        description="Advantage, in spreads, from which on a rollout is wholly good or bad. 5 is the released code's; "
        "smaller values go further in a round.",
    )
    old_decay: float = Field(
        0.001,
        ge=0,
        lt=1,
        description="η: after round i the old policy keeps min(η·i, old_decay_max) of itself and takes the rest of the "
        "trained one. 0.001 and 0.5 are the paper's; 0: the policy of each round is the trained one.",
    )
    old_decay_max: Decay = Field(0.5, description="Largest share that the old policy keeps of itself.")
    data_weight: float = Field(
        0.1, ge=0, le=1e6, description="Weight of the flow loss on data.manifest. Ours; 0: no real data."
    )
    data_ratio: float = Field(
        0.5, gt=0, le=1000, description="Real samples for each rollout of a step, of the same latent shape. Ours."
    )
    keep_rounds: Count = Field(
        10, description="Newest rounds whose latents and videos are kept; the rewards of all are."
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "RewardSection":
        for what, names in (
            ("names", [function.name for function in self.functions]),
            ("names of numbers", [name for function in self.functions for name in function.weights]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"reward.functions: {what} must differ, these are {', '.join(names)}")
        if not any(self.weights.values()):
            raise ValueError("reward.functions: all weights are 0, so nothing is rewarded; give one a weight")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Returns the weight of every number, by its name."""
        return {name: weight for function in self.functions for name, weight in function.weights.items()}

    @property
    def samples(self) -> int:
        """Returns the rollouts of a round."""
        return self.prompts * self.rollouts


class LoraSection(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021): they alone are trained, and every other weight is frozen."""

    rank: int = Field(
        32, ge=1, le=1024, description="Rank r of each adapter; 32 is that of DiffSynth-Studio's examples for Wan 2.1."
    )
    alpha: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="An adapter's product is scaled by alpha / rank. By default alpha is the rank, as in diffusers' "
        "training scripts.",
    )
    targets: tuple[LoraTarget, ...] = Field(
        LORA_TARGETS,
        min_length=1,
        description="Linears of every block that get an adapter, by published name; by default all (Dettmers et al. "
        "2023, QLoRA, section 4: adapters on all linears are needed to match full training).",
    )
    init_from: Place | None = Field(
        None,
        description="Adapter in peft's format (folder, or its adapter_model.safetensors with adapter_config.json "
        "beside it) to start from; by default A is random and B zero, so that the run starts at its base.",
    )

    @property
    def scaling(self) -> float:
        """Returns what an adapter's product is scaled by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @field_validator("targets")
    @classmethod
    def _differ(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) < len(targets):
            raise ValueError(f"lora.targets: must differ, these are {', '.join(targets)}")
        return targets
