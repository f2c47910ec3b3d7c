"""A model -> one GGUF file for llama.cpp, and whether it is right."""

import contextlib
import dataclasses
import math
import os
import pathlib

import gguf
import numpy as np

from effllm_jax import agreement
from effllm_jax import atomic
from effllm_jax import errors
from effllm_jax import gguf_layout
from effllm_jax import gguf_source
from effllm_jax import llama_cpp
from effllm_jax import weights

_VALUE_TYPES = {
  str: gguf.GGUFValueType.STRING,
  bool: gguf.GGUFValueType.BOOL,
  int: gguf.GGUFValueType.UINT32,
  float: gguf.GGUFValueType.FLOAT32,
}


@dataclasses.dataclass(frozen=True)
class Written:
  """What `write` put into a file.

  Attributes:
    fell_back: names of the tensors whose rows do not divide into blocks, and
      that are F16 instead.
    padding: zeros that fill up narrower layers, where llama.cpp has no
      architecture with widths per layer.
    homeless_ends: tokens that end a generation, and at which llama.cpp goes on.
  """

  fell_back: tuple[str, ...]
  padding: int
  homeless_ends: tuple[str, ...]


def write(
  model: weights.Source, path: str | os.PathLike, format: str
) -> Written:
  """Writes a model, its tokenizer and its chat template.

  Norms, biases and other vectors stay F32; the output matrix of Q4_0 is Q8_0.
  The file appears under its name when it is complete.

  Args:
    model: the stem is alive; heads and ffn may be dead in any layer.
    path: of the file; replaced where it exists.
    format: one of `gguf_layout.TYPES`.

  Raises:
    errors.InputError: an unknown format, a tokenizer that GGUF has no words
      for, or a file that cannot be written.
    ValueError: the stem has dead groups; shrink first.
  """
  path = pathlib.Path(path).expanduser().resolve()
  layout = gguf_layout.Layout(model, format)
  with errors.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.scratch(path.parent) as scratch:
      _fill(scratch / path.name, layout)
      os.replace(scratch / path.name, path)
  kinds = {name: layout.kind(name, x) for name, x in layout.shapes.items()}
  half = gguf.GGMLQuantizationType.F16
  return Written(
    fell_back=tuple(
      name for name, kind in kinds.items() if kind == half != layout.matrices
    ),
    padding=layout.padding,
    homeless_ends=tuple(
      model.tokenizer.id_to_token(i) or f'token {i}'
      for i in gguf_layout.ends(model).homeless
    ),
  )


def _fill(path, layout):
  """Writes a file, one tensor in memory at a time."""
  writer = gguf.GGUFWriter(path, layout.architecture)
  try:
    for key, value in layout.metadata().items():
      if isinstance(value, list):
        writer.add_array(key, value)
      else:
        writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
    # Contents first; the data of a tensor is made when its turn comes.
    for name, shape in layout.shapes.items():
      kind = layout.kind(name, shape)
      size = _bytes(shape, kind)
      writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in layout.tensors():
      rows = tensor.rows
      if tensor.heads:
        rows = _permute(rows, tensor.heads)
      kind = layout.kind(tensor.name, rows.shape)
      writer.write_tensor_data(gguf_layout.encode(rows, kind))
    writer.close()
  finally:
    with contextlib.suppress(OSError):  # What is unwritten stays so.
      writer.close()


def read_back(
  model: weights.Source, path: str | os.PathLike, format: str
) -> None:
  """Compares what a file says with the model that it was made from.

  Every piece of metadata, every tensor and the tokenizer.

  Args:
    model: as given to `write`.
    path: the file.
    format: as given to `write`.

  Raises:
    errors.InputError: not a complete GGUF file.
    RuntimeError: the file holds something else.
  """
  path = pathlib.Path(path)
  layout = gguf_layout.Layout(model, format)
  fields, found = gguf_source.contents(path)
  metadata = {'general.architecture': layout.architecture} | layout.metadata()
  for key, value in metadata.items():
    if isinstance(value, float):
      value = float(np.float32(value))
    if fields.get(key) != value:
      raise _differs(path, f'metadata {key} is {fields.get(key)}, not {value}')
  text = agreement.hard_text(model)
  have = gguf_source.read_tokenizer(path, fields).encode(text).ids
  _check_ids(path, have, model.tokenizer.encode(text).ids)
  for tensor in layout.tensors():
    kind = layout.kind(tensor.name, tensor.rows.shape)
    have = found.pop(tensor.name, None)
    if have is None or have.tensor_type != kind:
      raise _differs(path, f'tensor {tensor.name} is not there in {kind.name}')
    rows = gguf.quants.dequantize(have.data, kind)
    if tensor.heads:
      rows = gguf_source.unpermute(rows, tensor.heads)
    # Rows are rounded one by one, whatever their order.
    if not np.array_equal(rows, gguf_layout.rounded(tensor.rows, kind)):
      raise _differs(path, f'tensor {tensor.name} has other values')
  if found:
    raise _differs(path, f'tensor {min(found)} belongs to no layer')


def check(
  model: weights.Source,
  path: str | os.PathLike,
  format: str,
  want: agreement.Reference,
) -> agreement.Agreement:
  """Compares what llama.cpp makes of a file with the model.

  Args:
    model: as given to `write`.
    path: the file.
    format: as given to `write`.
    want: our answers. Q4_0 is compared with those of the weights as they are in
      the file: what the rounding costs is measured in bits per byte.

  Returns:
    How near it is: logits of a text, and greedy tokens through the cache.

  Raises:
    errors.InputError: llama.cpp is not installed, or cannot open the file.
    RuntimeError: it gives other token ids, or is further away than the format
      allows.
  """
  text = agreement.hard_text(model)
  have = llama_cpp.tokenize(path, text)
  _check_ids(path, have, model.tokenizer.encode(text).ids)
  if format == 'q4_0':
    layout = gguf_layout.Layout(model, format)
    want = agreement.reference(
      layout.rounded_params(), layout.masks, layout.cfg, want.prompt
    )
  most = len(want.prompt) + agreement.NEW_TOKENS
  with llama_cpp.reading(path, most) as read:
    continuation = agreement.greedy(read, want.prompt)
  (logits_TV,) = llama_cpp.logits(path, [want.prompt + continuation])
  found = agreement.compare(want, logits_TV, continuation)
  agreement.check(
    found,
    agreement.LEVELS[format],
    f'{pathlib.Path(path).name} in llama.cpp',
  )
  return found


def _permute(rows, heads):
  """The inverse of `gguf_source.unpermute`, also of a vector."""
  halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def _bytes(shape, kind):
  """Bytes that a tensor takes."""
  block, size = gguf.GGML_QUANT_SIZES[kind]
  return math.prod(shape) // block * size


def _check_ids(path, have, want):
  """Raises RuntimeError where a text has other tokens."""
  if have != want:
    raise _differs(
      path, f'its tokenizer gives {have[:8]}..., not {want[:8]}...'
    )


def _differs(path, what):
  return RuntimeError(f'{path}: {what}; the export is not kept')
