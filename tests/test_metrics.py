"""Means, the healing of metrics.jsonl, what a row may hold, and FLOPs counted against the parameters themselves."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax import flops, metrics
from voxcpm2_jax.config.model import DiTConfig, LMConfig, LocalConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.models import transformer, voxcpm2
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.local import LocDiT, LocEnc
from voxcpm2_jax.sequence import Batch
from voxcpm2_jax.train.profiler import Profiler, profile_steps

TINY = ModelConfig(
    lm_config=LMConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3,
                       num_key_value_heads=2, vocab_size=200, kv_channels=8),
    residual_lm_num_layers=2,
    patch_size=4,
    feat_dim=6,
    scalar_quantization_latent_dim=10,
    encoder_config=LocalConfig(hidden_dim=16, ffn_dim=24, num_heads=2, num_layers=2, kv_channels=8),
    dit_config=DiTConfig(hidden_dim=20, ffn_dim=28, num_heads=2, num_layers=3, kv_channels=8),
)  # fmt: skip


def test_meter_divides_once_and_continues_exactly():
    steps = [{"loss": jnp.float32(0.1 * i), "stop": (jnp.float32(i), jnp.float32(2 * i)), "none": (jnp.float32(0),) * 2}
             for i in range(1, 7)]  # fmt: skip
    whole = metrics.Meter()
    for step in steps:
        whole.add(metrics.fetch(step))
    first = metrics.Meter()
    for step in steps[:3]:
        first.add(metrics.fetch(step))
    second = metrics.Meter(json.loads(json.dumps(first.state)))
    for step in steps[3:]:
        second.add(metrics.fetch(step))
    assert second.means() == whole.means()
    assert whole.means() == {"loss": pytest.approx(0.35), "stop": 0.5, "none": None}


def test_tables_become_figures_and_maxima_stay_maxima():
    def step(i):
        times = metrics.Table(jnp.float32([i, 2 * i]), jnp.float32([2, 0]), ("early", "late"))
        largest = metrics.Table(jnp.float32([-i, 5 - i]), jnp.float32([1, 1]), ("tslm", "ralm"))
        return {"loss/time/": times, "activation_max/": largest}

    meter = metrics.Meter()
    for i in (1, 2, 3):
        values = metrics.fetch(jax.jit(step)(i))
        meter.add(dict.fromkeys(values, (0.0, 0.0)))  # what is counted of an update that was skipped
        meter.add(values)
        meter = metrics.Meter(json.loads(json.dumps(meter.state)))
    meter.add(dict.fromkeys(values, (0.0, 0.0)))
    means = {"loss/time/early": 1.0, "loss/time/late": None, "activation_max/tslm": -1.0, "activation_max/ralm": 4.0}
    assert meter.means() == means
    of_both = metrics.fetch(metrics.combine(jax.tree.map(lambda *x: jnp.stack(x), step(1), step(2))))
    assert of_both == {
        "loss/time/early": (3.0, 4.0), "loss/time/late": (6.0, 0.0),
        "activation_max/tslm": (-1.0, 1.0), "activation_max/ralm": (4.0, 1.0),
    }  # fmt: skip


def test_patches_count_for_their_own_groups_alone():
    time_BM = jnp.float32([[0.05, 0.999, 1.0, 0.05]])
    label_BM = jnp.int32([[0, 1, 1, -1]])
    pair_BM = (jnp.float32([[1, 2, 4, 0]]), jnp.float32([[1, 1, 1, 0]]))
    modes = (("books", "zero-shot", 2.0), ("films", "described reference", 1.0), ("films", "prompt", 0.0))
    labels = metrics.name_labels([(dataset, "en", mode) for dataset, mode, _ in modes], [weight for *_, weight in modes])
    assert "mode/prompt" not in labels.names, "it never bears loss"
    found = metrics.fetch({
        "loss/time/": metrics.by_time(pair_BM, time_BM), "loss/": metrics.by_label(pair_BM, label_BM, labels)
    })  # fmt: skip
    assert {name: pair for name, pair in found.items() if pair[1]} == {
        "loss/time/0.0-0.1": (1, 1), "loss/time/0.9-1.0": (6, 2),
        "loss/dataset/books": (1, 1), "loss/dataset/films": (6, 2), "loss/language/en": (7, 3),
        "loss/mode/zero-shot": (1, 1), "loss/mode/described-reference": (6, 2),
    }  # fmt: skip


def test_only_the_largest_groups_have_names():
    labels = [(f"d{i}", "en", "prompt") for i in range(40)]
    named = metrics.name_labels(labels, weights=list(range(40)))
    datasets = {name for name in named.names if name.startswith("dataset/")}
    assert datasets == {f"dataset/d{i}" for i in range(8, 40)} | {"dataset/other"}
    assert [named.names[member[0]] for member in named.members[6:9]] == ["dataset/other"] * 2 + ["dataset/d8"]


def test_usage_and_entropy_of_levels():
    """Of two dims one uses two of three levels evenly, one a single level; what is no audio does not count."""
    level_BTQ = jnp.int32([[[-1, 0], [1, 0], [0, 1]]])
    found = metrics.fsq_figures(metrics.count_levels(level_BTQ, jnp.array([[True, True, False]]), 1))
    assert float(found["fsq_usage"]) == pytest.approx((2 + 1) / 6) and float(found["fsq_entropy"]) == pytest.approx(0.5)


@pytest.mark.parametrize("last", [3, 10])
def test_profiler_traces_whole_updates(tmp_path, last):
    """Also of a run that ends before the trace does."""
    update = jax.jit(lambda x: x @ x)
    running = None
    with Profiler((2, 4), tmp_path / "profile") as profiler:
        for step in range(last):
            profiler.at(step, running)
            assert (tmp_path / "profile").exists() == (step >= 4)  # written when the trace ends
            running = update(jnp.ones((8, 8)))
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0


def test_steps_to_profile_are_two_numbers():
    assert profile_steps("100:103") == (100, 103)
    for text in ("100", "3:3", "a:b", "-1:2", ""):
        with pytest.raises(UserError, match=f"--profile-steps={text}: expected A:B"):
            profile_steps(text)


def test_writer_writes_rows_and_tensorboard(tmp_path, capsys):
    with metrics.Writer(tmp_path, start_step=0, num_steps=10) as writer:
        writer.write(3, {"loss": np.float32(0.5), "mfu": None, "val_loss": float("nan")})
        sound = metrics.Audio(np.zeros(4800, np.float32), 48000)
        picture = metrics.Image(np.zeros((4, 5, 3), np.uint8))
        writer.write(6, {"loss": 0.25, "slowest_host": "n7", "heard": sound, "seen": picture})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "loss": 0.5, "mfu": None, "val_loss": None}, {"step": 6, "loss": 0.25, "slowest_host": "n7"}]  # fmt: skip
    assert writer.last_row == {"step": 6, "loss": 0.25, "slowest_host": "n7"}
    out = capsys.readouterr()
    assert out.out == "" and "step 6/10  loss 0.25" in out.err  # standard output is the command's
    (file,) = (tmp_path / "tensorboard").iterdir()
    for tag in (b"loss", b"heard", b"seen"):
        assert tag in file.read_bytes()
    assert b"slowest_host" not in file.read_bytes()  # text is no curve


def test_writer_closes_the_file_after_every_row(tmp_path):
    """A bucket that is mounted through a cache gets a file when it is closed; a preempted run never closes it at its end."""
    with metrics.Writer(tmp_path, start_step=0, num_steps=10) as writer:
        writer.write(1, {"loss": 2.0})
        open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert str(tmp_path / "metrics.jsonl") not in open_files
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}


def test_writer_continues_after_a_resume_and_works_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with metrics.Writer(tmp_path, start_step=0, num_steps=10) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    with metrics.Writer(tmp_path, start_step=2, num_steps=10) as writer:
        assert writer.last_row == {"step": 2, "loss": 1.0}
        writer.write(3, {"loss": 2.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 2.0}]
    assert not (tmp_path / "tensorboard").exists()


def test_flops_count_every_kernel_as_often_as_it_is_used():
    """All products but attention's are 2 * size of the kernel * rows it is applied to."""
    slots, patches, targets = 100, 60, 40
    rows = {
        "base_lm": slots, "residual_lm": slots, "fusion_concat_proj": slots, "fsq_layer": patches, "enc_to_lm_proj": patches,
        "lm_to_dit_proj": targets, "res_to_dit_proj": targets, "stop_proj": targets, "stop_head": targets,
        "feat_encoder/layers": 5 * patches, "feat_encoder/in_proj": 4 * patches,
        "feat_decoder/layers": 11 * targets, "feat_decoder/in_proj": 4 * targets, "feat_decoder/cond_proj": 4 * targets,
        "feat_decoder/out_proj": 4 * targets, "feat_decoder/time_mlp": targets, "feat_decoder/delta_time_mlp": targets,
    }  # fmt: skip
    shapes = jax.eval_shape(lambda: voxcpm2.init(jax.random.key(0), TINY))
    products = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            (part,) = [part for part in rows if name.startswith(part + "/")]
            products += 2 * leaf.size * rows[part]
    parts = flops.forward_flops(TINY, slots=slots, patches=patches, targets=targets, squares=0)
    # `squares=0` leaves the diagonal of causal attention and the local stacks' whole attention: 4 * L * N * H * pairs.
    attention = 4 * (32 * 5 * slots / 2 + 16 * 2 * patches * 25 + 16 * 3 * targets * 121)
    assert sum(parts.values()) == products + attention
    assert flops.train_flops(TINY, slots=slots, patches=patches, targets=targets, squares=0) == 3 * sum(parts.values())


