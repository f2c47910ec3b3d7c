"""Eight simulated devices, in a process of their own, against one."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import ml_collections
import numpy as np
import pytest

from effllm_jax import checkpoint_writer
from effllm_jax import checkpoints
from effllm_jax import errors
from effllm_jax import sharding
from effllm_jax import steps
from effllm_jax import structure
from effllm_jax import train
from effllm_jax import unembedding
from effllm_jax import workdir as workdir_lib
from experiments.configs import smollm2_135m
from tests import conftest
from tests import fork_server
from tests import runs

MESHES = {
  '8-1-1': ((8, 1, 1), 'xla_loop'),
  '1-8-1': ((1, 8, 1), 'xla'),
  '1-1-8': ((1, 1, 8), 'xla'),
  '2-2-2': ((2, 2, 2), 'xla'),
}
STEPS, SAVED = 7, 5
CFG = conftest.make_config(
  V=512, D=64, N=2, K=8, G=2, H=8, F=128, context=128, tied=True
)

SCRIPT = """
import json, pathlib, sys
from tests import sharding_test
print(json.dumps(sharding_test.in_the_other_process(pathlib.Path(sys.argv[1]))))
"""


def changes_of(root, mesh, kernels='xla'):
  """Overrides of a small run: repair, a shrink, checkpoints."""
  tokens = 8 * 32
  changes = {
    'data.batch_size': 8,
    'train.tokens': STEPS * tokens,
    'budget.target': 70_000.0,
    'prune.begin_tokens': tokens,
    'prune.end_tokens': 4 * tokens,
    'prune.floors.ffn': 16,
    'prune.floors.stem': 32,
    'prune.multiple_of.ffn': 16,
    'prune.multiple_of.stem': 16,
    'optimizer.warmup_tokens': tokens,
    'optimizer.decay_tokens': tokens,
    'prune.calibrate': True,
    'repair.enabled': True,
    'repair.batches': 2,
    'repair.damping': 1.0,
    'shrink.threshold': 0.9,
    'checkpoint.every_steps': SAVED,
    'model.kernels': kernels,
  }
  changes |= {
    f'mesh.{axis}': n for axis, n in zip(sharding.AXES, mesh, strict=True)
  }
  return conftest.small_run(root / 'model', root / 'text', **changes)


def run(root, name, mesh, kernels='xla'):
  """The real loop on a mesh of (data, fsdp, tensor)."""
  config = smollm2_135m.get_config()
  config.update_from_flattened_dict(changes_of(root, mesh, kernels))
  config = ml_collections.FrozenConfigDict(config)
  train.run(config, root / name, root / 'cache')


def rewound(root, name, new):
  """A copy of a run as it was at its checkpoint of step `SAVED`."""
  shutil.copytree(root / name, root / new)
  for moment in checkpoints.moments(root / new):
    if moment.step > SAVED:
      shutil.rmtree(moment.path)
  assert checkpoints.moments(root / new)[0].step == SAVED


@contextlib.contextmanager
def programs_of_steps():
  """What of these steps is lowered within, and then compiled, by name."""
  names = 'train_step', 'repair_step', 'shrink_step'
  made = {name: [] for name in names}

  def followed(name, whole):
    def lower(*arrays, **static):
      lowered = whole.lower(*arrays, **static)

      def compile():
        made[name].append((lowered, lowered.compile()))
        return made[name][-1][1]

      return types.SimpleNamespace(compile=compile)

    # A shrink is called, and compiled by the way.
    step = lambda *arrays, **static: lower(*arrays, **static).compile()(*arrays)
    step.lower = lower
    return step

  with pytest.MonkeyPatch.context() as patch:
    for name in names:
      patch.setattr(steps, name, followed(name, getattr(steps, name)))
    yield made


def digests(made):
  """Of training steps: equal ones are one program for jax's cache of them."""
  return [
    hashlib.sha256(lowered.as_text().encode()).hexdigest()
    for lowered, _ in made['train_step']
  ]


