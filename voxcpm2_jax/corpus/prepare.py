"""Recordings to shards: load, trim, pad, codec latents, text ids, provenance.

    manifest -> load at the codec's rate -> trim -> pad right to whole patches -> codec -> records -> shards
             -> text normalised -> tokenizer -> ids of text and of "(description)text"

    OUTPUT/making.json                       what the shards are made from: another run must agree, or is refused
    OUTPUT/shard-00003-of-00040.array_record records of recordings 3 S .. 4 S - 1, in order
    OUTPUT/shard-00003-of-00040.npz          written when the shard is whole: what header and index need of it
    OUTPUT/header.json, lengths.npy          written when all shards are whole (pipeline.py)
    OUTPUT/pairs.npy                         likewise, if references are to be chosen (data/speaker.py)

A shard follows from its recordings alone. So a run that was stopped goes on with the shards that are missing, and many
hosts share the work without a word between them: host i of n makes shards i, i + n, ..; whoever finds all of them
whole writes the header. Recordings that are of no use are left out, counted by reason in the header and listed in
skipped.jsonl. Memory holds half an hour of audio and 24 bytes a recording, whatever the size of the corpus; while pairs
are chosen, at most 1 GB of embeddings and 150 bytes a recording.
"""

import json
import os
import pathlib
import shutil
import time

from voxcpm2_jax import files, workdir
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.corpus import debian, demo, manifest, sources, speaker, vad
from voxcpm2_jax.corpus.shard import Maker, sources_sha256
from voxcpm2_jax.data.shards import Header
from voxcpm2_jax.data.text import normal_text
from voxcpm2_jax.data.tokenizer import Tokenizer, balanced, load_tokenizer, train_tokenizer
from voxcpm2_jax.files import once

MAKING_FILE = "making.json"
HELDOUT = "heldout"  # directory of the shards that are not trained on, inside the others


def prepare(config: DataConfig, output: str | os.PathLike, vae: str | os.PathLike | None) -> dict:
    """What `voxcpm2-jax prepare` does: `make_shards` with the codec of checkpoint `vae`; the result sums the shards up.

    Without a codec an embedded corpus is made and nothing else: recordings and manifests that a codec can be trained on.

    Raises:
        UserError: as make_shards, or recordings of one's own without a codec.
    """
    if vae is None:
        if config.source == "manifest":
            raise UserError("prepare needs a codec: --vae=CKPT (a workdir of train-vae, or a released directory)")
        _make_recordings(config, output)
        clips, heldout_clips = (sum(map(len, corpora)) for corpora in _recordings_in(output))
        return {"output": str(output), "clips": clips, "heldout_clips": heldout_clips}
    vae_config, vae_params = workdir.load_codec(vae)
    start = time.monotonic()
    header = make_shards(config, output, vae_params, vae_config)
    if header is None:
        left = "some shards are other hosts' to make; whoever comes last writes the header"
        return {"output": str(output), "host": config.host, "num_hosts": config.num_hosts, "left": left}
    return {
        "output": str(output),
        "clips": header.num_clips,
        "hours": round(header.hours, 4),
        "skipped": header.skipped,
        **({"clips_with_pairs": header.pairs["clips"]} if header.pairs else {}),
        "vocab_size": header.vocab_size,
        "latent_std": [round(min(header.latent_std), 4), round(max(header.latent_std), 4)],
        "wall_sec": round(time.monotonic() - start, 1),
    }


def _make_recordings(config: DataConfig, output: str | os.PathLike) -> None:
    with files.fresh_directory(output) as aside:
        if config.source == "demo":
            demo.make_demo(aside, config.demo)
        else:
            debian.make_debian(aside, config.debian)


def _recordings_in(directory: str | os.PathLike) -> list[list[sources.Corpus]]:
    """What _make_recordings left: to train on, and held out."""
    paths = [pathlib.Path(directory) / name for name in (manifest.TRAIN, manifest.HELDOUT)]
    return [[sources.open_corpus(path)] if path.exists() else [] for path in paths]