def test_flops_agree_with_xla_of_an_unrolled_model(monkeypatch):
    """Part by part, and forward with backward; XLA also counts norms, softmax and the like, some 0.5 % here.

    XLA multiplies the whole T x T of causal attention, so it is compared with all pairs: useful are (squares + slots) / 2.
    """
    model = ModelConfig(
        lm_config=LMConfig(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_hidden_layers=2,
                           num_key_value_heads=2, vocab_size=200, kv_channels=64),
        residual_lm_num_layers=2,
        residual_lm_no_rope=True,
        scalar_quantization_latent_dim=128,
        encoder_config=LocalConfig(hidden_dim=384, ffn_dim=1536, num_heads=6, num_layers=2, kv_channels=64),
        dit_config=DiTConfig(hidden_dim=384, ffn_dim=1536, num_heads=6, num_layers=3, kv_channels=64),
    )  # fmt: skip
    scan = transformer.nn.scan
    monkeypatch.setattr(transformer.nn, "scan", lambda block, **form: scan(block, unroll=form["length"], **form))
    B, T, M, P, C, D, local = 2, 192, 120, 4, 64, 512, 384
    float32, bfloat16 = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    integer = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    params = jax.eval_shape(lambda: voxcpm2.init(jax.random.key(0), model))

    def counted(f, *args) -> float:
        return jax.jit(f).lower(*args).cost_analysis()["flops"]

    def part(module, name, *args) -> float:
        return counted(lambda params, *args: module.apply({"params": params}, *args), params[name], *args)

    useful = flops.forward_flops(model, slots=B * T, patches=B * M, targets=B * M, squares=B * T * (2 * T - 1))
    x_BTD, position_BT, mask_BTS = bfloat16((B, T, D)), integer((B, T)), jax.ShapeDtypeStruct((B, T, T), bool)
    patches_RPC, time_R = float32((B * M, P, C)), float32((B * M,))
    found = {
        "tslm": part(voxcpm2.TextSemanticLM(model, Compute("none")), "base_lm", x_BTD, position_BT, mask_BTS),
        "ralm": part(
            voxcpm2.ResidualAcousticLM(model, Compute("none")), "residual_lm", x_BTD, position_BT, mask_BTS
        ),
        "locenc": part(LocEnc(model.locenc, Compute("none")), "feat_encoder", bfloat16((B * M, P, C))),
        "locdit": part(
            LocDiT(model.locdit, Compute("none")), "feat_decoder",
            patches_RPC, bfloat16((B * M, 2, local)), patches_RPC, time_R, time_R,
        ),
    }  # fmt: skip
    assert found == {name: pytest.approx(useful[name], rel=0.015) for name in found}

    row_BM = integer((B, M))
    batch = Batch(integer((B, T)), integer((B, T)), position_BT, float32((B, M, P, C)), row_BM, row_BM, row_BM)
    draws = voxcpm2.Draws(float32((B, M)), float32((B, M, P, C)), jax.ShapeDtypeStruct((B, M), bool))

    def losses(params, batch, draws):
        terms = voxcpm2.loss_terms(params, model, batch, draws, compute=Compute(remat="none"))
        return jnp.sum(terms["diff_BMP"]) + jnp.sum(terms["stop_BM"])

    assert counted(losses, params, batch, draws) == pytest.approx(sum(useful.values()), rel=0.015)
    assert counted(jax.value_and_grad(losses), params, batch, draws) == pytest.approx(3 * sum(useful.values()), rel=0.015)


