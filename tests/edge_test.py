"""Runtimes beside our own model: the same quality, and figures for all."""

import dataclasses
import json
import math
import pathlib
import types

import jax
import numpy as np
import pytest

from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import edge
from effllm_jax import errors
from effllm_jax import evaluate
from effllm_jax import formats
from effllm_jax import heldout as heldout_lib
from effllm_jax import llama_cpp
from effllm_jax import model
from effllm_jax import runlog
from effllm_jax import selection
from effllm_jax import sources
from effllm_jax import widths
from tests import conftest
from tests import model_files
from tests import runs

CACHE = model_files.CACHE


@pytest.fixture(scope='module', name='text')
def _text(tmp_path_factory):
  return conftest.write_text_folder(tmp_path_factory.mktemp('text') / 'in')


@pytest.fixture(scope='module', name='source')
def _source(tmp_path_factory):
  path = tmp_path_factory.mktemp('source') / 'toy.gguf'
  return sources.load(model_files.write_gguf(path), CACHE)


def pruned(source):
  """Layer 1 has lost a head and some channels."""
  masks = jax.tree.map(np.array, widths.whole(None, source.cfg))
  masks.heads[1, 0] = False
  masks.ffn[1, 32:] = False
  return dataclasses.replace(source, masks=masks)


def heldout(source, text, tmp_path):
  return heldout_lib.windows(
    corpus.prepare(str(text), tmp_path), source.tokenizer,
    source.separator_id, seq_len=48, tokens_per_domain=70,
  )  # fmt: skip


@pytest.mark.parametrize('name', ['gguf-f32', 'onnx'])
def test_measures_what_we_measure(source, text, tmp_path, name):
  pytest.importorskip('xllamacpp' if name == 'gguf-f32' else 'onnxscript')
  held = heldout(source, text, tmp_path)
  models = {'source': source, 'pruned': pruned(source)}
  said = []
  rows = edge.measure(
    models, [name], held, tmp_path,
    threads=1, prefill=40, decode=8, rounds=2, say=said.append,
  )  # fmt: skip
  assert [(r['format'], r['model']) for r in rows] == [
    (name, 'source'), (name, 'pruned'),
  ]  # fmt: skip
  for row in rows:
    m = models[row['model']]
    want = evaluate.bits_per_byte(
      m.params, widths.whole(m.masks, m.cfg), held, m.cfg,
      model.Compute(remat='none'), 2,
    )  # fmt: skip
    assert math.isclose(
      row['bits_per_byte'], want['bits_per_byte'], rel_tol=1e-4
    )
    assert min(row['prefill'], row['decode'], row['memory']) > 0
  assert rows[0]['bits_per_byte'] != rows[1]['bits_per_byte']
  assert rows[1]['bytes'] < rows[0]['bytes']
  assert any('round 2 of 2' in line for line in said)
  assert not list(tmp_path.glob('.effllm-*'))


def test_a_window_in_which_nothing_counts_is_not_read():
  """As one that ends a document, of one target a window."""
  windows = np.array([[1, 2], [2, 0], [0, 3]], np.int32)
  weight = np.array([[1], [0], [1]], np.float32)
  held = {'d': heldout_lib.HeldOut(windows, weight, 4)}
  read = []

  def logits(path, texts):
    read.extend(texts)
    return [np.zeros((len(text), 8), np.float32) for text in texts]

  runtime = types.SimpleNamespace(logits=logits)
  found = edge.bits_per_byte(runtime, pathlib.Path('file'), held)
  assert read == [[1], [0]]
  assert found == pytest.approx(2 * math.log2(8) / 4)


def test_weights_beside_the_graph_count(source, tmp_path, monkeypatch):
  """As an ONNX file of more than 1.5 GB has them."""
  onnx = pytest.importorskip('onnx')
  pytest.importorskip('onnxscript')
  write = formats.write

  def write_apart(model, name, folder):
    notes = write(model, name, folder)
    path = folder / formats.FORMATS[name].file
    onnx.save(
      onnx.load(path), path, save_as_external_data=True,
      location=f'{path.name}.data', size_threshold=1024,
    )  # fmt: skip
    return notes

  monkeypatch.setattr(formats, 'write', write_apart)
  (row,) = edge.measure(
    {'source': source}, ['onnx'], {}, tmp_path,
    threads=1, prefill=4, decode=1, rounds=1, say=lambda line: None,
  )  # fmt: skip
  assert row['bytes'] > 4 * source.cfg.num_params()


def test_a_workdir_that_cannot_be_written(tmp_path):
  with pytest.raises(errors.InputError, match=r'cannot write .*missing: No '):
    edge.measure(
      {}, ['gguf-f32'], {}, tmp_path / 'missing',
      threads=1, prefill=40, decode=8, rounds=1, say=print,
    )  # fmt: skip


