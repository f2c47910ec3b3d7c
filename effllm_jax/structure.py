"""What a model is made of: dimensions, parameters, groups, axis letters.

Dimension key, used as field names, as axis letters and as shape suffixes:

    B  sequences in a batch        V  vocabulary
    T  tokens in a sequence        D  stem (residual stream) width
    N  layers                      K  key/value heads of a layer
    F  feed-forward width          G  query heads per key/value head
                                   H  width of one head

Three of the letters can be pruned: D (type `stem`), K (type `heads`) and F
(type `ffn`). One table, `axes`, says which axes every parameter has. Everything
that must know which slices belong together (initialisation, shape checks,
saliency, costs, shrinking) reads that table and nothing else.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import struct
import jax
import numpy as np

Array = jax.Array

# The pruning types in the order in which results are listed.
TYPES = ('heads', 'ffn', 'stem')
# Largest numbers of an architecture, by type: what every runtime and every file
# format can hold.
MOST = {int: 2**31 - 1, float: float(np.finfo(np.float32).max)}
# Axis letter -> pruning type. Every other letter keeps its size.
PRUNABLE = {'K': 'heads', 'F': 'ffn', 'D': 'stem'}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's change of the rotary frequencies for longer contexts.

  Wave lengths below original_context / high_freq_factor stay, those above
  original_context / low_freq_factor are stretched by `factor`, between the two
  the frequency is a linear mix.

  Attributes:
    factor: by which the slow frequencies are divided.
    low_freq_factor, high_freq_factor: ends of the mix.
    original_context: tokens of the first pretraining.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_context: int

  def divisors(self, frequencies: np.ndarray) -> np.ndarray:
    """By what each frequency, in radians per token, is divided."""
    turns = self.original_context * frequencies / (2 * math.pi)
    mix = (turns - self.low_freq_factor) / (
      self.high_freq_factor - self.low_freq_factor
    )
    # 0: stretched by the whole factor; 1: as it was.
    mix = np.clip(mix, 0, 1)
    return 1 / (mix + (1 - mix) / self.factor)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture: a decoder whose arrays have these sizes.

  After a shrink the widths D, K and F are smaller; everything else stays. A
  dead group keeps its slot, and is masked, until the next shrink.

  Attributes:
    V: vocabulary size.
    D: stem width.
    N: number of layers.
    K: key/value heads per layer.
    G: query heads per key/value head; 1 is multi-head attention.
    H: head width; even, since the rotary embedding pairs channels.
    F: feed-forward width.
    context: longest sequence the source model was trained on, in tokens.
    rope_theta: base of the rotary embedding.
    norm_eps: added to the mean square in RMSNorm.
    tied: whether the output matrix is the transposed embedding.
    qkv_bias: whether q, k and v have a bias (Qwen2, Qwen2.5).
    qk_norm: whether q and k of each head go through an RMSNorm of width H
      before the rotary embedding (Qwen3).
    rope_scaling: how the rotary frequencies are stretched; None: not at all.
  """

  V: int
  D: int
  N: int
  K: int
  G: int
  H: int
  F: int
  context: int
  rope_theta: float
  norm_eps: float
  tied: bool
  qkv_bias: bool = False
  qk_norm: bool = False
  rope_scaling: 'RopeScaling | None' = None

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> 'ModelConfig':
    """The inverse of `dataclasses.asdict`, of a record that may be damaged.

    Raises:
      TypeError: no mapping, a field too many or too few, or of another type.
      ValueError: a number out of range.
    """
    scaling = dict(**fields).get('rope_scaling')
    if scaling is not None:
      scaling = _checked(RopeScaling(**scaling))
    cfg = _checked(cls(**{**fields, 'rope_scaling': scaling}))
    if cfg.H % 2:
      raise ValueError(f'H = {cfg.H} is odd')
    return cfg

  def widths(self) -> dict[str, int]:
    """Widths of the arrays by pruning type."""
    return {'heads': self.K, 'ffn': self.F, 'stem': self.D}

  def shape(self, letters: str) -> tuple[int, ...]:
    """Sizes of the axes that letters name: (V, D) of 'VD'."""
    return tuple(getattr(self, x) for x in letters)

  def num_params(self) -> int:
    """Number of parameters in arrays of this size."""
    per_layer = self.K * self.head_rows() + 3 * self.F
    return (
      self.D * (self.N * per_layer + self.stem_rows())
      + self.N * self.K * self.head_biases()
      + self.norm_scales()
    )

  def rotary_frequencies(self, scaled: bool = True) -> np.ndarray:
    """Radians per token of each pair of a head's channels, float64 [H/2].

    Args:
      scaled: with what `rope_scaling` changes.
    """
    plain = self.rope_theta ** (-np.arange(0, self.H, 2) / self.H)
    if self.rope_scaling is None or not scaled:
      return plain
    return plain / self.rope_scaling.divisors(plain)

  def head_rows(self) -> int:
    """Rows of length D in one head: q and o (G each), k and v, times H."""
    return (2 * self.G + 2) * self.H

  def head_biases(self) -> int:
    """Biases of one head: of q (G), k and v, times H."""
    return (self.G + 2) * self.H * self.qkv_bias

  def norm_scales(self) -> int:
    """Norm scales without a prunable axis: of q and k in every layer."""
    return 2 * self.N * self.H * self.qk_norm

  def stem_rows(self) -> int:
    """Rows of length D outside heads and ffn: embeddings and norm scales."""
    return (1 if self.tied else 2) * self.V + 2 * self.N + 1


