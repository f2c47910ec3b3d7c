"""The loss and its gradient lower for machines that this one is not."""

import functools

import jax
import jax.numpy as jnp
import pytest

from effllm_jax import model
from effllm_jax import structure
from effllm_jax.kernels import forms
from tests import configs_test
from tests import conftest

# Kernel, platform, what its lowering calls; None: XLA's own operations.
TARGETS = [
  ('pallas_tpu', 'tpu', 'tpu_custom_call'),
  ('pallas_hopper', 'cuda', 'mosaic_gpu'),
  ('bucket', 'tpu', None),
  ('bucket', 'cuda', None),
  ('xla_loop', 'tpu', None),
  ('xla_loop', 'cuda', None),
]


def shipped() -> dict[tuple, str]:
  """One config for each shape that some shipped config trains."""
  found = {}
  for name in configs_test.NAMES:
    config = configs_test.load(name)
    shape = config.data.batch_size, config.data.seq_len
    found.setdefault((shape, '1p7b' in name), name)
  return found


@functools.cache
def traced(config, name):
  """Loss and gradient, in scan and remat, a width for each layer, bfloat16."""
  big = '1p7b' in config
  cfg = configs_test.SMOLLM_1P7B if big else configs_test.SMOLLM2
  data = configs_test.load(config).data
  compute = model.Compute(dtype='bfloat16', kernels=name)
  masks = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, bool),
    structure.group_shapes(cfg),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  windows = jax.ShapeDtypeStruct((data.batch_size, data.seq_len + 1), jnp.int32)
  loss = functools.partial(model.loss, cfg=cfg, compute=compute)
  return jax.jit(jax.value_and_grad(loss)).trace(
    structure.shapes(cfg), masks, windows
  )


@pytest.mark.parametrize(('name', 'platform', 'call'), TARGETS)
@pytest.mark.parametrize('config', shipped().values())
def test_a_step_of_every_shipped_config_lowers(config, name, platform, call):
  lowered = traced(config, name).lower(lowering_platforms=(platform,))
  text = lowered.as_text()
  if call:
    # Forward, again in the backward pass, and two gradients each.
    assert text.count(call) >= 12
  else:
    assert 'custom_call_target = "tpu' not in text
    assert 'mosaic' not in text


def test_a_width_that_the_hopper_kernel_cannot_take_fails_in_one_line():
  module = forms.module('pallas_hopper')
  with pytest.raises(ValueError, match='multiples of 64; use implementation='):
    module.default_blocks('nn', 512, 1500, 576, jnp.bfloat16)
  cfg = conftest.make_config()
  compute = model.Compute(dtype='bfloat16', kernels='pallas_hopper')
  with pytest.raises(ValueError, match='multiples of 64'):
    jax.eval_shape(
      functools.partial(model.loss, cfg=cfg, compute=compute),
      structure.shapes(cfg), structure.all_alive(cfg),
      conftest.make_tokens(cfg),
    )  # fmt: skip
