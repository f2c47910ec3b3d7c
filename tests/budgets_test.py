"""Budgets: what is counted is what is there, group by group."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from effllm_jax import budgets
from effllm_jax import errors
from effllm_jax import structure
from tests import conftest

# Bytes of a matrix weight, as floats: exact, since all are sixteenths.
BYTES = {'f32': 4.0, 'bf16': 2.0, 'f16': 2.0, 'q8_0': 1.0625, 'q4_0': 0.5625}
CONTEXT = 33


def count_live(masks, cfg, weigh=lambda letters: 1.0) -> float:
  """Adds up live entries one by one, out of the axis table."""
  counts = structure.map_axes(
    lambda letters, leaf: (
      weigh(letters) * conftest.alive_entries(letters, leaf.shape, masks).sum()
    ),
    structure.shapes(cfg),
  )
  return float(sum(jax.tree.leaves(counts)))


def is_scale(letters) -> bool:
  """A norm scale or a bias."""
  return letters in ('D', 'ND', 'NH', 'NKGH', 'NKH')


def count_flops(masks, cfg) -> float:
  """Products by the axis table, attention token by token."""

  def weigh(letters):
    looked_up = letters == 'VD' and not cfg.tied
    return 0.0 if is_scale(letters) or looked_up else 2.0

  attention = 0
  for position in range(CONTEXT):
    for _ in range(int(np.asarray(masks.heads).sum())):
      scores = values = 2 * cfg.G * cfg.H * (position + 1)
      attention += scores + values
  return count_live(masks, cfg, weigh) + attention / CONTEXT


def counted(cfg) -> dict:
  """Name -> (budget, a count of what is live that shares no code with it)."""
  found = {
    'params': (budgets.params(cfg), lambda m: count_live(m, cfg)),
    'flops': (budgets.flops(cfg, CONTEXT), lambda m: count_flops(m, cfg)),
  }
  output = 'VD' if cfg.tied else 'DV'
  for name, size in BYTES.items():
    # A file of q4_0 has its output matrix in q8_0.
    last = BYTES['q8_0'] if name == 'q4_0' else size
    weigh = lambda x, size=size, last=last: (
      4.0 if is_scale(x) else last if x == output else size
    )

    def count(masks, weigh=weigh):
      return count_live(masks, cfg, weigh)

    found[name] = (budgets.stored_bytes(cfg, name), count)
  return found


def write_table(path, cfg, time, shapes=None):
  """A table of latencies whose times are `time(heads, ffn, stem)`."""
  shapes = shapes or [
    (k, f, d)
    for k in (cfg.K, 1)
    for f in (cfg.F, cfg.F // 2)
    for d in (cfg.D, cfg.D // 2)
  ]
  record = {
    'machine': {},
    'model': {x: getattr(cfg, x) for x in ('V', 'N', 'G', 'H')},
    'shapes': [
      {'heads': k, 'ffn': f, 'stem': d, 'ms': time(k, f, d)}
      for k, f, d in shapes
    ],
  }
  path.write_text(json.dumps(record))
  return path


@pytest.mark.parametrize('name', ['params', 'flops', *BYTES])
def test_a_budget_is_what_a_count_finds(cfg, name):
  cost, count = counted(cfg)[name]
  for masks in (
    structure.all_alive(cfg),
    conftest.make_masks(cfg, uniform=True),
    conftest.make_masks(cfg, seed=3),
  ):
    assert cost.live(masks) == count(masks) * cost.per_unit
  assert cost.of_config(cfg) == cost.live(structure.all_alive(cfg))


def test_params_are_the_architectures_own_number(cfg):
  assert budgets.params(cfg).of_config(cfg) == cfg.num_params()


def test_block_formats_are_blocks():
  """34 and 18 bytes for each 32 weights of a row, and nothing else."""
  cfg = conftest.make_config(V=64, D=32, K=2, G=2, H=16, F=96)
  tied = cfg.V * cfg.D
  matrices = cfg.num_params() - cfg.D * (2 * cfg.N + 1) - tied
  for name, block in (('q8_0', 34), ('q4_0', 18)):
    cost = budgets.stored_bytes(cfg, name)
    scales = 4 * cfg.D * (2 * cfg.N + 1)
    blocks = matrices // 32 * block + tied // 32 * 34
    assert cost.of_config(cfg) == 16 * (blocks + scales)


def test_unpriced_is_embedding_and_output_matrix(cfg):
  tables = 1 if cfg.tied else 2
  assert budgets.params(cfg).form.unpriced_stem == tables * cfg.V
  assert (
    budgets.stored_bytes(cfg, 'f16').form.unpriced_stem == 32 * tables * cfg.V
  )
  assert budgets.flops(cfg, 8).form.unpriced_stem == 2 * cfg.V


def test_units_are_rounded_down_and_reported_back():
  cfg = conftest.make_config()
  cost = budgets.stored_bytes(cfg, 'q4_0')
  assert cost.units(10) == 160
  assert cost.units(10.99) == 175
  assert cost.reported(175) == 175 / 16
  assert cost.text(160 * 10**6) == '10,000,000.00 bytes in q4_0'
  params = budgets.params(cfg)
  assert params.units(1e3 + 0.9) == 1000
  assert params.reported(10**18 + 1) == 10**18 + 1
  assert params.text(1000) == '1,000 parameters'
  for target in (float('nan'), float('inf')):
    with pytest.raises(errors.InputError, match='--config'):
      params.units(target)


def test_a_latency_of_the_right_form_is_found_again(tmp_path):
  cfg = conftest.make_config(K=4, N=3, F=64, D=32)

  def time(k, f, d):
    k, f = cfg.N * k, cfg.N * f
    return d * (3e-4 * k + 2e-6 * f + 1e-3) + 0.02 * k + 1e-4 * f + 0.4

  cost = budgets.milliseconds(cfg, write_table(tmp_path / 't.json', cfg, time))
  assert cost.fit_error < 1e-6
  for k, f, d in ((4, 64, 32), (3, 17, 9), (1, 8, 20)):
    shape = dataclasses.replace(cfg, K=k, F=f, D=d)
    got = cost.reported(cost.of_config(shape))
    assert got == pytest.approx(time(k, f, d), rel=1e-6)
  assert cost.form.unpriced_stem == cost.form.stem


def relative_errors(cost, cfg, path) -> np.ndarray:
  """Of what a budget says of the shapes of a table."""
  shapes = json.loads(path.read_text())['shapes']
  of = lambda s: dataclasses.replace(cfg, K=s['heads'], F=s['ffn'], D=s['stem'])
  return np.array(
    [cost.reported(cost.of_config(of(s))) / s['ms'] - 1 for s in shapes]
  )


def test_a_latency_of_another_form_says_how_far_off_it_is(tmp_path):
  """Never a negative coefficient; the error is that of the worst shape."""
  cfg = conftest.make_config(K=4, N=3, F=64, D=32)

  def time(k, f, d):
    # Fewer heads take longer: no coefficient can say so.
    return 1.0 + 1e-3 * f * d - 0.1 * k

  path = write_table(tmp_path / 't.json', cfg, time)
  cost = budgets.milliseconds(cfg, path)
  assert cost.form.head == cost.form.head_fixed == 0
  assert cost.fit_error == pytest.approx(
    abs(relative_errors(cost, cfg, path)).max(), rel=1e-4
  )


def test_a_fit_has_the_least_relative_errors(tmp_path):
  """No coefficient is better a little higher or lower."""
  cfg = conftest.make_config(K=4, N=3, F=64, D=32)

  def time(k, f, d):
    # The largest matrices fall out of a cache.
    return 1.0 + 1e-3 * f * d - 0.1 * k + 2.0 * (f == cfg.F and d == cfg.D)

  path = write_table(tmp_path / 't.json', cfg, time)
  cost = budgets.milliseconds(cfg, path)
  least = np.square(relative_errors(cost, cfg, path)).sum()
  for name, value in cost.form._asdict().items():
    for factor in (0.99, 1.01):
      form = cost.form._replace(**{name: round(factor * value)})
      other = dataclasses.replace(cost, form=form)
      squares = np.square(relative_errors(other, cfg, path)).sum()
      assert squares >= least, (name, factor)


@pytest.mark.parametrize(
  ('spoil', 'message'),
  [
    (lambda p: p.unlink(), 'is not a file; write one with python -m'),
    (lambda p: p.write_text('heads ffn'), 'is not JSON.*budget.table'),
    (lambda p: p.write_text('[]'), 'is not a JSON object'),
    (lambda p: p.write_text('{"model": {}}'), "not a table.*KeyError: 'V'"),
    (lambda p: p.write_bytes(b'\xff\xfe'), 'is not JSON.*invalid start byte'),
    (
      lambda p: p.write_text(p.read_text().replace('"ms": 1.0', '"ms": 0')),
      'a width or a time is not in',
    ),
    (
      lambda p: p.write_text(p.read_text().replace('"V": 61', '"V": 64')),
      'was measured with V 64, the source model has 61',
    ),
    (
      lambda p: write_table(
        p, conftest.make_config(), lambda *_: 1.0, [(2, 20, 16)] * 9
      ),
      'has 9 shapes, which settle 1 of 6 coefficients',
    ),
    (
      lambda p: write_table(p, conftest.make_config(), lambda *_: 9.9e6),
      'gives the source model 9,9.* ms, which is more than can be counted',
    ),
  ],
)
def test_tables_that_cannot_serve_are_refused(tmp_path, spoil, message):
  cfg = conftest.make_config()
  path = write_table(tmp_path / 'table.json', cfg, lambda *_: 1.0)
  budgets.milliseconds(cfg, path)
  spoil(path)
  with pytest.raises(errors.InputError, match=message) as e:
    budgets.milliseconds(cfg, path)
  assert '\n' not in str(e.value) and '--config.budget.table' in str(e.value)


def test_make_reads_what_the_kind_needs(tmp_path, monkeypatch):
  cfg = conftest.make_config()
  table = write_table(tmp_path / 'table.json', cfg, lambda *_: 1.0)
  settings = dict(format='q8_0', context=7, table=table)
  assert [budgets.make(cfg, k, **settings) for k in budgets.KINDS] == [
    budgets.params(cfg),
    budgets.stored_bytes(cfg, 'q8_0'),
    budgets.flops(cfg, 7),
    budgets.milliseconds(cfg, table),
  ]
  with monkeypatch.context() as patch:
    patch.setenv('HOME', str(tmp_path))
    budgets.milliseconds(cfg, '~/table.json')
  # An empty table, as shipped, only matters to the kind that reads it.
  budgets.make(cfg, 'params', **settings | {'table': ''})


@pytest.mark.parametrize(
  ('kind', 'change', 'message'),
  [
    ('weight', {}, "budget.kind 'weight' is not one of params, bytes, flops"),
    ('bytes', {'format': 'q5'}, "budget.format 'q5' is not one of f32, bf16"),
    ('flops', {'context': 0}, 'budget.context 0 is not at least 1'),
    ('ms', {'table': ''}, "budget.table '' is not a file"),
  ],
)
def test_what_make_refuses(kind, change, message):
  settings = dict(format='f16', context=128, table='') | change
  with pytest.raises(errors.InputError, match=message):
    budgets.make(conftest.make_config(), kind, **settings)


def test_a_budget_is_hashable():
  cfg = conftest.make_config()
  assert hash(budgets.params(cfg)) == hash(budgets.params(cfg))
