"""Params -> an ExecuTorch program for XNNPACK, the KV cache going in and out.

Optional, and not in requirements-edge.txt: an export of 2 layers takes half a
minute, one of 30 layers was not through after 9 on a core that others used too.
It is the same function of the same tensors as in `onnx_export`, for a batch of
1. Memory is planned for the longest input, which therefore is bounded.
"""

import os
import pathlib

import numpy as np

from effllm_jax import agreement
from effllm_jax import errors
from effllm_jax import hf_trimmed
from effllm_jax import onnx_export
from effllm_jax import weights

# What pip installs.
_PACKAGES = ('-r requirements-torch.txt', 'executorch')
# Tokens of one call: their logits have a place in memory. Longer prompts are
# read in pieces.
CHUNK = 128
# Most tokens that the cache holds.
CONTEXT = 1024


def limits(model: weights.Source) -> tuple[int, int]:
  """Most tokens of a text, and of one call, that a program takes."""
  context = min(CONTEXT, model.cfg.context)
  return context, min(CHUNK, context)


def write(model: weights.Source, path: str | os.PathLike) -> None:
  """Exports a model in float32, for texts within its `limits`.

  Args:
    model: its stem is alive.
    path: file to write, usually .pte.

  Raises:
    errors.InputError: a package is missing, or the file cannot be written.
  """
  with errors.installed('ExecuTorch', *_PACKAGES):
    from executorch import exir
    from executorch.backends.xnnpack.partition import xnnpack_partitioner
    import torch
  with errors.writing(path):
    # Now, not after the minutes that a trace may take.
    open(path, 'wb').close()
  module = onnx_export.traceable(model)
  # The trace takes 1 for always 1.
  T, past = 3, 5
  cache = _cache(module.decoder.config, past)
  dynamic = torch.export.Dim.DYNAMIC
  context, chunk = limits(model)
  program = torch.export.export(
    module,
    (
      torch.zeros(1, T, dtype=torch.int64),
      torch.ones(1, past + T, dtype=torch.int64),
      cache,
    ),
    dynamic_shapes=(
      {1: dynamic(min=1, max=chunk)},
      {1: dynamic(min=1, max=context)},
      [{2: dynamic(min=0, max=context - 1)}] * len(cache),
    ),
  )
  lowered = exir.to_edge_transform_and_lower(
    program, partitioner=[xnnpack_partitioner.XnnpackPartitioner()]
  )
  with errors.writing(path), open(path, 'wb') as f:
    lowered.to_executorch().write_to_file(f)


def check(
  model: weights.Source,
  path: str | os.PathLike,
  want: agreement.Reference,
) -> agreement.Agreement:
  """Compares the program, run here, with the model.

  Raises:
    errors.InputError: executorch is missing.
    RuntimeError: it is further away than float32 allows.
  """
  with errors.installed('ExecuTorch', *_PACKAGES):
    from executorch import runtime
    import torch
  from effllm_jax import modeling_effllm

  config = modeling_effllm.EffllmConfig(**hf_trimmed.config(model))
  method = (
    runtime.Runtime.get()
    .load_program(pathlib.Path(path))
    .load_method('forward')
  )

  def read(tokens, length, cache):
    """Logits after each token, and the longer cache."""
    mask = torch.ones(1, length + len(tokens), dtype=torch.int64)
    logits, *cache = method.execute([torch.tensor([tokens]), mask, *cache])
    # What it returns is its own memory, which the next call writes to.
    return logits[0].numpy().copy(), [x.clone() for x in cache]

  prompt = want.prompt
  cache, rows, greedy = _cache(config, 0), [], []
  _, chunk = limits(model)
  for i in range(0, len(prompt), chunk):
    logits, cache = read(prompt[i : i + chunk], i, cache)
    rows.append(logits)
  for i in range(agreement.NEW_TOKENS):
    greedy.append(int(rows[-1][-1].argmax()))
    logits, cache = read(greedy[-1:], len(prompt) + i, cache)
    rows.append(logits)
  found = agreement.compare(want, np.concatenate(rows), greedy)
  agreement.check(found, agreement.LEVELS['f32'], str(path))
  return found


def _cache(config, past):
  """Zeros for keys and values of the layers with attention."""
  import torch

  return [
    torch.zeros(1, k, past, config.head_dim)
    for k in config.num_key_value_heads_per_layer
    for _ in 'kv'
    if k > 0
  ]


def require() -> None:
  """Raises InputError where a package that runs or writes files is missing."""
  with errors.installed('ExecuTorch', *_PACKAGES):
    import executorch  # noqa: F401
    import torch  # noqa: F401
