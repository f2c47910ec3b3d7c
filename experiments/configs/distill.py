r"""Variant A, distilled from the source model in the same loop.

    python -m experiments.main \
      --config=experiments/configs/distill.py --workdir=runs/distill

A teacher costs one more forward pass of the source a step: 37 % more arithmetic
here, as much again where a quarter is left. The metrics count it
(`flops.teacher`), so that runs compare at equal FLOPs: there more text is worth
more than a teacher. At equal tokens one gains on a small model and nothing, on
average, on SmolLM2 ("At the same budget" in STUDIES.md).
"""

import ml_collections

from experiments.configs import efficientllm_a


def get_config() -> ml_collections.ConfigDict:
  """Variant A and a teacher, during pruning and in recovery.

  With one of three seeds, a teacher and Taylor's score took a head of every
  layer of SmolLM2 and broke it ("SmolLM2" in STUDIES.md): the floor keeps
  them.
  """
  config = efficientllm_a.get_config()
  config.distill.weight = 0.5
  config.distill.temperature = 1.0
  config.distill.top_k = 64
  config.prune.floors.heads = 3
  return config
