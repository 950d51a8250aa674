"""The schema of a training config: every key with its type, default and meaning.

Unknown keys are errors. Each section is a pydantic model; its fields' descriptions are the reference of the keys.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mugv_ds.config.model import HEAD_DIM, PRESETS, DiTConfig
from mugv_ds.config.operation_schema import MonitorSection, PreflightSection
from mugv_ds.config.post_training_schema import LoraSection, PreferenceSection, RewardSection
from mugv_ds.config.power_profile import MAX_SIGMA_REL
from mugv_ds.config.section import Count, Decay, Ranks, Samples, Section, Share, Size, Steps, StepsOrNever, Tokens
from mugv_ds.config.url import Place, is_url

BlockNumber = Annotated[int, Field(ge=0, lt=1024)]


class ModelSection(Section):
    """The sizes of the model, and how it computes."""

    preset: Literal[tuple(PRESETS)] = Field(description="A published size; the keys below override single values.")
    hidden_size: int | None = Field(None, ge=1, le=1 << 17, description="Width D; must be num_heads × 72.")
    num_heads: int | None = Field(None, ge=1, le=1024, description="Attention heads, 72 wide each.")
    depth: int | None = Field(None, ge=1, le=1024, description="Number of blocks.")
    caption_channels: int | None = Field(
        None, ge=1, le=1 << 16, description="Width of the text features (4096 for T5-XXL)."
    )
    precision: Literal["bf16", "fp8", "fp32"] = Field(
        "bf16",
        description="Dtype of weights and activations; fp32 for tests. fp8 is bf16 with the products of the blocks' "
        "large linears in fp8, each factor scaled by its own largest value (docs/performance.md, fp8). Held-out "
        "losses and what is sampled to look at are of the weights in bf16, as they are published.",
    )
    fp8_backend: Literal["native", "te"] = Field(
        "native", description="What computes in fp8: kernels of this package, or Transformer Engine."
    )
    fp8_blocks: tuple[BlockNumber, BlockNumber] | None = Field(
        None, description="First and last block, counted from 0, that compute in fp8; null for all of them."
    )
    attention: Literal["auto", "flash4", "flash4_padded", "flash2", "cudnn", "sdpa", "te"] = Field(
        "auto",
        description="Self-attention. auto times every installed backend on the run's shape at the start, checks "
        "its gradients, and takes the fastest that is right.",
    )
    compile: bool = Field(False, description="torch.compile what is not fused by hand in each block.")

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """Returns the dtype of weights and activations; with fp8 that is bf16."""
        return "fp32" if self.precision == "fp32" else "bf16"

    def blocks_in_fp8(self) -> range:
        """Returns the numbers of the blocks that compute in fp8, if `precision` is fp8."""
        first, last = self.fp8_blocks or (0, self.dit().depth - 1)
        return range(first, last + 1)

    def dit(self) -> DiTConfig:
        """Returns the sizes of the model: the preset with this section's overrides.

        Raises:
            ConfigError: the sizes do not fit together.
        """
        names = ("hidden_size", "num_heads", "depth", "caption_channels")
        overrides = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(PRESETS[self.preset], **overrides)


class BudgetSection(Section):
    """Makes steps of all shapes cost about the same; `data.global_batch_size` then holds for one shape only."""

    shape: tuple[Size, Size, Size] = Field(
        description="Latent (T, H, W) of which a step holds data.global_batch_size samples. Steps of other shapes hold "
        "as many as cost the same."
    )
    by: Literal["flops", "seconds"] = Field(
        "flops",
        description="What a sample costs: the model's FLOPs, or the seconds that its blocks are predicted to take on "
        "data.budget.machine, where short sequences run at lower efficiency. A run goes on with what it began with.",
    )
    machine: str | None = Field(
        None,
        max_length=4096,
        description="Calibration that predicts the seconds: the name of one that is shipped with the planner, such as "
        "nvidia-h200-torch2.11, or the path of a file of tools/calibrate.py. It need not be the machine of the run. "
        'Required when data.budget.by is "seconds".',
    )
    multiple: Samples = Field(
        8,
        description="Samples (or pairs) of a step are a multiple of this, which the data ranks must divide: steps then "
        "do not depend on how many there are. The larger it is, the further costs are apart. Of those within 3% of the "
        "cost that is taken which splits into micro-batches best.",
    )
    device_tokens: Tokens = Field(
        description="Tokens that a device may hold at once, the sequence ranks' share of a micro-batch. A micro-batch "
        "has as many samples as fit, at most data.micro_batch_size."
    )

    @model_validator(mode="after")
    def _has_a_machine(self) -> "BudgetSection":
        if (self.by == "seconds") != (self.machine is not None):
            raise ValueError(
                'data.budget.machine: required when data.budget.by = "seconds", and has no effect otherwise; '
                "name a calibration or leave both out"
            )
        return self


class GroupSection(Section):
    """One group of the training set, and its share of the samples. A row belongs to the first group that it fits."""

    name: str = Field(description="What TensorBoard calls it.", pattern="^[A-Za-z0-9_-]+$")
    kind: Literal["image", "video"] | None = Field(
        None, description="Only rows of this kind; rows that do not say are images if their latent has one frame."
    )
    frames: tuple[Size, Size] | None = Field(None, description="Only latents with from … to frames.")
    share: tuple[tuple[StepsOrNever, Share], ...] = Field(
        description="Share of the samples as points [step, share], linear in between and constant outside; shares are "
        "taken relative to those of the other groups. The source says that images give way to clips and 2 s to 5 s, "
        "not how fast: the shares of the configs are ours."
    )

    @model_validator(mode="after")
    def _rises(self) -> "GroupSection":
        """Checks that the points' steps and the frames ascend."""
        steps = [step for step, _ in self.share]
        if not steps or steps != sorted(set(steps)):
            raise ValueError(f"data.mixture.{self.name}: share must have points [step, share] of ascending steps")
        if self.frames is not None and self.frames[0] > self.frames[1]:
            raise ValueError(f"data.mixture.{self.name}: frames = {list(self.frames)}: the first exceeds the second")
        return self


