"""Where a run was computed: packages, processor, devices, revision of the code.

A run has the same bits on one machine, with one version of jax and one number
of devices. `starts.jsonl` of a workdir says which, so that whoever finds other
digits can see why: a row for each start whose steps are in the model.

    step        it went on after this one
    code        revision of the clone that ran, as git describes it; None: none
    packages    name -> version, of those that a number can depend on
    python      version
    processor   name and, of x86, family and model, which a cloud's names hide
    cpus        that the process may use
    device      kind of the devices of the mesh
    devices     their number
    platform    compiler or driver behind them
    processes   that shared them
    flags       of the compiler, by the variable that sets them
"""

from collections.abc import Iterable
from collections.abc import Mapping
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from effllm_jax import atomic
from effllm_jax import sharding
from effllm_jax import untrusted
from effllm_jax import workdir as workdir_lib

STARTS = 'starts.jsonl'
_PACKAGES = (
  'effllm_jax', 'flax', 'grain', 'jax', 'jax-cuda12-plugin',
  'jax-cuda13-plugin', 'jaxlib', 'libtpu', 'ml-collections', 'ml-dtypes',
  'numpy', 'optax', 'orbax-checkpoint', 'tensorflow-datasets', 'tokenizers',
)  # fmt: skip
_FLAGS = ('LIBTPU_INIT_ARGS', 'XLA_FLAGS')
_ROW = {
  'step': int, 'code': (str, None), 'packages': {str: str}, 'python': str,
  'processor': str, 'cpus': int, 'device': str, 'devices': int,
  'platform': str, 'processes': int, 'flags': {str: str},
}  # fmt: skip
# No number depends on them.
_WITHOUT_EFFECT = ('step', 'python', 'cpus')


def here(mesh: sharding.Mesh, step: int) -> dict[str, Any]:
  """The row of a run that goes on in this process after `step`."""
  device = mesh.devices.flat[0]
  return {
    'step': step,
    'code': _code(),
    'packages': dict(_versions()),
    'python': platform.python_version(),
    'processor': processor(),
    'cpus': cpus(),
    'device': device.device_kind,
    'devices': mesh.devices.size,
    'platform': ' '.join(device.client.platform_version.split()),
    'processes': jax.process_count(),
    'flags': {x: os.environ[x] for x in _FLAGS if os.environ.get(x)},
  }


def record(workdir: pathlib.Path, row: Mapping[str, Any]) -> str:
  """Adds a start to a workdir, in place of those whose steps are lost.

  Args:
    workdir: of the run, held by this process.
    row: of `here`.

  Returns:
    In what it differs from the start before it, where a number may depend on
    that; '': in nothing, or there is none.

  Raises:
    errors.InputError: the file is damaged.
  """
  # One that went on after the same step has left nothing.
  rows = [x for x in read(workdir) if x['step'] < row['step']]
  lines = ''.join(json.dumps(x) + '\n' for x in (*rows, row))
  atomic.write_text(workdir / STARTS, lines)
  return changes(rows[-1], row) if rows else ''


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The starts of a run, in order; none of one of an older version.

  Raises:
    errors.InputError: the file is damaged.
  """
  path, found = workdir / STARTS, []
  for number, row in enumerate(workdir_lib.read(path), 1):
    with untrusted.parsing(
      f'{path} row {number} is not a start', 'take that line out'
    ):
      found.append(untrusted.shaped(_ROW, row))
  return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """What differs between two starts, in words; '': nothing that matters."""
  old, new = _flat(before), _flat(now)
  return ', '.join(
    f'{name} {new.get(name)} for {old.get(name)}'
    for name in dict.fromkeys((*new, *old))
    if new.get(name) != old.get(name)
  )


def text(starts: Iterable[Mapping[str, Any]]) -> str:
  """Devices and jax of the starts of a run, one after another if they differ.

  As in `8 x NVIDIA H100, jax 0.12.0`; '': nothing is recorded.
  """
  return ', then '.join(dict.fromkeys(map(_told, starts)))


def processor() -> str:
  """The processor's name, as exact as the system tells it."""
  try:
    about = pathlib.Path('/proc/cpuinfo').read_text('utf-8')
  except OSError:
    about = ''
  # Of the first of them.
  parts = (line.partition(':') for line in about.split('\n\n')[0].splitlines())
  known = {name.strip(): value.strip() for name, _, value in parts}
  name = known.get('model name')
  if not name:
    return platform.processor() or platform.machine()
  if 'cpu family' not in known:
    return name
  return f'{name} (family {known["cpu family"]}, model {known["model"]})'


def cpus() -> int:
  """How many processors this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _told(row) -> str:
  device = row['processor'] if row['device'] == 'cpu' else row['device']
  number = f'{row["devices"]:,} x ' if row['devices'] > 1 else ''
  return f'{number}{device}, jax {row["packages"].get("jax", "unknown")}'


def _flat(row) -> dict[str, Any]:
  own = {k: v for k, v in row.items() if k not in _WITHOUT_EFFECT}
  return own.pop('packages') | own.pop('flags') | own


def _versions():
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      yield name, importlib.metadata.version(name)


def _code() -> str | None:
  root = pathlib.Path(__file__).parents[1]
  # An installed package may lie in a repository that is not ours.
  if not (root / '.git').exists():
    return None
  try:
    return subprocess.run(
      ['git', '-C', root, 'describe', '--always', '--dirty', '--abbrev=12'],
      check=True, capture_output=True, text=True, timeout=60,
    ).stdout.strip()  # fmt: skip
  except (OSError, subprocess.SubprocessError):
    return None
