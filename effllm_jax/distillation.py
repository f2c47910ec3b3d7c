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

from flax import struct
import jax
import jax.numpy as jnp

from effllm_jax import model
from effllm_jax import sharding
from effllm_jax import structure

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
    top_BTk, index_BTk = jax.lax.top_k(scaled_BTV, top_k)
    normaliser = jax.nn.logsumexp(scaled_BTV, axis=-1, keepdims=True)
    return Targets(probs=jnp.exp(top_BTk - normaliser), index=index_BTk)

  logits_BTV, _ = model.forward(params, masks, tokens_BT, cfg, compute)
  # XLA does not split its top_k: every device would have the logits of all.
  return sharding.over_batch(likeliest, compute.mesh)(logits_BTV)


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
