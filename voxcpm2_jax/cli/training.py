"""What `train` and `train-vae` share: the flags of a run, and running it in one or several processes."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from voxcpm2_jax.buckets.store import is_url
from voxcpm2_jax.cli.flags import Parser, place
from voxcpm2_jax.cli.outcome import DONE, FAILED, MISTAKE, PREEMPTED, print_error, print_result
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, VAERun

EPILOG = """The last line of standard output is a JSON object: step, losses, audio_sec_per_sec, mfu (null for the codec,
and where the chip's peak is unknown). Exit codes: 0 done, 1 the run diverged or failed, 2 a mistake in the arguments, 75
stopped by a signal after saving: start the same command again to continue."""

_LAST_WORDS_SEC = 5


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--workdir", required=True, type=place, metavar="DIR", help="checkpoints, metrics.jsonl, TensorBoard files"
    )
    parser.add_argument(
        "--resume-from", type=place, metavar="CKPT",
        help="workdir of another run or one step of it; a new run starts from its whole state",
    )  # fmt: skip
    parser.add_argument(
        "--accept-config-changes", action="store_true",
        help="continue although the config differs from the checkpoint's in fields that change what its state means",
    )  # fmt: skip


def check(config: BackboneRun | VAERun, workdir: str) -> None:
    """Raises UserError if the run would fail for its directory or for a package that its config asks for."""
    from voxcpm2_jax import files, trackers

    if not is_url(workdir):
        files.check_directory(workdir)
    trackers.check(config.log.trackers)


def start_options(args) -> dict:
    """What the flags say about the start of a run, as arguments of its `train` function; copies what lies in a bucket."""
    from voxcpm2_jax.checkpoint.staged import local_checkpoint

    return {"resume_from": local_checkpoint(args.resume_from, whole=True), "accept_changes": args.accept_config_changes}


def run_training(workdir: str, train: Callable[[str | os.PathLike], dict]) -> int:
    """Joins the processes of the run, trains, prints the result -> the exit code.

    `train` gets the workdir, as a Mirror if it lies in a bucket.

    With several processes, an error that may have come to one process alone ends all of them: this function then ends the
    process and does not return.
    """
    import jax

    from voxcpm2_jax import compiled, processes
    from voxcpm2_jax.checkpoint.manager import SaveFailed
    from voxcpm2_jax.checkpoint.mirror import Mirror
    from voxcpm2_jax.train.loop import BrokenRun, Preempted

    processes.connect()
    compiled.keep(workdir)
    try:
        with Mirror(workdir) if is_url(workdir) else contextlib.nullcontext(workdir) as place:
            result = train(place)
        if jax.process_index() == 0:
            print_result(result)
        return DONE
    except BrokenRun as broken:  # BrokenRun and Preempted come to all processes, after the same step
        print_error(broken)
        return FAILED
    except Preempted as preempted:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the state is saved: a further signal must not turn 75 into a failure
        print(preempted, file=sys.stderr)
        return PREEMPTED
    except SaveFailed as failed:
        print_error(failed)
        code = FAILED
    except UserError as mistake:
        print_error(mistake)
        code = MISTAKE
    except BaseException:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        print_error("this process failed or lost another one; all processes of the run end; start all of them again")
        code = FAILED
    if jax.process_count() > 1:
        # An orderly exit would wait for the other processes, which wait for this one in a step. They end as soon as process 0
        # does, so process 0 waits a little: another process with the same error can still print it.
        time.sleep(_LAST_WORDS_SEC if jax.process_index() == 0 else 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