class DataSection(Section):
    """The training set, and the batches that are made of it."""

    manifest: Place = Field(
        description="CSV of the training set; paths in it are relative to its folder, or to data.root. Of a URL "
        "(s3://bucket/set/train.csv), as all CSVs of a run may be, each host keeps a copy, with the text_encoder.json "
        "beside it."
    )
    val_manifest: Place | None = Field(None, description="CSV of held-out samples for the validation loss.")
    root: Place | None = Field(
        None,
        description="Folder or fsspec URL (s3://bucket/set) that the paths in all CSVs of the run, and "
        "data.null_text_path, are relative to; by default each CSV's folder. Credentials and options are those that "
        "fsspec finds in the environment; they must permit to list and to read. s3:// needs s3fs, gs:// gcsfs, "
        "https:// aiohttp.",
    )
    cache_dir: str | None = Field(
        None,
        description="Folder on the disk of each host in which the samples that come from a URL are kept, for all ranks "
        "and loader workers of the host. By default they are fetched every time.",
    )
    cache_gib: float | None = Field(
        None,
        gt=0,
        le=1 << 20,
        description="What is kept in cache_dir at most; what was not used for longest makes room. Required with it.",
    )
    index_dir: str | None = Field(
        None, description="Folder of the memory-mapped index; by default .index beside the CSV, or beside its copy."
    )
    null_text_path: str | None = Field(
        None,
        description="Text features that replace a dropped caption, a path as those in the CSV: those of the negative "
        "prompt, so that training sees what guidance subtracts. Required when flow.caption_drop > 0.",
    )
    global_batch_size: Samples = Field(description="Samples an optimizer step, over all ranks and accumulation.")
    micro_batch_size: Samples = Field(
        1, description="Samples a data rank holds at once; with data.budget the most that it does."
    )
    budget: BudgetSection | None = Field(None, description="Balances the cost of steps of different shapes.")
    mixture: tuple[GroupSection, ...] = Field(
        (), description="Groups of the training set that are mixed in given shares; empty: every row as often."
    )
    max_row_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Latent shapes with so few rows that one of them would fill more than this share of a step, all of "
        "whose samples are of one shape, are left out and counted. Ours.",
    )
    max_text_tokens: int = Field(
        300, ge=1, le=1 << 16, description="Captions are padded to this length (T5 of the published model: 300)."
    )
    default_fps: float = Field(
        30.0, gt=0, le=1000, description="Frames a second of a sample whose manifest row does not say."
    )
    num_workers: int = Field(10, ge=0, le=1024, description="Loader processes of a rank that reads (published: 10).")
    seed: int = Field(6309, ge=0, lt=1 << 63, description="Seed of the order, the noise and the initial weights.")

    @model_validator(mode="after")
    def _bounds_its_cache(self) -> "DataSection":
        if (self.cache_dir is None) != (self.cache_gib is None):
            raise ValueError("data.cache_dir, data.cache_gib: one says nothing without the other; give both or neither")
        return self


