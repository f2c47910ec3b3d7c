import jax
import numpy as np
import optax
import pytest

from effllm_jax import optimizers
from tests import conftest


def first_update(tx, grads, params):
  """Updates and state of a new optimizer."""

  @jax.jit
  def update(grads, params):
    return tx.update(
      grads, tx.init(params), params, norm=optax.tree.norm(grads)
    )

  return update(grads, params)


def test_norm_scales_and_biases_are_not_decayed():
  cfg = conftest.make_config(qkv_bias=True, qk_norm=True)
  tx = optimizers.optimizer(lambda _: 0.1, 0.9, 0.95, 0.5, 1.0)
  params = jax.tree.map(np.asarray, conftest.make_params(cfg))
  zero = jax.tree.map(np.zeros_like, params)
  updates, _ = first_update(tx, zero, params)
  conftest.check_close(updates.final_norm, zero.final_norm)
  for name in ('ffn_norm', 'bq', 'bk', 'bv', 'q_norm', 'k_norm'):
    conftest.check_close(
      getattr(updates.layers, name), getattr(zero.layers, name)
    )
  conftest.check_close(updates.layers.wq, -0.05 * params.layers.wq)


@pytest.mark.parametrize('limit', [0.5, 2.0])
def test_clips_as_optax_does(limit):
  params = conftest.make_params(conftest.make_config())
  grads = jax.tree.map(lambda x: np.sin(37 * np.asarray(x)), params)
  scale = 1 / np.asarray(jax.jit(optax.tree.norm)(grads))
  grads = jax.tree.map(lambda g: g * scale, grads)
  clip = optax.clip_by_global_norm(limit)
  want, _ = jax.jit(lambda g: clip.update(g, clip.init(params)))(grads)
  tx = optimizers.optimizer(lambda _: 0.1, 0.9, 0.95, 0.0, limit)
  _, state = first_update(tx, grads, params)
  # Adam's first update has no length; its moment has.
  want = jax.tree.map(lambda x: 0.1 * np.asarray(x), want)
  conftest.check_close(optax.tree.get(state, 'mu'), want)


@pytest.mark.parametrize('share', [0.0, 0.25])
def test_the_embedding_gets_its_share_of_an_update(share):
  """And nothing else does: moments are those of a whole update."""
  cfg = conftest.make_config(tied=False)
  params = conftest.make_params(cfg)
  grads = jax.tree.map(lambda x: np.sin(37 * np.asarray(x)), params)

  def update(embedding):
    tx = optimizers.optimizer(lambda _: 0.1, 0.9, 0.95, 0.5, 1e9, embedding)
    return first_update(tx, grads, params)

  (whole, moments), (updates, same) = update(1.0), update(share)
  assert float(np.abs(whole.embed).min()) > 0
  jax.tree.map(np.testing.assert_array_equal, same, moments)
  for name in ('embed', 'unembed'):
    conftest.check_close(
      getattr(updates, name), share * np.asarray(getattr(whole, name))
    )
    whole = whole.replace(**{name: getattr(updates, name)})
  jax.tree.map(np.testing.assert_array_equal, updates, whole)


def test_learning_rates():
  wsd = optimizers.learning_rate('wsd', 1.0, 0.1, 4, 5, 20)
  np.testing.assert_allclose(
    [wsd(s) for s in (0, 1, 3, 13, 14, 19)],
    [0.25, 0.5, 1, 1, 1, 0.1],
    rtol=1e-6,
  )
  stable = optimizers.learning_rate('wsd', 2.0, 0.1, 4, 0, 20)
  np.testing.assert_allclose(
    [stable(s) for s in (0, 3, 19)], [0.5, 2, 2], rtol=1e-6
  )
  cosine = optimizers.learning_rate('cosine', 2.0, 0.2, 4, 0, 20)
  np.testing.assert_allclose(
    [cosine(s) for s in (0, 3, 11, 19)], [0.5, 2, 1.1, 0.2], rtol=1e-6
  )
  # Of a run that is all warm-up.
  rise = optimizers.learning_rate('cosine', 2.0, 0.2, 20, 0, 20)
  np.testing.assert_allclose(
    [rise(s) for s in (0, 9, 19)], [0.1, 1, 2], rtol=1e-6
  )
  with pytest.raises(ValueError, match='triangle'):
    optimizers.learning_rate('triangle', 1.0, 0.1, 4, 5, 20)
