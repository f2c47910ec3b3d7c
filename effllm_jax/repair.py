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
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

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
      its inputs are only masked, over the tokens that were fitted; outputs that
      nobody reads any more count too.
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
    w_IO: float32, the matrix, applied as x @ w.
    gram_II: `gram` of its inputs.
    keep_I: bool, True = stays.
    damping: lambda as a share of the mean diagonal of `gram_II`, where that is
      not 0: dead inputs, which a shrink takes off, do not thin it. Where the
      Cholesky factor does not exist it is raised tenfold, up to 8 times.

  Returns:
    The repaired matrix, and how it went. If no damping helped, the survivors
    are as they were: never a nan.
  """
  kept_w_IO = jnp.where(keep_I[:, None], w_IO, 0)
  removed_w_IO = w_IO - kept_w_IO
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
    # A difference: rounding may leave it below 0.
    error_with=jnp.maximum(without - gained, 0),
  )
  return kept_w_IO + change_IO, fit


def choose(
  w_IO: Array, gram_II: Array, other_II: Array, keep_I: Array
) -> Array:
  """The damping of `CANDIDATES` that serves other tokens best, float32 [].

  Args:
    w_IO: float32, the matrix; what nobody reads of its output is to be 0.
    gram_II: of the tokens to fit.
    other_II: of those whose error decides.
    keep_I: bool, True = stays.
  """
  removed_w_IO = jnp.where(keep_I[:, None], 0, w_IO)

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
  zeros_IP = jnp.zeros((len(w_IO), columns), w_IO.dtype)
  return zeros_IP.at[rows].set(v_PP, mode='drop')


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
  """Mean square of the inputs that are not always 0; 1 if all are."""
  squares_I = jnp.diagonal(gram_II)
  count = (squares_I > 0).sum()
  return jnp.where(count > 0, squares_I.sum() / jnp.maximum(count, 1), 1.0)
