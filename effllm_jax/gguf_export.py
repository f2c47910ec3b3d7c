"""A model -> one GGUF file for llama.cpp, and whether it is right.

Where all layers of a pruned model have the same widths, it is a `llama` (or a
`qwen3`) to llama.cpp. Where they differ, it is a `deci`: the graph of `llama`
with the widths of each layer in the metadata.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
from typing import Any

import gguf
import jax
import numpy as np

from effllm_jax import agreement
from effllm_jax import bpe
from effllm_jax import errors
from effllm_jax import gguf_source
from effllm_jax import llama_cpp
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths

_TYPE = gguf.GGMLQuantizationType
# Format -> type of its matrices, what llama.cpp calls such a file.
_FORMATS = {
  'f32': (_TYPE.F32, gguf.LlamaFileType.ALL_F32),
  'f16': (_TYPE.F16, gguf.LlamaFileType.MOSTLY_F16),
  'q8_0': (_TYPE.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
  'q4_0': (_TYPE.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
FORMATS = tuple(_FORMATS)
# Numbers that share a scale.
_BLOCK = 32
_BLOCKS = (_TYPE.Q8_0, _TYPE.Q4_0)
# Of the output matrix, which is the embedding where they are tied, in a Q4_0
# file; llama.cpp's own tool has Q6_K there, which the gguf package cannot make.
# SmolLM2-135M, against its own weights: KL 0.29 and 92 MB; with Q4_0 0.39 and
# 78 MB, with Q5_0 0.31 and 81 MB. `budgets.FORMATS` counts it so.
_OUTPUT = _TYPE.Q8_0
_VALUE_TYPES = {
  str: gguf.GGUFValueType.STRING,
  bool: gguf.GGUFValueType.BOOL,
  int: gguf.GGUFValueType.UINT32,
  float: gguf.GGUFValueType.FLOAT32,
}
# What rules of splitting words differ in; composed, since llama.cpp does not
# normalise.
_NASTY = (
  "I'LL don't we've x=1,000.50;y=3e-10 0x1F\r\n\r\n\t\t  def f(x):\n    return "
  'x**2  # ½ ² Ⅳ naïve 日本語 🤷🏽   '
)


@dataclasses.dataclass(frozen=True)
class Written:
  """What `write` put into a file.

  Attributes:
    path: of the file.
    architecture: in llama.cpp's words.
    size: of the file, bytes.
    bits_per_weight: of all tensors.
    fell_back: tensors whose rows do not divide into blocks and that are F16
      instead -> bytes that each takes.
    padding: zeros that fill up narrower layers, where llama.cpp has no
      architecture with widths per layer.
  """

  path: pathlib.Path
  architecture: str
  size: int
  bits_per_weight: float
  fell_back: dict[str, int]
  padding: int


@dataclasses.dataclass(frozen=True)
class Checked:
  """What `check` found.

  Attributes:
    tensors: how many were read back and are as they should be.
    runtime: name and version of the llama.cpp that opened the file; None: none
      is installed.
    agreement: of its answers with ours; of Q4_0, with those of the weights as
      they are in the file.
  """

  tensors: int
  runtime: str | None
  agreement: agreement.Agreement | None


def write(
  model: weights.Source, path: str | os.PathLike, format: str
) -> Written:
  """Writes a model, its tokenizer and its chat template.

  Norms, biases and other vectors stay F32; the output matrix of Q4_0 is Q8_0.
  The file appears under its name when it is complete.

  Args:
    model: the stem is alive; heads and ffn may be dead in any layer.
    path: of the file; replaced where it exists.
    format: one of `FORMATS`.

  Raises:
    errors.InputError: an unknown format, a tokenizer that GGUF has no words
      for, or a file that cannot be written.
    ValueError: the stem has dead groups; shrink first.
  """
  path = pathlib.Path(path).expanduser().resolve()
  layout = _Layout(model, format)
  metadata = layout.metadata()
  fell_back, bits, count = {}, 0, 0
  writer = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      dir=path.parent, prefix=f'.{path.name}-'
    ) as tmp:
      scratch = pathlib.Path(tmp) / path.name
      writer = gguf.GGUFWriter(scratch, layout.architecture)
      for key, value in metadata.items():
        if isinstance(value, list):
          writer.add_array(key, value)
        else:
          writer.add_key_value(key, value, _VALUE_TYPES[type(value)])
      # Contents first; the data of a tensor is made when its turn comes.
      for tensor in layout.tensors():
        kind = layout.kind(tensor.name, tensor.rows.shape)
        size = _bytes(tensor.rows.shape, kind)
        writer.add_tensor_info(
          tensor.name, tensor.rows.shape, np.dtype(np.float32), size, kind
        )
        bits, count = bits + 8 * size, count + tensor.rows.size
        if kind == _TYPE.F16 != layout.matrices:
          fell_back[tensor.name] = size
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for tensor in layout.tensors():
        kind = layout.kind(tensor.name, tensor.rows.shape)
        rows = tensor.rows
        if tensor.heads:
          rows = _permute(rows, tensor.heads)
        writer.write_tensor_data(_encode(rows, kind))
      writer.close()
      os.replace(scratch, path)
  except OSError as e:
    raise errors.InputError(
      f'cannot write {path}: {e.strerror or e}; free some space or choose '
      'another file'
    ) from e
  finally:
    if writer is not None:
      with contextlib.suppress(OSError):  # What is unwritten stays so.
        writer.close()
  return Written(
    path=path,
    architecture=layout.architecture,
    size=path.stat().st_size,
    bits_per_weight=bits / count,
    fell_back=fell_back,
    padding=layout.padding,
  )


def check(
  model: weights.Source,
  path: str | os.PathLike,
  format: str,
  want: agreement.Reference | None = None,
) -> Checked:
  """Compares a file with the model that it was made from.

  Every tensor is read back, and so is the tokenizer. Where llama.cpp is
  installed, it opens the file and must give the same token ids and the same
  log-probabilities, as near as the format allows.

  Args:
    model: as given to `write`.
    path: the file.
    format: as given to `write`.
    want: our answers to `agreement.TEXT`, if they are at hand. Q4_0 is compared
      with those of its own weights.

  Raises:
    errors.InputError: not a complete GGUF file, or llama.cpp cannot open it.
    RuntimeError: the file holds or computes something else.
  """
  path = pathlib.Path(path)
  layout = _Layout(model, format)
  try:
    reader = gguf.GGUFReader(path)
    fields = {k: field.contents() for k, field in reader.fields.items()}
  except (OSError, LookupError, ValueError) as e:
    reason = ' '.join(str(e).split()) or type(e).__name__
    raise errors.InputError(
      f'{path} is not a complete GGUF file ({reason}); export it again'
    ) from e
  metadata = {'general.architecture': layout.architecture} | layout.metadata()
  for key, value in metadata.items():
    if isinstance(value, float):
      value = float(np.float32(value))
    if fields.get(key) != value:
      raise _differs(path, f'metadata {key} is {fields.get(key)}, not {value}')
  text = agreement.TEXT + _NASTY + ''.join(
    model.tokenizer.id_to_token(i) for i in model.eos_ids
  )  # fmt: skip
  ids = model.tokenizer.encode(text).ids
  _check_ids(path, _read_tokenizer(fields, path).encode(text).ids, ids)
  found = {t.name: t for t in reader.tensors}
  for tensor in layout.tensors():
    kind = layout.kind(tensor.name, tensor.rows.shape)
    have = found.pop(tensor.name, None)
    if have is None or have.tensor_type != kind:
      raise _differs(path, f'tensor {tensor.name} is not there in {kind.name}')
    rows = gguf.quants.dequantize(have.data, kind)
    if tensor.heads:
      rows = gguf_source.unpermute(rows, tensor.heads)
    # Rows are rounded one by one, whatever their order.
    if not np.array_equal(rows, _rounded(tensor.rows, kind)):
      raise _differs(path, f'tensor {tensor.name} has other values')
  if found:
    raise _differs(path, f'tensor {min(found)} belongs to no layer')
  tensors = len(reader.tensors)
  runtime = llama_cpp.available()
  if runtime is None:
    return Checked(tensors, None, None)
  _check_ids(path, llama_cpp.tokenize(path, text), ids)
  level = agreement.LEVELS[{'f32': 'float32'}.get(format, format)]
  prompt = model.tokenizer.encode(agreement.TEXT).ids
  if want is None or format == 'q4_0':
    want = agreement.reference(
      layout.rounded() if format == 'q4_0' else layout.params,
      layout.masks,
      layout.cfg,
      prompt[: model.cfg.context - agreement.NEW_TOKENS],
    )
  agreed = agreement.compare(
    want,
    llama_cpp.logprobs(path, want.tokens),
    llama_cpp.greedy(path, want.prompt, agreement.NEW_TOKENS),
  )
  agreement.check(agreed, level, f'{path.name} in llama.cpp')
  return Checked(tensors, runtime, agreed)


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """One tensor as a Hugging Face file would have it, float32.

  Attributes:
    name: in GGUF.
    rows: [out, in], or a vector.
    heads: of which llama.cpp wants the rows in an order of its own; 0: none.
  """

  name: str
  rows: np.ndarray
  heads: int


class _Layout:
  """What goes into the file of a model, and in which types."""

  def __init__(self, model, format):
    if format not in _FORMATS:
      raise errors.InputError(
        f'format {format} is not known; choose one of {", ".join(_FORMATS)}'
      )
    self.model, self.cfg = model, model.cfg
    self.matrices, self.file_type = _FORMATS[format]
    self.params = jax.tree.map(np.asarray, model.params)
    self.masks = widths.whole(model.masks, model.cfg)
    if not self.masks.stem.all():
      raise ValueError('dead groups in the stem: shrink before the export')
    self._measure()
    self.padding = 0
    self.architecture = _uniform(self.cfg)
    if len(set(self.kv)) > 1 or len(set(self.ffn)) > 1:
      if self.architecture == 'llama':
        self.architecture = 'deci'
      else:
        self._pad()

  def _measure(self):
    """Layers that go into the file, their key/value heads and ffn widths."""
    live = widths.of_layers(self.masks)
    either = np.add(live['heads'], live['ffn']) > 0
    # What lost both blocks passes its input on: it is left out.
    self.layers = np.flatnonzero(either).tolist() or [0]
    # llama.cpp wants a first layer with attention, and skips a layer without a
    # feed-forward block, attention included. Zeros stand in for both.
    self.kv = [live['heads'][n] for n in self.layers]
    self.kv[0] = max(1, self.kv[0])
    self.ffn = [live['ffn'][n] or _BLOCK for n in self.layers]

  def _pad(self):
    """Fills narrower layers up with zeros."""
    before = sum(t.rows.size for t in self.tensors())
    self.params = widths.filled(self.params, self.masks)
    self.masks = widths.whole(None, self.cfg)
    self._measure()
    self.padding = sum(t.rows.size for t in self.tensors()) - before

  def tensors(self) -> Iterator[_Tensor]:
    """Yields all tensors in the order of the file, each made on demand."""
    outside = self.params.replace(layers=None)
    for name, rows in weights.views(outside, weights.GGUF):
      yield _Tensor(name, rows, 0)
    if self.cfg.rope_scaling:
      plain = self.cfg.rotary_frequencies(scaled=False)
      divisors = self.cfg.rope_scaling.divisors(plain).astype(np.float32)
      yield _Tensor('rope_freqs.weight', divisors, 0)
    for i, n in enumerate(self.layers):
      layer = self._layer(i, n)
      for name, rows in weights.views(layer, weights.GGUF):
        part = name.split('.')[2]
        turned = part in ('attn_q', 'attn_k') and self.architecture != 'qwen3'
        yield _Tensor(
          name.replace('blk.0.', f'blk.{i}.'),
          rows,
          len(rows) // self.cfg.H if turned else 0,
        )

  def _layer(self, i, n):
    """Layer n of the model as layer i of the file."""
    least = {'K': self.kv[i], 'F': self.ffn[i]}

    def leaf(letters, x):
      grow = [
        least.get(a, m) - m for a, m in zip(letters, x.shape, strict=True)
      ]
      return np.pad(x, [(0, by) for by in grow])

    layer = structure.map_axes(leaf, widths.trimmed(self.params, self.masks, n))
    if self.kv[i]:
      return layer
    attention = ('attn_norm', 'wq', 'wk', 'wv', 'wo', 'bq', 'bk', 'bv')
    return layer.replace(
      layers=layer.layers.replace(**dict.fromkeys(attention))
    )

  def kind(self, name, shape) -> gguf.GGMLQuantizationType:
    """The type of a tensor: F32 of a vector, F16 where rows have no blocks."""
    if len(shape) == 1:
      return _TYPE.F32
    if self.matrices in _BLOCKS and shape[-1] % _BLOCK:
      return _TYPE.F16
    output = weights.GGUF.embed if self.cfg.tied else weights.GGUF.unembed
    if self.matrices == _TYPE.Q4_0 and name == output:
      return _OUTPUT
    return self.matrices

  def rounded(self) -> structure.Params:
    """The weights as they are in the file, in the arrays of the model."""
    params = jax.tree.map(np.copy, self.params)

    def round_views(tree):
      for name, view in weights.views(tree, weights.GGUF):
        if view.size:
          view[...] = _rounded(view, self.kind(name, view.shape))

    round_views(params.replace(layers=None))
    inside = structure.Params(embed=None, layers=params.layers, final_norm=None)
    for n in self.layers:
      live = {
        'N': [n],
        'K': np.flatnonzero(self.masks.heads[n]),
        'F': np.flatnonzero(self.masks.ffn[n]),
      }

      def put(letters, whole, part, live=live):
        axes = zip(letters, whole.shape, strict=True)
        at = np.ix_(*(live.get(a, np.arange(size)) for a, size in axes))
        whole[at] = part

      layer = widths.trimmed(params, self.masks, n)
      round_views(layer)
      structure.map_axes(put, inside, layer)
    return params

  def metadata(self) -> dict[str, Any]:
    """Key-value pairs; of what type is plain from the value."""
    cfg, model, arch = self.cfg, self.model, self.architecture
    same = arch != 'deci'
    heads = [cfg.G * k for k in self.kv]
    size = sum(t.rows.size for t in self.tensors())
    fields = {
      'general.type': 'model',
      'general.name': model.name,
      'general.description': model.description,
      'general.license': model.licence,
      'general.size_label': gguf.size_label(size, 0, 0, 0),
      'general.file_type': int(self.file_type),
      'general.quantization_version': gguf.GGML_QUANT_VERSION,
      f'{arch}.vocab_size': cfg.V,
      f'{arch}.context_length': cfg.context,
      f'{arch}.embedding_length': cfg.D,
      f'{arch}.block_count': len(self.layers),
      f'{arch}.feed_forward_length': self.ffn[0] if same else self.ffn,
      f'{arch}.attention.head_count': heads[0] if same else heads,
      f'{arch}.attention.head_count_kv': self.kv[0] if same else self.kv,
      f'{arch}.attention.key_length': cfg.H,
      f'{arch}.attention.value_length': cfg.H,
      f'{arch}.attention.layer_norm_rms_epsilon': float(cfg.norm_eps),
      f'{arch}.rope.dimension_count': cfg.H,
      f'{arch}.rope.freq_base': float(cfg.rope_theta),
    } | _tokenizer(model)
    # The package leaves empty ones out.
    return {k: v for k, v in fields.items() if v not in (None, '', [])}


def _uniform(cfg):
  """llama.cpp's architecture of a block with the same widths in every layer.

  Biases do not make it a `qwen2`: that one demands as many rows of q as the
  stem is wide, `llama` and `deci` take biases too.
  """
  if not cfg.qk_norm:
    return 'llama'
  if cfg.qkv_bias or cfg.rope_scaling:
    raise errors.InputError(
      'llama.cpp has no architecture with norms of q and k next to biases or '
      'Llama 3 rope scaling; export to another format'
    )
  return 'qwen3'


def _tokenizer(model):
  """Vocabulary, merges, rule and special tokens as GGUF has them."""
  rule = bpe.rule(model.tokenizer, model.name)
  parts = json.loads(model.tokenizer.to_str())
  # Rows of the embedding that no token has get a name that no text contains.
  tokens = [f'[PAD{i}]' for i in range(model.cfg.V)]
  kinds = [int(gguf.TokenType.UNUSED)] * model.cfg.V
  for token, i in parts['model']['vocab'].items():
    tokens[i], kinds[i] = token, int(gguf.TokenType.NORMAL)
  for added in parts['added_tokens']:
    kind = 'CONTROL' if added['special'] else 'USER_DEFINED'
    tokens[added['id']] = added['content']
    kinds[added['id']] = int(gguf.TokenType[kind])
  merges = parts['model']['merges']
  # A base model may state no end; llama.cpp would take token 11 for it.
  eos = model.eos_ids or (model.separator_id,)
  key = 'tokenizer.ggml'
  return {
    f'{key}.model': 'gpt2',
    f'{key}.pre': rule,
    f'{key}.tokens': tokens,
    f'{key}.token_type': kinds,
    f'{key}.merges': [m if isinstance(m, str) else ' '.join(m) for m in merges],
    f'{key}.bos_token_id': model.bos_id,
    f'{key}.eos_token_id': eos[0],
    f'{key}.eot_token_id': eos[1] if len(eos) > 1 else None,
    f'{key}.padding_token_id': model.pad_id,
    f'{key}.add_bos_token': _adds_bos(model),
    'tokenizer.chat_template': model.chat_template,
  }


def _read_tokenizer(fields, path):
  """The tokenizer that a file describes."""
  get = lambda name: fields.get(f'tokenizer.ggml.{name}')
  bos = get('bos_token_id') if get('add_bos_token') else None
  return bpe.tokenizer(
    get('tokens'), get('token_type'), get('merges') or [], get('pre'), bos,
    str(path),
  )  # fmt: skip


def _adds_bos(model):
  """Whether the tokenizer starts a text with the bos token."""
  bare, full = (
    model.tokenizer.encode('a', add_special_tokens=special).ids
    for special in (False, True)
  )
  if full not in (bare, [model.bos_id, *bare]):
    raise errors.InputError(
      f'{model.name}: its tokenizer makes {full} of {bare}, llama.cpp can only '
      f'put bos ({model.bos_id}) before it; change its post-processor'
    )
  return full != bare


def _permute(rows, heads):
  """The inverse of `gguf_source.unpermute`, also of a vector."""
  halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def _bytes(shape, kind):
  """Bytes that a tensor takes."""
  block, size = gguf.GGML_QUANT_SIZES[kind]
  return math.prod(shape) // block * size


def _encode(rows, kind):
  """Rows in the bytes of a type."""
  return gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), kind)


def _rounded(rows, kind):
  """Rows as a reader gets them back, float32."""
  return gguf.quants.dequantize(_encode(rows, kind), kind)


def _check_ids(path, have, want):
  """Raises RuntimeError where a text has other tokens."""
  if have != want:
    raise _differs(
      path, f'its tokenizer gives {have[:8]}..., not {want[:8]}...'
    )


def _differs(path, what):
  return RuntimeError(f'{path}: {what}; the export is not kept')
