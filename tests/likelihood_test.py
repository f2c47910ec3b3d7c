"""Batches of continuations against one plain pass for each of them."""

import jax
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax import likelihood
from effllm_jax import model
from tests import conftest

COMPUTE = model.Compute(remat='none')


def plain(params, masks, cfg, context, continuation):
  """Of one request, unpadded, in float64 from the logits on."""
  tokens = [*context, *continuation][-cfg.context - 1 :]
  logits_BTV, _ = conftest.forward(
    params, masks, np.asarray([tokens[:-1]], np.int32), cfg
  )
  logits_TV = np.asarray(logits_BTV[0], np.float64)[-len(continuation) :]
  logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
  nats = logits_TV[np.arange(len(continuation)), continuation].sum()
  return nats, (logits_TV.argmax(-1) == continuation).all()


def some_requests(cfg, lengths, seed=0):
  """Contexts and continuations of these lengths, in random tokens."""
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(0, cfg.V, n).tolist()
  return [(ids(a), ids(b)) for a, b in lengths]


@pytest.mark.parametrize('kernels', ['xla', 'bucket'])
def test_equals_a_plain_pass(kernels):
  cfg = conftest.make_config(context=48, tied=kernels == 'xla')
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  # Two lengths, for the plain passes; the last one loses 17 tokens.
  requests = some_requests(cfg, [(11, 1), (1, 11), (4, 8), (47, 2), (61, 5)])
  # Two more answers to one question, and the greedy ones of another.
  requests += [(requests[0][0], [5]), (requests[0][0], [6])]
  question, answer = requests[0][0][:10], []
  for _ in range(2):
    tokens_BT = np.asarray([[*question, *answer]], np.int32)
    logits_BTV, _ = conftest.forward(params, masks, tokens_BT, cfg)
    answer.append(int(logits_BTV[0, -1].argmax()))
  requests += [(question, answer)]
  found = likelihood.score(
    params, masks, cfg, requests,
    compute=model.Compute(remat='none', kernels=kernels), batch_tokens=128,
  )  # fmt: skip
  for (nats, greedy), request in zip(found, requests, strict=True):
    want = plain(params, masks, cfg, *request)
    assert nats == pytest.approx(want[0], abs=2e-5)
    assert greedy == want[1]
  assert [greedy for _, greedy in found] == [False] * 7 + [True]


def test_order_and_compiles():
  """One compile for each width, whatever is asked; answers stay in order."""
  cfg = conftest.make_config(N=1, context=100)
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  rng = np.random.default_rng(0)
  seen = []

  def ask(requests, tokens=200):
    return likelihood.score(
      params, masks, cfg, requests, compute=COMPUTE, batch_tokens=tokens,
      say=lambda done, total: seen.append((done, total)),
    )  # fmt: skip

  lengths = [(int(n), 1 + int(n) % 7) for n in rng.integers(1, 140, 150)]
  requests = some_requests(cfg, lengths)
  before = likelihood._hidden._cache_size()
  found = ask(requests)
  # 32, 48, 64, 96 and the context.
  assert likelihood._hidden._cache_size() - before == 5
  assert seen[-1] == (150, 150) and seen == sorted(seen)
  order = rng.permutation(len(requests))
  again = ask([requests[i] for i in order])
  np.testing.assert_allclose(
    [x for x, _ in again], [found[i][0] for i in order], atol=1e-4
  )
  ask(some_requests(cfg, lengths[::2], seed=1))
  assert likelihood._hidden._cache_size() - before == 5
  # A batch smaller than a sequence is one sequence.
  np.testing.assert_allclose(
    [x for x, _ in ask(requests[:9], tokens=1)],
    [x for x, _ in found[:9]],
    atol=1e-4,
  )


def test_rows_are_shared():
  """Answers of one token to one question are one row."""
  cfg = conftest.make_config(N=1)
  seen = []
  likelihood.score(
    conftest.make_params(cfg), conftest.make_masks(cfg), cfg,
    [([1, 2, 3], [x]) for x in range(50)], compute=COMPUTE, batch_tokens=64,
    say=lambda done, total: seen.append((done, total)),
  )  # fmt: skip
  assert seen == [(1, 1)]


def test_widths():
  widths = [likelihood.padded(n, 100) for n in (1, 32, 33, 49, 65, 96, 97, 100)]
  assert widths == [32, 32, 48, 64, 96, 96, 100, 100]
  assert likelihood.padded(3, 16) == 16


def test_refused():
  cfg = conftest.make_config(N=1, context=8)
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  ask = lambda params, length: likelihood.score(
    params, masks, cfg, [([1], [2] * length)], compute=COMPUTE, batch_tokens=8
  )
  ask(params, 8)
  with pytest.raises(errors.InputError, match='an answer has 9 tokens, the co'):
    ask(params, 9)
  with pytest.raises(errors.InputError, match='answer of piqa has 9 tokens'):
    likelihood.score(
      params, masks, cfg, [([1], [2]), ([1], [2] * 9)],
      compute=COMPUTE, batch_tokens=8, tasks=['boolq', 'piqa'],
    )  # fmt: skip
  # There is no token before the first one that it could be predicted from.
  for request in (([], [2]), ([1], [])):
    with pytest.raises(ValueError, match='request 1 has an empty context or'):
      likelihood.score(
        params, masks, cfg, [([1], [2]), request],
        compute=COMPUTE, batch_tokens=8,
      )  # fmt: skip
  broken = jax.tree.map(lambda x: x * np.nan, params)
  with pytest.raises(errors.InputError, match='not finite'):
    ask(broken, 2)


def test_products_are_of_float32_on_every_platform():
  """Lowered for platforms that would round it by default."""
  cfg = conftest.make_config()
  params, masks = conftest.make_params(cfg), conftest.make_masks(cfg)
  tokens = np.zeros((1, 32), np.int32)
  final, points = np.zeros((1, 32, cfg.D), np.float32), np.zeros((4, 4), int)
  for traced in (
    likelihood._hidden.trace(params, masks, tokens, cfg, COMPUTE),
    likelihood._score.trace(params, final, points, COMPUTE),
  ):
    assert conftest.precisions(traced) == {'HIGHEST'}
