r"""Compiles the Hopper kernels for real, on a machine without a GPU.

    python3.13 -m venv .venv-cuda
    .venv-cuda/bin/pip install jax==0.12.0.1 jax-cuda13-plugin==0.12.0.1 \
      absl-py ml_collections rich
    .venv-cuda/bin/python -m experiments.aot_hopper

Every form of product, with the default blocks, in the shapes of the linear
layers of SmolLM2-135M and SmolLM2-1.7B, and attention, there and back, with
heads of 64 and 128 channels, in longer and in shorter tiles, through XLA, LLVM
and ptxas to machine code for sm_90a. Takes 20 seconds. The plugin brings a
ptxas of its own; where nvidia-cuda-nvcc is installed, as with jax[cuda13], that
one is used. Exits 1, with one line, where a kernel does not compile, spills
registers, has its wgmma serialized, or takes more shared memory than an SM
lends; 2 where the wheels are not installed.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import re
import sys
import tempfile
import time
from typing import Any

from effllm_jax import errors
from experiments import cli

# (D, F, tokens): see effllm_jax.structure. The heads together are as wide as D.
SHAPES = {
  'SmolLM2-135M': (576, 1536, 512),
  'SmolLM2-1.7B': (2048, 8192, 8192),
}
# Query heads, key/value heads, channels of a head, in texts of so many tokens.
HEADS = {
  'SmolLM2-135M': (9, 3, 64),
  'SmolLM2-1.7B': (32, 32, 64),
  'Qwen3-1.7B': (16, 8, 128),
}
_TOKENS = 2048
# How many in an array, and how many such arrays.
_BARRIERS = r'num_barriers=(\d+)[^)]*\): (\d+)'
_SHARED_BYTES = 227 * 1024
# What the compiler asks of a device, here of an H100 SXM.
_TARGET = """
  gpu_device_info {
    cuda_compute_capability {
      major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES
    }
    core_count: 132
    threads_per_warp: 32
    threads_per_block_limit: 1024
    threads_per_core_limit: 2048
    registers_per_block_limit: 65536
    registers_per_core_limit: 65536
    shared_memory_per_block: 49152
    shared_memory_per_block_optin: 232448
    shared_memory_per_core: 233472
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
    fpus_per_core: 128
    l2_cache_size: 52428800
    clock_rate_ghz: 1.98
    memory_bandwidth: 3352320000000
    device_memory_size: 84942979072
  }
  platform_name: "CUDA"
  dnn_version_info { major: 9 minor: 10 }
"""
# The plugin compiles, nothing looks for a GPU; `parse` reads what is dumped.
ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'MOSAIC_GPU_DUMP_PTXAS': '1',
  'MOSAIC_GPU_DUMP_RESOURCES': '1',
}


@dataclasses.dataclass(frozen=True)
class _Case:
  """What is compiled: a function and the shapes that it is called with.

  And what a row of the table says of it; `shared_bytes` as in `parse`.
  """

  model: str
  kernel: str
  sizes: str
  run: Callable[..., Any]
  arrays: Sequence[Any]
  blocks: str = ''
  shared_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler said of a kernel, or the most and all of several."""

  registers: int
  spilled_bytes: int
  shared_bytes: int
  remarks: frozenset[str]

  def faults(self) -> list[str]:
    """Why it would be slow, or not start."""
    faults = []
    if self.spilled_bytes:
      faults.append(f'spills {self.spilled_bytes} bytes')
    if self.shared_bytes > _SHARED_BYTES:
      faults.append(
        f'takes {self.shared_bytes} bytes of shared memory of {_SHARED_BYTES}'
      )
    return faults + sorted(x for x in self.remarks if 'serialized' in x)


