"""Source models that are damaged or lie: GGUF, safetensors, JSON."""

import dataclasses
import json
import shutil
import struct

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from effllm_jax import budgets
from effllm_jax import corpus
from effllm_jax import errors
from effllm_jax import sources
from effllm_jax import structure
from tests import hostile
from tests import model_files


def restore(folder, files):
  """Puts a folder back into the state that `files` describe."""
  for path in folder.iterdir():
    if path.name not in files:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  for name, data in files.items():
    path = folder / name
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    elif path.is_symlink() or not path.is_file():
      path.unlink(missing_ok=True)
    if not path.exists() or path.read_bytes() != data:
      path.write_bytes(data)


# GGUF.


def gguf_numbers(whole):
  """Position and format of every count, length, type, axis and offset."""
  found, at = [], 8

  def number(code):
    nonlocal at
    found.append((at, f'<{code}'))
    (value,) = struct.unpack_from(f'<{code}', whole, at)
    at += struct.calcsize(code)
    return value

  def skip(size):
    nonlocal at
    at += size

  sizes = {4: 4, 5: 4, 6: 4, 7: 1, 10: 8}
  tensors, fields = number('Q'), number('Q')
  for _ in range(fields):
    skip(number('Q'))
    kind = number('I')
    if kind == 9:
      kind, count = number('I'), number('Q')
      for _ in range(count):
        skip(number('Q') if kind == 8 else sizes[kind])
    elif kind == 8:
      skip(number('Q'))
    elif kind == 4:
      number('I')
    else:
      skip(sizes[kind])
  for _ in range(tensors):
    skip(number('Q'))
    for _ in range(number('I')):
      number('Q')
    number('I')
    number('Q')
  return found


@st.composite
def lying_gguf(draw):
  """A file of which some numbers of the header are others."""
  whole = bytearray(hostile.tiny_gguf())
  numbers = gguf_numbers(bytes(whole))
  # Lengths of tokens are most of them; the first and the last hundred matter.
  ends = numbers[:100] + numbers[-100:]
  for _ in range(draw(st.integers(1, 3))):
    at, code = draw(st.sampled_from(ends))
    (old,) = struct.unpack_from(code, whole, at)
    new = draw(
      st.one_of(
        st.sampled_from(hostile.NUMBERS),
        st.integers(-33, 33).map(lambda x, old=old: old + x),
        st.sampled_from(ends).map(
          lambda other: struct.unpack_from(other[1], whole, other[0])[0]
        ),
      )
    )
    struct.pack_into(code, whole, at, new % 256 ** struct.calcsize(code))
  return bytes(whole)


@hostile.fuzz(250)
@hypothesis.given(
  data=st.one_of(
    lying_gguf(), st.deferred(lambda: hostile.damaged(hostile.tiny_gguf()))
  )
)
def test_gguf(place, data):
  path = place / 'bad.gguf'
  path.write_bytes(data)
  hostile.answer(lambda: sources.load(path, place), path)


def gguf(fields=(), tensors=(), counts=None, data=b''):
  """A GGUF file of raw parts."""
  text = lambda s: struct.pack('<Q', len(s)) + s
  counts = counts or (len(tensors), len(fields))
  head = b'GGUF' + struct.pack('<IQQ', 3, *counts)
  for key, kind, value in fields:
    head += text(key) + struct.pack('<I', kind) + value
  for name, shape, kind, offset in tensors:
    head += text(name) + struct.pack('<I', len(shape))
    head += struct.pack(f'<{len(shape)}QIQ', *shape, kind, offset)
  return head + bytes(-len(head) % 32) + data


