"""Statistics against closed form; tables and files of made-up rows."""

import dataclasses
import math

import pytest

from effllm_jax import accounting
from effllm_jax import comparison
from effllm_jax import comparison_report
from effllm_jax import errors


def row(arm, seed, bits, budget='tokens', **changes) -> comparison.Row:
  fields = dict(
    budget=budget, arm=arm, seed=seed, bits_per_byte=bits,
    domains={'wiki': bits + 0.1, 'drama': bits - 0.1},
    live_params=1_600_000, tokens=256_000,
    flops=dict(zip(accounting.PURPOSES, (9e12, 1e12, 0, 0), strict=True)),
    flops_per_token=1e7, seconds=50.0, tasks=[],
  )  # fmt: skip
  return comparison.Row(**fields | changes)


ROWS = [
  row('ours_a', 0, 2.0),
  row('scratch', 0, 2.5),
  row('ours_a', 1, 2.2),
  row('scratch', 1, 2.7),
  row('ours_a', 2, 2.1),
]


def test_the_standard_error_is_that_of_the_mean():
  """Of 1, 2, 3, 4: variance 5/3, so the error is sqrt(5/12)."""
  found = comparison.estimate([1, 2, 3, 4])
  assert found.mean == 2.5
  assert math.isclose(found.stderr, math.sqrt(5 / 12))
  assert found.text(2) == '2.50 ± 0.65'
  assert comparison.estimate([7.0]) == comparison.Estimate(7.0, None)
  assert comparison.Estimate(7.0, None).text(1, '+') == '+7.0'


def test_differences_are_taken_seed_by_seed():
  """Arms scatter by 0.1 from seed to seed, their difference not at all."""
  ours, scratch = (
    comparison.by_arm(ROWS, 'tokens')[x] for x in ('ours_a', 'scratch')
  )
  bits = lambda x: x.bits_per_byte
  found = comparison.difference(scratch, ours, bits)
  assert math.isclose(found.mean, 0.5)
  assert found.stderr < 1e-12
  assert comparison.difference(scratch[:1], ours[1:], bits) is None


def test_rows_are_read_as_they_were_written(tmp_path):
  path = tmp_path / 'results.jsonl'
  assert comparison.read(path) == []
  comparison.write(path, ROWS)
  assert comparison.read(path) == ROWS
  with path.open('a') as file:
    file.write('{"budget": "tok')
  assert comparison.read(path) == ROWS


@pytest.mark.parametrize(
  'change',
  [
    {'bits_per_byte': math.nan},
    {'budget': 'hours'},
    {'arm': '../../home'},
    {'seed': 'x'},
    {'flops': {'train': 1}},
    {'domains': {'w': 2.0}},
    {'computed_on': ['cpu']},
    {'tasks': [{'value': 1.0, 'limit': 100, 'metric': 'acc'}]},
    {'tasks': [{'value': 1.0, 'limit': 1, 'metric': 'acc', 'task': None}]},
    # The row before, once more: no second seed.
    {'seed': ROWS[0].seed, 'arm': ROWS[0].arm},
  ],
)
def test_what_is_no_result_is_refused(tmp_path, change):
  path = tmp_path / 'results.jsonl'
  comparison.write(path, [ROWS[0], dataclasses.replace(ROWS[1], **change)])
  with pytest.raises(
    errors.InputError, match=r'row 2 is not a result.*take that line out'
  ):
    comparison.read(path)


def test_what_is_published_comes_from_the_rows_alone(tmp_path):
  asked = dict(task='piqa', metric='acc', limit=100, items=100, stderr=0.05)
  rows = [
    *ROWS,
    row('ours_a', 0, 2.0, 'flops', tasks=[asked | {'value': 0.625}]),
  ]
  comparison.write(tmp_path / 'results.jsonl', rows)
  made = comparison_report.publish(tmp_path, 'ours_a')
  assert [len(t.rows) for t in made] == [2, 2, 2, 1, 1, 1, 1]
  assert made[0].title.startswith('Equal training tokens, 3 seeds')
  assert made[0].rows[1] == (
    'scratch (seeds 0, 1)', '1.6M', '2.6000 ± 0.1000', '+0.5000 ± 0.0000',
    '10\N{NO-BREAK SPACE}TFLOP',
  )  # fmt: skip
  assert made[0].rows[0][3] == ''
  assert made[1].rows[0] == ('ours_a', '2.2000 ± 0.0577', '2.0000 ± 0.0577')
  assert made[2].rows[0][1:3] == ('256k', '50')
  assert made[-1].rows == (('ours_a', '0.625'),)
  text = (tmp_path / 'summary.md').read_text(encoding='utf-8')
  assert text.count('\n## ') == len(made)
  for name in ('arms', 'costs-tokens', 'costs-flops'):
    assert f'({name}.png)' in text
    assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
  assert {p.suffix for p in tmp_path.iterdir()} == {'.jsonl', '.md', '.png'}


