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
    """Puts the weights on the devices, in the dtypes that they compute in."""
    dtype, self._mesh = jnp.dtype(recipe.compute.dtype), recipe.compute.mesh
    # Never differentiated: there is nothing to recompute.
    compute = dataclasses.replace(recipe.compute, remat='none')
    if compute.kernels == 'pallas_hopper':
      # Which takes multiples of 64, as the student's widths are.
      compute = dataclasses.replace(compute, kernels='xla')
    self.cfg = teacher.cfg
    # As a student casts them: norm scales and biases stay float32.
    params = structure.map_axes(
      lambda letters, x: np.asarray(
        x, dtype if structure.is_matrix(letters) else np.float32
      ),
      teacher.params,
    )
    self._params = sharding.put(params, sharding.params(params, self._mesh))
    # A teacher may itself be an event of a run, with dead groups in its arrays.
    masks = teacher.masks or structure.all_alive(teacher.cfg)
    whole = sharding.replicated(self._mesh)
    self._masks = sharding.put(masks, jax.tree.map(lambda _: whole, masks))
    self._recipe = dataclasses.replace(recipe, compute=compute)
    self._compiled = self._answer = None

  def compile(self, windows_ABT: Array) -> distillation.Targets:
    """Compiles for batches of this shape; returns the shapes of an answer.

    Once: all batches of a run have one shape, whatever becomes of the student.
    """
    if self._compiled is None:
      lowered = steps.teach_step.lower(
        self._params, self._masks, windows_ABT, cfg=self.cfg,
        recipe=self._recipe,
      )  # fmt: skip
      self._compiled = lowered.compile()
      spread = sharding.batches(self._mesh)
      self._answer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread),
        lowered.out_info,
      )
    return self._answer

  def __call__(self, windows_ABT: Array) -> distillation.Targets:
    """The answer to a batch, leaves [A, B, T - 1, top_k]; see `compile`."""
    return self._compiled(self._params, self._masks, windows_ABT)


def fitted(
  teacher: sources.Source, student: sources.Source, seq_len: int
) -> sources.Source:
  """The teacher with a logit for each of the student's, and no more.

  Models of one tokenizer differ in how many rows without a token fill up their
  vocabulary; what a teacher says of such rows no student can learn.

  Raises:
    errors.InputError: they speak different tokens, or sequences are longer than
      the teacher's context.
  """
  if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
    raise errors.InputError(
      f'distill.teacher {teacher.name} has another vocabulary than the source '
      f'{student.name}; set --config.distill.teacher to a model with the same '
      'tokenizer'
    )
  V = student.cfg.V
  if teacher.cfg.V < V:
    raise errors.InputError(
      f'distill.teacher {teacher.name} has {teacher.cfg.V} logits, the source '
      f'{V}; set --config.distill.teacher to a larger one'
    )
  if teacher.cfg.context < seq_len:
    raise errors.InputError(
      f'data.seq_len {seq_len} exceeds the context {teacher.cfg.context} of '
      f'distill.teacher {teacher.name}; set --config.data.seq_len'
    )
  params = teacher.params
  unembed = None if params.unembed is None else params.unembed[:, :V]
  return dataclasses.replace(
    teacher,
    cfg=dataclasses.replace(teacher.cfg, V=V),
    params=params.replace(embed=params.embed[:V], unembed=unembed),
  )
