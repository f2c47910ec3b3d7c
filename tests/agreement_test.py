"""How near a runtime comes, measured and judged."""

import dataclasses

import numpy as np
import pytest

from effllm_jax import agreement
from effllm_jax import model
from effllm_jax import structure
from tests import conftest

CFG = conftest.make_config()


@pytest.fixture(scope='module', name='want')
def _want():
  params = conftest.make_params(CFG)
  masks = conftest.make_masks(CFG).replace(stem=structure.all_alive(CFG).stem)
  prompt = [int(i) for i in conftest.make_tokens(CFG)[0]]
  want = agreement.reference(params, masks, CFG, prompt)
  logits, _ = model.forward(params, masks, np.array([want.tokens]), CFG)
  np.testing.assert_allclose(want.logits_TV, logits[0], atol=1e-5)
  assert want.prompt == prompt
  return want


def test_continuation_is_greedy(want):
  assert len(want.continuation) == agreement.NEW_TOKENS
  likely = want.logits_TV[len(want.prompt) - 1 : -1].argmax(-1)
  assert want.continuation == likely.tolist()


def test_what_is_the_same_passes_every_level(want):
  # Log-probabilities, as llama.cpp gives them, are as good as logits.
  shifted = want.logits_TV - 3.0
  for have in (want.logits_TV, shifted):
    found = agreement.compare(want, have, want.continuation)
    assert found.relative < 1e-6 and abs(found.kl) < 1e-6
    assert found.top1 == 1.0 and found.greedy
    for level in agreement.LEVELS.values():
      agreement.check(found, level, 'it')


def test_divergence_is_that_of_the_distributions(want):
  noise = np.random.default_rng(0).normal(0, 0.3, want.logits_TV.shape)
  have = want.logits_TV + noise
  p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (want.logits_TV, have))
  p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
  found = agreement.compare(want, have, None)
  np.testing.assert_allclose(
    found.kl, (p * np.log(p / q)).sum(-1).mean(), rtol=1e-4
  )
  assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()


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
def test_what_is_further_away_is_refused(want, change, match):
  level = agreement.Level(relative=1e-4, kl=0.02, top1=0.9, greedy=True)
  fine = agreement.compare(want, want.logits_TV, want.continuation)
  agreement.check(fine, level, 'it')
  with pytest.raises(RuntimeError, match=match) as caught:
    agreement.check(dataclasses.replace(fine, **change), level, 'it')
  assert '\n' not in str(caught.value) and 'it differs' in str(caught.value)


def test_another_continuation_is_not_greedy(want):
  other = [*want.continuation[:-1], -1]
  assert not agreement.compare(want, want.logits_TV, other).greedy
  assert not agreement.compare(want, want.logits_TV, None).greedy
