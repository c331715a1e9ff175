"""`voxcpm2-jax generate`: speaks a text, or every line of a file."""

import argparse
import pathlib
import time
from collections.abc import Callable

from voxcpm2_jax.cli.flags import CKPT, add_command, place
from voxcpm2_jax.cli.outcome import DONE, MISTAKE, print_error, print_result
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.request import MAX_CFG, MAX_STEPS, Request
from voxcpm2_jax.config.text import with_description

_BATCH_LINES = 16  # lines of an --input file that are spoken in one batch


def add(commands) -> None:
    parser = add_command(commands, "generate", run, "speak a text, or every line of a file")
    parser.add_argument("--checkpoint", required=True, type=place, metavar="CKPT", help=CKPT)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="what to say")
    what.add_argument("--input", type=place, metavar="LINES.txt", help="UTF-8, one text per line; empty lines are skipped")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=place, metavar="F.wav", help="with --text")
    where.add_argument("--output-dir", type=place, metavar="DIR", help="with --input: line 7 is spoken into DIR/0007.wav")
    parser.add_argument("--control", metavar="STYLE", help="description of voice or style, put in parentheses before the text")
    parser.add_argument("--reference-audio", type=place, metavar="F", help="recording of a voice to clone")
    parser.add_argument("--prompt-audio", type=place, metavar="F", help="recording to continue; needs --prompt-text")
    parser.add_argument("--prompt-text", metavar="TEXT", help="transcript of --prompt-audio")
    for name, kind, metavar, help in (
        ("cfg_value", float, "X", f"guidance, 0 to {MAX_CFG:g}, useful 1.5 to 3"),
        ("inference_timesteps", int, "N", f"Euler steps per patch, 1 to {MAX_STEPS}"),
        ("min_len", int, "N", "fewest patches of speech"),
        ("max_len", int, "N", "most patches of speech"),
    ):
        default = getattr(Request, name)
        flag, help = f"--{name.replace('_', '-')}", f"{help} (default {default:g})"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=help)
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise; by default a random one")
    parser.add_argument("--stream", action="store_true", help="write patch by patch, into F.wav.part until it is complete")


def run(args, overrides) -> int:
    from voxcpm2_jax.buckets import publish, stage
    from voxcpm2_jax.checkpoint.staged import local_checkpoint

    flag, place = ("output", publish.file) if args.output is not None else ("output_dir", publish.directory)
    wanted = getattr(args, flag)
    with place(wanted) as made:
        local = {name: stage.local(getattr(args, name)) for name in ("input", "reference_audio", "prompt_audio")}
        local |= {flag: made, "checkpoint": local_checkpoint(args.checkpoint)}
        return _run(argparse.Namespace(**vars(args) | local), lambda path: str(path).replace(made, wanted, 1))


def _run(args, shown: Callable[[pathlib.Path], str]) -> int:
    """`run` with local paths; `shown` gives the names under which results are reported."""
    from voxcpm2_jax import files
    from voxcpm2_jax.inference import api, room
    from voxcpm2_jax.workdir import kind

    requests = {}
    for path, text in _texts(args).items():
        try:
            requests[path] = Request(
                text, args.prompt_audio, args.prompt_text, args.reference_audio, args.cfg_value, args.inference_timesteps,
                args.min_len, args.max_len, seed=args.seed,
            )  # fmt: skip
        except UserError as error:
            where = f"--input={args.input}, line {int(path.stem)}: " if args.input else ""
            raise UserError(f"{where}{error}") from None
        if path.suffix.lower() != ".wav":
            raise UserError(f"{path}: expected a name that ends in .wav")
    if args.output_dir is not None:
        try:
            pathlib.Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output-dir={args.output_dir}: {error}") from None
    for path in requests:
        files.check_file(path)
    for flag in ("reference_audio", "prompt_audio"):
        recording = getattr(args, flag)
        if recording is not None and not pathlib.Path(recording).is_file():
            raise UserError(f"--{flag.replace('_', '-')}={recording}: no such file")
    kind(args.checkpoint)
    room.check_all(args.checkpoint, requests.values())

    model = api.VoxCPM.from_pretrained(args.checkpoint)
    return _stream(model, requests, shown) if args.stream else _speak(model, requests, shown)


def _texts(args) -> dict[pathlib.Path, str]:
    """The text to speak into each output file."""
    if (args.text is None) != (args.output is None):
        raise UserError("--text goes with --output, --input with --output-dir")
    if args.control is not None:
        if args.prompt_text is not None:
            raise UserError("--control does not go with --prompt-text: the prompt sets voice and style")
        if not with_description(args.control, ""):
            raise UserError("--control must not be empty")
    style = args.control or ""
    if args.text is not None:
        if not args.text.strip():
            raise UserError("--text must not be empty")
        return {pathlib.Path(args.output): with_description(style, args.text)}
    if args.stream:
        raise UserError("--stream goes with --text, not with --input")
    try:
        lines = pathlib.Path(args.input).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input={args.input}: {error}") from None
    directory = pathlib.Path(args.output_dir)
    texts = {directory / f"{number:04d}.wav": line for number, line in enumerate(lines, 1) if line.strip()}
    if not texts:
        raise UserError(f"--input={args.input}: contains no text; expected one text per line")
    return {path: with_description(style, line) for path, line in texts.items()}


def _speak(model, requests: dict[pathlib.Path, Request], shown: Callable[[pathlib.Path], str]) -> int:
    """Speaks every request into its file. One that the model has no room for is reported, and the others are still spoken."""
    from voxcpm2_jax.data import audio
    from voxcpm2_jax.inference import decode

    items = list(requests.items())
    code = DONE
    for start in range(0, len(items), _BATCH_LINES):
        batch = items[start : start + _BATCH_LINES]
        for (path, request), speech in zip(batch, model.speak([request for _, request in batch])):
            if speech.stopped_by == decode.NO_ROOM:
                print_error(f"{shown(path)} is not written: {decode.no_room(model.config)}")
                code = MISTAKE
                continue
            audio.save(path, speech.audio_A, model.sample_rate)
            print_result({
                "output": shown(path), "text": request.text, "sec": len(speech.audio_A) / model.sample_rate,
                "seed": speech.seed, "stopped_by": speech.stopped_by, "num_tries": speech.num_tries,
            })  # fmt: skip
    return code


def _stream(model, requests: dict[pathlib.Path, Request], shown: Callable[[pathlib.Path], str]) -> int:
    """Speaks one request into PATH.part, a name that a player can follow, renamed to PATH when it is complete."""
    import soundfile

    from voxcpm2_jax import files

    ((path, request),) = requests.items()
    begin, first_sec, num_samples = time.perf_counter(), None, 0
    with files.aside(path, name=f"{path.name}.part") as part:
        try:
            file = soundfile.SoundFile(part, "w", model.sample_rate, channels=1, subtype="PCM_16", format="WAV")
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path}: cannot be written ({error})") from None
        with file:
            for audio_A in model.generate_streaming(**vars(request)):
                first_sec = time.perf_counter() - begin if first_sec is None else first_sec
                file.write(audio_A)
                file.flush()
                num_samples += len(audio_A)
    sec = num_samples / model.sample_rate
    print_result({"output": shown(path), "text": request.text, "sec": sec, "first_audio_sec": first_sec})
    return DONE
