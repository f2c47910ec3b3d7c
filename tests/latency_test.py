"""The latency table: measured on a small model, accepted as a budget."""

import dataclasses
import json
import platform

import pytest

from effllm_jax import budgets
from effllm_jax import sources
from experiments import latency
from tests import conftest
from tests import model_files


@pytest.fixture(scope='module', name='folder')
def _folder(tmp_path_factory):
  return conftest.write_model_folder(tmp_path_factory.mktemp('m') / 'model')


def run(folder, out, *more):
  return conftest.command(
    'latency',
    conftest.CONFIG_FILE,
    f'--config.source={folder}',
    '--config.prune.multiple_of.ffn=8',
    '--config.prune.multiple_of.stem=8',
    f'--out={out}',
    '--tokens=32',
    *more,
  )


def test_the_table_is_a_budget(folder, tmp_path):
  out = tmp_path / 'latency.json'
  done = run(folder, out, '--repeats=2')
  assert done.returncode == 0, done.stderr
  assert 'the fit is at most' in done.stdout
  record = json.loads(out.read_text())
  cfg = sources.load(folder, tmp_path, params=False).cfg
  assert record['model'] == {'V': cfg.V, 'N': cfg.N, 'G': cfg.G, 'H': cfg.H}
  machine = record['machine']
  assert (machine['tokens'], machine['batch']) == (32, 1)
  assert machine['device'] and machine['cpus'] and machine['jax']
  assert machine['dtype'] == 'float32'
  widths = [(s['heads'], s['ffn'], s['stem']) for s in record['shapes']]
  assert widths[0] == (cfg.K, cfg.F, cfg.D)
  assert len(set(widths)) == len(widths) == 9
  assert not list(tmp_path.glob('*.tmp'))

  cost = budgets.make(cfg, 'ms', format='', context=0, table=out)
  for s in record['shapes']:
    small = dataclasses.replace(cfg, K=s['heads'], F=s['ffn'], D=s['stem'])
    fitted = cost.reported(cost.of_config(small))
    assert abs(fitted / s['ms'] - 1) <= cost.fit_error + 1e-6


def test_the_time_of_a_token_in_llama_cpp(tmp_path):
  pytest.importorskip('xllamacpp', reason='the runtime')
  gguf = model_files.write_gguf(tmp_path / 'toy.gguf')
  out = tmp_path / 'latency.json'
  done = run(gguf, out, '--repeats=1', '--format=gguf-q8_0', '--decode')
  assert done.returncode == 0, done.stderr
  assert 'gguf-q8_0, threads: 1, a token after 32 tokens' in done.stdout
  record = json.loads(out.read_text())
  machine = record['machine']
  assert (machine['format'], machine['decode']) == ('gguf-q8_0', True)
  # The types of a file are its format's, and it runs on the processor.
  assert 'dtype' not in machine
  assert machine['device'] == platform.machine()
  assert len(record['shapes']) == 9
  assert all(s['ms'] > 0 for s in record['shapes'])
  assert {p.name for p in tmp_path.iterdir()} == {'toy.gguf', 'latency.json'}
  cfg = sources.load(gguf, tmp_path, params=False).cfg
  budgets.make(cfg, 'ms', format='', context=0, table=out)


def test_a_pruned_source_in_llama_cpp(tmp_path):
  """Its masks are for other widths than the shapes have."""
  pytest.importorskip('xllamacpp', reason='the runtime')
  from tests import export_test

  gguf = model_files.write_gguf(tmp_path / 'toy.gguf')
  saved = sources.save(
    sources.load(gguf, tmp_path, params=False), tmp_path / 'saved'
  )
  export_test.write_checkpoint(
    tmp_path / 'run',
    saved,
    lambda m: m.replace(ffn=m.ffn.at[0, 64:].set(False)),
  )
  (source,) = (tmp_path / 'run' / 'checkpoints').iterdir()
  out = tmp_path / 'latency.json'
  done = run(source, out, '--repeats=1', '--format=gguf-f32')
  assert done.returncode == 0, done.stderr
  assert len(json.loads(out.read_text())['shapes']) == 9


def test_the_shapes_are_on_multiples_where_there_is_room():
  shapes = latency._shapes(
    {'heads': 3, 'ffn': 1536, 'stem': 576}, {'heads': 1, 'ffn': 64, 'stem': 64}
  )
  assert shapes[0] == (3, 1536, 576)
  assert shapes[-2:] == [(1, 768, 256), (2, 1152, 384)]
  assert latency._shapes(
    {'heads': 2, 'ffn': 20, 'stem': 16}, {'heads': 2, 'ffn': 16, 'stem': 16}
  )[-2] == (1, 10, 8)


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--tokens=129'], "--tokens 129 exceeds the source model's context 128"),
    (['--decode'], '--decode: format jax has no key/value cache; set --format'),
    (['--out=nowhere/latency.json'], 'nowhere is not a folder; set --out'),
    (['--out=.'], "--out '.' is a folder; set --out to a file"),
    (['--out='], "--out '' is a folder; set --out to a file"),
    (['--config.model.dtype=int8'], "model.dtype 'int8' is not one of float32"),
    (
      ['--config.prune.multiple_of.ffn=0'],
      'ffn 64 of the source model, on multiples of 0, has no half to time',
    ),
  ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, more, message):
  done = run(folder, tmp_path / 'latency.json', *more)
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.count('\n') == 1
  assert not (tmp_path / 'latency.json').exists()