def _checked(record):
  """A dataclass of which every number has its type, and is in range."""
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if field.type in (int, float):
      if not isinstance(value, (int, field.type)) or isinstance(value, bool):
        raise TypeError(f'{field.name} = {value!r} is no {field.type.__name__}')
      if not 0 < value <= MOST[field.type]:
        raise ValueError(f'{field.name} = {value} is out of range')
    elif field.type is bool and not isinstance(value, bool):
      raise TypeError(f'{field.name} = {value!r} is no bool')
  return record


@struct.dataclass
class Layers:
  """Parameters of all layers, stacked on a leading axis N for `lax.scan`.

  What a block does not have is None: biases of q, k and v, norms of q and k.
  """

  attn_norm: Any
  wq: Any
  wk: Any
  wv: Any
  wo: Any
  ffn_norm: Any
  w_gate: Any
  w_up: Any
  w_down: Any
  bq: Any = None
  bk: Any = None
  bv: Any = None
  q_norm: Any = None
  k_norm: Any = None


@struct.dataclass
class Params:
  """All parameters; also the type of gradients and of the axis table.

  `unembed` is None when the embedding is tied. The parameters *are* the
  architecture: a shrink is a tree of smaller arrays of this same type.
  """

  embed: Any
  layers: Layers
  final_norm: Any
  unembed: Any = None


@struct.dataclass
class Groups:
  """One leaf per pruning type: masks (True = alive), scores, costs, indices.

  Shapes: heads [N, K], ffn [N, F], stem [D].
  """

  heads: Any
  ffn: Any
  stem: Any


GROUP_AXES = Groups(heads='NK', ffn='NF', stem='D')


_AXES = Params(
  embed='VD',
  layers=Layers(
    attn_norm='ND',
    wq='NDKGH',
    wk='NDKH',
    wv='NDKH',
    wo='NKGHD',
    ffn_norm='ND',
    w_gate='NDF',
    w_up='NDF',
    w_down='NFD',
    bq='NKGH',
    bk='NKH',
    bv='NKH',
    q_norm='NH',
    k_norm='NH',
  ),
  final_norm='D',
  unembed='DV',
)


# Pruning type -> the leaves that a layer no longer needs once it has no live
# group of this type.
BLOCKS = {
  'heads': (
    'attn_norm', 'wq', 'wk', 'wv', 'wo', 'bq', 'bk', 'bv', 'q_norm', 'k_norm',
  ),
  'ffn': ('ffn_norm', 'w_gate', 'w_up', 'w_down'),
}  # fmt: skip


def axes(cfg: ModelConfig) -> Params:
  """The axis letters of every parameter of `cfg`, as a tree of strings."""
  absent = [
    *([] if cfg.qkv_bias else ['bq', 'bk', 'bv']),
    *([] if cfg.qk_norm else ['q_norm', 'k_norm']),
  ]
  return _AXES.replace(
    layers=_AXES.layers.replace(**dict.fromkeys(absent)),
    unembed=None if cfg.tied else _AXES.unembed,
  )


