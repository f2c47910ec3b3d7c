"""Where a run was computed: what is recorded, kept, and told."""

import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest

from effllm_jax import environment
from effllm_jax import errors
from effllm_jax import sharding

ROW = {
  'step': 0, 'code': 'v1', 'packages': {'jax': '0.10.2', 'numpy': '2.0.0'},
  'python': '3.11.2', 'processor': 'AMD EPYC (family 25, model 17)', 'cpus': 2,
  'device': 'cpu', 'devices': 1, 'platform': 'cpu', 'processes': 1, 'flags': {},
}  # fmt: skip
ROOT = pathlib.Path(environment.__file__).parents[1]


def test_what_is_recorded_is_of_this_process(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--a=1')
  monkeypatch.delenv('LIBTPU_INIT_ARGS', raising=False)
  row = environment.here(sharding.make(1, 1, 1), 7)
  assert row['step'] == 7
  assert row['packages']['jax'] == jax.__version__
  assert row['packages']['numpy'] == np.__version__
  # As other tests have it, and `make test-device` too.
  assert row['device'] == jax.devices()[0].device_kind
  assert (row['devices'], row['processes']) == (1, 1)
  assert row['flags'] == {'XLA_FLAGS': '--a=1'}
  assert 1 <= row['cpus'] <= os.cpu_count()
  assert environment.record(tmp_path, row) == ''
  assert environment.read(tmp_path) == [row]


@pytest.mark.skipif(
  not (ROOT / '.git').exists() or not shutil.which('git'), reason='no clone'
)
def test_the_code_is_the_commit_of_a_clone(monkeypatch, tmp_path):
  git = lambda *words: subprocess.run(
    ['git', '-C', ROOT, *words], check=True, capture_output=True, text=True
  ).stdout.strip()
  code, dirty, _ = environment._code().partition('-dirty')
  assert git('rev-parse', f'{code}^{{commit}}') == git('rev-parse', 'HEAD')
  assert bool(dirty) == bool(git('status', '--short', '--untracked-files=no'))
  # Without git there is nothing to say.
  monkeypatch.setenv('PATH', str(tmp_path))
  assert environment._code() is None


def test_a_start_takes_the_place_of_those_whose_steps_are_lost(tmp_path):
  for step in (0, 20, 40, 20):
    assert environment.record(tmp_path, ROW | {'step': step}) == ''
  assert [x['step'] for x in environment.read(tmp_path)] == [0, 20]
  # As after a damaged first checkpoint, or a kill before it.
  environment.record(tmp_path, ROW)
  assert environment.read(tmp_path) == [ROW]


def test_what_digits_may_depend_on_is_told(tmp_path):
  environment.record(tmp_path, ROW)
  new = ROW | {
    'step': 20, 'packages': {'jax': '0.12.0', 'libtpu': '1'}, 'cpus': 64,
    'python': '3.13.1', 'device': 'TPU v5e', 'devices': 8,
    'flags': {'XLA_FLAGS': '--a=1'},
  }  # fmt: skip
  assert environment.record(tmp_path, new) == (
    'jax 0.12.0 for 0.10.2, libtpu 1 for None, XLA_FLAGS --a=1 for None, '
    'device TPU v5e for cpu, devices 8 for 1, numpy None for 2.0.0'
  )
  # Only against the last.
  assert environment.record(tmp_path, new | {'step': 30, 'code': 'v2'}) == (
    'code v2 for v1'
  )
  starts = environment.read(tmp_path)
  assert environment.text(starts) == (
    'AMD EPYC (family 25, model 17), jax 0.10.2, then 8 x TPU v5e, jax 0.12.0'
  )
  assert environment.text([]) == ''


@pytest.mark.parametrize(
  'line', ['{', '[]', json.dumps(ROW | {'packages': {'jax': 1}}), '{"step": 1}']
)
def test_a_damaged_record_is_refused(tmp_path, line):
  environment.record(tmp_path, ROW)
  path = tmp_path / environment.STARTS
  before = f'{path.read_text()}{line}\n'
  path.write_text(before)
  with pytest.raises(errors.InputError, match=r'starts.jsonl .* 2 .*take that'):
    environment.record(tmp_path, ROW | {'step': 20})
  assert path.read_text() == before


@pytest.mark.parametrize(
  ('about', 'name'),
  [
    (
      'cpu family : 25\nmodel : 17\nmodel name\t: AMD EPYC\n\nmodel name : 2',
      'AMD EPYC (family 25, model 17)',
    ),
    ('model name : Neoverse-V2\n', 'Neoverse-V2'),
    ('CPU implementer : 0x41\n', 'of the platform'),
  ],
)
def test_the_processor_by_its_name(monkeypatch, about, name):
  monkeypatch.setattr(pathlib.Path, 'read_text', lambda *_: about)
  monkeypatch.setattr('platform.processor', lambda: '')
  monkeypatch.setattr('platform.machine', lambda: 'of the platform')
  assert environment.processor() == name