NESTED = struct.pack('<IQ', 9, 1) * 5000
LYING_GGUF = {
  'deep arrays': (gguf([(b'a', 9, NESTED)]), 'no array holds type 9'),
  'long array': (gguf([(b'a', 9, struct.pack('<IQ', 0, 2**62))]), 'would end'),
  'long string': (gguf([(b'a', 8, struct.pack('<Q', 2**63))]), 'would end'),
  'many strings': (gguf([(b'a', 9, struct.pack('<IQ', 8, 2**60))]), 'would en'),
  'many fields': (gguf(counts=(0, 2**63)), 'would end'),
  'many tensors': (gguf(counts=(2**63, 0)), 'would end'),
  'same field': (gguf([(b'a', 0, b'1')] * 2), 'metadata a twice'),
  'same tensor': (gguf(tensors=[(b't', [1], 0, 0)] * 2), 'tensor t twice'),
  'no such type': (gguf(tensors=[(b't', [1], 999, 0)]), '999'),
  'many axes': (gguf(tensors=[(b't', [1] * 70, 0, 0)]), '70 axes'),
  'empty axis': (gguf(tensors=[(b't', [0, 2**63], 0, 0)]), 'shape'),
  'half a block': (gguf(tensors=[(b't', [33], 2, 0)]), 'multiple'),
  'large': (gguf(tensors=[(b't', [2**40, 2**40], 0, 0)]), 'would end'),
  'far away': (gguf(tensors=[(b't', [1], 0, 2**64 - 32)]), 'would end'),
  'overlap': (
    gguf(tensors=[(b't', [8], 0, 0), (b'u', [8], 0, 16)], data=bytes(64)),
    'tensor u overlaps',
  ),
  'no alignment': (
    gguf([(b'general.alignment', 4, bytes(4))]),
    'alignment = 0',
  ),
  'not UTF-8': (gguf([(b'\xff', 0, b'1')]), 'utf-8'),
  'swapped': (b'GGUF' + struct.pack('>IQQ', 3, 0, 0), 'byte order'),
}


@pytest.mark.parametrize('name', LYING_GGUF)
def test_gguf_that_lies(place, name):
  data, said = LYING_GGUF[name]
  path = place / 'lying.gguf'
  path.write_bytes(data)
  assert said in hostile.answer(lambda: sources.load(path, place), path)


def test_gguf_with_a_head_of_any_width(tmp_path):
  """The rotary frequencies of it would take 16 GB."""
  path = model_files.write_gguf(
    tmp_path / 'a.gguf',
    dataclasses.replace(
      hostile.TINY, rope_scaling=model_files.LLAMA3.rope_scaling
    ),
    metadata={
      'llama.attention.key_length': 2**31 - 2,
      'llama.attention.value_length': 2**31 - 2,
      'llama.rope.dimension_count': 2**31 - 2,
    },
  )
  assert 'rope_freqs' in hostile.answer(
    lambda: sources.load(path, tmp_path), path
  )


# Hugging Face folders.


@pytest.fixture(scope='module', name='model')
def _model(place):
  """A folder with every file that is read, and the bytes of each."""
  folder = model_files.hugging_face(place / 'model', hostile.TINY, shards=2)
  write = lambda name, x: (folder / name).write_text(json.dumps(x))
  write(
    'generation_config.json',
    {'bos_token_id': 0, 'eos_token_id': [1, 0], 'temperature': 0.5, 'top_k': 5},
  )
  write(
    'tokenizer_config.json',
    {
      'chat_template': [{'name': 'default', 'template': '{{ messages }}'}],
      'eos_token': {'content': '<|endoftext|>'},
      'pad_token': '<|endoftext|>',
    },
  )
  config = json.loads((folder / 'config.json').read_text())
  write(
    'config.json',
    config
    | {
      'layer_types': ['full_attention'],
      'rope_scaling': model_files.LLAMA3_ROPE,
      'rope_parameters': None,
    },
  )
  (folder / 'README.md').write_text('---\nlicense: mit\n---\n')
  assert sources.load(folder, place).licence == 'mit'
  return folder, {p.name: p.read_bytes() for p in folder.iterdir()}


INDEX = 'model.safetensors.index.json'
JSON_FILES = (
  'config.json', 'tokenizer.json', 'tokenizer_config.json',
  'generation_config.json', INDEX,
)  # fmt: skip


@pytest.mark.parametrize('name', JSON_FILES)
def test_json_of_a_model(place, model, name):
  folder, files = model

  @hostile.fuzz(60)
  @hypothesis.given(data=hostile.changed(json.loads(files[name])))
  def check(data):
    restore(folder, files | {name: data})
    hostile.answer(lambda: sources.load(folder, place, params=False), folder)

  check()
  restore(folder, files)


def test_config_of_trimmed_layers(tmp_path):
  folder, live = tmp_path / 'trimmed', {'heads': [1], 'ffn': [3]}
  model_files.trimmed(folder, hostile.TINY, live)
  whole = (folder / 'config.json').read_bytes()

  @hostile.fuzz(60)
  @hypothesis.given(data=hostile.changed(json.loads(whole)))
  def check(data):
    (folder / 'config.json').write_bytes(data)
    hostile.answer(lambda: sources.load(folder, tmp_path), folder)

  check()


