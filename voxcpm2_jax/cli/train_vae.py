"""`voxcpm2-jax train-vae`: trains the codec."""

from voxcpm2_jax.cli import training
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import RECORDINGS, add_command, add_config, place
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import VAERun


def add(commands) -> None:
    parser = add_command(
        commands, "train-vae", run, "train the codec; continues if the workdir holds a checkpoint", epilog=training.EPILOG
    )
    add_config(parser, "configs/vae.py:tiny")
    training.add_flags(parser)
    parser.add_argument(
        "--data", type=place, metavar="DATA",
        help=f"a directory made by prepare, or {RECORDINGS}; without it, synthetic sound made in memory",
    )  # fmt: skip


def run(args, overrides) -> int:
    config = from_dict(VAERun, load_config(args.config, overrides))
    from voxcpm2_jax.buckets import stage, store
    from voxcpm2_jax.train import vae

    training.check(config, args.workdir)

    def train(workdir):
        is_folder = store.is_url(args.data) and "" not in store.objects(args.data)  # the recordings of a manifest stay there
        data = stage.local(args.data) if is_folder else args.data
        return vae.train(config, workdir, data, **training.start_options(args))

    return training.run_training(args.workdir, train)
