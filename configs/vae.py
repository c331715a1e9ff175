"""Configs of `train-vae`: the codec.

    voxcpm2-jax train-vae --config=configs/vae.py:demo --workdir=DIR --data=MANIFEST

    variant     codec            rates (kHz), frames/s    hardware              wall time     result
    tiny        30 k             16 -> 24, 25             any                   seconds       loss falls; needs no --data
    demo        0.6 M, dense     16 -> 24, 25             2 CPU cores           4 min         98.7 % of digits (below)
    demo_long   the same         16 -> 24, 25             2 CPU cores           18 min*       100 % of digits
    small       14 M             16 -> 48, 25             one GPU or TPU        unmeasured    unmeasured
    release     94 M             16 -> 48, 25             8 GPUs or TPUs        unmeasured    unmeasured; the released shape

--data is a manifest or tfds:NAME (voxcpm2_jax/data/README.md), or a directory with train.jsonl and, for reconstructions,
heldout.jsonl, such as `prepare --config=configs/data.py:demo` writes. ":tiny" needs none. Every recording is decoded once at
the start: what cannot be used is left out and listed in WORKDIR/skipped.jsonl. Crops are read from the files as they are
needed, so memory does not grow with the hours.

"demo": share of digits that Whisper-base hears right in reconstructions of the 50 held-out digit strings of
launch/quickstart.sh (synthetic speech; 100 % in the recordings), on two cores of an AMD EPYC (*shared with other work). The
mel distance is 0.217; the standard deviation of the latents is 0.30 .. 1.40 by channel. "demo_long" has twice the updates and
a mel distance of 0.204. Three of its 16 channels carry next to nothing (standard deviation under 0.2); the voice trained on
it does not suffer. Both use dense convolutions where the release has depthwise ones: with so few channels they are as fast
on a CPU.

Sources: optimiser, crop length and KL weight of "small" and "release" follow the first AudioVAE (mel 15, KL 5e-5, 2 s crops,
betas 0.8 / 0.99, warm-up of 1,000 updates, the generator's clip at 1000); the recipe of V2 is unpublished. There is no
discriminator yet.
"""

from ml_collections import ConfigDict

from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import CheckpointConfig, LogConfig, OptimConfig, VAELossConfig, VAERun

VARIANTS = ("tiny", "demo", "demo_long", "small", "release")


def get_config(variant: str = "demo") -> ConfigDict:
    """A variant as a ConfigDict; `voxcpm2_jax.config.run.VAERun` explains the fields."""
    short = OptimConfig(
        learning_rate=3e-3, warmup_steps=50, end_ratio=0.02, beta1=0.8, beta2=0.99, weight_decay=0.0, clip_norm=1.0,
        ema_decay=0.99,
    )  # fmt: skip
    long = OptimConfig(learning_rate=3e-4, warmup_steps=1000, beta1=0.8, beta2=0.99, clip_norm=1000.0, ema_decay=0.999)
    if variant == "tiny":
        run = VAERun(
            vae=AudioVAEConfig(
                encoder_dim=4, encoder_rates=(8, 8, 10), latent_dim=16, decoder_dim=32, decoder_rates=(10, 8, 12),
                out_sample_rate=24000, sr_bin_boundaries=None,
            ),
            num_steps=20,
            rows=8,
            crop_frames=16,
            loss=VAELossConfig(spectrum=1.0, kl=0.1),
            optim=short,
            checkpoint=CheckpointConfig(every_steps=10, keep=2),
            log=LogConfig(every_steps=5),
            sample_every_steps=20,
            num_samples=1,
        )  # fmt: skip
    elif variant in ("demo", "demo_long"):
        run = VAERun(
            vae=AudioVAEConfig(
                encoder_dim=8, encoder_rates=(4, 4, 5, 8), latent_dim=16, decoder_dim=128, decoder_rates=(8, 6, 5, 4),
                depthwise=False, out_sample_rate=24000, sr_bin_boundaries=None,
            ),
            num_steps=1500 if variant == "demo" else 3000,
            rows=4,
            crop_frames=20,
            loss=VAELossConfig(spectrum=0.25, kl=0.1),
            optim=short,
            checkpoint=CheckpointConfig(every_steps=300, keep=2),
            sample_every_steps=750,
        )  # fmt: skip
    elif variant == "small":
        run = VAERun(
            vae=AudioVAEConfig(encoder_dim=48, decoder_dim=768),
            num_steps=200_000,
            rows=32,
            crop_frames=25,
            optim=long,
        )
    elif variant == "release":
        run = VAERun(vae=AudioVAEConfig(), num_steps=1_000_000, rows=128, crop_frames=50, remat=True, optim=long)
    else:
        raise UserError(f"configs/vae.py has {', '.join(VARIANTS)}; got {variant!r}")
    return ConfigDict(to_dict(run))