def is_matrix(letters: str) -> bool:
  """Whether a parameter is a matrix, not a norm scale or a bias.

  The embedding is one.
  """
  return 'D' in letters and len(letters.removeprefix('N')) > 1


def axes_of(tree: Params) -> Params:
  """The axis letters of what a parameter-shaped tree holds."""
  return present(_AXES, tree)


def present(table: Params, tree: Params) -> Params:
  """A parameter-shaped table without the entries that `tree` does not have."""

  def keep(entry, node):
    if node is None:
      return None
    if not dataclasses.is_dataclass(entry):
      return entry
    names = [f.name for f in dataclasses.fields(entry)]
    return entry.replace(
      **{x: keep(getattr(entry, x), getattr(node, x)) for x in names}
    )

  return keep(table, tree)


def map_axes(fn: Callable[..., Any], tree: Params, *rest: Params) -> Params:
  """Maps `fn(letters, leaf, *leaves)` over parameter-shaped trees."""
  return jax.tree.map(fn, axes_of(tree), tree, *rest)


def shapes(cfg: ModelConfig) -> Params:
  """The shape of every parameter, as `jax.ShapeDtypeStruct`, float32."""
  return jax.tree.map(
    lambda letters: jax.ShapeDtypeStruct(cfg.shape(letters), jax.numpy.float32),
    axes(cfg),
  )


def group_shapes(cfg: ModelConfig) -> Groups:
  """The shape of every leaf of a `Groups` tree."""
  return jax.tree.map(cfg.shape, GROUP_AXES)


def all_alive(cfg: ModelConfig) -> Groups:
  """Masks of a model of which nothing has been pruned."""
  # From numpy: jax would compile a program for each shape.
  return jax.tree.map(
    lambda letters: jax.numpy.asarray(np.ones(cfg.shape(letters), bool)),
    GROUP_AXES,
  )


def masks_to_json(masks: Groups) -> dict[str, list[str]]:
  """Masks as text: a line per layer, 1 for a live group and 0 for a dead one.

  The stem is one line. `masks_from_json` is the inverse.
  """
  return {
    t: [
      ''.join(np.where(row, '1', '0'))
      for row in np.atleast_2d(np.asarray(getattr(masks, t)))
    ]
    for t in TYPES
  }


def masks_from_json(record: Mapping[str, Any], shapes: Groups) -> Groups:
  """The masks that `masks_to_json` wrote, numpy.

  Args:
    record: may be damaged.
    shapes: of the groups, as `group_shapes` gives them.

  Raises:
    KeyError, TypeError, ValueError: of a damaged record.
  """

  def read(t):
    lines, shape = record[t], getattr(shapes, t)
    count, width = math.prod(shape[:-1]), shape[-1]
    if len(lines) != count or any(
      not isinstance(x, str) or len(x) != width or set(x) - {'0', '1'}
      for x in lines
    ):
      raise ValueError(f'masks.{t}')
    return np.array([[*x] for x in lines]).reshape(shape) == '1'

  return Groups(**{t: read(t) for t in TYPES})


def check_shapes(params: Params, cfg: ModelConfig) -> None:
  """Raises ValueError, with the key path, where a shape contradicts `cfg`."""

  def check(path, letters, leaf):
    want = cfg.shape(letters)
    if tuple(leaf.shape) != want:
      raise ValueError(
        f'params{jax.tree_util.keystr(path)} has shape {tuple(leaf.shape)}, '
        f'the architecture says {want} ({letters})'
      )

  present, expected = (
    {jax.tree_util.keystr(path) for path, _ in leaves}
    for leaves in map(
      jax.tree_util.tree_leaves_with_path, (axes_of(params), axes(cfg))
    )
  )
  for path in sorted(present ^ expected):
    raise ValueError(
      f'params{path} is {"present" if path in present else "absent"}, '
      'the architecture says otherwise'
    )
  jax.tree_util.tree_map_with_path(check, axes(cfg), params)