def test_what_a_format_cannot_hold_is_told_first(source, tmp_path, monkeypatch):
  """Before another format takes its minutes."""
  cfg = dataclasses.replace(source.cfg, qk_norm=True, qkv_bias=True)
  models = {'source': source, 'pruned': dataclasses.replace(source, cfg=cfg)}
  monkeypatch.setattr(formats, 'write', lambda *_: pytest.fail('written'))
  with pytest.raises(errors.InputError, match='norms of q and k'):
    edge.measure(
      models, ['onnx', 'gguf-f32'], {}, tmp_path,
      threads=1, prefill=40, decode=8, rounds=1, say=print,
    )  # fmt: skip


@pytest.mark.parametrize('names', [['hf'], [], ['gguf-q8_0', 'gguf-q3_k']])
def test_unknown_formats(names):
  with pytest.raises(errors.InputError, match='has no runtime here'):
    formats.check_runtimes(names)


def test_missing_runtime(monkeypatch):
  monkeypatch.setattr(llama_cpp, 'xllamacpp', None)
  with pytest.raises(errors.InputError, match=r'requirements-edge\.txt'):
    formats.check_runtimes(['gguf-f16'])


def test_command(tmp_path, text):
  """Two formats of a run; then the report and an export's card show them."""
  pytest.importorskip('xllamacpp')
  from tests import export_test

  gguf = model_files.write_gguf(tmp_path / 'toy.gguf')
  folder = sources.save(
    sources.load(gguf, CACHE, params=False), tmp_path / 'saved'
  )
  workdir = tmp_path / 'run'
  export_test.write_checkpoint(
    workdir, folder, lambda m: m.replace(ffn=m.ffn.at[0, 64:].set(False))
  )
  config = {
    'source': str(gguf),
    'data': {'text': str(text), 'seq_len': 48},
  }
  (workdir / 'config.json').write_text(json.dumps(config))
  manifest = dataset.manifest(corpus.prepare(str(text), tmp_path / 'cache'))
  record = workdir / runlog.TEXT
  record.write_text(json.dumps(manifest | {'digest': 'of another'}))
  measure = lambda: conftest.command(
    'edge', f'--workdir={workdir}', '--formats=gguf-f16,gguf-q8_0',
    '--prefill=40', '--decode=8', '--rounds=1', '--tokens=40',
    f'--cache={tmp_path / "cache"}',
  )  # fmt: skip
  # Quality on other text would stand beside that of the run.
  runs.refused(measure(), 'is not the text that the run was started with')
  record.write_text(json.dumps(manifest))
  done = measure()
  assert done.returncode == 0, done.stderr
  assert 'gguf-q8_0' in done.stdout and 'bits/byte' in done.stdout
  record = json.loads((workdir / 'edge.json').read_text())
  assert record['step'] == 5 and len(record['rows']) == 4
  assert record['pad'] == 1

  from effllm_jax import finished
  from effllm_jax import model_card

  found, made = finished.read(workdir, None)
  assert 'On the edge' in model_card.text(found, made, {}, {})

  def size(pad):
    """Bytes of the pruned model of the run: F16, padded."""
    (workdir / 'edge.json').unlink()
    done = conftest.command(
      'edge', f'--workdir={workdir}', '--formats=gguf-f16', '--prefill=4',
      '--decode=1', '--rounds=1', '--tokens=0', f'--pad={pad}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    padded = json.loads((workdir / 'edge.json').read_text())
    assert padded['pad'] == pad
    return padded['rows'][1]['bytes']

  masks, cfg = widths.padded_shape(found.masks, found.cfg, 128)
  zeros = selection.live_params(masks, cfg) - made.params
  narrow = next(
    x['bytes']
    for x in record['rows']
    if (x['format'], x['model']) == ('gguf-f16', 'pruned')
  )
  assert size(128) - narrow == pytest.approx(2 * zeros, rel=0.05)

  (workdir / 'edge.json').unlink()
  (workdir / 'edge.json').mkdir()
  done = conftest.command(
    'edge', f'--workdir={workdir}', '--formats=gguf-f16', '--prefill=4',
    '--decode=1', '--rounds=1', '--tokens=0',
  )  # fmt: skip
  runs.refused(done, f'cannot write {workdir / "edge.json"}: ')

  bad = conftest.command(
    'edge', f'--workdir={workdir}', '--prefill=600', '--formats=gguf-f16'
  )
  assert bad.returncode == 2 and bad.stderr.strip().count('\n') == 0
  assert 'context 512' in bad.stderr
