"""Compiled programs in a bucket: JAX itself writes them there and finds them."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from voxcpm2_jax.buckets import store

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def kept(bucket):
    before = {name: getattr(jax.config, name) for name in NAMES}
    for name, value in zip(NAMES, (f"{bucket.url}/run/compiled", 0.0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield f"{bucket.url}/run/compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_program_is_written_and_found_again(kept):
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))

    for hits in (0, 1):  # a new function each time: JAX keeps the programs of a function in memory

        def double_and_more(x):
            return 2 * x + 0.375

        events.clear()
        assert float(jax.jit(double_and_more)(1.0)) == 2.375
        assert events.count("/jax/compilation_cache/cache_hits") == hits
    assert any("double_and_more" in name for name in store.objects(kept))
