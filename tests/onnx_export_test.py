"""ONNX: onnxruntime computes the masked model, cache and padding included."""

import dataclasses
import sys

import numpy as np
import pytest

from effllm_jax import agreement
from effllm_jax import errors
from effllm_jax import onnx_export
from effllm_jax import weights
from effllm_jax import widths
from tests import conftest
from tests import model_files

torch = pytest.importorskip('torch', reason='the graph is traced in PyTorch')
pytest.importorskip('onnxscript', reason='writes the graph')
onnxruntime = pytest.importorskip('onnxruntime', reason='runs the graph')
toys = pytest.importorskip('tests.modeling_effllm_test')

CFG = dataclasses.replace(model_files.CFG, N=3, K=3)
UNTIED = dataclasses.replace(toys.UNTIED, N=2)
# Architecture, masks.
SHAPES = {
  'ragged': (CFG, toys.ragged(CFG, 0, no_heads=(0,), no_ffn=(2,))),
  'uniform': (UNTIED, None),
}


def make(name) -> weights.Source:
  cfg, masks = SHAPES[name]
  return model_files.finished(cfg, model_files.random_params(cfg), masks)


@pytest.fixture(scope='module', name='files')
def _files(tmp_path_factory):
  """Name of a shape -> its file, written once."""
  folder = tmp_path_factory.mktemp('onnx')
  paths = {}
  for name in SHAPES:
    paths[name] = folder / f'{name}.onnx'
    onnx_export.write(make(name), paths[name])
  return paths


def run(path, tokens_BT, cache=None, mask=None):
  """Logits, and the cache to go on with; straight from onnxruntime."""
  session = onnxruntime.InferenceSession(path)
  inputs = {x.name: x.shape for x in session.get_inputs()}
  B, T = tokens_BT.shape
  names = [x for x in inputs if x.startswith('past_key_values')]
  if cache is None:
    cache = [
      np.zeros((B, inputs[x][1], 0, inputs[x][3]), np.float32) for x in names
    ]
  if mask is None:
    mask = np.ones((B, T + cache[0].shape[2]), np.int64)
  feed = {'input_ids': np.asarray(tokens_BT, np.int64), 'attention_mask': mask}
  logits, *cache = session.run(
    None, feed | dict(zip(names, cache, strict=True))
  )
  return logits, cache


@pytest.mark.parametrize('name', SHAPES)
def test_names_sizes_and_nothing_else(files, name):
  made = make(name)
  session = onnxruntime.InferenceSession(files[name])
  live = widths.of_layers(widths.whole(made.masks, made.cfg))
  heads = [k for k in live['heads'] if k]
  assert len(heads) == made.cfg.N - live['heads'].count(0)
  kinds = [(i, k, x) for i, k in enumerate(heads) for x in ('key', 'value')]
  assert [(x.name, x.shape[1::2]) for x in session.get_inputs()[2:]] == [
    (f'past_key_values.{i}.{x}', [k, made.cfg.H]) for i, k, x in kinds
  ]
  assert [x.name for x in session.get_inputs()[:2]] == [
    'input_ids', 'attention_mask',
  ]  # fmt: skip
  assert [x.name for x in session.get_outputs()] == [
    'logits', *(f'present.{i}.{x}' for i, _, x in kinds),
  ]  # fmt: skip
  # One file, nothing dead in it, and nothing about the machine it is from.
  path = files[name]
  assert sorted(path.parent.iterdir()) == sorted(files.values())
  content = path.read_bytes()
  numbers = sum(x.size for _, x in toys.hf_trimmed.tensors(made))
  assert 4 * numbers < len(content) < 4 * numbers + 100_000
  assert b'.py' not in content and b'effllm' not in content


@pytest.mark.parametrize('name', SHAPES)
def test_agrees_with_the_model(files, name):
  found = onnx_export.check(files[name], agreement.answers(make(name)))
  assert found.greedy and found.top1 == 1 and 0 < found.relative < 1e-4


