"""What a run says of itself, from numbers alone; `train_test` has real runs."""

import math

import pytest

from effllm_jax import advice


def row(loss, ffn=1536.0, heads=3.0):
  return {'loss': loss, 'widths': {'heads': heads, 'ffn': ffn, 'stem': 576.0}}


def test_text_that_is_read_often_is_told():
  assert advice.epochs(400, 100) == []
  (line,) = advice.epochs(1_000, 100)
  assert line.startswith('1,000 tokens read 100 of text 10 times over')


def test_text_that_is_not_read_is_told():
  assert advice.unread([], 64) == []
  (line,) = advice.unread(['a', 'b c'], 64)
  assert "no window of 64 tokens: 'a', 'b c'; consider" in line
  (line,) = advice.unread(list('abcde'), 64)
  assert "tokens: 'a', 'b', 'c' and 2 more; consider" in line


def test_text_that_comes_again_in_the_same_order_is_told():
  reads = lambda seed, text, **weights: {
    'init': 'source', 'seed': seed, 'data': {'text': text, 'weights': weights},
  }  # fmt: skip
  config = reads(1, 'pypi', wiki=2.0)
  # New weights have read nothing.
  assert advice.same_order(config | {'init': 'random'}, config) == []
  (line,) = advice.same_order(config, reads(1, 'pypi', wiki=2.0))
  assert "has read 'pypi' in the order of seed 1 too" in line
  for before in (
    None, reads(0, 'pypi', wiki=2.0), reads(1, 'a', wiki=2.0), reads(1, 'pypi'),
  ):  # fmt: skip
    assert advice.same_order(config, before) == []


def test_a_repair_that_needed_more_damping_is_told():
  fits = {'attn_in': 0.0, 'heads': 1e-3, 'ffn_in': 0.1, 'ffn': math.inf}
  fits = {k: {'damping': [1e-3, v, 0.0]} for k, v in fits.items()}
  said = advice.damping(7, fits, 1e-3)
  assert len(said) == 2
  assert said[0] == 'repair after step 7: ffn_in needed damping 0.1'
  assert 'ffn found no damping that works' in said[1]


@pytest.mark.parametrize(
  ('rows', 'told'),
  [
    # What one batch may be above the others is no damage, nor is a loss that
    # rises where nothing was taken, or a step without a loss.
    ([row(3.0), row(3.1, ffn=1500), row(3.9)], None),
    ([row(3.0), row(3.1), row(6.0)], None),
    ([row(3.0), row(3.1, ffn=1500), row(None)], None),
    ([row(None), row(None, ffn=1500), row(6.0)], None),
    ([row(3.0)], None),
    ([row(3.0), row(3.2, heads=2, ffn=1500), row(6.0)], 'heads'),
    ([row(3.0), row(3.2, ffn=1500), row(6.0)], 'ffn'),
  ],
)
def test_damage_is_told_after_the_prune_that_did_it(rows, told):
  damage = advice.Damage()
  *before, last = (damage.add(x) for x in rows)
  assert not any(before)
  if told is None:
    assert last == []
    return
  (line,) = last
  assert line.startswith('the loss is 6.00 nats per token, after 3.10, since ')
  assert 'ffn 1536 -> 1500' in line
  kept = {'heads': 3, 'ffn': 1536}[told]
  assert f'consider --config.prune.floors.{told}={kept} or' in line
  # Once: the next rows are measured from here.
  assert damage.add(row(6.1)) == []
