"""GGUF, llama.cpp's file format: weights, architecture and tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Whatever
the quantisation, the weights come out as float32.
"""

import collections
import dataclasses
import math
import pathlib
from typing import Any

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
# Reads of the header; a vocabulary of 256k tokens with its merges takes 1.6M.
_MOST_VALUES = 5_000_000
# How the reader, which trusts the header, fails on one that lies.
_LIES = (ArithmeticError, LookupError, MemoryError, TypeError, ValueError)


def read(path: pathlib.Path, params: bool) -> weights.Source:
  """Reads a model of architecture llama, qwen2 or qwen3 from one GGUF file.

  Args:
    path: the file.
    params: also dequantise the weights.

  Raises:
    errors.InputError: not a complete GGUF file, or something that the Llama
      block here cannot represent.
  """
  fields, tensors = contents(path)
  meta = _Metadata(path, fields)
  cfg = _config(meta, tensors)
  found = {
    name: tuple(int(n) for n in reversed(t.shape))
    for name, t in tensors.items()
    if cfg.rope_scaling is None or name != _ROPE_FREQS
  }
  weights.check_tensors(cfg, weights.GGUF, found, str(path))
  tokenizer = read_tokenizer(path, fields)
  bos, eos, eot, pad = (
    meta.get(key, int, least=0) if key in fields else None
    for key in (
      f'tokenizer.ggml.{name}_token_id'
      for name in ('bos', 'eos', 'eot', 'padding')
    )
  )
  eos_ids = tuple(dict.fromkeys(i for i in (eos, eot) if i is not None))
  special_ids = [i for i in (bos, *eos_ids, pad) if i is not None]
  weights.check_tokenizer(tokenizer, special_ids, cfg.V, str(path))

  def tensor(name):
    array = _dequantised(tensors[name], path)
    heads = {'attn_q': cfg.K * cfg.G, 'attn_k': cfg.K}.get(name.split('.')[-2])
    permuted = heads and fields['general.architecture'] in _PERMUTED
    return unpermute(array, heads) if permuted else array

  sizes = collections.Counter()
  for t in tensors.values():
    sizes[t.tensor_type.name] += t.n_elements
  dtype = sizes.most_common(1)[0][0]
  return weights.Source(
    name=path.name,
    description=f'{fields.get("general.name", path.stem)}, {dtype} GGUF',
    licence=fields.get('general.license'),
    sha256=fetch.sha256(path),
    dtype=dtype,
    cfg=cfg,
    separator_id=weights.separator(tokenizer, eos_ids, str(path)),
    bos_id=bos,
    eos_ids=eos_ids,
    pad_id=pad,
    chat_template=fields.get('tokenizer.chat_template'),
    tokenizer=tokenizer,
    params=(
      weights.read_params(cfg, weights.GGUF, tensor, str(path))
      if params
      else None
    ),
  )


def contents(
  path: pathlib.Path,
) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
  """Metadata and tensors of a file, by their names.

  Raises:
    errors.InputError: not a complete GGUF file.
  """
  try:
    reader = _Reader(path)
    fields = {k: field.contents() for k, field in reader.fields.items()}
  except OSError as e:
    raise errors.InputError(
      f'cannot read {path}: {e.strerror}; give a complete GGUF file'
    ) from e
  except _LIES as e:
    reason = ' '.join(str(e).split()) or type(e).__name__
    raise errors.InputError(
      f'{path} is not a complete GGUF file ({reason}); fetch it again'
    ) from e
  if reader.byte_order == 'S':
    raise errors.InputError(
      f'{path} has the byte order of another machine; convert it first'
    )
  return fields, {t.name: t for t in reader.tensors}


def _dequantised(tensor, path):
  """The float32 array in a tensor of any type that the gguf package knows."""
  try:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as e:
    raise errors.InputError(
      f'{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, which '
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


class _Reader(gguf.GGUFReader):
  """A reader that stops where the file does.

  The package's own returns empty values past the end: with a damaged length of
  an array it goes on, and keeps them all, until memory runs out.
  """

  _values = 0

  def _get(self, offset, dtype, count=1, override_order=None):
    end = int(offset) + int(count) * np.dtype(dtype).itemsize
    self._values += 1
    if end > len(self.data) or self._values > _MOST_VALUES:
      raise ValueError(
        f'value {self._values} of its header or tensors would end at byte '
        f'{end} of {len(self.data)}'
      )
    return super()._get(offset, dtype, count, override_order)


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
    if not right or (kind in (int, float) and not value >= least):
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
    V=get('vocab_size', default=int(embed.shape[-1]) if embed else None),
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
    tied='output.weight' not in tensors,
    qkv_bias='blk.0.attn_q.bias' in tensors,
    qk_norm=arch == 'qwen3',
  )
  for key, value in meta.fields.items():
    off = value in (0, False, 'none')
    off = off or key.removeprefix(f'{arch}.') in _NEUTRAL
    if key.startswith(f'{arch}.') and key not in meta.used and not off:
      raise meta.refused(key, value)
  # llama.cpp reads this tensor for `llama`; elsewhere nothing has a use for it.
  if arch == 'llama' and _ROPE_FREQS in tensors:
    divisors = _dequantised(tensors[_ROPE_FREQS], meta.path)
    return dataclasses.replace(cfg, rope_scaling=_scaling(meta, cfg, divisors))
  return cfg


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
  plain = cfg.rotary_frequencies(scaled=False)
  factor = float(divisors.max(initial=0))
  if (
    divisors.shape == plain.shape
    and 1 < factor < math.inf
    and divisors.min() > 0
  ):
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
