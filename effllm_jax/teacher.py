"""The frozen model, by default its own source, that a run is distilled from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from effllm_jax import distillation
from effllm_jax import errors
from effllm_jax import sharding
from effllm_jax import sources
from effllm_jax import steps
from effllm_jax import structure

Array = jax.Array


class Teacher:
  """A frozen model that says what it would answer to a batch.

  Called once per batch: what it returns enters the training step as data.
  """

  def __init__(self, teacher: sources.Source, recipe: steps.Recipe):
    """Puts the weights on the devices, in the dtype that they compute in."""
    dtype, self._mesh = jnp.dtype(recipe.compute.dtype), recipe.compute.mesh
    # Never differentiated: there is nothing to recompute.
    compute = dataclasses.replace(recipe.compute, remat='none')
    self.cfg = teacher.cfg
    params = jax.tree.map(lambda x: np.asarray(x, dtype), teacher.params)
    self._params = sharding.put(params, sharding.params(params, self._mesh))
    # A teacher may itself be an event of a run, with dead groups in its arrays.
    masks = teacher.masks or structure.all_alive(teacher.cfg)
    whole = sharding.everywhere(self._mesh)
    self._masks = sharding.put(masks, jax.tree.map(lambda _: whole, masks))
    self._recipe = dataclasses.replace(recipe, compute=compute)
    self._compiled = None

  def compile(self, windows_ABT: Array) -> distillation.Targets:
    """Compiles for batches of this shape; returns the shapes of an answer."""
    lowered = steps.teach_step.lower(
      self._params, self._masks, windows_ABT, cfg=self.cfg, recipe=self._recipe
    )
    if self._compiled is None:
      self._compiled = lowered.compile()
    spread = sharding.batches(self._mesh)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread),
      lowered.out_info,
    )

  def __call__(self, windows_ABT: Array) -> distillation.Targets:
    """The answer to a batch, leaves [A, B, T - 1, top_k]; see `compile`."""
    return self._compiled(self._params, self._masks, windows_ABT)


def check(teacher: sources.Source, student: sources.Source) -> None:
  """Raises InputError unless both speak the same tokens."""
  if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
    raise errors.InputError(
      f'distill.teacher {teacher.name} has another vocabulary than the source '
      f'{student.name}; set --config.distill.teacher to a model with the same '
      'tokenizer'
    )
  if teacher.cfg.V < student.cfg.V:
    raise errors.InputError(
      f'distill.teacher {teacher.name} has {teacher.cfg.V} logits, the source '
      f'{student.cfg.V}; set --config.distill.teacher to a larger one'
    )
