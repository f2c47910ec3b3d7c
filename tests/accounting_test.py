import dataclasses

import jax
import numpy as np
import pytest

from effllm_jax import accounting
from effllm_jax import model
from effllm_jax import structure
from tests import conftest

CFG = conftest.make_config(V=64, D=16, N=2, K=2, G=2, H=4, F=24)
T = 8


def by_hand(cfg, tokens):
  """A forward pass, one matrix product after the other."""
  query, key = cfg.K * cfg.G * cfg.H, cfg.K * cfg.H
  layer = 0
  for rows, columns in (
    (cfg.D, query), (cfg.D, key), (cfg.D, key), (query, cfg.D),
    (cfg.D, cfg.F), (cfg.D, cfg.F), (cfg.F, cfg.D),
  ):  # fmt: skip
    layer += 2 * rows * columns * tokens
  # Token t sees t + 1 keys; scores and values.
  seen = tokens // T * sum(t + 1 for t in range(T))
  layer += 2 * 2 * query * seen
  return cfg.N * layer, 2 * cfg.D * cfg.V * tokens


def meter(remat='none', tokens=32):
  return accounting.Meter(T, tokens, remat)


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_a_step_is_three_forward_passes_and_adam(remat):
  layers, output = by_hand(CFG, 32)
  spent = meter(remat)
  spent.step(CFG, scores=False, teacher=None)
  again = {'none': 0, 'dots': 0, 'full': layers}[remat]
  assert spent.spent == {
    'train': 3 * (layers + output) + again + 12 * CFG.num_params(),
    'score': 0,
    'repair': 0,
    'teacher': 0,
  }


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_kernels_stop_at_the_last_live_group(remat):
  """As of a model whose layers are as wide as that, in half of which it is."""
  reach = {'heads': np.array([1, 2]), 'ffn': np.array([8, 24])}
  spent, dense = meter(remat), meter(remat)
  spent.step(CFG, scores=False, teacher=None, extents=reach)
  dense.step(CFG, scores=False, teacher=None)
  narrow = dataclasses.replace(CFG, K=1, F=8)
  less = (by_hand(CFG, 32)[0] - by_hand(narrow, 32)[0]) // CFG.N
  again = {'none': 0, 'dots': 0, 'full': less}[remat]
  assert dense.spent['train'] - spent.spent['train'] == 3 * less + again


def test_scores_and_teachers_are_counted_apart():
  teacher = conftest.make_config(V=64, D=32, N=3, K=4, G=1, H=8, F=48)
  spent = meter()
  spent.step(CFG, scores=True, teacher=teacher)
  spent.step(CFG, scores=False, teacher=teacher)
  assert spent.spent['score'] == 3 * CFG.num_params()
  assert spent.spent['teacher'] == 2 * sum(by_hand(teacher, 32))


def test_trials_are_four_forward_passes_and_count_as_scores():
  spent, narrow = meter(), meter()
  spent.calibrate(CFG)
  assert spent.spent['score'] == 4 * sum(by_hand(CFG, 32))
  reach = {'heads': np.array([2, 2]), 'ffn': np.array([8, 8])}
  narrow.calibrate(CFG, reach)
  small = dataclasses.replace(CFG, F=8)
  assert narrow.spent['score'] == 4 * sum(by_hand(small, 32))
  assert sum(narrow.spent.values()) == narrow.spent['score']


def test_a_repair_is_a_pass_and_what_its_matrices_need():
  layers, _ = by_hand(CFG, 32)
  spent = meter()
  spent.repair(CFG, {'ffn': 0}, 1)
  assert spent.spent['repair'] == layers
  spent.repair(CFG, {'ffn': CFG.N}, 1)
  F, D = CFG.F, CFG.D
  one = 2 * 32 * F**2 + 2 * F**2 * D + F**3 // 3 + 2 * F**2 * D
  assert spent.spent['repair'] == 2 * layers + CFG.N * one
  # Layers of which nothing was removed are not solved.
  spent.repair(CFG, {'ffn': 1}, 1)
  assert spent.spent['repair'] == 3 * layers + (CFG.N + 1) * one
  # Of five dampings each is fitted, and its error taken.
  before = spent.spent['repair']
  spent.repair(CFG, {'ffn': 1}, 1, 5)
  tried = 2 * F**2 * D + 5 * (F**3 // 3 + 2 * F**2 * D + 2 * F**2 * D)
  assert spent.spent['repair'] == before + layers + one + tried
  # As one batch of three times the tokens.
  several, large = meter(), meter(tokens=96)
  several.repair(CFG, {'ffn': CFG.N}, 3)
  large.repair(CFG, {'ffn': CFG.N}, 1)
  assert several.spent == large.spent


def test_every_input_has_its_matrices():
  cfg = conftest.make_config(V=64, D=16, N=2, K=3, G=2, H=4, F=24)
  query, key = cfg.K * cfg.G * cfg.H, cfg.K * cfg.H
  read_by = {
    'attn_in': [(cfg.D, query), (cfg.D, key), (cfg.D, key)],
    'heads': [(query, cfg.D)],
    'ffn_in': [(cfg.D, cfg.F), (cfg.D, cfg.F)],
    'ffn': [(cfg.F, cfg.D)],
    'final': [(cfg.D, cfg.V)],
  }
  for name, matrices in read_by.items():
    spent = meter()
    spent.repair(cfg, {name: 1}, 1)
    rows = matrices[0][0]
    # The Gram matrix and its factor, once; what was lost, and its solution.
    want = 2 * 32 * rows * rows + rows**3 // 3
    want += sum(2 * rows * rows * columns * 2 for _, columns in matrices)
    assert spent.spent['repair'] == by_hand(cfg, 32)[0] + want, name


def test_counting_goes_on_where_it_stopped():
  whole, first = meter(), meter()
  for _ in range(4):
    whole.step(CFG, scores=True, teacher=None)
  for _ in range(2):
    first.step(CFG, scores=True, teacher=None)
  second = accounting.Meter(T, 32, False, first.spent)
  for _ in range(2):
    second.step(CFG, scores=True, teacher=None)
  assert second.spent == whole.spent


def test_agrees_with_what_the_compiler_counts():
  """Of a model wide enough that entry-by-entry operations do not matter."""
  cfg = conftest.make_config(V=512, D=256, N=1, K=2, G=1, H=64, F=768)
  params = structure.shapes(cfg)
  tokens = jax.ShapeDtypeStruct((4, T), 'int32')
  forward = jax.jit(model.forward, static_argnames=('cfg', 'compute', 'taps'))
  compiled = forward.lower(
    params,
    structure.all_alive(cfg),
    tokens,
    cfg=cfg,
    compute=model.Compute(remat='none'),
  ).compile()
  layers, output = by_hand(cfg, 32)
  assert compiled.cost_analysis()['flops'] == pytest.approx(
    layers + output, rel=0.05
  )