def test_flops_of_the_released_shape():
    """6 * (slots * 1.71 G + patches * 16 * 0.2076 G) and attention: 188 TFLOP for 8,192 slots and 5,248 patches."""
    released = ModelConfig(
        lm_config=LMConfig(kv_channels=128, use_mup=False),
        residual_lm_no_rope=True,
        encoder_config=LocalConfig(num_layers=12, kv_channels=128),
        dit_config=DiTConfig(num_layers=12, kv_channels=128),
    )
    assert flops.train_flops(released, slots=8192, patches=5248, targets=5248, squares=0) == pytest.approx(188e12, rel=0.02)
    short, long = (flops.train_flops(released, slots=8192, patches=0, targets=0, squares=8192 * n) for n in (64, 8192))
    assert long - short == 3 * 4 * 36 * 2048 * 8192 * (8192 - 64) / 2


@pytest.mark.parametrize(
    ("kind", "tera"),
    [("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918),
     ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989.4), ("NVIDIA A100-SXM4-40GB", 312),
     ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA B200", 2250)],
)  # fmt: skip
def test_peak_of_known_chips(kind, tera):
    assert flops.peak_flops(kind) == tera * 1e12


def test_mfu_is_unknown_on_a_cpu():
    assert flops.peak_flops("cpu") is None and flops.mfu(1e12, 1.0) is None


def test_tensorboard_imports_no_pytorch():
    code = "import sys; from voxcpm2_jax import metrics; metrics._summary_writer(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
