"""What the containers of recordings say about their length, and what is there.

Headers lie: a pipe cannot go back to write a length, a recorder that was killed wrote an old one, a copy breaks off. A decoder
that believes them returns nothing, or the half of a recording, without a word. `look` compares the header with the bytes:

    container                        what the header states        what is there
    WAV, RF64, W64, AIFF, CAF, AU    bytes of the data chunk       bytes up to the end of the file, or to the next chunk
    NIST SPHERE                      samples                       bytes after the header
    FLAC                             samples (0: not stated)       number of the last frame in the file
    MP3                              frames of a Xing or Info tag  frames, counted where the tag does not fit the file
    Ogg (Vorbis, Opus)               nothing; the last page bears a mark

Where the two differ, `Mended` shows the file to a decoder as if its header were right.
"""

import io
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_UNKNOWN_FROM = 0x7FFF0000  # a 32-bit length from here on that does not fit the file means that the writer did not know it
_TAIL = 1 << 18  # bytes; a FLAC frame or an Ogg page ends within it


class Length(NamedTuple):
    """The length of a recording, in units of its container (bytes, samples or frames; ratios are what counts).

    Attributes:
        said: what the header states; None: nothing.   there: what the file has; None: not known before it is decoded.
        is_cut: the file ends before its end.   patches: (offset, bytes) that make the header right.
        front: bytes to put before the file, for containers without a header that states a length.   skip: bytes of the file
            that `front` replaces.
    """

    said: int | None = None
    there: int | None = None
    is_cut: bool = False
    patches: tuple[tuple[int, bytes], ...] = ()
    front: bytes = b""
    skip: int = 0


