r"""Variant A, distilled from the source model in the same loop.

    python -m experiments.main \
      --config=experiments/configs/distill.py --workdir=runs/distill

A teacher costs one more forward pass a step: a third more arithmetic. The
metrics count it (`flops.teacher`), so that runs compare at equal FLOPs. With
as little text as here the shipped recipe is better without one
(HYPOTHESES.md, rows 21 and 23).
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
