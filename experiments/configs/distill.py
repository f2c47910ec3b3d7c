r"""Variant A, distilled from the source model in the same loop.

    python -m experiments.main \
      --config=experiments/configs/distill.py --workdir=runs/distill

A teacher costs one more forward pass a step: a third more arithmetic. The
metrics count it (`flops.teacher`), so that runs compare at equal FLOPs: there
more text is worth more than a teacher, at equal tokens it is the other way
round ("At the same budget" in BENCHMARKS.md).
"""

import ml_collections

from experiments.configs import efficientllm_a


def get_config() -> ml_collections.ConfigDict:
  """Variant A and a teacher, during pruning and in recovery."""
  config = efficientllm_a.get_config()
  config.distill.weight = 0.5
  config.distill.temperature = 1.0
  config.distill.top_k = 64
  return config
