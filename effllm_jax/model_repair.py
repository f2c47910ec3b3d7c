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
  layer = model.block(masks, tokens_ABT.shape[2], cfg, compute, taps=True)
  count = len(tokens_ABT)
  # To which of S Gram matrices a micro-batch adds: the second one decides.
  fitted = count if damping else count - repair.deciding(count)
  S, side_A = (1 if damping else 2), (jnp.arange(count) >= fitted).astype(int)
  narrower = (masks.stem & ~new_masks.stem).any()
  if mesh is None or mesh.shape['tensor'] > 1:
    # XLA splits a Gram matrix over `tensor`.
    parts, grams_of_parts = 1, lambda x: _replicated(repair.gram(x), mesh)[None]
  else:
    # Devices add up their own parts of all micro-batches before they exchange
    # them: of the 1.7B shape, 0.3 GB a layer and type.
    parts = sharding.batch_parts(mesh)
    grams_of_parts = sharding.over_batch(lambda x: repair.gram(x)[None], mesh)

  def body(x_ABTD, scanned):
    w, heads_K, ffn_F, *_ = scanned
    inputs, read = _ends(masks, new_masks, scanned[1:], cfg)
    removed = {name: (a & ~b).any() for name, (a, b) in inputs.items()}

    def add(carry, scanned):
      (sums, overlaps), (before_BTD, side) = carry, scanned
      x_BTD, taps = layer(before_BTD, (w, heads_K, ffn_F))
      taps = dict(zip(inputs, taps, strict=True))

      def overlap():
        # The stem between the blocks is not among the taps.
        out_BTD = jnp.einsum('BTKGH,KGHD->BTD', taps['heads'], w.wo)
        between_BTD = before_BTD + out_BTD * masks.stem
        return overlaps + jnp.stack(
          [
            _overlap(before_BTD, w.attn_norm, masks, new_masks, cfg),
            _overlap(between_BTD, w.ffn_norm, masks, new_masks, cfg),
          ]
        )

      overlaps = jax.lax.cond(narrower, overlap, lambda: overlaps)
      taps['heads'] = taps['heads'].reshape(*x_BTD.shape[:2], -1)
      sums = {
        name: jax.lax.cond(
          removed[name],
          lambda s_SBII, x: s_SBII.at[side].add(grams_of_parts(x) / count),
          lambda s_SBII, x: s_SBII,
          sums[name],
          taps[name],
        )
        for name in inputs
      }
      return (sums, overlaps), x_BTD

    zeros = {
      name: sharding.constrain(
        jnp.zeros((S, parts, len(alive_I), len(alive_I))), 'SBII', mesh
      )
      for name, (alive_I, _) in inputs.items()
    }
    (sums, overlaps), x_ABTD = jax.lax.scan(
      add, (zeros, jnp.zeros((2, 2))), (x_ABTD, side_A)
    )
    grams = {name: _replicated(s.mean(1), mesh) for name, s in sums.items()}
    w, fits = _refitted(w, inputs, read, grams, damping, mesh)
    w = w.replace(
      attn_norm=w.attn_norm * _factor(overlaps[0]),
      ffn_norm=w.ffn_norm * _factor(overlaps[1]),
    )
    return x_ABTD, (w, fits)

  embed = lambda tokens_BT: model.embed(params, masks, tokens_BT, compute)
  x_ABTD, (layers, fits) = jax.lax.scan(
    body,
    jax.lax.map(embed, tokens_ABT),
    (params.layers, masks.heads, masks.ffn, new_masks.heads, new_masks.ffn),
  )
  overlap = jax.lax.cond(
    narrower,
    lambda x: _overlap(x, params.final_norm, masks, new_masks, cfg),
    lambda x: jnp.zeros(2),
    x_ABTD,
  )
  repaired = params.replace(
    layers=layers, final_norm=params.final_norm * _factor(overlap)
  )
  if params.unembed is not None:

    def final_grams(x_ABTD):
      final_ABTD = model.final_norm(x_ABTD, params, masks, cfg)
      sides = jnp.split(final_ABTD, [fitted])[:S]
      return jnp.stack([repair.gram(x) * (len(x) / count) for x in sides])

    grams_SDD = jax.lax.cond(
      narrower, final_grams, lambda _: jnp.zeros((S, cfg.D, cfg.D)), x_ABTD
    )
    unembed, fits['final'] = _repaired(
      params.unembed, _replicated(grams_SDD, mesh), masks.stem, new_masks.stem,
      jnp.ones(cfg.V, bool), damping, mesh,
    )  # fmt: skip
    repaired = repaired.replace(unembed=unembed)
  return repaired, fits


def _ends(masks, new_masks, layer, cfg):
  """What goes in at each matrix of a layer, and what is read of what comes out.

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


def _refitted(w, inputs, read, grams, damping, mesh):
  """A layer whose matrices are refitted, and the fits; grams are [S, I, I]."""
  fits = {}

  def fixed(name, *matrices):
    """Matrices that read the same inputs share one solve."""
    flat = [m.reshape(len(inputs[name][0]), -1) for m in matrices]
    joined, fits[name] = _repaired(
      jnp.concatenate(flat, axis=1), grams[name], *inputs[name],
      jnp.concatenate(read[name]), damping, mesh,
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


def _overlap(x, scale_D, masks, new_masks, cfg):
  """Of what a norm gives of the channels that stay, before and after a prune.

  Returns:
    The sum of the products of both, and that of the squares of the latter, [2].
  """
  before, after = (
    model.rms_norm(x * stem_D, scale_D, stem_D, cfg.norm_eps)
    for stem_D in (masks.stem, new_masks.stem)
  )
  return jnp.stack([_dot(before * new_masks.stem, after), _dot(after, after)])


def _factor(overlap_2):
  """By which the latter comes nearest to the former; 1 where both are 0."""
  product, square = overlap_2
  return jnp.where(square > 0, product / jnp.where(square > 0, square, 1), 1)


def _replicated(grams, mesh):
  """Whole on every device: a factor is not computed in parts."""
  return sharding.constrain(grams, ' ' * grams.ndim, mesh)


def _repaired(w_IO, grams_SII, alive_I, keep_I, read_O, damping, mesh):
  """`repair.repair`, or nothing at all where no live input is removed."""

  def some(w_IO):
    # What was dead before is not touched: its inputs are 0.
    keep = keep_I | ~alive_I
    chosen = damping or repair.choose(
      jnp.where(read_O, w_IO, 0), *grams_SII, keep
    )
    return repair.repair(w_IO, grams_SII.sum(0), keep, chosen)

  def none(w_IO):
    zero = jnp.zeros((), jnp.float32)
    return w_IO, repair.Fit(zero, zero, zero)

  # Every device solves for itself.
  w_IO = sharding.constrain(w_IO, 'IO', mesh)
  return jax.lax.cond((alive_I & ~keep_I).any(), some, none, w_IO)
