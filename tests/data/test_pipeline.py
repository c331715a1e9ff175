import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BatchConfig
from voxcpm2_jax.data import pipeline, synthetic
from voxcpm2_jax.data.clips import LENGTHS, Clip, lay_out_draw
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import (
    LENGTHS_FILE,
    PAIRS_FILE,
    Header,
    Shards,
    crc32,
    from_record,
    read_header,
    to_record,
    write_header,
    write_shard,
)

HEADER = Header(
    num_clips=0, hours=1.0, patch_size=2, latent_dim=3, patch_sec=0.16, encoder_hz=16000, decoder_hz=48000, codec_sha256="c",
    tokenizer_sha256="t", vocab_size=300, groups=(("d", "unknown"),),
    latent_dtype="float16", latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3,
    latent_min=(-1.0,) * 3, latent_max=(1.0,) * 3, shards=(), trim_db=0.0, trim_keep_ms=40.0, sources=("demo",),
    sources_sha256="s", skipped={"silent": 2}, versions={"jax": "1"},
)  # fmt: skip


def some_clips(count, seed=0):
    rng = np.random.default_rng(seed)

    def patches(m):
        return rng.standard_normal((m, 2, 3)).astype(np.float16).astype(np.float32)

    return [
        Clip(
            rng.integers(105, 300, rng.integers(1, 8)).astype(np.int32),
            patches(rng.integers(1, 12)),
            patches(3) if i % 3 == 0 else None,
            rng.integers(105, 300, 9).astype(np.int32) if i % 2 else None,
            i % 7 == 1,
            text=f"line {i}\nmore",
            description="ä voice" if i % 2 else None,
            dataset="d",
            speaker=str(i),
        )
        for i in range(count)
    ]


