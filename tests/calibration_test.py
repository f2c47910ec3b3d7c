"""What trials make of scores, against float64 and against `select`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import calibration as calibration_lib
from effllm_jax import model
from effllm_jax import plan as plan_lib
from effllm_jax import pruning
from effllm_jax import selection
from effllm_jax import sharding
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure
from experiments.configs import smollm2_135m
from tests import conftest

CFG = conftest.make_config(K=4, F=24)


@functools.cache
def plan(policy) -> plan_lib.Plan:
  config = smollm2_135m.get_config()
  config.update_from_flattened_dict(
    conftest.small_run(
      '', '',
      **{'prune.policy': policy, 'budget.target': 0.5 * CFG.num_params(),
         'prune.floors.stem': 8, 'prune.floors.ffn': 4,
         'prune.multiple_of.ffn': 4, 'prune.calibrate': True},
    )
  )  # fmt: skip
  return plan_lib.make(config, CFG, mesh=sharding.make(1, 1, 1))


def whole(scores) -> state_lib.PruneState:
  """Of a model that has lost nothing."""
  return state_lib.PruneState(
    masks=structure.all_alive(CFG), scores=scores,
    origin=structure.all_alive(CFG), count=jnp.int32(1),
  )  # fmt: skip


def test_trials_fade_step_by_step():
  """As scores do, however many steps lie between two prunes."""
  made = plan('uniform')
  assert made.every == 2
  calibration = calibration_lib.Calibration(made.trial_decay())
  before, trial = calibration.record, {'groups': 1, 'change': 0.5, 'score': 2.0}
  for _ in range(2):
    assert calibration.measured == bool(calibration.record['sums'])
    calibration.add(dict.fromkeys(structure.TYPES, trial))
  kept = 1 + made.recipe.decay**2
  assert calibration.record['sums'] == {
    t: pytest.approx([0.5 * kept, 2.0 * kept]) for t in structure.TYPES
  }
  # A thread may still be writing what a checkpoint was given.
  assert before == {'sums': {}, 'broken': {}}


def calibrate(scores, policy='uniform', params=None, masks=None, share=0.9):
  """Scaled scores, what the trials were, and the masks that are chosen."""
  params = conftest.make_params(CFG) if params is None else params
  prune = state_lib.PruneState(
    masks=structure.all_alive(CFG) if masks is None else masks,
    scores=scores,
    origin=structure.all_alive(CFG),
    count=jnp.int32(1),
  )
  made, target = plan(policy), int(share * CFG.num_params())
  windows_ABT = conftest.make_tokens(CFG, 4).reshape(2, 2, -1)
  found = calibration_lib.trials(params, prune, windows_ABT, CFG, made, target)
  calibration = calibration_lib.Calibration(0.5)
  calibration.add(found)
  prune = calibration.scaled(prune)
  return prune, found, pruning.select(prune, made, target)


def float64_loss(params, masks):
  with jax.enable_x64(True):
    compute = model.Compute(dtype='float64', remat='none')
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    windows_BT = conftest.make_tokens(CFG, 4)
    return float(
      steps.batch_loss(params, masks, windows_BT, cfg=CFG, compute=compute)
    )


@pytest.mark.parametrize('policy', ['uniform', 'ragged'])
def test_the_scores_of_a_trial_add_up_to_what_it_does(policy):
  """And the order within a type stays."""
  scores = conftest.make_scores(CFG)
  prune, found, _ = calibrate(scores, policy)
  params, alive = conftest.make_params(CFG), structure.all_alive(CFG)
  whole, rose = float64_loss(params, alive), 0
  for t in structure.TYPES:
    before, after = (
      np.asarray(getattr(tree, t), np.float64)
      for tree in (scores, prune.scores)
    )
    # The lowest: of every layer, or wherever a block of 4 or 1 is cheapest.
    count = found[t]['groups']
    if t == 'stem' or policy == 'uniform':
      rows = np.atleast_2d(before)
      each = count // len(rows)
      kept = np.argsort(np.argsort(rows, axis=-1), axis=-1) >= each
      mask = kept.reshape(before.shape)
      assert found[t]['score'] == pytest.approx(before[~mask].sum(), rel=1e-6)
      removed = alive.replace(**{t: jnp.asarray(mask)})
      want = float64_loss(params, removed) - whole
      assert found[t]['change'] == pytest.approx(want, abs=1e-5)
    rate = max(found[t]['change'], 1e-12) / found[t]['score']
    np.testing.assert_allclose(after, rate * before, rtol=1e-5)
    assert count > 0
    rose += found[t]['change'] > 0
  assert rose


@pytest.mark.parametrize('policy', ['uniform', 'ragged'])
def test_no_type_gains_by_the_unit_of_its_score(policy):
  """So that any score compares types."""
  scores = conftest.make_scores(CFG)
  plain, _, want = calibrate(scores, policy)
  for factors in ((100.0, 1.0, 1e-3), (1e-4, 7.0, 1e4)):
    other, _, got = calibrate(
      jax.tree.map(jnp.multiply, scores, structure.Groups(*factors)), policy
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5),
      other.scores,
      plain.scores,
    )


def test_what_does_nothing_goes_first():
  """Channels that write nothing, however dear their score."""
  params, scores = conftest.make_params(CFG), conftest.make_scores(CFG)
  idle = params.replace(
    layers=params.layers.replace(w_down=jnp.zeros_like(params.layers.w_down))
  )
  dear = scores.replace(ffn=1e6 * scores.ffn)
  prune, found, masks = calibrate(dear, params=idle)
  assert found['ffn']['change'] == 0
  assert np.asarray(prune.scores.ffn).max() < 1e-11
  assert masks.heads.all() and masks.stem.all()
  check_the_lowest_went(masks.ffn, scores.ffn)


def check_the_lowest_went(alive, scores):
  """Some of every layer, and none of it dearer than what stayed."""
  for mask, row in zip(np.asarray(alive), np.asarray(scores), strict=True):
    assert row[~mask].max() < row[mask].min()


def test_what_breaks_the_model_goes_last(monkeypatch):
  """Also where it costs nothing by its score; and a fall is no loss."""
  scores = conftest.make_scores(CFG)
  cheap = scores.replace(heads=0 * scores.heads, stem=1e-9 * scores.stem)
  for broken in (np.nan, np.inf):
    monkeypatch.setattr(
      steps, 'trial_losses', lambda *_, x=broken, **__: [2.0, x, 1.9, x]
    )
    prune, found, masks = calibrate(cheap, 'ragged')
    assert [found[t]['change'] for t in structure.TYPES] == [
      None, pytest.approx(-0.1), None,
    ]  # fmt: skip
    assert np.asarray(prune.scores.ffn).max() < 1e-11
    assert masks.heads.all() and masks.stem.all() and not masks.ffn.all()
    for t in ('heads', 'stem'):
      got, want = (getattr(x, t) for x in (prune.scores, cheap))
      assert np.isfinite(got).all() and np.asarray(got).min() >= 1e20
      if t == 'stem':
        np.testing.assert_array_equal(np.argsort(got), np.argsort(want))
    made = plan('ragged')
    price = pruning.prices(prune, made, ('heads', 'stem'))
    assert price['heads'] is price['stem'] is None and 0 < price['ffn'] < 1e-12


@pytest.mark.parametrize('changes', [(0.5, -0.1, 0.5), (None, None, 0.5)])
@pytest.mark.parametrize('policy', ['uniform', 'ragged'])
def test_a_type_keeps_its_order_whatever_its_trial_said(policy, changes):
  """Also after a shrink, which leaves the dearest at the lowest index."""
  drawn = conftest.make_scores(CFG)
  scores = jax.tree.map(lambda x: -jnp.sort(-x, axis=-1), drawn)
  prune = whole(scores)
  calibration = calibration_lib.Calibration(0.5)
  calibration.add(
    {
      t: {'groups': 1, 'change': c, 'score': 2.0}
      for t, c in zip(structure.TYPES, changes, strict=True)
    }
  )
  scaled = calibration.scaled(prune)
  target = int(0.7 * CFG.num_params())
  masks = pruning.select(scaled, plan(policy), target)
  gone = [t for t in structure.TYPES if not getattr(masks, t).all()]
  assert gone and ('ffn' in gone or changes[1] is None)
  for t in gone:
    # What stays stands in front.
    alive = np.atleast_2d(getattr(masks, t)).astype(int)
    assert (np.diff(alive, axis=-1) <= 0).all()


@pytest.mark.parametrize('policy', ['uniform', 'ragged'])
def test_what_is_worth_nothing_goes_first_by_a_trial_of_it_too(policy):
  """The zeros that fill a layer up stand at its end, and score exactly 0."""
  drawn = conftest.make_scores(CFG)
  scores = drawn.replace(ffn=drawn.ffn.at[:, -4:].set(0.0))
  calibration = calibration_lib.Calibration(0.5)
  calibration.add(
    {
      t: {'groups': 4, 'change': c, 'score': s}
      for t, c, s in zip(
        structure.TYPES, (0.5, 0.0, 0.5), (2.0, 0.0, 2.0), strict=True
      )
    }
  )
  # A channel is a column of gate and of up, and a row of down.
  target = CFG.num_params() - 4 * CFG.N * 3 * CFG.D
  masks = pruning.select(
    calibration.scaled(whole(scores)), plan(policy), target
  )
  assert masks.heads.all() and masks.stem.all()
  np.testing.assert_array_equal(masks.ffn, np.asarray(scores.ffn) > 0)


def test_rates_are_averages_over_the_prunes():
  """One trial is noisy; one that broke the model counts until the next."""
  scores, calibration = (
    conftest.make_scores(CFG),
    calibration_lib.Calibration(0.5),
  )
  prune = whole(scores)
  says = lambda *changes: {
    t: {'groups': 1, 'change': c, 'score': 2.0}
    for t, c in zip(structure.TYPES, changes, strict=True)
  }
  for changes, rates in (
    ((1.0, -1.0, 4.0), (0.5, 5e-13, 2.0)),
    ((3.0, 2.0, None), (3.5 / 3, 1.5 / 3, None)),
    ((0.0, 0.0, 0.0), (1.75 / 3.5, 0.75 / 3.5, 2 / 3)),
  ):
    calibration.add(says(*changes))
    scaled = calibration.scaled(prune).scores
    for t, rate in zip(structure.TYPES, rates, strict=True):
      score = np.asarray(getattr(scores, t))
      want = 1e20 * (1 + score / 2) if rate is None else score * rate
      np.testing.assert_allclose(getattr(scaled, t), want, rtol=1e-6)


def test_trials_compile_once_for_all_widths():
  programs = steps.trial_losses, selection._trials, calibration_lib._scaled
  calibrate(conftest.make_scores(CFG))
  compiled = [x._cache_size() for x in programs]
  for seed, share in ((1, 0.9), (2, 0.7), (3, 0.6)):
    calibrate(
      conftest.make_scores(CFG, seed),
      masks=conftest.make_masks(CFG, seed, uniform=True),
      share=share,
    )
  assert [x._cache_size() for x in programs] == compiled


def test_floors_are_kept_and_nothing_to_try_is_no_change():
  scores, (K, F, D) = conftest.make_scores(CFG), (1, 4, 8)
  smallest = dataclasses.replace(CFG, K=K, F=F, D=D).num_params()
  _, found, _ = calibrate(scores, share=smallest / CFG.num_params())
  assert [found[t]['groups'] for t in structure.TYPES] == [
    CFG.N * (CFG.K - K), CFG.N * (CFG.F - F), CFG.D - D,
  ]  # fmt: skip
  alive = structure.all_alive(CFG)
  masks = structure.Groups(
    heads=alive.heads.at[:, K:].set(False),
    ffn=alive.ffn.at[:, F:].set(False),
    stem=alive.stem.at[D:].set(False),
  )
  _, found, _ = calibrate(scores, masks=masks)
  assert all(x['groups'] == x['change'] == 0 for x in found.values())


def test_a_trial_takes_one_group_at_least():
  """Also where a prune is already at its size, or below it."""
  for share in (1.0, 1.2):
    _, found, _ = calibrate(conftest.make_scores(CFG), share=share)
    # One of every layer.
    groups = [found[t]['groups'] for t in structure.TYPES]
    assert groups == [CFG.N, CFG.N, 1]


def test_rates_are_finite_and_go_on_after_a_resume():
  change = lambda broken, score: {'groups': 1, 'change': broken, 'score': score}
  rates = calibration_lib.Calibration(0.5)
  rates.add(
    {
      'heads': change(None, 1e-20),
      'ffn': change(1.0, 2.0),
      'stem': change(None, 0.0),
    }
  )
  again = calibration_lib.Calibration(0.5, rates.record)
  assert again.record == rates.record
  scores = conftest.make_scores(CFG)
  scores = scores.replace(
    heads=scores.heads.at[:, 0].set(0.0), stem=1e9 * scores.stem
  )
  found = again.scaled(whole(scores)).scores
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
  assert np.asarray(found.heads).min() >= 1e20
