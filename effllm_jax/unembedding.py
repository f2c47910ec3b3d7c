"""The output matrix: logits, and what is made of them a block at a time.

No other array of a step is as large: 16,384 tokens of Qwen's 151,936 logits are
10 GB, their gradient is as much again. So where a device would hold more than
`MOST_LOGITS` at once, the positions of all sequences are cut into blocks, and
logits exist for one block at a time. A mean takes its gradient right there, as
all that this can get later is a factor: no logit is kept, or computed twice.
(Liger Kernel does so in Triton; Hsu et al. 2024, arXiv 2410.10989.) What that
saves is in BENCHMARKS.md, "Memory of a step on an H100".
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from effllm_jax import kernels
from effllm_jax import sharding
from effllm_jax import structure

Array = jax.Array

# Float32 numbers on one device: 1 GiB, which is 5,461 tokens of SmolLM2 and
# 1,766 of Qwen. No run that is published has as many.
MOST_LOGITS = 2**28

# (logits [B, t, V] float32, and of the same positions each of some trees of
# [B, t, ...]) -> a tree of [B, t, ...].
Read = Callable[..., Any]


@jax.named_scope('unembed')
def unembed(
  final_BTD: Array, params: structure.Params, mesh: sharding.Mesh | None = None
) -> Array:
  """Logits [B, T, V] in float32 of what `model.hidden` returns."""
  return _logits(final_BTD, *_matrix(params, mesh), mesh)


def per_token(
  read: Read,
  final_BTD: Array,
  params: structure.Params,
  mesh: sharding.Mesh | None,
  *rows: Any,
) -> Any:
  """What `read` makes of the logits at every position.

  A gradient through it would keep the logits of all blocks; see `mean`.

  Args:
    read: sees some of the positions of all sequences at a time.
    final_BTD: of `model.hidden`.
    params: of the model.
    mesh: devices that the arrays are spread over; None: one.
    *rows: what else `read` takes, trees of [B, T, ...].

  Returns:
    A tree of [B, T, ...].
  """
  T, count = final_BTD.shape[1], _blocks(final_BTD, params, mesh)
  if count == 1:
    return read(unembed(final_BTD, params, mesh), *rows)
  matrix, letters = _matrix(params, mesh)

  def block(x_BtD, rows):
    with jax.named_scope('unembed'):
      logits_BtV = _logits(x_BtD, matrix, letters, mesh)
    return read(logits_BtV, *rows)

  found = jax.lax.map(
    lambda part: block(*part), _split((final_BTD, rows), count)
  )
  return jax.tree.map(lambda x: _joined(x, T), found)


def mean(
  read: Read,
  weights: Mapping[str, float],
  final_BTD: Array,
  params: structure.Params,
  mesh: sharding.Mesh | None,
  *rows: Any,
) -> tuple[Array, dict[str, Array]]:
  """A weighted sum of means over all positions, to be differentiated.

  Args:
    read: gives numbers [B, t] by name.
    weights: of the mean of each, not traced.
    final_BTD, params, mesh, *rows: as for `per_token`; what is differentiated
      are the first and the output matrix.

  Returns:
    sum over n of weights[n] mean(numbers[n]), and, not differentiated, the
    means; float32 scalars.
  """
  count = _blocks(final_BTD, params, mesh)
  if count == 1:
    # Nor are the rows differentiated in blocks.
    rows = jax.lax.stop_gradient(rows)
    numbers = read(unembed(final_BTD, params, mesh), *rows)
    means = {name: x.mean() for name, x in numbers.items()}
    return _weighted(weights, means), jax.lax.stop_gradient(means)
  matrix, letters = _output(params)
  return _mean_in_blocks(
    read, weights, letters, mesh, count, final_BTD, matrix, rows
  )


def _weighted(weights, numbers):
  return sum(weights[name] * x for name, x in numbers.items())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _mean_in_blocks(read, weights, letters, mesh, count, x_BTD, matrix, rows):
  """See `mean`."""
  return _mean_forward(
    read, weights, letters, mesh, count, x_BTD, matrix, rows
  )[0]


@jax.named_scope('unembed')
def _mean_forward(read, weights, letters, mesh, count, x_BTD, matrix, rows):
  B, T, _ = x_BTD.shape

  def part(tree, matrix):
    def block(gradient, tree):
      x_BtD, real_Bt, rows = tree

      def objective(x_BtD, matrix):
        numbers = read(_project(x_BtD, matrix, letters), *rows)
        sums = {n: (real_Bt * x).sum() for n, x in numbers.items()}
        return _weighted(weights, sums) / (B * T), sums

      value, pull, sums = jax.vjp(objective, x_BtD, matrix, has_aux=True)
      dx_BtD, dmatrix = pull(jnp.ones_like(value))
      return gradient + dmatrix, (dx_BtD, sums)

    gradient, (dx, sums) = jax.lax.scan(
      block, jnp.zeros_like(matrix), _split(tree, count)
    )
    return _joined(dx, T), (gradient, jax.tree.map(jnp.sum, sums))

  # What fills up the last block counts for nothing.
  real_BT = jnp.ones((B, T), jnp.float32)
  # Each part of the batch adds its blocks up by itself: summed in the loop, the
  # gradient of the matrix would go round the devices once for every block.
  dx_BTD, (dmatrix, sums) = sharding.summed_over_batch(part, mesh)(
    (x_BTD, real_BT, rows), sharding.constrain(matrix, letters, mesh)
  )
  dmatrix = sharding.constrain(dmatrix, letters, mesh, sharding.AT_REST)
  means = {name: x / (B * T) for name, x in sums.items()}
  return (_weighted(weights, means), means), (dx_BTD, dmatrix)


def _mean_backward(read, weights, letters, mesh, count, gradients, cotangents):
  factor, _ = cotangents
  return *((factor * x).astype(x.dtype) for x in gradients), None


_mean_in_blocks.defvjp(_mean_forward, _mean_backward)


def _blocks(final_BTD, params, mesh) -> int:
  """Number of blocks of positions, of which no device holds too many.

  Blocks are as few as that, and of one position at least.
  """
  B, T, D = final_BTD.shape
  V = _output(params)[0].size // D
  b, _, v = sharding.part_shape('BTV', (B, T, V), mesh)
  most = max(MOST_LOGITS // max(b * v, 1), 1)
  return max(-(-T // most), 1)


def _split(tree, count):
  """[B, T, ...] as [count, B, t, ...], the last one filled up with zeros."""

  def leaf(x):
    B, T, *rest = x.shape
    t = -(-T // count)
    x = jnp.pad(x, [(0, 0), (0, count * t - T)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(x.reshape(B, count, t, *rest), 1, 0)

  return jax.tree.map(leaf, tree)


def _joined(x, T):
  """[B, T, ...] again of [count, B, t, ...]."""
  count, B, t, *rest = x.shape
  return jnp.moveaxis(x, 0, 1).reshape(B, count * t, *rest)[:, :T]


def _output(params):
  if params.unembed is None:
    return params.embed, 'VD'
  return params.unembed, 'DV'


def _matrix(params, mesh):
  """The output matrix as products read it, and its axes."""
  matrix, letters = _output(params)
  return sharding.constrain(matrix, letters, mesh), letters


def _logits(x_BTD, matrix, letters, mesh):
  return sharding.constrain(_project(x_BTD, matrix, letters), 'BTV', mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x_BTD, matrix, letters):
  return kernels.einsum(
    f'BTD,{letters}->BTV', x_BTD, matrix.astype(x_BTD.dtype), jnp.float32
  )


def _project_forward(x_BTD, matrix, letters):
  return _project(x_BTD, matrix, letters), (x_BTD, matrix)


def _project_backward(letters, kept, dlogits_BTV):
  """As of every other product: in the compute dtype, summed in float32.

  By itself the cotangent, float32 as the logits are, makes both products
  float32, which an accelerator takes twice as long for or more.
  """
  x_BTD, matrix = kept
  dlogits_BTV = dlogits_BTV.astype(x_BTD.dtype)
  dx_BTD = kernels.einsum(
    f'BTV,{letters}->BTD', dlogits_BTV, matrix.astype(x_BTD.dtype), x_BTD.dtype
  )
  dmatrix = kernels.einsum(
    f'BTD,BTV->{letters}', x_BTD, dlogits_BTV, matrix.dtype
  )
  return dx_BTD, dmatrix


_project.defvjp(_project_forward, _project_backward)
