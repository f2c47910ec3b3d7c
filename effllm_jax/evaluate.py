"""Held-out bits per byte, over all text and per domain."""

from collections.abc import Callable
from collections.abc import Mapping
import math
import time
from typing import Any

import numpy as np

from effllm_jax import heldout as heldout_lib
from effllm_jax import model
from effllm_jax import sharding
from effllm_jax import steps
from effllm_jax import structure


def bits_per_byte(
  params: structure.Params,
  masks: structure.Groups,
  heldout: Mapping[str, heldout_lib.HeldOut],
  cfg: structure.ModelConfig,
  compute: model.Compute,
  batch_size: int,
  say: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Cross-entropy of held-out text per UTF-8 byte, in bits.

  Independent of the tokenizer, so that models of different families compare.
  Documents are read in windows of the training length; a window's first token
  has no context but the one token before it.

  Args:
    params, masks, cfg: the model; params float32, on the mesh of `compute`.
    heldout: by domain; windows int32 [n, T + 1] and weights [n, T] of targets.
    compute: how the arithmetic is done.
    batch_size: windows of a batch, of all devices together.
    say: is told the windows that are done, and all of them.

  Returns:
    `bits_per_byte` over all text, `domains` (the same by domain),
    `nats_per_token`, `heldout_bytes`, `heldout_tokens` and `seconds`.
  """
  start = time.perf_counter()
  nats, done = {}, 0
  count = sum(len(held.windows) for held in heldout.values())
  for domain, held in heldout.items():
    total = 0.0
    for i in range(0, len(held.windows), batch_size):
      windows = held.windows[i : i + batch_size]
      weight = held.weight[i : i + batch_size]
      # The last batch is filled up with weight 0: one compile for all.
      missing = ((0, batch_size - len(windows)), (0, 0))
      total += float(
        steps.sum_losses(
          params,
          masks,
          sharding.put_rows(np.pad(windows, missing), compute.mesh),
          sharding.put_rows(np.pad(weight, missing), compute.mesh),
          cfg=cfg,
          compute=compute,
        )
      )
      done += len(windows)
      say(done, count)
    nats[domain] = total
  return summary(nats, heldout) | {'seconds': time.perf_counter() - start}


def summary(
  nats: Mapping[str, float], heldout: Mapping[str, heldout_lib.HeldOut]
) -> dict[str, Any]:
  """What a cross-entropy in nats by domain is, per byte and per token.

  Args:
    nats: summed over the targets of a domain.
    heldout: the text, by the same domains.

  Returns:
    As `bits_per_byte`, without `seconds`.
  """
  num_bytes = {d: h.num_bytes for d, h in heldout.items()}
  tokens = sum(float(h.weight.sum()) for h in heldout.values())
  total_nats, total_bytes = sum(nats.values()), sum(num_bytes.values())
  return {
    'bits_per_byte': total_nats / total_bytes / math.log(2),
    'domains': {d: nats[d] / num_bytes[d] / math.log(2) for d in nats},
    'nats_per_token': total_nats / tokens,
    'heldout_bytes': total_bytes,
    'heldout_tokens': int(tokens),
  }
