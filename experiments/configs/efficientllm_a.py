r"""Variant A of EfficientLLM: pruning-aware pretraining without weight repair.

    python -m experiments.main \
      --config=experiments/configs/efficientllm_a.py --workdir=runs/a

The paper's headline rows, as we read them: uniform widths, first-order Taylor
saliency from the training gradient, a linear schedule, no repair and no
teacher. Everything else is the shipped base, so that the presets beside this
one compare at equal tokens and equal size.
"""

from experiments.configs import smollm2_135m


def get_config():
  """The base with every part of the method stated that variant A is about."""
  config = smollm2_135m.get_config()
  config.prune.policy = 'uniform'
  config.prune.saliency = 'taylor1'
  config.prune.schedule = 'linear'
  config.repair.enabled = False
  config.distill.weight = 0.0
  return config
