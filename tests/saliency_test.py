import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import saliency
from effllm_jax import structure
from tests import conftest


def brute_force(params, grads, cfg) -> structure.Groups:
  """Walks every single weight and adds |g w| to each group it belongs to."""
  scores = {
    'K': np.zeros((cfg.N, cfg.K)),
    'F': np.zeros((cfg.N, cfg.F)),
    'D': np.zeros(cfg.D),
  }

  def walk(letters, w, g):
    product = np.abs(np.asarray(w, np.float64) * np.asarray(g, np.float64))
    for index in np.ndindex(product.shape):
      at = dict(zip(letters, index, strict=True))
      for letter in 'KFD':
        if letter in at:
          slot = (at[letter],) if letter == 'D' else (at['N'], at[letter])
          scores[letter][slot] += product[index]

  structure.map_axes(walk, params, grads)
  return structure.Groups(scores['K'], scores['F'], scores['D'])


def test_equals_a_walk_over_every_weight(cfg):
  params, grads = conftest.make_params(cfg), conftest.make_params(cfg, seed=1)
  scores = jax.jit(saliency.taylor1)(params, grads)
  conftest.check_close(scores, brute_force(params, grads, cfg), rtol=1e-5)
  assert {s.dtype for s in jax.tree.leaves(scores)} == {jnp.dtype('float32')}


def test_dead_groups_score_zero_and_live_ones_do_not(cfg):
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  _, grads = conftest.loss_and_grad(
    params, masks, conftest.make_tokens(cfg), cfg=cfg
  )
  scores = saliency.taylor1(params, grads)
  jax.tree.map(
    lambda s, m: np.testing.assert_array_equal(np.asarray(s) > 0, m),
    scores,
    masks,
  )


def test_a_taylor_score_predicts_the_change_of_the_loss():
  """Damping one group by (1 - e) changes the loss by at most e * score.

  To first order the change is e * |sum g w|, and |sum| <= sum of ||.
  """
  cfg = conftest.make_config()
  params, tokens = conftest.make_params(cfg), conftest.make_tokens(cfg)
  masks = structure.all_alive(cfg)
  loss, grads = conftest.loss_and_grad(params, masks, tokens, cfg=cfg)
  scores = saliency.taylor1(params, grads)
  step = 1e-2
  for channel in range(0, cfg.F, 5):
    scale = jnp.ones(cfg.F).at[channel].set(1 - step)
    layers = params.layers.replace(
      w_gate=params.layers.w_gate * scale,
      w_up=params.layers.w_up * scale,
      w_down=params.layers.w_down * scale[:, None],
    )
    damped, _ = conftest.loss_and_grad(
      params.replace(layers=layers), masks, tokens, cfg=cfg
    )
    bound = step * float(scores.ffn[:, channel].sum())
    assert abs(float(damped - loss)) <= bound * 1.1 + 1e-5


def test_average_equals_the_weighted_mean(cfg):
  decay, n = 0.8, 5
  seen = [conftest.make_scores(cfg, seed) for seed in range(n)]
  mean = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan), seen[0])
  # The first score enters whole: what was there before does not matter.
  mean = jax.tree.map(jnp.zeros_like, mean)
  for count, scores in enumerate(seen):
    mean = saliency.average(mean, scores, jnp.int32(count), decay)
  weights = [decay ** (n - 1 - i) for i in range(n)]
  want = jax.tree.map(
    lambda *s: (
      sum(w * x for w, x in zip(weights, s, strict=True)) / sum(weights)
    ),
    *seen,
  )
  conftest.check_close(mean, want, rtol=1e-5)


def test_average_without_decay_keeps_the_last_score(cfg):
  old, new = conftest.make_scores(cfg, 0), conftest.make_scores(cfg, 1)
  conftest.check_close(saliency.average(old, new, jnp.int32(7), 0.0), new)
