"""Every part's configuration: frozen dataclasses, their validation, derived sizes, and the released config.json.

The field names of the model parts are those of the released `config.json`, so that file and dataclass are one
declaration; `ModelConfig` derives the shape of each of its four transformer stacks from them:

    tslm     text-semantic LM, causal, LongRoPE            ralm     residual acoustic LM, causal, no positions
    locenc   patch -> vector, bidirectional                locdit   velocity of a patch, bidirectional

Unknown keys of a released file are kept beside the config and given back on export; keys of our own run configs
are strict. Defaults are those the reference applies to an absent key (`use_mup` is then true).
"""

import math
from dataclasses import dataclass

from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError, check_at_least

# ---- optimiser, logging, checkpoints --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule; see optim.py for the curves and for what each parameter goes by."""

    optimizer: str = "adamw"  # "adamw"; "muon": matrices of the layers by Muon, everything else by AdamW
    learning_rate: float = 1e-4  # peak; one for both
    warmup_steps: int = 1000  # updates of linear warm-up
    schedule: str = "cosine"  # after the warm-up: "cosine", "wsd" (stable, then linear decay), "constant"
    schedule_steps: int | None = None  # updates until the schedule ends; None: as long as the run
    decay_fraction: float = 0.1  # "wsd": share of the schedule that decays
    decay_steps: int | None = None  # "wsd": updates that decay; None: decay_fraction of the schedule
    decay_start: int | None = None  # "wsd": first update that decays, for a branch; None: so that it ends with the schedule
    end_ratio: float = 0.05  # of the peak, at the schedule's end and after
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_beta: float = 0.95  # momentum of Muon
    mu_dtype: str = "float32"  # what first moments are kept in: "float32", "bfloat16" (2 bytes less a parameter)
    weight_decay: float = 0.01  # x learning rate, matrices only
    clip_norm: float | None = 1.0  # global gradient norm; None: no clip
    ema_decay: float | None = None  # averaged weights, per update; None: none are kept

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
    every_steps: int = 1000  # updates between two checkpoints; the last update is always saved
    keep: int = 3  # newest checkpoints that stay
    keep_every_steps: int | None = None  # checkpoints of the steps that it divides stay for ever; None: none do
    best_metric: str | None = None  # figure of an evaluation at the saved step, such as "val_loss_diff": the best stays too
    best_mode: str = "min"  # which figure is best: "min" or "max"

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


@dataclass(frozen=True)
class LogConfig:
    every_steps: int = 20  # updates between two rows of metrics.jsonl

    def __post_init__(self):
        if self.every_steps < 1:
            raise UserError(f"log.every_steps must be at least 1, got {self.every_steps}")


@dataclass(frozen=True)
class GuardConfig:
    """Which updates are skipped, and what happens when they do not end; see train/guard.py."""

    on: bool = True  # False: a figure that is not finite ends the run
    window: int = 128  # kept updates that a spike is told by; none is before a run or stage has as many
    spike: float | None = 12.0  # median absolute deviations of log loss or log gradient norm over their median; None: any
    max_in_a_row: int = 8  # skipped updates after which the run goes back to its last checkpoint
    max_rollbacks: int = 3  # to the same checkpoint; then the run ends

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

    factor: float = 20.0  # x the median step; a step or a wait for data that lasts longer is a stall
    min_sec: float = 300.0  # shorter ones are none
    slow_sec: float = 3600.0  # limit of what is no step: compiling, reading and writing checkpoints, evaluating
    action: str = "report"  # "report": where every thread stands, once a stall; "exit": then also leave with code 1

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"watchdog.{name}: expected {expected}, got {getattr(self, name)!r}")

        check("factor", self.factor > 1, "a number over 1")
        check("min_sec", self.min_sec > 0, "seconds over 0")
        check("slow_sec", self.slow_sec > 0, "seconds over 0")
        check("action", self.action in ("report", "exit"), "report or exit")


# ---- backbone run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchConfig:
    """Budgets of one packed batch."""

    rows: int = 8  # B, over all hosts
    slots: int = 4096  # T, text tokens and patches of a row
    patches: int = 3072  # M, audio patches of a row
    target_patches: int | None = None  # of a row that may bear loss; None: all M
    segments: int | None = None  # clips of a row at most; None: as many as fit. NVIDIA: attention's cost grows with it

    def __post_init__(self):
        if min(self.rows, self.slots, self.patches) < 1 or not 1 <= (self.target_patches or self.patches) <= self.patches:
            raise UserError(f"batch: rows, slots and patches must be at least 1, target_patches at most patches; got {self}")
        if self.segments is not None and self.segments < 1:
            raise UserError(f"batch: segments must be at least 1, or None for as many as fit; got {self.segments}")


