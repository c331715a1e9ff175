"""`voxcpm2-jax doctor`: what is wrong with recordings and transcripts."""

from voxcpm2_jax.cli.flags import RECORDINGS, add_command, place
from voxcpm2_jax.cli.outcome import DONE, NO, print_result
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import SPEECH_BATCH, BatchConfig


def add(commands) -> None:
    parser = add_command(
        commands, "doctor", run, "find faults in recordings and transcripts before training on them",
        epilog="Exit codes: 0 nothing that spoils a run, 3 something does, 2 a mistake in the arguments.",
    )  # fmt: skip
    parser.add_argument("--manifest", required=True, type=place, metavar="F[,F]", help=f"recordings to train on: {RECORDINGS}")
    parser.add_argument(
        "--heldout", default="", type=place, metavar="F[,F]",
        help="held-out recordings; also checked for overlap with the training recordings",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", type=place, metavar="DIR", help="vocabulary, such as SHARDS/tokenizer or a released directory"
    )
    for name, metavar, help in (
        ("slots", "T", "slots of a row, for the forecast of rows"),
        ("patches", "M", "audio patches of a row"),
        ("rows", "B", "rows of a batch"),
    ):
        default = getattr(SPEECH_BATCH, name)
        parser.add_argument(f"--{name}", type=int, default=default, metavar=metavar, help=f"{help} (default {default})")
    parser.add_argument(
        "--output", type=place, metavar="DIR",
        help="where all findings, report.json and plots go; a run that was stopped continues there",
    )  # fmt: skip
    parser.add_argument("--host", type=int, default=0, metavar="I", help="which of several hosts this is (default 0)")
    parser.add_argument("--num-hosts", type=int, default=1, metavar="N", help="hosts that share one --output (default 1)")


def run(args, overrides) -> int:
    from voxcpm2_jax import files
    from voxcpm2_jax.buckets import publish, stage
    from voxcpm2_jax.buckets.store import is_url
    from voxcpm2_jax.corpus import doctor, report
    from voxcpm2_jax.data.tokenizer import load_tokenizer

    manifests, heldout = ([name for name in names.split(",") if name] for names in (args.manifest, args.heldout))
    if not manifests:
        raise UserError(f"--manifest={args.manifest}: names no recordings; expected {RECORDINGS}")
    if args.output and not is_url(args.output):
        files.check_directory(args.output)
    if not 0 <= args.host < args.num_hosts:
        raise UserError(f"--host={args.host}: expected 0 to {args.num_hosts - 1}, one less than --num-hosts")
    if args.num_hosts > 1 and not args.output:
        raise UserError(f"--num-hosts={args.num_hosts} needs --output, a directory that all hosts share")
    if args.num_hosts > 1 and is_url(args.output):
        raise UserError(
            f"--output={args.output}: several hosts need a directory that they share; mount the bucket, or use one host"
        )
    tokenizer = load_tokenizer(stage.local(args.tokenizer)) if args.tokenizer else None
    batch = BatchConfig(rows=args.rows, slots=args.slots, patches=args.patches)
    hosts = {"host": args.host, "num_hosts": args.num_hosts}
    with publish.directory(args.output, resumes=True) as output:
        found = doctor.examine(manifests, heldout, tokenizer=tokenizer, batch=batch, output=output, **hosts)
    if found is None:
        left = "other hosts still have recordings to open; the last one writes the report"
        print_result({"output": str(args.output), "host": args.host, "num_hosts": args.num_hosts, "left": left})
        return DONE
    report.show(found)
    print_result(found)
    return DONE if found["ok"] else NO