def repaired(mesh):
  """The leaves of a repair whose matrices choose their damping."""
  # Copies, which the step may take.
  params = conftest.copied(conftest.make_params(CFG))
  windows = np.asarray(conftest.make_tokens(CFG, 32)).reshape(4, 8, -1)
  if mesh:
    params = sharding.put(params, sharding.params(params, mesh))
    windows = sharding.put(windows, sharding.batches(mesh))
  return jax.tree.leaves(
    steps.repair_step(
      params, structure.all_alive(CFG), conftest.make_masks(CFG, 9), windows,
      cfg=CFG, damping=0.0, mesh=mesh,
    )
  )  # fmt: skip


def in_the_other_process(root):
  """What the other process does and tells; imports of its own."""
  import collections

  from effllm_jax import optimizers
  from effllm_jax import repair
  from effllm_jax import state as state_lib

  said, made, texts = {}, {}, {}
  # Of a small model too; one device looks at all outputs.
  repair._COLUMNS = (48,)
  tx = optimizers.optimizer(lambda _: 1e-3, 0.9, 0.95, 0.1, 1.0)
  params = jax.tree.map(np.asarray, conftest.make_params(CFG))
  large, most = checkpoint_writer._LARGE, unembedding.MOST_LOGITS
  for name, (sizes, kernels) in MESHES.items():
    # Some arrays are written in pieces, and logits are cut into three blocks,
    # as those of a large model are.
    checkpoint_writer._LARGE = 2**14 if name == '2-2-2' else large
    unembedding.MOST_LOGITS = 6_000 if name == '2-2-2' else most
    with (
      conftest.counted_programs() as programs,
      programs_of_steps() as compiled,
    ):
      run(root, name, sizes, kernels)
    made[name] = digests(compiled)
    texts[name] = {step: x[0][1].as_text() for step, x in compiled.items()}
    gathers = collections.Counter(
      re.findall(r'= f32\[([\d,]*)\]\S* all-gather', texts[name]['train_step'])
    )
    np.savez(root / f'repaired-{name}.npz', *repaired(sharding.make(*sizes)))
    state = state_lib.placed_state(params, CFG, tx, sharding.make(*sizes))
    arrays = jax.tree.leaves((state.params, state.opt_state))
    shard = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    said[name] = {
      'share': shard / sum(x.nbytes for x in arrays),
      'gathers': {x: n for x, n in gathers.items()},
      'programs': dict(programs),
    }
  checkpoint_writer._LARGE = large
  rewound(root, 'one', 'one-then-eight')
  with programs_of_steps() as compiled:
    run(root, 'one-then-eight', (2, 2, 2))
  made['one-then-eight'] = digests(compiled)
  unembedding.MOST_LOGITS = most
  rewound(root, '8-1-1', 'eight-then-two')
  run(root, 'eight-then-two', (1, 2, 1), 'xla_loop')
  return said, made, exchanged_on_eight_devices(texts)


def exchanged(text) -> list[tuple[int, ...]]:
  """Shapes of the float arrays that devices send each other in a program."""
  kinds = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
  # One result, or several together.
  found = re.findall(rf' = (.*) (?:{kinds})(?:-start)?\(', text)
  return [
    tuple(map(int, shape.split(',')))
    for results in found
    for shape in re.findall(r'f32\[([\d,]+)\]', results)
  ]


def exchanged_on_eight_devices(texts):
  """By mesh, what a shrink and a teacher exchange; in the other process.

  Args:
    texts: of the programs of a run, by mesh and step.
  """
  from effllm_jax import model
  from effllm_jax import optimizers
  from effllm_jax import state as state_lib

  tx = optimizers.optimizer(lambda _: 1e-3, 0.9, 0.95, 0.1, 1.0)
  said = {}
  for name, (sizes, _) in MESHES.items():
    mesh = sharding.make(*sizes)
    state = state_lib.abstract_state(CFG, tx, mesh)
    recipe = steps.Recipe(
      compute=model.Compute(mesh=mesh), saliency='taylor1', decay=0.0, b1=0.9,
      b2=0.95, clip=1.0, distill=0.5, temperature=1.0, top_k=4, seed=0,
    )  # fmt: skip
    windows = jax.ShapeDtypeStruct(
      (1, 8, 17), np.int32, sharding=sharding.batches(mesh)
    )
    teach = steps.teach_step.lower(
      state.params, state.prune.masks, windows, cfg=CFG, recipe=recipe
    )
    said[name] = [
      exchanged(texts[name]['shrink_step']),
      exchanged(teach.compile().as_text()),
    ]
  product = rf'f32\[(?:1,)?{CFG.F},{CFG.F}\]\S* (?:dot|custom-call)'
  said['repair'] = [
    [
      (CFG.F, CFG.F) in [x[-2:] for x in exchanged(computation)],
      bool(re.search(product, computation)),
    ]
    for computation in re.split(r'\n(?=\S)', texts['1-8-1']['repair_step'])
  ]
  mesh = sharding.make(1, 8, 1)
  said['rounded'] = {remat: rounded(mesh, remat) for remat in model.REMAT}
  return said


