"""The assembled model on packed batches: traps of the architecture, packed == separate, budgets, frozen paths."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax import sequence
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.models import transformer, voxcpm2
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.voxcpm2 import Draws, VoxCPM2

CONFIG = MODELS["tiny"]
P, C = CONFIG.patch_size, CONFIG.feat_dim
SLOTS, PATCHES = 40, 24


def audio(n, seed=0):
    return np.random.default_rng((n, seed)).normal(size=(n, P, C)).astype(np.float32)


def clip(text, n, seed=0, **kwargs):
    return sequence.lay_out(np.arange(110, 110 + text), target_MPC=audio(n, seed), **kwargs)


def pack(*rows, slots=SLOTS, patches=PATCHES):
    return sequence.pack(rows, num_slots=slots, num_patches=patches, patch_shape=(P, C))


def draws_for(batch, seed=0, drop=False):
    rng = np.random.default_rng(seed)
    B, M = batch.slot_BM.shape
    return Draws(
        rng.uniform(size=(B, M)).astype(np.float32),
        rng.normal(size=(B, M, P, C)).astype(np.float32),
        np.full((B, M), drop),
    )


@pytest.fixture(scope="module")
def params():
    """Random everywhere, so that nothing starts at zero."""
    fresh = jax.jit(voxcpm2.init, static_argnums=1)(jax.random.key(0), CONFIG)
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def terms():
    """loss_terms, compiled once a shape."""
    return jax.jit(
        lambda params, batch, draws, target_patches=None: voxcpm2.loss_terms(
            params, CONFIG, batch, draws, target_patches=target_patches, compute=Compute(remat="none")
        ),
        static_argnames="target_patches",
    )


@pytest.fixture(scope="module")
def velocity():
    def run(params, *args):
        return VoxCPM2(CONFIG).apply({"params": params}, *args, method="velocity")

    return jax.jit(run)


@pytest.fixture(scope="module")
def some_patch():
    rng = np.random.default_rng(5)
    width = CONFIG.locdit.width
    x, cond = rng.normal(size=(2, 3, P, C)).astype(np.float32)
    return x, rng.normal(size=(3, 2, width)).astype(np.float32), cond, np.full(3, 0.6, np.float32), np.zeros(3, np.float32)


def test_trap_1_the_conditioning_vectors_are_two_tokens_not_a_sum(params, velocity, some_patch):
    x, prefix, cond, t, dt = some_patch
    both = velocity(params, x, prefix, cond, t, dt)
    summed = np.stack([prefix.sum(axis=1), np.zeros_like(prefix[:, 0])], axis=1)
    assert np.abs(both - velocity(params, x, summed, cond, t, dt)).max() > 1e-2
    assert np.abs(both - velocity(params, x, prefix[:, ::-1], cond, t, dt)).max() > 1e-2


def test_trap_2_a_time_step_of_zero_still_goes_through_its_mlp(params, velocity, some_patch):
    delta = params["feat_decoder"]["delta_time_mlp"]
    moved = delta | {"linear_2": delta["linear_2"] | {"bias": delta["linear_2"]["bias"] + 1}}
    changed = params | {"feat_decoder": params["feat_decoder"] | {"delta_time_mlp": moved}}
    assert np.abs(velocity(params, *some_patch) - velocity(changed, *some_patch)).max() > 1e-2


def test_trap_3_shifted_inputs_are_zero_at_every_segments_start(params, terms):
    """A clip that begins with a target patch, behind another clip: nothing of its neighbour reaches it."""
    bare = sequence.Sequence(
        tokens_T=np.zeros(2, np.int32), patches_MPC=audio(2), slot_M=np.arange(2, dtype=np.int32),
        target_M=np.ones(2, bool), stop_M=np.array([0, 1], np.int32),
    )  # fmt: skip
    neighbour = clip(3, 4)
    alone, behind = pack([bare]), pack([neighbour, bare])
    draws = draws_for(alone)
    moved = jax.tree.map(lambda x: np.roll(x, neighbour.num_targets, axis=1), draws)
    for name in ("diff_BMP", "stop_BM"):
        first = terms(params, alone, draws)[name][:, :2]
        second = terms(params, behind, moved)[name][:, neighbour.num_targets : neighbour.num_targets + 2]
        np.testing.assert_allclose(first, second, rtol=1e-5)


def test_trap_4_the_quantiser_touches_audio_slots_only(params):
    batch = pack([clip(5, 4)])
    read = jax.jit(lambda params: VoxCPM2(CONFIG).apply({"params": params}, batch, method="read_batch").semantic_BTD)
    without = params | {"fsq_layer": jax.tree.map(jnp.zeros_like, params["fsq_layer"])}
    before, after = read(params)[0], read(without)[0]
    is_audio_T = np.isin(np.arange(SLOTS), batch.slot_BM[0])
    np.testing.assert_array_equal(before[:6], after[:6])
    assert (np.asarray(after)[is_audio_T] == 0).all() and (np.abs(np.asarray(before)[is_audio_T]).max(axis=-1) > 0).all()


def test_trap_5_dropout_is_per_patch_and_spares_the_previous_patch(params, terms):
    batch = pack([clip(3, 6)])
    draws = draws_for(batch)
    one = draws._replace(drop_BM=np.arange(PATCHES)[None] == 2)
    kept, dropped = terms(params, batch, draws)["diff_BMP"][0], terms(params, batch, one)["diff_BMP"][0]
    changed_M = np.abs(kept - dropped).max(axis=-1) > 1e-6
    assert changed_M[:6].tolist() == [False, False, True, False, False, False]
    # With every vector dropped, patch 3 still sees patch 2.
    everything = draws_for(batch, drop=True)
    other = dataclasses.replace(batch, patches_BMPC=batch.patches_BMPC.copy())
    other.patches_BMPC[0, 2] += 1
    before, after = terms(params, batch, everything)["diff_BMP"][0], terms(params, other, everything)["diff_BMP"][0]
    changed_M = np.abs(before - after).max(axis=-1) > 1e-6
    assert changed_M[:6].tolist() == [False, False, True, True, False, False]


def test_trap_7_the_stop_head_reads_shifted_states_and_its_label_sits_on_the_last_patch(params, terms):
    batch = pack([clip(3, 6)])
    assert batch.stop_BM[0, :6].tolist() == [0, 0, 0, 0, 0, 1]
    other = dataclasses.replace(batch, patches_BMPC=batch.patches_BMPC.copy())
    other.patches_BMPC[0, 3] += 1
    draws = draws_for(batch)
    before, after = (terms(params, b, draws)["stop_logits_BM2"][0] for b in (batch, other))
    assert (np.abs(before - after).max(axis=-1) > 1e-6)[:6].tolist() == [False] * 4 + [True] * 2


def test_trap_8_the_residual_scale_uses_the_stacks_own_depth():
    c = CONFIG
    mup = dataclasses.replace(c, lm_config=dataclasses.replace(c.lm_config, use_mup=True))
    for stack, depth in ((mup.tslm, 2), (mup.ralm, 1), (mup.locenc, 1), (mup.locdit, 2)):
        assert stack.num_layers == depth and stack.residual_scale == pytest.approx(1.4 / depth**0.5)
    assert {s.residual_scale for s in (c.tslm, c.ralm, c.locenc, c.locdit)} == {1.0}


def test_packed_equals_separate_wherever_a_clip_stands(params, terms):
    a, b = clip(3, 5), clip(2, 4, seed=1, reference_MPC=audio(3, seed=2))
    together, alone = pack([a, b], [b]), pack([b], [])
    draws = draws_for(together)
    shared = jax.tree.map(lambda x: np.stack([x[0, a.num_targets : a.num_targets + PATCHES - 5], x[1, : PATCHES - 5]]), draws)
    whole = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 5)) + ((0, 0),) * (x.ndim - 2)), shared)
    packed = terms(params, together, draws)["diff_BMP"][0, 5:9]
    single = terms(params, alone, jax.tree.map(lambda x: x[:1].repeat(2, axis=0), whole))["diff_BMP"][0, :4]
    np.testing.assert_allclose(packed, single, rtol=1e-5)


def test_padding_does_not_count(params, terms):
    roomy, tight = pack([clip(3, 5)]), pack([clip(3, 5)], slots=10, patches=5)
    draws = draws_for(roomy)
    few = jax.tree.map(lambda x: x[:, :5], draws)
    for name in ("diff_BMP", "stop_BM", "target_BM"):
        np.testing.assert_allclose(terms(params, roomy, draws)[name][:, :5], terms(params, tight, few)[name], rtol=1e-5)
    assert terms(params, roomy, draws)["target_BM"].sum() == 5


def test_a_row_of_more_clips_than_it_may_hold_has_no_loss(params):
    """Rather than a wrong one: cuDNN would leave clips out without a word."""
    batch = pack([clip(3, 2), clip(2, 2), clip(2, 3)], [clip(3, 5)])
    d = draws_for(batch)
    terms = jax.jit(lambda: voxcpm2.loss_terms(params, CONFIG, batch, d, compute=Compute(max_segments=2)))()
    assert np.isnan(terms["diff_BMP"][0]).any() and np.isfinite(terms["diff_BMP"][1]).all()


@pytest.mark.parametrize(("most", "is_whole"), [(10, [True, False]), (11, [True, True])])
def test_a_row_with_a_longer_clip_than_it_may_hold_has_no_loss(params, most, is_whole):
    """Splash would not let the end of the clip see its beginning. Padding may be longer."""
    batch = pack([clip(3, 2)], [clip(3, 6)])
    d = draws_for(batch)
    terms = jax.jit(lambda: voxcpm2.loss_terms(params, CONFIG, batch, d, compute=Compute(clip_slots=most)))()
    assert [np.isfinite(row).all() for row in terms["diff_BMP"]] == is_whole


def test_third_budget_changes_nothing_but_the_work(params, terms):
    batch = pack([clip(3, 5, reference_MPC=audio(4)), clip(2, 4)])
    draws = draws_for(batch)
    whole, cut = terms(params, batch, draws), terms(params, batch, draws, target_patches=10)
    np.testing.assert_allclose(whole["diff_BMP"][:, :10], cut["diff_BMP"], rtol=1e-5)
    assert whole["target_BM"].sum() == cut["target_BM"].sum() == 9


def test_order_of_patches_in_a_row_does_not_matter(params):
    batch = pack([clip(3, 5, reference_MPC=audio(4)), clip(2, 4)])
    draws = draws_for(batch)
    order = np.random.default_rng(0).permutation(PATCHES)
    mixed = dataclasses.replace(
        batch, **{n: getattr(batch, n)[:, order] for n in ("patches_BMPC", "slot_BM", "target_BM", "stop_BM")}
    )
    loss = jax.jit(lambda b, d: voxcpm2.loss(params, CONFIG, b, time_BM=d.time_BM, noise_BMPC=d.noise_BMPC, drop_BM=d.drop_BM))
    ours, theirs = loss(batch, draws), loss(mixed, jax.tree.map(lambda x: x[:, order], draws))
    for name in ("diff", "stop"):
        np.testing.assert_allclose(ours[name][0], theirs[name][0], rtol=1e-5)
        assert ours[name][1] == theirs[name][1]


def test_a_clip_to_listen_to_bears_no_loss(params, terms):
    batch = pack([sequence.lay_out_prompt_clip(np.arange(110, 113), audio(5))])
    assert terms(params, batch, draws_for(batch))["target_BM"].sum() == 0


def test_parameter_paths_are_frozen():
    """Checkpoints of users are stored by these paths."""
    shapes = jax.eval_shape(lambda key: voxcpm2.init(key, CONFIG), jax.random.key(0))
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    layer = {"attn_norm/scale", "mlp_norm/scale", *(f"{n}/kernel" for n in ("q", "k", "v", "o", "gate", "up", "down"))}
    stacks = ("base_lm", "residual_lm", "feat_encoder", "feat_decoder")
    dense = (
        "enc_to_lm_proj", "lm_to_dit_proj", "res_to_dit_proj", "fusion_concat_proj", "stop_proj", "fsq_layer/in_proj",
        "fsq_layer/out_proj", "feat_encoder/in_proj", "feat_decoder/in_proj", "feat_decoder/cond_proj", "feat_decoder/out_proj",
        *(f"feat_decoder/{a}/{b}" for a in ("time_mlp", "delta_time_mlp") for b in ("linear_1", "linear_2")),
    )  # fmt: skip
    assert paths == (
        {f"{s}/layers/{name}" for s in stacks for name in layer}
        | {f"{s}/norm/scale" for s in stacks}
        | {f"{name}/{leaf}" for name in dense for leaf in ("kernel", "bias")}
        | {"base_lm/embed/embedding", "feat_encoder/special_token", "stop_head/kernel"}
    )


def test_unrolled_form_is_the_same_model(params):
    batch = pack([clip(3, 5), clip(2, 4)])
    stacked = VoxCPM2(CONFIG).apply({"params": params}, batch, method="read_batch")
    unrolled = VoxCPM2(CONFIG, Compute(is_unrolled=True)).apply(
        {"params": voxcpm2.unrolled_params(params)}, batch, method="read_batch"
    )
    np.testing.assert_allclose(stacked.acoustic_BTD, unrolled.acoustic_BTD, rtol=1e-4, atol=1e-5)


def test_bfloat16_runs_and_stays_near(params, terms):
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    batch = pack([clip(3, 5)])
    draws = draws_for(batch)
    ours = jax.jit(lambda p: voxcpm2.loss_terms(p, half, batch, draws))(params)
    assert ours["diff_BMP"].dtype == jnp.float32
    exact = terms(params, batch, draws)["diff_BMP"]
    assert np.linalg.norm((ours["diff_BMP"] - exact)[:, :5]) < 0.05 * np.linalg.norm(exact[:, :5])


def test_no_gradient_is_rounded_before_it_is_summed_over_devices(params):
    """In bfloat16 too: no array of a parameter's shape, nor of a layer's share of one, turns from bfloat16 to float32."""
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    batch = pack([clip(3, 5), clip(2, 4)])

    def total(params):
        terms = voxcpm2.loss_terms(params, half, batch, draws_for(batch))
        return jnp.sum(terms["diff_BMP"]) + jnp.sum(terms["stop_BM"])

    shapes = {x.shape[i:] for path, x in jax.tree.leaves_with_path(params) for i in ((0, 1) if "layers" in str(path) else (0,))}
    program = jax.jit(jax.grad(total)).lower(params).as_text()
    widened = re.findall(r"convert .*: \(tensor<([\dx]*)xbf16>\) -> tensor<[\dx]*xf32>", program)
    assert widened and not {"x".join(map(str, shape)) for shape in shapes} & set(widened)


def test_mean_mode_computes_the_decoder_in_float32(params):
    """The slope of the network along the flow is the largest part of this loss, and 2 % off in bfloat16."""
    batch = pack([clip(1, 2)], slots=5, patches=2)
    draws = draws_for(batch, drop=True)  # drops the states of the language models, which are those of bfloat16
    draws = draws._replace(start_BM=0.3 * draws.time_BM)
    diffs = []
    for dtype in ("float32", "bfloat16"):
        dit = dataclasses.replace(CONFIG.dit_config, dit_mean_mode=True)
        config = dataclasses.replace(CONFIG, dtype=dtype, dit_config=dit)
        run = partial(voxcpm2.loss_terms, config=config, batch=batch, draws=draws, compute=Compute(remat="none"))
        diffs.append(jax.jit(lambda params, run=run: run(params)["diff_BMP"])(params))
    np.testing.assert_allclose(*diffs, rtol=1e-5)


def test_no_attention_logit_is_over_its_bound():
    """And the bound is reached where the longest query points along the longest key."""
    rng = np.random.default_rng(0)
    q_BTNH, k_BSKH = (jnp.asarray(rng.standard_normal((2, 5, n, 8)), jnp.float32) for n in (6, 3))
    logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTNH.reshape(2, 5, 3, 2, 8), k_BSKH) / 8**0.5
    bound_BK = transformer.logit_bound(q_BTNH, k_BSKH)
    assert (logits_BKGTS.max(axis=(2, 3, 4)) <= bound_BK).all() and bound_BK.shape == (2, 3)
    longest_BTNH = jnp.zeros_like(q_BTNH).at[:, 0, 2].set(k_BSKH[:, 3, 1])
    one_key_BSKH = jnp.zeros_like(k_BSKH).at[:, 3, 1].set(k_BSKH[:, 3, 1])
    reached_BK = transformer.logit_bound(longest_BTNH, one_key_BSKH)
    np.testing.assert_allclose(reached_BK[:, 1], jnp.sum(k_BSKH[:, 3, 1] ** 2, axis=-1) / 8**0.5, rtol=1e-6)
