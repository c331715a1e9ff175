"""`voxcpm2-jax import-torch`: released PyTorch layout -> checkpoint."""

from voxcpm2_jax.cli.flags import add_command, place
from voxcpm2_jax.cli.outcome import DONE, print_result


def add(commands) -> None:
    parser = add_command(commands, "import-torch", run, "convert a directory in the released PyTorch layout to a workdir")
    parser.add_argument(
        "source", type=place, metavar="SRC_DIR",
        help="config.json, model.safetensors, audiovae.pth or .safetensors, tokenizer",
    )  # fmt: skip
    parser.add_argument("destination", type=place, metavar="DST_DIR", help="absent or empty")


def run(args, overrides) -> int:
    from voxcpm2_jax import convert
    from voxcpm2_jax.buckets import publish, stage

    with publish.directory(args.destination, fresh=True) as destination:
        convert.import_torch(stage.local(args.source), destination)
    print_result({"checkpoint": args.destination})
    return DONE