@pytest.mark.parametrize(
  ('computed_on', 'said'),
  [
    (('', ''), None),
    (('A, jax 1', 'A, jax 1'), 'All runs on A, jax 1.'),
    (
      ('A, jax 1', 'B'),
      'depend on where runs were computed: 2 runs on A, jax 1; 1 run on B.',
    ),
    (('', 'B'), '2 runs on what is not recorded; 1 run on B.'),
  ],
)
def test_the_page_says_where_runs_were_computed(computed_on, said):
  first, other = computed_on
  rows = [
    dataclasses.replace(x, computed_on=y)
    for x, y in zip(ROWS, (first, first, other), strict=False)
  ]
  found = comparison_report._computed_on(rows)
  assert (found == []) if said is None else found[0].endswith(f'{said}\n')


def spent(train, score=0, repair=0, teacher=0):
  return dict(train=train, score=score, repair=repair, teacher=teacher)


def test_flops_stand_below_the_purpose_that_they_had():
  rows = [row('ours_a', 0, 2.0, flops=spent(1e12, 2e12, 3e12, 4e12))]
  table = comparison_report.make_tables(rows, 'tokens', 'ours_a')[2]
  cells = dict(zip(table.columns, table.rows[0], strict=True))
  for n, name in enumerate(('training', 'scoring', 'repair', 'teacher'), 1):
    assert cells[name] == f'{n}\N{NO-BREAK SPACE}TFLOP'


def test_a_panel_shows_what_its_axis_says():
  rows = [
    row('ours_a', 0, 2.0, flops=spent(4e12, score=2e12), live_params=100),
    row('ours_a', 1, 2.2, flops=spent(8e12, score=2e12), live_params=200),
    row('dense', 0, 1.5, 'flops'),
  ]
  shown = {}
  for ax in comparison_report.costs(rows, 'tokens').axes:
    (drawn,) = ax.containers
    shown[ax.get_xlabel()] = drawn.lines[0].get_xydata().tolist()
  assert shown == {
    'live parameters': [[150, pytest.approx(2.1)]],
    'FLOPs spent, pruning included': [[8e12, pytest.approx(2.1)]],
  }


def test_equal_flops_are_those_of_the_costliest_at_equal_tokens():
  """Whole steps may make a run of equal FLOPs cost a little more."""
  ends = [row('dense', 0, 1.5, 'flops', flops=spent(10.1e12))]
  assert comparison.most_flops([*ROWS, *ends]) == 10**13
  assert comparison.most_flops(ends) == 0


def test_flops_that_are_no_longer_equal_are_left_out(tmp_path):
  """After a costlier arm: told, and with no row beside those of others."""
  ends = [row(x.arm, x.seed, 2.0, 'flops') for x in ROWS[:3]]
  costly = dict.fromkeys(accounting.PURPOSES, 0) | {'train': 2 * 10**13}
  rows = [*ROWS, *ends, row('dense', 0, 1.5, flops=costly)]
  assert comparison.unequal(rows[:-1]) == [] and not comparison.left_out(ROWS)
  comparison.write(tmp_path / 'results.jsonl', rows[:-1])
  assert comparison_report.publish(tmp_path, 'ours_a')[3].title.startswith(
    'Equal FL'
  )
  comparison.write(tmp_path / 'results.jsonl', rows)
  made = comparison_report.publish(tmp_path, 'ours_a')
  assert not [x for x in made if x.title.startswith('Equal FLOPs')]
  assert not (tmp_path / 'costs-flops.png').exists()
  text = (tmp_path / 'summary.md').read_text(encoding='utf-8')
  assert (
    'costlier arm has raised: ours_a of seed 0, scratch of seed 0, ours_a of '
    'seed 1; run them again with --arms=ours_a,scratch --seeds=0,1.\n'
  ) in text
  # They are asked the same again, or their answers would be gone.
  tasks = [{'task': x, 'metric': 'acc', 'limit': 9} for x in ('piqa', 'boolq')]
  asked = [dataclasses.replace(x, tasks=tasks) for x in rows]
  assert comparison.left_out(asked).endswith(
    '--seeds=0,1 --tasks=piqa,boolq --limit=9'
  )
  # Those that were as long as the costly one stay.
  again = row('dense', 0, 1.5, 'flops', flops=costly)
  comparison.write(tmp_path / 'results.jsonl', [*rows, again])
  assert comparison_report.publish(tmp_path, 'ours_a')[3].rows[0][0] == 'dense'


def test_flops_are_unequal_above_and_below():
  spent = lambda x: dict(
    zip(accounting.PURPOSES, (x - 1e12, 1e12, 0, 0), strict=True)
  )
  more = [
    row('dense', seed, 1.5, 'flops', flops=spent(x))
    for seed, x in enumerate((10.3e12, 9.7e12, 9.9e12))
  ]
  assert [x.seed for x in comparison.unequal([*ROWS, *more])] == [0, 1]