def rounded(mesh, remat):
  """What a bfloat16 model sends, and its gradients.

  Dtype and shape of all that has a place in a loss; how often the compiled
  gradient gathers a matrix as wide as gate and up; the least share, among
  matrices, of a gradient's numbers that are not bfloat16.
  """
  from effllm_jax import model

  compute = model.Compute(dtype='bfloat16', remat=remat, mesh=mesh)
  loss = lambda params, *rest: model.loss(params, *rest, CFG, compute)
  params, masks = conftest.make_params(CFG), structure.all_alive(CFG)
  windows = np.asarray(conftest.make_tokens(CFG, batch=8))
  sent = re.findall(
    r'(\w+)\[([\d,]+)\] = sharding_constraint',
    str(jax.make_jaxpr(loss)(params, masks, windows)),
  )
  params = sharding.put(params, sharding.params(params, mesh))
  gradient = jax.jit(jax.grad(loss)).lower(params, masks, windows).compile()
  gathers = re.findall(
    rf'\[(?:1,)?{CFG.D},{CFG.F}\]\S* all-gather', gradient.as_text()
  )
  layers = gradient(params, masks, windows).layers
  matrices = layers.wq, layers.wo, layers.w_gate, layers.w_up, layers.w_down
  inexact = [
    float((x != x.astype('bfloat16').astype('float32')).mean())
    for x in map(np.asarray, matrices)
  ]
  return sent, len(gathers), min(inexact)


@pytest.fixture(scope='module', name='ran')
def _ran(tmp_path_factory):
  """Folder of all runs, and what the other process says of its arrays.

  Then what devices exchange and, last, the digests of the steps of runs.
  """
  root = tmp_path_factory.mktemp('sharding')
  conftest.write_model_folder(root / 'model', CFG)
  conftest.write_text_folder(root / 'text')
  with programs_of_steps() as alone:
    run(root, 'one', (1, 1, 1))
  (said, made, sent), stderr = conftest.on_eight_devices(SCRIPT, root)
  return root, said, stderr, sent, made | {'one': digests(alone)}


def same(a: pathlib.Path, b: pathlib.Path):
  """Asserts equal masks and shrinks, and numbers equal to float tolerance."""
  rows = [
    [
      r
      for r in workdir_lib.read(x / 'metrics.jsonl')
      if r['kind'] in ('train', 'eval')
    ]
    for x in (a, b)
  ]
  for x, y in zip(*rows, strict=True):
    assert x['step'] == y['step']
    for key in {'loss', 'bits_per_byte', 'grad_norm'} & x.keys():
      assert x[key] == pytest.approx(y[key], rel=1e-4), (x, y)
  removed = [
    [r['removed'] for r in workdir_lib.read(x / 'trace.jsonl')] for x in (a, b)
  ]
  assert removed[0] == removed[1] and len(removed[0]) == 2
  shrinks = [checkpoints.read_events(x) for x in (a, b)]
  assert len(shrinks[0]) == 1
  for x, y in zip(*shrinks, strict=True):
    jax.tree.map(np.testing.assert_array_equal, x.kept, y.kept)
  (params, prune, cfg, _), want = map(checkpoints.restore_params, (a, b))
  assert cfg == want[2]
  conftest.check_close(prune.scores, want[1].scores, 1e-3, 1e-9)
  # Adam's first updates have the size of the rate however small a gradient is.
  conftest.check_close(params, want[0], 1e-3, 2e-4)


