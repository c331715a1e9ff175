"""Config of training runs: batches, curriculum, optimiser, checkpoints, logging; of the backbone and of the codec.

Keys are strict: an unknown one is an error. CHANGES says which fields may differ between a checkpoint and the run that
resumes from it.
"""

import dataclasses
import math
from dataclasses import dataclass

from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError, check_at_least

# ---- optimiser, logging, checkpoints --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule; optim.py draws the curves and says which parameter uses which method."""

    optimizer: str = "adamw"  # "adamw"; "muon": Muon for the matrices of the layers, AdamW for all other parameters
    learning_rate: float = 1e-4  # peak; the same for AdamW and Muon
    warmup_steps: int = 1000  # updates of linear warm-up
    schedule: str = "cosine"  # after the warm-up: "cosine", "wsd" (stable, then linear decay), "constant"
    schedule_steps: int | None = None  # updates until the schedule ends; None: num_steps
    decay_fraction: float = 0.1  # "wsd": share of the schedule that is the decay
    decay_steps: int | None = None  # "wsd": length of the decay in updates; None: decay_fraction of the schedule
    decay_start: int | None = None  # "wsd": first update of the decay, for a branch; None: the decay ends with the schedule
    end_ratio: float = 0.05  # final rate as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95  # momentum of Muon
    mu_dtype: str = "float32"  # dtype of first moments: "float32", "bfloat16" (2 bytes less per parameter)
    weight_decay: float = 0.01  # times the learning rate; matrices only
    clip_norm: float | None = 1.0  # global gradient norm; None: no clip
    ema_decay: float | None = None  # decay per update of averaged weights; None: no averages

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"optim.{name}: expected {expected}, got {getattr(self, name)!r}")

        check("optimizer", self.optimizer in ("adamw", "muon"), "adamw or muon")
        check("learning_rate", self.learning_rate > 0, "a number over 0")
        check("warmup_steps", self.warmup_steps >= 0, "0 or more updates")
        check("schedule", self.schedule in ("cosine", "wsd", "constant"), "cosine, wsd or constant")
        check("schedule_steps", self.schedule_steps is None or self.schedule_steps >= 1, "None or at least 1 update")
        check("decay_fraction", 0 <= self.decay_fraction <= 1, "a share in [0, 1]")
        for name in ("decay_steps", "decay_start"):
            value = getattr(self, name)
            check(name, value is None or self.schedule == "wsd", f"None, as the schedule is {self.schedule} and not wsd")
        check("decay_steps", self.decay_steps is None or self.decay_steps >= 1, "None or at least 1 update")
        is_warm = self.decay_start is None or self.decay_start >= self.warmup_steps
        check("decay_start", is_warm, f"None or an update after the warm-up of {self.warmup_steps}")
        check("end_ratio", 0 <= self.end_ratio <= 1, "a share in [0, 1]")
        check("beta1", 0 <= self.beta1 < 1, "a number in [0, 1)")
        check("beta2", 0 <= self.beta2 < 1, "a number in [0, 1)")
        check("eps", self.eps > 0, "a number over 0")
        check("muon_beta", 0 <= self.muon_beta < 1, "a number in [0, 1)")
        check("mu_dtype", self.mu_dtype in ("float32", "bfloat16"), "float32 or bfloat16")
        check("weight_decay", self.weight_decay >= 0, "0 or more")
        check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "None or a number over 0")
        check("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "None or a number in [0, 1)")


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000  # updates between two checkpoints; the last update is saved too
    keep: int = 3  # number of newest checkpoints to keep
    keep_every_steps: int | None = None  # checkpoints at multiples of this are kept for ever; None: none are
    best_metric: str | None = None  # also keep the checkpoint with the best value of this figure, such as "val_loss_diff"
    best_mode: str = "min"  # which value is best: "min" or "max"

    def __post_init__(self):
        if min(self.every_steps, self.keep) < 1:
            raise UserError(f"checkpoint: every_steps and keep must be at least 1, got {self.every_steps} and {self.keep}")
        if self.keep_every_steps is not None and (self.keep_every_steps < 1 or self.keep_every_steps % self.every_steps):
            raise UserError(
                f"checkpoint.keep_every_steps must be None or a multiple of every_steps ({self.every_steps}), "
                f"got {self.keep_every_steps}"
            )
        if self.best_mode not in ("min", "max"):
            raise UserError(f"checkpoint.best_mode must be min or max, got {self.best_mode!r}")


TRACKERS = ("wandb", "trackio", "mlflow")  # see trackers.py


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 20  # updates between two rows of metrics.jsonl
    trackers: tuple[str, ...] = ()  # services that get the rows too: names in TRACKERS, each with an extra of its name
    project: str = "voxcpm2-jax"  # that the run belongs to there (MLflow: experiment)
    # Warn of a process that may cost more than this share of each step (train/peers.py); None: do not compare processes.
    slow_share: float | None = 0.1

    def __post_init__(self):
        if self.every_steps < 1:
            raise UserError(f"log.every_steps must be at least 1, got {self.every_steps}")
        if self.slow_share is not None and not self.slow_share > 0:
            raise UserError(f"log.slow_share must be None or a share over 0, got {self.slow_share!r}")
        if unknown := set(self.trackers) - set(TRACKERS):
            raise UserError(f"log.trackers: expected some of {', '.join(TRACKERS)}, got {', '.join(sorted(unknown))}")
        if not self.project:
            raise UserError("log.project must not be empty")


@dataclass(frozen=True)
class GuardConfig:
    """Which updates are skipped, and when the run rolls back; see train/guard.py."""

    on: bool = True  # False: a figure that is not finite stops the run
    window: int = 128  # kept updates that spikes are measured against; a run or stage has no spikes before it has as many
    spike: float | None = 12.0  # skip an update this many MADs above the median of log loss or log norm; None disables
    max_in_a_row: int = 8  # skipped updates after which the run rolls back to its last checkpoint
    max_rollbacks: int = 3  # to the same checkpoint; one more stops the run

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"guard.{name}: expected {expected}, got {getattr(self, name)!r}")

        check("window", self.window >= 2, "at least 2 updates")
        check("spike", self.spike is None or self.spike > 0, "None or a number over 0")
        check("max_in_a_row", self.max_in_a_row >= 1, "at least 1 update")
        check("max_rollbacks", self.max_rollbacks >= 0, "0 or more")


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as stuck; see train/watchdog.py."""

    factor: float = 20.0  # a step or wait for data longer than this many median steps is a stall
    min_sec: float = 300.0  # never a stall below this
    slow_sec: float = 3600.0  # limit for compiling, evaluating, and reading and writing checkpoints
    # "report": print the stacks of all threads, once per stall; "exit": then also end the process with code 1, for a launcher
    # to start it again; None: exit in a run of several processes, report in one.
    action: str | None = None

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"watchdog.{name}: expected {expected}, got {getattr(self, name)!r}")

        check("factor", self.factor > 1, "a number over 1")
        check("min_sec", self.min_sec > 0, "seconds over 0")
        check("slow_sec", self.slow_sec > 0, "seconds over 0")
        check("action", self.action in ("report", "exit", None), "report, exit or None")


# ---- backbone run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchConfig:
    """Budgets of one packed batch: its static shape. Stages of the curriculum use multiples of it (StageConfig)."""

    rows: int = 8  # B, over all hosts
    slots: int = 4096  # T, text tokens and patches per row
    patches: int = 3072  # M, audio patches per row
    target_patches: int | None = None  # patches per row that may bear loss; None: all M
    segments: int | None = None  # most clips per row; None: as many as fit. On GPU the cost of attention grows with it
    clip_slots: int | None = None  # most slots of a clip; None: all of a row. On TPU the cost of attention grows with it

    def __post_init__(self):
        if min(self.rows, self.slots, self.patches) < 1 or not 1 <= (self.target_patches or self.patches) <= self.patches:
            raise UserError(f"batch: rows, slots and patches must be at least 1, target_patches at most patches; got {self}")
        if self.segments is not None and self.segments < 1:
            raise UserError(f"batch: segments must be at least 1, or None for as many as fit; got {self.segments}")
        if self.clip_slots is not None and self.clip_slots < 1:
            raise UserError(f"batch: clip_slots must be at least 1, or None for all of a row; got {self.clip_slots}")

    def scaled(self, rows: float, slots: float) -> "BatchConfig":
        """This batch with `rows` times its rows, and rows with `slots` times their slots, patches and target patches."""
        factors = {"rows": rows, "slots": slots, "patches": slots, "target_patches": slots}
        sizes = {name: getattr(self, name) * factor for name, factor in factors.items() if getattr(self, name) is not None}
        for name, size in sizes.items():
            if abs(size - round(size)) > 1e-6 or size < 0.5:
                raise UserError(
                    f"stages: {factors[name]} times batch.{name} {getattr(self, name)} is {size:g}; expected a whole number: "
                    f"change batch.{name}, or {'rows_factor' if name == 'rows' else 'slots_factor'} of the stage"
                )
        return dataclasses.replace(self, **{name: round(size) for name, size in sizes.items()})


# Budgets that suit speech, for commands without a config: of 4,096 slots, up to 2,816 are audio patches. `doctor` recommends
# `patches` for a corpus.
SPEECH_BATCH = BatchConfig(rows=8, slots=4096, patches=2816)


@dataclass(frozen=True)
class StageConfig:
    """A stage of the curriculum: the data from its first step on; see data/mixing.py."""

    first_step: int = 0
    min_sec: float = 0.0  # shorter clips are not used
    max_sec: float | None = None  # longer clips are not used; None: no limit
    temperature: float = 1.0  # weight of a language in a dataset: hours ** (1 / temperature); over 1 makes languages more even
    weights: tuple[tuple[str, float], ...] = ()  # factors on these weights, by "dataset", "language" or "dataset/language"
    reference: float = 1.0  # of the clips that have a reference clip, the share that uses it
    described: float = 1.0  # of the clips that have a description, the share that uses it
    prompt: float | None = None  # share of audio in prompt clips; None: as in the corpus
    rows_factor: float = 1.0  # rows per batch, as a multiple of the run's batch.rows
    slots_factor: float = 1.0  # length of a row, as a multiple of the run's batch.slots, batch.patches, batch.target_patches
    clip_slots: int | None = None  # most slots of a clip; None: batch.clip_slots

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"stages: {name}: expected {expected}, got {getattr(self, name)!r}")

        check("first_step", self.first_step >= 0, "0 or more updates")
        check("min_sec", self.min_sec >= 0, "0 or more seconds")
        check("max_sec", self.max_sec is None or self.max_sec > self.min_sec, "None or more seconds than min_sec")
        check("temperature", self.temperature > 0, "a number over 0")
        for name in ("rows_factor", "slots_factor"):
            check(name, 0 < getattr(self, name) < math.inf, "a number over 0")
        check("weights", all(factor >= 0 for _, factor in self.weights), "factors of 0 or more")
        for name in ("reference", "described", "prompt"):
            value = getattr(self, name)
            check(name, value is None or 0 <= value <= 1, "a share in [0, 1]")
        check("prompt", self.prompt is None or self.prompt < 1, "a share under 1: prompt clips bear no loss")

    def batch_of(self, batch: BatchConfig) -> BatchConfig:
        """The budgets of this stage in a run with these budgets."""
        batch = batch if self.clip_slots is None else dataclasses.replace(batch, clip_slots=self.clip_slots)
        return batch.scaled(self.rows_factor, self.slots_factor)


@dataclass(frozen=True)
class SampleConfig:
    """Texts that a run speaks while it trains; logged as audio and spectrograms."""

    every_steps: int = 0  # updates between two evaluations; 0: never
    texts: tuple[str, ...] = ("one two three",)

    def __post_init__(self):
        check_at_least(0, self, "samples", "every_steps")


# Arrays of a layer that are saved for the backward pass besides the layer's input, by name; the others are recomputed.
# "attention" is the state of the kernel, which exists only on TPU. plan/README.md has the figures of each policy.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "thin": ("attention", "o"),  # what saves most work per byte; recomputes q, k, v, gate and up
    "gate": ("attention", "o", "gate"),  # recomputes q, k, v and up; on TPU alone, elsewhere gate and up are one product
    "narrow": ("q", "k", "v", "attention", "o"),  # recomputes gate and up: the widest arrays, most of the work
    "products": ("q", "k", "v", "attention", "o", "gate", "up"),  # recomputes only norms, activations and softmax
    "none": None,  # saves whatever XLA chooses
}

PRODUCTS = ("int8", "fp8")  # 8-bit products of the layers; train/README.md has their losses, plan/README.md their speed


@dataclass(frozen=True)
class ValidationConfig:
    """The held-out loss; see evaluate/validation.py."""

    every_steps: int = 1000  # updates between two evaluations; 0: never
    max_clips: int = 512  # clips that are used, spread evenly over all held-out clips
    seed: int = 0  # of each clip's noise, flow times and layout; runs that are compared need the same seed

    def __post_init__(self):
        if self.every_steps < 0 or self.max_clips < 1:
            raise UserError(f"validation: every_steps must be 0 or more, max_clips at least 1; got {self}")


@dataclass(frozen=True)
class BackboneRun:
    """One training run of the backbone; configs/backbone.py has the variants."""

    model: ModelConfig
    seed: int = 0  # of parameters, order of the data and noise
    num_steps: int = 1000  # updates
    remat: str = "full"  # what the backward pass recomputes: a name in REMAT_POLICIES
    remat_local: str | None = None  # the same for LocEnc and LocDiT; None: as remat
    remat_locdit: str | None = None  # LocDiT's own; None: as remat_local
    locdit_at_once: int | None = None  # patches that LocDiT computes at once on a device, forward and back; None: all
    products: str | None = None  # how layers multiply: a name in PRODUCTS (models/product.py); None: in model.dtype
    diff_weight: float = 1.0  # weight of the flow-matching loss
    stop_weight: float = 1.0  # weight of the stop loss
    batch: BatchConfig = BatchConfig()
    accumulate: int = 1  # micro-batches per update: less memory, the same result
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    # Devices along (replica, data, tensor). One may be -1: the remaining devices. Replica and data: one replica per TPU slice.
    mesh: tuple[int, int, int] = (-1, -1, 1)
    patch_sec: float = 0.16  # seconds of a patch; must equal that of the shards
    stages: tuple[StageConfig, ...] = ()  # curriculum; empty: all clips in one stage
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    samples: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()  # used if there are held-out shards

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        check("num_steps", self.num_steps >= 1, "at least 1")
        check("seed", 0 <= self.seed < 2**32, "0 or more, and less than 2^32")
        check("accumulate", self.accumulate >= 1, "at least 1")
        check("locdit_at_once", self.locdit_at_once is None or self.locdit_at_once >= 1, "at least 1, or None")
        check("patch_sec", 0 < self.patch_sec < math.inf, "a number over 0")
        for name in ("diff_weight", "stop_weight"):
            check(name, 0 <= getattr(self, name) < math.inf, "a number of 0 or more")
        for name in ("remat", "remat_local", "remat_locdit"):
            is_known = getattr(self, name) in REMAT_POLICIES or (name != "remat" and getattr(self, name) is None)
            check(name, is_known, f"one of {', '.join(REMAT_POLICIES)}")
        check("products", self.products in (None, *PRODUCTS), f"None or one of {', '.join(PRODUCTS)}")
        if self.model.dtype == "float16":
            raise UserError("model.dtype float16: small gradients become zero in it; train in bfloat16 or float32")
        for batch in self.batches:
            if batch.slots > self.model.max_length:
                raise UserError(f"batch.slots {batch.slots} exceed model.max_length {self.model.max_length}")
        if len({(b.rows, b.slots, b.patches) for b in self.batches}) < len(self.batches):
            raise UserError(
                "stages: clip_slots must be equal in all stages whose rows have the same number and the same budgets"
            )
        start, steps = self.optim.decay_start, self.optim.decay_steps
        if start is not None and steps is not None and start < self.num_steps < start + steps:
            raise UserError(
                f"num_steps {self.num_steps} ends the run amid its decay, {steps} updates from optim.decay_start {start} on; "
                f"expected {start + steps} or more"
            )

    @property
    def batches(self) -> tuple[BatchConfig, ...]:
        """The budgets of all stages, in their order, each once."""
        return tuple(dict.fromkeys(stage.batch_of(self.batch) for stage in self.stages or (StageConfig(),)))

    def with_batch(self, batch: BatchConfig) -> "BackboneRun":
        """The run with these budgets in all its stages: what a train step is compiled for."""
        stages = tuple(dataclasses.replace(stage, rows_factor=1.0, slots_factor=1.0) for stage in self.stages)
        return dataclasses.replace(self, batch=batch, stages=stages)


# Whether a field may differ between a checkpoint and the run that resumes from it. FREE: yes. SCHEDULE: only if the run
# branches off another run (--resume-from). FIXED: the meaning of the state would change, so only with
# --accept-config-changes. SHAPE: never, because the saved arrays would not fit. The first pattern that matches the beginning
# of "FIELD: OLD -> NEW" decides; every field has one. The third column completes the message of a refusal.
FREE, SCHEDULE, FIXED, SHAPE = "free", "schedule", "fixed", "shape"
CHANGES: tuple[tuple[str, str, str], ...] = (
    (r"guard\.window\b", SHAPE, "size of the guard's memory"),
    (r"optim\.(optimizer|mu_dtype)\b", SHAPE, "kind and dtype of the optimiser's moments"),
    (r"optim\.ema_decay: (None ->|.* -> None$)", SHAPE, "whether averaged weights exist"),
    # Length, machine, logging. A schedule without schedule_steps is as long as the run, so it stretches with num_steps. If that
    # changes the rate at the step where the run resumes, train/start.py adds "learning rate of update N" to the changes.
    (r"(num_steps|remat(_local|_locdit)?|locdit_at_once|products|accumulate|mesh|model\.(dtype|max_length))\b", FREE, ""),
    (r"(checkpoint|log|samples|sample_every_steps|num_samples|validation|guard|watchdog|profile)\b", FREE, ""),
    # An unexpected change for a run that resumes, but the purpose of a branch.
    (r"optim\.(learning_rate|warmup_steps|schedule|schedule_steps|decay_(fraction|steps|start)|end_ratio)\b", SCHEDULE,
     "size of the updates"),
    (r"optim\.(weight_decay|clip_norm)\b", SCHEDULE, "size of the updates"),
    (r"learning rate\b", SCHEDULE, "the schedule stretches with num_steps; optim.schedule_steps sets its length"),
    (r"optim\b", FIXED, "meaning of the optimiser's moments and of the averages"),
    (r"(model|vae)\b", FIXED, "meaning of the weights"),
    (r"seed\b", FIXED, "order of the data, noise of every update"),
    (r"(batch|stages|rows|crop_frames)\b", FIXED, "clips of every update, and clips trained on so far"),
    (r"(diff_weight|stop_weight|loss)\b", FIXED, "the loss"),
    (r"patch_sec\b", FIXED, "length of speech"),
    (r"data\b", FIXED, "the data, and the meaning of its latents and ids"),
)  # fmt: skip


# ---- codec run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the codec's losses; see vae/losses.py."""

    mel: float = 15.0
    spectrum: float = 0.25
    kl: float = 5e-5


@dataclass(frozen=True)
class VAERun:
    """One training run of the codec; configs/vae.py has the variants."""

    vae: AudioVAEConfig
    seed: int = 0  # of parameters, crops and noise
    num_steps: int = 1000  # updates
    rows: int = 8  # crops per batch, over all hosts
    crop_frames: int = 25  # latent frames per crop
    remat: bool = False  # recompute each block in the backward pass
    loss: VAELossConfig = VAELossConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    sample_every_steps: int = 1000  # updates between two logged reconstructions of held-out clips
    num_samples: int = 4  # number of held-out clips that are reconstructed

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"codec run: {name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("num_steps", "rows", "crop_frames", "sample_every_steps"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("num_samples", self.num_samples >= 0, "0 or more")
        check("loss", min(self.loss.mel, self.loss.spectrum, self.loss.kl) >= 0, "weights of 0 or more")
