r"""SmolLM2-135M to at most 105M parameters, 61,440 tokens an arm.

    python -m experiments.compare \
      --study=experiments/studies/smollm2.py --workdir=runs/compare

120 steps of 1.6 to 4.2 s each on 2 cores (BENCHMARKS.md), a third more with a
teacher: 4 to 11 minutes a run, 4 to 10 hours at equal tokens with three seeds,
and about as many again at equal FLOPs.
"""

from experiments import arms
from experiments.configs import efficientllm_a


def get_study() -> arms.Study:
  """The shipped recipe's numbers, with what the arms are about set apart."""
  config = efficientllm_a.get_config()
  # As shipped: `fisher` asks for micro-batches.
  config.data.batch_size = 1
  config.train.accumulate = 2
  # One optimizer for all, and some arms start from scratch.
  config.optimizer.embedding = 1.0
  config.optimizer.peak = 1e-4
  config.prune.ema = 0.95
  config.prune.every = 4
  config.prune.end_tokens = 20_480
  config.repair.batches = 8
  config.repair.damping = 0.0  # chosen
  config.checkpoint.keep = 1
  return arms.Study(config, arms.ARMS, arms.sensitivity(config))
