"""Prices and sizes as a run tells them, and what a shrink checks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import budgets
from effllm_jax import optimizers
from effllm_jax import pruning
from effllm_jax import shrink
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure
from tests import calibration_test
from tests import conftest

CFG = calibration_test.CFG


def test_a_price_is_per_unit_that_is_reported():
  """Per byte, not per sixteenth of one, in which bytes are counted."""
  alive = structure.all_alive(CFG)
  prune = state_lib.fresh_prune_state(CFG).replace(
    scores=conftest.make_scores(CFG)
  )
  made = calibration_test.plan('ragged')
  cost = budgets.stored_bytes(CFG, 'f16')
  by_bytes = pruning.prices(prune, dataclasses.replace(made, cost=cost))
  # Three weights of 2 bytes a stem channel.
  want = float(prune.scores.ffn.mean()) / (3 * 2 * CFG.D)
  assert by_bytes['ffn'] == pytest.approx(want, rel=1e-5)
  for t in structure.TYPES:
    gone = np.array(getattr(alive, t))
    gone.flat[0] = False
    saved = cost.reported(
      cost.live(alive) - cost.live(alive.replace(**{t: gone}))
    )
    if t == 'stem' and not made.rules.price_embedding:
      saved -= cost.reported(cost.form.unpriced_stem)
    want = float(getattr(prune.scores, t).mean()) / saved
    assert by_bytes[t] == pytest.approx(want, rel=1e-5)


def test_of_what_is_gone_there_is_no_price():
  masks = structure.all_alive(CFG)
  masks = masks.replace(heads=jnp.zeros_like(masks.heads))
  prune = state_lib.fresh_prune_state(CFG).replace(
    masks=masks, scores=conftest.make_scores(CFG)
  )
  found = pruning.prices(prune, calibration_test.plan('ragged'))
  assert found['heads'] is None and found['ffn'] > 0 and found['stem'] > 0


def test_until_the_last_shrink_widths_are_multiples():
  """Tiles may want them; then every width is real."""
  made = dataclasses.replace(
    calibration_test.plan('uniform'),
    quantum=structure.Groups(heads=1, ffn=16, stem=1),
    shrink_threshold=0.0,
  )
  masks = structure.all_alive(CFG)
  masks = masks.replace(ffn=masks.ffn.at[:, 9:].set(False))
  prunes = [step for step in range(1, made.steps + 1) if made.prunes(step)]
  *before, last = (pruning.shrunk(masks, CFG, made, step).F for step in prunes)
  assert before and set(before) == {16} and last == 9


def test_of_what_a_source_does_not_have_nothing_is_pruned():
  masks = structure.all_alive(CFG)
  masks = masks.replace(heads=jnp.zeros_like(masks.heads))
  prune = state_lib.PruneState(
    masks=masks, scores=masks, origin=masks, count=jnp.int32(0)
  )
  before = {'heads': 0.0, 'ffn': 2.0 * CFG.F, 'stem': float(CFG.D)}
  row = pruning.sizes(prune, CFG, calibration_test.plan('ragged'), 1, before)
  assert row['pruned'] == {'heads': 0.0, 'ffn': 0.5, 'stem': 0.0}


def shrunken(monkeypatch, before, after):
  """A shrink whose two losses are said to be these; what it asked them in."""
  tx = optimizers.optimizer(lambda _: 1e-3, 0.9, 0.95, 0.1, 1.0)
  state = state_lib.fresh_state(conftest.make_params(CFG), CFG, tx)
  masks = conftest.make_masks(CFG)
  state = state.replace(prune=state.prune.replace(masks=masks))
  small = shrink.shrunk_config(masks, CFG, structure.Groups(1, 1, 1))
  losses, precisions = iter((before, after)), []

  def loss(*_, **__):
    precisions.append(jax.config.jax_default_matmul_precision)
    return next(losses)

  monkeypatch.setattr(steps, 'batch_loss', loss)
  tokens = conftest.make_tokens(CFG)
  made = pruning.shrink(
    state, tokens, CFG, small, calibration_test.plan('uniform'), tx, 0
  )
  return made, precisions


@pytest.mark.parametrize('after', [2.001, 1.999, float('nan')])
def test_a_shrink_that_changes_the_loss_ends_the_run(monkeypatch, after):
  with pytest.raises(RuntimeError, match='shrink 0 changed the loss'):
    shrunken(monkeypatch, 2.0, after)


def test_a_shrink_may_round_the_loss(monkeypatch):
  (_, event, *_), precisions = shrunken(monkeypatch, 2.0, 2.0001)
  assert event.loss_after == 2.0001
  # A tensor core would round more than that.
  assert precisions == ['highest'] * 2


def test_the_last_prune_of_nothing_is_no_shrink():
  made = calibration_test.plan('uniform')
  last = next(s for s in range(1, made.steps + 1) if made.last_prune(s))
  assert pruning.shrunk(structure.all_alive(CFG), CFG, made, last) is None
