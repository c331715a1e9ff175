"""`voxcpm2-jax doctor`: what is wrong with recordings and transcripts."""

from voxcpm2_jax.cli.flags import RECORDINGS, add_command, local_path
from voxcpm2_jax.cli.outcome import DONE, NO, print_result
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import SPEECH_BATCH, BatchConfig


def add(commands) -> None:
    parser = add_command(
        commands, "doctor", run, "find faults in recordings and transcripts before training on them",
        epilog="Exit codes: 0 nothing that spoils a run, 3 something does, 2 a mistake in the arguments.",
    )  # fmt: skip
    parser.add_argument(
        "--manifest", required=True, type=local_path, metavar="F[,F]", help=f"recordings to train on: {RECORDINGS}"
    )
    parser.add_argument(
        "--heldout", default="", type=local_path, metavar="F[,F]",
        help="held-out recordings; also checked for overlap with the training recordings",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=local_path, metavar="DIR", help="vocabulary, such as SHARDS/tokenizer or a released directory"
    )
    for name, metavar, help in (
        ("slots", "T", "slots of a row, for the forecast of rows"),
        ("patches", "M", "audio patches of a row"),
        ("rows", "B", "rows of a batch"),
    ):
        default = getattr(SPEECH_BATCH, name)
        parser.add_argument(f"--{name}", type=int, default=default, metavar=metavar, help=f"{help} (default {default})")
    parser.add_argument("--output", type=local_path, metavar="DIR", help="where report.json and plots go")


def run(args, overrides) -> int:
    from voxcpm2_jax import files
    from voxcpm2_jax.corpus import doctor
    from voxcpm2_jax.data.tokenizer import load_tokenizer

    manifests, heldout = ([name for name in names.split(",") if name] for names in (args.manifest, args.heldout))
    if not manifests:
        raise UserError(f"--manifest={args.manifest}: names no recordings; expected {RECORDINGS}")
    if args.output:
        files.check_directory(args.output)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    batch = BatchConfig(rows=args.rows, slots=args.slots, patches=args.patches)
    report = doctor.examine(manifests, heldout, tokenizer=tokenizer, batch=batch)
    if args.output:
        doctor.write(report, args.output)
    doctor.show(report)
    print_result({name: value for name, value in report.items() if name != "distributions"})
    return DONE if report["ok"] else NO
