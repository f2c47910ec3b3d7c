r"""Compiles training steps for an H100, on a machine without a GPU.

    python3.13 -m venv .venv-cuda
    .venv-cuda/bin/pip install jax==0.12.0.1 jax-cuda13-plugin==0.12.0.1 \
      absl-py flax ml_collections optax rich
    .venv-cuda/bin/python -m experiments.aot_steps

What XLA plans to hold: the state (weights and moments), and temporaries, the
gradients and what a forward pass keeps, with logits and scores of attention in
blocks as they are (`effllm_jax.unembedding`, `kernels/attention.py`) and whole.
bfloat16, remat 'full', kernels 'xla', a score of every group, one GPU. Exits 1
where a step does not fit into its memory, 2 where the wheels are missing.
Fifteen minutes on one core.
"""

import os

from effllm_jax import console
from experiments import aot_hopper
from experiments import cli

_LLAMA = dict(V=128256, D=2048, N=16, K=8, G=4, H=64, F=8192)
_QWEN = dict(V=151936, D=2048, N=28, K=8, G=2, H=128, F=6144, qk_norm=True)
_SMOLLM2 = dict(V=49152, D=2048, N=24, K=32, G=1, H=64, F=8192)
# Model, sequences, tokens of each, whether a teacher speaks.
STEPS = (
  ('SmolLM2-1.7B', _SMOLLM2, 8, 2048, False),
  ('Llama-3.2-1B', _LLAMA, 8, 2048, False),
  ('Llama-3.2-1B', _LLAMA, 8, 2048, True),
  ('Llama-3.2-1B', _LLAMA, 2, 8192, False),
  ('Llama-3.2-1B', _LLAMA, 1, 32768, False),
  ('Qwen3-1.7B', _QWEN, 8, 2048, True),
)
_H100_BYTES = 80e9
# Larger than all logits, and than all scores of a head.
_WHOLE = 2**60


def main(argv: list[str]) -> None:
  """Compiles all, prints one table."""
  del argv
  aot_hopper.check_plugin()
  aot_hopper.check_packages('flax', 'optax')
  # After the wheels have been looked for: these imports take seconds.
  import jax
  import rich.progress
  import rich.table

  from effllm_jax import unembedding
  from effllm_jax.kernels import attention

  table = rich.table.Table(
    'model', 'tokens', 'teacher', 'state GB', 'temporaries GB', 'whole',
  )  # fmt: skip
  limits = unembedding.MOST_LOGITS, attention.MOST_SCORES
  too_large = []
  for name, shape, rows, length, taught in rich.progress.track(
    STEPS, 'compiling', transient=True, console=console.plain(stderr=True)
  ):
    state, blocks = _memory(shape, rows, length, taught)
    unembedding.MOST_LOGITS = attention.MOST_SCORES = _WHOLE
    _, whole = _memory(shape, rows, length, taught)
    unembedding.MOST_LOGITS, attention.MOST_SCORES = limits
    table.add_row(
      name,
      f'{rows} x {length:,}',
      'yes' if taught else '',
      *(f'{x / 1e9:.1f}' for x in (state, blocks, whole)),
    )
    if state + blocks > _H100_BYTES:
      too_large.append(f'{name}, {rows} x {length:,} tokens')
  out = cli.tables()
  out.print(table)
  out.print(f'sm_90a, jax {jax.__version__}')
  if too_large:
    aot_hopper.fail(f'does not fit into an H100: {too_large[0]}')


def _memory(shape, rows, length, taught) -> tuple[int, int]:
  """Bytes of the state of a step, and of what it needs beside that."""
  import jax
  import jax.numpy as jnp

  from effllm_jax import distillation
  from effllm_jax import model
  from effllm_jax import optimizers
  from effllm_jax import state as state_lib
  from effllm_jax import steps
  from effllm_jax import structure

  cfg = structure.ModelConfig(
    context=length, rope_theta=5e5, norm_eps=1e-5, tied=True, **shape
  )
  rate = optimizers.learning_rate('wsd', 1e-4, 1e-5, 2, 4, 100)
  tx = optimizers.optimizer(rate, 0.9, 0.95, 0.1, 1.0)
  recipe = steps.Recipe(
    compute=model.Compute(dtype='bfloat16'), saliency='taylor1', decay=0.9,
    b1=0.9, b2=0.95, clip=1.0, distill=0.5 if taught else 0.0,
    temperature=1.0, top_k=64, seed=0,
  )  # fmt: skip
  device = aot_hopper.device_of_no_machine()
  array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
    shape, dtype, sharding=device
  )
  answers = distillation.Targets(
    probs=array(1, rows, length, recipe.top_k, dtype=jnp.float32),
    index=array(1, rows, length, recipe.top_k),
  )
  compiled = steps.train_step.lower(
    jax.tree.map(
      lambda x: array(*x.shape, dtype=x.dtype),
      state_lib.abstract_state(cfg, tx),
    ),
    array(1, rows, length + 1),
    answers if taught else None,
    cfg=cfg,
    tx=tx,
    recipe=recipe,
    score=True,
  ).compile()
  memory = compiled.memory_analysis()
  # A limit is no argument of a program: jax would give this one back.
  jax.clear_caches()
  return memory.alias_size_in_bytes, memory.temp_size_in_bytes


if __name__ == '__main__':
  # Before anything imports jax, which reads them as it starts. XLA would say of
  # what is whole that it does not fit.
  os.environ |= aot_hopper.ENVIRONMENT | {'TF_CPP_MIN_LOG_LEVEL': '3'}
  cli.run(main)
