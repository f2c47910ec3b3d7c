"""What goes into the GGUF file of a model: tensors, their types, metadata.

Where all layers of a pruned model have the same widths, it is a `llama` (or a
`qwen3`) to llama.cpp. Where they differ, it is a `deci`: the graph of `llama`
with the widths of each layer in the metadata.
"""

from collections.abc import Iterator
import dataclasses
import functools
import json
import math
from typing import Any

import gguf
import jax
import numpy as np

from effllm_jax import bpe
from effllm_jax import errors
from effllm_jax import structure
from effllm_jax import weights
from effllm_jax import widths

_TYPE = gguf.GGMLQuantizationType
# Format -> type of its matrices, what llama.cpp calls such a file.
TYPES = {
  'f32': (_TYPE.F32, gguf.LlamaFileType.ALL_F32),
  'f16': (_TYPE.F16, gguf.LlamaFileType.MOSTLY_F16),
  'q8_0': (_TYPE.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
  'q4_0': (_TYPE.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# Numbers that share a scale.
_BLOCK = 32
_BLOCKS = (_TYPE.Q8_0, _TYPE.Q4_0)
# Of the output matrix, which is the embedding where they are tied, in a Q4_0
# file; llama.cpp's own tool has Q6_K there, which the gguf package cannot make.
# SmolLM2-135M, against its own weights: KL 0.29 and 92 MB; with Q4_0 0.39 and
# 78 MB, with Q5_0 0.31 and 81 MB. `budgets.FORMATS` counts it so.
_OUTPUT = _TYPE.Q8_0
# A run that has trained is exported without.
_REMEDY = 'choose formats without gguf (make quickstart: FORMATS=hf)'
# Tokens at which llama.cpp ends a generation whatever a file says: ends of a
# turn, of a message that calls a tool, and others.
_TURN_ENDS = (
  '<|eot_id|>', '<|im_end|>', '<|end|>', '<end_of_turn>', '<end_of_utterance>',
)  # fmt: skip
_MESSAGE_END = '<|eom_id|>'
_KNOWN_ENDS = (*_TURN_ENDS, _MESSAGE_END, '<|endoftext|>', '<|end_of_text|>')
# Of an added token: whether it takes in the spaces before or after it, whether
# it is one within a word.
_BESIDE = ('lstrip', 'rstrip', 'single_word')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor as a Hugging Face file would have it, float32.

  Attributes:
    name: in GGUF.
    rows: [out, in], or a vector.
    heads: of which llama.cpp wants the rows in an order of its own; 0: none.
  """

  name: str
  rows: np.ndarray
  heads: int


class Layout:
  """What goes into the file of a model, and in which types."""

  def __init__(self, model: weights.Source, format: str):
    """Takes a model whose stem is alive, and a key of `TYPES`.

    Raises:
      errors.InputError: another format, or a block that llama.cpp has not.
      ValueError: dead groups in the stem.
    """
    if format not in TYPES:
      raise errors.InputError(
        f'format {format} is not known; choose one of {", ".join(TYPES)}'
      )
    self.model, self.cfg = model, model.cfg
    self.matrices, self.file_type = TYPES[format]
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
    """Key/value heads and feed-forward widths of the layers in the file."""
    live = widths.of_layers(self.masks)
    # llama.cpp wants a first layer with attention, and skips a layer without a
    # feed-forward block, attention included. Zeros stand in for both.
    self.kv = live['heads']
    self.kv[0] = max(1, self.kv[0])
    self.ffn = [n or _BLOCK for n in live['ffn']]

  def _pad(self):
    """Fills narrower layers up with zeros."""
    before = sum(t.rows.size for t in self.tensors())
    self.params = widths.filled(self.params, self.masks)
    self.masks = widths.whole(None, self.cfg)
    self._measure()
    self.padding = sum(t.rows.size for t in self.tensors()) - before

  @functools.cached_property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Name of every tensor, in the order of the file -> its shape."""
    return {t.name: t.rows.shape for t in self.tensors()}

  def tensors(self) -> Iterator[Tensor]:
    """Yields all tensors in the order of the file, each made on demand."""
    outside = self.params.replace(layers=None)
    for name, rows in weights.views(outside, weights.GGUF):
      yield Tensor(name, rows, 0)
    if self.cfg.rope_scaling:
      plain = self.cfg.rotary_frequencies(scaled=False)
      divisors = self.cfg.rope_scaling.divisors(plain).astype(np.float32)
      yield Tensor('rope_freqs.weight', divisors, 0)
    for n in range(self.cfg.N):
      for name, rows in weights.views(self._layer(n), weights.GGUF, n):
        part = name.split('.')[2]
        turned = part in ('attn_q', 'attn_k') and self.architecture != 'qwen3'
        yield Tensor(name, rows, len(rows) // self.cfg.H if turned else 0)

  def _layer(self, n):
    """Layer n of the model as it is in the file."""
    least = {'K': self.kv[n], 'F': self.ffn[n]}

    def leaf(letters, x):
      grow = [
        least.get(a, m) - m for a, m in zip(letters, x.shape, strict=True)
      ]
      return np.pad(x, [(0, by) for by in grow])

    layer = structure.map_axes(leaf, widths.trimmed(self.params, self.masks, n))
    if self.kv[n]:
      return layer
    return layer.replace(
      layers=layer.layers.replace(**dict.fromkeys(structure.BLOCKS['heads']))
    )

  def kind(
    self, name: str, shape: tuple[int, ...]
  ) -> gguf.GGMLQuantizationType:
    """The type of a tensor: F32 of a vector, F16 where rows have no blocks."""
    if len(shape) == 1:
      return _TYPE.F32
    if self.matrices in _BLOCKS and shape[-1] % _BLOCK:
      return _TYPE.F16
    output = weights.GGUF.embed if self.cfg.tied else weights.GGUF.unembed
    if self.matrices == _TYPE.Q4_0 and name == output:
      return _OUTPUT
    return self.matrices

  def rounded_params(self) -> structure.Params:
    """The weights as they are in the file, in the arrays of the model."""
    params = jax.tree.map(np.copy, self.params)

    def round_views(tree):
      for name, view in weights.views(tree, weights.GGUF):
        if view.size:
          view[...] = rounded(view, self.kind(name, view.shape))

    round_views(params.replace(layers=None))
    inside = structure.Params(embed=None, layers=params.layers, final_norm=None)
    for n in range(self.cfg.N):
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
    size = sum(map(math.prod, self.shapes.values()))
    fields = {
      'general.type': 'model',
      'general.name': model.name,
      'general.description': model.description,
      'general.license': model.licence,
      'general.license.name': model.licence_name,
      'general.license.link': model.licence_link,
      'general.size_label': gguf.size_label(size, 0, 0, 0),
      'general.file_type': int(self.file_type),
      'general.quantization_version': gguf.GGML_QUANT_VERSION,
      f'{arch}.vocab_size': cfg.V,
      f'{arch}.context_length': cfg.context,
      f'{arch}.embedding_length': cfg.D,
      f'{arch}.block_count': cfg.N,
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


def check(model: weights.Source) -> None:
  """Checks what of a model no GGUF file has words for; takes no time.

  Raises:
    errors.InputError: its block, or its tokenizer.
  """
  _uniform(model.cfg)
  _tokenizer(model)


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
      f'Llama 3 rope scaling; {_REMEDY}'
    )
  return 'qwen3'


@dataclasses.dataclass(frozen=True)
class Ends:
  """Where a file, which has three places, says what ends a generation.

  Attributes:
    eos: what the tokenizer calls its eos token.
    eot: end of a turn; None: llama.cpp looks for one by its name.
    eom: end of a message, or one more id.
    homeless: ids at which llama.cpp goes on.
  """

  eos: int
  eot: int | None
  eom: int | None
  homeless: tuple[int, ...]


def ends(model: weights.Source) -> Ends:
  """Gives every id that ends a generation a place, if there are enough."""
  # A base model may state no end; llama.cpp would take token 11 for it.
  eos = model.separator_id if model.eos_id is None else model.eos_id
  ids = list(dict.fromkeys([eos, *model.eos_ids]))
  if len(ids) == 1:
    return Ends(eos, None, None, ())
  name = {i: model.tokenizer.id_to_token(i) for i in ids}
  eot = next((i for i in ids if name[i] in _TURN_ENDS), None)
  eom = next((i for i in ids[1:] if name[i] == _MESSAGE_END), None)
  left = [i for i in ids[1:] if i not in (eot, eom)]
  # Those that need a place come first.
  left.sort(key=lambda i: name[i] in _KNOWN_ENDS)
  if eot is None and left:
    eot = left.pop(0)
  if left and (eom is None or name[left[0]] not in _KNOWN_ENDS):
    eom = left.pop(0)
  homeless = tuple(i for i in left if name[i] not in _KNOWN_ENDS)
  return Ends(eos, eot, eom, homeless)


def _tokenizer(model):
  """Vocabulary, merges, rule and special tokens as GGUF has them."""
  rule = bpe.rule(model.tokenizer, model.name, _REMEDY)
  parts = json.loads(model.tokenizer.to_str())
  # Rows of the embedding that no token has get a name that no text contains.
  tokens = [f'[PAD{i}]' for i in range(model.cfg.V)]
  kinds = [int(gguf.TokenType.UNUSED)] * model.cfg.V
  for token, i in parts['model']['vocab'].items():
    tokens[i], kinds[i] = token, int(gguf.TokenType.NORMAL)
  for added in parts['added_tokens']:
    # llama.cpp finds the text of a token, whatever is beside it.
    if rules := [x for x in _BESIDE if added[x]]:
      raise errors.InputError(
        f'{model.name}: its token {added["content"]!r} is found by '
        f'{", ".join(rules)}, for which llama.cpp has no words; set them to '
        f'false in tokenizer.json, or {_REMEDY}'
      )
    kind = 'CONTROL' if added['special'] else 'USER_DEFINED'
    tokens[added['id']] = added['content']
    kinds[added['id']] = int(gguf.TokenType[kind])
  merges = parts['model']['merges']
  if not merges:
    raise errors.InputError(
      f'{model.name}: its tokenizer has no merges, without which llama.cpp '
      f'opens no file; {_REMEDY}'
    )
  found = ends(model)
  key = 'tokenizer.ggml'
  return {
    f'{key}.model': 'gpt2',
    f'{key}.pre': rule,
    f'{key}.tokens': tokens,
    f'{key}.token_type': kinds,
    f'{key}.merges': [m if isinstance(m, str) else ' '.join(m) for m in merges],
    f'{key}.bos_token_id': model.bos_id,
    f'{key}.eos_token_id': found.eos,
    f'{key}.eot_token_id': found.eot,
    f'{key}.eom_token_id': found.eom,
    f'{key}.padding_token_id': model.pad_id,
    f'{key}.add_bos_token': _adds_bos(model),
    'tokenizer.chat_template': model.chat_template,
  }


def _adds_bos(model):
  """Whether the tokenizer starts a text with the bos token."""
  bare, full = (
    model.tokenizer.encode('a', add_special_tokens=special).ids
    for special in (False, True)
  )
  if full not in (bare, [model.bos_id, *bare]):
    raise errors.InputError(
      f'{model.name}: its tokenizer makes {full} of {bare}, llama.cpp can only '
      f'put bos ({model.bos_id}) before it; change its '
      f'post-processor, or {_REMEDY}'
    )
  return full != bare


def encode(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
  """Rows in the bytes of a type."""
  return gguf.quants.quantize(np.ascontiguousarray(rows, np.float32), kind)


def rounded(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
  """Rows as a reader gets them back, float32."""
  return gguf.quants.dequantize(encode(rows, kind), kind)
