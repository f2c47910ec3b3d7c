"""How near a runtime comes, measured and judged."""

import dataclasses

import numpy as np
import pytest

from effllm_jax import agreement
from effllm_jax import model
from effllm_jax import structure
from tests import conftest

CFG = conftest.make_config()
PROMPT = [int(i) for i in conftest.make_tokens(CFG)[0]]
LENGTH = len(PROMPT) + agreement.NEW_TOKENS


@pytest.fixture(scope='module', name='want')
def _want():
  params = conftest.make_params(CFG)
  masks = conftest.make_masks(CFG).replace(stem=structure.all_alive(CFG).stem)
  want = agreement.reference(params, masks, CFG, PROMPT)
  tokens = [int(i) for i in conftest.make_tokens(CFG, seed=1)[0]]
  logits, _ = model.forward(params, masks, np.array([tokens]), CFG)
  np.testing.assert_allclose(want.logits(tokens), logits[0], atol=1e-5)
  assert want.prompt == PROMPT
  return want


@pytest.fixture(scope='module', name='continuation')
def _continuation(want):
  """One token after another, from a pass over all before it."""
  tokens = list(PROMPT)
  while len(tokens) < LENGTH:
    # Zeros after the text change nothing before them: the model is causal.
    padded = tokens + [0] * (LENGTH - len(tokens))
    tokens.append(int(want.logits(padded)[len(tokens) - 1].argmax()))
  return tokens[len(PROMPT) :]


@pytest.fixture(scope='module', name='logits')
def _logits(want, continuation):
  return want.logits(PROMPT + continuation)


def test_a_runtime_goes_on_token_by_token(want, continuation):
  seen = []

  def read(new):
    seen.extend(new)
    padded = seen + [0] * (LENGTH - len(seen))
    return want.logits(padded)[len(seen) - 1]

  assert agreement.greedy(read, PROMPT) == continuation
  assert seen == PROMPT + continuation[:-1]


def test_what_is_the_same_passes_every_level(want, continuation, logits):
  # Log-probabilities, as llama.cpp gives them, are as good as logits.
  for have in (logits, logits - 3.0):
    found = agreement.compare(want, have, continuation)
    assert found.relative < 1e-6 and abs(found.kl) < 1e-6
    assert found.top1 == 1.0 and found.greedy
    for level in agreement.LEVELS.values():
      agreement.check(found, level, 'it')


def test_divergence_is_that_of_the_distributions(want, continuation, logits):
  have = logits + np.random.default_rng(0).normal(0, 0.3, logits.shape)
  p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (logits, have))
  p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
  found = agreement.compare(want, have, continuation)
  np.testing.assert_allclose(
    found.kl, (p * np.log(p / q)).sum(-1).mean(), rtol=1e-4
  )
  assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()


def test_a_small_divergence_is_not_lost_in_rounding(want, continuation, logits):
  """Of noise e it is half of its variance: below 0 as a float32 sums it."""
  exact = np.asarray(logits, np.float64)
  noise = np.random.default_rng(0).normal(0, 1e-5, logits.shape)
  p = np.exp(exact - exact.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  variance = (p * noise**2).sum(-1) - (p * noise).sum(-1) ** 2
  found = agreement.compare(want, exact + noise, continuation)
  np.testing.assert_allclose(found.kl, variance.mean() / 2, rtol=1e-3)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    ({'relative': 2e-4}, 'relative 0.0002'),
    ({'relative': float('nan')}, 'relative nan'),
    ({'kl': 0.5}, 'KL divergence 0.5'),
    ({'top1': 0.5}, 'equal top tokens 0.5'),
    ({'greedy': False}, 'greedy'),
  ],
)
def test_what_is_further_away_is_refused(
  want, continuation, logits, change, match
):
  level = agreement.Level(relative=1e-4, kl=0.02, top1=0.9, greedy=True)
  fine = agreement.compare(want, logits, continuation)
  agreement.check(fine, level, 'it')
  with pytest.raises(RuntimeError, match=match) as caught:
    agreement.check(dataclasses.replace(fine, **change), level, 'it')
  assert '\n' not in str(caught.value) and 'it differs' in str(caught.value)


@pytest.mark.parametrize('at', [0, agreement.NEW_TOKENS // 2, -1])
def test_another_continuation_is_not_greedy(want, continuation, at):
  """Though the runtime's own logits after it are ours."""
  other = list(continuation)
  other[at] = (other[at] + 1) % CFG.V
  found = agreement.compare(want, want.logits(PROMPT + other), other)
  assert found.relative == 0 and not found.greedy


def test_a_continuation_that_ends_early_is_not_greedy(want, continuation):
  for short in (continuation[:-1], []):
    found = agreement.compare(want, want.logits(PROMPT + short), short)
    assert found.relative == 0 and not found.greedy


def test_products_are_of_float32_on_every_platform():
  """Lowered for platforms that would round it by default."""
  args = (conftest.make_params(CFG), conftest.make_masks(CFG))
  args += (np.zeros((1, 8), np.int32), CFG)
  assert conftest.precisions(agreement._forward.trace(*args)) == {'HIGHEST'}
