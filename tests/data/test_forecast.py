"""The forecast of what a run trains on, compared with what it does train on."""

import numpy as np
import pytest

from tests.data.test_packing import speech_lengths
from voxcpm2_jax.config.run import BatchConfig, StageConfig
from voxcpm2_jax.data.clips import Index
from voxcpm2_jax.data.forecast import forecast
from voxcpm2_jax.data.mixing import Mix

PATCH_SEC = 0.16
BATCH = BatchConfig(rows=2, slots=1024, patches=700)
STAGES = (
    StageConfig(max_sec=10.0, reference=0.0, described=0.0, temperature=2.0),
    StageConfig(first_step=60, max_sec=180.0, reference=0.4, described=0.3, rows_factor=2.0),
    StageConfig(first_step=500),
)


def forecasts(lengths, pairs=None, num_steps=100):
    index = Index(lengths, (("a", "en"), ("a", "de")), pairs)
    mix = Mix(0, index, PATCH_SEC, BATCH, STAGES)
    return mix, forecast(mix, index, num_steps, PATCH_SEC)


def corpus():
    lengths = speech_lengths(2000)
    lengths["reference"] = lengths["described"] = 0
    lengths["group"][:300] = 1
    return lengths


def test_it_is_what_the_run_trains_on():
    lengths = corpus()
    mix, stages = forecasts(lengths)
    sec = lengths["patches"] * PATCH_SEC
    assert [(stage.first_step, stage.end_step, stage.rows) for stage in stages] == [(0, 60, 2), (60, 100, 4)]
    for stage, limit in zip(stages, (10.0, 180.0)):
        chosen = sec[sec <= limit]
        assert stage.clips == len(chosen) and stage.longest_sec == pytest.approx(chosen.max())
        assert stage.hours == pytest.approx(chosen.sum() / 3600)
        before, after = (mix.heard(step) for step in (stage.first_step, stage.end_step))
        hours = {}
        for (_, language, _), (_, patches) in after.items():
            hours[language] = hours.get(language, 0) + patches * PATCH_SEC / 3600
        for (_, language, _), (_, patches) in before.items():
            hours[language] -= patches * PATCH_SEC / 3600
        assert stage.hours_heard == pytest.approx(sum(hours.values()), rel=0.03)
        has_group = {
            language: sec[(lengths["group"] == i) & (sec <= limit)].sum() / 3600 for i, language in enumerate(("en", "de"))
        }
        assert stage.epochs == pytest.approx(sorted(hours[name] / has_group[name] for name in hours), rel=0.05)


def test_it_names_what_a_stage_asks_for_in_vain():
    lengths = corpus()
    _, (first, second) = forecasts(lengths)
    assert list(first.lacking) == []
    long, reference, description = second.lacking
    assert f"up to 180 s, but the longest has {lengths['patches'].max() * PATCH_SEC:.1f} s" in long
    assert "reference=0.4" in reference and "described=0.3" in description
    lengths["patches"][0] = 690
    lengths["described"][1] = 5 + lengths["text"][1]
    pairs = np.full((len(lengths), 2), -1)
    pairs[5, 0] = 6
    (long,) = forecasts(lengths, pairs)[1][1].lacking
    assert "the longest has 110.4 s" in long
    assert "110.4 s; trains on" in str(forecasts(lengths, pairs)[1][1])