def write(directory, clips, **changes):
    directory.mkdir(exist_ok=True)
    num_shards = -(-len(clips) // 7)
    names = tuple(f"shard-{i:05d}-of-{num_shards:05d}.array_record" for i in range(num_shards))
    for i, name in enumerate(names):
        assert write_shard(directory / name, clips[7 * i : 7 * i + 7], "float16") == len(clips[7 * i : 7 * i + 7])
    lengths = [
        (
            len(c.text_ids),
            len(c.patches_MPC),
            *(0 if x is None else len(x) for x in (c.reference_MPC,)),
            c.is_prompt,
            0 if c.described_ids is None else len(c.described_ids),
            0,
        )
        for c in clips
    ]
    np.save(directory / LENGTHS_FILE, np.array(lengths, LENGTHS))
    write_header(directory, dataclasses.replace(HEADER, num_clips=len(clips), shards=names, **changes))
    return directory


@pytest.fixture(scope="module")
def clips():
    return some_clips(30)


@pytest.fixture(scope="module")
def shards(clips, tmp_path_factory):
    return Shards(write(tmp_path_factory.mktemp("shards"), clips))


def same(a: Clip, b: Clip):
    for x, y in zip(a, b):
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        else:
            assert x == y


@pytest.mark.parametrize("dtype, error", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_record_round_trip(dtype, error):
    clip = some_clips(1, seed=5)[0]
    clip = clip._replace(patches_MPC=clip.patches_MPC + np.float32(1e-4))
    back = from_record(to_record(clip, dtype))
    np.testing.assert_allclose(back.patches_MPC, clip.patches_MPC, rtol=error, atol=1e-7)
    same(back._replace(patches_MPC=None, reference_MPC=None), clip._replace(patches_MPC=None, reference_MPC=None))


def test_shards_give_every_clip_back_by_index(shards, clips):
    assert len(shards) == len(clips) and len(shards.header.shards) == 5
    assert shards.header.shards[0] == "shard-00000-of-00005.array_record"
    for i in (29, 0, 13, 6, 7):
        same(shards[i], clips[i])
    assert shards.patch_shape == (2, 3) and shards.patch_sec == 0.16 and shards.vocab_size == 300
    assert shards.header.skipped == {"silent": 2}


def test_several_directories_are_one_corpus(tmp_path, clips):
    write(tmp_path / "a", clips[:13])
    groups = (("other", "fr"), ("d", "unknown"))
    write(tmp_path / "b", clips[13:], groups=groups, pairs={"encoder": "some"})
    np.save(tmp_path / "b" / PAIRS_FILE, np.array([[1, 2], *[[-1, -1]] * 16], np.int32))
    both = Shards(f"{tmp_path}/a,{tmp_path}/b")
    assert len(both) == len(clips) and both.header.num_clips == 30 and both.header.hours == 2.0
    for i in (0, 12, 13, 29):
        same(both[i], clips[i])
    assert both.index.groups == (("d", "unknown"), ("other", "fr"))
    assert both.index.lengths["group"].tolist() == [0] * 13 + [1] * 17
    assert both.index.pairs.shape == (30, 2) and both.index.pairs[13].tolist() == [14, 15] and both.index.pairs[0].max() == -1
    for field, value in (("codec_sha256", "x"), ("tokenizer_sha256", "y"), ("patch_sec", 0.08), ("encoder_hz", 8000)):
        write(tmp_path / "c", clips[:5], **{field: value})
        with pytest.raises(UserError, match=rf"a and .*c cannot be used together: {field} .* and {value!r}$"):
            Shards(f"{tmp_path}/a,{tmp_path}/c")


def test_shards_of_earlier_versions_are_read(tmp_path, clips, shards):
    """They have the lengths as the columns of an int32 matrix."""
    directory = write(tmp_path / "a", clips)
    matrix = np.array(np.load(directory / LENGTHS_FILE).tolist(), np.int32)
    np.save(directory / LENGTHS_FILE, matrix)
    assert matrix.shape == (30, 6)
    earlier = Shards(directory)
    np.testing.assert_array_equal(earlier.index.lengths, shards.index.lengths)
    same(earlier[29], clips[29])


def test_no_directory_counts_twice(shards, tmp_path):
    for names in (f"{shards.paths[0]},{shards.paths[0]}/", ",", ""):
        with pytest.raises(UserError, match="expected one or more directories, each once"):
            Shards(names)


def test_torn_files_are_named(tmp_path, clips):
    directory = write(tmp_path / "a", clips)
    whole = (directory / LENGTHS_FILE).read_bytes()
    (directory / LENGTHS_FILE).write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"lengths\.npy: cannot be read"):
        Shards(directory)
    (directory / LENGTHS_FILE).write_bytes(whole)
    shard = directory / read_header(directory).shards[1]
    whole = shard.read_bytes()
    for torn in (whole[:50], whole[: 2**16], whole[: len(whole) // 2]):
        shard.write_bytes(torn)
        with pytest.raises(UserError, match=r"shard-00001-of-00005\.array_record: incomplete or damaged \("):
            Shards(directory)


@pytest.mark.parametrize("where", [7, 9, 13])
def test_a_flipped_bit_in_a_shard_is_found_and_named(tmp_path, clips, where):
    """In the first, a middle and the last record of the second shard; the other clips of the shard are still read."""
    directory = write(tmp_path / "a", clips)
    shard = directory / read_header(directory).shards[1]
    data = bytearray(shard.read_bytes())
    data[data.index(f"line {where}".encode()) + 40] ^= 4
    shard.write_bytes(data)
    shards = Shards(directory)
    for i in range(7, 14):
        if i != where:
            same(shards[i], clips[i])
    with pytest.raises(
        UserError, match=rf"00001-of-00005\.array_record: clip {where - 7} \(number {where} of the corpus\) can"
    ):
        shards[where]


def test_shards_that_were_mixed_up_are_found(tmp_path, clips):
    directory = write(tmp_path / "a", clips)
    first, second = (directory / name for name in read_header(directory).shards[:2])
    aside = second.read_bytes()
    second.write_bytes(first.read_bytes())
    first.write_bytes(aside)
    with pytest.raises(UserError, match=r"shard-00000-of-00005\.array_record: clip 0 .* does not match lengths\.npy"):
        Shards(directory)[0]


@pytest.mark.parametrize("name", [LENGTHS_FILE, PAIRS_FILE])
def test_a_flipped_bit_in_an_index_is_found_and_named(tmp_path, clips, name):
    directory = write(tmp_path / "a", clips, pairs={"encoder": "some"})
    np.save(directory / PAIRS_FILE, np.full((30, 2), -1, np.int32))
    header = read_header(directory)
    sums = {name: crc32(directory / name) for name in (LENGTHS_FILE, PAIRS_FILE)}
    write_header(directory, dataclasses.replace(header, crc32=sums))
    Shards(directory)
    data = bytearray((directory / name).read_bytes())
    data[-4] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: altered since it was made \(CRC-32\)"):
        Shards(directory)


def test_a_full_disk_is_the_disks_fault(tmp_path, clips, monkeypatch):
    """array_record reports it as a RuntimeError, which becomes an OSError; a RuntimeError of the codec stays one."""
    from array_record.python import array_record_module

    def full(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(array_record_module.ArrayRecordWriter, "write", full, raising=True)
    with pytest.raises(OSError, match="No space left on device"):
        write_shard(tmp_path / "a", clips, "float16")

    def broken():
        raise RuntimeError("the codec")
        yield

    with pytest.raises(RuntimeError, match="the codec"):
        write_shard(tmp_path / "a", broken(), "float16")


def plan_of(source, num_rows=4):
    return Mix(3, source.index, source.patch_sec, BatchConfig(rows=num_rows, slots=32, patches=20))


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_any_start_step_gives_the_same_batches(shards):
    plan = plan_of(shards)
    expected = list(itertools.islice(pipeline.batches(shards, plan), 6))
    assert not equal(expected[0], expected[1])
    for start, prefetch in ((0, 1), (1, 4), (5, 2)):
        got = list(itertools.islice(pipeline.batches(shards, plan_of(shards), start, prefetch=prefetch), 6 - start))
        assert all(equal(a, b) for a, b in zip(got, expected[start:], strict=True))
    assert equal(pipeline.host_rows(shards, plan_of(shards), 5), expected[5])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_number_of_hosts_changes_nothing(shards, hosts):
    plan = plan_of(shards, num_rows=8)

    def part_of(host):
        return lambda num_rows: range(host * num_rows // hosts, (host + 1) * num_rows // hosts)

    parts = [pipeline.batches(shards, plan_of(shards, num_rows=8), 2, rows_of=part_of(i)) for i in range(hosts)]
    for step in (2, 3):
        joined = jax.tree.map(lambda *rows: np.concatenate(rows), *[next(part) for part in parts])
        assert equal(joined, pipeline.host_rows(shards, plan, step))


class Counted:
    """Shards that note which clips are read."""

    def __init__(self, shards):
        self.index, self.patch_shape, self.patch_sec, self._shards = shards.index, shards.patch_shape, shards.patch_sec, shards
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return self._shards[i]


def test_a_host_reads_the_clips_of_its_rows_alone(shards):
    plan, counted = plan_of(shards, num_rows=8), Counted(shards)
    for step in (0, 3):
        for host in range(4):
            counted.read.clear()
            batch = pipeline.host_rows(counted, plan, step, [host, host + 4])
            assert counted.read == [draw.clip for row in plan.rows(step)[host::4] for draw in row]
            assert len(batch.tokens_BT) == 2


def test_every_clip_reaches_a_batch_whole(shards, clips):
    plan = plan_of(shards, num_rows=1)
    seen = set()
    for batch, step in zip(pipeline.batches(shards, plan), range(1000)):
        (row,) = plan.rows(step)
        for segment, draw in enumerate(row, 1):
            tokens_T = batch.tokens_BT[0][batch.segment_BT[0] == segment]
            sequence = lay_out_draw(clips, draw)
            np.testing.assert_array_equal(tokens_T, sequence.tokens_T)
            slots = np.flatnonzero(batch.segment_BT[0] == segment)
            here = np.flatnonzero(np.isin(batch.slot_BM[0], slots))
            here = here[np.argsort(batch.slot_BM[0][here])]
            np.testing.assert_array_equal(batch.patches_BMPC[0][here], sequence.patches_MPC)
            np.testing.assert_array_equal(batch.slot_BM[0][here] - slots[0], sequence.slot_M)
            np.testing.assert_array_equal(batch.target_BM[0][here], sequence.target_M)
            np.testing.assert_array_equal(batch.stop_BM[0][here], sequence.stop_M)
        seen |= {draw.clip for draw in row}
        if len(seen) == len(clips):
            break
    assert len(seen) == len(clips)


def test_the_synthetic_corpus_goes_the_same_way():
    source = synthetic.Synthetic(0, num_clips=20, vocab_size=200, patch_shape=(2, 3))
    plan = Mix(0, source.index, source.patch_sec, BatchConfig(rows=2, slots=128, patches=96))
    batch = next(pipeline.batches(source, plan, 3))
    assert batch.patches_BMPC.shape == (2, 96, 2, 3) and batch.stop_BM.sum() == sum(map(len, plan.rows(3)))


def test_shards_refuse(tmp_path, clips):
    with pytest.raises(UserError, match="no shards here"):
        Shards(tmp_path)
    for std in ((0.1, 0.2, 0.1), (1.0, 1.0, 5.1), (3.1, 3.1, 3.1)):
        with pytest.raises(UserError, match=r"the latents' standard deviation is .* expected 0.3 to 3.0 and at most 5.0"):
            Shards(write(tmp_path / "scale", clips, latent_std=std))
    assert Shards(write(tmp_path / "scale", clips, latent_std=(1.0, 0.1, 1.0))).dead_channels == [1]
    directory = write(tmp_path / "a", clips)
    (directory / "shard-00002-of-00005.array_record").rename(directory / "elsewhere")
    with pytest.raises(UserError, match=r"shard-00002-of-00005\.array_record missing"):
        Shards(directory)
    directory = write(tmp_path / "b", clips)
    write_header(directory, dataclasses.replace(read_header(directory), num_clips=31))
    with pytest.raises(UserError, match=r"31 clips in header.json, 30 in lengths.npy"):
        Shards(directory)
    header = json.loads((directory / "header.json").read_text())
    (directory / "header.json").write_text(json.dumps(header | {"new": 1}))
    with pytest.raises(UserError, match="new: unknown key"):
        Shards(directory)
    (directory / "header.json").write_text(json.dumps({k: v for k, v in header.items() if k != "groups"}))
    with pytest.raises(UserError, match="no groups; Header needs it"):
        Shards(directory)
    (directory / "header.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Shards(directory)
