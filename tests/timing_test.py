"""The clock: what it counts, and what it says of a file it cannot open."""

import contextlib
import pathlib
import types

import pytest

from effllm_jax import errors
from effllm_jax import timing
from tests import model_files


class _Clock:
  """A runtime that takes 1 s to open, 2 s a call and 0.5 s a token."""

  vocab = 7

  def __init__(self):
    self.now, self.calls = 0.0, []

  def clear(self):
    self.calls.append('clear')

  def read(self, tokens):
    assert set(tokens) <= set(range(self.vocab))
    # The first round fills the caches of a machine: it must not count.
    slow = 100 if self.calls.count('clear') == 1 else 1
    self.now += slow * (2 + 0.5 * len(tokens))
    self.calls.append(len(tokens))


def test_the_round_after_the_first_is_counted(monkeypatch):
  clock = _Clock()

  @contextlib.contextmanager
  def opened(path, threads, tokens):
    assert (path, threads, tokens) == ('file', 3, 10)
    clock.now += 1
    yield clock

  monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock.now)
  runtime = types.SimpleNamespace(opened=opened)
  found = timing._measure(runtime, 'file', 3, 8, 2)
  assert found.prefill == 8 / (2 + 4) and found.decode == 2 / (2 * 2.5)
  assert clock.calls == 2 * ['clear', 8, 1, 1]
  assert found.peak_bytes is None or found.peak_bytes >= 0


def test_memory_is_what_linux_says_of_it(monkeypatch):
  now, most = timing.memory('VmRSS'), timing.memory('VmHWM')
  assert now is None or 0 < now <= most
  status = 'Name:\tpython\nVmRSS:\t    1024 kB\nThreads:\t1\n'
  monkeypatch.setattr(pathlib.Path, 'read_text', lambda *_: status)
  # A sandbox may have the one and not the other.
  assert timing.memory('VmRSS') == 2**20
  assert timing.memory('VmHWM') is None

  def missing(*_):
    raise FileNotFoundError

  monkeypatch.setattr(pathlib.Path, 'read_text', missing)
  assert timing.memory('VmRSS') is None


def test_in_a_process_of_its_own(tmp_path):
  pytest.importorskip('xllamacpp', reason='the runtime')
  path = model_files.write_gguf(tmp_path / 'toy.gguf')
  runtime = 'effllm_jax.llama_cpp'
  found = timing.speed(runtime, path, threads=1, prefill=32, decode=8)
  assert found.prefill > 0 and found.decode > 0
  # The weights at least; not the interpreter.
  assert found.peak_bytes is None or 3e5 < found.peak_bytes < 3e8
  broken = tmp_path / 'broken.gguf'
  broken.write_bytes(path.read_bytes()[:200_000])
  with pytest.raises(
    errors.InputError,
    match=r'cannot be timed: llama\.cpp cannot [^;]*; export it again$',
  ):
    timing.speed(runtime, broken, 1, 4, 1)


def test_a_runtime_that_breaks_down_is_told_with_a_remedy(tmp_path):
  with pytest.raises(
    errors.InputError, match=r"no attribute 'opened'; export it again, or free"
  ):
    timing.speed('json', tmp_path, 1, 4, 1)
