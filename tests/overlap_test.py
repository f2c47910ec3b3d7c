"""Overlap of structures: against enumeration, sampling, and real runs."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest

from effllm_jax import checkpoints
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import overlap
from effllm_jax import small_run
from effllm_jax import structure
from effllm_jax import workdir as workdir_lib
from tests import conftest
from tests import runs as runs_lib


def sets(*layers):
  return [frozenset(x) for x in layers]


def jaccard(a, b):
  """Of choices by layer, each a group of its own."""
  a, b = ({(n, i) for n, x in enumerate(y) for i in x} for y in (a, b))
  return len(a & b) / len(a | b), len(a & b)


@pytest.mark.parametrize(
  'layers',
  [
    [(5, 2, 3)],
    [(4, 1, 1), (5, 3, 2)],
    [(3, 0, 2), (4, 4, 3), (4, 2, 2)],
    [(0, 0, 0), (4, 1, 2)],
  ],
)
def test_chance_equals_the_mean_over_all_choices(layers):
  each = lambda sizes: list(
    itertools.product(
      *(
        itertools.combinations(range(of), k)
        for (of, *_), k in zip(layers, sizes, strict=True)
      )
    )
  )
  pool = sets(*(range(of) for of, *_ in layers))
  less = lambda x: [p - set(y) for p, y in zip(pool, x, strict=True)]
  left, right = (each([x[i] for x in layers]) for i in (1, 2))
  drawn = [
    (jaccard(a, b), jaccard(less(a), less(b))) for a in left for b in right
  ]
  alive, removed = np.moveaxis(np.array(drawn), 1, 0)
  a, b = sets(*left[-1]), sets(*right[0])
  found = overlap.overlap(a, b, pool)
  for part, want, got in (
    ('alive', alive, jaccard(a, b)),
    ('removed', removed, jaccard(less(a), less(b))),
  ):
    mean = want[:, 0].mean()
    assert found[part]['by_chance'] == pytest.approx(mean, rel=1e-12)
    assert (found[part]['jaccard'], found[part]['shared']) == got
    assert found[part]['above_chance'] == pytest.approx(
      (got[0] - mean) / (1 - mean), rel=1e-9
    )
    z = (got[1] - want[:, 1].mean()) / want[:, 1].std()
    assert found['z'] == pytest.approx(z, rel=1e-9)
  least, chance = overlap.shared_by_chance(layers)
  for i, p in enumerate(chance, least):
    assert p == pytest.approx((alive[:, 1] == i).mean(), rel=1e-12)


def test_chance_equals_what_random_runs_share():
  rng = np.random.default_rng(0)
  layers = [(30, 12, 20), (30, 25, 7), (30, 3, 3)]
  draw = lambda k: rng.random((4000, 30)).argsort(-1) < k
  shared = sum((draw(a) & draw(b)).sum(-1) for _, a, b in layers)
  total = sum(a + b for _, a, b in layers)
  samples = shared / (total - shared)
  choice = lambda i: sets(*(range(x[i]) for x in layers))
  found = overlap.overlap(choice(1), choice(2), choice(0))['alive']
  error = samples.std() / math.sqrt(len(samples))
  assert abs(found['by_chance'] - samples.mean()) < 4 * error


def test_chance_in_a_large_model_has_the_moments_of_its_layers():
  layers = [(8192, 3005 + 7 * n, 2900) for n in range(24)]
  least, chance = overlap.shared_by_chance(layers)
  counts = least + np.arange(len(chance))
  mean = sum(a * b / of for of, a, b in layers)
  variance = sum(
    a * b * (of - a) * (of - b) / (of**2 * (of - 1)) for of, a, b in layers
  )
  assert counts @ chance == pytest.approx(mean, rel=1e-9)
  assert np.square(counts - mean) @ chance == pytest.approx(variance, rel=1e-7)


def test_the_ends_of_the_scale():
  pool = sets(range(8), range(8))
  a, other = sets({0, 1, 2, 3}, {5}), sets({4, 5, 6, 7}, {6})
  same = overlap.overlap(a, a, pool)
  for part in ('alive', 'removed'):
    assert same[part]['jaccard'] == same[part]['above_chance'] == 1
  apart = overlap.overlap(a, other, pool)
  assert apart['alive']['jaccard'] == 0
  assert apart['alive']['above_chance'] < 0
  assert apart['z'] < 0 < same['z']
  # Where nothing went nothing can be told apart from chance.
  whole = overlap.overlap(pool, pool, pool)
  assert whole['z'] is whole['alive']['above_chance'] is None
  assert whole['alive']['jaccard'] == whole['alive']['by_chance'] == 1
  assert whole['removed']['jaccard'] is None


def made(name, alive, start, digest='f' * 64) -> overlap.Structure:
  """The same choice for every type, in one layer."""
  spread = lambda x: dict.fromkeys(structure.TYPES, sets(x))
  return overlap.Structure(
    name, 1, ('made', digest), spread(start), spread(alive)
  )


def test_chance_draws_from_what_a_pair_started_with():
  whole = made('whole', range(4), range(8))
  some = made('some', {0, 1}, range(6))
  fewer = made('fewer', {1, 2}, {0, 1, 2})
  pairs = overlap.compare([whole, some, fewer])['pairs']
  assert [x['of'] for x in pairs] == [8] * 6 + [6] * 3
  assert pairs[-1]['alive']['by_chance'] == pytest.approx(
    # Of 6 groups two twos share 1 in 8 and 2 in 1 of 15 cases.
    (8 * 1 / 3 + 1) / 15
  )


@pytest.mark.parametrize(
  ('other', 'words'),
  [
    (made('b', {1}, range(4), 'e' * 64), 'a started from made .* b from made'),
    (
      made('b', {1}, {1, 9}),
      'a and b went on from events of different runs',
    ),
  ],
)
def test_runs_of_different_sources_are_refused(other, words):
  with pytest.raises(errors.InputError, match=words):
    overlap.compare([made('a', {1}, {1, 2}), other])


@pytest.fixture(name='workdirs', scope='module')
def _workdirs(tmp_path_factory):
  """Two seeds, the first with two shrinks, and a run that goes on from it."""
  folder = tmp_path_factory.mktemp('overlap')
  # They end with their last prune, which the first step after it would have to
  # be compiled for.
  settings = {
    'train.tokens': 18 * 64, 'eval.every_tokens': 18 * 64,
    'eval.tokens_per_domain': 64, 'checkpoint.every_steps': 18,
  }  # fmt: skip
  a = small_run.make(folder, 'a', settings)
  # One shrink, at the end.
  settings['shrink.threshold'] = 0.99
  b = small_run.make(folder, 'b', settings | {'seed': 1})
  smaller = {
    'source': str(a / 'events' / '0'), 'budget.target': 16_000.0,
    'prune.floors.heads': 2, 'prune.floors.ffn': 16,
  }  # fmt: skip
  c = small_run.make(folder, 'c', settings | smaller)
  return a, b, c


def walk(workdir, groups, names, until=math.inf):
  """Takes what the trace says out of `groups`; `names` are its indices."""
  for row in workdir_lib.read(workdir / 'trace.jsonl'):
    if row['step'] <= until:
      for t, gone in row['removed'].items():
        for x in gone:
          n, i = x if t != 'stem' else (0, x)
          groups[t][n].remove(int(np.atleast_2d(getattr(names, t))[n][i]))
  return {t: list(map(frozenset, x)) for t, x in groups.items()}


def everything():
  cfg = small_run.CFG
  return {
    'heads': [set(range(cfg.K)) for _ in range(cfg.N)],
    'ffn': [set(range(cfg.F)) for _ in range(cfg.N)],
    'stem': [set(range(cfg.D))],
  }


def test_structures_of_runs_are_what_their_traces_left(workdirs):
  a, _, c = workdirs
  first = events.lineage(checkpoints.read_events(a)[:1])
  cfg = small_run.CFG
  own = structure.Groups(
    heads=np.tile(np.arange(cfg.K), (cfg.N, 1)),
    ffn=np.tile(np.arange(cfg.F), (cfg.N, 1)),
    stem=np.arange(cfg.D),
  )
  assert len(checkpoints.read_events(a)) == 2
  found = overlap.read(a)
  assert found.alive == walk(a, everything(), own)
  assert found.start == walk(a, everything(), own, until=-1)
  # Between the two shrinks, and on from there in another run.
  event = overlap.read(a, 0)
  assert event.alive == walk(a, everything(), own, until=event.step)
  on = overlap.read(c)
  assert on.start == event.alive
  began = {t: list(map(set, x)) for t, x in event.alive.items()}
  assert on.alive == walk(c, began, first)


def test_the_command_compares_seeds(workdirs, tmp_path):
  a, b, c = workdirs
  again = tmp_path / 'again' / 'a'
  # Of a run that is through its trace is enough.
  shutil.copytree(
    a, again, ignore=shutil.ignore_patterns('checkpoints', 'events')
  )
  out = tmp_path / 'overlap.json'
  done = conftest.command(
    'overlap', f'--workdirs={a},{b},{c},{again}', f'--out={out}'
  )
  assert done.returncode == 0, done.stderr
  record = json.loads(out.read_text())
  assert [x['step'] for x in record['runs']] == [18] * 4
  traces = [
    {
      (t, *np.atleast_1d(x).tolist())
      for row in workdir_lib.read(w / 'trace.jsonl')
      for t, gone in row['removed'].items()
      for x in gone
    }
    for w in (a, b)
  ]
  for pair in record['pairs']:
    t = pair['type']
    if pair['runs'] == [0, 3]:
      assert pair['alive']['jaccard'] == pair['removed']['jaccard'] == 1
    if pair['runs'] == [0, 1]:
      left, right = ({x for x in y if x[0] == t} for y in traces)
      assert left and right
      assert pair['removed']['shared'] == len(left & right)
      assert pair['removed']['jaccard'] == pytest.approx(
        len(left & right) / len(left | right)
      )
  shown = overlap.table(record, 'removed').rows
  # Two of one name are told by their folders.
  assert shown[0][0] == f'{a.parent.name}/a, {b.parent.name}/b: heads'
  assert 'Overlap of what was removed' in done.stdout
  # A pipe is no reason to fold a table.
  assert 'by chance  above chance' in done.stdout


def test_one_run_is_refused_in_one_line():
  done = conftest.command('overlap', '--workdirs=runs/a')
  runs_lib.refused(done, 'two runs or more, not 1')
