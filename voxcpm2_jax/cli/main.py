"""The command line: `voxcpm2-jax COMMAND ...`, also `python -m voxcpm2_jax COMMAND ...`.

Each command is a module of this package with two functions. `add(commands)` adds the command's parser; `run(args, overrides)`
runs the command and returns its exit code (outcome.py). To add a command, write its module and add a line to COMMANDS.

These modules import nothing heavy at the top: `--help` answers at once, and a command loads what it needs when it runs.
"""

import importlib
import sys
from collections.abc import Sequence

from voxcpm2_jax import __version__
from voxcpm2_jax.cli import flags
from voxcpm2_jax.cli.outcome import INTERRUPTED, MISTAKE, print_error
from voxcpm2_jax.config.plain import UserError

# Modules, in the order of --help.
COMMANDS = (
    "prepare",
    "doctor",
    "train",
    "train_vae",
    "checkpoints",
    "generate",
    "evaluate",
    "plan",
    "bench",
    "chaos",
    "import_torch",
    "export_torch",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command -> its exit code."""
    try:
        args, overrides = parse(sys.argv[1:] if argv is None else argv)
        return args.run(args, overrides)
    except UserError as error:
        print_error(error)
        return MISTAKE
    except RuntimeError as error:
        if "not in the list of known backends" in str(error):  # a mistake in $JAX_PLATFORMS
            print_error(error)
            return MISTAKE
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def parse(argv: Sequence[str]):
    """-> (arguments, overrides of the config's fields as they were written: "--config.a.b=value").

    Raises:
        UserError: the arguments are not those of a command.
    """
    args, rest = make_parser().parse_known_args(argv)
    if unknown := [word for word in rest if not (args.takes_config and word.startswith("--config."))]:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see voxcpm2-jax --help)")
    return args, rest


def make_parser() -> flags.Parser:
    parser = flags.Parser(
        prog="voxcpm2-jax", description="VoxCPM2 in JAX: data preparation, training, generation, and PyTorch checkpoints."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"voxcpm2_jax.cli.{name}").add(commands)
    return parser
