"""What the benchmarks of a training step share: a model, a batch, the step."""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
import dataclasses
import random
import statistics
import time
from typing import Any

import jax
import ml_collections
import optax

from effllm_jax import model
from effllm_jax import optimizers
from effllm_jax import plan as plan_lib
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure

# The shapes of SmolLM2; nothing is downloaded.
SMOLLM2 = structure.ModelConfig(
  V=49152, D=576, N=30, K=3, G=3, H=64, F=1536, context=8192,
  rope_theta=1e5, norm_eps=1e-5, tied=True,
)  # fmt: skip
SHAPES = {
  '135m': SMOLLM2,
  '360m': dataclasses.replace(SMOLLM2, D=960, N=32, K=5, F=2560),
  '1.7b': dataclasses.replace(SMOLLM2, D=2048, N=24, K=32, G=1, F=8192),
}


@dataclasses.dataclass(frozen=True)
class Bench:
  """Random weights and tokens for the steps of one config.

  Attributes:
    cfg: the whole architecture.
    plan: of the config; steps are timed without its teacher.
    tx: the optimizer.
    tokens: int32, one batch of micro-batches.
  """

  cfg: structure.ModelConfig
  plan: plan_lib.Plan
  tx: optax.GradientTransformation
  tokens: jax.Array

  def fresh(self, cfg: structure.ModelConfig) -> state_lib.TrainState:
    """A state with arrays of `cfg`."""
    params = model.init(jax.random.key(1), cfg)
    return state_lib.fresh_state(params, cfg, self.tx)

  def step(
    self,
    state: state_lib.TrainState,
    cfg: structure.ModelConfig,
    score: bool = False,
    kernels: str | None = None,
  ) -> Callable[
    [state_lib.TrainState],
    tuple[state_lib.TrainState, dict[str, jax.Array]],
  ]:
    """The compiled step, state -> (state, numbers); donates what it gets.

    Args:
      state: with arrays of `cfg`; is left as it is.
      cfg: their architecture.
      score: whether groups are scored.
      kernels: in place of the plan's.
    """
    recipe = dataclasses.replace(self.plan.recipe, distill=0.0)
    if kernels:
      compute = dataclasses.replace(recipe.compute, kernels=kernels)
      recipe = dataclasses.replace(recipe, compute=compute)
    compiled = steps.train_step.lower(
      state, self.tokens, None,
      cfg=cfg, tx=self.tx, recipe=recipe, score=score,
    ).compile()  # fmt: skip
    return lambda state: compiled(state, self.tokens, None)


def make(
  config: ml_collections.ConfigDict, cfg: structure.ModelConfig = SMOLLM2
) -> Bench:
  """Lays out a config for an architecture.

  Raises:
    errors.InputError: as `plan.make`.
  """
  batch = config.train.accumulate, config.data.batch_size
  return Bench(
    cfg=cfg,
    plan=plan_lib.make(config, cfg),
    tx=optimizers.optimizer(lambda _: 1e-4, 0.9, 0.95, 0.1, 1.0),
    tokens=jax.random.randint(
      jax.random.key(0), (*batch, config.data.seq_len + 1), 0, cfg.V
    ),
  )


def medians(
  calls: Mapping[Hashable, Callable[[], Any]], rounds: int
) -> dict[Hashable, float]:
  """Median seconds of each call, all of which take turns.

  The order is another one in each round: what runs after a small model finds
  its memory given back, and a step that always did took 1.03 to 1.07 of one
  that scores as well.

  Args:
    calls: to be timed until what they return is there.
    rounds: that count; one more comes first.
  """
  seconds = {name: [] for name in calls}
  order = random.Random(0)
  for _ in range(rounds + 1):
    for name in order.sample(list(calls), len(calls)):
      start = time.perf_counter()
      jax.block_until_ready(calls[name]())
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(x[1:]) for name, x in seconds.items()}
