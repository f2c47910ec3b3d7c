"""The adapter: what llama.cpp answers on a file that we did not write."""

import ctypes

import pytest

from effllm_jax import agreement
from effllm_jax import gguf_source
from effllm_jax import llama_cpp
from tests import model_files

refuses = model_files.refuses

pytest.importorskip('xllamacpp', reason='the runtime')


@pytest.fixture(scope='module', name='path')
def _path(tmp_path_factory):
  return model_files.write_gguf(tmp_path_factory.mktemp('toy') / 'toy.gguf')


def test_answers(path, capfd):
  model = gguf_source.read(path, params=True)
  ids = llama_cpp.tokenize(path, model_files.TEXT)
  assert ids == model_files.bpe().encode(model_files.TEXT).ids
  assert llama_cpp.tokenize(path, '') == []
  want = agreement.reference(model.params, None, model.cfg, ids)
  with llama_cpp.reading(path, len(ids) + agreement.NEW_TOKENS) as read:
    greedy = agreement.greedy(read, ids)
  have, again = llama_cpp.logits(path, [ids + greedy] * 2)
  assert have.shape == (len(ids) + agreement.NEW_TOKENS, model.cfg.V)
  assert (have == again).all()
  found = agreement.compare(want, have, greedy)
  agreement.check(found, agreement.LEVELS['f32'], 'llama.cpp')
  # Not told apart from nothing by the check alone.
  assert agreement.compare(want, have[::-1], greedy).relative > 1e-2
  assert llama_cpp.available().startswith('xllamacpp 2')
  assert capfd.readouterr() == ('', '')


def test_as_many_threads_as_are_asked_for(path):
  with llama_cpp.opened(path, 2, 8) as runtime:
    asked = runtime._lib.llama_n_threads
    asked.argtypes = [ctypes.c_void_p]
    assert asked(runtime._ctx) == 2


def test_files_that_it_cannot_open(path, tmp_path):
  broken = tmp_path / 'broken.gguf'
  broken.write_bytes(path.read_bytes()[:200_000])
  refuses('cannot open.*broken.gguf', llama_cpp.tokenize, broken, 'a')
  refuses('cannot open.*no.gguf', llama_cpp.tokenize, tmp_path / 'no.gguf', 'a')


def test_another_layout_of_parameters_is_noticed(path, monkeypatch):
  monkeypatch.setattr(llama_cpp, '_F16', 7)
  refuses('laid out otherwise', list, llama_cpp.logits(path, [[1, 2]]))


def test_without_the_runtime(path, monkeypatch):
  monkeypatch.setattr(llama_cpp, 'xllamacpp', None)
  assert llama_cpp.available() is None
  refuses('requirements-edge', llama_cpp.tokenize, path, 'a')
