"""What many tests need: small models, random masks and scores."""

import os

# Before jax is imported: tests never look for an accelerator.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import model
from effllm_jax import structure

# Multi-head and grouped-query, tied and untied, one to three layers.
CONFIGS = {
  'mha-tied-1': dict(K=3, G=1, tied=True, N=1),
  'mha-untied-2': dict(K=3, G=1, tied=False, N=2),
  'gqa-tied-2': dict(K=2, G=3, tied=True, N=2),
  'gqa-untied-3': dict(K=2, G=2, tied=False, N=3),
}


def make_config(**changes) -> structure.ModelConfig:
  """A small architecture; keyword arguments replace its fields."""
  fields = dict(
    V=61, D=16, N=2, K=2, G=2, H=4, F=20, context=128,
    rope_theta=1e4, norm_eps=1e-5, tied=True,
  )  # fmt: skip
  return structure.ModelConfig(**(fields | changes))


@pytest.fixture(params=list(CONFIGS), name='cfg')
def _cfg(request) -> structure.ModelConfig:
  return make_config(**CONFIGS[request.param])


def make_params(cfg, seed=0) -> structure.Params:
  """Parameters far from their initial values, norm scales included."""
  rng = np.random.default_rng(seed)

  def leaf(letters, shape):
    noise = rng.standard_normal(shape.shape) * 0.15
    scale = 1.0 if letters in ('D', 'ND') else 0.0
    return jnp.asarray(scale + noise, jnp.float32)

  return structure.map_axes(leaf, structure.shapes(cfg))


def make_scores(cfg, seed=0) -> structure.Groups:
  """Positive scores without ties."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda m: jnp.asarray(rng.uniform(0.1, 1.0, m.shape), jnp.float32),
    structure.all_alive(cfg),
  )


def make_masks(cfg, seed=0, uniform=False) -> structure.Groups:
  """Random masks; something of each type is dead, something alive.

  With `uniform` every layer keeps the same number of groups.
  """
  rng = np.random.default_rng(seed)

  def leaf(mask):
    rows = np.atleast_2d(np.ones(mask.shape, bool))
    width = rows.shape[-1]
    dead = rng.integers(1, max(width // 2, 2), len(rows))
    for row, count in zip(rows, dead, strict=True):
      row[rng.permutation(width)[: dead[0] if uniform else count]] = False
    return jnp.asarray(rows.reshape(mask.shape))

  return jax.tree.map(leaf, structure.all_alive(cfg))


def make_tokens(cfg, batch=2, length=12, seed=0):
  """Random token ids, int32 [batch, length]."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, cfg.V, (batch, length)), jnp.int32)


forward = jax.jit(model.forward, static_argnames=('cfg', 'compute', 'taps'))
loss_and_grad = jax.jit(
  jax.value_and_grad(model.loss), static_argnames=('cfg', 'compute')
)


def close(a, b, rtol=1e-5, atol=1e-6):
  """Asserts that two trees are equal to tolerance, naming the leaf."""
  jax.tree_util.tree_map_with_path(
    lambda path, x, y: np.testing.assert_allclose(
      x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
    ),
    a,
    b,
  )
