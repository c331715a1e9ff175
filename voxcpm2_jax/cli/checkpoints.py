"""`voxcpm2-jax checkpoints`: which steps of a run are saved, and what a branch from each would start with."""

from voxcpm2_jax.cli.flags import add_command, place
from voxcpm2_jax.cli.outcome import DONE, print_result

_EPILOG = """phase: where the learning rate of the next update stands: warm-up, stable (at its peak: where a branch with a decay
of its own starts) or decay. kept: "always" (checkpoint.keep_every_steps), or "newest" if later checkpoints replace it. The
last line of standard output is a JSON object."""


def add(commands) -> None:
    parser = add_command(
        commands, "checkpoints", run, "list the checkpoints of a run that a branch can start from", epilog=_EPILOG
    )
    parser.add_argument("workdir", type=place, metavar="WORKDIR", help="of train or train-vae")


def run(args, overrides) -> int:
    from rich.console import Console
    from rich.table import Table

    from voxcpm2_jax.checkpoint.staged import local_workdir
    from voxcpm2_jax.train.branches import branch_points

    workdir = local_workdir(args.workdir)
    points = [point | {"path": point["path"].replace(workdir, args.workdir, 1)} for point in branch_points(workdir)]
    table = Table(title=f"{args.workdir}: start a branch with --resume-from=PATH")
    for name in ("step", "learning rate", "hours"):
        table.add_column(name, justify="right")
    for name in ("phase", "kept", "path"):
        table.add_column(name, overflow="fold")
    for point in points:
        hours = "" if point["hours"] is None else f"{point['hours']:,.1f}"
        numbers = f"{point['step']:,}", f"{point['learning_rate']:.3g}", hours
        table.add_row(*numbers, point["phase"], point["kept"], point["path"])
    Console(stderr=True).print(table)
    print_result({"workdir": args.workdir, "checkpoints": points})
    return DONE
