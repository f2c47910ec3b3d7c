"""Params -> an ONNX file with the KV cache going in and out.

The graph is traced from `modeling_effllm`, so that there is one implementation
in PyTorch, and has layers of different widths as they are. Names and shapes of
its inputs and outputs are those that Optimum and transformers.js use. A layer
without attention has no cache; the others are counted from 0.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import logging
import os
from typing import Any
import warnings

import numpy as np

from effllm_jax import agreement
from effllm_jax import errors
from effllm_jax import hf_trimmed
from effllm_jax import weights

# What pip installs.
_PACKAGES = ('-r requirements-torch.txt', '-r requirements-edge.txt')


def write(model: weights.Source, path: str | os.PathLike) -> None:
  """Exports a model in float32.

  Inputs: input_ids [B, T] and attention_mask [B, past + T], int64, 0 where
  there is padding; past_key_values.{i}.key and .value [B, K_i, past, H].
  Outputs: logits [B, T, V]; present.{i}.key and .value [B, K_i, past + T, H].
  B, T and past are free, past may be 0.

  Args:
    model: its stem is alive.
    path: file to write. Weights of more than 1.5 GB go to `path`.data, which
      the file then finds by its name.

  Raises:
    errors.InputError: a package is missing, or the file cannot be written.
  """
  with errors.installed('ONNX', *_PACKAGES):
    import onnxscript  # noqa: F401  What torch.onnx writes with.
    import torch
  with errors.writing(path):
    # Now, not after the minute that a trace may take.
    open(path, 'wb').close()
  module = traceable(model)
  heads = module.decoder.config.num_key_value_heads_per_layer
  heads = [k for k in heads if k > 0]
  # The trace takes equal sizes for the same, and 1 for always 1.
  B, T, past = 2, 3, 5
  cache = [torch.zeros(B, k, past, model.cfg.H) for k in heads for _ in 'kv']
  inputs, outputs = (
    [f'{what}.{i}.{kind}' for i in range(len(heads)) for kind in _KINDS]
    for what in ('past_key_values', 'present')
  )
  with _quiet():
    program = torch.onnx.export(
      module,
      (
        torch.zeros(B, T, dtype=torch.int64),
        torch.ones(B, past + T, dtype=torch.int64),
        cache,
      ),
      dynamo=True,
      verbose=False,
      input_names=['input_ids', 'attention_mask', *inputs],
      output_names=['logits', *outputs],
      dynamic_shapes=(
        {0: 'batch_size', 1: 'sequence_length'},
        {0: 'batch_size', 1: 'total_sequence_length'},
        [{0: 'batch_size', 2: 'past_sequence_length'}] * len(cache),
      ),
    )
  # Stack traces of this machine, as large as a small model.
  for node in program.model.graph:
    node.metadata_props.clear()
  with errors.writing(path):
    program.save(path)


def check(
  path: str | os.PathLike, want: agreement.Reference
) -> agreement.Agreement:
  """Compares the file in onnxruntime with the model.

  Returns:
    How near it is: its logits of a text, and its greedy continuation of it, one
    token at a time through the cache.

  Raises:
    errors.InputError: onnxruntime is missing.
    RuntimeError: it is further away than float32 allows.
  """
  decoder = _Decoder(path)
  continuation = agreement.greedy(
    lambda tokens: decoder.read(tokens)[-1], want.prompt
  )
  decoder.clear()
  logits_TV = decoder.read(want.prompt + continuation)
  found = agreement.compare(want, logits_TV, continuation)
  agreement.check(found, agreement.LEVELS['f32'], str(path))
  return found


def logits(
  path: str | os.PathLike, sequences: Iterable[list[int]]
) -> Iterator[np.ndarray]:
  """Yields float32 [T, V] for each sequence, read with an empty cache."""
  decoder = _Decoder(path)
  for tokens in sequences:
    decoder.clear()
    yield decoder.read(tokens)


@contextlib.contextmanager
def opened(
  path: str | os.PathLike, threads: int, tokens: int
) -> Iterator['_Decoder']:
  """A runtime of `timing`; its cache grows, `tokens` is no limit."""
  yield _Decoder(path, threads)


def require() -> None:
  """Raises InputError where a package that runs or writes files is missing."""
  with errors.installed('ONNX', *_PACKAGES):
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch  # noqa: F401


def traceable(model: weights.Source) -> Callable[..., tuple[Any, ...]]:
  """The model in PyTorch as a function of plain tensors.

  Returns:
    A module: input_ids [B, T], attention_mask [B, past + T] and a list of keys
    and values, by turns, of the layers with attention, [B, K_i, past, H] -> a
    tuple of logits and the longer keys and values.
  """
  import torch

  from effllm_jax import modeling_effllm

  config = hf_trimmed.config(model)
  # Filled in below; random weights would take longer than the rest.
  with torch.device('meta'):
    decoder = modeling_effllm.EffllmForCausalLM(
      modeling_effllm.EffllmConfig(**config)
    )
  state = {
    name: torch.from_numpy(np.require(x, np.float32, ['C', 'W']))
    for name, x in hf_trimmed.tensors(model)
  }
  if model.cfg.tied:
    state['lm_head.weight'] = state['model.embed_tokens.weight']
  decoder.load_state_dict(state, assign=True)
  decoder.tie_weights()

  class Cache:
    """The part of a cache that the model asks for."""

    def __init__(self, tensors):
      self.entries = list(zip(tensors[::2], tensors[1::2], strict=True))

    def update(self, key, value, i, _):
      self.entries[i] = tuple(
        torch.cat(pair, 2)
        for pair in zip(self.entries[i], (key, value), strict=True)
      )
      return self.entries[i]

  class Traceable(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.decoder = decoder

    def forward(self, input_ids, attention_mask, tensors):
      cache = Cache(tensors)
      logits = self.decoder(input_ids, attention_mask, cache=cache).logits
      return logits, *(x for entry in cache.entries for x in entry)

  return Traceable().eval()


_KINDS = ('key', 'value')


class _Decoder:
  """One sequence in onnxruntime; its cache stays there."""

  def __init__(self, path, threads=0):
    with errors.installed('ONNX', *_PACKAGES):
      import onnxruntime
    self._value = onnxruntime.OrtValue.ortvalue_from_numpy
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    self._session = onnxruntime.InferenceSession(
      path, options, providers=['CPUExecutionProvider']
    )
    self._inputs = {x.name: x.shape for x in self._session.get_inputs()}
    self._outputs = [x.name for x in self._session.get_outputs()]
    self.vocab = self._session.get_outputs()[0].shape[-1]
    self.clear()

  def clear(self):
    """Forgets all tokens."""
    self._length = 0
    self._cache = [
      self._value(np.zeros((1, shape[1], 0, shape[3]), np.float32))
      for name, shape in self._inputs.items()
      if name.startswith('past_key_values.')
    ]

  def read(self, tokens):
    """Goes on with tokens; logits after each, float32 [T, V]."""
    self._length += len(tokens)
    ids = self._value(np.array([tokens], np.int64))
    mask = self._value(np.ones((1, self._length), np.int64))
    feed = dict(zip(self._inputs, [ids, mask, *self._cache], strict=True))
    logits, *self._cache = self._session.run_with_ort_values(
      self._outputs, feed
    )
    return logits.numpy()[0]


@contextlib.contextmanager
def _quiet():
  """Without remarks of the exporter on packages it could have used."""
  logger = logging.getLogger('torch.onnx')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logger.setLevel(level)
