"""Where arrays live: a mesh of devices, and specs from the axis letters.

The mesh has three axes. The batch is split over `data` and `fsdp`; parameters
and the optimizer's moments over `fsdp` along the stem, and over `tensor` along
heads, feed-forward channels and vocabulary. A layer whose turn it is gathers
its weights over `fsdp`, one layer at a time inside the scan; over `tensor` they
stay apart, and activations are summed instead. Masks, scores and what selection
makes of them are a few kilobytes and the same everywhere.

Two tables of letters say all of that. An axis that a mesh does not divide (9
heads over 2 devices, a width after a shrink) is kept whole on every device:
`undivided` names them.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from effllm_jax import errors
from effllm_jax import structure

Array = jax.Array
Mesh = jax.sharding.Mesh

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')
# Axis letter -> axis of the mesh: of activations, and of the weights of a layer
# while they are multiplied; and of parameters and moments between that.
IN_USE = {'B': BATCH, 'K': 'tensor', 'F': 'tensor', 'V': 'tensor'}
AT_REST = IN_USE | {'D': 'fsdp'}


def make(data: int, fsdp: int, tensor: int) -> Mesh:
  """The mesh of a run over the devices of all processes.

  Args:
    data, fsdp, tensor: devices along each axis; one may be -1, for all that
      are left.

  Raises:
    errors.InputError: the sizes do not fit the devices, or how they are wired.
  """
  shape, devices = [data, fsdp, tensor], jax.devices()
  asked = f'data {data} x fsdp {fsdp} x tensor {tensor}'
  known = math.prod(n for n in shape if n != -1)
  if any(n < 1 and n != -1 for n in shape) or shape.count(-1) > 1:
    raise errors.InputError(
      f'mesh {asked} is no shape: sizes are at least 1, and one may be -1; set '
      '--config.mesh'
    )
  shape = [len(devices) // known if n == -1 else n for n in shape]
  used = math.prod(shape)
  if not 0 < used <= len(devices):
    raise errors.InputError(
      f'mesh {asked} needs {max(used, known)} devices, there are '
      f'{len(devices)}; set --config.mesh'
    )
  if used < len(devices) and jax.process_count() > 1:
    raise errors.InputError(
      f'mesh {asked} leaves {len(devices) - used} of {len(devices)} devices '
      'out, and each process needs its own; set --config.mesh'
    )
  try:
    # Not jax.make_mesh, which splits a ring of a TPU over two axes on one kind
    # alone, and refuses GPUs of several hosts.
    placed = mesh_utils.create_device_mesh(
      shape, devices[:used], allow_split_physical_axes=True
    )
  except (AssertionError, NotImplementedError, ValueError) as e:
    reason = ' '.join(str(e).split())[:200] or type(e).__name__
    raise errors.InputError(
      f'mesh {asked} cannot be laid over these {used} devices ({reason}); set '
      '--config.mesh, or take TPUs of one slice'
    ) from e
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return Mesh(placed, AXES, axis_types=types)


def batch_parts(mesh: Mesh) -> int:
  """Number of parts that a batch is split into."""
  return math.prod(mesh.shape[name] for name in BATCH)


def reader(mesh: Mesh) -> tuple[int, int]:
  """Which share of a batch this process reads, and how many shares there are.

  A share is what the devices of a process hold: parts that need not be
  neighbours, as a mesh follows the wires of its devices. Processes whose
  devices differ along `tensor` only read the same share.

  Raises:
    errors.InputError: the processes' shares differ in size, or overlap.
  """
  parts = {}
  ids = np.arange(batch_parts(mesh)).repeat(mesh.shape['tensor'])
  for i, device in zip(ids, mesh.devices.flat, strict=True):
    parts.setdefault(device.process_index, set()).add(int(i))
  mine = sorted(parts[jax.process_index()])
  shares = sorted({tuple(sorted(share)) for share in parts.values()})
  # All parts are in some share: of one size they are disjoint if they make up
  # the whole.
  sizes = [len(share) for share in shares]
  if len({*sizes}) > 1 or sum(sizes) > batch_parts(mesh):
    raise errors.InputError(
      f'mesh {dict(mesh.shape)} gives process {jax.process_index()} parts '
      f'{mine} of a batch, and others some of them, or more or less; set '
      '--config.mesh'
    )
  return shares.index(tuple(mine)), len(shares)


def spec(
  letters: str, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, Any]
) -> PartitionSpec:
  """How an array with these axes lies on the mesh.

  Vectors are whole everywhere: they are too small to be worth a message.
  """
  if letters in ('D', 'ND', 'NH'):
    return PartitionSpec()
  parts = [rules.get(letter) for letter in letters]
  return PartitionSpec(
    *(
      part if part and _splits(part, size, mesh) else None
      for part, size in zip(parts, shape, strict=True)
    )
  )


def _splits(part, size, mesh) -> bool:
  names = (part,) if isinstance(part, str) else part
  devices = math.prod(mesh.shape[name] for name in names)
  # One device splits nothing, and XLA does not name it in what it returns: with
  # two names for one place a step would be compiled for each.
  return devices > 1 and size % devices == 0


def part_shape(
  letters: str, shape: tuple[int, ...], mesh: Mesh | None
) -> tuple[int, ...]:
  """What one device holds of an activation with these axes."""
  if mesh is None:
    return shape
  lies = NamedSharding(mesh, spec(letters, shape, mesh, IN_USE))
  return lies.shard_shape(shape)


def undivided(cfg: structure.ModelConfig, mesh: Mesh) -> list[str]:
  """What a mesh does not divide and every device holds whole, in words."""
  names = structure.PRUNABLE | {'V': 'vocabulary'}
  return [
    f'{name} {getattr(cfg, letter)} (over {AT_REST[letter]} '
    f'{mesh.shape[AT_REST[letter]]})'
    for letter, name in names.items()
    if getattr(cfg, letter) % mesh.shape[AT_REST[letter]]
  ]


def wait(name: str) -> None:
  """Returns when every process has come here; `name` is for error messages."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def of_the_first(number: int) -> int:
  """What the first process says, once every process has come here."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batches(mesh: Mesh) -> NamedSharding:
  """Micro-batches [A, B, ...], each split over the mesh."""
  return NamedSharding(mesh, PartitionSpec(None, BATCH))


def params(like: structure.Params, mesh: Mesh) -> structure.Params:
  """The sharding at rest of every parameter of a tree of arrays or shapes."""
  return structure.map_axes(
    lambda letters, x: NamedSharding(
      mesh, spec(letters, x.shape, mesh, AT_REST)
    ),
    like,
  )


def constrain(
  x: Array, letters: str, mesh: Mesh | None, rules: Mapping[str, Any] = IN_USE
) -> Array:
  """Tells the compiler where an activation or a weight in use lives."""
  if mesh is None or mesh.size == 1:
    return x
  sharding = NamedSharding(mesh, spec(letters, x.shape, mesh, rules))
  return jax.lax.with_sharding_constraint(x, sharding)


def constrain_params(
  tree: structure.Params, mesh: Mesh | None
) -> structure.Params:
  """A parameter-shaped tree at rest, told to the compiler."""
  return structure.map_axes(
    lambda letters, x: constrain(x, letters, mesh, AT_REST), tree
  )


def gathered(
  layers: structure.Layers, dtype: jnp.dtype, mesh: Mesh | None
) -> structure.Layers:
  """The weights of one layer, without N, as its products read them.

  Matrices travel in `dtype`, of which bfloat16 is half the bytes. Left to
  itself, XLA sends one in float32 wherever two products read it, as in the
  backward pass on a GPU.

  Args:
    layers: float32.
    dtype: that products read matrices in.
    mesh: of the devices.

  Returns:
    Float32, matrices rounded to `dtype`. Their gradients are float32, and so
    is the sum of these over the devices.
  """
  if mesh is None or mesh.size == 1:
    return layers
  table = structure.axes_of(
    structure.Params(embed=None, layers=layers, final_norm=None)
  ).layers

  def leaf(letters, x):
    inside = letters.removeprefix('N')
    # Norm scales and biases are multiplied and added in float32.
    if x.dtype == dtype or not structure.is_matrix(letters):
      return constrain(x, inside, mesh)
    return _sent(x, inside, dtype, mesh)

  return jax.tree.map(leaf, table, layers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _sent(x, letters, dtype, mesh):
  """A matrix rounded to `dtype`, gathered, and widened; differentiated as x."""
  # Where it lies is said twice, so that it is rounded before it travels.
  narrow = constrain(x.astype(dtype), letters, mesh, AT_REST)
  return constrain(narrow, letters, mesh).astype(x.dtype)


_sent.defvjp(
  lambda x, *how: (_sent(x, *how), None),
  lambda letters, _, mesh, kept, dx: (constrain(dx, letters, mesh),),
)


def over_batch(op: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
  """op(x, *args, **kwargs) on every device's part of the batch x by itself.

  The rest of the arguments is whole on every device, and their gradients are
  summed. All results have the batch in front.
  """
  if mesh is None or mesh.size == 1:
    return op

  def split(x, *args, **kwargs):
    return jax.shard_map(
      lambda x, args, kwargs: op(x, *args, **kwargs),
      mesh=mesh,
      in_specs=(PartitionSpec(BATCH), PartitionSpec(), PartitionSpec()),
      out_specs=PartitionSpec(BATCH),
      # Kernels say nothing of what varies over the mesh.
      check_vma=False,
    )(x, args, kwargs)

  return split


def summed_over_batch(
  op: Callable[..., Any], mesh: Mesh | None
) -> Callable[..., Any]:
  """op(tree, *args) on every part of the batch, summed over them once.

  The leaves of `tree` have the batch in front, and so has the first of the two
  trees that `op` returns; the second one is summed. How `args` lie over
  `tensor` is the compiler's, as outside.
  """
  if mesh is None or batch_parts(mesh) == 1:
    return op

  def split(tree, *args):
    def part(tree, args):
      rows, total = op(tree, *args)
      return rows, jax.lax.psum(total, BATCH)

    return jax.shard_map(
      part,
      mesh=mesh,
      in_specs=(PartitionSpec(BATCH), PartitionSpec()),
      out_specs=(PartitionSpec(BATCH), PartitionSpec()),
      axis_names={*BATCH},
      check_vma=False,
    )(tree, args)

  return split


def put_rows(rows: np.ndarray, mesh: Mesh | None) -> np.ndarray | Array:
  """Rows that every process has, split over the mesh like a batch."""
  if mesh is None:
    return rows
  return put(rows, NamedSharding(mesh, PartitionSpec(BATCH)))


def put(tree: Any, shardings: Any) -> Any:
  """Arrays of the host, the same in every process, as shards on the devices.

  Each device gets its own part; the whole is never on one.
  """

  def leaf(x, sharding):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  return jax.tree.map(leaf, tree, shardings)


def put_batch(rows: np.ndarray, accumulate: int, mesh: Mesh) -> Array:
  """This process's rows of a batch as its part of the global one.

  Args:
    rows: [accumulate * b, T] of this process: its share, as `reader` says.
    accumulate: number of micro-batches A.
    mesh: of the run.

  Returns:
    [A, B, T], where B is b of every process together, split over the mesh.
  """
  rows = rows.reshape(accumulate, -1, rows.shape[-1])
  # The first rows of a micro-batch into the first of its parts that this
  # process holds, and so on; which of them are neighbours makes no difference.
  return jax.make_array_from_process_local_data(batches(mesh), rows)
