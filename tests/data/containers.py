"""Recordings in containers that lie about their length, as pipes, killed recorders and broken copies leave them."""

import io
import struct

import av
import numpy as np
import soundfile

HZ = 16000
SEC = 2.0
TIME_A = np.arange(int(SEC * HZ)) / HZ
SPEECH_A = (0.3 * np.sin(2 * np.pi * 440 * TIME_A) * np.sin(2 * np.pi * 1.5 * TIME_A)).astype(np.float32)
SPEECH_A += 0.01 * np.random.default_rng(0).standard_normal(len(SPEECH_A)).astype(np.float32)


def written(format: str, subtype: str | None = None, samples=SPEECH_A) -> bytearray:
    file = io.BytesIO()
    soundfile.write(file, samples, HZ, format=format, subtype=subtype)
    return bytearray(file.getvalue())


def encoded(format: str, codec: str, hz: int = HZ) -> bytearray:
    """Through PyAV."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(SPEECH_A[None], format="fltp", layout="mono")
        frame.sample_rate = HZ
        plain = av.AudioResampler(stream.format.name, "mono", hz)
        for block in (*plain.resample(frame), *plain.resample(None)):
            container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    return bytearray(file.getvalue())


def put(content: bytes, *patches: tuple[int, bytes]) -> bytearray:
    content = bytearray(content)
    for at, patch in patches:
        content[at : at + len(patch)] = patch
    return content


def wav(data: int, riff: int | None = None, tail: bytes = b"") -> bytearray:
    """With these sizes of its chunks."""
    content = written("WAV")
    riff = len(content) - 8 if riff is None else riff
    return put(content, (4, struct.pack("<I", riff)), (content.index(b"data") + 4, struct.pack("<I", data))) + tail


def flac(samples: int, content: bytes | None = None) -> bytearray:
    """With this number of samples in its header; 0: not stated."""
    content = content or written("FLAC")
    return put(content, (21, ((content[21] & 0xF0) << 32 | samples).to_bytes(5)))


def mp3(tag: bool = True) -> bytearray:
    content = written("MP3") if tag else encoded("mp3", "libmp3lame")
    if not tag:
        at = next(i for i in (content.find(b"Xing"), content.find(b"Info")) if i >= 0)
        content[at : at + 4] = bytes(4)
    return content


def sized(format: str, name: bytes, size: bytes) -> bytearray:
    """With this size of the chunk `name`."""
    content = written(format)
    return put(content, (content.index(name) + len(name), size))


LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.3.100\0\0"
FULL = 2 * len(SPEECH_A)

# Readable to the end of what was recorded, whatever the header says.
WHOLE = {
    "wav of a pipe, 0": lambda: wav(0, 0),
    "wav of a pipe, 0, RIFF's size right": lambda: wav(0),
    "wav of a pipe, 2^32 - 1": lambda: wav(0xFFFFFFFF, 0xFFFFFFFF),
    "wav of a pipe, 2^31 - 1": lambda: wav(0x7FFFFFFF, 0x7FFFFFFF),
    "wav of a pipe, tags at the end": lambda: wav(0xFFFFFFFF, 0xFFFFFFFF, LIST),
    "wav of a killed recorder": lambda: wav(FULL // 4),
    "wav with tags at the end": lambda: wav(FULL, tail=LIST),
    "wav with zeros at the end": lambda: wav(FULL, tail=bytes(5000)),
    "wav, RIFF's size 0": lambda: wav(FULL, 0),
    "au of a pipe": lambda: put(written("AU"), (8, b"\xff" * 4)),
    "caf of a pipe": lambda: sized("CAF", b"data", b"\xff" * 8),
    "aiff of a killed recorder": lambda: sized("AIFF", b"SSND", struct.pack(">I", 8008)),
    "rf64": lambda: written("RF64"),
    "w64": lambda: written("W64"),
    "sphere": lambda: written("NIST"),
    "flac without a length": lambda: flac(0),
    "flac with too small a length": lambda: flac(8000),
    "gsm in wav": lambda: written("WAV", "GSM610"),
    "adpcm in wav": lambda: written("WAV", "IMA_ADPCM"),
    "mu-law in wav": lambda: written("WAV", "ULAW"),
    "mp3 without a tag": lambda: mp3(tag=False),
    "ogg": lambda: written("OGG"),
    "m4a": lambda: encoded("ipod", "aac"),
    "m4a, alac": lambda: encoded("ipod", "alac"),
    "mp4": lambda: encoded("mp4", "aac"),
    "webm": lambda: encoded("webm", "libopus", 48000),
    "mka": lambda: encoded("matroska", "libopus", 48000),
    "aac": lambda: encoded("adts", "aac"),
    "opus": lambda: encoded("ogg", "libopus", 48000),
}


def _part(content: bytes, share: float = 0.3) -> bytearray:
    return bytearray(content[: int(share * len(content))])


# Shorter than they were: the file ends early.
CUT = {
    "wav": lambda: _part(written("WAV")),
    "wav, an odd byte": lambda: _part(written("WAV")) + b"\1",
    "wav, nothing left": lambda: written("WAV")[:44],
    "rf64": lambda: _part(written("RF64")),
    "w64": lambda: _part(written("W64")),
    "aiff": lambda: _part(written("AIFF")),
    "au": lambda: _part(written("AU")),
    "caf": lambda: _part(written("CAF")),
    "sphere": lambda: _part(written("NIST")),
    "gsm in wav": lambda: _part(written("WAV", "GSM610")),
    "flac": lambda: _part(written("FLAC"), 0.6),
    "flac with too large a length": lambda: flac(20 * HZ),
    "mp3": lambda: _part(mp3(), 0.6),
    "ogg": lambda: _part(written("OGG"), 0.9),
    "webm": lambda: _part(encoded("webm", "libopus", 48000), 0.6),
    "mka": lambda: _part(encoded("matroska", "libopus", 48000), 0.6),
}
