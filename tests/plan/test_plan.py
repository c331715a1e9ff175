"""`plan`: topologies are parsed, what does not fit gets a suggestion, and the train step compiles for TPU."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import voxcpm2_jax
from voxcpm2_jax.chips import CHIPS
from voxcpm2_jax.cli import main, outcome
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import SPEECH_BATCH, BackboneRun, StageConfig
from voxcpm2_jax.plan import compile, entry, roofline, topology
from voxcpm2_jax.plan.machine import Machine

DRY_RUN = [
    "train", "--config=configs/backbone.py:2b", "--config.batch.rows=512", "--workdir=x", "--dry-run",
    "--config.stages=({}, {'first_step': 5, 'rows_factor': 0.5, 'slots_factor': 2.0})",
]  # fmt: skip
RUN = BackboneRun(model=MODELS["2b"], batch=dataclasses.replace(SPEECH_BATCH, rows=256))
POD = Machine("v5e:16x16", CHIPS["v5e"], 1, (16, 16), 256)


# ---- topologies ------------------------------------------------------------------------------------------------------


def test_topologies_are_parsed():
    case = topology.parse("4xv6e:8x8,rows=512,mesh=4x64x1,accumulate=2", RUN)
    assert (case.machine.devices, case.machine.slices, case.machine.torus) == (256, 4, (8, 8))
    assert case.mesh == (4, 64, 1) and case.config.accumulate == 2 and case.config.batch.rows == 512
    case = topology.parse("v5p:8x8x8", RUN)
    assert case.machine.devices == 512 and case.machine.chip.name == "v5p" and case.config == RUN
    case = topology.parse("64xh100", RUN)
    assert (case.machine.devices, case.machine.slices, case.machine.torus) == (64, 8, None)


def test_rows_scale_the_stages_too():
    stages = (StageConfig(), StageConfig(first_step=5, rows_factor=0.5, slots_factor=2.0))
    run = topology.parse("v5e:16x16,rows=512", BackboneRun(model=MODELS["2b"], batch=RUN.batch, stages=stages)).config
    assert [(b.rows, b.slots, b.patches) for b in run.batches] == [(512, 4096, 2816), (256, 8192, 5632)]
    with pytest.raises(UserError, match=r"0\.5 times batch\.rows 1 is 0\.5; expected a whole number"):
        topology.with_rows(BackboneRun(model=MODELS["2b"], batch=RUN.batch, stages=stages), 1)


@pytest.mark.parametrize("text", ["v5e:16x16", "256", "4x64", "v5p:8x8x8,rows=1024", "64xh100,accumulate=4"])
def test_a_dry_run_accepts_what_every_stage_can_use(text, capsys):
    assert main.main([*DRY_RUN, f"--topology={text}"]) == outcome.DONE
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["rows"] / stages[0]["rows"] for stage in stages] == [1, 0.5] and stages[1]["slots"] == 8192


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v5p:8x8x8", "256 rows of 8192 slots cannot be split into 512 parts (replica x data x accumulate): change batch.rows"),
        ("96", "512 rows of 4096 slots cannot be split into 96 parts (replica x data x accumulate); 256 rows of 8192 slots"),
        ("4x64,mesh=2x128x1", "replica must be a multiple of the 4 slices"),
        ("64,mesh=1x8x1", "has 8 devices; 64 has 64"),
        ("v5e:16x16,products=fp8", "products 'fp8': v5e is not known to gain by them"),
        ("0", "expected TPU slices as"),
    ],
)
def test_a_dry_run_checks_every_stage(text, problem, capsys):
    assert main.main([*DRY_RUN, f"--topology={text}"]) == outcome.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and problem in err and err.count("\n") == 1


def test_only_the_largest_batch_of_a_ramp_is_planned():
    sizes = ((0, 0.25, 1), (5, 1, 1), (9, 0.5, 2))
    stages = tuple(StageConfig(first_step=s, rows_factor=b, slots_factor=t) for s, b, t in sizes)
    run = BackboneRun(model=MODELS["2b"], batch=RUN.batch, stages=stages)
    assert [batch.rows for batch in topology.parse("64xh100", run).batches] == [256, 128]
    assert [batch.rows for batch in topology.parse("128xh100", run).batches] == [64, 256, 128]  # 64 rows on 128 GPUs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:3x5", "no such TPU; TPU slices as .*v5e:1x1, 2x2, .* 16x16; .*COUNTxKIND with gb200, b200"),
        ("v9:2x2", "no such TPU"),
        ("v5litepod-8", "expected TPU slices as"),
        ("8xrtx9090", "expected TPU slices as"),
        ("0xh100", "expected TPU slices as"),
        ("12xh100", "expected a multiple of 8, the GPUs of a machine, got 12"),
        ("8xh100,rows=0", "batch: rows, slots and patches must be at least 1"),
        ("v5e:2x4,slots=3", "'slots=3' is none of rows=N"),
        ("v5e:2x4,rows=many", "expected a whole number, got 'many'"),
        ("v5e:2x4,mesh=2x4", "'mesh=2x4' is none of"),
    ],
)
def test_wrong_topologies_are_refused(text, message, capsys):
    assert main.main(["plan", "--config=configs/backbone.py:tiny", f"--topology={text}"]) == outcome.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(UserError, match=message):
        topology.parse(text, RUN)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(capsys, *argv):
    status = main.main(["plan", *argv])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]), err


def test_gpus_are_predicted(capsys, tmp_path):
    status, got, err = command(
        capsys, "--config=configs/backbone.py:2b", "--topology=64xh100", f"--output={tmp_path}/plan.json"
    )
    whole = json.loads((tmp_path / "plan.json").read_text())
    assert status == outcome.DONE and got["ok"] and whole["plans"][0]["passes"] and "64xh100" in err
    first = got["plans"][0]
    assert not first["compiled"] and first["fits"] and 0 < first["rule_of_thumb"]["mfu"] < first["bound"]["mfu"] < 1


def test_gpus_that_are_too_small_get_a_suggestion(capsys):
    status, got, err = command(capsys, "--config=configs/backbone.py:2b", "--topology=8xa100")
    assert status == outcome.NO and not got["ok"] and not got["plans"][0]["fits"]
    suggestion = got["plans"][0]["suggestion"]
    assert suggestion["topology"].startswith("8xa100,") and all(entry["fits"] for entry in suggestion["plans"])
    assert f"this fits: --topology={suggestion['topology']}" in err
    status, again, _ = command(capsys, "--config=configs/backbone.py:2b", f"--topology={suggestion['topology']}")
    assert status == outcome.DONE and again["plans"][0]["peak_bytes"] == suggestion["plans"][0]["peak_bytes"]


def test_a_search_shows_the_pareto_front(capsys):
    _, got, err = command(capsys, "--config=configs/backbone.py:2b", "--topology=64xh100", "--search")
    (found,) = got["searches"]
    front = [(e["rule_of_thumb"]["audio_hours_per_day"], e["peak_bytes"]) for e in found["front"]]
    assert len(front) >= 2 and "the fastest for each amount of memory" in err
    assert front == sorted(front, reverse=True) and [m for _, m in front] == sorted((m for _, m in front), reverse=True)


def test_without_libtpu_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'libtpu' else find(name, package)\n"
    )
    package = pathlib.Path(voxcpm2_jax.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(package)])}
    argv = [sys.executable, "-m", "voxcpm2_jax", "plan", "--config=configs/backbone.py:tiny", "--topology=v5e:2x4"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (outcome.MISTAKE, "", f"error: {compile.NO_LIBTPU}\n")


def test_a_libtpu_that_cannot_be_loaded_is_reported(monkeypatch, tmp_path, capsys):
    (tmp_path / "libtpu.py").write_text("raise ImportError('blocked')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)  # importing jax sets it
    assert main.main(["plan", "--config=configs/backbone.py:tiny", "--topology=v5e:2x4"]) == outcome.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and "error: v5e:2x4: libtpu cannot be loaded" in err and "Traceback" not in err


def test_suggestions_are_compiled_until_one_fits(capsys, monkeypatch):
    """With a fake compiler that needs 1.5 times the estimate."""
    asked = []

    def compile_for(case, batch, *, fast):
        needed = round(1.5 * sum(roofline.memory(case.config, batch, case.mesh).values()))
        asked.append((case.config.batch.rows, case.config.remat, case.config.accumulate, batch.slots, needed))
        if needed > 15.75 * 2**30:
            return {
                "fits": False,
                "compile_sec": 1.0,
                "needed_bytes": needed,
                "hbm_bytes": round(15.75 * 2**30),
                "message": "no",
            }
        memory = dict.fromkeys(("outputs", "aliased", "temporaries", "code", "peak"), 0) | {"arguments": needed}
        return {"fits": True, "compile_sec": 1.0, "memory": memory, "unknown_loops": 0, "collectives": []}

    monkeypatch.setattr(entry, "compile_for", compile_for)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: name)
    status, got, err = command(capsys, "--config=configs/backbone.py:2b", "--topology=v5e:16x16,rows=1024,remat=none")
    assert status == outcome.NO and not got["ok"]
    failed = [e for e in got["plans"] if not e["fits"]]
    assert failed and "the compiler needs" in failed[0]["problem"] and failed[0]["peak_bytes"] > failed[0]["hbm_bytes"]
    suggestion = failed[0]["suggestion"]
    assert all(e["fits"] and e["rows"] in (1024, 2048) for e in suggestion["plans"])  # the rows of every stage are kept
    assert asked[-1][-1] < 15.75 * 2**30 and f"this fits: --topology={suggestion['topology']}" in err


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Plans of the tiny run for v5e:2x4: as it is, and with too many rows for the memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VOXCPM2_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield plan_tiny()


def plan_tiny():
    run = from_dict(BackboneRun, load_config("configs/backbone.py:tiny"))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="bfloat16"))
    cases = [topology.parse(text, run) for text in ("v5e:2x4", "v5e:2x4,rows=16384")]
    return [entry.plan_entry(case, case.config.batch, fast=i > 0) for i, case in enumerate(cases)]


def test_the_train_step_compiles_for_tpu_with_these_collectives(compiled, tiny_params):
    planned, _ = compiled
    assert planned["compiled"] and planned["fits"] and planned["unknown_loops"] == 0 and planned["mesh"] == [1, 8, 1]
    assert 0 < planned["peak_bytes"] < 2**30
    params = sum(x.size for x in jax.tree.leaves(tiny_params))
    assert params * 4 / 8 <= planned["memory"]["parameters"] < 1.2 * params * 4 / 8  # split over eight, norms copied
    # FSDP gathers each of a layer's seven matrices once for the forward pass and once for the backward pass, in bfloat16.
    tslm = {p["pass"]: p["collectives"] for p in planned["passes"] if p["part"] == "tslm"}
    layers = MODELS["tiny"].tslm.num_layers
    matrices = 2 * layers * (32 * 8 * 4 + 2 * 32 * 8 * 2 + 4 * 8 * 32 + 3 * 32 * 64)
    for name in ("forward", "backward"):
        assert tslm[name]["all-gather"]["bytes"] == matrices
        assert 4 * layers <= tslm[name]["all-gather"]["times"] <= 7 * layers  # the compiler may join small ones
    assert set(tslm["forward"]) == {"all-gather"}
    gradients = [tslm["backward"].get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter")]
    assert 2 * matrices <= sum(gradients) < 2.05 * matrices  # of the matrices, and of the norms, in float32
    # Nothing gathers a whole batch, nor a whole stack of layers.
    assert all(t["bytes"] / t["times"] < 2**18 for t in planned["collectives"].values())


def test_the_compilers_clock_is_in_the_plan(compiled):
    planned, _ = compiled
    clock = planned["clock"]
    assert set(clock["parts"]) == {"tslm", "ralm", "locenc", "locdit", "rest"} and all(clock["parts"].values())
    assert sum(clock["parts"].values()) == pytest.approx(clock["step_sec"]) == pytest.approx(sum(clock["kinds"].values()))
    assert sum(one["sec"] for one in clock["passes"]) == pytest.approx(clock["step_sec"])
    assert planned["bound"]["step_sec"] < clock["step_sec"] < 1 and 0 < clock["mfu"] < planned["bound"]["mfu"]
    assert {"forward", "backward", "update"} <= {one["pass"] for one in clock["passes"]}
    lines = clock["lines"]
    assert len(lines) == 10 and lines == sorted(lines, key=lambda line: -line["sec"])
    assert any(line["place"].startswith(("transformer.py:", "product.py:", "voxcpm2.py:", "optim.py:")) for line in lines)


def test_what_does_not_fit_is_reported_with_the_compilers_message(compiled):
    _, planned = compiled
    assert not planned["fits"] and not planned["compiled"] and "RESOURCE_EXHAUSTED" in planned["compiler"]
    assert planned["peak_bytes"] > planned["hbm_bytes"] == int(15.75 * 2**30) and "of 15.75 GiB" in planned["problem"]
