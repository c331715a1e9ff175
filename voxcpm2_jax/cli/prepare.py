"""`voxcpm2-jax prepare`: recordings -> shards."""

from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import CKPT, add_command, add_config, place
from voxcpm2_jax.cli.outcome import DONE, print_result
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.plain import UserError, from_dict


def add(commands) -> None:
    parser = add_command(commands, "prepare", run, "make shards (tokens and latents) from recordings")
    add_config(parser, "configs/data.py:demo", overrides="--config.vocab_size=16384 --config.trim=silence")
    parser.add_argument("--output", required=True, type=place, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--vae", type=place, metavar="CKPT",
        help=f"codec: {CKPT}; without it a built-in corpus becomes recordings and manifests only",
    )  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true", help="refuse a manifest with faulty lines; by default they are left out"
    )


def run(args, overrides) -> int:
    config = from_dict(DataConfig, load_config(args.config, overrides))
    from voxcpm2_jax import compiled
    from voxcpm2_jax.buckets import publish, store
    from voxcpm2_jax.checkpoint.staged import local_checkpoint
    from voxcpm2_jax.corpus import prepare

    if store.is_url(args.output) and config.num_hosts > 1:
        raise UserError(
            f"--output={args.output}: several hosts need a directory that they share; mount the bucket, or use one host"
        )
    compiled.keep()
    with publish.directory(args.output, fresh=True, resumes=True) as output:
        made = prepare.prepare(config, output, vae=local_checkpoint(args.vae), strict=args.strict)
    print_result(made | {"output": args.output})
    return DONE
