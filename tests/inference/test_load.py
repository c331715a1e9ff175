"""Loading weights for generation: which they are, and how much memory it takes."""

import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from voxcpm2_jax import workdir
from voxcpm2_jax.checkpoint.arrays import Weights, flatten
from voxcpm2_jax.convert import import_torch
from voxcpm2_jax.data import tokenizer
from voxcpm2_jax.inference import load
from voxcpm2_jax.inference.api import VoxCPM
from voxcpm2_jax.models import voxcpm2


def test_weights_are_those_of_the_unrolled_form(tiny_params):
    flat = flatten(tiny_params)
    weights = Weights({path: x.shape for path, x in flat.items()}, flat.__getitem__)
    expected = voxcpm2.unrolled_params(tiny_params)
    jax.tree.map(np.testing.assert_array_equal, load.unrolled(weights, "float32"), expected)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    jax.tree.map(np.testing.assert_array_equal, load.unrolled(weights, "bfloat16"), narrow)
    half = Weights(weights.shapes, lambda path: flat[path].astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, load.unrolled(half, "float32"), narrow)


def test_one_group_of_parameters_is_on_the_host_at_a_time(tiny_parts, monkeypatch):
    """What `from_pretrained` has read and not yet let go, whenever it reads the next parameter."""
    config, params, *rest = tiny_parts
    flat = flatten(params)
    alive, most = [], 0

    def read(path):
        nonlocal most
        whole = np.empty(flat[path].nbytes + 1, np.uint8)  # not aligned, so that a CPU device copies it
        array = whole[1:].view(np.float32).reshape(flat[path].shape)
        array[:] = flat[path]
        alive.append(weakref.ref(array))
        most = max(most, sum(ref().nbytes for ref in alive if ref() is not None))
        return array

    weights = Weights({path: x.shape for path, x in flat.items()}, read)
    opened = workdir.OpenModel(config, weights, *rest[:2], None, "tokenizer")
    monkeypatch.setattr(workdir, "open_model", lambda path: opened)
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda path: rest[2])
    model = VoxCPM.from_pretrained("anything")
    sizes = [x.nbytes * (2 if path.endswith("/gate/kernel") else 1) for path, x in flat.items()]
    assert most == max(sizes), "gate and up are read together"
    assert sum(x.nbytes for x in jax.tree.leaves(model._params)) == sum(x.nbytes for x in flat.values())


def test_the_step_of_a_run_is_chosen_when_it_is_opened(released_dir, tmp_path):
    """The run may save a newer step while its weights are read."""
    import_torch(released_dir, tmp_path / "run")
    weights = workdir.open_model(tmp_path / "run").weights
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "0", steps / "1")
    shutil.rmtree(steps / "1" / "params" / "stop_head.kernel")
    assert weights.read("stop_head/kernel").shape == weights.shapes["stop_head/kernel"]
