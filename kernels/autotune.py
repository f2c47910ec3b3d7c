"""Times the candidate blocks of a kernel on this device and keeps the best.

A choice is one row of a JSON file: device, implementation, form, sizes, dtype,
blocks. `use` makes a file's rows for this device known to `choice`, which the
ops ask when they are traced; without one the default blocks hold. Blocks change
the order in which float32 sums are formed, so a run keeps its file.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from effllm_jax.kernels import forms

# Rounds of timing; the least of them counts, since noise only adds.
_ROUNDS = 5
# Live shares of the masked axis. No block ends at all of them: at half or three
# quarters of most axes long blocks waste nothing, and look as good as others.
_SHARES = (0.3, 0.55, 0.8)
# Seconds of calls to wait for at once on an accelerator.
_IN_FLIGHT = 0.02
# Seconds that a call lasts at least, by repeating its product. An empty call
# takes 17 us, and an H100 does a product of SmolLM2-135M in 1 to 5.
_CALL = 0.005
_KEY = ('device', 'implementation', 'form', 'm', 'n', 'k', 'dtype')
# Longest axis of a row: candidates are looked for up to it.
_LONGEST = 2**22
# The implementations that have blocks.
_TUNED = (
  'xla_loop', 'bucket', 'pallas_tpu', 'pallas_hopper', 'pallas_tpu_attention',
  'pallas_hopper_attention',
)  # fmt: skip
# What `use` has read: key -> blocks.
_choices: dict[tuple, Any] = {}


def tune(
  implementation: str,
  form: str,
  m: int,
  n: int,
  k: int,
  dtype: jax.typing.DTypeLike,
  masked: str,
  timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Any]:
  """The row of the fastest candidate, over several live shares of an axis.

  Args:
    implementation: one that has `candidates`.
    form: one of `forms.FORMS`.
    m, n, k: sizes of the arrays.
    dtype: of the operands.
    masked: the axis that is masked: 'm', 'n' or 'k'.
    timer: seconds that a call of one product takes; None: the least of five
      `seconds` of a call that is long `enough`, for each of its products.

  Returns:
    A row for `store`; `seconds` is the mean over the shares.

  Raises:
    ValueError: no candidate runs here.
  """
  module = forms.module(implementation)
  size = {'m': m, 'n': n, 'k': k}
  left, right = forms.AXES[form]
  operands = [
    jax.random.normal(jax.random.key(i), [size[x] for x in letters], dtype)
    for i, letters in enumerate((left, right))
  ]
  out = forms.result_dtype(form, dtype)

  def run(blocks, a, b, extent):
    some = forms.Extents(**size | {masked: extent})
    return module.product(a, b, form, some, out, blocks)

  key = _key(implementation, form, m, n, k, dtype)
  return _fastest(key, run, operands, size[masked], timer)


def tune_attention(
  implementation: str,
  form: str,
  shape: tuple[int, int, int, int, int],
  dtype: jax.typing.DTypeLike,
  timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, Any]:
  """The row of the fastest candidate for one kernel of attention; see `tune`.

  A gradient is timed with what comes before it, by the other kernels' defaults.

  Args:
    implementation: a module that has `causal`.
    form: one of `forms.ATTENTION`.
    shape: sequences B, tokens T, key/value heads K, query heads to each G,
      channels H. A choice holds for all B, K and G.
    dtype: of the operands.
    timer: see `tune`.

  Raises:
    ValueError: no candidate runs here.
  """
  module = forms.module(implementation)
  B, T, K, G, H = shape
  operands = [
    jax.random.normal(jax.random.key(i), (B, T, heads, H), dtype)
    for i, heads in enumerate((K * G, K, K, K * G))
  ]

  def run(blocks, q, k, v, dout, live):
    chosen = [blocks if x == form else None for x in forms.ATTENTION]
    causal = lambda *arrays: module.causal(*arrays, live, chosen)
    if form == 'forward':
      return causal(q, k, v)
    dq, *dkv = jax.vjp(causal, q, k, v)[1](dout)
    # XLA leaves out the kernel whose result nobody reads.
    return dq if form == 'dq' else dkv

  key = _key(implementation, form, T, T, H, dtype)
  return _fastest(key, run, operands, K, timer)


def _fastest(key, run, operands, size, timer):
  """The row of a key for the blocks of the least mean over the live shares.

  Args:
    key: see `_key`.
    run: (blocks, *operands, extent) -> arrays.
    operands: whole arrays.
    size: the whole of what the extent is of.
    timer: see `tune`.
  """
  extents = [jnp.int32(max(round(size * share), 1)) for share in _SHARES]
  found, failures = {}, []
  for blocks in _candidates(key):
    one = functools.partial(run, blocks)
    try:
      many, times = (
        (repeated(one, 1), 1) if timer else enough(one, *operands, extents[0])
      )
      calls = [functools.partial(many, *operands, x) for x in extents]
      jax.block_until_ready(calls[0]())
    except (ValueError, jax.errors.JaxRuntimeError) as e:
      failures.append(f'{blocks}: {e}')
      continue
    found[blocks] = statistics.fmean(map(timer or _least, calls)) / times
  if not found:
    _, implementation, form, m, n, k, _ = key
    raise ValueError(
      f'no blocks of {implementation} run {form} of m, n, k = {m}, {n}, {k} '
      f'here; the first fails with {failures[:1]}'
    )
  best = min(found, key=found.get)
  return dict(zip(_KEY, key, strict=True)) | {
    'blocks': dataclasses.asdict(best),
    'seconds': found[best],
  }


def _candidates(key):
  """Of one product or kernel; see `_key`."""
  _, implementation, *rest = key
  return forms.module(implementation).candidates(*rest)


def repeated(product: Callable[..., Any], times: int) -> Callable[..., Any]:
  """`product` of the same operands over and over, in one jitted call.

  Each is computed anew, in a loop of a fixed length that no start from Python
  and no wait interrupts. What the loop takes for itself counts too: on a GPU
  the launches, and a kernel that adds one to its counter. A turn of several
  products would share that, but XLA drops all of them but the last.

  Args:
    product: traceable; of arrays, to a tree of arrays.
    times: 1 or more.

  Returns:
    A jitted function of the operands of `product`, with its result.
  """

  def again(_, carry):
    # For all that XLA can tell, operands depend on the result before: no
    # product can be moved out of the loop, and no two are one.
    *operands, last = jax.lax.optimization_barrier(carry)
    del last
    return *operands, product(*operands)

  @jax.jit
  def run(*operands):
    shapes = jax.eval_shape(product, *operands)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry = *operands, zeros
    return jax.lax.fori_loop(0, times, again, carry)[-1]

  return run


def enough(
  product: Callable[..., Any], *operands: jax.Array
) -> tuple[Callable[..., Any], int]:
  """A product `repeated` until a call lasts 5 ms, and how many times that is.

  A power of two: 1 of a product that lasts by itself, as in a simulator.
  """
  times = 1
  while True:
    many = repeated(product, times)
    call = functools.partial(many, *operands)
    jax.block_until_ready(call())
    # Of three: one may be held up.
    if (spent := min(seconds(call) for _ in range(3))) >= _CALL:
      return many, times
    # Each length is compiled, so several doublings at once where much is short.
    times *= 2 ** max(1, math.floor(math.log2(_CALL / spent)))


def seconds(call: Callable[[], Any]) -> float:
  """Seconds of a call; on an accelerator without its start and its wait."""

  def run(calls):
    start = time.perf_counter()
    for _ in range(calls):
      result = call()
    jax.block_until_ready(result)
    return time.perf_counter() - start

  if jax.default_backend() == 'cpu':
    return run(1)
  calls = 1
  while (spent := run(calls)) < _IN_FLIGHT:
    calls *= 2
  return spent / calls


def store(path: str | os.PathLike, rows: list[dict[str, Any]]) -> None:
  """Adds rows to a file, atomically, in place of those for the same product.

  Raises:
    ValueError: the file is none of ours.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='.blocks-') as made:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      # Others may add theirs to what is there by now. Some disks have no locks.
      with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_EX)
      old = _parse(path) if path.exists() else []
      kept = {tuple(row[x] for x in _KEY): row for row in [*old, *rows]}
      partial = pathlib.Path(made, path.name)
      text = json.dumps([*kept.values()], indent=1) + '\n'
      partial.write_text(text, encoding='utf-8')
      partial.replace(path)
    finally:
      os.close(folder)