def look(file: BinaryIO) -> Length:
    """The length of an open recording, from its header and its last bytes. Leaves the position anywhere."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", b"riff", b".snd"):
        return _of_chunks(file, head, size)
    if head[:4] == b"fLaC":
        return _of_flac(file, size)
    if head[:4] == b"OggS":
        return _of_ogg(file, size)
    if head[:7] == b"NIST_1A":
        return _of_sphere(file, size)
    if head[:3] == b"ID3" or (len(head) > 3 and _mp3_frame(head[:4])):
        return _of_mp3(file, size)
    return Length()


class Mended(io.RawIOBase):
    """A file as it would be if its header were right: some bytes before it, some replaced."""

    def __init__(self, file: BinaryIO, length: Length):
        super().__init__()
        self._file, self._length, self._at = file, length, 0
        self._shift = len(length.front) - length.skip
        self._size = self._shift + file.seek(0, io.SEEK_END)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        """Short only at the end: decoders take less for it."""
        content = bytearray(self._length.front[self._at :][: len(buffer)])
        missing, start = len(buffer) - len(content), max(self._at - self._shift, self._length.skip)
        if missing:
            self._file.seek(start)
            found = bytearray(self._file.read(missing))
            for offset, patch in self._length.patches:
                for i in range(max(offset, start), min(offset + len(patch), start + len(found))):
                    found[i - start] = patch[i - offset]
            content += found
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


# ---- containers of chunks ----------------------------------------------------------------------------------------------


class _Chunks(NamedTuple):
    """How a family of containers writes its chunks: an id, the size of what follows, the content."""

    start: int  # of the first chunk
    id_bytes: int
    size: str  # struct format
    counts_header: bool
    align: int
    audio: bytes  # id of the chunk with the samples
    skip: int = 0  # bytes in it before the samples


_W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_FAMILIES = {
    b"RIFF": _Chunks(12, 4, "<I", False, 2, b"data"),
    b"RF64": _Chunks(12, 4, "<I", False, 2, b"data"),
    b"RIFX": _Chunks(12, 4, ">I", False, 2, b"data"),
    b"FORM": _Chunks(12, 4, ">I", False, 2, b"SSND", 8),
    b"caff": _Chunks(8, 4, ">q", False, 1, b"data", 4),
    b"riff": _Chunks(40, 16, "<q", True, 8, _W64_DATA),
}


def _of_chunks(file: BinaryIO, head: bytes, size: int) -> Length:
    if head[:4] == b".snd":
        if len(head) < 24:
            return Length()
        begin, said = struct.unpack(">II", head[4:12])
        return _compare(
            said, max(0, size - begin), is_unknown=said >= _UNKNOWN_FROM, patch=lambda there: (8, struct.pack(">I", there))
        )
    family = _FAMILIES[head[:4]]
    wide = None  # the length in RF64's chunk ds64
    begin = None
    for name, at, stated in _walk(file, family, family.start, size):
        if name == b"ds64":
            file.seek(at)
            wide = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))[1]
        if name == family.audio:
            begin, said = at, stated
            break
    if begin is None:
        return Length()
    size_at = begin - struct.calcsize(family.size)
    if wide is not None and said == 0xFFFFFFFF:
        return _compare(wide, size - begin, patch=lambda there: (36 - 8, struct.pack("<Q", there)))
    is_unknown = said <= 0 or (said > size - begin and said >= _UNKNOWN_FROM)
    there = size - begin
    rest = begin + said + -said % family.align  # where the next chunk should begin
    if 0 <= said < there and (rest >= size or _is_tail(file, family, rest, size)):
        there = said  # other chunks follow, as they may
    elif is_unknown:
        there -= _bytes_of_tags(file, size)

    def patch(there: int) -> tuple[int, bytes]:
        return size_at, struct.pack(family.size, there + family.counts_header * (begin - size_at + family.id_bytes))

    return _compare(max(0, said - family.skip), max(0, there - family.skip), is_unknown, lambda n: patch(n + family.skip))


def _walk(file: BinaryIO, family: _Chunks, at: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """(id, begin of the content, its stated size) of the chunks from `at` on."""
    header = family.id_bytes + struct.calcsize(family.size)
    while at + header <= size:
        file.seek(at)
        content = file.read(header)
        (stated,) = struct.unpack(family.size, content[family.id_bytes :])
        stated -= header * family.counts_header
        yield content[: family.id_bytes], at + header, stated
        at += header + max(0, stated) + -stated % family.align


def _is_tail(file: BinaryIO, family: _Chunks, at: int, size: int) -> bool:
    """Whether chunks, or zeros that fill up the file, begin at `at`; if not, samples do."""
    file.seek(at)
    content = file.read(1 << 16)
    if not any(content) or family.id_bytes > 4:
        return True
    name, _, stated = next(_walk(file, family, at, size), (b"", 0, 0))
    return bool(re.fullmatch(rb"[\w .]{3}[\w .\0]", name)) and 0 <= stated <= size - at


def _bytes_of_tags(file: BinaryIO, size: int) -> int:
    """The bytes of a LIST chunk that ends a file whose data chunk has no length."""
    file.seek(max(0, size - 4096))
    tail = file.read()
    at = tail.rfind(b"LIST")
    if at < 0 or at + 12 > len(tail) or tail[at + 8 : at + 12] != b"INFO":
        return 0
    (stated,) = struct.unpack("<I", tail[at + 4 : at + 8])
    return len(tail) - at if at + 8 + stated + stated % 2 == len(tail) else 0


def _compare(said: int, there: int, is_unknown: bool = False, patch=None) -> Length:
    patches = (patch(there),) if patch and said != there else ()
    return Length(None if is_unknown else said, there, not is_unknown and said > there, patches)


def _of_sphere(file: BinaryIO, size: int) -> Length:
    file.seek(0)
    header = file.read(1024)
    fields = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d+)", header)}
    names = (b"sample_count", b"channel_count", b"sample_n_bytes")
    begin = re.match(rb"NIST_1A\n\s*(\d+)", header)
    if begin is None or not all(name in fields for name in names) or b"shorten" in header:
        return Length()
    return _compare(fields[names[0]] * fields[names[1]] * fields[names[2]], max(0, size - int(begin[1])))


# ---- FLAC and Ogg ------------------------------------------------------------------------------------------------------


def _of_flac(file: BinaryIO, size: int) -> Length:
    """The total stands in 36 bits at byte 21. A frame states its number, or that of its first sample, and its block size."""
    file.seek(0)
    head = file.read(42)
    if len(head) < 42:
        return Length()
    total = int.from_bytes(head[21:26]) & (2**36 - 1)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    end = len(tail)
    while (end := tail.rfind(b"\xff", 0, end)) >= 0:
        if there := _flac_frame_end(tail[end : end + 16], int.from_bytes(head[10:12])):
            patch = (21, ((head[21] & 0xF0) << 32 | there).to_bytes(5))
            return Length(total or None, there, total > there, (patch,) if total != there else ())
    return Length(total or None, 0 if total else None, bool(total))  # no frame at all


_FLAC_BLOCKS = {1: 192} | {i: 576 << (i - 2) for i in range(2, 6)} | {i: 256 << (i - 8) for i in range(8, 16)}


def _flac_frame_end(head: bytes, block: int) -> int:
    """The number of the last sample + 1 of the FLAC frame that begins so; 0 if none does. `block`: samples of a full frame."""
    if (
        len(head) < 6
        or head[1] not in (0xF8, 0xF9)
        or head[2] >> 4 == 0
        or head[2] & 15 == 15
        or head[3] & 1
        or head[3] >> 4 > 10
    ):
        return 0
    ones = next(i for i in range(9) if not (head[4] << i) & 0x80)  # UTF-8, up to 7 bytes
    at = 4 + max(1, ones)
    if ones in (1, 8) or len(head) < at + 5:
        return 0
    number = head[4] & (0xFF >> (ones + 1) if ones < 7 else 0)
    for byte in head[5:at]:
        if byte >> 6 != 2:
            return 0
        number = number << 6 | byte & 63
    code, rate = head[2] >> 4, head[2] & 15
    if code in (6, 7):
        samples = int.from_bytes(head[at : at + code - 5]) + 1
        at += code - 5
    else:
        samples = _FLAC_BLOCKS[code]
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    crc = 0
    for byte in head[:at]:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1) ^ (0x107 if crc & 0x80 else 0)
    if at >= len(head) or crc != head[at]:
        return 0
    return number + samples if head[1] & 1 else number * block + samples


def _of_ogg(file: BinaryIO, size: int) -> Length:
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    at = tail.rfind(b"OggS")
    page = tail[at:]
    is_whole = len(page) >= 27 and len(page) >= 27 + page[26] and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])
    return Length(is_cut=at < 0 or not is_whole or not page[5] & 4)  # bit 2: the last page of the stream


# ---- MP3 ---------------------------------------------------------------------------------------------------------------

_KBITS = {  # bit rates by MPEG version and layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_KBITS[2, 3] = _KBITS[2, 2]


def _mp3_frame(head: bytes) -> tuple[int, int] | None:
    """(bytes, samples) of the MPEG audio frame that begins so; None if none does."""
    if head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, kbits, rate = (head[1] >> 3) & 3, 4 - ((head[1] >> 1) & 3), head[2] >> 4, (head[2] >> 2) & 3
    if version == 1 or layer == 4 or kbits in (0, 15) or rate == 3:
        return None
    hz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    samples = 384 if layer == 1 else 1152 if layer == 2 or version == 3 else 576
    bits = _KBITS[1 if version == 3 else 2, layer][kbits - 1] * 1000
    unit = 4 if layer == 1 else 1
    return (samples * bits // (8 * hz * unit) + ((head[2] >> 1) & 1)) * unit, samples


def _of_mp3(file: BinaryIO, size: int) -> Length:
    """In samples. Without a tag, decoders guess the length from the first frame's bit rate and stop there: one is added."""
    begin = 0
    while True:
        file.seek(begin)
        head = file.read(1 << 16)
        if head[:3] != b"ID3" or len(head) < 10:
            break
        begin += 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    for at in (match.start() for match in re.finditer(b"\xff", head)):
        frame = _mp3_frame(head[at : at + 4].ljust(4, b"\0"))
        if frame and (begin + at + frame[0] >= size or _mp3_frame(head[at + frame[0] :][:4].ljust(4, b"\0"))):
            break
    else:
        return Length()
    first, (length, samples), head = begin + at, frame, head[at:]
    sides = (32, 17) if samples == 1152 else (17, 9)
    mark = 4 + sides[head[3] >> 6 == 3]  # the tag stands after what describes the channels; one for mono
    said, has_tag = None, head[mark : mark + 4] in (b"Xing", b"Info")
    if has_tag and head[mark + 7] & 1:
        said, num_bytes = struct.unpack(">II", head[mark + 8 : mark + 16])
        if head[mark + 7] & 2 and abs(num_bytes - (size - first)) <= 2048:
            return Length(said * samples, said * samples)  # the tag fits the file
    count = _count_mp3_frames(file, first + length * has_tag, size)
    if said is not None:
        patches = ((first + mark + 8, count.to_bytes(4)),) if abs(said - count) > 1 else ()
        return Length(said * samples, count * samples, said > count + 1, patches)
    if head[1] & 6 != 2 or length < mark + 12:  # not layer 3, or no room for a tag
        return Length(None, count * samples)
    tag = b"Xing" + (1).to_bytes(4) + count.to_bytes(4)
    front = head[:4] + bytes(mark - 4) + tag + bytes(length - mark - len(tag))
    return Length(None, count * samples, front=front, skip=first)


def _count_mp3_frames(file: BinaryIO, at: int, size: int) -> int:
    """The whole frames from `at` on; what is none of them is stepped over, up to 4 kB of it."""
    count, begin, content, sizes = 0, at, b"", {}
    while at + 4 <= size:
        if at + 4096 > begin + len(content) < size:
            file.seek(at)
            begin, content = at, file.read(1 << 20)
        head = content[at - begin : at - begin + 4]
        if head[:3] not in sizes:
            sizes[head[:3]] = _mp3_frame(head)
        if frame := sizes[head[:3]]:
            at += frame[0]
            count += at <= size
        else:
            nearby = content.find(b"\xff", at - begin + 1, at - begin + 4096)
            if head[:3] == b"TAG" or nearby < 0:
                break
            at = begin + nearby
    return count
