"""Layer Gram matrices, and the second-order update of a matrix's survivors.

When inputs P of y = x @ w are removed and R stay, the rows w_R that reproduce
y best, in the least-squares sense over the inputs that were seen, are

    w_R <- w_R + S_RR^-1 S_RP w_P,    w_P <- 0,    S = E[x x^T] + lambda I

which is the grouped Optimal Brain Surgeon update
-H^-1[:, P] (H^-1[P, P])^-1 w_P (Hassibi and Stork, 1993) with H = S, written
without the inverse of H. Doing nothing is one of the choices that the minimum
is over, so the error of the layer never rises, damped or not.

These are the transforms only; the training loop does not call them yet.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Each retry multiplies the damping by 10: the last one is 1e8 times the first.
_RETRIES = 8


def gram(x: Array) -> Array:
  """Mean outer product of the inputs of a matrix: float32 [I, I].

  Args:
    x: [..., I], any float dtype; leading axes are tokens.
  """
  x_TI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  return x_TI.T @ x_TI / x_TI.shape[0]


def repair(
  w_IO: Array, gram_II: Array, keep_I: Array, damping: float
) -> tuple[Array, Array]:
  """Moves what removed inputs contributed onto the inputs that stay.

  The shape stays [I, O] and the mask is data: one compiled solve serves every
  mask. The rows of removed inputs come back as exactly 0.

  Args:
    w_IO: the matrix, applied as x @ w.
    gram_II: `gram` of its inputs.
    keep_I: bool, True = stays.
    damping: lambda as a share of the mean diagonal of `gram_II`; where the
      Cholesky factor does not exist it is raised tenfold, up to 8 times.

  Returns:
    The repaired matrix in the dtype of `w_IO`, and the damping that was used.
    If no damping helped, the survivors are as they were and it is inf: never a
    nan.
  """
  keep_I = keep_I.astype(bool)
  w32_IO = w_IO.astype(jnp.float32)
  kept_w_IO = jnp.where(keep_I[:, None], w32_IO, 0)
  both_II = keep_I[:, None] & keep_I[None, :]
  eye_II = jnp.eye(len(keep_I), dtype=jnp.float32)
  # S_RP w_P in the rows R; damping is diagonal and does not enter it.
  lost_IO = jnp.where(
    keep_I[:, None], gram_II @ jnp.where(keep_I[:, None], 0, w32_IO), 0
  )
  scale = jnp.diagonal(gram_II).mean()

  def solve(damping):
    damped_II = gram_II + damping * scale * eye_II
    # Removed inputs become an identity block: their solution is 0.
    factor = jax.scipy.linalg.cho_factor(jnp.where(both_II, damped_II, eye_II))
    return jax.scipy.linalg.cho_solve(factor, lost_IO)

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
  repaired_IO = kept_w_IO + jnp.where(good, change_IO, 0)
  return repaired_IO.astype(w_IO.dtype), jnp.where(good, damping, jnp.inf)
