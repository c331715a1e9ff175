"""`bench train`: both models get the same clips, errors are found before anything is timed, few packages are needed.

No speed is tested."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax import sharding
from voxcpm2_jax.bench import reference, train, train_jobs
from voxcpm2_jax.cli import main, outcome
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import SPEECH_BATCH, BackboneRun, BatchConfig
from voxcpm2_jax.models import voxcpm2

RUN = BackboneRun(model=MODELS["tiny"], batch=BatchConfig(rows=8, slots=128, patches=80))


def test_beside_the_reference(tmp_path, monkeypatch, capsys):
    """The whole command at the smallest scale, with every job in its own process."""
    # The children have one device and share compiled programs.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    argv = ["--model=tiny", "--slots=128", "--rows=1", "--steps=2", "--parts", "--against-reference", "--reference-rows=2"]
    assert main.main(["bench", "train", *argv]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    result = json.loads(line)
    (ours,), theirs = result["variants"], result["reference"]
    errors = result["check"]
    assert errors.keys() == {"loss", "gradient", "reference_diff", "reference_stop"} and max(errors.values()) < 1e-5

    assert (ours["rows"], ours["slots"], ours["remat"], theirs["rows"]) == (1, 128, "full", 2)
    assert ours["audio_sec"] == theirs["audio_sec"] > 0 and 0 < theirs["padding"] < 1
    for figures in (ours, theirs):
        assert len(figures["rounds_sec"]) == 2
        assert figures["step_sec_least"] <= figures["step_sec"] == np.median(figures["rounds_sec"]) <= figures["step_sec_most"]
        assert figures["audio_sec_per_sec"] == pytest.approx(figures["audio_sec"] / figures["step_sec"])
        assert figures["peak_bytes"] > 1e8
    assert ours["ratio"] == pytest.approx(np.median(np.array(theirs["rounds_sec"]) / ours["rounds_sec"]))
    assert ours["mfu"] is None and ours["compile_sec"] > 0 and ours["planned_bytes"] > 1e5
    assert ours["last_loss"] != ours["first_loss"] and np.isfinite(ours["last_loss"])
    assert [part["part"] for part in result["parts"]] == ["tslm", "ralm", "locenc", "locdit", "optimiser"]
    assert all(part["sec"] > 0 for part in result["parts"]) and result["device"] == "cpu" and result["devices"] == 1
    assert "optimiser" in err and "padding" in err and "Traceback" not in err


# ---- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "factor", "fails"),
    [("float32", 1.0, []), ("float32", 1.001, ["loss", "gradient"]), ("bfloat16", 1.001, []),
     ("bfloat16", 1.05, ["loss", "gradient"])],
)  # fmt: skip
def test_the_error_bound_depends_on_the_dtype(monkeypatch, dtype, factor, fails):
    """The model is replaced by a loss that a GPU multiplies by a factor."""

    def loss(params, config, batch, *, compute, **draws):
        assert (compute.max_segments, compute.remat, compute.remat_local) == (9, "full", "narrow"), "as in an update"
        value = jnp.sum(params["stop_head"]["kernel"].astype(config.dtype).astype(jnp.float32) ** 2)
        value *= factor if compute.platform == "gpu" else 1.0
        return {"diff": (value, jnp.float32(2.0)), "stop": (value, jnp.float32(3.0))}

    kernel = np.random.default_rng(0).standard_normal((32, 2)).astype(np.float32)
    monkeypatch.setattr(voxcpm2, "loss", loss)
    monkeypatch.setattr(train_jobs, "_params", lambda model: {"stop_head": {"kernel": kernel}})
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    run = dataclasses.replace(RUN, remat_local="narrow", batch=dataclasses.replace(RUN.batch, segments=9))
    config = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype=dtype))
    found = next(train_jobs._check(config, against_reference=False))
    assert [failure.split()[0] for failure in found["failed"]] == fails
    if dtype == "float32":
        assert found["errors"]["loss"] == pytest.approx(factor - 1, abs=1e-6)
    else:
        assert found["errors"]["cpu_bfloat16_gradient"] > 0


def test_nothing_is_timed_after_a_failure(monkeypatch, capsys):
    jobs = []

    class Job:
        def __init__(self, name, config, **options):
            jobs.append(name)
            assert config.batch.patches == SPEECH_BATCH.patches and config.batch.segments == 128, "as in configs/backbone.py:2b"
            self.first_answer = {
                "device": "a",
                "devices": 1,
                "jax": "1",
                "errors": {"loss": 0.5},
                "failed": ["loss is 0.5 off"],
            }

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(train, "_Job", Job)
    assert main.main(["bench", "train", "--model=tiny"]) == outcome.NO
    out, err = capsys.readouterr()
    assert out == "" and "error: loss is 0.5 off: nothing was timed" in err and jobs == ["check"]


def test_the_parent_leaves_the_devices_to_its_children():
    code = """if True:
        from jax._src import xla_bridge
        from voxcpm2_jax.bench import train
        from voxcpm2_jax.config.model import MODELS
        from voxcpm2_jax.config.run import BackboneRun, BatchConfig

        class Job:
            first_answer = {"device": "a", "devices": 1, "jax": "1", "errors": {}, "failed": ["loss differs"]}
            __init__ = __exit__ = lambda self, *_, **__: None
            __enter__ = lambda self: self

        train._Job = Job
        try:
            train.train(BackboneRun(model=MODELS["tiny"], batch=BatchConfig(slots=128, patches=80)))
        except train.Disagreement:
            assert not xla_bridge.backends_are_initialized()
            print("checked")
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout == "checked\n", done.stderr


# ---- data ------------------------------------------------------------------------------------------------------------