@pytest.mark.parametrize('name', SHAPES)
def test_any_batch_length_and_past(files, name):
  made = make(name)
  masks = widths.whole(made.masks, made.cfg)
  for batch, length, cuts in ((1, 1, ()), (3, 24, (1, 2, 9, 20)), (2, 5, (4,))):
    tokens = np.asarray(conftest.make_tokens(made.cfg, batch, length))
    want, _ = conftest.forward(made.params, masks, tokens, made.cfg)
    cache, parts = None, []
    for part in np.split(tokens, cuts, 1):
      logits, cache = run(files[name], part, cache)
      parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=1e-4)
    assert {x.shape[2] for x in cache} == {length}


def test_padding_changes_nothing(files):
  short, long = (
    np.asarray(conftest.make_tokens(CFG, 1, n, seed=n)) for n in (4, 11)
  )
  mask = np.ones((2, 11), np.int64)
  mask[0, :7] = 0
  both = np.concatenate([np.pad(short, ((0, 0), (7, 0))), long])
  # The padding is in the cache when the last three tokens are read.
  first, cache = run(files['ragged'], both[:, :8], None, mask[:, :8])
  last, _ = run(files['ragged'], both[:, 8:], cache, mask)
  have = np.concatenate([first, last], 1)
  assert np.isfinite(have).all()
  for row, alone in zip((have[:1, 7:], have[1:]), (short, long), strict=True):
    want, _ = run(files['ragged'], alone)
    np.testing.assert_allclose(row, want, atol=1e-4)


def test_no_layer_has_heads(tmp_path):
  cfg = dataclasses.replace(CFG, N=1)
  masks = toys.ragged(cfg, 0, no_heads=(0,))
  made = model_files.finished(cfg, model_files.random_params(cfg), masks)
  onnx_export.write(made, tmp_path / 'x.onnx')
  session = onnxruntime.InferenceSession(tmp_path / 'x.onnx')
  assert [x.name for x in session.get_outputs()] == ['logits']
  found = onnx_export.check(tmp_path / 'x.onnx', agreement.answers(made))
  assert found.greedy and found.relative < 1e-4
  with pytest.raises(errors.InputError, match='cannot write') as caught:
    onnx_export.write(made, tmp_path / 'none' / 'x.onnx')
  assert '\n' not in str(caught.value)


def test_wrong_order_of_heads_is_refused(files):
  made = make('uniform')
  layers = made.params.layers
  wrong = dataclasses.replace(
    made,
    params=made.params.replace(
      layers=layers.replace(wk=np.roll(layers.wk, 1, axis=2))
    ),
  )
  with pytest.raises(RuntimeError, match=r'uniform\.onnx differs.*not kept'):
    onnx_export.check(files['uniform'], agreement.answers(wrong))


def test_as_many_threads_as_are_asked_for(files):
  with onnx_export.opened(next(iter(files.values())), 2, 8) as runtime:
    options = runtime._session.get_session_options()
  assert options.intra_op_num_threads == 2


def test_every_sequence_starts_anew(files):
  sequences = [[3, 1, 4, 1, 5], [9, 2], [3, 1, 4, 1, 5]]
  found = list(onnx_export.logits(files['ragged'], sequences))
  assert [x.shape for x in found] == [(len(s), CFG.V) for s in sequences]
  np.testing.assert_array_equal(found[0], found[2])
  alone, _ = run(files['ragged'], np.array([[9, 2]]))
  np.testing.assert_allclose(found[1], alone[0], atol=1e-5)


@pytest.mark.parametrize('package', ['torch', 'onnxscript'])
def test_write_without_a_package(tmp_path, monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(errors.InputError) as caught:
    onnx_export.write(make('ragged'), tmp_path / 'x.onnx')
  assert package in str(caught.value) and '\n' not in str(caught.value)
  assert 'requirements-edge.txt' in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_check_without_onnxruntime(files, monkeypatch):
  monkeypatch.setitem(sys.modules, 'onnxruntime', None)
  with pytest.raises(errors.InputError, match=r'onnxruntime.*edge\.txt'):
    next(onnx_export.logits(files['ragged'], [[1]]))
