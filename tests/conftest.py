"""CPU, eight fake devices, strict promotion, quick compilation: set before anything imports jax."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is what tests spend their time on; LLVM's optimisations more than double it and gain nothing at tiny shapes.
for flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_threefry_partitionable", True)


def _random(shapes, seed: int):
    """Values for a tree of shapes, away from what `init` gives; made by numpy, since compiling `init` takes half a minute.

    Small enough that rounding does not grow from patch to patch, nor in the codec's Snakes, more than in trained models.
    """
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        mean = {"scale": 1.0, "alpha": 1.0, "gain": 0.5}.get(path[-1].key, 0.0)
        deviation = 0.1 if leaf.ndim < 2 or mean else 0.4 * leaf.shape[-2] ** -0.5
        return rng.normal(mean, deviation, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


@pytest.fixture(scope="session")
def tiny_params():
    """Random parameters of the backbone MODELS["tiny"]."""
    from voxcpm2_jax.config.model import MODELS
    from voxcpm2_jax.models import voxcpm2

    return _random(jax.eval_shape(lambda key: voxcpm2.init(key, MODELS["tiny"]), jax.random.key(0)), 0)


@pytest.fixture(scope="session")
def tiny_parts(tiny_params):
    """The arguments of `VoxCPM` for a model that babbles: config, params, vae_config, vae_params, tokenizer.

    The codec has the release's rates and hops: a patch is 160 ms, 2,560 samples in and 7,680 out.
    """
    from voxcpm2_jax.config.model import MODELS, AudioVAEConfig
    from voxcpm2_jax.data.tokenizer import train_tokenizer
    from voxcpm2_jax.vae import autoencoder

    vae = AudioVAEConfig(encoder_dim=2, encoder_rates=(20, 32), latent_dim=16, decoder_dim=16, decoder_rates=(48, 40))
    vae_params = _random(jax.eval_shape(lambda key: autoencoder.init(key, vae), jax.random.key(0)), 1)
    texts = ["one two three four five", "un deux trois quatre cinq", "eins zwei drei vier fünf", "(softly) hello"]
    return MODELS["tiny"], tiny_params, vae, vae_params, train_tokenizer(texts * 4, 340)


@pytest.fixture(scope="session")
def released_dir(tiny_parts, tmp_path_factory):
    """The same model as a directory in the released layout; not to be written to."""
    from voxcpm2_jax.torch_io import released

    directory = tmp_path_factory.mktemp("voice") / "released"
    released.save(directory, *tiny_parts)
    return directory


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Tests share compiled programs, across workers too; with JAX_COMPILATION_CACHE_DIR set, also from run to run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(base / "compiled"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_terminal_summary(terminalreporter):
    """How near tests/reference came, file by file."""
    worst: dict[str, float] = {}
    for report in terminalreporter.getreports(""):
        for name, value in getattr(report, "user_properties", ()):
            if name == "relative error":
                worst[report.fspath] = max(value, worst.get(report.fspath, 0.0))
    for path, value in sorted(worst.items()):
        terminalreporter.write_line(f"worst relative error to the PyTorch package: {value:.1e}  {path}")
