r"""Compiles a run on eight accelerators, on a machine without any.

    python3 -m venv .venv-tpu
    .venv-tpu/bin/pip install 'jax[tpu]' absl-py flax ml_collections optax rich
    .venv-tpu/bin/python -m experiments.aot_slice --device=v5e

or in the environment of `experiments.aot_steps`, with `--device=h100`.
Every program of experiments/configs/smollm_1p7b_to_469m.py on 8 devices, as its
docstring says, with what other configs add: a teacher, a repair, trials. Told
are the bytes of one device, arrays and what XLA plans to hold besides, and in
what dtype the matrices of layers are sent. Exits 1 where a program does not
compile, does not fit, or sends one of these in float32, 2 where the wheels are
missing. Ten minutes on one core, for v5e without the repair, which has to be
named: libtpu had not done it after 8.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import os
import re
import time
from typing import Any

from absl import flags

from effllm_jax import console
from effllm_jax import errors
from experiments import aot_hopper
from experiments import aot_tpu
from experiments import cli

# Bytes of memory.
DEVICES = {'v5e': 16e9, 'h100': 80e9}
# Sequences of a micro-batch, these of an update, and those of a repair. Of an
# update of 64, as that docstring has it, libtpu takes longer for the same loop.
_ROWS, _REPAIRED_ON = 8, 16
_MICRO_BATCHES = {'v5e': 2, 'h100': 64}
# What libtpu had not compiled after 8 minutes of a core.
_ONLY_BY_NAME = {'v5e': {'repair'}, 'h100': set()}
# Whose arithmetic is float32.
_FLOAT32 = ('repair', 'shrink')

_DEVICE = flags.DEFINE_enum('device', 'v5e', DEVICES, 'There are 8 of them.')
_PROGRAMS = flags.DEFINE_list(
  'programs',
  [],
  'Of those in the table; none: all of them, but for v5e no repair.',
)


def main(argv: list[str]) -> None:
  """Compiles all, prints one table."""
  del argv
  device = _DEVICE.value
  (aot_tpu if device == 'v5e' else aot_hopper).check_plugin()
  aot_hopper.check_packages('flax', 'optax')
  # After the wheels have been looked for: these imports take seconds.
  import jax
  import rich.progress
  import rich.table

  from experiments import bench_setup

  cfg = bench_setup.SHAPES['1.7b']
  programs = _programs(device, cfg)
  asked = _PROGRAMS.value or [
    x for x in programs if x not in _ONLY_BY_NAME[device]
  ]
  if unknown := set(asked) - set(programs):
    raise errors.InputError(
      f'--programs names {sorted(unknown)[0]!r}; there are '
      f'{", ".join(programs)}'
    )
  table = rich.table.Table(
    'program', 'arrays GB', 'besides GB', 'layers are sent in', 'seconds',
  )  # fmt: skip
  faults = []
  for name in rich.progress.track(
    asked, 'compiling', transient=True, console=console.plain(stderr=True)
  ):
    start = time.perf_counter()
    try:
      compiled = programs[name]().compile()
    except Exception as e:
      # Of whatever class: lowering, Mosaic and XLA have one each.
      faults.append(f'{name} does not compile: {str(e).splitlines()[0]}')
      table.add_row(name, 'failed', '', '', '')
      continue
    memory = compiled.memory_analysis()
    # What goes in may be what comes out.
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
    arrays -= memory.alias_size_in_bytes
    sent = gathered(compiled.as_text(), cfg)
    table.add_row(
      name,
      f'{arrays / 1e9:.2f}',
      f'{memory.temp_size_in_bytes / 1e9:.2f}',
      ', '.join(sorted(sent)),
      f'{time.perf_counter() - start:.0f}',
    )
    if arrays + memory.temp_size_in_bytes > DEVICES[device]:
      faults.append(f'{name} does not fit into {DEVICES[device] / 1e9:.0f} GB')
    if name not in _FLOAT32 and 'f32' in sent:
      faults.append(f'{name} sends matrices of layers in float32')
  out = cli.tables()
  out.print(table)
  out.print(f'8 x {device}, mesh.fsdp=8, jax {jax.__version__}')
  if faults:
    aot_hopper.fail(faults[0])


def gathered(text: str, cfg: Any) -> set[str]:
  """Dtypes in which a compiled program gathers matrices of one layer."""
  sizes = {cfg.D * cfg.D, cfg.D * cfg.F}
  found = re.findall(r' = (.*) all-gather(?:-start)?\(', text)
  return {
    dtype
    for results in found
    for dtype, shape in re.findall(r'(\w+)\[([\d,]+)\]', results)
    if math.prod(map(int, shape.split(','))) in sizes
  }


def _programs(device: str, cfg: Any) -> dict[str, Callable[[], Any]]:
  """What lowers each program of a run, by its name in the table."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from effllm_jax import plan as plan_lib
  from effllm_jax import selection
  from effllm_jax import sharding
  from effllm_jax import state as state_lib
  from effllm_jax import steps
  from experiments.configs import smollm_1p7b_to_469m

  types = (jax.sharding.AxisType.Auto,) * len(sharding.AXES)
  mesh = jax.sharding.Mesh(
    np.array(_devices(device)).reshape(1, 8, 1), sharding.AXES, axis_types=types
  )
  config = smollm_1p7b_to_469m.get_config()
  micro_batches = _MICRO_BATCHES[device]
  config.data.batch_size, config.train.accumulate = _ROWS, micro_batches
  # What `auto` is there. Here, on a CPU, it is `bucket`.
  config.model.kernels = 'xla'
  plan = plan_lib.make(config, cfg, None, mesh)
  tx = plan_lib.optimizer(config)
  state = state_lib.abstract_state(cfg, tx, mesh)
  params, masks = state.params, state.prune.masks

  def array(*shape, dtype=jnp.int32, split=True):
    spec = jax.sharding.PartitionSpec(
      *(sharding.BATCH if split and n == _ROWS else None for n in shape)
    )
    where = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  length = config.data.seq_len
  update = array(micro_batches, _ROWS, length + 1)

  def step(recipe=plan.recipe, answers=None):
    return steps.train_step.lower(
      state, update, answers, cfg=cfg, tx=tx, recipe=recipe, score=True
    )

  def by_kernels(name):
    compute = dataclasses.replace(plan.recipe.compute, kernels=name)
    return step(dataclasses.replace(plan.recipe, compute=compute))

  taught = dataclasses.replace(plan.recipe, distill=0.5)
  teach = functools.partial(
    steps.teach_step.lower, params, masks, update, cfg=cfg, recipe=taught
  )

  def select():
    of = lambda scores, masks: selection.select(
      scores, masks, plan.schedule.target, plan.schedule.target, plan.rules,
      plan.cost,
    )  # fmt: skip
    with jax.enable_x64(True):
      return jax.jit(of).lower(state.prune.scores, masks)

  pallas = {'v5e': 'pallas_tpu', 'h100': 'pallas_hopper'}[device]
  return {
    'step': step,
    'step by Pallas': functools.partial(by_kernels, pallas),
    'step with a teacher': lambda: step(taught, teach().out_info),
    'teacher': teach,
    'select': select,
    'trials': lambda: steps.trial_losses.lower(
      params,
      jax.tree.map(
        lambda x: array(3, *x.shape, dtype=bool, split=False), masks
      ),
      update,
      cfg=cfg,
      compute=plan.recipe.compute,
    ),
    'repair': lambda: steps.repair_step.lower(
      params, masks, masks, array(_REPAIRED_ON, _ROWS, length + 1),
      cfg=cfg, damping=0.0, mesh=mesh,
    ),
    'shrink': lambda: steps.shrink_step.lower(
      state,
      cfg=dataclasses.replace(
        cfg, K=cfg.K - 1, F=cfg.F - 256, D=cfg.D - 128
      ),
      tx=tx,
      mesh=mesh,
    ),
    'held-out loss': lambda: steps.sum_losses.lower(
      params, masks, array(_ROWS, length + 1),
      array(_ROWS, length, dtype=jnp.float32),
      cfg=cfg, compute=plan.recipe.compute,
    ),
  }  # fmt: skip


def _devices(device: str) -> list[Any]:
  from jax.experimental import topologies

  if device == 'v5e':
    return topologies.get_topology_desc('v5e:2x4', 'tpu').devices
  return aot_hopper.devices(8)


if __name__ == '__main__':
  # Before anything imports jax: it and libtpu read them as they start.
  os.environ |= aot_tpu.ENVIRONMENT | {'TPU_ACCELERATOR_TYPE': 'v5litepod-8'}
  cli.run(main)
