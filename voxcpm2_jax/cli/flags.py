"""What several commands share: the parser, --config, and types of arguments."""

import argparse
from collections.abc import Callable

from voxcpm2_jax.buckets.store import is_url
from voxcpm2_jax.config.plain import UserError

# ---- texts of --help -------------------------------------------------------------------------------------------------

CKPT = "a training workdir, one step of it, or a directory in the released PyTorch layout"
RECORDINGS = (
    "a manifest (JSON lines), a list in another format (CSV, TSV, Kaldi, lhotse, Hugging Face), or a TensorFlow data set as "
    "tfds:NAME[/CONFIG][:VERSION][@SPLIT][?rate=HZ]"
)
_OVERRIDES = "Every field of the config can be set, for example "
_RUN_OVERRIDES = "--config.optim.learning_rate=3e-4 --config.mesh=1,8,1 --config.num_steps=100"

# ---- parser ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Raises a UserError on a wrong argument, so that it is reported in one line like every other mistake."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_command(commands, name: str, run: Callable, summary: str, *, epilog: str | None = None) -> Parser:
    """Adds a command that `run(args, overrides)` executes -> its parser, without flags."""
    parser = commands.add_parser(name, help=summary, description=summary, epilog=epilog)
    parser.set_defaults(run=run, takes_config=False)
    return parser


def add_config(parser: Parser, example: str, *, overrides: str = _RUN_OVERRIDES, group=None) -> None:
    """Adds --config, and lets --config.FIELD=VALUE through to `run` as overrides.

    Args:
        example, overrides: what --help gives as examples of --config and --config.FIELD=VALUE.
        group: a required group of exclusive flags to put --config in; without it --config itself is required.
    """
    place = parser if group is None else group
    place.add_argument("--config", required=group is None, metavar="FILE[:VARIANT]", help=f"such as {example}")
    parser.set_defaults(takes_config=True)
    parser.epilog = "\n\n".join(filter(None, [parser.epilog, _OVERRIDES + overrides]))


# ---- types of arguments ----------------------------------------------------------------------------------------------


def local_path(text: str) -> str:
    """The type of every flag whose file or directory must be on this machine.

    A bucket would be taken for a local directory called "gs:", and what was written there lost with the machine.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: expected a local path; mount the bucket and name the mount point")
    return text


def place(text: str) -> str:
    """The type of every flag that names a file or directory, or several, here or in a bucket (gs://, s3://)."""
    if others := [name for name in text.split(",") if "://" in name and not is_url(name)]:
        raise argparse.ArgumentTypeError(f"{others[0]}: expected a local path, gs://BUCKET/NAME or s3://BUCKET/NAME")
    return text


def numbers(text: str) -> tuple[int, ...]:
    """ "2,4" -> (2, 4)."""
    if not all(number.isdecimal() and int(number) for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers over 0, separated by commas, got {text!r}")
    return tuple(int(number) for number in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """ "a,b" -> ("a", "b")."""
    return tuple(text.split(","))
