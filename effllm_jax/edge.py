"""Size, speed and quality of models, through the runtimes they are for.

Source and pruned model take turns, so that a machine that drifts drifts for
both. Quality is measured on what the runtime itself computes from its file: the
arithmetic of a format is part of what a user gets.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
import os
import pathlib
import statistics
import types
from typing import Any

import numpy as np
import optax

from effllm_jax import atomic
from effllm_jax import errors
from effllm_jax import formats
from effllm_jax import heldout as heldout_lib
from effllm_jax import timing
from effllm_jax import weights


def measure(
  models: Mapping[str, weights.Source],
  names: Sequence[str],
  heldout: Mapping[str, heldout_lib.HeldOut],
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
    names: of formats that have a runtime.
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
    errors.InputError: a format cannot hold a model, or the files cannot be
      written.
  """
  # Before the first format, which may take minutes.
  for model in models.values():
    formats.check_model(model, names)
  rows = []
  for name in names:
    runtime, file = formats.FORMATS[name].runtime, formats.FORMATS[name].file
    with contextlib.ExitStack() as stack:
      with errors.writing(scratch):
        made = stack.enter_context(atomic.scratch(pathlib.Path(scratch)))
      files = {}
      for label, model in models.items():
        say(f'{name}: writing {label}')
        folder = made / str(len(files))
        folder.mkdir()
        formats.write(model, name, folder)
        files[label] = folder / file
      speeds = {label: [] for label in models}
      for i in range(rounds):
        say(f'{name}: round {i + 1} of {rounds}')
        for label, path in files.items():
          speeds[label].append(
            timing.speed(runtime.__name__, path, threads, prefill, decode)
          )
      for label, path in files.items():
        say(f'{name}: bits per byte of {label}')
        found = speeds[label]
        rows.append(
          {
            'format': name,
            'model': label,
            # An ONNX file keeps large weights in one beside it.
            'bytes': sum(p.stat().st_size for p in path.parent.iterdir()),
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
  runtime: types.ModuleType,
  path: pathlib.Path,
  heldout: Mapping[str, heldout_lib.HeldOut],
) -> float | None:
  """Cross-entropy of held-out text per UTF-8 byte, in bits, in a runtime.

  llama.cpp's cache is in single precision for it, as when a file is checked.
  """
  cut = []
  for held in heldout.values():
    for window, weight in zip(held.windows, held.weight, strict=True):
      # What follows the last scored token need not be read. None is scored
      # where a window is a separator.
      end = int(np.flatnonzero(weight).max(initial=-1)) + 1
      if end:
        cut.append((window[:end].tolist(), window[1 : end + 1], weight[:end]))
  if not cut:
    return None
  nats = 0.0
  read = runtime.logits(path, [tokens for tokens, _, _ in cut])
  for logits_TV, (_, targets_T, weight_T) in zip(read, cut, strict=True):
    losses_T = optax.softmax_cross_entropy_with_integer_labels(
      logits_TV, targets_T
    )
    nats += float((losses_T * weight_T).sum())
  num_bytes = sum(held.num_bytes for held in heldout.values())
  return nats / num_bytes / math.log(2)