def test_both_get_the_same_clips():
    """The packed batch and the padded one hold the same patches."""
    batch, clips = train_jobs._make_data(RUN)
    work = train_jobs._useful_work(batch)
    assert work["patches"] == sum(clip.num_patches for clip in clips) and work["slots"] == sum(clip.num_slots for clip in clips)
    assert work["squares"] == sum(clip.num_slots**2 for clip in clips) and work["targets"] == work["patches"]
    padded = reference.pad(clips)
    values = train_jobs._split_by_clip(batch, batch.patches_BMPC)
    for clip, value in zip(clips, values, strict=True):
        np.testing.assert_array_equal(clip.patches_MPC, value)
    np.testing.assert_array_equal(reference.at_slots(clips, values), padded["audio_feats"].reshape(-1, 4, 16))
    assert padded["labels"].sum() == len(clips) and padded["text_mask"].sum() + padded["audio_mask"].sum() == work["slots"]


def test_clips_have_the_lengths_of_speech():
    batch, clips = train_jobs._make_data(BackboneRun(model=MODELS["2b"], batch=BatchConfig(rows=2)))
    sec = np.array([clip.num_patches * 0.16 for clip in clips])
    assert 5 < np.median(sec) < 9 and 20 < sec.max() <= 30 and np.count_nonzero(batch.segment_BT) > 0.9 * batch.segment_BT.size


# ---- processes -------------------------------------------------------------------------------------------------------


def serve(code: str, question) -> subprocess.CompletedProcess:
    program = f"from voxcpm2_jax.bench import train_jobs\n{code}\ntrain_jobs._serve()"
    return subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(question) + "\n", capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate')", {"error": "out of memory"}),
        ("raise train_jobs.UserError('two rows')", {"mistake": "two rows"}),
        ("raise RuntimeError('INTERNAL: something else')", None),
    ],
)
def test_errors_in_a_process(code, answer):
    """Out of memory and mistakes of the user are answers, other errors end the process; prints of libraries are no answers."""
    code = f"def job(config):\n    print('a library says hello')\n    {code}\n    yield\ntrain_jobs._JOBS['ours'] = job"
    done = serve(code, {"job": "ours", "config": to_dict(RUN)})
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == ([] if answer is None else [answer]) and "a library says hello" in done.stderr
    assert (done.returncode == 0) == (answer is not None)


def test_a_process_that_refuses_its_job_is_waited_for(monkeypatch):
    begun = []
    answer = 'import sys; sys.stdin.readline(); print(\'{"mistake": "two rows"}\', flush=True); sys.stdin.read()'

    def start(argv, popen=subprocess.Popen, **pipes):
        begun.append(popen([sys.executable, "-c", answer], **pipes))
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(UserError, match="two rows"):
        train._Job("ours", RUN)
    assert begun[0].returncode == 0 and begun[0].stdin.closed and begun[0].stdout.closed


def test_figures_of_what_ran_out_of_memory(capsys):
    variants = [{"rows": 8, "remat": "none", "error": "out of memory"}]
    train._add_ratios({"platform": "gpu", "variants": variants, "reference": {"audio_sec_per_sec": 1.0}})
    train.show({"variants": variants, "reference": {"rows": 16, "error": "out of memory"}})
    assert capsys.readouterr().err.count("out of memory") == 2


def test_it_needs_few_packages():
    """jax, flax, optax and their dependencies, no package that reads data or configs."""
    unwanted = ("ml_collections", "grain", "array_record", "librosa", "soundfile", "sentencepiece", "tokenizers", "safetensors",
                "tensorboardX", "tensorflow_datasets", "torch")  # fmt: skip
    code = f"import sys\nfor name in {unwanted}: sys.modules[name] = None\nfrom voxcpm2_jax.train import backbone"
    code += "\ntrain_jobs._JOBS['ours'] = lambda config: iter([train_jobs._useful_work(train_jobs._make_data(config)[0])])"
    done = serve(code, {"job": "ours", "config": to_dict(RUN)})
    assert done.returncode == 0 and json.loads(done.stdout)["patches"] > 0, done.stderr


def test_configs_need_ml_collections(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ml_collections" else find_spec(name))
    with pytest.raises(UserError, match="pip install ml-collections"):
        load_config("configs/backbone.py:tiny")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --config --model is required"),
        (["--model=3b"], "invalid choice: '3b'"),
        (["--model=tiny", "--config=configs/backbone.py:tiny"], "not allowed with"),
        (["--model=tiny", "--config.seed=1"], "--config.seed=1 goes with --config, not with --model"),
        (["--model=tiny", "--rows=a"], "--rows: expected whole numbers over 0"),
        (["--model=tiny", "--rows=0"], "--rows: expected whole numbers over 0"),
        (["--model=tiny", "--steps=0"], "expected at least one round"),
        (["--model=tiny", "--remat=some"], "remat must be"),
        (["--model=tiny", "--slots=1000"], "exceed model.max_length"),
    ],
)
def test_mistakes_get_one_line(capsys, argv, message):
    assert main.main(["bench", "train", *argv]) == outcome.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_rows_too_small_for_a_clip_or_too_few_for_the_mesh():
    with pytest.raises(UserError, match="hold no clip"):
        train_jobs._make_data(BackboneRun(model=MODELS["tiny"], batch=BatchConfig(rows=1, slots=4, patches=4)))
    run = BackboneRun(model=MODELS["tiny"], batch=BatchConfig(rows=3, slots=128, patches=80))
    assert sharding.make_mesh(run.mesh).shape["data"] == 8
    with pytest.raises(UserError, match="3 rows cannot be split over 8 devices"):
        train_jobs._setup(run, None)
