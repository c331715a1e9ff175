"""`voxcpm2-jax train`: trains the model."""

import pathlib
import tempfile

from voxcpm2_jax.cli import training
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.cli.flags import CKPT, add_command, add_config, place
from voxcpm2_jax.cli.outcome import DONE, print_result
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.run import BackboneRun


def add(commands) -> None:
    parser = add_command(
        commands, "train", run, "pre-train or fine-tune the model; continues if the workdir holds a checkpoint",
        epilog=training.EPILOG,
    )  # fmt: skip
    add_config(parser, "configs/backbone.py:tiny")
    training.add_flags(parser)
    parser.add_argument(
        "--data", type=place, metavar="SHARDS[,SHARDS]",
        help="directories made by prepare; without it, synthetic clips made in memory",
    )  # fmt: skip
    parser.add_argument(
        "--heldout", type=place, metavar="SHARDS[,SHARDS]",
        help="clips for the held-out loss; by default SHARDS/heldout, if prepare made one",
    )  # fmt: skip
    parser.add_argument(
        "--init-params", type=place, metavar="CKPT", help=f"a new run starts with the weights of a checkpoint: {CKPT}"
    )
    parser.add_argument(
        "--init-tslm", type=place, metavar="MINICPM",
        help="the text-semantic LM of a new run starts as this MiniCPM-4: a directory with config.json and safetensors, or "
        "the safetensors file",
    )  # fmt: skip
    parser.add_argument("--profile-steps", metavar="A:B", help="trace updates A .. B - 1 into WORKDIR/profile, for XProf")
    parser.add_argument("--dry-run", action="store_true", help="check the arguments, print the whole config and stop")
    parser.add_argument(
        "--topology", metavar="T",
        help="with --dry-run: also check mesh and batches of all stages for this machine, as `plan` names it, such as "
        "v5e:16x16 or 64xh100, or for plain numbers of devices: 64, or 4x64 for four slices",
    )  # fmt: skip
    parser.add_argument(
        "--planned", metavar="UNITSxDEVICES",
        help="slices or nodes that the config is made for, and devices of each, such as 4x256. If fewer have started, mesh and "
        "accumulate follow, and the batch stays the same; with --dry-run and --topology, the result lists under \"sizes\" "
        "how many of them will do",
    )  # fmt: skip
    parser.add_argument(
        "--compile-for", metavar="T",
        help="compile the train step for this TPU topology, such as v5e:16x16, on any machine, save it in WORKDIR/compiled and "
        "stop; the same command without this flag loads it there instead of compiling. Needs the extra \"tpu\"",
    )  # fmt: skip


def run(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    given = [f"--{name.replace('_', '-')}" for name in ("resume_from", "init_params", "init_tslm") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: each says what a new run starts from; give only one of them")
    from voxcpm2_jax.train import profiler

    profile_steps = args.profile_steps and profiler.profile_steps(args.profile_steps)
    from voxcpm2_jax.train import elastic

    planned, sizes = args.planned and elastic.parse(args.planned), {}
    if args.topology and not args.dry_run:
        raise UserError("--topology goes with --dry-run; a run uses the devices that it finds")
    if args.dry_run:  # launchers call it on the machine they start from, where the paths need not exist
        if args.topology:
            from voxcpm2_jax.plan import topology

            config = topology.check(args.topology, config)
            are_slices = topology.has_slices(args.topology)
            sizes = {"sizes": elastic.sizes(config, planned, are_slices=are_slices)} if planned else {}
        batches = [to_dict(stage.batch_of(config.batch)) | {"first_step": stage.first_step} for stage in config.stages]
        print_result({"workdir": args.workdir, "data": args.data, "config": to_dict(config), "stages": batches} | sizes)
        return DONE
    if args.compile_for:
        print_result({"saved": _compile_ahead(args, config)})
        return DONE
    from voxcpm2_jax.buckets import stage
    from voxcpm2_jax.checkpoint.staged import local_checkpoint
    from voxcpm2_jax.train import pretrain

    training.check(config, args.workdir)

    def train(workdir):
        local = training.start_options(args) | {
            "heldout": stage.local(args.heldout),
            "init_params": local_checkpoint(args.init_params), "init_tslm": stage.local(args.init_tslm),
        }  # fmt: skip
        return pretrain.train(config, workdir, stage.local(args.data), profile_steps=profile_steps, planned=planned, **local)

    return training.run_training(args.workdir, train)


def _compile_ahead(args, config: BackboneRun) -> list[dict]:
    """Saves the train step of every stage for --compile-for, below the workdir or in its bucket."""
    from voxcpm2_jax import files
    from voxcpm2_jax.buckets import stage, store
    from voxcpm2_jax.plan import compile, topology

    topology.check(args.compile_for, config)
    case, data = topology.parse(args.compile_for, config), stage.local(args.data)
    if not store.is_url(args.workdir):
        files.check_directory(args.workdir)
        return compile.save_for(case, args.workdir, data)
    store.objects(args.workdir)  # raises if there is no access, before the work
    with tempfile.TemporaryDirectory() as scratch:
        saved = compile.save_for(case, scratch, data)
        paths = {one["file"]: pathlib.Path(one["file"]) for one in saved}
        store.upload(f"{args.workdir}/compiled", {path.name: path for path in paths.values()})
    return [one | {"file": f"{args.workdir}/compiled/{paths[one['file']].name}"} for one in saved]
