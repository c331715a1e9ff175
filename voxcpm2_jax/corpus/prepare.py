"""`voxcpm2-jax prepare`: recordings to shards that can be trained on.

    OUTPUT/making.json                       what the shards are made from; a run with other sources or settings is refused
    OUTPUT/demo, debian                      the recordings of an embedded corpus
    OUTPUT/codec, tokenizer                  copies of the codec and the tokenizer that are used
    OUTPUT/shard-00003-of-00040.*            one shard and its part file (shard.py)
    OUTPUT/lengths.npy, header.json, ...     written when all shards are complete (header.py)
    OUTPUT/heldout                           shards of the held-out clips, in the same layout

A run that was stopped continues with the missing shards. Several hosts share the work without communicating: host i of n
makes shards i, i + n, ..., and a host that finds all shards complete writes the header. A second process that would make
some of the same shards is refused (claim.py). Recordings that cannot be used are
skipped, counted by reason in the header and listed in skipped.jsonl.

Memory holds half an hour of audio and 24 bytes per recording, whatever the size of the corpus; while the header is written,
100 bytes per recording, and to choose pairs 150 more and at most 1 GB of embeddings.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time

import numpy as np

from voxcpm2_jax import files, workdir
from voxcpm2_jax.buckets import stage
from voxcpm2_jax.config.corpus import DataConfig
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.corpus import debian, demo, header, manifest, shard, sources, speaker, trim
from voxcpm2_jax.corpus.claim import claim
from voxcpm2_jax.corpus.encode import ClipEncoder, text_fault
from voxcpm2_jax.data.identity import IDENTITY, Known
from voxcpm2_jax.data.shards import Header
from voxcpm2_jax.data.tokenizer import Tokenizer, balanced, load_tokenizer, train_tokenizer

MAKING_FILE = "making.json"
HELDOUT = "heldout"  # directory of the held-out shards, inside that of the others


def prepare(config: DataConfig, output: str | os.PathLike, vae: str | os.PathLike | None, *, strict: bool = False) -> dict:
    """Calls `make_shards` with the codec of checkpoint `vae`; returns a summary of the shards.

    Without a codec it only makes the recordings and manifests of an embedded corpus, which a codec can be trained on.

    Raises:
        UserError: as make_shards, or a manifest without a codec.
    """
    if vae is None:
        if config.source == "manifest":
            raise UserError("prepare needs a codec: --vae=CKPT (a workdir of train-vae, or a released directory)")
        _make_recordings(config, output)
        clips, heldout_clips = (sum(map(len, corpora)) for corpora in _recordings_in(output))
        return {"output": str(output), "clips": clips, "heldout_clips": heldout_clips}
    vae_config, vae_params = workdir.load_codec(vae)
    start = time.monotonic()
    made = make_shards(config, output, vae_params, vae_config, strict=strict)
    if made is None:
        left = "other hosts still have shards to make; the last one writes the header"
        return {"output": str(output), "host": config.host, "num_hosts": config.num_hosts, "left": left}
    return {
        "output": str(output),
        "clips": made.num_clips,
        "hours": round(made.hours, 4),
        "skipped": made.skipped,
        **({"clips_with_pairs": made.pairs["clips"], "order_unknown": made.pairs["order_unknown"]} if made.pairs else {}),
        "vocab_size": made.vocab_size,
        "latent_std": [round(min(made.latent_std), 4), round(max(made.latent_std), 4)],
        "wall_sec": round(time.monotonic() - start, 1),
    }


def make_shards(
    config: DataConfig, output: str | os.PathLike, vae_params, vae_config: AudioVAEConfig, *, strict: bool = False
) -> Header | None:  # fmt: skip
    """Makes this host's shards in `output`, and in its directory heldout if there are held-out clips.

    Args:
        strict: faulty lines of a manifest are refused; otherwise they are left out, counted and listed.
    Returns:
        The header; None if other hosts still have shards to make.
    Raises:
        UserError: the output holds something else, a manifest is wrong, or no recording can be used.
    """
    output = pathlib.Path(output)
    was_there = output.exists()
    if was_there and not output.is_dir():
        raise UserError(f"{output}: not a directory")
    # Names that begin with a dot are what another host is writing now, or what a killed one left.
    found = {name for name in os.listdir(output) if not name.startswith(".")} if was_there else set()
    if MAKING_FILE not in found and found - {config.source}:
        raise UserError(f"{output}: already there; choose a directory that is absent or empty")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error})") from None
    try:
        with claim(output, config.host, config.num_hosts) as check:
            try:
                return _make_shards(config, output, vae_params, vae_config, check, strict)
            except UserError:
                check()  # what another process has taken over is not removed
                if not found and config.num_hosts == 1 and not list(output.glob("**/*.array_record")):
                    for path in output.glob("[!.]*"):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                raise
    except UserError:
        if not was_there:
            with contextlib.suppress(OSError):  # of another process, or with shards in it
                output.rmdir()
        raise


def _make_shards(config: DataConfig, output: pathlib.Path, vae_params, vae_config, check, strict: bool) -> Header | None:
    """make_shards in a directory that this process has a claim on."""
    if config.source == "manifest":
        train, heldout = (sources.open_corpora(names, strict=strict) for names in (config.manifest, config.heldout))
    else:
        files.once(output / config.source, lambda temporary: _make_recordings(config, temporary / config.source))
        train, heldout = _recordings_in(output / config.source)
    if same := [corpus.name for corpus in heldout if corpus.sha256 in {corpus.sha256 for corpus in train}]:
        raise UserError(f"heldout {same[0]}: the same recordings as manifest; expected others, which are not trained on")
    codec_hash = workdir.codec_sha256(vae_params, vae_config)
    speaker_encoder = speaker.load_encoder(config.pairs.encoder) if config.pairs.encoder else None
    models = {"vad": trim.load_vad()} if config.trim == "vad" else {}
    models |= {"speaker": {"name": config.pairs.encoder, "sha256": speaker_encoder.sha256}} if speaker_encoder else {}
    # Before anything is written, because the settings of the vocabulary are often wrong.
    new_tokenizer = None if (output / "tokenizer").exists() else _tokenizer(config, train)
    _keep_making(output, _making(config, train, heldout, codec_hash, models))
    files.once(output / "codec", lambda temporary: workdir.save_codec(temporary, vae_config, vae_params))
    if new_tokenizer:
        new_tokenizer.rule = config.text_rule
        files.once(output / "tokenizer", lambda temporary: new_tokenizer.save(temporary / "tokenizer"))
    tokenizer = load_tokenizer(output / "tokenizer")
    tokenizer_hash = hashlib.sha256((output / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    made_by = header.Provenance(config, vae_config, codec_hash, tokenizer_hash, tokenizer.vocab_size, models)
    known = Known(np.array([r.identity for corpus in heldout for r in corpus], IDENTITY))
    sets = [(output / HELDOUT, heldout, None)] * bool(heldout) + [(output, train, known)]
    for directory, corpora, held_out in sets:
        encoder = ClipEncoder(config, vae_params, vae_config, tokenizer, speaker_encoder, held_out)
        shard.make_missing(directory, corpora, encoder, config, check)
    # Only after all of its own shards can a host know that it is the last.
    headers = [header.finish(directory, corpora, made_by) for directory, corpora, _ in sets]
    return None if None in headers else headers[-1]


# ---- what shards are made from ---------------------------------------------------------------------------------------


def _make_recordings(config: DataConfig, output: str | os.PathLike) -> None:
    """The recordings of an embedded corpus."""
    with files.fresh_directory(output) as temporary:
        if config.source == "demo":
            demo.make_demo(temporary, config.demo)
        else:
            debian.make_debian(temporary, config.debian)


def _recordings_in(directory: str | os.PathLike) -> list[list[sources.Corpus]]:
    """What _make_recordings wrote: the training corpora and the held-out ones."""
    paths = [pathlib.Path(directory) / name for name in (manifest.TRAIN, manifest.HELDOUT)]
    return [[sources.open_corpus(path)] if path.exists() else [] for path in paths]


def _making(config: DataConfig, train, heldout, codec_hash: str, models: dict) -> dict:
    """The content of making.json: everything that the shards depend on.

    They do not depend on which host makes them, where a manifest lies or the codec's batch size; pairs are chosen later.
    """
    without = ("host", "num_hosts", "manifest", "heldout", "encode_sec", "pairs")
    return {
        "config": {name: value for name, value in to_dict(config).items() if name not in without},
        "models": models,
        "codec_sha256": codec_hash,
        "sources_sha256": header.sources_sha256(train),
        "heldout_sha256": header.sources_sha256(heldout),
        "recordings": sum(map(len, train)),
    }


def _keep_making(output: pathlib.Path, making: dict) -> None:
    """Makes the output directory, or checks that the shards in it are made from the same."""
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
    changed = [f"{name}: {before!r:.80}, now {now!r:.80}" for name, before, now in fields if before != now]
    if changed:
        raise UserError(f"{output}: holds shards made from something else ({'; '.join(changed)}); choose another directory")


def _tokenizer(config: DataConfig, train) -> Tokenizer:
    """The tokenizer of the config, or a new one learned from the transcripts."""
    if config.tokenizer:
        return load_tokenizer(stage.local(config.tokenizer))
    from rich.console import Console

    def texts():
        usable = (r for corpus in train for r in corpus if not text_fault(r, config, None))
        return ((r.language or "unknown", config.text_rule.write(r.full_text)) for r in usable)

    with Console(stderr=True).status(f"learning a vocabulary of {config.vocab_size} pieces"):
        chosen = balanced(texts, temperature=config.vocab_temperature, max_chars=config.vocab_chars)
        return train_tokenizer(chosen, config.vocab_size)
