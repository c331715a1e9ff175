"""The mesh, the rule of every parameter, and that no mesh changes a loss or a gradient."""

import os
import re
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from voxcpm2_jax import optim, processes, sequence, sharding
from voxcpm2_jax.chips import CHIPS
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, BatchConfig, OptimConfig
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.train import backbone

TINY = MODELS["tiny"]


def shapes_of(config):
    return jax.eval_shape(lambda key: voxcpm2.init(key, config), jax.random.key(0))


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# ---- the processes of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
    """What `connect` asks of JAX, which is not done; a process that nothing surrounds."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **told: calls.append(told))
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM_PROC", "JAX_PROC", "SLURM_", "OMPI_", "TPU_", "KUBERNETES_")):
            monkeypatch.delenv(name)
    return calls


WAITS = {"heartbeat_timeout_seconds": processes.LOST_SEC, "shutdown_timeout_seconds": processes.LOST_SEC}


def test_a_process_by_itself_joins_nothing(joined):
    processes.connect()
    assert joined == []


def test_processes_that_are_told_join(joined, monkeypatch):
    for name, value in zip(processes._PROCESS_VARIABLES, ("host:1234", "4", "3")):
        monkeypatch.setenv(name, value)
    processes.connect()
    told = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}
    assert joined == [told | WAITS]


def test_on_a_cluster_that_jax_knows_it_is_told_nothing(joined, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "2")
    processes.connect()
    assert joined == [WAITS]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    processes.connect()
    assert len(joined) == 1


def test_an_address_alone_is_not_taken_for_one_process(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    with pytest.raises(UserError, match=r"cannot connect: of JAX_COORDINATOR_ADDRESS, .* only the first is set"):
        processes.connect()


def test_in_a_pod_that_may_not_ask_for_others(joined, monkeypatch):
    class ConfigException(Exception):  # noqa: N818
        pass

    def refuse():
        raise ConfigException("no token")

    kubernetes = types.ModuleType("kubernetes")
    kubernetes.config = types.SimpleNamespace(ConfigException=ConfigException, load_incluster_config=refuse)
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(UserError, match="cannot connect: no token; with JAX_NUM_PROCESSES=1 a process runs alone"):
        processes.connect()
    assert joined == []


@pytest.mark.parametrize("values", [("", "2", "0"), ("host:1", "two", "0"), ("host:1", "2", "2"), ("host:1", "2", "")])
def test_half_of_what_a_process_must_be_told(joined, monkeypatch, values):
    for name, value in zip(processes._PROCESS_VARIABLES, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: expected HOST:PORT"):
        processes.connect()


def test_processes_that_do_not_come(joined, monkeypatch):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    with pytest.raises(UserError, match="cannot connect: DEADLINE_EXCEEDED"):
        processes.connect()


# ---- mesh ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, -1, 1), (1, 8, 1)), ((-1, 1, 2), (4, 1, 2)), ((2, 2, -1), (2, 2, 2)), ((8, -1, 1), (8, 1, 1)),
        ((1, 4, 2), (1, 4, 2)), ((-1, -1, 1), (1, 8, 1)), ((-1, -1, 2), (1, 4, 2)),
    ],
)  # fmt: skip
def test_make_mesh(shape, expected):
    mesh = sharding.make_mesh(shape)
    assert mesh.axis_names == ("replica", "data", "tensor") and tuple(mesh.shape.values()) == expected


def test_a_mesh_over_some_devices():
    mesh = sharding.make_mesh((1, -1, 2), jax.devices()[:4])
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "tensor": 2}


@pytest.mark.parametrize(
    "shape", [(1, 3, 1), (1, 4, 1), (2, 8, 1), (1, -1, 3), (-1, -1, -1), (0, -1, 1), (1, 8, 0), (1, -2, -4)]
)
def test_a_mesh_that_does_not_fit(shape):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(shape)
    assert f"mesh {shape} (replica, data, tensor) does not fit 8 devices" in str(error.value)


class Chip:
    """What a mesh asks of a device."""

    def __init__(self, id, platform, slice_index=0, coords=None):
        self.id, self.platform, self.slice_index, self.coords = id, platform, slice_index, coords
        self.process_index, self.core_on_chip, self.device_kind = (
            id // 4,
            0,
            {"tpu": "TPU v6 lite", "gpu": "NVIDIA H100"}[platform],
        )

    def __repr__(self):
        return f"{self.platform}:{self.id}"


def tpu(num_slices, x, y):
    """Slices of x times y chips."""
    places = [(s, i, j) for s in range(num_slices) for j in range(y) for i in range(x)]
    return [Chip(n, "tpu", s, [i, j, 0]) for n, (s, i, j) in enumerate(places)]


@pytest.mark.parametrize(
    ("shape", "expected"), [((-1, -1, 1), (2, 16, 1)), ((4, -1, 1), (4, 8, 1)), ((2, 8, 2), (2, 8, 2)), ((-1, 8, 1), (4, 8, 1))]
)
def test_nothing_but_replica_crosses_slices(shape, expected):
    devices = tpu(2, 4, 4)
    mesh = sharding.make_mesh(shape, devices[::-1])
    assert tuple(mesh.shape.values()) == expected and set(mesh.devices.flat) == set(devices)
    for replica in mesh.devices:
        assert len({device.slice_index for device in replica.flat}) == 1
    assert {device.slice_index for device in mesh.devices[:, 0, 0]} == {0, 1}


@pytest.mark.parametrize("shape", [(1, 32, 1), (1, -1, 2), (3, 32, 1)])
def test_a_mesh_that_would_cross_slices_is_refused(shape):
    with pytest.raises(UserError, match=r"3 slices need a multiple of 3 replicas|does not fit 48 devices"):
        sharding.make_mesh(shape, tpu(3, 4, 4))


def test_a_tpu_mesh_may_split_an_axis_of_the_torus():
    """`jax.make_mesh` refuses this one on every TPU but v5e."""
    mesh = sharding.make_mesh((1, 8, 2), tpu(1, 4, 4))
    for pair in mesh.devices[0]:  # of tensor's two, each is the other's neighbour
        distance = np.abs(np.subtract(pair[0].coords, pair[1].coords))
        assert sorted(distance) in ([0, 0, 1], [0, 0, 3])


def test_tensor_and_data_stay_inside_hosts():
    """Two hosts of eight GPUs, which JAX calls slices."""
    devices = [Chip(n, "gpu", slice_index=n // 8) for n in range(16)]
    mesh = sharding.make_mesh((2, 4, 2), devices[1::2] + devices[::2])
    for replica in mesh.devices:
        assert len({device.slice_index for device in replica.flat}) == 1
    mesh = sharding.make_mesh((-1, -1, 2), devices)
    assert mesh.devices.shape == (1, 8, 2) and [d.id for d in mesh.devices.flat] == list(range(16))
    with pytest.raises(UserError, match=r"tensor 16 does not divide the 8 devices of a host"):
        sharding.make_mesh((1, 1, 16), devices)


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "2b"])
def test_every_parameter_matches_exactly_one_rule_of_its_rank(name):
    for path, leaf in flat(shapes_of(MODELS[name])).items():
        matching = [dims for pattern, dims in sharding.PARAM_AXES if re.fullmatch(pattern, path)]
        assert len(matching) == 1 and len(matching[0]) == leaf.ndim, (path, leaf.shape, matching)
        assert sharding.param_dims(path, leaf.ndim) == matching[0]


def test_no_rule_is_idle():
    paths = flat(shapes_of(TINY))
    for pattern, _ in sharding.PARAM_AXES:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


@pytest.mark.parametrize(
    ("path", "ndim"), [("feat_encoder/strange/kernel", 2), ("base_lm/embed/embedding", 3), ("my_base_lm/embed/embedding", 2)]
)
def test_a_parameter_without_a_rule_is_a_fault(path, ndim):
    with pytest.raises(AssertionError, match="in PARAM_AXES, expected one rule, of rank"):
        sharding.param_dims(path, ndim)


def test_two_rules_for_one_parameter_are_a_fault(monkeypatch):
    again = (r".*/embedding", ("vocab", "embed"))
    monkeypatch.setattr(sharding, "PARAM_AXES", (*sharding.PARAM_AXES, again))
    with pytest.raises(AssertionError, match="expected one rule"):
        sharding.param_dims("base_lm/embed/embedding", 2)


def test_matrices_are_split_over_data_and_tensor():
    """The released shape on (2, 16, 2): what FSDP and tensor parallelism split, and what stays whole."""
    mesh = jax.sharding.AbstractMesh((2, 16, 2), sharding.MESH_AXES)
    specs = {path: s.spec for path, s in flat(sharding.param_shardings(shapes_of(MODELS["2b"]), mesh)).items()}
    assert specs["base_lm/embed/embedding"] == PartitionSpec("tensor", "data")
    assert specs["base_lm/layers/q/kernel"] == PartitionSpec(None, "data", "tensor", None)
    assert specs["base_lm/layers/k/kernel"] == PartitionSpec(None, "data", "tensor", None)
    assert specs["feat_decoder/layers/down/kernel"] == PartitionSpec(None, "tensor", "data")
    assert specs["base_lm/norm/scale"] == PartitionSpec(None)
    assert specs["enc_to_lm_proj/kernel"] == PartitionSpec("data", None)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 1, 4),
            r"mesh \(1, 1, 4\) \(replica, data, tensor\): tensor 4 does not divide .*/layers/k/kernel, whose kv_heads are 2",
        ),
        ((1, 6144, 1), r"data 6144 does not divide base_lm/embed/embedding, whose embed are 2048"),
    ],
)
def test_a_parameter_that_the_mesh_does_not_divide_is_refused(shape, message):
    mesh = jax.sharding.AbstractMesh(shape, sharding.MESH_AXES)
    with pytest.raises(UserError, match=message):
        sharding.param_shardings(shapes_of(MODELS["2b"]), mesh)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimiser_state_lies_where_its_parameters_lie(optimizer):
    mesh = sharding.make_mesh((1, 4, 2))
    config = BackboneRun(model=TINY, optim=OptimConfig(optimizer, ema_decay=0.9), batch=BatchConfig(8, 64, 32))
    state = jax.eval_shape(partial(backbone.init_state, config))
    layout = sharding.param_shardings(state, mesh)
    assert jax.tree.structure(layout) == jax.tree.structure(state)
    wanted = {path: s.spec for path, s in flat(layout.params).items()}
    assert {path: s.spec for path, s in flat(layout.ema).items()} == wanted
    moments = {path: s.spec for path, s in flat(layout.opt_state).items()}
    for moment in ("mu", "nu"):
        found = {path.split(f"{moment}/")[1]: spec for path, spec in moments.items() if f"{moment}/" in path}
        by_adamw = {path for path, method in flat(optim.methods(layout.params)).items() if method == "adamw"}
        assert found == (wanted if moment == "mu" or optimizer == "adamw" else {path: wanted[path] for path in by_adamw})
    others = [spec for path, spec in moments.items() if "mu/" not in path and "nu/" not in path]
    assert others and set(others) == {PartitionSpec()} and layout.step.spec == PartitionSpec()


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_bytes_of_a_device_are_what_devices_hold():
    config = BackboneRun(model=TINY, optim=OptimConfig(ema_decay=0.9), batch=BatchConfig(8, 64, 32))
    state = jax.eval_shape(partial(backbone.init_state, config))
    for shape in [(1, 8, 1), (2, 2, 2), (8, 1, 1)]:
        mesh = sharding.make_mesh(shape)
        held = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state),
                       out_shardings=sharding.param_shardings(state, mesh))()  # fmt: skip
        expected = sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(held))
        assert sharding.device_bytes(state, mesh) == expected


def test_the_figures_in_the_docstring():
    text = " ".join(sharding.__doc__.split())
    for name, layout in [("v5e", (16, 16)), ("v6e", (16, 16)), ("v5p", (8, 8, 8)), ("v6e", (8, 8)), ("v5e", (4, 8))]:
        positions = sharding.positions_to_hide(CHIPS[name], layout)
        assert f"{name} {'x'.join(map(str, layout))} {positions:,.0f}" in text
    for num in (8, 64):
        assert f"H100 {sharding.positions_to_hide(CHIPS['h100'], (num,)):,.0f}" in text
    state = jax.eval_shape(partial(backbone.init_state, BackboneRun(model=MODELS["2b"])))
    mesh = jax.sharding.AbstractMesh((1, 256, 1), sharding.MESH_AXES)
    gradients = sharding.device_bytes(state.params, mesh)
    assert f"on 256 devices {(sharding.device_bytes(state, mesh) + gradients) / 1e9:.2f} GB each" in text


# ---- activations -----------------------------------------------------------------------------------------------------


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", "embed") is x


def test_constrain_lays_out_by_logical_dims():
    mesh = sharding.make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", None, "mlp"))(jnp.ones((8, 3, 4)))
        odd = jax.jit(lambda x: sharding.constrain(x, "batch", "mlp"))(jnp.ones((6, 3)))  # 6 rows over 4 devices
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("replica", "data"), None, "tensor")), 3)
    assert odd.sharding.is_fully_replicated


# ---- sharded == unsharded --------------------------------------------------------------------------------------------

RUN = BackboneRun(model=TINY, remat="none", batch=BatchConfig(rows=8, slots=16, patches=8))


@pytest.fixture(scope="module")
def problem(tiny_params):
    """A packed batch of eight rows, draws; loss and gradients of one device."""
    rng = np.random.default_rng(0)
    shape = (TINY.patch_size, TINY.feat_dim)

    def clip(num_text, num_patches):
        audio = rng.normal(size=(num_patches, *shape)).astype(np.float32)
        return sequence.lay_out(rng.integers(110, 380, num_text), target_MPC=audio)

    rows = [[clip(1 + b % 3, 2 + b % 2), clip(2, 1 + b % 3)] for b in range(8)]
    batch = sequence.pack(rows, num_slots=16, num_patches=8, patch_shape=shape)
    draws = voxcpm2.Draws(
        rng.uniform(size=(8, 8)).astype(np.float32),
        rng.normal(size=batch.patches_BMPC.shape).astype(np.float32),
        rng.uniform(size=(8, 8)) < 0.3,
    )
    expected = jax.jit(_loss_and_grads)(tiny_params, batch, draws)
    return tiny_params, batch, draws, jax.device_get(expected)


def _loss_and_grads(params, batch, draws):
    return jax.value_and_grad(backbone.objective, has_aux=True)(params, RUN, batch, draws, Compute.of(RUN))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_sharded_equals_unsharded(problem, shape):
    params, batch, draws, ((loss, sums), grads) = problem
    mesh = sharding.make_mesh(shape)
    layout = sharding.param_shardings(params, mesh)
    rows = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, layout)
        batch, draws = (jax.tree.map(lambda x: jax.device_put(x, rows), tree) for tree in (batch, draws))
        sharded = jax.jit(_loss_and_grads, out_shardings=(None, layout))
        (got_loss, got_sums), got_grads = sharded(params, batch, draws)
    if shape != (8, 1, 1):
        assert not params["base_lm"]["layers"]["q"]["kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    for name in ("loss_diff", "loss_stop"):
        np.testing.assert_allclose(got_sums[name], sums[name], rtol=1e-5)
    got_grads = flat(jax.device_get(got_grads))
    for path, expected in flat(grads).items():
        error = np.linalg.norm(got_grads[path] - expected) / (np.linalg.norm(expected) + 1e-12)
        assert error < 1e-4, (path, error)
        assert np.linalg.norm(expected) > 0, path