def main(argv: list[str]) -> None:
  """Compiles everything, prints a table."""
  del argv
  check_plugin()
  # After the wheels have been looked for: these imports take seconds.
  import jax
  import rich.table

  sharding = device_of_no_machine()
  table = rich.table.Table(
    'model', 'kernel', 'of', 'blocks', 'registers', 'spilled', 'shared KiB',
    'remarks', 'temporaries MB', 'seconds',
  )  # fmt: skip
  faults = []
  for case in (*_products(), *_attentions()):
    name = f'{case.model} {case.kernel} of {case.sizes} {case.blocks}'
    arrays = [
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      for x in case.arrays
    ]
    lower = functools.partial(jax.jit(case.run).lower, *arrays)
    start = time.perf_counter()
    try:
      log, program = _said(lambda lower=lower: lower().compile())
    except Exception as e:
      fail(f'{name} does not compile: {str(e).splitlines()[0]}')
    compiled = parse(log, case.shared_bytes)
    faults += [f'{name}: {x}' for x in compiled.faults()]
    table.add_row(
      case.model,
      case.kernel,
      case.sizes,
      case.blocks,
      f'{compiled.registers}',
      f'{compiled.spilled_bytes}',
      f'{compiled.shared_bytes / 1024:.1f} of {_SHARED_BYTES // 1024}',
      ' '.join(sorted(set(re.findall(r'C\d+', ' '.join(compiled.remarks))))),
      f'{program.memory_analysis().temp_size_in_bytes / 1e6:.1f}',
      f'{time.perf_counter() - start:.1f}',
    )
  console = cli.tables()
  console.print(table)
  ptxas = _version('nvidia-cuda-nvcc') or 'of the plugin'
  console.print(f'sm_90a, jax {jax.__version__}, ptxas {ptxas}')
  if faults:
    fail(faults[0])


def _products() -> Iterator[_Case]:
  import jax
  import jax.numpy as jnp

  from effllm_jax.kernels import forms
  from effllm_jax.kernels import pallas_hopper

  extent = jax.ShapeDtypeStruct((), jnp.int32)
  for model, (d, f, tokens) in SHAPES.items():
    for form in forms.FORMS:
      for width_in, width_out in (d, d), (d, f), (f, d):
        mnk = forms.layer_sizes(form, tokens, width_in, width_out)
        sizes = dict(zip('mnk', mnk, strict=True))
        dtype = forms.result_dtype(form, jnp.bfloat16)
        blocks = pallas_hopper.default_blocks(form, **sizes, dtype=dtype)

        def run(a, b, m, n, k, form=form, dtype=dtype, blocks=blocks):
          extents = forms.Extents(m, n, k)
          return pallas_hopper.product(a, b, form, extents, dtype, blocks)

        arrays = [
          jax.ShapeDtypeStruct([sizes[x] for x in axes], jnp.bfloat16)
          for axes in forms.AXES[form]
        ]
        tile = ' x '.join(map(str, blocks.tile().values()))
        yield _Case(
          model=model,
          kernel=form,
          sizes=' x '.join(map(str, mnk)),
          blocks=f'{tile}, {blocks.stages} stages',
          run=run,
          arrays=[*arrays, *[extent] * 3],
          shared_bytes=blocks.shared_bytes(),
        )


def _attentions() -> Iterator[_Case]:
  """The three kernels of attention are one case; with each length of tiles."""
  import jax
  import jax.numpy as jnp

  from effllm_jax.kernels import forms
  from effllm_jax.kernels import pallas_hopper_attention

  for (model, (heads, kept, size)), i in itertools.product(
    HEADS.items(), (0, -1)
  ):
    blocks = [
      pallas_hopper_attention.candidates(
        form, _TOKENS, _TOKENS, size, jnp.bfloat16
      )[i]
      for form in forms.ATTENTION
    ]

    def run(q, k, v, dout, live, blocks=blocks):
      causal = lambda *arrays: pallas_hopper_attention.causal(
        *arrays, live, blocks
      )
      out, pull = jax.vjp(causal, q, k, v)
      return out, *pull(dout)

    queries, keys = (
      jax.ShapeDtypeStruct((1, _TOKENS, x, size), jnp.bfloat16)
      for x in (heads, kept)
    )
    live = jax.ShapeDtypeStruct((), jnp.int32)
    yield _Case(
      model=model,
      kernel='attention',
      sizes=f'{heads} and {kept} heads of {size}',
      blocks=f'tiles of {", ".join(str(x.tile) for x in blocks)}',
      run=run,
      arrays=[queries, keys, keys, queries, live],
    )


