"""Forward KL divergence from a teacher's next-token distribution (Hinton 2015).

With p the teacher's and q the student's softmax of logits / temperature,

    divergence = temperature^2 KL(p || q)                      [nats per token]

The square keeps the size of the gradient independent of the temperature. All
V probabilities of every token would be 200 KB a token at V = 49,152; what is
stored are the teacher's k largest ones and, as one more outcome, the rest. That
is the divergence of the same distributions with the rest merged: a lower bound
of the full one, equal to it for k = V, and still 0 only where every stored
probability agrees. The teacher runs once per batch, before the step, and its
outputs enter the step as data: nothing of it is recomputed in the backward
pass.
"""

import math

from flax import struct
import jax
import jax.numpy as jnp

from effllm_jax import model
from effllm_jax import sharding
from effllm_jax import structure
from effllm_jax import unembedding

Array = jax.Array


@struct.dataclass
class Targets:
  """What a student is shown: probs float32 and index int32, [B, T, k]."""

  probs: Array
  index: Array


def targets(
  params: structure.Params,
  masks: structure.Groups,
  tokens_BT: Array,
  cfg: structure.ModelConfig,
  compute: model.Compute,
  temperature: float,
  top_k: int,
) -> Targets:
  """The teacher's `top_k` most likely next tokens at every position.

  Args:
    params, masks, cfg: the teacher.
    tokens_BT: int32.
    compute: how the arithmetic is done, and the devices that hold the arrays.
    temperature: that its logits are divided by, above 0.
    top_k: of them, at most V.
  """

  def likeliest(logits_BTV):
    scaled_BTV = logits_BTV / temperature
    top_BTk, index_BTk = largest(scaled_BTV, top_k)
    normaliser = jax.nn.logsumexp(scaled_BTV, axis=-1, keepdims=True)
    return Targets(probs=jnp.exp(top_BTk - normaliser), index=index_BTk)

  final_BTD, _ = model.hidden(params, masks, tokens_BT, cfg, compute)
  # XLA does not split its top_k: every device would have the logits of all.
  likeliest = sharding.over_batch(likeliest, compute.mesh)
  return unembedding.per_token(likeliest, final_BTD, params, compute.mesh)


def largest(x: Array, k: int) -> tuple[Array, Array]:
  """`jax.lax.top_k` of the last axis [V], of ever fewer numbers.

  On a GPU that sorts all of V together with its indices, for 2,048 tokens of
  128,256 numbers 263 million pairs beside 2.1 GB of temporaries. The k largest
  lie in the k groups whose largest are largest: what is sorted here are the
  largest of the groups, and then what these k hold, 6,100 numbers of a token
  for 64 of them. Ties go to the lower index, as there: of groups whose largest
  tie the first ones are taken, and groups stay in their order.
  """
  V = x.shape[-1]
  # The power of 2 at which the two sorts together are about the shortest.
  size = 1 << round(math.log2(V / k) / 2)
  count = -(-V // size)
  if k >= count:
    return jax.lax.top_k(x, k)
  # What fills up the last group comes behind all that is there.
  fill = [(0, 0)] * (x.ndim - 1) + [(0, count * size - V)]
  grouped = jnp.pad(x, fill, constant_values=-jnp.inf)
  grouped = grouped.reshape(*x.shape[:-1], count, size)
  _, best = jax.lax.top_k(grouped.max(-1), k)
  best = jnp.sort(best, axis=-1)
  some = jnp.take_along_axis(grouped, best[..., None], axis=-2)
  top, at = jax.lax.top_k(some.reshape(*x.shape[:-1], k * size), k)
  group = jnp.take_along_axis(best, at // size, axis=-1)
  return top, group * size + at % size


def divergence(
  logits_BTV: Array, teacher: Targets, temperature: float
) -> Array:
  """temperature^2 KL(teacher || student) per position, nats, [B, T].

  Args:
    logits_BTV: the student's, float32.
    teacher: of `targets`, with the same temperature.
    temperature: above 0.
  """
  scaled_BTV = logits_BTV / temperature
  normaliser_BT = jax.nn.logsumexp(scaled_BTV, axis=-1)
  top_BTk = jnp.take_along_axis(scaled_BTV, teacher.index, axis=-1)
  log_q_BTk = top_BTk - normaliser_BT[..., None]
  probs_BTk = teacher.probs
  rest_BT = jnp.maximum(1 - probs_BTk.sum(-1), 0)
  # Summed over what is left, not 1 minus what was taken: where the student is
  # sure of a stored token, that difference would be rounding only.
  others_BTV = jnp.put_along_axis(
    scaled_BTV, teacher.index, -jnp.inf, axis=-1, inplace=False
  )
  # With all V stored nothing is left; -inf times 0 must not become a nan.
  some = teacher.index.shape[-1] < logits_BTV.shape[-1]
  log_rest_BT = (
    jax.nn.logsumexp(others_BTV, axis=-1) - normaliser_BT if some else 0.0
  )
  kl_BT = (jax.scipy.special.xlogy(probs_BTk, probs_BTk)).sum(-1)
  kl_BT += jax.scipy.special.xlogy(rest_BT, rest_BT)
  kl_BT -= (probs_BTk * log_q_BTk).sum(-1) + rest_BT * log_rest_BT
  return temperature**2 * kl_BT