@pytest.mark.parametrize('thing', hostile.THINGS)
@pytest.mark.parametrize(
  'name',
  [*JSON_FILES, 'README.md', 'chat_template.jinja',
   'model-00001-of-00002.safetensors', 'model.safetensors'],
)  # fmt: skip
def test_a_thing_in_the_place_of_a_file(place, model, name, thing):
  folder, files = model
  restore(folder, {x: data for x, data in files.items() if x != name})
  hostile.THINGS[thing](folder / name)
  hostile.answer(lambda: sources.load(folder, place), folder)
  restore(folder, files)


@pytest.mark.parametrize(
  'name', [x for x in hostile.STRINGS if x != hostile.STRINGS[-1]]
)
def test_an_index_never_leads_out_of_its_folder(place, model, name):
  folder, files = model
  outside = folder.parent / 'x'
  outside.write_bytes(files['model-00001-of-00002.safetensors'])
  index = json.loads(files[INDEX])
  index['weight_map'] = dict.fromkeys(index['weight_map'], name)
  restore(folder, files | {INDEX: json.dumps(index).encode()})
  message = hostile.answer(lambda: sources.load(folder, place), folder)
  assert isinstance(message, str)
  restore(folder, files)


@st.composite
def lying_safetensors(draw, whole):
  """A file of which the header says something else, or has another length."""
  (size,) = struct.unpack_from('<Q', whole)
  header, rest = whole[8 : 8 + size], whole[8 + size :]
  text = draw(hostile.changed(json.loads(header)))
  length = draw(st.sampled_from([len(text)] * 9 + [*hostile.NUMBERS])) % 2**64
  return struct.pack('<Q', length) + text + rest


def test_safetensors(place, model):
  folder, files = model
  name = 'model-00001-of-00002.safetensors'

  @hostile.fuzz(150)
  @hypothesis.given(
    data=st.one_of(lying_safetensors(files[name]), hostile.damaged(files[name]))
  )
  def check(data):
    restore(folder, files | {name: data})
    hostile.answer(lambda: sources.load(folder, place), folder)

  check()
  restore(folder, files)


@pytest.mark.parametrize('dtype', ['F8_E4M3', 'I8', 'BOOL', 'C64', 'X'])
def test_a_tied_matrix_of_another_type(place, dtype, tmp_path):
  folder = model_files.hugging_face(tmp_path / 'model', hostile.TINY)
  size = {'C64': 8}.get(dtype, 1)
  head = {
    name: {'dtype': dtype, 'shape': [4], 'data_offsets': [i, i + 4 * size]}
    for i, name in (
      (0, 'lm_head.weight'),
      (4 * size, 'model.embed_tokens.weight'),
    )
  }
  text = json.dumps(head).encode()
  (folder / 'model.safetensors').write_bytes(
    struct.pack('<Q', len(text)) + text + bytes(8 * size)
  )
  message = hostile.answer(lambda: sources.load(folder, place), folder)
  assert dtype in message or 'not a complete' in message


# What a run keeps of its source.


@pytest.fixture(scope='module', name='saved')
def _saved(place, model):
  folder, _ = model
  source = sources.load(folder, place)
  origin = jax.tree.map(np.asarray, structure.all_alive(hostile.TINY))
  origin = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape), origin)
  masks = jax.tree.map(lambda x: x % 3 > 0, origin)
  source = dataclasses.replace(source, masks=masks, origin=origin)
  out = sources.save(source, place / 'run' / 'source')
  return out, {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize('name', ['source.json', 'tokenizer.json'])
def test_saved_source(saved, name):
  folder, files = saved

  @hostile.fuzz(80)
  @hypothesis.given(data=hostile.changed(json.loads(files[name])))
  def check(data):
    restore(folder, files | {name: data})
    found = hostile.answer(lambda: sources.load_saved(folder), folder)
    if not isinstance(found, str):
      structure.ModelConfig.from_dict(dataclasses.asdict(found.cfg))

  check()
  restore(folder, files)


@pytest.mark.parametrize('name', hostile.STRINGS)
def test_a_source_of_any_name(tmp_path, monkeypatch, name):
  (tmp_path / 'empty').mkdir()
  monkeypatch.chdir(tmp_path / 'empty')
  with pytest.raises(errors.InputError):
    sources.load(name, tmp_path)
  with pytest.raises(errors.InputError):
    sources.load(f'{name}.gguf', tmp_path)
  with pytest.raises(errors.InputError):
    corpus.prepare(name, tmp_path)
  with pytest.raises(errors.InputError):
    budgets.milliseconds(hostile.TINY, name)
