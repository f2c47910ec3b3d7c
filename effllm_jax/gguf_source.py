"""GGUF, llama.cpp's file format: weights, architecture and tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Whatever
the quantisation, the weights come out as float32.
"""

import collections
import dataclasses
import itertools
import math
import mmap
import pathlib
import struct
from typing import Any
from typing import NamedTuple

import gguf
import numpy as np
import tokenizers

from effllm_jax import bpe
from effllm_jax import errors
from effllm_jax import fetch
from effllm_jax import structure
from effllm_jax import weights

# Those whose graph is ours. Where llama.cpp rotates neighbouring channels of a
# head, files have the rows of q and k in another order than Hugging Face.
_ARCHITECTURES = ('llama', 'qwen2', 'qwen3')
_PERMUTED = ('llama',)
# Metadata of an architecture that changes nothing in the arithmetic.
_NEUTRAL = ('vocab_size', 'context_length', 'tensor_data_layout')
# Divisors of the rotary frequencies.
_ROPE_FREQS = 'rope_freqs.weight'
# Codes of `struct`.
_SCALARS = {
  gguf.GGUFValueType[name]: code
  for name, code in {
    'UINT8': 'B', 'INT8': 'b', 'UINT16': 'H', 'INT16': 'h', 'UINT32': 'I',
    'INT32': 'i', 'UINT64': 'Q', 'INT64': 'q', 'FLOAT32': 'f', 'FLOAT64': 'd',
    'BOOL': '?',
  }.items()
}  # fmt: skip
# Types that are arrays of numbers; the others are bytes.
_ARRAYS = {
  gguf.GGMLQuantizationType.F32: np.dtype('<f4'),
  gguf.GGMLQuantizationType.F16: np.dtype('<f2'),
}
_MOST_AXES = 4  # as in llama.cpp


def read(path: pathlib.Path, params: bool) -> weights.Source:
  """Reads a model of architecture llama, qwen2 or qwen3 from one GGUF file.

  Args:
    path: the file.
    params: also dequantise the weights.

  Raises:
    errors.InputError: not a complete GGUF file, or something that the
      block here cannot represent.
  """
  fields, tensors = contents(path)
  meta = _Metadata(path, fields)
  # Before what the part lacks is asked for; 0 is in a file that was joined.
  parts = meta.get('split.count', int, 1, least=0)
  if parts > 1:
    raise errors.InputError(
      f'{path} is one of {parts} files that a model was split into; join them '
      'with llama-gguf-split --merge'
    )
  cfg = _config(meta, tensors)
  # What stands for a part of the architecture is in it already.
  read_already = {
    _ROPE_FREQS: cfg.rope_scaling is not None,
    weights.GGUF.unembed: cfg.tied,
  }
  found = {
    name: t.shape for name, t in tensors.items() if not read_already.get(name)
  }
  expected = weights.file_shapes(cfg, weights.GGUF)
  shapes = weights.check_tensors(expected, found, str(path))
  tokenizer = read_tokenizer(path, fields)
  bos, pad, *ends = (
    meta.get(key, int, least=0) if key in fields else None
    for key in (
      f'tokenizer.ggml.{name}_token_id'
      for name in ('bos', 'padding', 'eos', 'eot', 'eom')
    )
  )
  eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
  special_ids = [i for i in (bos, *eos_ids, pad) if i is not None]
  weights.check_tokenizer(tokenizer, special_ids, cfg.V, str(path))

  def tensor(name):
    array = _dequantised(tensors, name, path)
    heads = {'attn_q': cfg.K * cfg.G, 'attn_k': cfg.K}.get(name.split('.')[-2])
    permuted = heads and fields['general.architecture'] in _PERMUTED
    return unpermute(array, heads) if permuted else array

  sizes = collections.Counter()
  for t in tensors.values():
    sizes[t.tensor_type.name] += math.prod(t.shape)
  dtype = sizes.most_common(1)[0][0]
  licence = meta.text('general.license')
  licence_name, licence_link = (
    meta.text(f'general.license.{key}') if licence == 'other' else None
    for key in ('name', 'link')
  )
  return weights.Source(
    name=path.name,
    description=f'{meta.text("general.name") or path.stem}, {dtype} GGUF',
    licence=licence,
    sha256=fetch.sha256(path),
    dtype=dtype,
    cfg=cfg,
    separator_id=weights.separator(tokenizer, eos_ids, None, str(path)),
    bos_id=bos,
    eos_ids=eos_ids,
    pad_id=pad,
    chat_template=meta.text('tokenizer.chat_template'),
    tokenizer=tokenizer,
    params=(
      weights.read_params(cfg, weights.GGUF, shapes, tensor, str(path))
      if params
      else None
    ),
    licence_name=licence_name,
    licence_link=licence_link,
  )


