"""Kernels under shard_map: eight simulated devices, in a process of its own."""

import pytest

from tests import conftest

NAMES = ('xla', 'xla_loop', 'bucket', 'pallas_tpu')
SCRIPT = """
import functools, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from effllm_jax import model
from effllm_jax.kernels import pallas_tpu
from effllm_jax.kernels import pallas_tpu_attention as attention
from tests import conftest

# A CPU runs the TPU's kernels step by step.
pallas_tpu.product = functools.partial(pallas_tpu.product, interpret=True)
attention.causal = functools.partial(attention.causal, interpret=True)
cfg = conftest.make_config(N=2, F=48)
args = conftest.make_params(cfg), conftest.make_masks(cfg)
tokens = conftest.make_tokens(cfg, batch=8)
mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))

def loss(params, masks, tokens, kernels):
  compute = model.Compute(kernels=kernels)
  part = lambda p, m, t: model.loss(p, m, t, cfg, compute)[None]
  # Kernels say nothing of what varies over the mesh.
  return jax.shard_map(
    part, mesh=mesh, in_specs=(P(), P(), P('data')), out_specs=P('data'),
    check_vma=False,
  )(params, masks, tokens).mean()

place = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))
inputs = *(place(P(), x) for x in args), place(P('data'), tokens)
step = jax.jit(jax.value_and_grad(loss), static_argnums=3)
want, wants = jax.jit(
  jax.value_and_grad(lambda p, m, t: model.loss(p, m, t, cfg))
)(*args, tokens)
found = {}
for name in sys.argv[1:]:
  compiled = step.lower(*inputs, name).compile()
  value, grads = compiled(*inputs)
  conftest.check_close(value, want, 1e-5)
  conftest.check_close(grads, wants, 1e-4, 1e-6)
  text = compiled.as_text()
  found[name] = {x: len(re.findall(x, text)) for x in (
    'all-gather', 'all-reduce', 'all-to-all')}
print(json.dumps(found))
"""


@pytest.fixture(scope='module', name='found')
def _found():
  found, _ = conftest.on_eight_devices(SCRIPT, *NAMES)
  return found


@pytest.mark.parametrize('name', NAMES)
def test_no_all_gather_and_the_same_gradient(found, name):
  """Scan and remat inside, one batch row a device."""
  counts = found[name]
  assert counts['all-gather'] == counts['all-to-all'] == 0
  # The gradient of replicated weights is summed: this is not one device.
  assert counts['all-reduce'] > 0