# Budgets that suit speech, for commands without a config: of 4,096 slots, up to 2,816 are audio patches. `doctor` recommends
# `patches` for a corpus.
SPEECH_BATCH = BatchConfig(rows=8, slots=4096, patches=2816)


@dataclass(frozen=True)
class StageConfig:
    """A stage of the curriculum: what is heard from its first step on; data/mixing.py says how."""

    first_step: int = 0
    min_sec: float = 0.0  # shorter clips are left out
    max_sec: float | None = None  # longer clips are left out; None: none are
    temperature: float = 1.0  # a language of a dataset weighs its hours ** (1 / temperature): over 1 is more even
    weights: tuple[tuple[str, float], ...] = ()  # factors on that, by "dataset", "language" or "dataset/language"
    reference: float = 1.0  # share of the clips with a reference that are laid out with one
    described: float = 1.0  # share of the described clips whose description is read
    prompt: float | None = None  # share of audio that is prompt clips; None: what the corpus has
    batch: BatchConfig | None = None  # budgets; None: those of the run

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"stages: {name}: expected {expected}, got {getattr(self, name)!r}")

        check("first_step", self.first_step >= 0, "0 or more updates")
        check("min_sec", self.min_sec >= 0, "0 or more seconds")
        check("max_sec", self.max_sec is None or self.max_sec > self.min_sec, "None or more seconds than min_sec")
        check("temperature", self.temperature > 0, "a number over 0")
        check("weights", all(factor >= 0 for _, factor in self.weights), "factors of 0 or more")
        for name in ("reference", "described", "prompt"):
            value = getattr(self, name)
            check(name, value is None or 0 <= value <= 1, "a share in [0, 1]")
        check("prompt", self.prompt is None or self.prompt < 1, "a share under 1: prompt clips bear no loss")


@dataclass(frozen=True)
class SampleConfig:
    """What a run says while it trains, for the ear and the eye."""

    every_steps: int = 0  # updates between two times; 0: never
    texts: tuple[str, ...] = ("one two three",)

    def __post_init__(self):
        check_at_least(0, self, "samples", "every_steps")


# What the backward pass finds ready besides each layer's input, by name; all else in a layer it computes again. "attention"
# is the kernel's own state and exists on TPU alone. The figures of each policy stand in the README.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "narrow": ("q", "k", "v", "attention", "o"),  # gate and up again: the widest arrays, most of the products' work
    "products": ("q", "k", "v", "attention", "o", "gate", "up"),  # only norms, activations and softmax again
    "none": None,  # all that XLA wants to keep
}


@dataclass(frozen=True)
class ValidationConfig:
    """The loss of held-out clips; evaluate/validation.py."""

    every_steps: int = 1000  # updates between two times; 0: never
    max_clips: int = 512  # that are heard, spread evenly over all held-out ones
    seed: int = 0  # of noise, flow times and layouts, which a clip keeps for good; runs to be compared share it

    def __post_init__(self):
        if self.every_steps < 0 or self.max_clips < 1:
            raise UserError(f"validation: every_steps must be 0 or more, max_clips at least 1; got {self}")