def make_shards(config: DataConfig, output: str | os.PathLike, vae_params, vae_config: AudioVAEConfig) -> Header | None:
    """Makes this host's shards of `output`, and of `heldout` in it if there are held-out clips.

    An embedded corpus stays in output/demo or output/debian; copies of codec and tokenizer lie beside it.

    Returns:
        The header; None if other hosts have shards to make.
    Raises:
        UserError: the output holds something else, a manifest is wrong, or no recording is of use.
    """
    output = pathlib.Path(output)
    was_there = output.exists()
    if was_there and not output.is_dir():
        raise UserError(f"{output}: not a directory")
    # Names with a dot in front are what another host makes at the moment, or what a killed one left.
    found = {name for name in os.listdir(output) if not name.startswith(".")} if was_there else set()
    if MAKING_FILE not in found and found - {config.source}:
        raise UserError(f"{output}: already there; choose a directory that is absent or empty")
    try:
        if config.source == "manifest":
            train, heldout = sources.open_corpora(config.manifest), sources.open_corpora(config.heldout)
        else:
            once(output / config.source, lambda aside: _make_recordings(config, aside / config.source))
            train, heldout = _recordings_in(output / config.source)
        codec_hash = workdir.codec_sha256(vae_params, vae_config)
        encoder = speaker.load_encoder(config.pairs.encoder) if config.pairs.encoder else None
        models = {"vad": vad.load_vad()} if config.trim == "vad" else {}
        models |= {"speaker": {"name": config.pairs.encoder, "sha256": encoder.sha256}} if encoder else {}
        # Before anything is written: the vocabulary is where mistakes are made.
        tokenizer = None if (output / "tokenizer").exists() else _tokenizer(config, train)
        _claim(output, _making(config, train, heldout, codec_hash, models))
        once(output / "codec", lambda aside: workdir.save_codec(aside, vae_config, vae_params))
        if tokenizer:
            once(output / "tokenizer", lambda aside: tokenizer.save(aside / "tokenizer"))
        maker = Maker(config, output, vae_params, vae_config, codec_hash, encoder, models)
        sets = [(output / HELDOUT, heldout)] * bool(heldout) + [(output, train)]
        for directory, manifests in sets:
            maker.make_parts(directory, manifests)
        # Only now, when nothing is left to this host, can the last host know that it is the last.
        headers = [maker.finish(directory, manifests) for directory, manifests in sets]
        return None if None in headers else headers[-1]
    except UserError:
        if not found and config.num_hosts == 1 and output.exists() and not list(output.glob("**/*.array_record")):
            for path in output.glob("[!.]*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not was_there:
                output.rmdir()
        raise


def _making(config: DataConfig, train, heldout, codec_hash: str, models: dict) -> dict:
    """What the shards are made from. Who makes which of them does not matter, where the manifest lies and how many go
    through the codec at once, nor what is chosen when all are whole."""
    indifferent = ("host", "num_hosts", "manifest", "heldout", "encode_sec", "pairs")
    return {
        "config": {name: value for name, value in to_dict(config).items() if name not in indifferent},
        "models": models,
        "codec_sha256": codec_hash,
        "sources_sha256": sources_sha256(train),
        "heldout_sha256": sources_sha256(heldout),
        "recordings": sum(map(len, train)),
    }


def _claim(output: pathlib.Path, making: dict) -> None:
    """Makes the output directory, or finds that the shards in it are made from the same."""
    file = output / MAKING_FILE
    text = json.dumps(making, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    if not file.exists():
        try:
            output.mkdir(parents=True, exist_ok=True)
            files.replace_file(file, text)
        except OSError as error:
            raise UserError(f"{output}: cannot be written ({error})") from None
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); choose another directory") from None
    fields = [(name, old["config"].get(name), making["config"].get(name)) for name in old["config"] | making["config"]]
    fields += [(name, old.get(name), making[name]) for name in making if name != "config"]
    changed = [f"{name}: {there!r:.80}, now {now!r:.80}" for name, there, now in fields if there != now]
    if changed:
        raise UserError(f"{output}: holds shards made from something else ({'; '.join(changed)}); choose another directory")


def _tokenizer(config: DataConfig, train) -> Tokenizer:
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    from rich.console import Console

    def texts():
        return ((r.language or "unknown", normal_text(r.full_text, config.sentence_case)) for m in train for r in m)

    with Console(stderr=True).status(f"learning a vocabulary of {config.vocab_size} pieces"):
        chosen = balanced(texts, temperature=config.vocab_temperature, max_chars=config.vocab_chars)
        return train_tokenizer(chosen, config.vocab_size)
