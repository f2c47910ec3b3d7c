import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from effllm_jax import model
from effllm_jax import saliency
from effllm_jax import structure
from tests import conftest


def brute_force(term, cfg, params, *rest, masks=None) -> structure.Groups:
  """Walks every single weight; adds `term` to each group it belongs to.

  With masks only if all of these are alive.
  """
  scores = {
    'K': np.zeros((cfg.N, cfg.K)),
    'F': np.zeros((cfg.N, cfg.F)),
    'D': np.zeros(cfg.D),
  }

  def walk(letters, *leaves):
    values = term(*(np.asarray(x, np.float64) for x in leaves))
    if masks is not None:
      values = values * conftest.alive_entries(letters, values.shape, masks)
    for index in np.ndindex(values.shape):
      at = dict(zip(letters, index, strict=True))
      for letter in 'KFD':
        if letter in at:
          slot = (at[letter],) if letter == 'D' else (at['N'], at[letter])
          scores[letter][slot] += values[index]

  structure.map_axes(walk, params, *rest)
  return structure.Groups(scores['K'], scores['F'], scores['D'])


# The scores that are sums over weights, and the term of one weight.
TERMS = {
  'taylor1': (2, lambda w, g: np.abs(g * w)),
  'taylor2': (3, lambda w, g, h: np.abs(-g * w + 0.5 * h * w**2)),
  'obd': (2, lambda w, h: 0.5 * h * w**2),
  'magnitude': (1, np.abs),
}


@pytest.mark.parametrize('kind', TERMS)
def test_equals_a_walk_over_every_weight(cfg, kind):
  count, term = TERMS[kind]
  trees = [conftest.make_params(cfg, seed) for seed in range(count)]
  scale = ()
  if kind in ('taylor2', 'obd'):
    # A curvature is never negative.
    trees[-1] = jax.tree.map(np.square, trees[-1])
    scale = (1.0,)
  score = jax.jit(getattr(saliency, kind))
  whole = structure.all_alive(cfg)
  if kind in ('taylor1', 'taylor2'):
    # A gradient of 0 needs no mask.
    whole = None
  scores = score(*trees, *scale, masks=whole)
  conftest.check_close(scores, brute_force(term, cfg, *trees), 1e-5, 2e-5)
  assert {s.dtype for s in jax.tree.leaves(scores)} == {jnp.dtype('float32')}
  masks = conftest.make_masks(cfg)
  scores = score(*trees, *scale, masks=masks)
  want = brute_force(term, cfg, *trees, masks=masks)
  conftest.check_close(scores, want, 1e-5, 2e-5)


def test_a_group_sum_lets_its_terms_cancel(cfg):
  trees = [conftest.make_params(cfg, seed) for seed in range(2)]
  signed = brute_force(lambda w, g: g * w, cfg, *trees)
  scores = jax.jit(saliency.taylor1_group)(*trees)
  # A sum may cancel: what counts is the size of its terms.
  conftest.check_close(scores, jax.tree.map(np.abs, signed), 1e-5, 2e-5)


def test_fisher_is_the_squared_slope_of_a_mask(cfg):
  """A factor on what a group computes: its derivative, by autodiff."""
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  tokens = conftest.make_tokens(cfg, 2)

  # Not closed over: XLA would fold the constants.
  def loss(factor, params, masks, tokens):
    layers = params.layers
    wo = layers.wo * factor.heads[:, :, None, None, None] * factor.stem
    w_down = layers.w_down * factor.ffn[:, :, None] * factor.stem
    scaled = params.replace(
      embed=params.embed * factor.stem,
      layers=layers.replace(wo=wo, w_down=w_down),
      # What only reads the stem has no factor, though the matrix is the same.
      unembed=params.embed.T if cfg.tied else params.unembed,
    )
    return model.loss(scaled, masks, tokens, cfg)

  ones = jax.tree.map(lambda m: np.ones(m.shape, np.float32), masks)
  slopes = jax.jit(jax.grad(loss))(ones, params, masks, tokens)
  want = jax.tree.map(lambda x: 0.5 * 22 * np.square(x), slopes)
  _, grads = conftest.loss_and_grad(params, masks, tokens, cfg=cfg)
  scores = jax.jit(saliency.fisher, static_argnums=2)(params, grads, 22)
  conftest.check_close(scores, want, 1e-3, 1e-7)
  jax.tree.map(
    lambda s, m: np.testing.assert_array_equal(np.asarray(s)[~m], 0),
    scores,
    masks,
  )


