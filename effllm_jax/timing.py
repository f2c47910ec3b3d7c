"""Tokens per second and memory of a file in a runtime, in a process of its own.

    python -m effllm_jax.timing <module> <job as JSON>

is what `speed` starts. The module is a runtime: it has `opened(path, threads,
tokens)`, a context with `vocab`, `clear()` and `read(tokens)`.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np

from effllm_jax import errors

# How the process ends where the runtime itself says what to do.
_REFUSED = 2


@dataclasses.dataclass(frozen=True)
class Speed:
  """What one round took, on one file and number of threads.

  Attributes:
    prefill: tokens per second that are read at once.
    decode: tokens per second that are generated one by one.
    peak_bytes: most memory resident in a process of its own, less what it had
      before it opened the file; None where the system does not tell.
  """

  prefill: float
  decode: float
  peak_bytes: int | None


def speed(
  runtime: str,
  path: str | os.PathLike,
  threads: int,
  prefill: int,
  decode: int,
) -> Speed:
  """Measures a file, batch of 1: one round, after one that is not counted.

  A caller that compares files lets them take turns, and takes the medians of
  its rounds.

  Args:
    runtime: full name of the module.
    path: the file.
    threads: of the processor, for both.
    prefill: tokens that a round reads at once into an empty cache.
    decode: tokens that it then reads one by one.

  Raises:
    errors.InputError: no runtime, or one that cannot open the file.
  """
  job = [os.path.abspath(path), threads, prefill, decode]
  done = subprocess.run(
    [sys.executable, '-m', 'effllm_jax.timing', runtime, json.dumps(job)],
    cwd=pathlib.Path(__file__).parents[1],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ['no output'])[-1]
    if done.returncode != _REFUSED:
      last += '; export it again, or free some memory'
    raise errors.InputError(f'{path} cannot be timed: {last}')
  return Speed(**json.loads(done.stdout.splitlines()[-1]))


def _measure(runtime, path, threads, prefill, decode) -> Speed:
  """What `speed` returns, in this process."""
  before = memory('VmRSS')
  with runtime.opened(path, threads, prefill + decode) as decoder:
    tokens = np.random.default_rng(0).integers(
      0, decoder.vocab, prefill + decode
    )
    tokens = tokens.tolist()
    # The first round fills the caches of the machine.
    for _ in range(2):
      decoder.clear()
      start = time.perf_counter()
      decoder.read(tokens[:prefill])
      middle = time.perf_counter()
      for token in tokens[prefill:]:
        decoder.read([token])
      end = time.perf_counter()
    peak = memory('VmHWM')
  return Speed(
    prefill=prefill / (middle - start),
    decode=decode / (end - middle),
    peak_bytes=None if None in (before, peak) else peak - before,
  )


def memory(key: str) -> int | None:
  """Bytes that Linux reports for this process under a key of its status.

  `VmRSS` is what it has now, `VmHWM` the most it ever had; None elsewhere, or
  where it has no such line, as in a sandbox that is not Linux itself (gVisor).
  Not `ru_maxrss`: a child inherits that from a larger parent.
  """
  try:
    status = pathlib.Path('/proc/self/status').read_text('utf-8')
  except OSError:
    return None
  found = re.search(rf'^{key}:\s*(\d+)', status, re.MULTILINE)
  return found and 1024 * int(found[1])


if __name__ == '__main__':
  try:
    module = importlib.import_module(sys.argv[1])
    print(
      json.dumps(dataclasses.asdict(_measure(module, *json.loads(sys.argv[2]))))
    )
  except errors.InputError as e:
    print(e, file=sys.stderr)
    sys.exit(_REFUSED)
