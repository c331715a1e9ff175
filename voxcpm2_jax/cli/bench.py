"""`voxcpm2-jax bench data`, `train`, `rehearsal` and `clock`: how fast this machine is, and how fast a TPU would be."""

import dataclasses
import importlib.util

from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import add_command, add_config, local_path, numbers, words
from voxcpm2_jax.cli.outcome import DONE, NO, print_error, print_result
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import SPEECH_BATCH, BackboneRun

_TRAIN_EPILOG = """The data are noise with the lengths of speech, made in memory. With --model, jax, flax and optax are the only
packages needed. The last line of standard output is a JSON object. Exit codes: 0 done, 3 nothing was timed, because the results
differ from those of the CPU in float32 or of the PyTorch package."""


def add(commands) -> None:
    summary = "measure the speed of this machine"
    parts = commands.add_parser("bench", help=summary, description=summary)
    parts = parts.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    _add_data(parts)
    _add_train(parts)
    _add_rehearsal(parts)
    _add_clock(parts)


# ---- bench data ------------------------------------------------------------------------------------------------------


def _add_data(parts) -> None:
    parser = add_command(
        parts, "data", run_data, "measure how many seconds of audio the data path reads per second and per core"
    )
    add_config(parser, "configs/backbone.py:small")
    parser.add_argument(
        "--data", type=local_path, metavar="SHARDS",
        help="directory made by prepare; without it, noise with the lengths of speech",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10.0, metavar="X", help="how long to measure (default 10)")


def run_data(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    from voxcpm2_jax.bench import data

    result = data.data(config, args.data, seconds=args.seconds)
    data.show(result)
    print_result(result)
    return DONE


# ---- bench train -----------------------------------------------------------------------------------------------------


def _add_train(parts) -> None:
    parser = add_command(
        parts, "train", run_train, "check the train step's results, then measure how many seconds of audio it takes per second",
        epilog=_TRAIN_EPILOG,
    )  # fmt: skip
    model = parser.add_mutually_exclusive_group(required=True)
    add_config(parser, "configs/backbone.py:2b", group=model)
    model.add_argument("--model", choices=MODELS, help="shape of a model, in place of a config")
    parser.add_argument("--rows", type=numbers, default=(), metavar="B[,B]", help="rows of a batch; several are compared")
    parser.add_argument("--slots", type=int, metavar="T", help="slots of a row")
    parser.add_argument("--patches", type=int, metavar="M", help="audio patches of a row")
    parser.add_argument("--remat", type=words, default=(), metavar="R[,R]", help="what to recompute; several are compared")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="updates to time (default 10)")
    parser.add_argument("--parts", action="store_true", help="also time each part of the model by itself")
    parser.add_argument("--against-reference", action="store_true", help="also time the PyTorch package on the same clips")
    parser.add_argument(
        "--reference-rows", type=int, default=8, metavar="N", help="clips in a batch of the PyTorch package (default 8)"
    )


def run_train(args, overrides) -> int:
    if args.model:
        if overrides:
            raise UserError(f"{overrides[0]} goes with --config, not with --model")
        model = MODELS[args.model]
        # As in configs/backbone.py:2b. The cost of cuDNN's attention kernel grows with `segments`.
        slots = min(SPEECH_BATCH.slots, model.max_length)
        config = BackboneRun(model, batch=dataclasses.replace(SPEECH_BATCH, rows=2, slots=slots, segments=128))
    else:
        config = from_dict(BackboneRun, load_config(args.config, overrides))
    budgets = {name: value for name in ("slots", "patches") if (value := getattr(args, name)) is not None}
    if "slots" in budgets:
        budgets = {"patches": min(config.batch.patches, args.slots)} | budgets
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, **budgets))
    from voxcpm2_jax.bench.train import Disagreement, show, train

    options = {"rows": args.rows, "remats": args.remat, "num_rounds": args.steps, "parts": args.parts}
    reference = {"against_reference": args.against_reference, "reference_rows": args.reference_rows}
    try:
        result = train(config, **options, **reference)
    except Disagreement as disagreement:
        print_error(disagreement)
        return NO
    show(result)
    print_result(result)
    return DONE


# ---- bench rehearsal -------------------------------------------------------------------------------------------------


def _add_rehearsal(parts) -> None:
    parser = add_command(
        parts, "rehearsal", run_rehearsal, "go through a large run on this machine: 10^7 clips, all stages, kills, a branch",
        epilog="The last line of standard output is a JSON object. Exit codes: 0 all went well, 3 something did not.",
    )  # fmt: skip
    add_config(parser, "configs/backbone.py:2b")
    parser.add_argument(
        "--workdir", type=local_path, metavar="DIR", help="where corpus and runs go, absent or empty; by default temporary"
    )
    parser.add_argument("--clips", type=int, default=10_000_000, metavar="N", help="clips of the corpus (default 10^7)")
    parser.add_argument("--shards", type=int, default=3000, metavar="N", help="its shards (default 3000)")
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="of the training, an even number (default 4)")


def run_rehearsal(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    if args.shards < 10 or args.shards % 10 or args.clips < 100 * args.shards or args.processes < 2 or args.processes % 2:
        raise UserError(
            f"--shards={args.shards} --clips={args.clips} --processes={args.processes}: expected a multiple of 10 shards, at "
            "least 100 clips a shard, and an even number of processes"
        )
    from voxcpm2_jax import files
    from voxcpm2_jax.bench.rehearsal import rehearsal

    files.check_empty(args.workdir)
    sizes = {"clips": args.clips, "shards": args.shards, "processes": args.processes, "workers": args.processes // 2}
    result = rehearsal(config, args.workdir, **sizes)
    print_result(result)
    return DONE if result["ok"] else NO


# ---- bench clock -----------------------------------------------------------------------------------------------------


def _add_clock(parts) -> None:
    parser = add_command(
        parts, "clock", run_clock, "time one stack on a TPU by the compiler's clock, without a TPU (needs the extra tpu)",
        epilog="The last line of standard output is a JSON object. Exit codes: 0 done, 1 the compiler failed, 2 a mistake.",
    )  # fmt: skip
    add_config(parser, "configs/backbone.py:2b")
    parser.add_argument("--part", required=True, choices=("tslm", "ralm", "locenc", "locdit"), help="a stack")
    parser.add_argument("--chip", required=True, choices=("v4", "v5e", "v5p", "v6e"), help="compiled for one of these")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows of the batch on the chip (default 1)")
    parser.add_argument("--against", metavar="COMMIT", help="compile this version of the repository as well")
    parser.add_argument(
        "--option", action="append", metavar="NAME=VALUE",
        help="an XLA option in place of the chip's own; repeatable; --option=none for no option",
    )  # fmt: skip


def run_clock(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    if args.rows < 1:
        raise UserError(f"--rows={args.rows}: expected at least 1")
    options = None
    if args.option:
        given = [option for option in args.option if option != "none"]
        if wrong := [option for option in given if "=" not in option]:
            raise UserError(f"--option={wrong[0]}: expected NAME=VALUE, or none")
        options = dict(option.split("=", 1) for option in given)
    from voxcpm2_jax.bench import clock
    from voxcpm2_jax.plan.compile import NO_LIBTPU

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(NO_LIBTPU)
    result = clock.clock(config, part=args.part, chip=args.chip, rows=args.rows, against=args.against, options=options)
    clock.show(result)
    print_result(result)
    return DONE
