"""`voxcpm2-jax prepare`: recordings -> shards."""

from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import CKPT, add_command, add_config, local_path
from voxcpm2_jax.cli.outcome import DONE, print_result
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.plain import from_dict


def add(commands) -> None:
    parser = add_command(commands, "prepare", run, "make shards (tokens and latents) from recordings")
    add_config(parser, "configs/data.py:demo", overrides="--config.vocab_size=16384 --config.trim=silence")
    parser.add_argument("--output", required=True, type=local_path, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--vae", type=local_path, metavar="CKPT",
        help=f"codec: {CKPT}; without it a built-in corpus becomes recordings and manifests only",
    )  # fmt: skip


def run(args, overrides) -> int:
    config = from_dict(DataConfig, load_config(args.config, overrides))
    from voxcpm2_jax import compiled
    from voxcpm2_jax.corpus import prepare

    compiled.keep()
    print_result(prepare.prepare(config, args.output, vae=args.vae))
    return DONE
