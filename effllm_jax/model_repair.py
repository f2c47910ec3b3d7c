"""Repair of all of a model after a prune, matrix by matrix and norm by norm.

Every matrix that loses inputs is refitted as in `repair`: wo (heads), w_down
(feed-forward channels), wq wk wv w_gate w_up and an untied output matrix (stem
channels). A tied output matrix is the embedding: a change that keeps its output
would change what every token puts into the stem, so it is left alone. So are
biases, which are added to what a matrix gives, and a repair keeps that. Inputs
are those of the model before the prune, in float32, from the newest batches of
the run (`repair.batches` of a config), never from a calibration set.

What an RMSNorm divides by is the mean square of the channels that are alive.
Without some of them it gives the others, token by token, times a factor that
was 1.03 to 1.09 where a quarter of the stem went. No refit of one matrix knows
of that, nor does a tied output matrix; so every norm's scale is multiplied by
the one factor that brings the survivors, in the least-squares sense, back to
what they were.

The optimizer's moments stay as they are. They are averages of gradients, which
a least-squares step on the weights does not make wrong by more than an ordinary
update of the same size; zeroing them would bring back the first steps of Adam,
whose updates are the least trustworthy. What belongs to dead groups is masked
and goes with the next shrink.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import model
from effllm_jax import repair
from effllm_jax import sharding
from effllm_jax import structure

Array = jax.Array

# By default a TPU rounds what it multiplies to bfloat16, a GPU to TF32.
_dot = functools.partial(jnp.vdot, precision=jax.lax.Precision.HIGHEST)


def repair_model(
  params: structure.Params,
  masks: structure.Groups,
  new_masks: structure.Groups,
  tokens_ABT: Array,
  cfg: structure.ModelConfig,
  damping: float,
  mesh: sharding.Mesh | None = None,
) -> tuple[structure.Params, dict[str, repair.Fit]]:
  """Repairs every matrix whose inputs are alive in `masks` and then removed.

  One layer after another, in each one micro-batch after another, so that
  activations are bounded like those of training; what is held besides are the
  stem of all tokens and the Gram matrices of one layer. A type of which nothing
  was removed costs neither a Gram matrix nor a solve.

  Where the damping is chosen, the last quarter of the micro-batches, the newest
  of a run, decides for each matrix (`repair.choose`); then all are fitted.

  Args:
    params: float32.
    masks: before the prune.
    new_masks: after it.
    tokens_ABT: the micro-batches whose activations are fitted, at least 2 where
      the damping is chosen; more tokens fit better.
    cfg: the architecture of the arrays.
    damping: as in `repair.repair`; 0: chosen.
    mesh: devices of the arrays; None: one.

  Returns:
    Parameters of the same shapes, with other norm scales where stem channels
    were removed, and a `repair.Fit` with leaves [N] for 'attn_in' (wq, wk, wv
    together), 'heads' (wo), 'ffn_in' (w_gate, w_up), 'ffn' (w_down), and with
    leaves [] for 'final' if the output matrix is untied.

  Raises:
    ValueError: the damping is to be chosen on a single micro-batch.
  """
  if not damping and len(tokens_ABT) < 2:
    raise ValueError('a damping is chosen on one micro-batch of at least two')
  compute = model.Compute(remat='none', mesh=mesh)
  block = model.block(masks, tokens_ABT.shape[2], cfg, compute, taps=True)
  embed = lambda tokens_BT: model.embed(params, masks, tokens_BT, compute)
  task = _Task(
    masks, new_masks, cfg, damping, mesh,
    count=len(tokens_ABT), narrower=(masks.stem & ~new_masks.stem).any(),
  )  # fmt: skip
  x_ABTD, (layers, fits) = jax.lax.scan(
    functools.partial(task.layer, block),
    jax.lax.map(embed, tokens_ABT),
    (params.layers, masks.heads, masks.ffn, new_masks.heads, new_masks.ffn),
  )
  overlap = jax.lax.cond(
    task.narrower,
    lambda x: task.overlap(x, params.final_norm),
    lambda x: _zeros(2),
    x_ABTD,
  )
  repaired = params.replace(
    layers=layers, final_norm=params.final_norm * _factor(overlap)
  )
  if params.unembed is not None:
    unembed, fits['final'] = task.unembed(params, x_ABTD)
    repaired = repaired.replace(unembed=unembed)
  return repaired, fits


@dataclasses.dataclass(frozen=True)
class _Task:
  """One repair, and the parts of a model that it goes through.

  Attributes:
    masks, new_masks, cfg, damping, mesh: as of `repair_model`.
    count: of the micro-batches.
    narrower: whether stem channels were removed, bool [].
  """

  masks: structure.Groups
  new_masks: structure.Groups
  cfg: structure.ModelConfig
  damping: float
  mesh: sharding.Mesh | None
  count: int
  narrower: Array

  @property
  def fitted(self) -> int:
    """How many micro-batches, the first ones, do not decide on a damping."""
    if self.damping:
      return self.count
    return self.count - repair.deciding(self.count)

  @property
  def sides(self) -> int:
    """S: Gram matrices of an input, of which the second one decides."""
    return 1 if self.damping else 2

  def layer(self, block, x_ABTD, scanned):
    """Repairs one layer, for `scan`: what it gives, its weights and fits."""
    w, heads_K, ffn_F, *_ = scanned
    inputs, read = _ends(self.masks, self.new_masks, scanned[1:], self.cfg)
    run = lambda x_BTD: block(x_BTD, (w, heads_K, ffn_F))
    grams, overlaps, x_ABTD = self._measured(run, w, inputs, x_ABTD)
    w, fits = self._refitted(w, inputs, read, grams)
    w = w.replace(
      attn_norm=w.attn_norm * _factor(overlaps[0]),
      ffn_norm=w.ffn_norm * _factor(overlaps[1]),
    )
    return x_ABTD, (w, fits)

  def _measured(self, run, w, inputs, x_ABTD):
    """What the micro-batches say of a layer, which is run as it was.

    Returns:
      Gram matrices of each of `inputs`, [S, I, I]; `overlap` of both norms,
      [2, 2]; the stem after the layer.
    """
    removed = {name: (a & ~b).any() for name, (a, b) in inputs.items()}
    parts, grams_of_parts = self._gram_parts()

    def add(carry, scanned):
      (sums, overlaps), (before_BTD, side) = carry, scanned
      x_BTD, taps = run(before_BTD)
      taps = dict(zip(inputs, taps, strict=True))

      def overlap():
        # The stem between the blocks is not among the taps.
        out_BTD = jnp.einsum('BTKGH,KGHD->BTD', taps['heads'], w.wo)
        between_BTD = before_BTD + out_BTD * self.masks.stem
        return overlaps + jnp.stack(
          [
            self.overlap(before_BTD, w.attn_norm),
            self.overlap(between_BTD, w.ffn_norm),
          ]
        )

      overlaps = jax.lax.cond(self.narrower, overlap, lambda: overlaps)
      taps['heads'] = taps['heads'].reshape(*x_BTD.shape[:2], -1)
      sums = {
        name: jax.lax.cond(
          removed[name],
          lambda s_SBII, x: s_SBII.at[side].add(grams_of_parts(x) / self.count),
          lambda s_SBII, x: s_SBII,
          sums[name],
          taps[name],
        )
        for name in inputs
      }
      return (sums, overlaps), x_BTD

    zeros = {
      name: sharding.constrain(
        _zeros(self.sides, parts, len(alive_I), len(alive_I)),
        'SBII',
        self.mesh,
      )
      for name, (alive_I, _) in inputs.items()
    }
    # To which of the S Gram matrices a micro-batch adds.
    side_A = (jnp.arange(self.count) >= self.fitted).astype(int)
    (sums, overlaps), x_ABTD = jax.lax.scan(
      add, (zeros, _zeros(2, 2)), (x_ABTD, side_A)
    )
    grams = {n: _replicated(s.mean(1), self.mesh) for n, s in sums.items()}
    return grams, overlaps, x_ABTD

  def _gram_parts(self):
    """Into how many parts B a Gram matrix is summed, and how: [B, I, I]."""
    mesh = self.mesh
    if mesh is None or mesh.shape['tensor'] > 1:
      # XLA splits a Gram matrix over `tensor`.
      return 1, lambda x: _replicated(repair.gram(x), mesh)[None]
    # Devices add up their own parts of all micro-batches before they exchange
    # them: of the 1.7B shape, 0.3 GB a layer and type.
    return sharding.batch_parts(mesh), sharding.over_batch(
      lambda x: repair.gram(x)[None], mesh
    )

  def _refitted(self, w, inputs, read, grams):
    """A layer whose matrices are refitted, and the fits."""
    fits = {}

    def fixed(name, *matrices):
      """Matrices that read the same inputs share one solve."""
      flat = [m.reshape(len(inputs[name][0]), -1) for m in matrices]
      joined, fits[name] = self._repaired(
        jnp.concatenate(flat, axis=1), grams[name], *inputs[name],
        jnp.concatenate(read[name]),
      )  # fmt: skip
      ends = np.cumsum([m.shape[1] for m in flat])[:-1]
      parts = jnp.split(joined, ends, axis=1)
      return [
        part.reshape(m.shape) for part, m in zip(parts, matrices, strict=True)
      ]

    wq, wk, wv = fixed('attn_in', w.wq, w.wk, w.wv)
    (wo,) = fixed('heads', w.wo)
    w_gate, w_up = fixed('ffn_in', w.w_gate, w.w_up)
    (w_down,) = fixed('ffn', w.w_down)
    w = w.replace(
      wq=wq, wk=wk, wv=wv, wo=wo, w_gate=w_gate, w_up=w_up, w_down=w_down
    )
    return w, fits

  def unembed(self, params, x_ABTD):
    """An untied output matrix that is repaired, and its fit."""
    masks = self.masks

    def grams(x_ABTD):
      final_ABTD = model.final_norm(x_ABTD, params, masks, self.cfg)
      sides = jnp.split(final_ABTD, [self.fitted])[: self.sides]
      return jnp.stack([repair.gram(x) * (len(x) / self.count) for x in sides])

    zeros = _zeros(self.sides, self.cfg.D, self.cfg.D)
    grams_SDD = jax.lax.cond(self.narrower, grams, lambda _: zeros, x_ABTD)
    return self._repaired(
      params.unembed, _replicated(grams_SDD, self.mesh), masks.stem,
      self.new_masks.stem, jnp.ones(self.cfg.V, bool),
    )  # fmt: skip

  def _repaired(self, w_IO, grams_SII, alive_I, keep_I, read_O):
    """`repair.repair`, or nothing at all where no live input is removed."""

    def some(w_IO):
      # What was dead before is not touched: its inputs are 0.
      keep = keep_I | ~alive_I
      chosen = self.damping or repair.choose(
        jnp.where(read_O, w_IO, 0), *grams_SII, keep
      )
      return repair.repair(w_IO, grams_SII.sum(0), keep, chosen)

    def none(w_IO):
      zero = _zeros()
      return w_IO, repair.Fit(zero, zero, zero)

    # Every device solves for itself.
    w_IO = sharding.constrain(w_IO, 'IO', self.mesh)
    return jax.lax.cond((alive_I & ~keep_I).any(), some, none, w_IO)

  def overlap(self, x, scale_D):
    """How much alike what a norm gives is, before the prune and after it.

    Returns:
      Of the channels that stay: the sum of the products of both, and that of
      the squares of the latter, [2].
    """
    before, after = (
      model.rms_norm(x * stem_D, scale_D, stem_D, self.cfg.norm_eps)
      for stem_D in (self.masks.stem, self.new_masks.stem)
    )
    before *= self.new_masks.stem
    return jnp.stack([_dot(before, after), _dot(after, after)])


def _zeros(*shape):
  """Float32 also where a user has switched on float64."""
  return jnp.zeros(shape, jnp.float32)


def _ends(masks, new_masks, layer, cfg):
  """Which inputs of each matrix are alive, and which of its outputs are read.

  Args:
    masks, new_masks: of which the stem is looked at.
    layer: heads [K] and ffn [F] before a prune, then both after it.
    cfg: the architecture.

  Returns:
    By the names of `repair_model`'s fits: the inputs that are alive before and
    after, bool [I]; for each matrix that reads them, the outputs of it that
    something reads afterwards, bool [O].
  """
  heads_K, ffn_F, new_heads_K, new_ffn_F = layer
  # The inputs of wo are the K G H channels of all heads.
  wide = lambda keep_K: jnp.repeat(keep_K, cfg.G * cfg.H)
  inputs = {
    'attn_in': (masks.stem, new_masks.stem),
    'heads': (wide(heads_K), wide(new_heads_K)),
    'ffn_in': (masks.stem, new_masks.stem),
    'ffn': (ffn_F, new_ffn_F),
  }
  read = {
    'attn_in': (wide(new_heads_K), *[jnp.repeat(new_heads_K, cfg.H)] * 2),
    'heads': (new_masks.stem,),
    'ffn_in': (new_ffn_F, new_ffn_F),
    'ffn': (new_masks.stem,),
  }
  return inputs, read


def _factor(overlap_2):
  """By which a norm after the prune comes nearest to what it gave before it.

  1 where it gives 0.
  """
  product, square = overlap_2
  return jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 1)


def _replicated(grams, mesh):
  """Whole on every device: a factor is not computed in parts."""
  return sharding.constrain(grams, ' ' * grams.ndim, mesh)