def use(path: str | os.PathLike | None) -> int:
  """Forgets all choices, takes those of a file for this device; how many.

  Args:
    path: a file of `store`; None: the default blocks, for everything.

  Raises:
    ValueError: the file is none of ours.
    OSError: it cannot be read.
  """
  _choices.clear()
  if path is None:
    return 0
  found = {}
  for row in _parse(pathlib.Path(path).expanduser()):
    if row['device'] == jax.devices()[0].device_kind:
      try:
        found[tuple(row[x] for x in _KEY)] = _blocks(row)
      except (TypeError, ValueError) as e:
        raise ValueError(f'{path} is no use here ({e}); delete it') from e
  _choices.update(found)
  return len(_choices)


def choice(
  implementation: str,
  form: str,
  m: int,
  n: int,
  k: int,
  dtype: jax.typing.DTypeLike,
) -> Any | None:
  """The blocks to use here; None: nothing was timed."""
  return _choices.get(_key(implementation, form, m, n, k, dtype))


def _key(implementation, form, m, n, k, dtype) -> tuple:
  device = jax.devices()[0].device_kind
  return device, implementation, form, m, n, k, jnp.dtype(dtype).name


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
  # A pipe would block.
  if path.exists() and not path.is_file():
    raise ValueError(f'{path} is not a file of tuned blocks')
  try:
    rows = json.loads(path.read_text(encoding='utf-8'))
    for row in rows:
      for name in _KEY:
        if type(row[name]) is not (int if name in ('m', 'n', 'k') else str):
          raise TypeError(name)
      dict(**row['blocks'])
  except (KeyError, RecursionError, TypeError, ValueError) as e:
    raise ValueError(f'{path} is not a file of tuned blocks; delete it') from e
  return rows


def _blocks(row):
  """The blocks in a row; a ValueError where they are none of its product."""
  # Nothing is imported that only a file names.
  if row['implementation'] not in _TUNED:
    raise ValueError(f'no blocks of {row["implementation"]}')
  if not all(0 < row[x] <= _LONGEST for x in ('m', 'n', 'k')):
    raise ValueError(f'no product has sizes {[row[x] for x in "mnk"]}')
  module = forms.module(row['implementation'])
  blocks = module.Blocks(**row['blocks'])
  known = _candidates([row[x] for x in _KEY])
  if blocks not in known:
    raise ValueError(f'{blocks} of a product that cannot be cut so')
  # Equal, and with lengths of the right type: JSON may say 128.0.
  return known[known.index(blocks)]


def _least(call: Callable[[], Any]) -> float:
  return min(seconds(call) for _ in range(_ROUNDS))