class FlowSection(Section):
    """The flow-matching objective: timestep shift, and what the model is given beside noise."""

    shift: Literal["resolution"] | Annotated[float, Field(gt=0, le=1000)] = Field(
        "resolution",
        description="Timestep shift r: 'resolution' is sqrt(height·width / 512²)·sqrt(latent frames), or a number.",
    )
    caption_drop: Share = Field(
        0.1, description="Share of samples trained without caption. Ours: 0.1 as in Ho & Salimans 2022; unpublished."
    )
    first_frame_share: Share = Field(
        0.0,
        description="Share of clips whose first latent frame is given clean (image-to-video). The source has it in "
        "stages 2 and 3 and gives no value; 0.3 in the configs is ours.",
    )


Level = Literal["off", "light", "selective", "attention", "full"]


class ParallelSection(Section):
    """The layout of the ranks, data × sequence × pipeline, and activation checkpointing."""

    data: Ranks | Literal["fit"] | None = Field(
        None,
        description="Data-parallel replicas; by default world / (sequence · pipeline). fit: as many as the launch has "
        "processes for and the samples of a step can be split over; processes that are left over end at once. A run "
        "that lost a host goes on with the others, on the same samples, and grows when it is back.",
    )
    sequence: Ranks = Field(1, description="Ranks that share one sample's tokens (Ulysses); must divide the heads.")
    pipeline: Ranks = Field(1, description="Pipeline stages; at most the number of blocks.")
    activation_checkpointing: Level | Literal["auto"] | Annotated[list[Level], Field(min_length=1)] = Field(
        "off",
        description="Which activations of a block are saved for the backward pass, which computes the others again. "
        "full: the block's input alone, one tensor of [tokens, D]. attention: also self-attention's output and the "
        "log-sum-exp of its softmax, so that attention is not computed again; 2 such tensors in all. selective: also "
        "q, k and v of self-attention and the feed-forward layer's input; 7.3. light: also the "
        "outputs of the large linears, that is qkv before its norm, GELU's input and the feed-forward layer's output; "
        "15.3. What lies between self-attention and the feed-forward layer (the projection of o, the residual, "
        "cross-attention) is computed again. off: that too is saved; 20.3. The outputs of modulated LayerNorms and of "
        "GELU are saved at no level (but through Transformer Engine), as computing them again costs next to nothing. "
        "docs/performance.md has times and peaks. A list has a level for each block of the model. auto: each block's "
        "level so that the predicted memory fills the device (see memory_gib) and the step is predicted to be the "
        "fastest.",
    )
    memory_gib: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None,
        description="Memory of a device that activation_checkpointing = auto fills. null: of a GPU what CUDA and NCCL "
        "leave of it; on a CPU no bound.",
    )
    offload: Literal["none", "attention_output", "all"] = Field(
        "none",
        description="What of a block's saved activations waits for the backward pass in pinned host memory, with "
        "activation_checkpointing = attention. attention_output: self-attention's output and its log-sum-exp; all: "
        "the block's input too. The copies run beside the computation, a block ahead in the backward pass.",
    )

    def levels(self, depth: int) -> tuple[str, ...]:
        """Returns the level of each of so many blocks; "off" while "auto" has not chosen, see `plan.levels`."""
        asked = self.activation_checkpointing
        return tuple(asked) if isinstance(asked, list) else ("off" if asked == "auto" else asked,) * depth


