"""Layer Gram matrices, and the second-order update of a matrix's survivors.

When inputs P of y = x @ w are removed and R stay, the rows w_R that reproduce
y best, in the least-squares sense over the inputs that were seen, are

    w_R <- w_R + S_RR^-1 S_RP w_P,    w_P <- 0,    S = E[x x^T] + lambda I

which is the grouped Optimal Brain Surgeon update
-H^-1[:, P] (H^-1[P, P])^-1 w_P (Hassibi and Stork, 1993) with H = S, written
without the inverse of H. Doing nothing is one of the choices that the minimum
is over, so the error of the layer never rises, damped or not, on the tokens
that were fitted. On others it can: with fewer tokens than a few times the
inputs the fit learns the batch. Removing 5 % of SmolLM2-135M, 512 tokens with a
damping of 0.1 leave 6 % of the layer error and make the held-out loss worse;
with a damping of 10 they leave half of it and make it better. A model of 3M, of
fewer inputs, is best at 0.01 on 4,096 tokens where that one is at 1. So every
matrix can choose its own (`choose`): what serves tokens best that were not
fitted, which is what those figures were found to be by trying
(BENCHMARKS.md, experiments/HYPOTHESES.md).

`repair_model` does that for every matrix that loses inputs: wo (heads), w_down
(feed-forward channels), wq wk wv w_gate w_up and an untied output matrix (stem
channels). A tied output matrix is the embedding: a change that keeps its output
would change what every token puts into the stem, so it is left alone. So are
biases, which are added to what a matrix gives, and a repair keeps that. Inputs
are those of the model before the prune, in float32, from the newest batches of
the run (`repair.batches`), never from a calibration set.

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

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import model
from effllm_jax import sharding
from effllm_jax import structure

Array = jax.Array

# By default a TPU rounds what it multiplies to bfloat16, a GPU to TF32.
_product, _dot = (
  functools.partial(op, precision=jax.lax.Precision.HIGHEST)
  for op in (jnp.matmul, jnp.vdot)
)
# Each retry multiplies the damping by 10: the last one is 1e8 times the first.
_RETRIES = 8
# What `choose` tries. The error on tokens that were not fitted is flat around
# its minimum: on the small model 0.03 and 0.1 differ by 0.005 nats of 0.16.
CANDIDATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Columns that `choose` makes do with where no more inputs are removed, and more
# outputs are there. 64 of 1,536 inputs with 576 outputs take 0.38 of the time
# on a CPU, 6 of 576 with 3,072 take 0.06. Each is a program to compile.
_COLUMNS = (64, 256, 1024)


def gram(x: Array) -> Array:
  """Mean outer product of the inputs of a matrix: float32 [I, I].

  Args:
    x: [..., I], any float dtype; leading axes are tokens.
  """
  x_TI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  return _product(x_TI.T, x_TI) / x_TI.shape[0]


@struct.dataclass
class Fit:
  """How one repair went; float32 scalars (stacked for many matrices).

  Attributes:
    damping: the damping used; 0 where nothing was removed, inf where no damping
      helped and the survivors are as they were.
    error_without: mean squared change of an output vector of the matrix when
      its inputs are only masked, over the tokens that were fitted.
    error_with: the same after the repair; never above `error_without`.
  """

  damping: Array
  error_without: Array
  error_with: Array


def repair(
  w_IO: Array, gram_II: Array, keep_I: Array, damping: float
) -> tuple[Array, Fit]:
  """Moves what removed inputs contributed onto the inputs that stay.

  The shape stays [I, O] and the mask is data: one compiled solve serves every
  mask. The rows of removed inputs come back as exactly 0.

  Args:
    w_IO: the matrix, applied as x @ w.
    gram_II: `gram` of its inputs.
    keep_I: bool, True = stays.
    damping: lambda as a share of the mean diagonal of `gram_II`, where that is
      not 0: dead inputs, which a shrink takes off, do not thin it. Where the
      Cholesky factor does not exist it is raised tenfold, up to 8 times.

  Returns:
    The repaired matrix in the dtype of `w_IO`, and how it went. If no damping
    helped, the survivors are as they were: never a nan.
  """
  keep_I = keep_I.astype(bool)
  w32_IO = w_IO.astype(jnp.float32)
  kept_w_IO = jnp.where(keep_I[:, None], w32_IO, 0)
  removed_w_IO = w32_IO - kept_w_IO
  # In the rows R this is S_RP w_P; damping is diagonal and does not enter it.
  image_IO = _product(gram_II, removed_w_IO)
  lost_IO = jnp.where(keep_I[:, None], image_IO, 0)
  scale = _mean_square(gram_II)
  solve = functools.partial(_solved, lost_IO, gram_II, keep_I)

  def failed(carry):
    _, change_IO, tries = carry
    return ~jnp.isfinite(change_IO).all() & (tries < _RETRIES)

  def retry(carry):
    damping, _, tries = carry
    return damping * 10, solve(damping * 10), tries + 1

  damping = jnp.asarray(damping, jnp.float32)
  damping, change_IO, _ = jax.lax.while_loop(
    failed, retry, (damping, solve(damping), 0)
  )
  good = jnp.isfinite(change_IO).all()
  change_IO = jnp.where(good, change_IO, 0)
  # With (S + lambda I) c = l the error |x_R c - x_P w_P|^2 is
  # e - 2 l.c + c.S c = e - l.c - lambda c.c, and needs no further product.
  without = _dot(removed_w_IO, image_IO)
  gained = _dot(lost_IO, change_IO)
  gained += damping * scale * _dot(change_IO, change_IO)
  fit = Fit(
    damping=jnp.where(good, damping, jnp.inf),
    error_without=without,
    error_with=without - gained,
  )
  return (kept_w_IO + change_IO).astype(w_IO.dtype), fit


def choose(
  w_IO: Array, gram_II: Array, other_II: Array, keep_I: Array
) -> Array:
  """The damping of `CANDIDATES` that serves other tokens best, float32 [].

  Args:
    w_IO: the matrix; what nobody reads of its output is to be 0.
    gram_II: of the tokens to fit.
    other_II: of those whose error decides.
    keep_I: bool, True = stays.
  """
  removed_w_IO = jnp.where(keep_I[:, None], 0, w_IO.astype(jnp.float32))

  def best(w_IO):
    lost_IO = jnp.where(keep_I[:, None], _product(gram_II, w_IO), 0)

    def error(damping):
      left_IO = _solved(lost_IO, gram_II, keep_I, damping) - w_IO
      error = _dot(left_IO, _product(other_II, left_IO))
      return jnp.where(jnp.isfinite(error), error, jnp.inf)

    candidates = jnp.asarray(CANDIDATES, jnp.float32)
    return candidates[jnp.argmin(jax.lax.map(error, candidates))]

  removed_I = ~keep_I
  narrower = [n for n in _COLUMNS if n < min(w_IO.shape)]
  return jax.lax.switch(
    sum((removed_I.sum() > n).astype(int) for n in narrower),
    [lambda w_IO, n=n: best(_narrowed(w_IO, removed_I, n)) for n in narrower]
    + [best],
    removed_w_IO,
  )


def _narrowed(w_IO, removed_I, columns):
  """A matrix v of so many columns with v v^T = w w^T, as good for any error.

  An error is the sum of the squares of A w over its outputs, for some A: the
  trace of A w w^T A^T. Of w only rows of removed inputs are not 0, as many as
  v has columns at most.
  """
  (rows,) = jnp.nonzero(removed_I, size=columns, fill_value=len(removed_I))
  w_PO = w_IO.at[rows].get(mode='fill', fill_value=0)
  v_PP = jnp.linalg.qr(w_PO.T, mode='r').T
  return jnp.zeros((len(w_IO), columns)).at[rows].set(v_PP, mode='drop')


def deciding(count: int) -> int:
  """How many of so many micro-batches, the last ones, decide on a damping."""
  return max(count // 4, 1)


def _solved(lost_IO, gram_II, keep_I, damping):
  """(S + lambda I)^-1 of what was lost; 0 in the rows of removed inputs."""
  both_II = keep_I[:, None] & keep_I[None, :]
  eye_II = jnp.eye(len(keep_I), dtype=jnp.float32)
  damped_II = gram_II + damping * _mean_square(gram_II) * eye_II
  # Removed inputs become an identity block: their solution is 0.
  factor = jax.scipy.linalg.cho_factor(jnp.where(both_II, damped_II, eye_II))
  return jax.scipy.linalg.cho_solve(factor, lost_IO)


def _mean_square(gram_II):
  """Of an input that is not always 0."""
  squares_I = jnp.diagonal(gram_II)
  return squares_I.sum() / jnp.maximum((squares_I > 0).sum(), 1)


def repair_model(
  params: structure.Params,
  masks: structure.Groups,
  new_masks: structure.Groups,
  tokens_ABT: Array,
  cfg: structure.ModelConfig,
  damping: float,
  mesh: sharding.Mesh | None = None,
) -> tuple[structure.Params, dict[str, Fit]]:
  """Repairs every matrix whose inputs are alive in `masks` and then removed.

  One layer after another, in each one micro-batch after another, so that
  activations are bounded like those of training; what is held besides are the
  stem of all tokens and the Gram matrices of one layer. A type of which nothing
  was removed costs neither a Gram matrix nor a solve.

  Where the damping is chosen, the last quarter of the micro-batches, the newest
  of a run, decides for each matrix (`choose`); then all are fitted.

  Args:
    params: float32.
    masks: before the prune.
    new_masks: after it.
    tokens_ABT: the micro-batches whose activations are fitted, at least 2 where
      the damping is chosen; more tokens fit better.
    cfg: the architecture of the arrays.
    damping: as in `repair`; 0: chosen.
    mesh: devices of the arrays; None: one.

  Returns:
    Parameters of the same shapes, with other norm scales where stem channels
    were removed, and a `Fit` with leaves [N] for 'attn_in' (wq, wk, wv
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
  fitted = count if damping else count - deciding(count)
  S, side_A = (1 if damping else 2), (jnp.arange(count) >= fitted).astype(int)
  narrower = (masks.stem & ~new_masks.stem).any()
  if mesh is None or mesh.shape['tensor'] > 1:
    # XLA splits a Gram matrix over `tensor`.
    parts, grams_of_parts = 1, lambda x: _shared(gram(x), mesh)[None]
  else:
    # Devices add up their own parts of all micro-batches before they exchange
    # them: of the 1.7B shape, 0.3 GB a layer and type.
    parts = sharding.batch_parts(mesh)
    grams_of_parts = sharding.over_batch(lambda x: gram(x)[None], mesh)

  def body(x_ABTD, scanned):
    w, heads_K, ffn_F, new_heads_K, new_ffn_F = scanned
    # The inputs of wo are the K G H channels of all heads.
    wide = lambda keep_K: jnp.repeat(keep_K, cfg.G * cfg.H)
    inputs = {
      'attn_in': (masks.stem, new_masks.stem),
      'heads': (wide(heads_K), wide(new_heads_K)),
      'ffn_in': (masks.stem, new_masks.stem),
      'ffn': (ffn_F, new_ffn_F),
    }
    removed = {name: (a & ~b).any() for name, (a, b) in inputs.items()}

    # Which outputs are read afterwards.
    read = {
      'attn_in': (wide(new_heads_K), *[jnp.repeat(new_heads_K, cfg.H)] * 2),
      'heads': (new_masks.stem,),
      'ffn_in': (new_ffn_F, new_ffn_F),
      'ffn': (new_masks.stem,),
    }

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
    grams = {name: _shared(s.mean(1), mesh) for name, s in sums.items()}
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
      wq=wq, wk=wk, wv=wv, wo=wo, w_gate=w_gate, w_up=w_up, w_down=w_down,
      attn_norm=w.attn_norm * _factor(overlaps[0]),
      ffn_norm=w.ffn_norm * _factor(overlaps[1]),
    )  # fmt: skip
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
      return jnp.stack([gram(x) * (len(x) / count) for x in sides])

    grams_SDD = jax.lax.cond(
      narrower, final_grams, lambda _: jnp.zeros((S, cfg.D, cfg.D)), x_ABTD
    )
    unembed, fits['final'] = _repaired(
      params.unembed, _shared(grams_SDD, mesh), masks.stem, new_masks.stem,
      jnp.ones(cfg.V, bool), damping, mesh,
    )  # fmt: skip
    repaired = repaired.replace(unembed=unembed)
  return repaired, fits


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


def _shared(grams, mesh):
  """Whole on every device: a factor is not computed in parts."""
  return sharding.constrain(grams, ' ' * grams.ndim, mesh)


def _repaired(w_IO, grams_SII, alive_I, keep_I, read_O, damping, mesh):
  """`repair`, or nothing at all where no live input is removed."""

  def some(w_IO):
    # What was dead before is not touched: its inputs are 0.
    keep = keep_I | ~alive_I
    chosen = damping or choose(jnp.where(read_O, w_IO, 0), *grams_SII, keep)
    return repair(w_IO, grams_SII.sum(0), keep, chosen)

  def none(w_IO):
    zero = jnp.zeros((), jnp.float32)
    return w_IO, Fit(zero, zero, zero)

  # Every device solves for itself.
  w_IO = sharding.constrain(w_IO, 'IO', mesh)
  return jax.lax.cond((alive_I & ~keep_I).any(), some, none, w_IO)
