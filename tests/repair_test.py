"""Invariant 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import model_repair
from effllm_jax import repair
from tests import conftest

REPAIR = jax.jit(repair.repair)


def make_layer(seed, inputs=12, outputs=5, tokens=200):
  rng = np.random.default_rng(seed)
  mix = rng.standard_normal((inputs, inputs))
  x = rng.standard_normal((tokens, inputs)) @ mix
  keep = rng.permutation(inputs) >= inputs // 3
  w = rng.standard_normal((inputs, outputs))
  return x, w, keep


def output_change(x, before, after):
  """Mean squared change of an output vector, float64: what `Fit` measures."""
  return np.square(x @ (before - np.asarray(after, np.float64))).sum(-1).mean()


@pytest.mark.parametrize('seed', range(5))
def test_equals_the_closed_form_of_optimal_brain_surgeon(seed):
  x, w, keep = make_layer(seed)
  damping = 1e-2
  S = x.T @ x / len(x)
  H = S + damping * np.diag(S).mean() * np.eye(len(S))
  inverse = np.linalg.inv(H)
  want = w - inverse[:, ~keep] @ np.linalg.solve(
    inverse[np.ix_(~keep, ~keep)], w[~keep]
  )
  got, used = REPAIR(w, repair.gram(jnp.asarray(x)), keep, damping)
  np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)
  assert float(used.damping) == pytest.approx(damping)
  assert (np.asarray(got)[~keep] == 0).all()


def test_products_of_bfloat16_inputs_are_not_rounded():
  x = jnp.asarray(make_layer(0)[0], jnp.bfloat16)
  wide = np.asarray(x, np.float64)
  want = wide.T @ wide / len(wide)
  got = repair.gram(x)
  assert got.dtype == jnp.float32
  # Relative to the diagonal: others may cancel.
  np.testing.assert_allclose(got, want, atol=1e-6 * np.diag(want).max())


@pytest.mark.parametrize('damping', [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize('seed', range(3))
def test_the_layer_error_falls_never_rises_and_is_reported(seed, damping):
  x, w, keep = make_layer(seed)
  got, fit = REPAIR(w, repair.gram(jnp.asarray(x)), keep, damping)
  without = output_change(x, w, w * keep[:, None])
  assert output_change(x, w, got) <= without * (1 + 1e-5)
  if damping <= 1e-2:
    assert output_change(x, w, got) < 0.7 * without
  assert float(fit.error_without) == pytest.approx(without, rel=1e-4)
  # A difference of two numbers of the size of the first one, in float32.
  assert float(fit.error_with) == pytest.approx(
    output_change(x, w, got), rel=1e-3, abs=2e-5 * without
  )
  assert float(fit.error_with) <= float(fit.error_without)
  assert float(fit.damping) == pytest.approx(damping)


def test_the_fit_of_a_failed_repair_is_that_of_the_masked_matrix():
  x, w, keep = make_layer(2, tokens=4)
  x[:, 0] = 0
  got, fit = REPAIR(w, repair.gram(jnp.asarray(x)), keep, 0.0)
  without = output_change(x, w, w * keep[:, None])
  assert float(fit.damping) == np.inf
  assert float(fit.error_without) == pytest.approx(without, rel=1e-4)
  assert float(fit.error_with) == pytest.approx(without, rel=1e-4)
  assert output_change(x, w, got) == pytest.approx(without, rel=1e-4)


def test_nothing_removed_changes_nothing():
  x, w, keep = make_layer(0)
  w = jnp.asarray(w, jnp.float32)
  got, fit = REPAIR(w, repair.gram(jnp.asarray(x)), np.ones_like(keep), 1e-2)
  np.testing.assert_array_equal(got, w)
  assert float(fit.error_without) == float(fit.error_with) == 0


def test_inputs_that_are_always_zero_need_no_other_damping():
  """A block of zeros: there is nothing to repair, and no failure to report."""
  x, w, keep = make_layer(0)
  w = jnp.asarray(w, jnp.float32)
  got, fit = REPAIR(w, repair.gram(jnp.zeros(x.shape)), keep, 1e-2)
  np.testing.assert_array_equal(got, w * keep[:, None])
  assert float(fit.error_without) == float(fit.error_with) == 0
  assert float(fit.damping) == np.float32(1e-2)


def test_everything_removed_leaves_zeros_and_the_whole_error():
  x, w, keep = make_layer(0)
  got, fit = REPAIR(w, repair.gram(jnp.asarray(x)), np.zeros_like(keep), 1e-2)
  np.testing.assert_array_equal(got, np.zeros_like(w))
  want = output_change(x, w, np.zeros_like(w))
  assert float(fit.error_without) == pytest.approx(want, rel=1e-4)
  assert float(fit.error_with) == pytest.approx(want, rel=1e-4)


def test_an_input_that_is_a_sum_of_others_is_replaced_exactly():
  for seed in range(8):
    x, w, keep = make_layer(seed)
    x[:, ~keep] = x[:, keep][:, : (~keep).sum()] * 2 + x[:, keep][:, -1:]
    got, fit = REPAIR(w, repair.gram(jnp.asarray(x)), keep, 1e-6)
    assert output_change(x, w, got) < 1e-4 * output_change(
      x, w, w * keep[:, None]
    )
    # Less is left than rounding takes, which may take it below 0.
    assert float(fit.error_with) >= 0


def test_a_singular_gram_matrix_is_damped_and_never_a_nan():
  """Fewer tokens than inputs, and inputs that are always zero."""
  x, w, keep = make_layer(2, tokens=4)
  x[:, 0] = 0
  got, used = REPAIR(w, repair.gram(jnp.asarray(x)), keep, 0.0)
  assert np.isfinite(got).all()
  assert float(used.damping) == np.inf  # Ten times nothing is nothing.
  np.testing.assert_allclose(got, w * keep[:, None], rtol=1e-6)
  got, used = REPAIR(w, repair.gram(jnp.asarray(x)), keep, 1e-12)
  assert np.isfinite(got).all()
  assert 1e-12 < float(used.damping) < 1
  assert output_change(x, w, got) <= output_change(x, w, w * keep[:, None])


def test_damping_is_raised_tenfold_until_there_is_a_factor():
  """Where that takes 0.005 of the mean square; eight times and no further."""
  _, w, keep = make_layer(0)
  squares = np.ones(len(w), np.float32)
  squares[np.argmax(keep)] = -0.005
  for asked, want in (
    (0.1, 0.1), (1e-3, 1e-2), (1e-10, 1e-2), (1e-11, np.inf)
  ):  # fmt: skip
    _, used = REPAIR(w, jnp.diag(squares), keep, asked)
    assert float(used.damping) == pytest.approx(want, rel=1e-5), asked


def check_choice(x, w, keep):
  """Against all candidates in float64, fitted to the first half of the tokens.

  The second half decides.
  """
  fitted, others = np.split(x, 2)
  errors = [
    np.square(others @ (conftest.refitted(w, fitted, keep, x) - w)).sum()
    for x in repair.CANDIDATES
  ]
  grams = [repair.gram(jnp.asarray(part)) for part in (fitted, others)]
  got = jax.jit(repair.choose)(w, *grams, keep)
  assert float(got) == pytest.approx(repair.CANDIDATES[np.argmin(errors)])


@pytest.mark.parametrize('tokens', [6, 12, 30, 300])
@pytest.mark.parametrize('seed', range(4))
def test_the_damping_that_serves_other_tokens_best_is_chosen(seed, tokens):
  check_choice(*make_layer(seed, tokens=2 * tokens))


@pytest.mark.parametrize('removed', [1, 64, 65, 256, 257])
def test_few_removed_inputs_choose_as_many_do(removed):
  """On more outputs than are looked at; without the last one all are 0."""
  x, w, _ = make_layer(removed, inputs=280, outputs=270, tokens=300)
  keep = np.random.default_rng(0).permutation(280) >= removed
  w[np.flatnonzero(~keep)[:-1]] = 0
  check_choice(x, w, keep)


@pytest.mark.parametrize('removed', [0, 1, 64])
def test_fewer_columns_have_the_same_products_of_rows(removed):
  w = np.random.default_rng(removed).standard_normal((160, 150))
  gone = np.random.default_rng(0).permutation(160) < removed
  w[~gone] = 0
  narrow = jax.jit(repair._narrowed, static_argnums=2)
  got = np.asarray(narrow(jnp.asarray(w, jnp.float32), gone, 64))
  assert got.shape == (160, 64)
  np.testing.assert_array_equal(got[~gone], 0)
  np.testing.assert_allclose(got @ got.T, w @ w.T, atol=1e-4 * 150)


def test_few_tokens_choose_more_damping():
  few, many = (
    [
      float(repair.choose(w, *(repair.gram(half) for half in halves), keep))
      for x, w, keep in (make_layer(seed, tokens=tokens) for seed in range(20))
      for halves in [np.split(jnp.asarray(x), 2)]
    ]
    for tokens in (12, 2000)
  )
  assert np.median(many) < 0.1
  assert np.median(few) >= 10 * np.median(many)


def test_a_single_micro_batch_chooses_nothing():
  cfg = conftest.make_config()
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  with pytest.raises(ValueError, match='at least two'):
    model_repair.repair_model(
      params, masks, masks, np.zeros((1, 2, 8), np.int32), cfg, 0.0
    )


def test_a_damping_without_a_factor_is_not_chosen():
  """Where the least that has one is 0.01 of the mean square."""
  _, w, keep = make_layer(0)
  squares = np.ones(len(w), np.float32)
  squares[np.argmax(keep)] = -0.005
  got = repair.choose(w, jnp.diag(squares), jnp.eye(len(w)), keep)
  assert float(got) == pytest.approx(0.01)


def test_one_compile_for_every_mask():
  x, w, _ = make_layer(3)
  gram = repair.gram(jnp.asarray(x))
  REPAIR(w, gram, np.ones(12, bool), 1e-2)
  size = REPAIR._cache_size()
  for count in range(12):
    REPAIR(w, gram, np.arange(12) >= count, 1e-2)
  assert REPAIR._cache_size() == size


def test_no_product_is_rounded_on_an_accelerator():
  """TF32 and bfloat16 are coarser than what a small damping is for."""
  x, w, keep = make_layer(0)
  for function, arguments in (
    (repair.gram, (jnp.asarray(x),)),
    (repair.repair, (w, jnp.eye(len(w)), keep, 1e-2)),
  ):
    text = jax.jit(function).lower(*arguments).as_text()
    products = [line for line in text.splitlines() if 'dot_general' in line]
    assert products and all('[HIGHEST, HIGHEST]' in x for x in products)


def test_gram_is_the_mean_outer_product_of_the_taps():
  cfg = conftest.make_config()
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  _, taps = conftest.forward(
    params, masks, conftest.make_tokens(cfg), cfg=cfg, taps=True
  )
  x = np.asarray(taps.ffn[0], np.float64).reshape(-1, cfg.F)
  np.testing.assert_allclose(
    repair.gram(taps.ffn[0]), x.T @ x / len(x), rtol=1e-4, atol=1e-6
  )
