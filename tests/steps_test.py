import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import model
from effllm_jax import saliency
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure
from tests import conftest

COMPUTE = model.Compute(remat=False)


def make_state(cfg, tx, masks=None):
  state = state_lib.fresh_state(conftest.make_params(cfg), cfg, tx)
  if masks is not None:
    state = state.replace(prune=state.prune.replace(masks=masks))
  return state


@pytest.fixture(scope='module', name='tx')
def _tx():
  rate = steps.learning_rate('wsd', 1e-2, 1e-4, 2, 4, 12)
  return steps.optimizer(rate, 0.9, 0.95, 0.1, 1.0)


RECIPE = steps.Recipe(
  compute=COMPUTE,
  saliency='taylor1',
  decay=0.5,
  b1=0.9,
  b2=0.95,
  clip=1.0,
  distill=0.0,
  temperature=1.0,
  top_k=8,
)


def step(state, tokens, cfg, tx, score=True, teacher=None, **changes):
  return steps.train_step(
    state,
    tokens,
    teacher,
    cfg=cfg,
    tx=tx,
    recipe=dataclasses.replace(RECIPE, **changes),
    score=score,
  )


def test_masks_do_not_retrace_and_dead_groups_keep_score_zero(tx):
  """Invariants 3 and 6."""
  cfg = conftest.make_config()
  state = make_state(cfg, tx)
  tokens = conftest.make_tokens(cfg)[None]
  before = None
  for seed in range(4):
    masks = conftest.make_masks(cfg, seed)
    state = state.replace(prune=state.prune.replace(masks=masks))
    state, numbers = step(state, tokens, cfg, tx)
    before = before or steps.train_step._cache_size()
  assert steps.train_step._cache_size() == before
  assert int(state.step) == 4
  assert float(numbers['loss']) > 0


def test_scores_come_from_the_training_gradient(tx):
  cfg = conftest.make_config()
  masks = conftest.make_masks(cfg)
  state = make_state(cfg, tx, masks)
  tokens = conftest.make_tokens(cfg, 4)
  params = jax.tree.map(jnp.copy, state.params)
  loss, grads = conftest.loss_and_grad(params, masks, tokens, cfg=cfg)
  # As two micro-batches: the same mean gradient, the same scores.
  state, numbers = step(state, tokens.reshape(2, 2, -1), cfg, tx)
  conftest.check_close(
    state.prune.scores, saliency.taylor1(params, grads), 1e-3, 1e-6
  )
  np.testing.assert_allclose(numbers['loss'], loss, rtol=1e-5)
  assert int(state.prune.count) == 1
  for name in structure.TYPES:
    scores = np.asarray(getattr(state.prune.scores, name))
    dead = ~np.asarray(getattr(state.prune.masks, name))
    assert dead.any()
    assert (scores[dead] == 0).all()


def test_accumulation_equals_one_large_batch(tx):
  cfg = conftest.make_config()
  tokens = conftest.make_tokens(cfg, 6)
  one, _ = step(make_state(cfg, tx), tokens[None], cfg, tx)
  three, _ = step(make_state(cfg, tx), tokens.reshape(3, 2, -1), cfg, tx)
  conftest.check_close(one.params, three.params, 1e-3, 1e-4)


def test_without_scoring_the_update_is_the_same(tx):
  cfg = conftest.make_config()
  tokens = conftest.make_tokens(cfg)[None]
  scored, _ = step(make_state(cfg, tx), tokens, cfg, tx)
  plain, _ = step(make_state(cfg, tx), tokens, cfg, tx, score=False)
  conftest.check_close(scored.params, plain.params, 1e-5, 1e-6)
  assert int(plain.prune.count) == 0


def test_training_lowers_the_loss(tx):
  cfg = conftest.make_config()
  tokens = conftest.make_tokens(cfg, 4)[None]
  state = make_state(cfg, tx)
  losses = []
  for _ in range(12):
    state, numbers = step(state, tokens, cfg, tx)
    losses.append(float(numbers['loss']))
  assert losses[-1] < 0.9 * losses[0]


def test_norm_scales_are_not_decayed():
  cfg = conftest.make_config()
  tx = steps.optimizer(lambda _: 0.1, 0.9, 0.95, 0.5, 1.0)
  params = conftest.make_params(cfg)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zero, tx.init(params), params)
  conftest.check_close(updates.final_norm, zero.final_norm)
  conftest.check_close(updates.layers.ffn_norm, zero.layers.ffn_norm)
  conftest.check_close(updates.layers.wq, -0.05 * params.layers.wq)


def test_learning_rates():
  wsd = steps.learning_rate('wsd', 1.0, 0.1, 4, 5, 20)
  np.testing.assert_allclose(
    [wsd(s) for s in (0, 1, 3, 13, 14, 19)],
    [0.25, 0.5, 1, 1, 1, 0.1],
    rtol=1e-6,
  )
  cosine = steps.learning_rate('cosine', 1.0, 0.1, 4, 0, 20)
  np.testing.assert_allclose(
    [cosine(s) for s in (0, 3, 11, 19)], [0.25, 1, 0.55, 0.1], rtol=1e-6
  )
  with pytest.raises(ValueError, match='triangle'):
    steps.learning_rate('triangle', 1.0, 0.1, 4, 5, 20)


def test_sum_losses_counts_weighted_tokens_only():
  cfg = conftest.make_config()
  params, masks = conftest.make_params(cfg), structure.all_alive(cfg)
  tokens = conftest.make_tokens(cfg)
  weight = np.zeros((2, 11), np.float32)
  weight[0, 3] = weight[1, 10] = 1
  losses = model.token_losses(params, masks, tokens, cfg)
  got = steps.sum_losses(
    params, masks, tokens, weight, cfg=cfg, compute=COMPUTE
  )
  np.testing.assert_allclose(got, losses[0, 3] + losses[1, 10], rtol=1e-5)
