"""Configs, command lines and measured tables that make no sense."""

import functools
import json
import os
import signal
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import ml_collections
import pytest

from effllm_jax import budgets
from effllm_jax import errors
from effllm_jax import model
from effllm_jax import plan
from effllm_jax import structure
from effllm_jax import train
from effllm_jax.kernels import autotune
from effllm_jax.kernels import forms
from experiments.configs import smollm2_135m
from tests import conftest
from tests import hostile
from tests import runs

# Tables.


def table():
  shapes = [
    {'heads': k, 'ffn': f, 'stem': d, 'ms': 1.0 + k * d + f * d + d + k + f}
    for k in (1, 2) for f in (8, 16) for d in (8, 16)
  ]  # fmt: skip
  model = {letter: getattr(hostile.TINY, letter) for letter in budgets.FIXED}
  return {'machine': {'cpus': 2}, 'model': model, 'shapes': shapes}


def test_latency_tables(place):
  path = place / 'latency.json'
  path.write_text(json.dumps(table()))
  assert budgets.milliseconds(hostile.TINY, path).fit_error < 1e-3

  @hostile.fuzz(200)
  @hypothesis.given(data=hostile.changed(table()))
  def check(data):
    path.write_bytes(data)
    found = hostile.answer(
      lambda: budgets.milliseconds(hostile.TINY, path), path
    )
    if not isinstance(found, str):
      assert found.of_config(hostile.TINY) >= 0

  check()


def test_blocks(place):
  path = place / 'blocks.json'
  sizes = (32, 256, 64)
  cfg = conftest.make_config(F=256, D=64)
  compute = model.Compute(kernels='xla_loop')
  rows = [
    autotune.tune(name, 'nn', *sizes, 'float32', 'n', timer=lambda _: 1.0)
    for name in ('bucket', 'xla_loop')
  ]
  attention = {'implementation': 'pallas_tpu_attention', 'form': 'forward'}
  square = {'m': 32, 'n': 32, 'blocks': {'rows': 128}}
  rows.append(rows[0] | attention | square)

  @hostile.fuzz(150)
  @hypothesis.given(data=hostile.changed(rows))
  def check(data):
    path.write_bytes(data)
    hostile.answer(
      lambda: train._use_blocks(str(path), compute, 32, 16, cfg), path
    )
    for row in rows:
      key = [row[x] for x in ('form', 'm', 'n', 'k', 'dtype')]
      module = forms.module(row['implementation'])
      blocks = autotune.choice(row['implementation'], *key)
      assert blocks is None or blocks in module.candidates(*key)

  try:
    check()
    for thing in ('pipe', 'device', 'folder', 'empty'):
      path.unlink() if path.is_file() else None
      hostile.THINGS[thing](path)
      assert hostile.answer(
        lambda: train._use_blocks(str(path), compute, 32, 16, cfg), path
      )
      with pytest.raises(ValueError, match='is not a file of tuned blocks'):
        autotune.store(path, [])
      path.rmdir() if path.is_dir() else path.unlink()
  finally:
    autotune.use(None)


# Configs.


@functools.cache
def _keys():
  """Every key of a config, as `a.b`, and its value."""

  def flat(node, at=''):
    for key, value in node.items():
      if isinstance(value, dict):
        yield from flat(value, f'{at}{key}.')
      else:
        yield f'{at}{key}', value

  return dict(flat(smollm2_135m.get_config().to_dict()))


VALUES = {
  int: (
    *(x for x in hostile.NUMBERS if x < 2**31), -1, -(2**31), 2**62, 10**30
  ),
  float: (0.0, -0.0, -1.0, 1.0, 1e-300, 1e300, float('nan'), float('inf'),
          -float('inf'), 2.0, 1e9),
  str: hostile.STRINGS,
  bool: (True, False),
}  # fmt: skip


@hostile.fuzz(300)
@hypothesis.given(data=st.data())
def test_overrides(data):
  config = smollm2_135m.get_config()
  for _ in range(data.draw(st.integers(1, 3))):
    key = data.draw(st.sampled_from(sorted(_keys())))
    value = data.draw(st.sampled_from(VALUES[type(_keys()[key])]))
    config.update_from_flattened_dict({key: value})
  source = structure.ModelConfig(
    V=49152, D=576, N=30, K=3, G=3, H=64, F=1536, context=2048,
    rope_theta=1e4, norm_eps=1e-5, tied=True,
  )  # fmt: skip
  with hostile.watched(0):
    try:
      plan.make(ml_collections.FrozenConfigDict(config), source)
    except errors.InputError as e:
      assert '--config' in str(e) or ';' in str(e), e


# The command line.


COMMAND = """
import json, os, signal, sys, traceback
from absl import flags
import ml_collections
from ml_collections import config_flags
# What a fork imports, it imports alone: half a second of each that is accepted.
import jax
from experiments import cli
CONFIG = config_flags.DEFINE_config_file('config', None, '', lock_config=True)
flags.mark_flag_as_required('config')
def main(argv):
  ml_collections.FrozenConfigDict(cli.config(CONFIG))
for arguments in json.load(sys.stdin):
  read, write = os.pipe()
  child = os.fork()
  if not child:
    signal.alarm(10)
    os.dup2(write, 2)
    sys.argv = ['main', *map(os.fsdecode, map(bytes, arguments))]
    try:
      cli.run(main)
      status = 0
    except SystemExit as e:
      status = e.code or 0
    except BaseException:
      traceback.print_exc()
      status = 1
    sys.stderr.flush()
    os._exit(status)
  os.close(write)
  with os.fdopen(read, errors='replace') as file:
    text = file.read()
  status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  print(json.dumps([status, text]))
"""