class Tensor(NamedTuple):
  """A tensor as a file stores it.

  Attributes:
    shape: of the values, the longest stride first.
    tensor_type: how they are encoded.
    data: read-only view of the file: float16, float32, or bytes [..., row].
  """

  shape: tuple[int, ...]
  tensor_type: gguf.GGMLQuantizationType
  data: np.ndarray


def contents(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Metadata and tensors of a file, by their names.

  The header is believed in nothing: every length is checked against what is
  left of the file before something of that length is made, and no two tensors
  share a byte, so that what is read is never much larger than the file.

  Raises:
    errors.InputError: not a complete GGUF file.
  """
  try:
    with open(path, 'rb') as file:
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _parse(_Header(data))
  except OSError as e:
    raise errors.InputError(
      f'cannot read {path}: {e.strerror}; give a complete GGUF file'
    ) from e
  except ValueError as e:
    raise errors.InputError(
      f'{path} is not a complete GGUF file ({e}); fetch it again'
    ) from e


class _Header:
  """Reads the values of a header one after another, never past the end."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def take(self, size: int) -> bytes:
    if size > len(self.data) - self.at:
      raise ValueError(
        f'a value of its header would end at byte {self.at + size} of '
        f'{len(self.data)}'
      )
    self.at += size
    return self.data[self.at - size : self.at]

  def number(self, code: str) -> int | float | bool:
    return struct.unpack(f'<{code}', self.take(struct.calcsize(code)))[0]

  def string(self) -> str:
    return self.take(self.number('Q')).decode()

  def value(self, kind: int) -> Any:
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    if kind == gguf.GGUFValueType.STRING:
      return self.string()
    if kind != gguf.GGUFValueType.ARRAY:
      raise ValueError(f'no metadata have type {kind}')
    kind, count = self.number('I'), self.number('Q')
    if kind in _SCALARS:
      code = _SCALARS[kind]
      data = self.take(count * struct.calcsize(code))
      return [x for (x,) in struct.iter_unpack(f'<{code}', data)]
    # As in llama.cpp, no array holds arrays.
    if kind != gguf.GGUFValueType.STRING:
      raise ValueError(f'no array holds type {kind}')
    return [self.string() for _ in range(count)]


def _parse(header):
  """Metadata and tensors; a ValueError says what is wrong."""
  if header.take(4) != b'GGUF':
    raise ValueError('it does not begin with GGUF')
  version = header.number('I')
  if version not in (2, 3):
    swapped = version & 0xFFFF == 0
    raise ValueError(
      'the byte order of another machine' if swapped else f'version {version}'
    )
  num_tensors, num_fields = header.number('Q'), header.number('Q')
  fields = {}
  for _ in range(num_fields):
    key = header.string()
    if key in fields:
      raise ValueError(f'metadata {key} twice')
    fields[key] = header.value(header.number('I'))
  stored = {}
  for _ in range(num_tensors):
    name = header.string()
    if name in stored:
      raise ValueError(f'tensor {name} twice')
    rank = header.number('I')
    if rank > _MOST_AXES:
      raise ValueError(f'tensor {name} with {rank} axes')
    shape = tuple(header.number('Q') for _ in range(rank))[::-1]
    if 0 in shape:
      raise ValueError(f'tensor {name} with shape {shape}')
    kind = gguf.GGMLQuantizationType(header.number('I'))
    stored[name] = shape, kind, header.number('Q')
  alignment = fields.get('general.alignment', gguf.GGUF_DEFAULT_ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f'general.alignment = {alignment}')
  start = -(-header.at // alignment) * alignment
  spans, tensors = [], {}
  for name, (shape, kind, offset) in stored.items():
    begin = start + offset
    dtype = _ARRAYS.get(kind, np.dtype(np.uint8))
    layout = shape
    if kind not in _ARRAYS:
      layout = gguf.quants.quant_shape_to_byte_shape(shape or (1,), kind)
    end = begin + math.prod(layout) * dtype.itemsize
    if end > len(header.data):
      raise ValueError(
        f'tensor {name} would end at byte {end} of {len(header.data)}'
      )
    flat = np.frombuffer(header.data, dtype, math.prod(layout), begin)
    tensors[name] = Tensor(shape, kind, flat.reshape(layout))
    spans.append((begin, end, name))
  for (_, end, _), (begin, _, name) in itertools.pairwise(sorted(spans)):
    if begin < end:
      raise ValueError(f'tensor {name} overlaps another one')
  return fields, tensors


def _dequantised(tensors, name, path):
  """The float32 array in a tensor of any type that the gguf package knows."""
  tensor = tensors[name]
  try:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as e:
    raise errors.InputError(
      f'{path}: tensor {name} has type {tensor.tensor_type.name}, which '
      'the gguf package cannot dequantise; use a file in F16, Q8_0 or Q4_1'
    ) from e


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Undoes llama.cpp's order of the rows of q and k, [heads * H, ...].

  llama.cpp rotates neighbouring channels of a head, we (as Hugging Face) rotate
  channel i with i + H/2. Left out, the model still loads and talks, badly:
  SmolLM2's perplexity on real text goes from about 26 to 352.
  """
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


class _Metadata:
  """Typed access to the key-value section, with errors that name the key."""

  def __init__(self, path, fields):
    self.path, self.fields = path, fields
    self.used = set()

  def get(self, key, kind, default=None, least=1e-30):
    self.used.add(key)
    value = self.fields.get(key, default)
    if value is None:
      raise errors.InputError(
        f'{self.path}: metadata {key} is missing; use another conversion of '
        'the model'
      )
    if kind is float and isinstance(value, int):
      value = float(value)
    right = isinstance(value, kind) and not isinstance(value, bool)
    if not right or (
      kind in (int, float) and not least <= value <= structure.MOST[kind]
    ):
      raise self.refused(key, value)
    return value

  def text(self, key):
    """A string, or None where there is none."""
    value = self.fields.get(key)
    if not isinstance(value, str | None):
      raise self.refused(key, value)
    return value

  def refused(self, key, value):
    if isinstance(value, list) and len(value) > 8:
      value = f'a list of {len(value)}'
    return errors.InputError(
      f'{self.path}: {key} = {value} is not something that the block '
      'here can represent; choose another source model'
    )


def _config(meta, tensors):
  """The architecture from the metadata; refuses what we cannot represent."""
  arch = meta.get('general.architecture', str)
  if arch not in _ARCHITECTURES:
    raise meta.refused('general.architecture', arch)

  def get(key, kind=int, default=None):
    return meta.get(f'{arch}.{key}', kind, default)

  D, heads = get('embedding_length'), get('attention.head_count')
  K = get('attention.head_count_kv', default=heads)
  H = get('attention.key_length', default=max(D // heads, 1))
  if heads % K:
    raise meta.refused(
      f'{arch}.attention.head_count_kv', f'{K} of {heads} heads'
    )
  if H % 2:
    raise meta.refused(f'{arch}.attention.key_length', H)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if get(key, default=H) != H:
      raise meta.refused(f'{arch}.{key}', f'{get(key)} (head width {H})')
  embed = tensors.get('token_embd.weight')
  cfg = structure.ModelConfig(
    V=get(
      'vocab_size', default=embed.shape[0] if embed and embed.shape else None
    ),
    D=D,
    N=get('block_count'),
    K=K,
    G=heads // K,
    H=H,
    F=get('feed_forward_length'),
    context=get('context_length'),
    rope_theta=get('rope.freq_base', float, 10_000.0),
    # Stored in single precision; the decimal that was meant is the shortest.
    norm_eps=float(
      str(np.float32(get('attention.layer_norm_rms_epsilon', float)))
    ),
    tied=_is_tied(tensors),
    qkv_bias='blk.0.attn_q.bias' in tensors,
    qk_norm=arch == 'qwen3',
  )
  for key, value in meta.fields.items():
    setting = key.removeprefix(f'{arch}.')
    # Of one setting the other value is that of every model without it.
    causal = setting == 'attention.causal'
    off = value in ((True,) if causal else (0, False, 'none'))
    off = off or setting in _NEUTRAL
    if key.startswith(f'{arch}.') and key not in meta.used and not off:
      raise meta.refused(key, value)
  # llama.cpp reads this tensor for `llama`; elsewhere nothing has a use for it.
  if arch == 'llama' and _ROPE_FREQS in tensors:
    divisors = _dequantised(tensors, _ROPE_FREQS, meta.path)
    return dataclasses.replace(cfg, rope_scaling=_scaling(meta, cfg, divisors))
  return cfg


def _is_tied(tensors):
  """Whether no output matrix is there, or one that repeats the embedding."""
  output = tensors.get(weights.GGUF.unembed)
  embed = tensors.get(weights.GGUF.embed)
  if output is None or embed is None:
    return output is None
  return output.tensor_type == embed.tensor_type and np.array_equal(
    output.data, embed.data
  )


def _scaling(meta, cfg, divisors):
  """Llama 3's scaling, of which a file has only the result.

  Its lower and upper ends are taken as 1 and 4, as in every Llama 3; the factor
  is the largest divisor, the original context that of any frequency between the
  ends. What does not give the same divisors again is refused.

  Args:
    meta: the metadata.
    cfg: the architecture so far.
    divisors: of each rotary frequency, [H/2].
  """
  low, high = 1.0, 4.0
  factor = float(divisors.max(initial=0))
  if (
    divisors.shape == (cfg.H // 2,)
    and 1 < factor < math.inf
    and divisors.min() > 0
  ):
    plain = cfg.rotary_frequencies(scaled=False)
    mix = (1 / divisors.astype(float) - 1 / factor) / (1 - 1 / factor)
    between = (mix > 0.01) & (mix < 0.99)
    turns = low + mix[between] * (high - low)
    contexts = turns * 2 * math.pi / plain[between]
    context = round(np.median(contexts)) if between.any() else 8192
    found = structure.RopeScaling(factor, low, high, context)
    if np.allclose(found.divisors(plain), divisors, rtol=1e-4, atol=0):
      return found
  raise meta.refused(_ROPE_FREQS, f'{divisors.tolist()}'[:60])


def read_tokenizer(
  path: pathlib.Path, fields: dict[str, Any]
) -> tokenizers.Tokenizer:
  """The tokenizer from vocabulary and merges, if it is byte-level BPE.

  Raises:
    errors.InputError: it is another one, or the metadata are incomplete.
  """
  meta = _Metadata(path, fields)
  model = meta.get('tokenizer.ggml.model', str)
  if model != 'gpt2':
    raise errors.InputError(
      f'{meta.path}: tokenizer.ggml.model = {model}, only gpt2 (byte-level '
      "BPE) is read; use the model's Hugging Face folder"
    )
  pre = meta.get('tokenizer.ggml.pre', str)
  key = 'tokenizer.ggml.add_eos_token'
  if meta.fields.get(key):
    raise meta.refused(key, True)
  # llama.cpp's default for Llama 3, whose files may leave the key out.
  bos = meta.fields.get('tokenizer.ggml.add_bos_token', pre == 'llama-bpe')
  return bpe.tokenizer(
    meta.get('tokenizer.ggml.tokens', list),
    meta.get('tokenizer.ggml.token_type', list),
    meta.get('tokenizer.ggml.merges', list),
    pre,
    meta.get('tokenizer.ggml.bos_token_id', int, least=0) if bos else None,
    str(meta.path),
  )
