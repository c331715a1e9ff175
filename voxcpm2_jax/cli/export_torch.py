"""`voxcpm2-jax export-torch`: checkpoint -> released PyTorch layout."""

import sys

from voxcpm2_jax.cli.flags import CKPT, add_command, place
from voxcpm2_jax.cli.outcome import DONE, print_result
from voxcpm2_jax.config.model import DTYPES


def add(commands) -> None:
    parser = add_command(commands, "export-torch", run, "convert a checkpoint to a directory that the PyTorch package loads")
    parser.add_argument("checkpoint", type=place, metavar="CKPT", help=CKPT)
    parser.add_argument("destination", type=place, metavar="DST_DIR", help="absent or empty")
    parser.add_argument(
        "--dtype", choices=DTYPES,
        help="of the backbone's weights and of config.json, by which the PyTorch package computes; default: what the "
        "checkpoint's config says, if its weights are wider. The codec stays as it is",
    )  # fmt: skip


def run(args, overrides) -> int:
    from voxcpm2_jax import convert
    from voxcpm2_jax.buckets import publish
    from voxcpm2_jax.checkpoint.staged import local_checkpoint

    with publish.directory(args.destination, fresh=True) as destination:
        parts = convert.export_torch(local_checkpoint(args.checkpoint), destination, dtype=args.dtype)
    for name, part in parts.items():
        was = f" (checkpoint: {part['checkpoint_dtype']}, {part['checkpoint_bytes']:,} bytes)"
        print(f"{name}: {part['dtype']}, {part['bytes']:,} bytes{was}", file=sys.stderr)
    print_result({"directory": args.destination} | parts)
    return DONE