def check_plugin() -> None:
  """Raises errors.InputError where nothing compiles for a GPU."""
  if _version('jax-cuda13-plugin') is None:
    raise errors.InputError(
      'no CUDA plugin of jax here; run pip install jax==0.12.0.1 '
      'jax-cuda13-plugin==0.12.0.1 on Python 3.13'
    )


def check_packages(*names: str) -> None:
  """Raises errors.InputError where a package is missing."""
  for name in names:
    if importlib.util.find_spec(name) is None:
      raise errors.InputError(f'no {name} here; run pip install {name}')


def parse(log: str, shared_bytes: int | None = None) -> Compiled:
  """Reads what Mosaic and ptxas print about one kernel, or about several.

  Args:
    log: what they printed.
    shared_bytes: shared memory by our own reckoning, for a jax that does not
      print it, as 0.10.2, which jax[cuda13] installs on Python 3.11.

  Raises:
    ValueError: they said something else.
  """
  patterns = {
    'registers': r'Used (\d+) registers',
    # Not those of a warning, which says it again.
    'stores': r'stack frame, (\d+) bytes spill stores',
    'loads': r'stack frame, \d+ bytes spill stores, (\d+) bytes spill loads',
    'static': r'(\d+) bytes smem',
  }
  found = {
    x: [*map(int, re.findall(pattern, log))] for x, pattern in patterns.items()
  }
  missing = [x for x, numbers in found.items() if not numbers]
  # A barrier takes 8 bytes.
  printed = [
    int(said[1]) + 8 * sum(
      int(each) * int(times)
      for each, times in re.findall(_BARRIERS, said[0])
    )
    for said in re.finditer(r'smem_scratch_bytes=(\d+).*', log)
  ]  # fmt: skip
  if not printed and shared_bytes is None:
    missing.append('shared memory')
  if missing:
    raise ValueError(f'no {", ".join(missing)} in the log: {log!r}')
  if printed:
    shared_bytes = max(printed) + max(found['static'])
  return Compiled(
    registers=max(found['registers']),
    spilled_bytes=sum(found['stores']) + sum(found['loads']),
    shared_bytes=shared_bytes,
    remarks=frozenset(re.findall(r'\(C\d+\) .*', log)),
  )


def device_of_no_machine() -> Any:
  """A sharding on one H100 that exists for the compiler only."""
  import jax
  import numpy as np

  mesh = jax.sharding.Mesh(np.asarray(devices(1)), ('device',))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def devices(count: int) -> list[Any]:
  """H100s of one host, which exist for the compiler only."""
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    '', 'cuda', topology=f'1x1x{count}', target_config=_TARGET
  ).devices


def _said(action: Callable[[], Any]) -> tuple[str, Any]:
  """What an action prints, libraries in C++ included, and what it returns."""
  with tempfile.TemporaryFile() as file:
    kept = {fd: os.dup(fd) for fd in (1, 2)}
    sys.stdout.flush()
    try:
      for fd in kept:
        os.dup2(file.fileno(), fd)
      result = action()
    finally:
      sys.stdout.flush()
      for fd, copy in kept.items():
        os.dup2(copy, fd)
        os.close(copy)
    file.seek(0)
    return file.read().decode(errors='replace'), result


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def fail(line: str) -> None:
  """Ends with one line, and with 1: what is asked for does not hold."""
  print(f'error: {line}', file=sys.stderr)
  sys.exit(1)


if __name__ == '__main__':
  # Before anything imports jax, which reads them as it starts.
  os.environ |= ENVIRONMENT
  cli.run(main)
