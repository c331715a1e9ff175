"""The command line: `voxcpm2-jax COMMAND ...`, also `python -m voxcpm2_jax COMMAND ...`.

Exit codes: 0 done; 1 our fault, or a run that diverged; 2 the user's mistake, one line on standard error; 3 the answer
is no; 75 preempted after saving: start the same command again. Results go to standard output as one JSON object, the
last line; everything else goes to standard error.

This module imports nothing heavy: a command loads what it needs when it runs.
"""

import argparse
import dataclasses
import importlib.util
import inspect
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from voxcpm2_jax import __version__
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.evaluate import EvaluateConfig
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.run import BackboneRun, BatchConfig, VAERun

DONE, FAILED, MISTAKE, NO, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 75, 130

_LINES_AT_ONCE = 16  # texts of an --input file that are spoken as one batch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command -> its exit code."""
    try:
        args, overrides = _parse(sys.argv[1:] if argv is None else argv)
        return args.run(args, overrides)
    except UserError as error:
        return _complain(error, MISTAKE)
    except RuntimeError as error:
        if "not in the list of known backends" in str(error):  # $JAX_PLATFORMS
            return _complain(error, MISTAKE)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _complain(error: Exception, code: int) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as one line, like every other mistake of the user."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


_CKPT = "a training workdir, one step of it, or a directory in the released PyTorch layout"
_RECORDINGS = "a manifest (JSON lines), or a TensorFlow data set as tfds:NAME[/CONFIG][:VERSION][@SPLIT]"
_OVERRIDES = (
    "Every field of the config can be set: --config.optim.learning_rate=3e-4 --config.mesh=1,8,1 --config.num_steps=100"
)

_EXIT_CODES = """The last line of standard output is a JSON object: step, losses, audio_sec_per_sec, mfu (null where the chip's
peak is unknown). Exit codes: 0 done, 1 it diverged or failed, 2 a mistake in the arguments, 75 stopped by a signal after
saving: start the same command again."""

_PLAN = """TPU topologies are compiled with the run's own train step (needs the extra "tpu", no TPU); GPUs are predicted.
[SLICESx]KIND:AxB[xC] names TPU slices, COUNTxKIND names GPUs. Fields after commas change the run for one topology:
--topology=v5p:8x8x8,rows=512,mesh=1x512x1,remat=full,accumulate=2 (mesh is REPLICAxDATAxTENSOR). The last line of standard
output is a JSON object. Exit codes: 0 all fit, 3 one does not, 2 a mistake in the arguments."""


_BENCH_TRAIN = """Data are noise with the lengths of speech, made in memory; jax, flax and optax are enough with --model.
The last line of standard output is a JSON object. Exit codes: 0 done, 3 it computes something else than the CPU does in
float32, or than the reference: nothing is timed then."""


# Arguments, of all commands, that name a file or a directory.
_PATHS = (
    "checkpoint", "data", "destination", "heldout", "init_params", "init_tslm", "input", "manifest", "output", "output_dir",
    "prompt_audio", "reference_audio", "resume_from", "source", "tokenizer", "vae", "workdir",
)  # fmt: skip


