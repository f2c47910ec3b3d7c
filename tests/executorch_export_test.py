"""ExecuTorch: the program computes the masked model, where it is installed."""

import dataclasses
import sys

import pytest

from effllm_jax import agreement
from effllm_jax import errors
from effllm_jax import executorch_export
from effllm_jax import formats
from tests import model_files

pytest.importorskip('torch', reason='the program is traced in PyTorch')
toys = pytest.importorskip('tests.modeling_effllm_test')


def make(cfg=toys.UNTIED):
  cfg = dataclasses.replace(cfg, N=2)
  masks = toys.ragged(cfg, 0, no_heads=(0,), no_ffn=(1,))
  return model_files.finished(cfg, model_files.random_params(cfg), masks)


def test_agrees_with_the_model(tmp_path):
  pytest.importorskip('executorch', reason='optional')
  made = make()
  executorch_export.write(made, tmp_path / 'x.pte')
  path, want = tmp_path / 'x.pte', agreement.answers(made)
  found = executorch_export.check(made, path, want)
  assert found.greedy and found.relative < 1e-4
  other = model_files.random_params(made.cfg, seed=1)
  with pytest.raises(RuntimeError, match=r'x\.pte differs.*not kept'):
    executorch_export.check(
      made, path, agreement.answers(dataclasses.replace(made, params=other))
    )


@pytest.mark.parametrize(
  ('context', 'text'),
  [(2048, '1,024 tokens, of which a call reads at most 128;'),
   (64, '64 tokens, of which a call reads at most 64;')],
)  # fmt: skip
def test_its_limits_are_told(tmp_path, monkeypatch, context, text):
  monkeypatch.setattr(executorch_export, 'write', lambda model, path: None)
  made = make(dataclasses.replace(toys.UNTIED, context=context))
  (note,) = formats.write(made, 'executorch', tmp_path)
  assert note.startswith('model.pte: ') and text in note


def test_without_the_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'executorch', None)
  with pytest.raises(
    errors.InputError, match=r'-r requirements-torch\.txt executorch'
  ) as caught:
    executorch_export.write(make(), tmp_path / 'x.pte')
  assert '\n' not in str(caught.value) and not list(tmp_path.iterdir())