def run_commands(arguments):
  """(exit code, stderr) of a command with each of the lists of flags.

  One process reads the flags of all of them, each in a fork of it. The fork
  says what Python would and ends: to take the interpreter down was 60 of 63 s.
  """
  done = subprocess.run(
    [sys.executable, '-c', COMMAND],
    input=json.dumps([[[*os.fsencode(x)] for x in a] for a in arguments]),
    cwd=conftest.ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


CONFIGS = {
  'nothing': b'',
  'syntax': b'def get_config(:\n',
  'indent': b'def get_config():\nreturn 1\n',
  'nul': b'x = 1\0\n',
  'latin1': b'# \xe9\ndef get_config(): pass\n',
  'binary': bytes(range(256)) * 100,
  'none': b'def get_config(): return None\n',
  'number': b'def get_config(): return 7\n',
  'dict': b'def get_config(): return {"seed": 1}\n',
  'argument': b'def get_config(x): return x\n',
  'divides': b'def get_config(): return 1 / 0\n',
  'name': b'def get_config(): return nobody\n',
  'recurses': b'def get_config(): return get_config()\n',
  'nested': b'x = ' + b'(' * 10_000 + b')' * 10_000,
  'raises': b'def get_config(): raise Exception("a\\nb")\n',
  'asserts': b'def get_config(): assert False\n',
  'imports': b'import nothing_of_that_name\n',
  'memory': b'def get_config(): raise MemoryError\n',
  'empty': b'import ml_collections\n'
  b'def get_config(): return ml_collections.ConfigDict()\n',
  **{
    name: b'import ml_collections\n'
    b'from experiments.configs import smollm2_135m\n'
    b'def get_config():\n'
    b'  config = smollm2_135m.get_config()\n'
    b'  config.data.weights = ' + weights + b'\n'
    b'  return config\n'
    for name, weights in {
      'dots': b'{"en.wiki": 1.0}',
      'dots_allowed': b'ml_collections.ConfigDict('
      b'{"en.wiki": 1.0}, allow_dotted_keys=True)',
      'numbers': b'{3: 1.0}',
    }.items()
  },
}


def test_config_files(tmp_path):
  cases = []
  for name, data in CONFIGS.items():
    (tmp_path / f'{name}.py').write_bytes(data)
  for name, put in hostile.THINGS.items():
    put(tmp_path / f'thing-{name}.py')
  for path in sorted(tmp_path.glob('*.py')):
    for more in ([], ['--config.seed=1'], ['--config.nothing=1']):
      cases.append([f'--config={path}', *more])
      cases.append(['--config', str(path), *more])
  for (status, text), flags in zip(run_commands(cases), cases, strict=True):
    said = text.strip().splitlines()
    assert status == 2, (flags, status, text[-2000:])
    assert said[-1].startswith('error: '), (flags, text)
    assert 'Traceback' not in text and len(said[-1]) < 3000


def test_overrides_of_the_command_line():
  values = [
    '', '-1', '1e999', 'nan', '9' * 5000, '(1,)', '[' * 1000, '{}', 'None',
    '\udcff', '\x1b[2J', 'True', "'",
  ]  # fmt: skip
  keys = [
    'seed', 'optimizer.peak', 'source', 'model.remat', 'data.weights',
    'data.weights.x', 'prune', 'nothing', '', '.', 'seed.x', '__class__',
  ]  # fmt: skip
  file = '--config=experiments/configs/smollm2_135m.py'
  cases = [[file, f'--config.{key}={x}'] for key in keys for x in values]
  cases += [[file, f'--config.{key}'] for key in keys]
  cases += [['--config='], ['--config'], ['--config', '--config'], []]
  accepted = 0
  for (status, text), flags in zip(run_commands(cases), cases, strict=True):
    if status == 0:
      accepted += 1
      continue
    said = text.strip().splitlines()
    assert status == 2, (flags, status, text[-2000:])
    assert said[-1].startswith('error: '), (flags, text)
    assert 'Traceback' not in text and len(said[-1]) < 3000
  assert 20 < accepted < len(cases) / 2


@pytest.mark.parametrize(
  ('arguments', 'missing'),
  [(['main', '--workdir=no'], '--config'), (['report'], '--workdir')],
)
def test_a_flag_that_is_not_given(arguments, missing):
  done = conftest.command(*arguments)
  runs.refused(done, f'{missing} is not given; set it, --help says')


@pytest.mark.parametrize(
  ('flag', 'remedy'),
  [
    ('--config.prune.every=4', "'config.prune.every'; set --config too"),
    ('--nothing=1', "'nothing'; --help lists what there is"),
  ],
)
def test_a_flag_that_is_unknown(flag, remedy):
  runs.refused(conftest.command('main', '--workdir=no', flag), remedy)


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize(
  ('main', 'flag', 'code', 'said'),
  [
    ('None', '--help', 128 + signal.SIGPIPE, ''),
    ("print('a table')", '', 128 + signal.SIGPIPE, ''),
    ('os.write(broken, b"x")', '', 1, 'BrokenPipeError'),
  ],
)
def test_nobody_reads_the_output(main, flag, code, said, unbuffered):
  """As after `| head`; another pipe that breaks is an error."""
  program = f"""
import os
from experiments import cli
unread, broken = os.pipe()
os.close(unread)
cli.run(lambda argv: {main})
"""
  reader, writer = os.pipe()
  if not said:
    os.close(reader)
  done = subprocess.run(
    [sys.executable, '-c', program, *flag.split()],
    stdout=writer, stderr=subprocess.PIPE, text=True, cwd=conftest.ROOT,
    env=os.environ | {'PYTHONUNBUFFERED': unbuffered},
  )  # fmt: skip
  os.close(writer)
  if said:
    os.close(reader)
  assert done.returncode == code, done.stderr
  assert said in done.stderr and bool(said) == bool(done.stderr)
