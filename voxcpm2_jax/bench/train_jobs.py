"""The measuring processes of `bench train`: one job each, answered line by line in JSON.

train.py starts `python -m voxcpm2_jax.bench.train_jobs`, writes the job and its config as the first line, and reads the
first answer. Each further line asks for a round, which is answered with its seconds. A job is a generator: it yields its
first answer when it is ready, and then one answer per round.
"""

import dataclasses
import gc
import json
import math
import os
import resource
import statistics
import sys
import time
from functools import partial

import numpy as np

from voxcpm2_jax.config.model import ModelConfig
from voxcpm2_jax.config.plain import UserError, from_dict
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.data import pipeline, synthetic
from voxcpm2_jax.data.clips import lay_out_draw
from voxcpm2_jax.data.mixing import Mix

_WARM_UPS = 2  # updates that are not timed
_CHECK_SLOTS, _CHECK_PATCHES = 256, 160  # of a row; a CPU needs a minute or two for the largest model

# Largest relative difference between two correct programs. In float32 the quantiser dominates it: a sum in another order can
# change one of its roundings. In bfloat16 the bound is measured, see `_check`.
_FLOAT32_BOUND = 1e-4
_BFLOAT16_STEP = 2.0**-8
_MARGIN = 2.0  # times the error of the CPU in the same dtype


def _serve() -> None:
    """Reads a job from standard input and answers on standard output."""
    # Libraries that print to standard output must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content) -> None:
        print(json.dumps(content), file=answers, flush=True)

    question = json.loads(sys.stdin.readline())
    config = from_dict(BackboneRun, question.pop("config"))
    try:
        job = _JOBS[question.pop("job")](config, **question)
        answer(next(job))
        for _ in sys.stdin:
            answer(next(job))
    except UserError as mistake:
        answer({"mistake": str(mistake)})
    except RuntimeError as error:  # the out-of-memory errors of jax and torch are RuntimeErrors
        if not ("RESOURCE_EXHAUSTED" in str(error) or type(error).__name__ == "OutOfMemoryError"):
            raise
        answer({"error": "out of memory"})


# ---- data ------------------------------------------------------------------------------------------------------------