def test_a_scale_of_the_curvature_is_one_of_its_entries():
  cfg = conftest.make_config()
  masks = conftest.make_masks(cfg)
  params, grads, squares = (conftest.make_params(cfg, s) for s in range(3))
  squares = jax.tree.map(np.square, squares)
  scaled = jax.tree.map(lambda v: np.float32(3) * v, squares)
  for kind, first in (('obd', ()), ('taylor2', (grads,))):
    score = jax.jit(getattr(saliency, kind))
    conftest.check_close(
      score(params, *first, squares, 3.0, masks),
      score(params, *first, scaled, 1.0, masks),
    )


def test_every_kind_but_four_is_a_sum_over_weights():
  """So that no kind is added without a test of its formula."""
  own = {'activation', 'random', 'taylor1_group', 'fisher'}
  # These two are the same functions of other estimates: see steps_test.
  same = {'taylor1_momentum', 'taylor2_micro'}
  assert set(saliency.KINDS) == TERMS.keys() | own | same


def test_low_precision_weights_are_summed_in_float32():
  cfg = conftest.make_config()
  params, grads = (
    jax.tree.map(
      lambda x: np.asarray(x).astype(jnp.bfloat16), conftest.make_params(cfg, s)
    )
    for s in (0, 1)
  )
  scores = jax.jit(saliency.taylor1)(params, grads)
  want = brute_force(TERMS['taylor1'][1], cfg, params, grads)
  conftest.check_close(scores, want, rtol=1e-5)


def random_taps(cfg, masks, batch=2, length=5) -> model.Taps:
  rng = np.random.default_rng(7)
  draw = lambda *shape: rng.standard_normal((*shape,))
  lead = (cfg.N, batch, length)
  alive = jax.tree.map(np.asarray, masks)
  taps = model.Taps(
    attn_in=draw(*lead, cfg.D) * alive.stem,
    heads=draw(*lead, cfg.K, cfg.G, cfg.H)
    * alive.heads[:, None, None, :, None, None],
    ffn_in=draw(*lead, cfg.D) * alive.stem,
    ffn=draw(*lead, cfg.F) * alive.ffn[:, None, None, :],
    final=draw(batch, length, cfg.D) * alive.stem,
  )
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), taps)


def members(cfg, masks) -> dict[str, int]:
  """Live weights of one live group, counted one by one."""
  ones = structure.map_axes(
    lambda letters, s: conftest.alive_entries(letters, s.shape, masks).astype(
      np.float32
    ),
    structure.shapes(cfg),
  )
  counts = brute_force(np.abs, cfg, ones)
  sizes = {
    t: np.unique(getattr(counts, t)[np.asarray(getattr(masks, t))])
    for t in structure.TYPES
  }
  assert all(len(size) == 1 for size in sizes.values())
  return {t: int(size[0]) for t, size in sizes.items()}


def test_activation_equals_a_walk_over_every_token(cfg):
  masks = conftest.make_masks(cfg)
  taps = random_taps(cfg, masks)
  t64 = jax.tree.map(lambda x: np.asarray(x, np.float64), taps)
  _, B, T, _ = t64.ffn.shape
  heads, ffn = np.zeros((cfg.N, cfg.K)), np.zeros((cfg.N, cfg.F))
  stem, readers = np.zeros(cfg.D), 2 * cfg.N + 1
  for b, t in np.ndindex(B, T):
    for n in range(cfg.N):
      for k in range(cfg.K):
        out = t64.heads[n, b, t, k]
        heads[n, k] += np.sqrt((out**2).sum() / (cfg.G * cfg.H)) / (B * T)
      ffn[n] += np.abs(t64.ffn[n, b, t]) / (B * T)
      stem += np.abs(t64.attn_in[n, b, t]) / (B * T * readers)
      stem += np.abs(t64.ffn_in[n, b, t]) / (B * T * readers)
    stem += np.abs(t64.final[b, t]) / (B * T * readers)
  size = members(cfg, masks)
  want = structure.Groups(
    heads * size['heads'], ffn * size['ffn'], stem * size['stem']
  )
  got = jax.jit(saliency.activation)(taps, conftest.make_params(cfg), masks)
  conftest.check_close(got, want, rtol=1e-5)
  jax.tree.map(lambda s, m: np.testing.assert_array_equal(s > 0, m), got, masks)


def test_activations_of_bfloat16_are_averaged_in_float32():
  cfg = conftest.make_config()
  masks, params = structure.all_alive(cfg), conftest.make_params(cfg)
  score = jax.jit(saliency.activation)
  taps = random_taps(cfg, masks)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), taps)
  same = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  got, want = (score(x, params, masks) for x in (half, same))
  conftest.check_close(got, want, rtol=1e-5)


