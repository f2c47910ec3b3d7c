"""What users give is damaged or hostile: one line of refusal, nothing else.

Every reader gets mutations of a valid file and must read it or refuse it with
`errors.InputError`. `HOSTILE=50` in the environment tries 50 times as many.
"""

import bz2
import contextlib
import functools
import gzip
import importlib
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
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
from effllm_jax import documents
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import fetch
from effllm_jax import gguf_source
from effllm_jax import packages
from effllm_jax import plan
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import splitting
from effllm_jax import state as state_lib
from effllm_jax import structure
from effllm_jax import tables
from effllm_jax import untrusted
from effllm_jax import weights
from effllm_jax import workdir
from experiments.configs import smollm2_135m
from kernels import autotune
from tests import conftest
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
def watched(num_bytes):
  """Fails where what is inside hangs, or needs far more than `num_bytes`."""

  def stop(*_):
    raise AssertionError(f'no answer after {SECONDS} s')

  old = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  # numpy reports to it what it allocates, and so does Python; what Rust and
  # Oniguruma do is seen by the limit in `test_a_process_with_little_memory`.
  tracemalloc.start()
  try:
    yield
    _, peak = tracemalloc.get_traced_memory()
    assert peak < MOST_TIMES * num_bytes + MOST_MORE, (
      f'{peak:,} bytes to read {num_bytes:,}'
    )
  finally:
    tracemalloc.stop()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def answer(read, path, kinds=(errors.InputError,)):
  """What `read` returns, or the line with which it refuses `path`."""
  size = sum(p.stat().st_size for p in _files(path))
  with watched(size):
    try:
      return read()
    except kinds as e:
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
