"""Damaged and hostile versions of a file, and the answer that they must get.

Every reader must read what it is given or refuse it with `errors.InputError`:
in one line, soon, and without the memory that a lying header asks for.
HOSTILE=50 in the environment tries 50 times as many.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import signal
import struct
import tempfile
import time

import hypothesis
from hypothesis import strategies as st

from effllm_jax import errors
from effllm_jax import structure
from tests import model_files

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
  # There is one such clock, and whoever limits a whole test has set it.
  left, interval = signal.setitimer(signal.ITIMER_REAL, SECONDS)
  start = time.monotonic()
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
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)
    if left:
      left = max(left - (time.monotonic() - start), 1e-3)
      signal.setitimer(signal.ITIMER_REAL, left, interval)


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


# A small model.


TINY = structure.ModelConfig(
  V=320, D=8, N=1, K=1, G=2, H=4, F=8, context=64, rope_theta=1e4,
  norm_eps=1e-5, tied=True,
)  # fmt: skip


@functools.cache
def tiny_gguf():
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'a.gguf'
    return model_files.write_gguf(path, TINY).read_bytes()
