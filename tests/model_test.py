import functools
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import kernels
from effllm_jax import model
from effllm_jax import shrink
from effllm_jax import structure
from tests import conftest

# For what no remat changes, which makes a program longer.
KEPT = model.Compute(remat='none')


def reference_logits(params, tokens_T, cfg):
  """The same decoder in float64 numpy, one token and one head at a time."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  T = len(tokens_T)
  x = p.embed[np.asarray(tokens_T)]

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * scale

  def frequency(i):
    plain = cfg.rope_theta ** (-2 * i / cfg.H)
    if cfg.rope_scaling is None:
      return plain
    s = cfg.rope_scaling
    wave = 2 * np.pi / plain
    if wave < s.original_context / s.high_freq_factor:
      return plain
    if wave > s.original_context / s.low_freq_factor:
      return plain / s.factor
    fast = s.original_context / wave - s.low_freq_factor
    fast /= s.high_freq_factor - s.low_freq_factor
    return fast * plain + (1 - fast) * plain / s.factor

  def project(h, matrix, bias, scale):
    out = h @ matrix + (0 if bias is None else bias)
    return out if scale is None else norm(out, scale)

  def rotate(x, t):
    half = cfg.H // 2
    out = x.copy()
    for i in range(half):
      angle = t * frequency(i)
      a, b = x[i], x[i + half]
      out[i] = a * np.cos(angle) - b * np.sin(angle)
      out[i + half] = b * np.cos(angle) + a * np.sin(angle)
    return out

  for n in range(cfg.N):
    w = jax.tree.map(lambda leaf, n=n: leaf[n], p.layers)
    h = norm(x, w.attn_norm)
    for k in range(cfg.K):
      bq, bk, bv = (None if b is None else b[k] for b in (w.bq, w.bk, w.bv))
      keys = [
        rotate(project(h[t], w.wk[:, k], bk, w.k_norm), t) for t in range(T)
      ]
      values = [project(h[t], w.wv[:, k], bv, None) for t in range(T)]
      for g in range(cfg.G):
        for t in range(T):
          of_group = None if bq is None else bq[g]
          q = rotate(project(h[t], w.wq[:, k, g], of_group, w.q_norm), t)
          score = np.array([q @ keys[s] for s in range(t + 1)]) / cfg.H**0.5
          weight = np.exp(score - score.max())
          weight /= weight.sum()
          out = sum(weight[s] * values[s] for s in range(t + 1))
          x[t] = x[t] + out @ w.wo[k, g]
    h = norm(x, w.ffn_norm)
    gate = h @ w.w_gate
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w.w_up)) @ w.w_down
  out = norm(x, p.final_norm)
  return out @ (p.embed.T if p.unembed is None else p.unembed)


# Of the four pairs of channels two keep their frequency, one is mixed, one is
# stretched. No class that is read has biases and norms at once.
EVERYTHING = dict(
  H=8, rope_theta=100.0, qkv_bias=True, qk_norm=True,
  rope_scaling=structure.RopeScaling(4.0, 1.0, 4.0, 100),
)  # fmt: skip


# Qwen2 and Qwen3, each by itself.
BIASES = dict(K=2, G=3, tied=False, N=2, qkv_bias=True)
NORMS = dict(K=2, G=2, tied=True, N=3, qk_norm=True)


@pytest.mark.parametrize(
  'changes', [*conftest.CONFIGS.values(), BIASES, NORMS, EVERYTHING]
)
def test_equals_a_float64_reference(changes):
  cfg = conftest.make_config(**changes)
  params = conftest.make_params(cfg)
  tokens = conftest.make_tokens(cfg)
  logits, _ = conftest.forward(
    params, structure.all_alive(cfg), tokens, cfg=cfg
  )
  assert logits.dtype == jnp.float32
  for row, want in zip(logits, tokens, strict=True):
    np.testing.assert_allclose(
      row, reference_logits(params, want, cfg), rtol=2e-4, atol=2e-4
    )


@pytest.mark.parametrize('seed', range(2))
def test_masked_equals_shrunk(cfg, seed):
  """Invariant 1: logits and gradients, and the loss, for any masks."""
  params = conftest.make_params(cfg, seed)
  masks = conftest.make_masks(cfg, seed)
  scores = conftest.make_scores(cfg, seed)
  tokens = conftest.make_tokens(cfg)
  small = shrink.shrunk_config(masks, cfg, structure.Groups(1, 1, 1))
  kept = conftest.kept_indices(masks, scores, small)
  small_params = conftest.take_params(params, kept)
  small_masks = conftest.take_groups(masks, kept)
  structure.check_shapes(small_params, small)

  conftest.check_close(
    conftest.forward(params, masks, tokens, cfg=cfg)[0],
    conftest.forward(small_params, small_masks, tokens, cfg=small)[0],
    rtol=1e-4,
    atol=1e-4,
  )
  _, grad = conftest.loss_and_grad(params, masks, tokens, cfg=cfg, compute=KEPT)
  _, small_grad = conftest.loss_and_grad(
    small_params, small_masks, tokens, cfg=small, compute=KEPT
  )
  conftest.check_close(conftest.take_params(grad, kept), small_grad, 1e-3, 1e-5)


def test_dead_groups_have_exactly_zero_gradient(cfg):
  """Invariant 3, first half."""
  masks = conftest.make_masks(cfg)
  _, grads = conftest.loss_and_grad(
    conftest.make_params(cfg), masks, conftest.make_tokens(cfg), cfg=cfg
  )

  def check(letters, grad):
    for axis, letter in enumerate(letters):
      if letter not in structure.PRUNABLE:
        continue
      mask = np.asarray(getattr(masks, structure.PRUNABLE[letter]))
      # Bring the mask's axes to the front of the gradient.
      if mask.ndim == 1:
        dead = np.moveaxis(np.asarray(grad), axis, 0)[~mask]
      else:
        dead = np.moveaxis(np.asarray(grad), axis, 1)[~mask]
      assert (dead == 0).all(), (letters, letter)

  structure.map_axes(check, grads)


def test_dead_weights_do_not_matter(cfg):
  """NaN-free proof that nothing of a dead group reaches the output."""
  masks = conftest.make_masks(cfg)
  params = conftest.make_params(cfg)
  other = conftest.make_params(cfg, seed=1)
  tokens = conftest.make_tokens(cfg)

  def mix(letters, a, b):
    return np.where(conftest.alive_entries(letters, a.shape, masks), a, b)

  mixed = structure.map_axes(mix, params, other)
  np.testing.assert_array_equal(
    conftest.forward(params, masks, tokens, cfg=cfg)[0],
    conftest.forward(mixed, masks, tokens, cfg=cfg)[0],
  )


def test_weights_of_numpy_may_be_closed_over():
  cfg = conftest.make_config()
  params, masks = conftest.make_params(cfg), structure.all_alive(cfg)
  tokens = conftest.make_tokens(cfg)
  want, _ = conftest.forward(params, masks, tokens, cfg=cfg)
  held = jax.tree.map(np.asarray, params)
  logits = jax.jit(lambda x: model.forward(held, masks, x, cfg)[0])(tokens)
  conftest.check_close(logits, want)


def test_is_causal(cfg):
  """A logit depends on no later token, seen through the gradient."""
  params, tokens = conftest.make_params(cfg), conftest.make_tokens(cfg)
  masks = structure.all_alive(cfg)
  changed = tokens.at[0, 7].add(1) % cfg.V
  before = conftest.forward(params, masks, tokens, cfg=cfg)[0]
  after = conftest.forward(params, masks, changed, cfg=cfg)[0]
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (before[0, 7:] != after[0, 7:]).any(-1).all()
  # Nor on one of another text.
  np.testing.assert_array_equal(before[1], after[1])


def test_a_layer_may_lose_all_heads_or_all_channels(cfg):
  masks = structure.all_alive(cfg)
  masks = masks.replace(
    heads=masks.heads.at[0].set(False), ffn=masks.ffn.at[0].set(False)
  )
  params, tokens = conftest.make_params(cfg), conftest.make_tokens(cfg)
  _, taps = conftest.forward(params, masks, tokens, cfg=cfg, taps=True)
  _, grads = conftest.loss_and_grad(params, masks, tokens, cfg=cfg)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert np.abs(taps.heads[0]).max() == 0
  assert np.abs(taps.ffn[0]).max() == 0


def test_remat_changes_nothing(cfg):
  args = (
    conftest.make_params(cfg),
    conftest.make_masks(cfg),
    conftest.make_tokens(cfg),
  )
  kept, *recomputed = (
    conftest.loss_and_grad(*args, cfg=cfg, compute=model.Compute(remat=remat))
    for remat in ('none', 'dots', 'full')
  )
  for found in recomputed:
    conftest.check_close(kept, found, 1e-4, 1e-6)


def products(jaxpr):
  """How often a jaxpr multiplies by a weight: dots, loops and kernels."""
  count = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('while', 'pallas_call', 'mpmd_map'):
      count += 1
      continue
    if eqn.primitive.name == 'dot_general':
      # Those of attention are batched.
      count += not any(eqn.params['dimension_numbers'][1])
    count += sum(map(products, jax.extend.core.jaxprs_in_params(eqn.params)))
  return count


@functools.cache
def gradient(name, remat):
  """The jaxpr of a gradient, by an implementation."""
  cfg = conftest.make_config(D=64, H=32, F=128)
  compute = model.Compute(dtype='bfloat16', remat=remat, kernels=name)
  loss = functools.partial(model.loss, cfg=cfg, compute=compute)
  return jax.make_jaxpr(jax.grad(loss))(
    structure.shapes(cfg),
    structure.all_alive(cfg),
    jax.ShapeDtypeStruct((4, 65), jnp.int32),
  ).jaxpr


@pytest.mark.parametrize('name', kernels.IMPLEMENTATIONS)
def test_remat_of_dots_repeats_no_product_with_weights(name):
  none, dots, full = (
    products(gradient(name, remat)) for remat in ('none', 'dots', 'full')
  )
  assert dots == none < full


@pytest.mark.parametrize('name', kernels.IMPLEMENTATIONS)
def test_remat_of_dots_keeps_these_products_and_nothing_else(name):
  """Not those of every branch of a bucket, which were more than with 'none'."""

  def kept(name, remat):
    forward = next(
      x for x in gradient(name, remat).eqns if x.primitive.name == 'scan'
    )
    return sum(x.aval.size * x.aval.dtype.itemsize for x in forward.outvars)

  none, dots, full = (kept(name, remat) for remat in ('none', 'dots', 'full'))
  assert full < dots < none
  assert dots == kept('xla', 'dots')


@pytest.mark.parametrize('name', ['xla_loop', 'bucket'])
def test_kernels_change_nothing(cfg, name):
  """A mask for each layer, under scan and remat; gradients exactly zero too."""
  args = (
    conftest.make_params(cfg),
    conftest.make_masks(cfg),
    conftest.make_tokens(cfg),
  )
  (want, wants), (value, grads) = (
    conftest.loss_and_grad(*args, cfg=cfg, compute=model.Compute(kernels=k))
    for k in ('xla', name)
  )
  conftest.check_close(value, want, 1e-5)
  conftest.check_close(grads, wants, 1e-4, 1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), grads, wants
  )


def test_bfloat16_is_near_float32_and_keeps_float32_gradients(cfg):
  args = (
    conftest.make_params(cfg),
    conftest.make_masks(cfg),
    conftest.make_tokens(cfg),
  )
  exact, _ = conftest.loss_and_grad(*args, cfg=cfg, compute=KEPT)
  half = model.Compute(dtype='bfloat16')
  value, grads = conftest.loss_and_grad(*args, cfg=cfg, compute=half)
  assert value.dtype == jnp.float32
  assert abs(float(value) - float(exact)) < 0.05 * float(exact)
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  # What every product reads, the last one too.
  logits, taps = jax.eval_shape(
    lambda *xs: model.forward(*xs, cfg, half, taps=True), *args
  )
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(taps)} == {jnp.dtype('bfloat16')}


def test_taps_are_the_inputs_of_the_matrix_products(cfg):
  params = jax.tree.map(np.asarray, conftest.make_params(cfg))
  masks = jax.tree.map(np.asarray, conftest.make_masks(cfg))
  tokens = conftest.make_tokens(cfg)
  logits, taps = conftest.forward(params, masks, tokens, cfg=cfg, taps=True)
  unembed = params.embed.T if params.unembed is None else params.unembed
  conftest.check_close(taps.final @ unembed, logits, 1e-4, 1e-4)
  n = cfg.N - 1
  gate = taps.ffn_in[n] @ params.layers.w_gate[n]
  up = taps.ffn_in[n] @ params.layers.w_up[n]
  conftest.check_close(
    jax.nn.silu(gate) * up * masks.ffn[n], taps.ffn[n], 1e-4, 1e-4
  )
  for stem_input in (taps.attn_in, taps.ffn_in, taps.final):
    assert (np.asarray(stem_input)[..., ~np.asarray(masks.stem)] == 0).all()


def test_the_output_matrix_is_multiplied_in_the_compute_dtype():
  """All of its three products; its gradient is summed in float32."""
  cfg = conftest.make_config(V=509, D=24, N=1)
  params = conftest.make_params(cfg)
  masks = structure.all_alive(cfg)
  tokens = conftest.make_tokens(cfg, length=33)

  def loss(params, dtype):
    compute = model.Compute(dtype=dtype, remat='none')
    return model.token_losses(params, masks, tokens, cfg, compute).mean()

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  products = [
    line
    for line in grad.lower(params, 'bfloat16').as_text().splitlines()
    if 'dot_general' in line and f'{cfg.V}x' in line.replace('>', 'x')
  ]
  # Operands, then the result.
  types = [re.findall(r'x(bf16|f32)>', x.split(' : ')[-1]) for x in products]
  assert types == [['bf16', 'bf16', 'f32']] * 3
  exact, found = grad(params, 'float32'), grad(params, 'bfloat16')
  norm = np.linalg.norm
  for name in ('embed', 'final_norm'):
    want, got = (np.asarray(getattr(x, name)) for x in (exact, found))
    assert got.dtype == np.float32
    assert (got.astype(jnp.bfloat16) != got).any()
    assert norm(got - want) < 0.02 * norm(want), name
