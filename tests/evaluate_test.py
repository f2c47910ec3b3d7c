import functools
import math

import jax
import numpy as np
import pytest

from effllm_jax import evaluate
from effllm_jax import heldout as heldout_lib
from effllm_jax import model
from effllm_jax import structure
from tests import conftest

CFG = conftest.make_config()


def make_held(n, num_bytes, seed=0) -> heldout_lib.HeldOut:
  windows = np.asarray(conftest.make_tokens(CFG, n, 9, seed))
  weight = np.random.default_rng(seed).integers(0, 2, (n, 8))
  return heldout_lib.HeldOut(windows, weight.astype(np.float32), num_bytes)


def test_is_the_weighted_loss_per_byte_in_bits():
  params, masks = conftest.make_params(CFG), conftest.make_masks(CFG)
  held = {'a': make_held(5, 70), 'b': make_held(2, 11, seed=1)}
  losses = jax.jit(functools.partial(model.token_losses, cfg=CFG))
  nats = {
    name: (np.asarray(losses(params, masks, h.windows)) * h.weight).sum()
    for name, h in held.items()
  }
  for batch_size in (1, 2, 8):
    got = evaluate.bits_per_byte(
      params, masks, held, CFG, model.Compute(), batch_size
    )
    assert got['domains'] == pytest.approx(
      {'a': nats['a'] / 70 / math.log(2), 'b': nats['b'] / 11 / math.log(2)},
      rel=1e-4,
    )
    assert got['bits_per_byte'] == pytest.approx(
      sum(nats.values()) / 81 / math.log(2), rel=1e-4
    )
    tokens = sum(h.weight.sum() for h in held.values())
    assert got['heldout_tokens'] == tokens
    assert got['heldout_bytes'] == 81
    assert got['nats_per_token'] == pytest.approx(
      sum(nats.values()) / tokens, rel=1e-4
    )


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary():
  zero = conftest.make_params(CFG)
  zero = zero.replace(embed=0 * zero.embed)
  windows, weight = np.zeros((2, 9), np.int32), np.ones((2, 8), np.float32)
  held = {'a': heldout_lib.HeldOut(windows, weight, num_bytes=16)}
  got = evaluate.bits_per_byte(
    zero, structure.all_alive(CFG), held, CFG, model.Compute(), 2
  )
  assert got['bits_per_byte'] == pytest.approx(math.log2(CFG.V), rel=1e-5)