def _numbers(text: str) -> tuple[int, ...]:
    if not all(number.isdecimal() and int(number) for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers over 0 with commas between, got {text!r}")
    return tuple(int(number) for number in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parse(argv):
    """-> (arguments, config overrides as they were written)."""
    parser = _Parser(prog="voxcpm2-jax", description="VoxCPM2 in JAX: data, training, speech, and PyTorch's checkpoints.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name, run, help, *, config=None, or_model=False, epilog=None, of=commands):
        if config:
            epilog = f"{epilog}\n\n{_OVERRIDES}" if epilog else _OVERRIDES
        sub = of.add_parser(name, help=help, description=help, epilog=epilog)
        sub.set_defaults(run=run, takes_config=config is not None)
        if config:
            place = sub.add_mutually_exclusive_group(required=True) if or_model else sub
            place.add_argument("--config", required=not or_model, metavar="FILE[:VARIANT]", help=f"such as {config}")
            if or_model:
                place.add_argument("--model", choices=MODELS, help="a shape by name, which needs no package for configs")
        return sub

    sub = command("prepare", _prepare, "make shards (tokens, latents) from recordings", config="configs/data.py:demo")
    sub.add_argument("--output", required=True, metavar="DIR", help="where the shards go")
    sub.add_argument("--vae", metavar="CKPT", help=f"codec: {_CKPT}")

    sub = command(
        "doctor", _doctor, "look for what is wrong with recordings and transcripts before training on them",
        epilog="Exit codes: 0 nothing that spoils a run, 3 something does, 2 a mistake in the arguments.",
    )  # fmt: skip
    sub.add_argument("--manifest", required=True, metavar="F[,F]", help=f"recordings to train on: {_RECORDINGS}")
    sub.add_argument("--heldout", default="", metavar="F[,F]", help="recordings to validate on: looked for in training")
    sub.add_argument("--tokenizer", metavar="DIR", help="vocabulary, such as SHARDS/tokenizer or a released directory")
    sub.add_argument("--slots", type=int, default=4096, metavar="T", help="slots of a row, for the forecast (default 4096)")
    sub.add_argument("--patches", type=int, default=2816, metavar="M", help="audio patches of a row (default 2816)")
    sub.add_argument("--rows", type=int, default=8, metavar="B", help="rows of a batch (default 8)")
    sub.add_argument("--output", metavar="DIR", help="where report.json and pictures go")

    sub = command(
        "train", _train, "pre-train or fine-tune the model; goes on by itself if the workdir holds a checkpoint",
        config="configs/backbone.py:tiny", epilog=_EXIT_CODES,
    )  # fmt: skip
    sub.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics.jsonl, TensorBoard files")
    sub.add_argument("--data", metavar="SHARDS[,SHARDS]", help="directories made by prepare; :tiny has data of its own")
    sub.add_argument(
        "--heldout", metavar="SHARDS[,SHARDS]", help="for the held-out loss; without it SHARDS/heldout, where prepare left one"
    )
    sub.add_argument("--dry-run", action="store_true", help="check the arguments, print the whole config, train nothing")
    sub.add_argument("--profile-steps", metavar="A:B", help="trace updates A .. B - 1 into WORKDIR/profile, for XProf")
    _add_start(sub)
    sub.add_argument("--init-params", metavar="CKPT", help=f"a new run starts with the weights of {_CKPT}")
    sub.add_argument(
        "--init-tslm", metavar="MINICPM",
        help="a new run's text-semantic LM starts as a MiniCPM-4: directory with config.json and safetensors, or the file",
    )  # fmt: skip

    sub = command(
        "train-vae", _train_vae, "train the codec; goes on by itself if the workdir holds a checkpoint",
        config="configs/vae.py:tiny", epilog=_EXIT_CODES,
    )  # fmt: skip
    sub.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics.jsonl, TensorBoard files")
    sub.add_argument("--data", metavar="DATA", help=f"a directory that prepare left, or {_RECORDINGS}; :tiny has its own")
    _add_start(sub)

    sub = command("generate", _generate, "speak a text, or every line of a file")
    sub.add_argument("--checkpoint", required=True, metavar="CKPT", help=_CKPT)
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="what to say")
    what.add_argument("--input", metavar="LINES.txt", help="one text a line, UTF-8; empty lines are passed over")
    where = sub.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", metavar="F.wav", help="with --text")
    where.add_argument("--output-dir", metavar="DIR", help="with --input: line 7 becomes DIR/0007.wav")
    sub.add_argument("--control", metavar="STYLE", help="description of voice or style; goes in parentheses before the text")
    sub.add_argument("--reference-audio", metavar="F", help="a voice to clone")
    sub.add_argument("--prompt-audio", metavar="F", help="audio to continue; needs --prompt-text")
    sub.add_argument("--prompt-text", metavar="TEXT", help="what is said in --prompt-audio")
    sub.add_argument("--cfg-value", type=float, default=2.0, metavar="X", help="guidance, 0 to 10, useful 1.5 to 3 (default 2)")
    sub.add_argument("--inference-timesteps", type=int, default=10, metavar="N", help="steps a patch, 1 to 1000 (default 10)")
    sub.add_argument("--min-len", type=int, default=2, metavar="N", help="least patches of speech (default 2)")
    sub.add_argument("--max-len", type=int, default=4096, metavar="N", help="most patches of speech (default 4096)")
    sub.add_argument("--seed", type=int, metavar="N", help="of the noise; without it every run speaks differently")
    sub.add_argument("--stream", action="store_true", help="write the audio patch by patch as it is drawn")

    sub = command(
        "evaluate", _evaluate, "speak held-out texts and have them judged beside the recordings, or compute a held-out loss",
        config="configs/evaluate.py:words",
    )  # fmt: skip
    sub.add_argument("--checkpoint", required=True, metavar="CKPT", help=_CKPT)
    sub.add_argument(
        "--data", required=True, metavar="F", help=f"held-out recordings: {_RECORDINGS}; for :loss a directory of shards"
    )
    sub.add_argument("--output", required=True, metavar="DIR", help="result.json, audio, spectrograms")

    sub = command(
        "plan", _plan, "what a training needs and gives on TPUs and GPUs that are not here: memory, traffic, speed",
        config="configs/backbone.py:2b", epilog=_PLAN,
    )  # fmt: skip
    sub.add_argument(
        "--topology", required=True, action="append", metavar="T", help="such as v5e:16x16, 4xv6e:8x8 or 64xh100; repeatable"
    )
    sub.add_argument("--search", action="store_true", help="try rows x remat x mesh x accumulation; print the Pareto table")
    sub.add_argument("--output", metavar="F.json", help="where the whole report goes")

    help = "measure what this machine gives"
    bench = commands.add_parser("bench", help=help, description=help)
    parts = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    sub = command(
        "data", _bench_data, "how many seconds of audio a second and core the data path feeds a training with",
        config="configs/backbone.py:small", of=parts,
    )  # fmt: skip
    sub.add_argument("--data", metavar="SHARDS", help="directory made by prepare; without it noise with the lengths of speech")
    sub.add_argument("--seconds", type=float, default=10.0, metavar="X", help="how long to measure (default 10)")
    sub = command(
        "train", _bench_train, "how many seconds of audio a second a training takes in, after checking that it computes right",
        config="configs/backbone.py:2b", or_model=True, of=parts, epilog=_BENCH_TRAIN,
    )  # fmt: skip
    sub.add_argument("--rows", type=_numbers, default=(), metavar="B[,B]", help="rows of a batch; several are compared")
    sub.add_argument("--slots", type=int, metavar="T", help="slots of a row")
    sub.add_argument("--patches", type=int, metavar="M", help="audio patches of a row")
    sub.add_argument("--remat", type=_words, default=(), metavar="R[,R]", help="what to recompute; several are compared")
    sub.add_argument("--steps", type=int, default=10, metavar="N", help="updates that are timed (default 10)")
    sub.add_argument("--parts", action="store_true", help="times every part of the model by itself as well")
    sub.add_argument("--against-reference", action="store_true", help="beside the package voxcpm, on the same clips")
    sub.add_argument(
        "--reference-rows", type=int, default=8, metavar="N", help="clips of a batch of the reference (default 8)"
    )  # fmt: skip

    sub = command(
        "chaos", _chaos, "inject faults into runs of a small model and compare what they leave with a run left in peace",
        config="configs/backbone.py:tiny",
        epilog="Prints a table and, as the last line, the same as JSON. Exit codes: 0 all survived, 3 something did not.",
    )  # fmt: skip
    sub.add_argument("--workdir", metavar="DIR", help="where the runs go, absent or empty; without it a temporary directory")
    sub.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs at random moments (default 20)")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default 0)")
    sub.add_argument("--quick", action="store_true", help="three kills and one fault of each kind: some minutes")

    sub = command("import-torch", _import_torch, "turn a released PyTorch directory into a checkpoint of ours")
    sub.add_argument(
        "source", metavar="SRC_DIR", help="config.json, model.safetensors, audiovae.pth or .safetensors, tokenizer"
    )
    sub.add_argument("destination", metavar="DST_DIR", help="absent or empty")

    sub = command("export-torch", _export_torch, "write a checkpoint as a directory that the PyTorch package loads")
    sub.add_argument("checkpoint", metavar="CKPT", help=_CKPT)
    sub.add_argument("destination", metavar="DST_DIR", help="absent or empty")

    args, rest = parser.parse_known_args(argv)
    strange = [a for a in rest if not (args.takes_config and a.startswith("--config."))]
    if strange:
        raise UserError(f"unrecognized arguments: {' '.join(strange)} (see voxcpm2-jax --help)")
    for name in _PATHS:
        path = getattr(args, name, None) or ""
        if "://" in path:  # it would be taken for a directory called "gs:", and a run be lost with its machine
            raise UserError(f"{path}: expected a path of this machine; mount the bucket and name the mount")
    return args, rest


def _add_start(sub) -> None:
    sub.add_argument("--resume-from", metavar="CKPT", help="another run's workdir or step: a new run starts with its state")
    sub.add_argument(
        "--accept-config-changes", action="store_true",
        help="go on although fields of the config differ from the checkpoint's that change what its state means",
    )  # fmt: skip


# ---- configs ---------------------------------------------------------------------------------------------------------


def load_config(argument: str, overrides: Sequence[str] = ()) -> dict:
    """The config that `--config=FILE[:VARIANT] --config.a.b=value ...` names, as nested plain data.

    Args:
        argument: FILE[:VARIANT]; a relative FILE is also looked for beside the package.
        overrides: "--config.a.b=value"; the last one of a key counts. Types are those of the file's values; a field that
            is None there takes any literal, and any field takes None (the dataclass it becomes has the last word).
    Raises:
        UserError: no such file, variant or key, or a value of the wrong type.
    """
    if importlib.util.find_spec("ml_collections") is None:
        raise UserError(f"--config={argument}: configs need ml-collections, which is not installed: pip install ml-collections")
    from absl import flags
    from ml_collections import config_flags

    config = _get_config(argument)
    _make_settable(config)
    values = {}
    for override in overrides:
        name, has_value, value = override.removeprefix("--config.").partition("=")
        if not has_value:
            raise UserError(f"{override}: expected --config.{name}=VALUE")
        _check_key(config, name)
        values[name] = value
    nones = [name for name, value in values.items() if value == "None"]
    argv = ["voxcpm2-jax", *(f"--config.{name}={value}" for name, value in values.items() if name not in nones)]
    private = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=private, sys_argv=argv)
        private(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    with config.ignore_type(), config.unlocked():
        for name in nones:
            parent, _, last = name.rpartition(".")
            (config[parent] if parent else config)[last] = None
    return config.to_dict()


def _get_config(argument):
    from ml_collections import ConfigDict

    path, has_variant, variant = argument.partition(":")
    places = [pathlib.Path(path), pathlib.Path(__file__).parents[2] / path]
    found = [place for place in places if place.is_file()]
    if not found:
        raise UserError(f"--config={argument}: no file {places[0]}, nor {places[1]}")
    spec = importlib.util.spec_from_file_location(f"{found[0].stem}_config", found[0])
    if spec is None:
        raise UserError(f"--config={argument}: expected a Python file with get_config(variant)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{found[0]}: not Python ({error})") from None
    except ImportError as error:
        raise UserError(f"{found[0]}: cannot be imported ({error})") from None
    variants = [variant] if has_variant else []
    try:
        inspect.signature(module.get_config).bind(*variants)
    except AttributeError:
        raise UserError(f"{found[0]} has no get_config(variant)") from None
    except TypeError:
        raise UserError(f"--config={argument}: {'takes no' if variants else 'needs a'} variant") from None
    config = module.get_config(*variants)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{found[0]}: get_config gives {type(config).__name__}; expected an ml_collections.ConfigDict")
    return config


def _make_settable(config) -> None:
    """Lets flags reach what ml_collections has no parser for: fields that are None, and lists (they become tuples)."""
    from ml_collections import config_dict

    with config.unlocked(), config.ignore_type():
        for name, value in list(config.items()):
            if isinstance(value, config_dict.ConfigDict):
                _make_settable(value)
            elif value is None:
                config[name] = config_dict.placeholder(object)
            elif isinstance(value, list):
                del config[name]  # set over a list, a tuple becomes one again
                config[name] = tuple(value)


def _check_key(config, name) -> None:
    node, where = config, "config"
    for part in name.split("."):
        if not isinstance(node, Mapping) and not hasattr(node, "keys"):
            raise UserError(f"--config.{name}: {where} is a value and has no fields")
        if part not in node:
            raise UserError(f"--config.{name}: unknown key; {where} has {', '.join(sorted(node.keys()))}")
        node, where = node[part], f"{where}.{part}"


# ---- commands --------------------------------------------------------------------------------------------------------


def _prepare(args, overrides) -> int:
    config = from_dict(DataConfig, load_config(args.config, overrides))
    from voxcpm2_jax.corpus import prepare

    _print(prepare.prepare(config, args.output, vae=args.vae))
    return DONE


def _doctor(args, overrides) -> int:
    from voxcpm2_jax.corpus import doctor
    from voxcpm2_jax.data.tokenizer import load_tokenizer

    manifests, heldout = ([name for name in names.split(",") if name] for names in (args.manifest, args.heldout))
    if not manifests:
        raise UserError(f"--manifest={args.manifest}: names no recordings")
    if args.output:
        _check_directory(args.output)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    batch = BatchConfig(rows=args.rows, slots=args.slots, patches=args.patches)
    report = doctor.examine(manifests, heldout, tokenizer=tokenizer, batch=batch)
    if args.output:
        doctor.write(report, args.output)
    doctor.show(report)
    _print({name: value for name, value in report.items() if name != "distributions"})
    return DONE if report["ok"] else NO


def _train(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    given = [f"--{name.replace('_', '-')}" for name in ("resume_from", "init_params", "init_tslm") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: each says what a new run starts with; give one of them")
    from voxcpm2_jax.train import profiler

    profile_steps = args.profile_steps and profiler.profile_steps(args.profile_steps)
    if args.dry_run:  # the launchers ask for it where they start from, which need not have the paths
        _print({"workdir": args.workdir, "data": args.data, "config": to_dict(config)})
        return DONE
    _check_directory(args.workdir)
    from voxcpm2_jax.train import pretrain

    options = _start(args) | {"init_params": args.init_params, "init_tslm": args.init_tslm, "heldout": args.heldout}
    options |= {"profile_steps": profile_steps}
    return _run_training(args.workdir, lambda: pretrain.train(config, args.workdir, args.data, **options))


def _train_vae(args, overrides) -> int:
    config = from_dict(VAERun, load_config(args.config, overrides))
    _check_directory(args.workdir)
    from voxcpm2_jax.train import vae

    return _run_training(args.workdir, lambda: vae.train(config, args.workdir, args.data, **_start(args)))


def _start(args) -> dict:
    return {"resume_from": args.resume_from, "accept_changes": args.accept_config_changes}


def _check_file(path: str) -> None:
    path = pathlib.Path(path)
    if path.is_dir() or _refusal(path.parent):
        raise UserError(f"{path}: cannot be written; its directory must exist and be writable")


def _check_directory(path: str) -> None:
    path = pathlib.Path(path).absolute()
    if reason := _refusal(next(p for p in (path, *path.parents) if p.exists())):
        raise UserError(f"{path}: cannot be written; expected a directory, or a name for a new one ({reason})")


def _refusal(directory: pathlib.Path) -> str:
    """Why nothing new can be put there; "" if it can. Tried, for permissions alone say too little: of root, of /proc."""
    try:
        tempfile.TemporaryDirectory(dir=directory).cleanup()
    except OSError as error:
        return f"{error.strerror or error}: {directory}"
    return ""


def _run_training(workdir: str, train: Callable[[], dict]) -> int:
    import jax

    from voxcpm2_jax import processes
    from voxcpm2_jax.checkpoint.manager import SaveFailed
    from voxcpm2_jax.train.loop import BrokenRun, Preempted

    processes.connect()
    _keep_programs(workdir)
    try:
        result = train()
        if jax.process_index() == 0:
            _print(result)
        return DONE
    except BrokenRun as broken:  # this one and the next come to all processes of a run, after the same step
        return _complain(broken, FAILED)
    except Preempted as preempted:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # all is saved: on the way out none may turn 75 into a failure
        print(preempted, file=sys.stderr)
        return PREEMPTED
    except SaveFailed as failed:
        code = _complain(failed, FAILED)
    except UserError as mistake:
        code = _complain(mistake, MISTAKE)
    except BaseException:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        lost = "this process failed, or found that another one is gone; all of them end: start all again"
        code = _complain(RuntimeError(lost), FAILED)
    if jax.process_count() > 1:
        # It may have come to this process alone: an orderly exit would wait for the others, which wait for it in a step. They
        # end when the first process does, so that one leaves last: those that have met the same can say so.
        time.sleep(_LAST_WORDS_SEC if jax.process_index() == 0 else 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


_LAST_WORDS_SEC = 5


def _keep_programs(workdir: str) -> None:
    """Compiled programs outlive the process, so that a run started again begins at once; JAX_COMPILATION_CACHE_DIR says where.

    Several processes share their workdir, and find there what the first of them wrote. In a directory of each host it alone
    would find its programs, and processes that compile wait for all to take part.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "voxcpm2_jax"
        cache = cache if jax.process_count() == 1 else pathlib.Path(workdir).absolute()
        jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))


def _generate(args, overrides) -> int:
    from voxcpm2_jax.data import audio
    from voxcpm2_jax.inference import api, decode, request
    from voxcpm2_jax.workdir import kind

    settings = {
        "prompt_wav_path": args.prompt_audio, "prompt_text": args.prompt_text, "cfg_value": args.cfg_value,
        "inference_timesteps": args.inference_timesteps, "min_len": args.min_len, "max_len": args.max_len,
    }  # fmt: skip
    texts = _texts(args)
    for path, text in texts.items():
        request.check_settings(text=text, **settings)
        _check_writable(path)
    for flag in ("reference_audio", "prompt_audio"):
        path = getattr(args, flag)
        if path is not None and not pathlib.Path(path).is_file():
            raise UserError(f"--{flag.replace('_', '-')}={path}: no such file")
    if args.seed is not None and not 0 <= args.seed < 2**31:
        raise UserError(f"--seed must lie between 0 and {2**31 - 1}, got {args.seed}")
    kind(args.checkpoint)

    model = api.VoxCPM.from_pretrained(args.checkpoint)
    settings |= {"reference_wav_path": args.reference_audio, "seed": args.seed}
    if args.stream:
        ((path, text),) = texts.items()
        _stream(model, path, text, settings)
        return DONE
    items = list(texts.items())
    status = DONE
    for start in range(0, len(items), _LINES_AT_ONCE):
        chunk = items[start : start + _LINES_AT_ONCE]
        for (path, text), speech in zip(chunk, model.speak([settings | {"text": text} for _, text in chunk])):
            if speech.stopped_by == decode.NO_ROOM:
                print(f"error: {path} is not written: {decode.no_room(model.config)}", file=sys.stderr)
                status = MISTAKE
                continue
            audio.save(path, speech.audio_A, model.sample_rate)
            _print({
                "output": str(path), "text": text, "sec": len(speech.audio_A) / model.sample_rate, "seed": speech.seed,
                "stopped_by": speech.stopped_by, "num_tries": speech.num_tries,
            })  # fmt: skip
    return status


def _texts(args) -> dict[pathlib.Path, str]:
    """What to speak by the file it goes to."""
    if (args.text is None) != (args.output is None):
        raise UserError("--text goes with --output, --input with --output-dir")
    if args.control is not None:
        if args.prompt_text is not None:
            raise UserError("--control does not go with --prompt-text: the prompt sets voice and style")
        if not args.control.strip():
            raise UserError("--control must not be empty")
    style = "" if args.control is None else f"({args.control})"
    if args.text is not None:
        if not args.text.strip():
            raise UserError("--text must not be empty")
        return {pathlib.Path(args.output): style + args.text}
    if args.stream:
        raise UserError("--stream goes with --text, not with --input")
    try:
        lines = pathlib.Path(args.input).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input={args.input}: {error}") from None
    directory = pathlib.Path(args.output_dir)
    texts = {directory / f"{number:04d}.wav": style + line for number, line in enumerate(lines, 1) if line.strip()}
    if not texts:
        raise UserError(f"--input={args.input}: no text in it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir={directory}: {error}") from None
    return texts


def _check_writable(path: pathlib.Path) -> None:
    if path.suffix.lower() != ".wav":
        raise UserError(f"{path}: expected a name that ends in .wav")
    _check_file(path)


def _stream(model, path, text, settings) -> None:
    """Speaks into a file that grows beside `path` and takes its name when it is whole."""
    import soundfile

    aside = path.with_name(path.name + ".part")
    begin, first_sec, num_samples = time.perf_counter(), None, 0
    try:
        file = soundfile.SoundFile(aside, "w", model.sample_rate, channels=1, subtype="PCM_16", format="WAV")
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    try:
        with file:
            for audio_A in model.generate_streaming(text=text, **settings):
                first_sec = time.perf_counter() - begin if first_sec is None else first_sec
                file.write(audio_A)
                file.flush()
                num_samples += len(audio_A)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _print({"output": str(path), "text": text, "sec": num_samples / model.sample_rate, "first_audio_sec": first_sec})


def _evaluate(args, overrides) -> int:
    config = from_dict(EvaluateConfig, load_config(args.config, overrides))
    if config.measure == "loss":
        from voxcpm2_jax.evaluate import validation

        result = validation.evaluate(config, args.checkpoint, args.data, args.output)
        _print({name: value for name, value in result.items() if name != "config"})
        return DONE
    from voxcpm2_jax.evaluate.report import evaluate, show

    result = evaluate(config, args.checkpoint, args.data, args.output)
    show(result)
    _print({name: value for name, value in result.items() if name not in ("rows", "config")})
    return DONE


def _plan(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    if args.output:
        _check_file(args.output)
    from voxcpm2_jax import files
    from voxcpm2_jax.plan import plan
    from voxcpm2_jax.plan.report import brief, show

    report = plan.plan(config, args.topology, search=args.search)
    show(report)
    if args.output:
        files.replace_file(args.output, json.dumps(report, indent=1) + "\n")
    _print(brief(report))
    return DONE if report["ok"] else NO


def _bench_data(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    from voxcpm2_jax.bench import data

    result = data.data(config, args.data, seconds=args.seconds)
    data.show(result)
    _print(result)
    return DONE


def _bench_train(args, overrides) -> int:
    if args.model:
        if overrides:
            raise UserError(f"{overrides[0]} goes with --config, not with --model")
        # configs/backbone.py:2b's budgets of a row. Its `segments` bound what cuDNN's kernel works through.
        batch = BatchConfig(rows=2, slots=min(4096, MODELS[args.model].max_length), patches=2816, segments=128)
        config = BackboneRun(MODELS[args.model], batch=batch)
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
        print(f"error: {disagreement}", file=sys.stderr)
        return NO
    show(result)
    _print(result)
    return DONE


def _chaos(args, overrides) -> int:
    config = from_dict(BackboneRun, load_config(args.config, overrides))
    if args.kills < 1 or args.seed < 0:
        raise UserError(f"--kills must be at least 1 and --seed 0 or more, got {args.kills} and {args.seed}")
    if args.workdir:
        _check_directory(args.workdir)
        if pathlib.Path(args.workdir).exists() and any(pathlib.Path(args.workdir).iterdir()):
            raise UserError(f"--workdir={args.workdir}: not empty")
    from voxcpm2_jax.bench import chaos

    result = chaos.chaos(config, args.workdir, kills=args.kills, seed=args.seed, quick=args.quick)
    chaos.show(result)
    _print(result)
    return DONE if result["ok"] else NO


def _import_torch(args, overrides) -> int:
    from voxcpm2_jax import convert

    convert.import_torch(args.source, args.destination)
    _print({"checkpoint": args.destination})
    return DONE


def _export_torch(args, overrides) -> int:
    from voxcpm2_jax import convert

    convert.export_torch(args.checkpoint, args.destination)
    _print({"directory": args.destination})
    return DONE


def _print(result: dict) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main())
