"""`voxcpm2-jax export-torch`: checkpoint -> released PyTorch layout."""

from voxcpm2_jax.cli.flags import CKPT, add_command, local_path
from voxcpm2_jax.cli.outcome import DONE, print_result


def add(commands) -> None:
    parser = add_command(commands, "export-torch", run, "convert a checkpoint to a directory that the PyTorch package loads")
    parser.add_argument("checkpoint", type=local_path, metavar="CKPT", help=CKPT)
    parser.add_argument("destination", type=local_path, metavar="DST_DIR", help="absent or empty")


def run(args, overrides) -> int:
    from voxcpm2_jax import convert

    convert.export_torch(args.checkpoint, args.destination)
    print_result({"directory": args.destination})
    return DONE
