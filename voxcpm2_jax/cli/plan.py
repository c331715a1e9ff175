"""`voxcpm2-jax plan`: memory, traffic and speed of a training run on accelerators that are not here."""

import json

from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import add_command, add_config, place
from voxcpm2_jax.cli.outcome import DONE, NO, print_result
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import BackboneRun

_EPILOG = """For TPU topologies the run's train step is compiled (needs the extra "tpu", no TPU), and timed by the compiler's
own clock. The released shape takes about ten minutes a batch size; the result is kept. GPUs are predicted by arithmetic.

[SLICESx]KIND:AxB[xC] names TPU slices, COUNTxKIND names GPUs. Fields after commas change the run for one topology:
--topology=v5p:8x8x8,rows=512,mesh=1x512x1,remat=full,accumulate=2 (mesh is REPLICAxDATAxTENSOR). The last line of standard
output is a JSON object. Exit codes: 0 all fit, 3 one does not, 2 a mistake in the arguments."""


def add(commands) -> None:
    parser = add_command(
        commands, "plan", run, "predict memory, traffic and speed of a training run on TPUs and GPUs that are not here",
        epilog=_EPILOG,
    )  # fmt: skip
    add_config(parser, "configs/backbone.py:2b")
    parser.add_argument(
        "--topology", required=True, action="append", metavar="T", help="such as v5e:16x16, 4xv6e:8x8 or 64xh100; repeatable"
    )
    parser.add_argument("--search", action="store_true", help="try rows x remat x mesh x accumulation; print the Pareto front")
    parser.add_argument(
        "--fast", action="store_true", help="compile with little effort: memory and traffic in a minute, but no clock"
    )
    parser.add_argument("--output", type=place, metavar="F.json", help="where the whole report goes")


def run(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    from voxcpm2_jax import files
    from voxcpm2_jax.buckets import publish
    from voxcpm2_jax.plan import plan
    from voxcpm2_jax.plan.report import brief, show

    with publish.file(args.output) as output:
        if output:
            files.check_file(output)
        report = plan.plan(config, args.topology, search=args.search, fast=args.fast)
        show(report)
        if output:
            files.replace_file(output, json.dumps(report, indent=1) + "\n")
    print_result(brief(report))
    return DONE if report["ok"] else NO
