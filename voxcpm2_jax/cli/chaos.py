"""`voxcpm2-jax chaos`: injects faults into training runs and checks that they recover."""

from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import add_command, add_config, local_path
from voxcpm2_jax.cli.outcome import DONE, NO, print_result
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import BackboneRun


def add(commands) -> None:
    parser = add_command(
        commands, "chaos", run, "inject faults into runs of a small model and compare their results with a control run",
        epilog="Prints a table, and as the last line the same as JSON. Exit codes: 0 all faults survived, 3 one was not.",
    )  # fmt: skip
    add_config(parser, "configs/backbone.py:tiny")
    parser.add_argument(
        "--workdir", type=local_path, metavar="DIR", help="where the runs go, absent or empty; by default a temporary directory"
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs at random times (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of these times (default 0)")
    parser.add_argument("--quick", action="store_true", help="three kills and one fault of every other kind: some minutes")


def run(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    if args.kills < 1 or args.seed < 0:
        raise UserError(f"--kills must be at least 1 and --seed 0 or more, got {args.kills} and {args.seed}")
    from voxcpm2_jax import files
    from voxcpm2_jax.bench import chaos

    files.check_empty(args.workdir)
    result = chaos.chaos(config, args.workdir, kills=args.kills, seed=args.seed, quick=args.quick)
    chaos.show(result)
    print_result(result)
    return DONE if result["ok"] else NO
