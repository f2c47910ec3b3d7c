"""An existing model in memory, and what its tensors are called in files.

Files store one matrix per layer, `[out, in]`; `structure.Params` stacks the
layers and splits the heads into axes. The two differ by reshapes and one
transpose, so everything here works on views: a model of 1.7B parameters is read
into place one tensor at a time and never held twice.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np
import tokenizers

from effllm_jax import errors
from effllm_jax import structure

# Names of the tensors in files; {n} is the index of a layer.
HUGGING_FACE = structure.Params(
  embed='model.embed_tokens.weight',
  layers=structure.Layers(
    attn_norm='model.layers.{n}.input_layernorm.weight',
    wq='model.layers.{n}.self_attn.q_proj.weight',
    wk='model.layers.{n}.self_attn.k_proj.weight',
    wv='model.layers.{n}.self_attn.v_proj.weight',
    wo='model.layers.{n}.self_attn.o_proj.weight',
    ffn_norm='model.layers.{n}.post_attention_layernorm.weight',
    w_gate='model.layers.{n}.mlp.gate_proj.weight',
    w_up='model.layers.{n}.mlp.up_proj.weight',
    w_down='model.layers.{n}.mlp.down_proj.weight',
    bq='model.layers.{n}.self_attn.q_proj.bias',
    bk='model.layers.{n}.self_attn.k_proj.bias',
    bv='model.layers.{n}.self_attn.v_proj.bias',
    q_norm='model.layers.{n}.self_attn.q_norm.weight',
    k_norm='model.layers.{n}.self_attn.k_norm.weight',
  ),
  final_norm='model.norm.weight',
  unembed='lm_head.weight',
)
GGUF = structure.Params(
  embed='token_embd.weight',
  layers=structure.Layers(
    attn_norm='blk.{n}.attn_norm.weight',
    wq='blk.{n}.attn_q.weight',
    wk='blk.{n}.attn_k.weight',
    wv='blk.{n}.attn_v.weight',
    wo='blk.{n}.attn_output.weight',
    ffn_norm='blk.{n}.ffn_norm.weight',
    w_gate='blk.{n}.ffn_gate.weight',
    w_up='blk.{n}.ffn_up.weight',
    w_down='blk.{n}.ffn_down.weight',
    bq='blk.{n}.attn_q.bias',
    bk='blk.{n}.attn_k.bias',
    bv='blk.{n}.attn_v.bias',
    q_norm='blk.{n}.attn_q_norm.weight',
    k_norm='blk.{n}.attn_k_norm.weight',
  ),
  final_norm='output_norm.weight',
  unembed='output.weight',
)


@dataclasses.dataclass(frozen=True)
class Source:
  """A model in memory, with its tokenizer and where it came from.

  Attributes:
    name: as the user gave it, without the folders of a path.
    description: one line to print beside every number measured on it.
    licence: as the file states it, or None.
    sha256: of the weight file; of the `sha256sum` listing for several files.
    dtype: in which most of the weights are stored.
    cfg: the architecture.
    separator_id: token between two documents.
    bos_id: token that the model's own tooling starts a text with, or None.
    eos_ids: tokens that end a generation.
    pad_id: token to pad batches with, or None.
    chat_template: Jinja template, or None.
    tokenizer: text to token ids.
    params: float32 numpy arrays, or None when only the rest was asked for.
    masks: which groups of a model that was pruned are alive, numpy; None: all
      of them.
    origin: for a pruned model, which group of the first source sits in each
      slot, numpy; None: its own.
    tokenizer_eos_id: what the tokenizer calls its eos token, where that is not
      the first of `eos_ids`.
    generation: how the model's authors want it sampled, as in
      generation_config.json.
    licence_name: what a licence 'other' is called, or None.
    licence_link: where its text is, an address or a file beside the weights, or
      None.
    licence_files: text of the files beside the weights that are about it, by
      name (`licences.read`).
    padding_side: where transformers fills up the shorter texts of a batch,
      'left' or 'right'; None: the source does not say.
    saved: of an event or checkpoint of a run the SHA-256 of its digests
      (`sha256` is that of the run's own source); None: it is none.
  """

  name: str
  description: str
  licence: str | None
  sha256: str
  dtype: str
  cfg: structure.ModelConfig
  separator_id: int
  bos_id: int | None
  eos_ids: tuple[int, ...]
  pad_id: int | None
  chat_template: str | None
  tokenizer: tokenizers.Tokenizer
  params: structure.Params | None
  masks: structure.Groups | None = None
  origin: structure.Groups | None = None
  tokenizer_eos_id: int | None = None
  generation: Mapping[str, bool | int | float] = dataclasses.field(
    default_factory=dict
  )
  licence_name: str | None = None
  licence_link: str | None = None
  licence_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
  padding_side: str | None = None
  saved: str | None = None

  @property
  def eos_id(self) -> int | None:
    """The one of the ends that chat templates and padding mean."""
    if self.tokenizer_eos_id is not None:
      return self.tokenizer_eos_id
    return self.eos_ids[0] if self.eos_ids else None


def file_shapes(
  cfg: structure.ModelConfig,
  names: structure.Params,
  live: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields the name and the file's shape of every tensor of a model.

  Args:
    cfg: the architecture.
    names: of a file format.
    live: 'heads' and 'ffn' of every layer, where the file is trimmed to them:
      of a block of which nothing is left it has nothing, not even the norm.
      None: all layers have the widths of `cfg`.
  """
  blocks = {
    getattr(names.layers, x): kind
    for kind, parts in structure.BLOCKS.items()
    for x in parts
  }
  for letters, name in _table(structure.axes(cfg), names):
    if letters[0] != 'N':
      yield name, _file_shape(letters, *cfg.shape(letters))
      continue
    # As many as a header says: nothing is made of them before their turn.
    for n in range(cfg.N):
      K, F = (live['heads'][n], live['ffn'][n]) if live else (cfg.K, cfg.F)
      if {'heads': K, 'ffn': F}[blocks[name]]:
        layer = dataclasses.replace(cfg, N=1, K=K, F=F)
        yield name.format(n=n), _file_shape(letters, *layer.shape(letters))


def views(
  params: structure.Params, names: structure.Params, first: int = 0
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the name of every tensor and a writable view as the file has it.

  Args:
    params: numpy.
    names: of a file format.
    first: index of the first layer in the names.
  """
  table = _table(structure.axes_of(params), names)
  for (letters, name), leaf in zip(table, jax.tree.leaves(params), strict=True):
    shape = _file_shape(letters, *leaf.shape)
    layers = enumerate(leaf, first) if letters[0] == 'N' else [(0, leaf)]
    for n, array in layers:
      flat = array.reshape(shape[::-1] if _is_transposed(letters) else shape)
      yield name.format(n=n), flat.T if _is_transposed(letters) else flat


def check_tensors(
  expected: Iterable[tuple[str, tuple[int, ...]]],
  found: Mapping[str, tuple[int, ...]],
  file: str,
) -> dict[str, tuple[int, ...]]:
  """Checks that a file has the tensors that its architecture says.

  Args:
    expected: of `file_shapes`.
    found: name and shape of every tensor of the file.
    file: named in errors.

  Returns:
    Name and shape of every tensor.

  Raises:
    errors.InputError: one is missing, of another shape, or not expected.
  """
  shapes = {}
  for name, shape in expected:
    if name not in found:
      raise errors.InputError(
        f'{file}: tensor {name} is missing, expected with shape {shape}; '
        'fetch the complete file again'
      )
    if tuple(found[name]) != shape:
      raise errors.InputError(
        f'{file}: tensor {name} has shape {tuple(found[name])}, its '
        f'architecture says {shape}; use weights and config of one model'
      )
    shapes[name] = shape
  extra = sorted(set(found) - set(shapes))
  if extra:
    raise errors.InputError(
      f'{file}: {len(extra)} tensors that the block here has no place for, '
      f'{extra[0]} among them; choose another source model'
    )
  return shapes


def read_params(
  cfg: structure.ModelConfig,
  names: structure.Params,
  shapes: Mapping[str, tuple[int, ...]],
  read: Callable[[str], np.ndarray],
  file: str,
) -> structure.Params:
  """Fills a parameter tree from `read(name)`, one tensor at a time.

  Args:
    cfg: the architecture.
    names: of the file format.
    shapes: of `check_tensors`. A narrower layer is read into the first slots of
      its arrays; the others are 0.
    read: a tensor as the file has it.
    file: named in errors.
  """
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32), structure.shapes(cfg)
  )
  for name, whole in views(params, names):
    if name not in shapes:
      continue
    view = whole[tuple(map(slice, shapes[name]))]
    view[...] = read(name)
    if not np.isfinite(view).all():
      raise errors.InputError(
        f'{file}: tensor {name} has entries that are not finite; fetch the '
        'file again'
      )
  return params


def check_tokenizer(
  tokenizer: tokenizers.Tokenizer,
  special_ids: Iterable[int],
  vocab: int,
  file: str,
) -> None:
  """Raises InputError when a token has no row in the embedding."""
  ids = [*tokenizer.get_vocab(with_added_tokens=True).values(), *special_ids]
  if not ids or max(ids) >= vocab or min(ids) < 0:
    raise errors.InputError(
      f'{file}: the tokenizer uses ids {min(ids, default=None)} to '
      f'{max(ids, default=None)}, the embedding has {vocab} rows; use '
      'tokenizer and weights of one model'
    )


def separator(
  tokenizer: tokenizers.Tokenizer,
  eos_ids: tuple[int, ...],
  own: int | None,
  file: str,
) -> int:
  """The token between two documents: `<|endoftext|>`, else an eos.

  Of the ids that a config states the first that no text contains: they may be
  the defaults of a class, 1 and 2, which in a vocabulary of the user's own are
  letters.

  Args:
    tokenizer: of the model.
    eos_ids: as a config states them.
    own: what the tokenizer's own config calls its eos token, or None.
    file: named in errors.

  Raises:
    errors.InputError: there is none of them.
  """
  token = tokenizer.token_to_id('<|endoftext|>')
  if token is not None:
    return token
  stated = [i for i in eos_ids if is_added(tokenizer, i)]
  found = [*stated, *([] if own is None else [own]), *eos_ids]
  if not found:
    raise errors.InputError(
      f'{file}: neither <|endoftext|> in the vocabulary nor an eos token id to '
      'separate documents with; state eos_token_id'
    )
  return found[0]


def is_added(tokenizer: tokenizers.Tokenizer, i: int) -> bool:
  """Whether a token is found in a text as a whole, before it is split."""
  return i in tokenizer.get_added_tokens_decoder()


def _table(axes, names):
  """Pairs of axis letters and name, in the order of the leaves."""
  return zip(
    jax.tree.leaves(axes),
    jax.tree.leaves(structure.present(names, axes)),
    strict=True,
  )


def _file_shape(letters, *sizes):
  """The shape in a file, from the sizes of the axes here."""
  letters, sizes = letters.removeprefix('N'), sizes[letters[0] == 'N' :]
  if not structure.is_matrix(letters):
    return (math.prod(sizes),)
  stem = sizes[letters.index('D')]
  other = math.prod(sizes) // stem
  # `[out, in]`; the embedding is looked up, and has tokens first.
  return (other, stem) if _reads_stem(letters) else (stem, other)


def _is_transposed(letters):
  """Whether files store it the other way round: all but vectors and table."""
  return structure.is_matrix(letters) and letters != 'VD'


def _reads_stem(letters):
  """Whether rows of a file's matrix are as long as the stem."""
  return letters.removeprefix('N').startswith('D') or letters == 'VD'