class OptimizerSection(Section):
    """The optimizer, and gradient clipping."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: the large matrices of the blocks and of adaLN are moved by Muon (momentum, orthogonalised "
        "chunk by chunk, CMuon, arXiv 2608.02502), all else by AdamW. It keeps 4 bytes a parameter of these instead of "
        "8. Gradients are clipped before.",
    )
    lr: float = Field(
        1e-5,
        gt=0,
        le=1,
        description="Peak learning rate of AdamW; 1e-5 is the published trainer's default, that of stage 3 "
        "and SFT. The source gives none by stage: 1e-4 in stages 1 and 2 is that of DiT (Peebles & Xie 2023), 1e-7 for "
        "DPO is that of Seaweed-7B (2025), which KTO takes over.",
    )
    adamw_lr: float | None = Field(
        None, gt=0, le=1, description='Peak rate of what AdamW moves with optimizer.kind = "muon"; by default lr.'
    )
    width_reference: int | None = Field(
        None,
        ge=HEAD_DIM,
        le=1 << 17,
        description="Width of the model that lr was tuned with. Rates and initial weights then follow the model's own "
        "width by µP for diffusion transformers (Zheng et al. 2025, arXiv 2505.15270): docs/optimizer.md has the rule. "
        "null: they do not. 1728 in stages 1 and 2, the width of the 2B proxy, is ours.",
    )
    muon_momentum: float = Field(
        0.95, ge=0, lt=1, description="Decay of Muon's Nesterov momentum (Jordan et al. 2024)."
    )
    muon_scale: Literal["rms", "spectral"] = Field(
        "rms",
        description="Size of Muon's update of a matrix [m, n]: rms, 0.2·√max(m, n), that of AdamW's, so that its rates "
        "carry over (Moonlight, Liu et al. 2025); spectral, √max(1, m/n) (Jordan et al. 2024).",
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW moment decay.")
    eps: float = Field(1e-10, ge=1e-15, le=1, description="AdamW epsilon (published default 1e-10).")
    weight_decay: float = Field(0.0, ge=0, le=100, description="Decoupled weight decay.")
    gradient_clipping: float = Field(
        1.0, ge=0, le=1e6, description="Largest global gradient norm; 0 switches clipping off."
    )

    @field_validator("width_reference")
    @classmethod
    def _is_a_width(cls, width: int | None) -> int | None:
        if width is not None and width % HEAD_DIM:
            raise ValueError(f"optimizer.width_reference = {width}: must be a multiple of {HEAD_DIM}, as any width is")
        return width


class ScheduleSection(Section):
    """The learning rate over the steps, and the length of the run."""

    kind: Literal["constant", "cosine", "linear"] = Field("constant", description="Shape of the rate after warm-up.")
    warmup_steps: StepsOrNever = Field(100, description="Steps of linear warm-up from 0.")
    steps: Steps = Field(description="Optimizer steps of the run; cosine and linear end there.")
    final_lr_ratio: Share = Field(0.0, description="Rate at the end of cosine and linear, as a share of the peak.")


class EmaSection(Section):
    """The power-function averages of the weights that a run keeps (EMA)."""

    sigma_rel: tuple[Annotated[float, Field(gt=0, lt=MAX_SIGMA_REL)], ...] = Field(
        (0.05, 0.10),
        description="Relative widths σ_rel of the power-function averages of the weights that are kept and saved, in "
        "steps of 0.001; empty: none. The defaults are those of Karras et al. 2024 (EDM2); tools/ema.py reconstructs "
        "other widths from them. Each takes 4 bytes a parameter, shared out over the data × sequence ranks.",
    )

    @field_validator("sigma_rel")
    @classmethod
    def _can_be_named(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if any(round(width, 3) != width for width in widths) or len(set(widths)) < len(widths):
            raise ValueError(
                f"ema.sigma_rel = {list(widths)}: must be different multiples of 0.001, by which checkpoints name the "
                "averages"
            )
        return widths


class CheckpointSection(Section):
    """When checkpoints are saved, which are kept, and what a run starts from."""

    dir: Place = Field(
        description="Folder of the run's checkpoints, or an fsspec URL (s3://bucket/run): docs/storage.md says how "
        "they are kept there."
    )
    local_dir: str | None = Field(
        None,
        description="Folder on the disk of each host through which checkpoints pass on their way to a URL and back, "
        "with room for what the host's ranks save; incidents.jsonl and `latest` are there too. Required when dir is a "
        "URL.",
    )
    save_every: StepsOrNever = Field(
        100,
        description="Steps between checkpoints; the last step is saved too, and that at which a run is told to stop. "
        "0: none at all, for measurements.",
    )
    resume: Literal["auto", "must", "never"] = Field(
        "auto",
        description="auto: go on from the newest checkpoint in dir, or start if dir has none; must: fail without one; "
        "never: fail if dir has one.",
    )
    background: bool = Field(
        True, description="Write while training goes on; a step then waits only for the copy to host memory."
    )
    keep_last: Count = Field(3, description="Newest checkpoints that are kept.")
    keep_every: StepsOrNever = Field(
        0, description="Checkpoints of steps divisible by this are kept too, for ever; 0: none."
    )
    accept_changed_data: bool = Field(
        False,
        description="Resume although the data's manifest, data.seed, data.global_batch_size or what made the text "
        "features have changed; start from weights that were trained on features of another text encoder.",
    )
    init_from: Place | None = Field(
        None,
        description="Weights to start from, with a fresh schedule: published-format ones (.pt, .safetensors, folder), "
        "or a run's checkpoints, of which the newest is taken. Of a URL each host keeps a copy, see docs/storage.md.",
    )

    @model_validator(mode="after")
    def _has_a_local_folder(self) -> "CheckpointSection":
        if is_url(self.dir) != (self.local_dir is not None):
            raise ValueError(
                "checkpoint.local_dir: required when checkpoint.dir is a URL, and has no effect otherwise; name a "
                "folder on the hosts' own disks, or leave it out"
            )
        if self.dir.startswith(("file://", "local://")):
            raise ValueError(f"checkpoint.dir = {self.dir}: name the folder itself")
        return self

    @property
    def folder(self) -> Path:
        """Returns the local folder of the run: of its checkpoints or, where these are at a URL, of all else."""
        return Path(self.dir if self.local_dir is None else self.local_dir)


class LoggingSection(Section):
    """Curves and where they go, validation, the progress bar and profiling."""

    dir: str = Field(description="Folder of TensorBoard events, of what other trackers keep, and of the ranks' logs.")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        ("tensorboard",),
        description="Where curves and previews go. All but TensorBoard are extras of the package, `mugv_ds[wandb]`. "
        "Their own variables hold: WANDB_MODE=offline, WANDB_PROJECT, TRACKIO_DIR, MLFLOW_TRACKING_URI (or else dir).",
    )
    every: Steps = Field(10, description="Steps between records of the scalars.")
    eval_every: StepsOrNever = Field(
        0, description="Steps between validations, which also come first and last; 0: only those two."
    )
    progress: bool = Field(True, description="Progress bar on rank 0.")
    profile_step: StepsOrNever = Field(
        0,
        description="Step, counted from 1, that torch.profiler watches on rank 0; 0: none. It writes the time of every "
        "kernel to dir/profile_step_<N>.txt and a trace for chrome://tracing or Perfetto beside it.",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Dense bf16 peak of one device, for MFU and HFU; known for H100 and H200, else both are left out.",
    )


class SampledSection(Section):
    """Videos of the first rows of a manifest that are sampled during training."""

    every: StepsOrNever = Field(0, description="Steps between them; after the last step there are some too. 0: never.")
    manifest: Place | None = Field(
        None,
        description="CSV whose first rows are sampled: their text features, size, fps and caption. "
        "data.null_text_path, which guidance subtracts, lies where its rows' features do. Required when every > 0.",
    )
    count: Count = Field(4, description="Rows that are sampled.")
    steps: Count = Field(25, description="Evaluations of the model for each video.")
    guidance: float = Field(4.0, ge=0, le=1000, description="Weight of the caption against the negative prompt.")
    first_frame: bool = Field(
        False, description="Give the first latent frame of the row clean (image-to-video); images are not concerned."
    )
    codec: str | None = Field(
        None,
        description="What makes pixels: the VideoVAE (vae.pt, safetensors or a folder) or the demo's codec. All ranks "
        "decode together, window by window. The VideoVAE stays in host memory, in bf16 0.8 GiB a rank, and is on the "
        "GPU only while it decodes.",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=MAX_SIGMA_REL,
        description="σ_rel of the average, one of ema.sigma_rel, that is sampled with in place of the weights; by "
        "default the weights are.",
    )

    def _require(self, key: str, *names: str) -> None:
        for name in names:
            if self.every and getattr(self, name) is None:
                raise ValueError(f"{key}.{name}: required when {key}.every > 0; give it, or set {key}.every to 0")


class PreviewSection(SampledSection):
    """Videos that are sampled during training, to look at. Without a codec their latents are written."""

    dir: str | None = Field(None, description="Folder of the videos. Required when preview.every > 0.")

    @model_validator(mode="after")
    def _is_complete(self) -> "PreviewSection":
        self._require("preview", "manifest", "dir")
        return self


class EvaluationSection(SampledSection):
    """Videos that are sampled during training and measured as `make eval` measures; TensorBoard has the means."""

    count: Count = Field(16, description="Rows that are sampled.")

    @model_validator(mode="after")
    def _is_complete(self) -> "EvaluationSection":
        self._require("evaluation", "manifest", "codec")
        return self


class GuardSection(Section):
    """Limits at which a run skips, goes back or ends. All values are ours: the source gives none."""

    preflight: bool = Field(
        False, description="Check every rank's machine before the run, within the bounds of the section preflight."
    )
    max_skips: Count = Field(
        5,
        description="Steps in a row without an update, because loss or gradient were not finite, after which the run "
        "goes back to the last checkpoint before them.",
    )
    spike_factor: float = Field(
        10.0,
        ge=0,
        le=1e6,
        description="A loss above this many times the median of the last losses also sends the run back; 0: never. "
        "The steps from that checkpoint to the bad one are not played again (as in PaLM, Chowdhery et al. 2022).",
    )
    spike_window: Count = Field(100, description="Losses that the median is taken of; until then none is a spike.")
    max_rollbacks: int = Field(
        3, ge=0, le=10**5, description="How many times a run may go back; the next time ends it."
    )
    max_bad_share: Share = Field(
        0.01, description="Share of the samples seen that may be unreadable and replaced; above it the run ends."
    )
    bad_share_after: int = Field(1000, ge=1, le=10**12, description="Samples seen before their bad share is judged.")
    timeout_s: float = Field(
        1800.0,
        ge=1,
        le=30 * 24 * 3600,
        description="Seconds between two step boundaries, validation and checkpoints included, after which the run is "
        "taken to hang: the ranks that hold it up are named and all exit with status 75.",
    )
    straggler_factor: float = Field(
        2.0,
        ge=1,
        le=1e6,
        description="A rank that computes this many times as long as the median rank is named in a line.",
    )
    straggler_window: Count = Field(50, description="Steps over which ranks are compared.")
    check_replicas_every: StepsOrNever = Field(
        100, description="Steps between checks that ranks which must hold the same weights do; 0: never."
    )

    @field_validator("spike_factor")
    @classmethod
    def _is_a_spike(cls, factor: float) -> float:
        if 0 < factor <= 1:
            raise ValueError(
                f"guard.spike_factor = {factor:g}: must be greater than 1, or usual losses are spikes; or 0 for never"
            )
        return factor


class TrainConfig(Section):
    """One training run. JSON files hold these sections; `extends` names a file whose values come first."""

    model: ModelSection
    data: DataSection
    flow: FlowSection = FlowSection()
    parallel: ParallelSection = ParallelSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    ema: EmaSection = EmaSection()
    checkpoint: CheckpointSection
    logging: LoggingSection
    preview: PreviewSection = PreviewSection()
    evaluation: EvaluationSection = EvaluationSection()
    guard: GuardSection = GuardSection()
    preflight: PreflightSection = PreflightSection()
    monitor: MonitorSection = MonitorSection()
    preference: PreferenceSection | None = None
    reward: RewardSection | None = None
    lora: LoraSection | None = None
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Passed on to DeepSpeed after its keys are checked."
    )

    def fitted(self, processes: int) -> "TrainConfig":
        """Returns the config for a launch of so many processes: with a number of replicas in the place of "fit"."""
        if self.parallel.data != "fit":
            return self
        data, model_ranks = self.data, self.parallel.sequence * self.parallel.pipeline
        parts = data.global_batch_size // data.micro_batch_size if data.budget is None else data.budget.multiple
        most = max(processes // model_ranks, 1)
        replicas = max(count for count in range(1, min(most, parts) + 1) if parts % count == 0)
        return self.model_copy(update={"parallel": self.parallel.model_copy(update={"data": replicas})})

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        """Checks what no section can check by itself."""
        dit = self.model.dit()
        sequence, pipeline = self.parallel.sequence, self.parallel.pipeline
        micro, batch = self.data.micro_batch_size, self.data.global_batch_size
        if dit.num_heads % sequence:
            raise ValueError(
                f"parallel.sequence = {sequence}: does not divide the {dit.num_heads} attention heads of "
                f"{self.model.preset}; use {_divisors(dit.num_heads)}"
            )
        if self.model.precision == "fp8" and dit.hidden_size % 16:
            raise ValueError(
                f'model.precision = "fp8": takes widths that are multiples of 16, hidden_size is {dit.hidden_size}; '
                "use an even model.num_heads, or bf16"
            )
        in_fp8 = self.model.blocks_in_fp8()
        if not in_fp8 or in_fp8[-1] >= dit.depth:
            raise ValueError(
                f"model.fp8_blocks = {list(self.model.fp8_blocks)}: must be the first and the last of some of the "
                f"blocks 0 to {dit.depth - 1}; or leave it out"
            )
        levels = self.parallel.activation_checkpointing
        if isinstance(levels, list) and len(levels) != dit.depth:
            raise ValueError(
                f"parallel.activation_checkpointing: {len(levels)} levels for the {dit.depth} blocks of "
                f"{self.model.preset}; give one for each, or one for all"
            )
        if levels == "auto" and self.model.precision != "bf16":
            raise ValueError(
                'parallel.activation_checkpointing = "auto": the memory of bf16 alone is predicted, and '
                f"model.precision is {self.model.precision}; choose a level"
            )
        if "attention" in levels and self.model.attention in ("flash4_padded", "te"):
            raise ValueError(
                f'model.attention = "{self.model.attention}": gives no log-sum-exp, which '
                'parallel.activation_checkpointing = "attention" keeps; set it to auto, flash4, flash2 or cudnn, or '
                "choose another level"
            )
        if self.lora is not None and self.optimizer.width_reference is not None:
            raise ValueError("optimizer.width_reference: there is no rule for the adapters of lora; leave it out")
        if self.lora is not None and self.optimizer.kind == "muon":
            raise ValueError('optimizer.kind = "muon": moves none of the adapters of lora; set it to adamw')
        if pipeline > dit.depth:
            raise ValueError(
                f"parallel.pipeline = {pipeline}: more stages than the {dit.depth} blocks of {self.model.preset}; "
                f"use at most {dit.depth}"
            )
        if batch % micro and self.data.budget is None:
            raise ValueError(
                f"data.micro_batch_size = {micro}: does not divide data.global_batch_size = {batch}; "
                f"use {_divisors(batch)}"
            )
        if len({group.name for group in self.data.mixture}) < len(self.data.mixture):
            raise ValueError("data.mixture: the groups' names must differ")
        if self.preference is not None and self.data.mixture:
            raise ValueError("data.mixture: the SFT set of a preference run is not mixed; leave one of the two out")
        if self.reward is not None:
            self._check_rounds(self.reward)
        if self.flow.caption_drop > 0 and self.data.null_text_path is None:
            raise ValueError(
                "data.null_text_path: required when flow.caption_drop > 0; name the features or set it to 0"
            )
        for key, sampled in self.sampled.items():
            if sampled.every and self.data.null_text_path is None:
                raise ValueError(
                    f"data.null_text_path: required when {key}.every > 0; name the features or set it to 0"
                )
            if sampled.ema is not None and sampled.ema not in self.ema.sigma_rel:
                raise ValueError(
                    f"{key}.ema = {sampled.ema:g}: must be one of ema.sigma_rel = {list(self.ema.sigma_rel)}"
                )
        if self.data.budget is not None and self.data.budget.multiple > batch:
            raise ValueError(
                f"data.budget.multiple = {self.data.budget.multiple}: a step would hold more samples than "
                f"data.global_batch_size = {batch}; use at most that"
            )
        for key, why in self._idle():
            raise ValueError(f"{key}: has no effect {why}; leave it out")
        return self

    def _check_rounds(self, reward: RewardSection) -> None:
        for key, given in (("preference", self.preference), ("data.budget", self.data.budget)):
            if given is not None:
                raise ValueError(f"{key}: does not go with reward; leave one of the two out")
        if self.data.mixture:
            raise ValueError("data.mixture: the real data beside rollouts are not mixed; leave it out")
        batch = self.data.global_batch_size
        if reward.samples * reward.passes % batch:
            raise ValueError(
                f"data.global_batch_size = {batch}: must divide reward.prompts × rollouts × passes = "
                f"{reward.samples * reward.passes}, so that a round is a number of steps; use "
                f"{_divisors(reward.samples * reward.passes)}"
            )
        if self.checkpoint.init_from is None:
            raise ValueError("checkpoint.init_from: required with reward; name the weights whose videos are judged")
        if reward.guidance != 1 and self.data.null_text_path is None:
            raise ValueError("data.null_text_path: required when reward.guidance is not 1; name the features")

    @property
    def widths(self) -> tuple[int, int] | None:
        """Returns the model's width and that which the rate was tuned at; None where nothing follows the width."""
        reference = self.optimizer.width_reference
        return None if reference is None else (self.model.dit().hidden_size, reference)

    @property
    def steps_per_round(self) -> int:
        """Returns the optimizer steps of a round of learning from a reward."""
        return self.reward.samples * self.reward.passes // self.data.global_batch_size

    @property
    def sampled(self) -> dict[str, SampledSection]:
        """Returns the sections of what is sampled during training, by their keys."""
        return {"preview": self.preview, "evaluation": self.evaluation}

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Names the keys whose values differ from the defaults and cannot change the run, and why they cannot.

        What a switch that is set to 0 leaves without work is not among them: 0 turns off what a config has set up.
        """
        schedule, preference = self.schedule, self.preference
        if schedule.kind == "constant":
            yield from changed("schedule", schedule, {"final_lr_ratio"}, 'with schedule.kind = "constant"')
        if self.logging.profile_step > schedule.steps:
            yield "logging.profile_step", f"after the last step, schedule.steps = {schedule.steps}"
        sources = preference.sources if preference else ()
        held_out = [self.data.val_manifest, *(source.val_manifest for source in sources)]
        if not any(held_out):
            yield from changed("logging", self.logging, {"eval_every"}, "without data.val_manifest")
        if self.checkpoint.resume == "never" and self.checkpoint.init_from is None:
            why = 'with checkpoint.resume = "never" and without checkpoint.init_from'
            yield from changed("checkpoint", self.checkpoint, {"accept_changed_data"}, why)
        for key, sampled in self.sampled.items():
            if "every" not in sampled.model_fields_set:
                yield from changed(key, sampled, set(type(sampled).model_fields), f"without {key}.every")
        if preference is not None and preference.objective == "dpo":
            why = 'with preference.objective = "dpo"'
            yield from changed("preference", preference, {"good_weight", "bad_weight"}, why)
        for number, source in enumerate(sources if self.lora else ()):
            why = "with lora: the reference is the frozen base, which is measured as the run goes"
            yield from changed(f"preference.sources.{number}", source, {"reference"}, why)
        if self.parallel.activation_checkpointing != "attention":
            why = 'without parallel.activation_checkpointing = "attention"'
            yield from changed("parallel", self.parallel, {"offload"}, why)
        if self.parallel.activation_checkpointing != "auto":
            why = 'without parallel.activation_checkpointing = "auto"'
            yield from changed("parallel", self.parallel, {"memory_gib"}, why)
        if self.optimizer.kind != "muon":
            muon = {"adamw_lr", "muon_momentum", "muon_scale"}
            yield from changed("optimizer", self.optimizer, muon, 'without optimizer.kind = "muon"')
        if len(sources) == 1:
            yield from changed("preference.sources.0", sources[0], {"weight"}, "on a single source")


def changed(prefix: str, section: Section, names: set[str], why: str) -> Iterator[tuple[str, str]]:
    """Names those keys of a section whose values are not the defaults, with the same reason for all."""
    for name, field in type(section).model_fields.items():
        if name in names and getattr(section, name) != field.default:
            yield f"{prefix}.{name}", why


def _divisors(number: int) -> str:
    """Returns the divisors of a number in words: '1, 2 or 4' for 4."""
    *most, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(most)} or {last}" if most else last
