"""Compiles the TPU kernels for real, on a machine without a TPU.

    python3 -m venv .venv-tpu
    .venv-tpu/bin/pip install 'jax[tpu]' absl-py ml-collections rich
    .venv-tpu/bin/python -m experiments.aot_tpu

Every form of product, layer and dtype, with the default blocks and traced
extents, and attention with its gradient, for a TPU v5e, v5p and v6e, by the
compiler in the wheel libtpu. It refuses what lowering lets pass: a layout that
Mosaic lacks, more VMEM than there is. Nothing is run. Printed is what the
compiler reports; float32 also in the precision 'highest', which takes the most
VMEM. Ends with 1 where a compile fails, with 2 where libtpu is missing. Eight
minutes on one core.
"""

import importlib.metadata
import os
import sys

from effllm_jax import errors
from experiments import cli

CHIPS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
# dtype, precision
ARITHMETIC = (
  ('bfloat16', 'default'),
  ('float32', 'default'),
  ('float32', 'highest'),
)
# tokens, in, out
LAYERS = {
  '135M attention': (512, 576, 576),
  '135M up': (512, 576, 1536),
  '135M down': (512, 1536, 576),
  '1.7B attention': (8192, 2048, 2048),
  '1.7B up': (8192, 2048, 8192),
  '1.7B down': (8192, 8192, 2048),
  'ragged': (1000, 1100, 2100),
}
# tokens, heads of the keys, query heads to each, channels of a head
ATTENTION = {
  '135M': (512, 3, 3, 64),
  '1.7B': (2048, 32, 1, 64),
  'Llama 3.1 8B': (8192, 8, 4, 128),
  'ragged': (1000, 5, 2, 80),
}
# No chip is asked for, so none need be found; others may compile meanwhile.
ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  # What is compiled for a machine that is not here cannot be read back.
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
  'JAX_PLATFORMS': 'cpu',
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


def main(argv: list[str]) -> None:
  """Compiles all, prints one table; exits with 1 if any failed."""
  del argv
  # After the flags have been parsed: these imports take seconds.
  import time

  import jax
  from jax.experimental import topologies
  import rich.table

  libtpu = check_plugin()
  table = rich.table.Table(
    'chip', 'layer', 'form', 'size', 'dtype', 'precision', 'blocks',
    'VMEM MiB', 'HBM MiB', 'code KiB', 'seconds',
  )  # fmt: skip
  failed = []
  for chip, topology in CHIPS.items():
    device = topologies.get_topology_desc(topology, 'tpu').devices[0]
    for dtype, precision in ARITHMETIC:
      for layer, form, size, blocks, lower in _programs(dtype, device):
        start = time.perf_counter()
        try:
          with jax.default_matmul_precision(precision):
            figures = _figures(lower().compile())
        except Exception as e:
          # Of whatever class: lowering, Mosaic and XLA have one each.
          figures = ['failed', '', '']
          failed.append(f'{chip} {form} {size} {dtype} {precision}: {e}')
        table.add_row(
          chip,
          layer,
          form,
          ' '.join(map(str, size)),
          dtype,
          precision,
          ' '.join(map(str, blocks)),
          *figures,
          f'{time.perf_counter() - start:.1f}',
        )
  console = cli.tables()
  console.print(f'jax {jax.__version__}, libtpu {libtpu}')
  console.print(table)
  if failed:
    first = ' '.join(failed[0].split())
    print(
      f'error: {len(failed)} of {table.row_count} do not compile; the first: '
      f'{first[:400]}',
      file=sys.stderr,
    )
    sys.exit(1)


def check_plugin() -> str:
  """The version of libtpu; errors.InputError where there is none."""
  try:
    return importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError as e:
    raise errors.InputError(
      "libtpu is not installed; pip install 'jax[tpu]' in a venv of its own"
    ) from e


def _programs(dtype, device):
  """Layer, form, size, blocks of each, and what lowers it for the device."""
  import dataclasses
  import functools
  import itertools

  from effllm_jax.kernels import forms
  from effllm_jax.kernels import pallas_tpu
  from effllm_jax.kernels import pallas_tpu_attention

  for layer, form in itertools.product(LAYERS, forms.FORMS):
    size = forms.layer_sizes(form, *LAYERS[layer])
    blocks = pallas_tpu.default_blocks(form, *size, dtype)
    lower = functools.partial(_lower_product, form, size, dtype, device)
    yield layer, form, size, dataclasses.astuple(blocks), lower
  for layer, size in ATTENTION.items():
    T, _, _, H = size
    blocks = [
      pallas_tpu_attention.candidates(form, T, T, H, dtype)[0].rows
      for form in forms.ATTENTION
    ]
    lower = functools.partial(_lower_attention, *size, dtype, device)
    yield f'{layer} attention', 'causal', size, blocks, lower


def _lower_product(form, size, dtype, device):
  import jax
  import jax.numpy as jnp

  from effllm_jax.kernels import forms
  from effllm_jax.kernels import pallas_tpu

  named = dict(zip('mnk', size, strict=True))
  a, b = (
    _array(device, [named[i] for i in letters], dtype)
    for letters in forms.AXES[form]
  )
  extent = _array(device, (), jnp.int32)
  out = forms.result_dtype(form, dtype)

  def fn(a, b, m, n, k):
    return pallas_tpu.product(a, b, form, forms.Extents(m, n, k), out)

  return jax.jit(fn).lower(a, b, extent, extent, extent)


def _lower_attention(T, K, G, H, dtype, device):
  import jax
  import jax.numpy as jnp

  from effllm_jax.kernels import pallas_tpu_attention

  q, k = (_array(device, (1, T, heads, H), dtype) for heads in (K * G, K))

  def fn(q, k, v, dout, live):
    run = lambda *arrays: pallas_tpu_attention.causal(*arrays, live)
    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(dout)

  return jax.jit(fn).lower(q, k, k, q, _array(device, (), jnp.int32))


def _array(device, shape, dtype):
  import jax

  sharding = jax.sharding.SingleDeviceSharding(device)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _figures(compiled) -> list[str]:
  """VMEM of the kernels, the most of any of them, and HBM beside the arrays.

  Both in MiB; and their code in KiB.
  """
  import re

  # The compiler notes the VMEM of each operation in its text alone.
  vmem = [
    int(re.search(r'"used_scoped_memory_configs":\[.*?"size":"(\d+)"', line)[1])
    for line in compiled.as_text().splitlines()
    if 'custom_call_target="tpu_custom_call"' in line
  ]
  memory = compiled.memory_analysis()
  return [
    f'{max(vmem) / 2**20:.1f}',
    f'{memory.temp_size_in_bytes / 2**20:.1f}',
    f'{memory.generated_code_size_in_bytes / 2**10:.0f}',
  ]


if __name__ == '__main__':
  # Before anything imports jax: it and libtpu read them as they start.
  os.environ |= ENVIRONMENT
  cli.run(main)