def _make_data(config: BackboneRun):
    """-> batch of step 0, its clips in the order of the rows: noise with the lengths of speech.

    Lengths are log-normal with median 7 s and sigma 0.6, at most 30 s and at most what fits a row; one token for two patches.
    """
    model, batch = config.model, config.batch
    budget = min(batch.patches, batch.target_patches or batch.patches, (batch.slots - 2) * 2 // 3)
    longest = min(budget, round(30 / config.patch_sec))
    if longest < 2:
        raise UserError(f"batch: {batch.slots} slots and {batch.patches} patches hold no clip")
    source = synthetic.Synthetic(
        config.seed, num_clips=max(64, batch.rows * batch.slots // 40), vocab_size=model.lm_config.vocab_size,
        patch_shape=(model.patch_size, model.feat_dim), patch_sec=config.patch_sec,
        median_patches=7 / config.patch_sec, sigma=0.6, max_patches=longest,
    )  # fmt: skip
    mix = Mix(config.seed, source.index, source.patch_sec, batch)
    clips = [lay_out_draw(source, draw) for row in mix.rows(0) for draw in row]
    return pipeline.host_rows(source, mix, 0), clips


def _split_by_clip(batch, x_BM) -> list[np.ndarray]:
    """The values of each clip's patches in a packed batch: clips in the order of the rows, patches in the order of slots."""
    values = []
    for b, slot_M in enumerate(batch.slot_BM):
        segment_M = np.where(slot_M < 0, 0, batch.segment_BT[b, np.maximum(slot_M, 0)])
        for segment in range(1, batch.segment_BT[b].max() + 1):
            index_M = np.flatnonzero(segment_M == segment)
            values.append(np.asarray(x_BM)[b, index_M[np.argsort(slot_M[index_M])]])
    return values


def _useful_work(batch) -> dict[str, float]:
    """Counts of a batch, as `flops.forward_flops` takes them."""
    return {
        "slots": float(np.count_nonzero(batch.segment_BT)),
        "patches": float(np.count_nonzero(batch.slot_BM >= 0)),
        "targets": float(np.count_nonzero(batch.target_BM)),
        "squares": float(sum((np.bincount(row)[1:].astype(np.float64) ** 2).sum() for row in batch.segment_BT)),
    }


# ---- jobs ------------------------------------------------------------------------------------------------------------


def _machine(config: BackboneRun):
    import jax

    from voxcpm2_jax import sharding

    mesh = sharding.make_mesh(config.mesh)
    return {
        "device": mesh.devices.flat[0].device_kind, "devices": mesh.size, "platform": sharding.platform(mesh),
        "jax": jax.__version__, "cpu_cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


def _check(config: BackboneRun, *, against_reference: bool):
    """Compares loss and gradients of a small batch with float32 on the CPU -> "errors", and "failed": those too large.

    In bfloat16 the bound is twice the error that the CPU makes in bfloat16.
    """
    import jax

    from voxcpm2_jax import sharding
    from voxcpm2_jax.models import voxcpm2
    from voxcpm2_jax.models.compute import Compute
    from voxcpm2_jax.train import backbone

    machine = _machine(config)
    mesh = sharding.make_mesh(config.mesh)
    small = dataclasses.replace(
        config.batch, rows=mesh.shape["replica"] * mesh.shape["data"], slots=min(config.batch.slots, _CHECK_SLOTS),
        patches=min(config.batch.patches, _CHECK_PATCHES), target_patches=None,
    )  # fmt: skip
    config = dataclasses.replace(config, batch=small)
    batch, clips = _make_data(config)
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        raise UserError("the check needs the CPU, which JAX_PLATFORMS leaves out: append cpu to it") from None

    def gradients(model: ModelConfig, compute):
        """-> jitted: losses as (sum, count), and the gradient of their sum."""

        def loss(params, batch, draws):
            kwargs = {"time_BM": draws.time_BM, "noise_BMPC": draws.noise_BMPC, "drop_BM": draws.drop_BM}
            sums = voxcpm2.loss(params, model, batch, **kwargs, compute=compute)
            return sum(total / count for total, count in sums.values()), sums

        return jax.jit(jax.grad(loss, has_aux=True))

    on_cpu = dataclasses.replace(Compute.of(config), platform="cpu")
    with jax.default_device(cpu):
        draws = backbone.draw(jax.random.key(1), config, batch.patches_BMPC, 0.0)
        arguments = _params(config.model), batch, jax.device_get(draws)
        exact = dataclasses.replace(config.model, dtype="float32")
        truth = jax.device_get(gradients(exact, on_cpu)(*arguments))
        errors, failed = {}, []
        bounds = {"loss": _FLOAT32_BOUND, "gradient": _FLOAT32_BOUND}
        if config.model.dtype != "float32":
            own = _errors(jax.device_get(gradients(config.model, on_cpu)(*arguments)), truth)
            errors |= {f"cpu_{config.model.dtype}_{name}": value for name, value in own.items()}
            bounds = {name: _MARGIN * max(value, _BFLOAT16_STEP) for name, value in own.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(arguments[0], sharding.param_shardings(arguments[0], mesh))
        rows = (sharding.global_batch(part, mesh, small.rows) for part in arguments[1:])
        found = jax.device_get(gradients(config.model, Compute.of(config, mesh))(params, *rows))
    for name, value in _errors(found, truth).items():
        errors[name] = value
        if not value <= bounds[name]:
            failed.append(f"{name} differs by {value:.1e}, more than {bounds[name]:.1e}")
    del params, found
    gc.collect()
    if against_reference:
        losses = {name: float(total / count) for name, (total, count) in truth[1].items()}
        for name, value in _reference_losses(exact, arguments[0], batch, clips, draws).items():
            errors[f"reference_{name}"] = error = abs(losses[name] - value) / abs(value)
            if not error <= _FLOAT32_BOUND:
                failed.append(f"{name} loss {losses[name]:.6f}, the PyTorch package's {value:.6f}")
    yield machine | {"errors": errors, "failed": failed}


def _params(model: ModelConfig):
    """Random parameters. Not those of `init`, which sets some to zero and so would hide errors in what they multiply."""
    import jax

    from voxcpm2_jax.models import voxcpm2

    rng = np.random.default_rng(2)

    def one(path, leaf):
        *_, module, name = (key.key for key in path)
        shape = leaf.shape[1:] if any(key.key == "layers" for key in path) else leaf.shape
        if name == "kernel":
            deviation = math.prod(shape[:-1] if module == "o" else shape[:1]) ** -0.5  # one over the root of its inputs
        else:
            deviation = 1.0 if name == "embedding" else 0.1
        value = rng.standard_normal(leaf.shape, np.float32) * np.float32(deviation)
        return value + 1 if name == "scale" else value

    shapes = jax.eval_shape(lambda: voxcpm2.init(jax.random.key(0), model))
    return jax.tree_util.tree_map_with_path(one, shapes)


def _errors(found, truth) -> dict[str, float]:
    """Relative differences of the loss, and of the gradient in its L2 norm."""
    import jax

    off = total = 0.0
    for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(truth[0])):
        off += float(np.linalg.norm((x.astype(np.float64) - y).ravel()) ** 2)
        total += float(np.linalg.norm(y.astype(np.float64).ravel()) ** 2)
    loss, true_loss = (sum(float(total / count) for total, count in sums.values()) for _, sums in (found, truth))
    return {"loss": abs(loss - true_loss) / abs(true_loss), "gradient": (off / total) ** 0.5}


def _reference_losses(model: ModelConfig, params, batch, clips, draws) -> dict[str, float]:
    """The PyTorch package's two losses for our parameters and the same random draws, in float32 on the CPU."""
    from voxcpm2_jax.bench import reference

    theirs = reference.load(model, "cpu")
    import torch

    from voxcpm2_jax.torch_io import tables

    state = {}
    for row in tables.backbone_table(model):
        leaf = params
        for key in row.path.split("/"):
            leaf = leaf[key]
        state[row.name] = torch.from_numpy(np.array(row.to_torch(leaf if row.layer is None else leaf[row.layer])))
    theirs.load_state_dict(state)
    values = [reference.at_slots(clips, _split_by_clip(batch, x)) for x in (draws.time_BM, draws.noise_BMPC, draws.drop_BM)]
    with torch.no_grad(), reference.training_draws(*values):
        losses = reference.losses(theirs, reference.pad(clips))
    return {name: float(losses[f"loss/{name}"]) for name in ("diff", "stop")}


def _setup(config: BackboneRun, batch):
    """-> mesh; state and batch on its devices."""
    import jax

    from voxcpm2_jax import sharding
    from voxcpm2_jax.train import backbone

    mesh = sharding.make_mesh(config.mesh)
    row_shards = mesh.shape["replica"] * mesh.shape["data"]
    if config.batch.rows % (row_shards * config.accumulate):
        shares = f"{row_shards} devices x {config.accumulate} micro-batches"
        raise UserError(f"{config.batch.rows} rows cannot be split over {shares}")
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda x: x.sharding, backbone.abstract_state(config, mesh))
        state = jax.jit(backbone.initialiser(config), out_shardings=layout)()
        return mesh, state, sharding.global_batch(batch, mesh, config.batch.rows)


def _ours(config: BackboneRun):
    """Times whole updates; a round is one update on the same batch."""
    import jax

    from voxcpm2_jax import flops
    from voxcpm2_jax.train import backbone

    machine = _machine(config)
    batch, _ = _make_data(config)
    work = _useful_work(batch)
    figures = {
        "rows": config.batch.rows, "slots": config.batch.slots, "patches": config.batch.patches, "remat": config.remat,
        "audio_sec": work["patches"] * config.patch_sec, "slots_used": work["slots"] / batch.segment_BT.size,
        "flops": flops.train_flops(config.model, **work), "peak_flops": None,
    }  # fmt: skip
    if peak := flops.peak_flops(machine["device"]):
        figures["peak_flops"] = peak * machine["devices"]
    mesh, state, batch = _setup(config, batch)
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        program = backbone.jit_train_step(config, mesh).lower(state, batch).compile()
        figures["compile_sec"] = time.perf_counter() - begin
        planned = program.memory_analysis()
        figures["planned_bytes"] = (
            planned.argument_size_in_bytes + planned.output_size_in_bytes + planned.temp_size_in_bytes
            - planned.alias_size_in_bytes
        )  # fmt: skip

        def update():
            nonlocal state
            state, metrics = program(state, batch)
            jax.block_until_ready((state, metrics))
            return float(metrics["loss"])

        losses = [update() for _ in range(_WARM_UPS)]
        answer = figures | {"first_loss": losses[0]}
        while True:
            yield answer | {"peak_bytes": _peak_bytes(jax.local_devices()[0])}
            begin = time.perf_counter()
            last_loss = update()
            answer = {"sec": time.perf_counter() - begin, "last_loss": last_loss}


def _peak_bytes(device=None) -> int:
    """Peak memory of the device, or of the process if the device does not report it."""
    stats = device and device.memory_stats()
    return stats["peak_bytes_in_use"] if stats else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reference(config: BackboneRun, *, rows: int):
    """Times the PyTorch package; a round is one pass over all clips."""
    from voxcpm2_jax.bench.reference import Training

    batch, clips = _make_data(config)
    optim = {"learning_rate": config.optim.learning_rate, "weight_decay": config.optim.weight_decay}
    training = Training(config.model, clips, rows, **optim)
    answer = {
        "rows": rows, "device": training.device_name, "padding": training.padding,
        "audio_sec": _useful_work(batch)["patches"] * config.patch_sec,
    }  # fmt: skip
    training.epoch()
    while True:
        yield answer | {"peak_bytes": training.peak_bytes or _peak_bytes()}
        begin = time.perf_counter()
        training.epoch()
        answer = {"sec": time.perf_counter() - begin}


def _parts(config: BackboneRun, *, rounds: int):
    """Times forward and backward of each part by itself at the sizes of the batch, and the optimiser."""
    import jax
    import jax.numpy as jnp

    from voxcpm2_jax import flops, sharding
    from voxcpm2_jax.bench.parts import gradient, outside, parts_of
    from voxcpm2_jax.models.compute import Compute
    from voxcpm2_jax.train.state import apply_update

    machine = _machine(config)
    host_batch, _ = _make_data(config)
    mesh, state, batch = _setup(config, host_batch)
    useful = flops.forward_flops(config.model, **_useful_work(host_batch))
    peak = flops.peak_flops(machine["device"])
    found = []
    with jax.set_mesh(mesh):
        for name, part in parts_of(config, Compute.of(config, mesh)).items():
            x = jax.device_put(jnp.zeros(part.x.shape, part.x.dtype), sharding.batch_sharding(mesh))
            inputs = (state.params[part.module], x, outside(state.params), batch.segment_BT, batch.position_BT)
            sec = _time(jax.jit(gradient(part, config.model, config.products)), inputs, rounds)
            mfu = 3 * useful[name] / (sec * peak * machine["devices"]) if peak else None
            found.append({"part": name, "sec": sec, "useful_tflop": 3 * useful[name] / 1e12, "mfu": mfu})
        grads = jax.tree.map(jnp.ones_like, state.params)
        sec = _time(jax.jit(partial(apply_update, config.optim, config.num_steps)), (state, grads), rounds)
        found.append({"part": "optimiser", "sec": sec, "useful_tflop": 0.0, "mfu": None})
    yield {"parts": found}


def _time(program, arguments, rounds: int) -> float:
    """Median seconds of a jitted program."""
    import jax

    times = []
    for _ in range(_WARM_UPS + rounds):
        begin = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[_WARM_UPS:])


_JOBS = {"check": _check, "ours": _ours, "reference": _reference, "parts": _parts}

if __name__ == "__main__":
    _serve()