@pytest.mark.parametrize('mesh', MESHES)
def test_eight_devices_are_one(ran, mesh):
  """Loss, scores, masks, repair, shrink (invariant 9)."""
  root, *_ = ran
  same(root / mesh, root / 'one')


@pytest.mark.parametrize('name', ['one-then-eight', 'eight-then-two'])
def test_goes_on_on_other_devices(ran, name):
  root, *_ = ran
  same(root / name, root / 'one')


def test_goes_on_on_one_device(ran):
  root, *_, made = ran
  rewound(root, '2-2-2', 'eight-then-one')
  with programs_of_steps() as compiled:
    run(root, 'eight-then-one', (1, 1, 1))
  same(root / 'eight-then-one', root / 'one')
  check_nothing_new(made['one'], digests(compiled))


def test_goes_on_on_eight_devices_without_compiling(ran):
  *_, made = ran
  check_nothing_new(made['2-2-2'], made['one-then-eight'])


def check_nothing_new(before, after):
  """The step after the shrink, of arrays that came from one or from a disk."""
  assert len(set(before)) == 2 and after == before[1:]


@pytest.mark.skipif(
  'EFFLLM_NEWER_PYTHON' not in os.environ,
  reason='EFFLLM_NEWER_PYTHON names no Python with a newer jax',
)
def test_goes_on_under_a_newer_jax(ran):
  """From a checkpoint of this one, as after an upgrade in the middle."""
  root, *_ = ran
  newer = os.environ['EFFLLM_NEWER_PYTHON']
  done = subprocess.run(
    [newer, '-c', 'import jax; print(*jax.__version_info__[:2])'],
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert tuple(map(int, done.stdout.split())) > jax.__version_info__[:2]
  rewound(root, 'one', 'one-then-newer')
  done = subprocess.run(
    [newer, '-m', 'experiments.main', conftest.CONFIG_FILE,
     f'--workdir={root / "one-then-newer"}', f'--cache={root / "cache"}',
     *conftest.flags_of(changes_of(root, (1, 1, 1)))],
    cwd=conftest.ROOT, env=runs.USERS_ENV,
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert f'after step {SAVED}\n' in done.stderr
  assert f' for {jax.__version__}, jaxlib ' in done.stderr
  same(root / 'one-then-newer', root / 'one')


def test_no_device_holds_what_others_do(ran):
  """All but norm scales is in parts, weights and moments alike."""
  _, said, *_ = ran
  assert said['8-1-1']['share'] == 1
  assert said['1-8-1']['share'] == pytest.approx(1 / 8, rel=0.03)
  assert said['1-1-8']['share'] == pytest.approx(1 / 8, rel=0.03)
  assert said['2-2-2']['share'] == pytest.approx(1 / 4, rel=0.03)


def test_no_step_gathers_what_it_need_not(ran):
  """Copies gather nothing; `fsdp` one layer at a time; `tensor` no weights."""
  _, said, *_ = ran
  sizes = {
    mesh: [tuple(map(int, x.split(','))) for x in found['gathers']]
    for mesh, found in said.items()
  }
  assert sizes['8-1-1'] == []
  whole = CFG.D * CFG.F
  # The embedding, and of the layers one.
  large = [x for x in sizes['1-8-1'] if np.prod(x) >= whole]
  assert large and all(x[0] == 1 or x == (CFG.V, CFG.D) for x in large)
  assert all(np.prod(x) < whole // 8 for x in sizes['1-1-8'])
  assert all(np.prod(x) <= CFG.V * CFG.D // 2 for x in sizes['2-2-2'])


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_matrices_of_layers_are_rounded_before_they_are_sent(ran, remat):
  """Their gradients are not; and none is kept for the backward pass."""
  *_, sent, _ = ran
  dtypes, gathers, inexact = sent['rounded'][remat]
  for letters in 'DKGH', 'DKH', 'KGHD', 'DF', 'FD':
    shape = ','.join(map(str, CFG.shape(letters)))
    assert {dtype for dtype, x in dtypes if x == shape} == {'bf16'}, letters
  # Gate and up, forwards and backwards.
  assert gathers == 4
  assert inexact > 0.9


@pytest.mark.parametrize('mesh', MESHES)
def test_a_shrink_exchanges_one_layer_at_a_time(ran, mesh):
  """Not all layers at once, of every weight and both its moments."""
  *_, sent, _ = ran
  shapes, _ = sent[mesh]
  assert bool(shapes) == (mesh != '8-1-1')
  # Norms of all layers are a vector each.
  assert [x for x in shapes if x[0] == CFG.N and len(x) > 2] == []


@pytest.mark.parametrize('mesh', MESHES)
def test_a_teacher_sends_no_logits_of_other_sequences(ran, mesh):
  """Of its own a device needs what others have of the vocabulary."""
  *_, sent, _ = ran
  _, shapes = sent[mesh]
  (data, fsdp, tensor), _ = MESHES[mesh]
  logits = [tuple(x) for x in shapes if len(x) == 3 and x[-1] == CFG.V]
  own = (8 // (data * fsdp), 16, CFG.V)
  assert logits == ([own] if tensor > 1 else [])


@pytest.mark.parametrize('mesh', MESHES)
def test_eight_devices_choose_one_damping(ran, mesh):
  """And fit with it, as one device does."""
  root, *_ = ran
  with np.load(root / f'repaired-{mesh}.npz') as kept:
    got = [kept[name] for name in kept.files]
  want = repaired(None)
  assert len(got) == len(want) > 20
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, 2e-3, 2e-4)


def test_a_repair_exchanges_the_sums_of_all_its_micro_batches(ran):
  """Nothing is sent where the products of a single one are taken."""
  *_, sent, _ = ran
  sends, products = np.array(sent['repair']).T
  assert sends.any() and products.any() and not (sends & products).any()


def test_a_save_compiles_nothing_unless_arrays_are_large(ran):
  _, said, *_ = ran
  cuts = {
    mesh: sum(n for name, n in found['programs'].items() if 'slice' in name)
    for mesh, found in said.items()
  }
  pieces = cuts.pop('2-2-2')
  assert not any(cuts.values()) and pieces, said


def test_says_what_a_mesh_does_not_divide(ran):
  _, _, stderr, *_ = ran
  assert 'mesh: data 1 x fsdp 1 x tensor 8' in stderr
  assert 'whole on every device: heads ' in stderr


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ((0, 1, 1), 'is no shape'),
    ((-1, -1, 1), 'is no shape'),
    ((2, 1, 1), 'needs 2 devices, there are 1; set --config.mesh'),
    ((-1, 4, 1), 'needs 4 devices, there are 1'),
  ],
)
def test_meshes_that_cannot_be(sizes, message):
  with pytest.raises(errors.InputError, match=message):
    sharding.make(*sizes)


@dataclasses.dataclass(eq=False)
class Chip:
  """What jax tells of a device."""

  device_kind: str
  platform: str
  id: int
  process_index: int
  slice_index: int
  coords: tuple[int, ...]
  core_on_chip: int = 0


def chips(kind, side, platform='tpu'):
  """A square torus of hosts of 2 x 2 chips, in the order of jax.devices().

  Of GPUs every host is a slice to jax.
  """
  places = [(x, y) for y in range(side) for x in range(side)]
  host = lambda x, y: (y // 2) * (side // 2) + x // 2
  places.sort(key=lambda place: host(*place))
  return [
    Chip(
      kind,
      platform,
      y * side + x if platform == 'tpu' else i,
      host(x, y),
      0 if platform == 'tpu' else host(x, y),
      (x, y, 0),
    )
    for i, (x, y) in enumerate(places)
  ]


@pytest.mark.parametrize(
  'sizes',
  [(8, 8, 1), (64, 1, 1), (1, 64, 1), (2, 32, 1), (16, 4, 1), (4, 4, 4),
   (8, 4, 2), (2, 2, 16)],
)  # fmt: skip
@pytest.mark.parametrize(
  ('kind', 'platform'),
  [('TPU v5 lite', 'tpu'), ('TPU v6 lite', 'tpu'), ('H100', 'gpu')],
)
def test_any_mesh_over_a_pod_deals_all_parts_out(
  monkeypatch, kind, platform, sizes
):
  """Neighbours on a torus are no neighbours in a batch; hosts are no slices."""
  monkeypatch.setattr(jax, 'devices', lambda: chips(kind, 8, platform))
  monkeypatch.setattr(jax, 'process_count', lambda: 16)
  mesh = sharding.make(*sizes)
  by_index, counts = {}, set()
  for process in range(16):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    index, count = sharding.reader(mesh)
    own = [
      i
      for i, row in enumerate(mesh.devices.reshape(-1, sizes[2]))
      if any(chip.process_index == process for chip in row)
    ]
    # Who reads the same holds the same.
    assert by_index.setdefault(index, own) == own
    counts.add(count)
  assert counts == {len(by_index)} and sorted(by_index) == [*range(*counts)]
  dealt = sorted(i for own in by_index.values() for i in own)
  assert dealt == [*range(sizes[0] * sizes[1])]


def test_shares_that_overlap_are_refused(monkeypatch):
  devices = np.array(chips('TPU v5 lite', 4)[:4]).reshape(2, 1, 2)
  devices[1, 0, 1].process_index = 1
  mesh = sharding.Mesh(devices, sharding.AXES)
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  with pytest.raises(errors.InputError, match=r'parts \[1\] of a batch.*; set'):
    sharding.reader(mesh)


def test_devices_that_no_mesh_fits_are_refused(monkeypatch):
  """Half of a square is none."""
  monkeypatch.setattr(jax, 'devices', lambda: chips('TPU v6 lite', 4))
  with pytest.raises(errors.InputError, match=r'cannot be laid over .*; set'):
    sharding.make(3, 1, 1)


# Two processes of two devices each; the mesh takes them in turns.
ALTERNATING = """
import json, sys
import jax
import numpy as np
from effllm_jax import sharding

jax.distributed.initialize(
  sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=60
)
order = np.array(jax.devices())[[0, 2, 1, 3]].reshape(2, 2, 1)
mesh = sharding.Mesh(order, sharding.AXES)
index, count = sharding.reader(mesh)
# As data.train_iterator deals them out: 2 micro-batches of 8 rows.
rows = np.arange(16)[index::count, None]
whole = sharding.put_batch(rows, 2, mesh)
assert whole.shape == (2, 8, 1)
print(json.dumps([
  [shard.index[1].start, shard.data[..., 0].tolist()]
  for shard in whole.addressable_shards
]))
"""


def test_a_process_fills_the_parts_that_it_holds():
  """Neighbours or not; a micro-batch has the rows that one process reads."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2'
  running = [
    subprocess.Popen(
      [sys.executable, '-c', ALTERNATING, address, str(i)],
      cwd=conftest.ROOT, env=os.environ | {'XLA_FLAGS': flags},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    said = [process.communicate(timeout=240) for process in running]
  finally:
    for process in running:
      process.kill()
  assert [x.returncode for x in running] == [0, 0], said
  shards = [json.loads(out.splitlines()[-1]) for out, _ in said]
  assert [[start for start, _ in own] for own in shards] == [[0, 4], [2, 6]]
  micro_batches = np.concatenate([x for own in shards for _, x in own], 1)
  assert np.sort(micro_batches).tolist() == np.arange(16).reshape(2, 8).tolist()


def test_rules_by_letters():
  mesh = jax.sharding.AbstractMesh((2, 4, 2), sharding.AXES)
  at = lambda letters, *shape: tuple(
    sharding.spec(letters, shape, mesh, sharding.AT_REST)
  )
  assert at('NDKGH', 3, 8, 2, 1, 4) == (None, 'fsdp', 'tensor', None, None)
  assert at('NDKGH', 3, 8, 3, 1, 4) == (None, 'fsdp', None, None, None)
  assert at('NDF', 3, 6, 10) == (None, None, 'tensor')
  assert at('ND', 3, 8) == ()
  in_use = sharding.spec('NDF', (3, 8, 10), mesh, sharding.IN_USE)
  assert tuple(in_use) == (None, None, 'tensor')
  cfg = conftest.make_config(D=6, K=2, F=9, V=61)
  assert sharding.undivided(cfg, mesh) == [
    'ffn 9 (over tensor 2)',
    'stem 6 (over fsdp 4)',
    'vocabulary 61 (over tensor 2)',
  ]


@pytest.fixture(scope='module', name='processes')
def _processes(ran):
  """Two processes of one device each, as Slurm would start them."""
  root, *_ = ran
  servers = [
    fork_server.Server(
      os.environ
      | {
        # Which also names the port where they meet.
        'SLURM_JOB_ID': str(os.getpid()),
        'SLURM_STEP_NODELIST': 'localhost',
        'SLURM_NTASKS': '2',
        'SLURM_PROCID': str(i),
        'SLURM_LOCALID': str(i),
      },
      conftest.ROOT,
    )
    for i in range(2)
  ]

  def start(name):
    flags = [
      conftest.CONFIG_FILE,
      '--distributed',
      f'--workdir={root / name}',
      f'--cache={root / "cache"}',
      *conftest.flags_of(changes_of(root, (-1, 1, 1))),
    ]
    return [server.start('main', flags) for server in servers]

  yield root, start
  for server in servers:
    server.close()


def finished(running):
  """What each process of a run says; all of them have to succeed."""
  done = [process.wait() for process in running]
  assert not any(x.returncode for x in done), [x.stderr for x in done]
  return [x.stderr for x in done]


def test_two_processes_are_one(processes):
  """Each reads its part of every batch; the first alone writes and speaks.

  And both stop after the same step, though only one of them is asked to, long
  before the last: the first prune is compiled then.
  """
  root, start = processes
  running = start('two')
  while runs.reached(root / 'two') < 1:
    assert running[0].alive(), running[0].wait()
    time.sleep(0.01)
  os.kill(running[1].pid, signal.SIGTERM)
  stopped = [process.wait() for process in running]
  said = [x.stderr for x in stopped]
  assert [x.returncode for x in stopped] == [143, 143], said
  steps_done = [re.search(r'stopped after step (\d+);', x)[1] for x in said]
  moment = checkpoints.moments(root / 'two')[0]
  assert steps_done == [str(moment.step)] * 2
  assert 'mesh: data 2 x fsdp 1 x tensor 1' in said[0]
  first, second = finished(start('two'))
  same(root / 'two', root / 'one')
  assert 'held out' in first and 'held out' not in second


def test_goes_on_with_other_processes(processes):
  """One process after two, and two after one."""
  root, start = processes
  rewound(root, 'two', 'two-then-one')
  run(root, 'two-then-one', (1, 1, 1))
  same(root / 'two-then-one', root / 'one')
  rewound(root, 'one', 'one-then-two')
  finished(start('one-then-two'))
  same(root / 'one-then-two', root / 'one')


def test_tells_in_what_dtype_layers_are_gathered():
  """As XLA writes it for a TPU, and for a GPU several together."""
  from experiments import aot_slice
  from experiments import bench_setup

  tpu = (
    '  %a = bf16[1,2048,8192]{2,1,0:T(8,128)} all-gather(%b), dimensions={1}'
  )
  gpu = (
    '  %s = ((f32[256,32,64], bf16[256,8192]), (f32[2048,32,64], '
    'bf16[2048,8192])) all-gather-start(%x, %y)'
  )
  others = """
    %n = f32[24,2048]{1,0} all-gather(%v)
    %e = f32[49152,2048]{1,0} all-gather(%embed)
    %r = f32[2048,8192]{1,0} all-reduce(%g)
  """
  cfg = bench_setup.SHAPES['1.7b']
  gathered = lambda text: aot_slice.gathered(text, cfg)
  assert gathered(others + tpu) == {'bf16'}
  assert gathered(others + gpu) == {'bf16', 'f32'}
  assert gathered(others) == set()