def test_random_is_uniform_by_the_member(cfg):
  shapes = structure.shapes(cfg)
  masks = conftest.make_masks(cfg)
  draw = jax.jit(
    lambda seed: saliency.random(jax.random.key(seed), shapes, masks)
  )
  draws = [draw(s) for s in (0, 0, 1)]
  conftest.check_close(draws[0], draws[1], rtol=0, atol=0)
  size = members(cfg, masks)
  for name in structure.TYPES:
    first, _, other = (np.ravel(getattr(d, name)) for d in draws)
    assert (first != other).all()
    share = first / size[name]
    assert ((share >= 0) & (share < 1)).all()
    assert scipy.stats.kstest(share, 'uniform').pvalue > 1e-3
    shape = getattr(structure.group_shapes(cfg), name)
    assert getattr(draws[0], name).shape == shape


def test_dead_groups_score_zero_and_live_ones_do_not(cfg):
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  _, grads = conftest.loss_and_grad(
    params, masks, conftest.make_tokens(cfg), cfg=cfg
  )
  scores = jax.jit(saliency.taylor1)(params, grads)
  jax.tree.map(
    lambda s, m: np.testing.assert_array_equal(np.asarray(s) > 0, m),
    scores,
    masks,
  )


def test_a_taylor_score_predicts_the_change_of_the_loss():
  """Damping one group by (1 - e) changes the loss by at most e * score.

  To first order the change is -e * sum g w, and |sum| <= sum of ||.
  """
  cfg = conftest.make_config()
  params, tokens = conftest.make_params(cfg), conftest.make_tokens(cfg)
  params = jax.tree.map(np.asarray, params)
  masks = structure.all_alive(cfg)
  loss, grads = conftest.loss_and_grad(params, masks, tokens, cfg=cfg)
  scores = jax.jit(saliency.taylor1)(params, grads)
  step = 1e-2
  product = jax.tree.map(np.multiply, grads.layers, params.layers)

  def scaled(channel, by):
    scale = np.ones(cfg.F, np.float32)
    scale[channel] = by
    layers = params.layers.replace(
      w_gate=params.layers.w_gate * scale,
      w_up=params.layers.w_up * scale,
      w_down=params.layers.w_down * scale[:, None],
    )
    changed, _ = conftest.loss_and_grad(
      params.replace(layers=layers), masks, tokens, cfg=cfg
    )
    return float(changed)

  for channel in range(0, cfg.F, 5):
    change = scaled(channel, 1 - step) - float(loss)
    bound = step * float(np.asarray(scores.ffn)[:, channel].sum())
    assert abs(change) <= bound * 1.1 + 1e-5
    signed = sum(
      x[..., channel].sum()
      for x in (product.w_gate, product.w_up, product.w_down.swapaxes(1, 2))
    )
    assert change == pytest.approx(-step * signed, rel=0.02, abs=1e-6)


def test_average_equals_the_weighted_mean(cfg):
  decay, n = 0.8, 5
  average = jax.jit(saliency.average, static_argnums=3)
  seen = [conftest.make_scores(cfg, seed) for seed in range(n)]
  # The first score enters whole: what was there before does not matter.
  mean = jax.tree.map(lambda s: np.full(s.shape, 7.0, np.float32), seen[0])
  for count, scores in enumerate(seen):
    mean = average(mean, scores, np.int32(count), decay)
  weights = [decay ** (n - 1 - i) for i in range(n)]
  want = jax.tree.map(
    lambda *s: (
      sum(w * np.asarray(x) for w, x in zip(weights, s, strict=True))
      / sum(weights)
    ),
    *seen,
  )
  conftest.check_close(mean, want, rtol=1e-5)


def test_average_without_decay_keeps_the_last_score(cfg):
  old, new = conftest.make_scores(cfg, 0), conftest.make_scores(cfg, 1)
  conftest.check_close(saliency.average(old, new, jnp.int32(7), 0.0), new)


def test_random_scores_of_two_types_are_not_the_same_draw(cfg):
  masks = structure.all_alive(cfg)
  shapes = structure.shapes(cfg)
  scores = saliency.random(jax.random.key(0), shapes, masks)
  size = members(cfg, masks)
  drawn = [np.ravel(getattr(scores, t)) / size[t] for t in structure.TYPES]
  for i, first in enumerate(drawn):
    for other in drawn[:i]:
      n = min(len(first), len(other))
      assert not np.isclose(first[:n], other[:n]).any()
