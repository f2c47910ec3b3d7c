"""Runs of the real commands on a small model, and what they left behind."""

import json
import os
import pathlib
import subprocess

import jax
import numpy as np

from effllm_jax import checkpoints
from effllm_jax import workdir as workdir_lib
from tests import conftest

# As a user has it: what is compiled once is kept, below --cache, whatever time
# it took.
_SHARED = (
  'JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
)  # fmt: skip
ENV = {k: v for k, v in os.environ.items() if k not in _SHARED}
# And compiled with all optimisations.
USERS_ENV = {k: v for k, v in ENV.items() if k != 'XLA_FLAGS'}


class Setting:
  """A small model, a text, a cache, and the command that prunes the model."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    self.model = conftest.write_model_folder(root / 'model')
    self.text = conftest.write_text_folder(root / 'text')

  def arguments(self, workdir, *more, **changes) -> list[str]:
    # By the kernels of a user, with 3 shrinks.
    changes = {'model.kernels': 'auto', 'shrink.threshold': 0.1} | changes
    flags = conftest.flags_of(
      conftest.small_run(self.model, self.text, **changes)
    )
    return [
      conftest.CONFIG_FILE,
      f'--workdir={workdir}',
      f'--cache={self.root / "cache"}',
      *flags,
      *more,
    ]

  def main(self, workdir, *more, **changes) -> subprocess.CompletedProcess:
    return conftest.command(
      'main', *self.arguments(workdir, *more, **changes), env=USERS_ENV
    )


def rows(workdir, kind):
  return [
    row
    for row in workdir_lib.read(workdir / 'metrics.jsonl')
    if row['kind'] == kind
  ]


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
  """Asserts one clear line and a non-zero exit."""
  lines = done.stderr.strip().splitlines()
  assert done.returncode == 2, done.stderr
  assert lines, done.stdout
  assert lines[-1].startswith('error: '), done.stderr
  assert 'Traceback' not in done.stderr
  for word in words:
    assert word in lines[-1], lines[-1]


def same_result(a: pathlib.Path, b: pathlib.Path) -> None:
  """Asserts bit-identical models and equal records of two runs."""
  left, right = checkpoints.restore_params(a), checkpoints.restore_params(b)
  jax.tree.map(np.testing.assert_array_equal, left[:2], right[:2])
  assert left[2:] == right[2:]
  assert checkpoints.read_events(a) == checkpoints.read_events(b)
  assert (a / 'trace.jsonl').read_text() == (b / 'trace.jsonl').read_text()
  took = ('seconds', 'compile_seconds', 'data_seconds', 'tokens_per_second')
  for kind in ('train', 'eval', 'shrink'):
    for x, y in zip(rows(a, kind), rows(b, kind), strict=True):
      for key in sorted({*x, *y} - {*took}):
        assert x[key] == y[key], (key, x, y)


def reached(workdir) -> int:
  """Last step in the metrics of a running process; -1 before the first."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return -1
  # Not through workdir.read: the file may change under the reader.
  lines = path.read_bytes().split(b'\n')[:-1]
  return json.loads(lines[-1])['step'] if lines else -1
