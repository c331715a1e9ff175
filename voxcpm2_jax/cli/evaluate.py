"""`voxcpm2-jax evaluate`: scores of a checkpoint on held-out data."""

from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import CKPT, RECORDINGS, add_command, add_config, place
from voxcpm2_jax.cli.outcome import DONE, print_result
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.plain import from_dict


def add(commands) -> None:
    parser = add_command(
        commands, "evaluate", run,
        "speak held-out texts and score the speech beside the recordings, or compute a held-out loss",
    )  # fmt: skip
    add_config(parser, "configs/evaluate.py:words", overrides="--config.cfg_value=2.5 --config.seed=1")
    parser.add_argument("--checkpoint", required=True, type=place, metavar="CKPT", help=CKPT)
    parser.add_argument(
        "--data", required=True, type=place, metavar="F",
        help=f"held-out recordings: {RECORDINGS}; for :loss, a directory of shards",
    )  # fmt: skip
    parser.add_argument("--output", required=True, type=place, metavar="DIR", help="result.json, audio, spectrograms")


def run(args, overrides) -> int:
    config = from_dict(EvaluateConfig, load_config(args.config, overrides))
    from voxcpm2_jax import compiled
    from voxcpm2_jax.buckets import publish, stage
    from voxcpm2_jax.checkpoint.staged import local_checkpoint

    with publish.directory(args.output) as output:
        checkpoint = local_checkpoint(args.checkpoint)
        if config.measure == "loss":
            compiled.keep()
            from voxcpm2_jax.evaluate import validation

            result = validation.evaluate(config, checkpoint, stage.local(args.data), output)
        else:
            from voxcpm2_jax.evaluate import report

            result = report.evaluate(config, checkpoint, args.data, output)
            report.show(result)
    print_result({name: value for name, value in result.items() if name not in ("rows", "config")})
    return DONE