@dataclass(frozen=True)
class BackboneRun:
    """One training run of the backbone; configs/backbone.py has the variants."""

    model: ModelConfig
    seed: int = 0  # of parameters, order and noise
    num_steps: int = 1000  # updates
    remat: str = "full"  # what the backward pass recomputes: one of REMAT_POLICIES
    remat_local: str | None = None  # the same for LocEnc and LocDiT, whose products are worth less for their bytes; None: remat
    diff_weight: float = 1.0  # x flow-matching loss
    stop_weight: float = 1.0  # x stop loss
    batch: BatchConfig = BatchConfig()
    accumulate: int = 1  # micro-batches that an update adds up: less memory, the same result
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    # Devices along (replica, data, tensor). One may be -1: what is left; replica and data both: a replica in each TPU slice.
    mesh: tuple[int, int, int] = (-1, -1, 1)
    patch_sec: float = 0.16  # seconds of a patch; the shards' header is checked against it
    stages: tuple[StageConfig, ...] = ()  # curriculum; none: all clips, as they are
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    samples: SampleConfig = SampleConfig()
    validation: ValidationConfig = ValidationConfig()  # of held-out shards, if there are any

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        check("num_steps", self.num_steps >= 1, "at least 1")
        check("seed", 0 <= self.seed < 2**32, "0 or more, and less than 2^32")
        check("accumulate", self.accumulate >= 1, "at least 1")
        check("patch_sec", 0 < self.patch_sec < math.inf, "a number over 0")
        for name in ("diff_weight", "stop_weight"):
            check(name, 0 <= getattr(self, name) < math.inf, "a number of 0 or more")
        for name in ("remat", "remat_local"):
            is_known = getattr(self, name) in REMAT_POLICIES or (name == "remat_local" and self.remat_local is None)
            check(name, is_known, f"one of {', '.join(REMAT_POLICIES)}")
        for batch in (self.batch, *(stage.batch for stage in self.stages if stage.batch)):
            if batch.slots > self.model.max_length:
                raise UserError(f"batch.slots {batch.slots} exceed model.max_length {self.model.max_length}")
        start, steps = self.optim.decay_start, self.optim.decay_steps
        if start is not None and steps is not None and start < self.num_steps < start + steps:
            raise UserError(
                f"num_steps {self.num_steps} ends the run amid its decay, {steps} updates from optim.decay_start {start} on; "
                f"expected {start + steps} or more"
            )


# Whether a field of a run may differ from what its checkpoint was made with. FREE: yes. SCHEDULE: where a run branches off
# another (--resume-from). FIXED: the state would mean something else; only when told to. SHAPE: never, the saved arrays would
# not fit. The first pattern that "FIELD: OLD -> NEW" begins with counts; every field of a run has one.
FREE, SCHEDULE, FIXED, SHAPE = "free", "schedule", "fixed", "shape"
CHANGES: tuple[tuple[str, str, str], ...] = (
    (r"guard\.window\b", SHAPE, "size of what the guard remembers"),
    (r"optim\.(optimizer|mu_dtype)\b", SHAPE, "what the optimiser's moments are and are kept in"),
    (r"optim\.ema_decay: (None ->|.* -> None$)", SHAPE, "whether there are averages"),
    # How long, on what machine, and what is told of it. A schedule without schedule_steps is as long as the run: it stretches.
    (r"(num_steps|remat|remat_local|accumulate|mesh|model\.dtype|model\.max_length)\b", FREE, ""),
    (r"(checkpoint|log|samples|sample_every_steps|num_samples|validation|guard|watchdog|profile)\b", FREE, ""),
    # What another learning rate would be a surprise for in a run that goes on, and is the purpose of a branch.
    (r"optim\.(learning_rate|warmup_steps|schedule|schedule_steps|decay_(fraction|steps|start)|end_ratio)\b", SCHEDULE,
     "how far an update goes"),
    (r"optim\.(weight_decay|clip_norm)\b", SCHEDULE, "how far an update goes"),
    (r"optim\b", FIXED, "what the optimiser's moments and the averages are of"),
    (r"(model|vae)\b", FIXED, "what the weights are of"),
    (r"seed\b", FIXED, "order of the data, noise of every update"),
    (r"(batch|stages|rows|crop_frames)\b", FIXED, "which clips an update reads, which have been heard"),
    (r"(diff_weight|stop_weight|loss)\b", FIXED, "what is minimised"),
    (r"patch_sec\b", FIXED, "length of speech"),
    (r"data\b", FIXED, "what is heard, and what its latents and ids mean"),
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
    rows: int = 8  # crops of a batch, over all hosts
    crop_frames: int = 25  # latent frames of a crop
    remat: bool = False  # recompute each block in the backward pass
    loss: VAELossConfig = VAELossConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    sample_every_steps: int = 1000  # updates between two reconstructions of held-out clips
    num_samples: int = 4  # held-out clips that are reconstructed

    def __post_init__(self):
        def check(name, ok, expected):
            if not ok:
                raise UserError(f"codec run: {name}: expected {expected}, got {getattr(self, name)!r}")

        for name in ("num_steps", "rows", "crop_frames", "sample_every_steps"):
            check(name, getattr(self, name) >= 1, "at least 1")
        check("num_samples", self.num_samples >= 0, "0 or more")
        check("loss", min(self.loss.mel, self.loss.spectrum, self.loss.kl) >= 0, "weights of 0 or more")
