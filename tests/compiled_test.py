"""What jax compiles is kept between processes, and only compiled where due."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest

from effllm_jax import pruning
from effllm_jax import runlog
from effllm_jax import tables
from effllm_jax import train
from effllm_jax import workdir as workdir_lib
from experiments import compiled
from experiments.configs import smollm2_135m
from tests import conftest
from tests import runs

# What a command does, with a program that takes a moment to compile.
COMMAND = """
import collections, hashlib, json, sys
from absl import app, flags
from experiments import cli

def main(argv):
  import jax, jax.numpy as jnp
  counts = collections.Counter()
  count = lambda name, **_: counts.update([name])
  jax.monitoring.register_event_listener(count)
  f = jax.jit(lambda x: jnp.linalg.inv(jnp.sin(x) @ x + jnp.eye(64)))
  x = jax.random.normal(jax.random.key(0), (64, 64))
  digest = hashlib.sha256(bytes(memoryview(f(x)).cast('B'))).hexdigest()
  hits = counts['/jax/compilation_cache/cache_hits']
  misses = counts['/jax/compilation_cache/cache_misses']
  print(json.dumps([digest, hits, misses]))

cli.run(main)
"""


def run(cache, **env):
  """(digest of the result, programs loaded, programs kept), and stderr."""
  done = subprocess.run(
    [sys.executable, '-c', COMMAND, f'--cache={cache}'],
    cwd=conftest.ROOT, capture_output=True, text=True, check=False,
    env=runs.ENV | env,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout), done.stderr


@pytest.fixture(scope='module', name='kept')
def _kept(place):
  """A folder that one process has filled, and what that said.

  Each test leaves all programs in it, and whole.
  """
  first, said = run(place)
  assert not said and first[1] == 0 and first[2] >= 1
  return place, first


def test_a_second_process_compiles_nothing_and_has_the_same_bits(kept):
  cache, first = kept
  (folder,) = (cache / 'compiled').iterdir()
  assert re.fullmatch('[0-9a-f]{16}', folder.name)
  second, said = run(cache)
  assert not said
  assert second == [first[0], first[2], 0]
  off, _ = run(cache, JAX_ENABLE_COMPILATION_CACHE='false')
  assert off == [first[0], 0, 0]


def test_a_damaged_program_is_compiled_again(kept):
  cache, first = kept
  damaged = list(cache.rglob('*-cache'))
  assert damaged
  for path in damaged:
    path.write_bytes(path.read_bytes()[:-9])
  second, said = run(cache)
  assert second[0] == first[0] and second[1] == 0
  assert 'Traceback' not in said
  # And does not stay damaged.
  third, said = run(cache)
  assert third == [first[0], first[2], 0] and not said


def test_the_folder_of_a_user_wins(tmp_path):
  own = tmp_path / 'own'
  run(
    tmp_path / 'cache',
    JAX_COMPILATION_CACHE_DIR=str(own),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
  )
  assert list(own.glob('*-cache'))
  assert not (tmp_path / 'cache').exists()


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path):
  (tmp_path / 'cache').write_text('a file of the user')
  (_, hits, misses), said = run(tmp_path / 'cache')
  assert hits == misses == 0
  assert len(said.splitlines()) == 1 and 'set --cache' in said, said


def test_what_was_used_longest_ago_is_deleted(tmp_path, monkeypatch):
  monkeypatch.setattr(compiled, '_MOST_BYTES', 250)
  for i in (3, 1, 2, 0):
    path = tmp_path / f'{i}-cache'
    path.write_bytes(b'y' * 100)
    os.utime(path, (1000 + i, 1000 + i))
  compiled.tidy(tmp_path)
  left = sorted(p.name for p in tmp_path.glob('*-cache'))
  assert left == ['2-cache', '3-cache']


def test_programs_may_go_while_they_are_looked_at(tmp_path, monkeypatch):
  """Eight processes of a host start together, and all of them tidy."""
  paths = [tmp_path / f'{i}-cache' for i in range(3)]
  for path in paths:
    path.write_bytes(b'y')

  def whole(path):
    for neighbour in paths:
      neighbour.unlink(missing_ok=True)
    return is_whole(path)

  is_whole = compiled._is_whole
  monkeypatch.setattr(compiled, '_is_whole', whole)
  compiled.tidy(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['.tidy']


@pytest.fixture(scope='module', name='counted')
def _counted(tmp_path_factory):
  """A run of 24 steps and 2 shrinks: how often each program was compiled.

  And how many of them there were in memory after each shrink.
  """
  root = tmp_path_factory.mktemp('compiled')
  config = smollm2_135m.get_config()
  config.update_from_flattened_dict(
    conftest.small_run(
      conftest.write_model_folder(root / 'model'),
      conftest.write_text_folder(root / 'text'),
      # A damping that is chosen compiles for twice as long, as one program too.
      **{'repair.enabled': True, 'repair.damping': 1.0, 'distill.weight': 0.5},
    )
  )
  live = []

  def shrink(*args):
    made = whole_shrink(*args)
    live.append(len(jax.local_devices()[0].client.live_executables()))
    return made

  whole_shrink = pruning.shrink
  jax.clear_caches()
  with (
    pytest.MonkeyPatch.context() as patch,
    conftest.counted_programs() as counts,
  ):
    patch.setattr(pruning, 'shrink', shrink)
    train.run(config, root / 'run', root / 'cache')
  return counts, root / 'run', live


def test_a_shrink_compiles_again_only_what_its_shapes_are_in(counted):
  counts, folder, _ = counted
  rows = list(workdir_lib.read(folder / 'metrics.jsonl'))
  sizes = [r['array_params'] for r in rows if r['kind'] == 'train']
  scored = {
    r['array_params'] for r in rows if r['kind'] == 'train' and r['price']
  }
  evaluated = [r['step'] for r in rows if r['kind'] == 'eval']
  evaluated = {sizes[max(step, 1) - 1] for step in evaluated[1:]} | {sizes[0]}
  shapes = len(set(sizes))
  assert shapes > 2
  expected = {
    # With scores and, in the recovery, without.
    'train_step': len(scored) + 1,
    'repair_step': len(scored),
    '_select': len(scored),
    '_mean_prices': len(scored),
    # Of a learning rate, operation by operation: it is one program.
    'integer_pow': 0,
    # The teacher does not shrink.
    'teach_step': 1,
    'sum_losses': len(evaluated),
    # Before and after a shrink; what was after one is before the next.
    'batch_loss': shapes,
    'shrink_step': shapes - 1,
  }
  assert {name: counts[name] for name in expected} == expected


def test_what_a_shrink_makes_useless_leaves_memory(counted):
  _, _, live = counted
  assert len(live) == 2 and live[1] <= live[0]


def test_the_report_says_what_went_into_it(counted):
  _, folder, _ = counted
  rows = {row[0]: row[1:] for row in tables.time(runlog.read(folder)).rows}
  number = lambda name: float(rows[name][0].replace(',', ''))
  raw = list(workdir_lib.read(folder / 'metrics.jsonl'))
  total = lambda kind, key='seconds': sum(
    x[key] for x in raw if x['kind'] == kind
  )
  assert number('compiling') == pytest.approx(
    total('train', 'compile_seconds'), abs=0.06
  )
  assert number('shrinking') == pytest.approx(total('shrink'), abs=0.06)
  saved = [x['step'] for x in raw if x['kind'] == 'save']
  assert saved == sorted({*saved}) and len(saved) >= 3
  assert number('waiting for checkpoints') == pytest.approx(
    total('save'), abs=0.06
  )
  parts = [number(name) for name in rows if name != 'total']
  assert number('total') == pytest.approx(sum(parts), abs=0.5)
  assert rows['total'][1].startswith('100.0')


def test_steps_without_a_row_lose_no_compilation(counted, tmp_path):
  _, folder, _ = counted
  root = folder.parent
  config = smollm2_135m.get_config()
  config.update_from_flattened_dict(
    conftest.small_run(root / 'model', root / 'text')
    | {'train.tokens': 6 * 64, 'prune.policy': 'none',
       'optimizer.decay_tokens': 64, 'train.log_every': 4}
  )  # fmt: skip
  train.run(config, tmp_path / 'run', root / 'cache')
  rows = workdir_lib.read(tmp_path / 'run' / 'metrics.jsonl')
  seconds = {
    r['step']: r['compile_seconds'] for r in rows if r['kind'] == 'train'
  }
  # The first step compiled, and has no row of its own.
  assert set(seconds) == {4, 6} and seconds[4] > 0.1
