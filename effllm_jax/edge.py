"""Size, speed and quality of models, through the runtimes they are for.

Source and pruned model take turns, so that a machine that drifts drifts for
both. Quality is measured on what the runtime itself computes from its file: the
arithmetic of a format is part of what a user gets.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
import os
import pathlib
import statistics
import tempfile
from typing import Any

import numpy as np

from effllm_jax import data
from effllm_jax import errors
from effllm_jax import gguf_export
from effllm_jax import llama_cpp
from effllm_jax import onnx_export
from effllm_jax import timing
from effllm_jax import weights

FORMATS = ('gguf-f32', 'gguf-f16', 'gguf-q8_0', 'gguf-q4_0', 'onnx')


def check_formats(formats: Sequence[str]) -> None:
  """Raises InputError where a format is unknown, or its runtime missing."""
  for name in formats or ['']:
    if name not in FORMATS:
      raise errors.InputError(
        f'format {name!r} has no runtime here; set --formats to some of '
        f'{",".join(FORMATS)}'
      )
  if any(x.startswith('gguf') for x in formats) and not llama_cpp.available():
    raise errors.InputError(
      'llama.cpp is not installed; pip install -r requirements-edge.txt'
    )
  if 'onnx' in formats:
    onnx_export.available()


def write(model: weights.Source, folder: pathlib.Path, name: str):
  """Writes one format into a folder; returns its path and its runtime."""
  if name == 'onnx':
    path = folder / 'model.onnx'
    onnx_export.write(model, path)
    return path, onnx_export
  path = folder / f'model-{name}.gguf'
  gguf_export.write(model, path, name.removeprefix('gguf-'))
  return path, llama_cpp


def measure(
  models: Mapping[str, weights.Source],
  formats: Sequence[str],
  heldout: Mapping[str, data.HeldOut],
  scratch: str | os.PathLike,
  *,
  threads: int,
  prefill: int,
  decode: int,
  rounds: int,
  say: Callable[[str], None],
) -> list[dict[str, Any]]:
  """Measures every model in every format.

  Args:
    models: by the name that the table gives them.
    formats: some of `FORMATS`.
    heldout: text for the bits per byte; empty: not measured.
    scratch: folder for the files, which are deleted again.
    threads: of the processor.
    prefill, decode: tokens that a round reads at once, and generates.
    rounds: timed ones; medians are returned.
    say: told what is going on.

  Returns:
    A row for each format and model: format, model, bytes, prefill and decode
    (tokens per second), memory (bytes at the peak), bits_per_byte (or None).

  Raises:
    errors.InputError: a format cannot hold a model, or no room for the files.
  """
  rows = []
  for name in formats:
    with tempfile.TemporaryDirectory(dir=scratch, prefix='.edge-') as tmp:
      files = {}
      for label, model in models.items():
        say(f'{name}: writing {label}')
        folder = pathlib.Path(tmp) / str(len(files))
        folder.mkdir()
        files[label] = write(model, folder, name)
      speeds = {label: [] for label in models}
      for i in range(rounds):
        say(f'{name}: round {i + 1} of {rounds}')
        for label, (path, runtime) in files.items():
          speeds[label].append(
            timing.speed(runtime.__name__, path, threads, prefill, decode, 1)
          )
      for label, (path, runtime) in files.items():
        say(f'{name}: bits per byte of {label}')
        found = speeds[label]
        rows.append(
          {
            'format': name,
            'model': label,
            'bytes': path.stat().st_size,
            'prefill': statistics.median(x.prefill for x in found),
            'decode': statistics.median(x.decode for x in found),
            'memory': max(
              (x.peak_bytes for x in found if x.peak_bytes), default=None
            ),
            'bits_per_byte': bits_per_byte(runtime, path, heldout),
          }
        )
  return rows


def bits_per_byte(
  runtime, path: pathlib.Path, heldout: Mapping[str, data.HeldOut]
) -> float | None:
  """Cross-entropy of held-out text per UTF-8 byte, in bits, in a runtime."""
  nats, num_bytes = 0.0, 0
  for held in heldout.values():
    num_bytes += held.num_bytes
    for window, weight in zip(held.windows, held.weight, strict=True):
      # What follows the last scored token need not be read.
      end = int(np.flatnonzero(weight)[-1]) + 1
      logprobs_TV = runtime.logprobs(path, window[:end].tolist())
      scored = logprobs_TV[np.arange(end), window[1 : end + 1]]
      nats -= float((scored * weight[:end]).sum())
  return nats / num_bytes / math.log(2) if num_bytes else None
