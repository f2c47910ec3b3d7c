"""Attention on Hopper: run by Pallas' simulator, lowered on any machine."""

import functools
import json
import math
import pathlib
import re
import types

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import kernels
from effllm_jax.kernels import forms
from effllm_jax.kernels import pallas_hopper
from effllm_jax.kernels import pallas_hopper_attention as attention
from tests import causal
from tests import conftest

K, G, H = 2, 2, 64
# Three blocks, the last not full: forward a warpgroup meets tiles with and
# without a mask, and leaves one to the other.
T = 300
BLOCK = 128
# Width of a head, dtype, rows of tiles: as wide as it takes, one that is filled
# up, and the shorter tiles.
OTHERS = {
  '128': (128, 'float16', None),
  '40': (40, 'bfloat16', None),
  'short': (64, 'bfloat16', 64),
}

SCRIPT = """
import pathlib, sys
from tests import pallas_hopper_attention_test
pallas_hopper_attention_test.in_the_other_process(pathlib.Path(sys.argv[1]))
"""


def draw(T=T, K=K, G=G, H=H, dtype='bfloat16'):
  return causal.draw(T, K, G, H, dtype=dtype)


def in_the_other_process(path: pathlib.Path) -> None:
  """Runs all that is simulated; races are looked for."""
  # Every ring comes round.
  attention._MOST_STAGES = 2
  how = plgpu.InterpretGPUParams(detect_races=True)
  traces, arrays = [], {}
  run = functools.partial(attention.causal, interpret=how)
  both_ways = causal.both_ways(run, traces)

  def keep(name, results):
    for i, x in enumerate(results):
      arrays[f'{name} {i}'] = np.asarray(x, np.float32)
    return {'dtypes': sorted({str(x.dtype) for x in results})}

  said = {}
  # The first run of the simulator changes what jax keys its caches by.
  both_ways(*draw(1), 0)
  traces.clear()
  for live in range(K + 1):
    # NaN in dead heads.
    drawn = [x.at[:, :, live * x.shape[2] // K :].set(jnp.nan) for x in draw()]
    said[f'{live}'] = keep(f'{live}', both_ways(*drawn, live))
  said['traces'] = len(traces)
  cut = [x[:, :, : x.shape[2] // K] for x in draw()]
  keep('cut', both_ways(*cut, 1))
  for name, (size, dtype, tile) in OTHERS.items():
    drawn = draw(BLOCK + 1, 1, 1, size, dtype)
    blocks = [tile and attention.Blocks(tile)] * 3
    some = causal.both_ways(functools.partial(run, blocks=blocks))
    said[name] = keep(name, some(*drawn, 1))
  q, k, v, dout = draw(2 * BLOCK, 1, 1)
  keep('plain', both_ways(q, k, v, dout, 1))
  k_late, v_late = (x.at[:, BLOCK:].set(jnp.nan) for x in (k, v))
  keep('late', both_ways(q, k_late, v_late, dout, 1))
  q_early, dout_early = (x.at[:, :BLOCK].set(jnp.nan) for x in (q, dout))
  keep('early', both_ways(q_early, k, v, dout_early, 1))
  attention.causal = run
  pallas_hopper.product = functools.partial(
    pallas_hopper.product, interpret=how
  )
  for name in ('pallas_hopper', 'xla'):
    keep(name, block(name))
  # Last: there is no way back from an error inside the simulator.
  plgpu.commit_smem = lambda: None
  try:
    causal.both_ways(run)(q, k, v, dout, 1)
  except jax.errors.JaxRuntimeError as error:
    said['forgotten fence'] = str(error)
  np.savez(path, **arrays)
  print(json.dumps(said))


def block(implementation):
  """The result of a whole attention block, and its gradients; a head is dead.

  In float32 weights and bfloat16 activations, as in training.
  """
  rng = np.random.default_rng(0)
  width, tokens = 64, 128
  shapes = (width, K, 1, H), (width, K, H), (width, K, H), (K, 1, H, width)
  weights = [
    jnp.asarray(rng.standard_normal(x) / 8, np.float32) for x in shapes
  ]
  x = jnp.asarray(rng.standard_normal((1, tokens, width)), jnp.bfloat16)
  angles = np.arange(tokens)[:, None] / 100 ** (np.arange(H // 2) * 2 / H)
  cos_sin = jnp.asarray([np.cos(angles), np.sin(angles)], np.float32)
  keep = jnp.arange(K) < 1

  @jax.jit
  def run(x, *weights):
    return kernels.masked_attention(
      x, *weights, keep, cos_sin, implementation=implementation
    )

  y, pull = jax.vjp(run, x, *weights)
  return y, *pull(y)


@pytest.fixture(scope='module', name='simulated')
def _simulated(place):
  """What the other process has found: name -> arrays, and what it said.

  Its XLA has a thread for each of eight devices. With one for each core a
  warpgroup may wait for ever for another that is given none.
  """
  if not hasattr(plgpu, 'InterpretGPUParams'):
    pytest.skip('no simulator of Hopper in this jax (0.11.2 has one)')
  path = place / 'simulated.npz'
  said, _ = conftest.on_eight_devices(SCRIPT, path)
  found = {}
  for name, x in np.load(path).items():
    found.setdefault(name.rsplit(' ', 1)[0], []).append(x)
  return types.SimpleNamespace(said=said, found=found)


@pytest.mark.parametrize('live', range(K + 1))
def test_value_and_gradient_against_float64(simulated, live):
  """The dead are exactly zero; nothing comes of a NaN in them."""
  wants = causal.exact(*draw(), live)
  assert simulated.said[f'{live}'] == {'dtypes': ['bfloat16']}
  for x, want in zip(simulated.found[f'{live}'], wants, strict=True):
    assert x.shape == want.shape
    assert np.abs(x - want).max() <= 0.02 * np.abs(want).max()
    heads = live * x.shape[2] // K
    assert not np.any(x[:, :, heads:])
    assert np.all(np.any(x[:, :, :heads], (0, 1, 3)))


def test_one_trace_for_every_number_of_heads(simulated):
  assert simulated.said['traces'] == 1


def test_bfloat16_is_as_near_as_that_of_xla(simulated):
  causal.check_as_near_as_xla(simulated.found[f'{K}'], *draw())


def test_same_bits_as_arrays_without_the_dead_heads(simulated):
  """What a shrink does: fewer heads, all alive."""
  found = simulated.found
  for x, want in zip(found['1'], found['cut'], strict=True):
    np.testing.assert_array_equal(x[:, :, : want.shape[2]], want)


@pytest.mark.parametrize('name', OTHERS)
def test_other_heads(simulated, name):
  size, dtype, _ = OTHERS[name]
  wants = causal.exact(*draw(BLOCK + 1, 1, 1, size, dtype), 1)
  assert simulated.said[name] == {'dtypes': [dtype]}
  off = causal.distance(simulated.found[name], wants)
  # A bit of float16 is an eighth of one of bfloat16.
  assert max(off) < {'float16': 0.0006, 'bfloat16': 0.005}[dtype]


def test_no_tile_above_the_diagonal_is_read(simulated):
  """Forward no later key, backward no earlier query: NaN there is not seen."""
  found = simulated.found
  for late, plain in zip(found['late'][:2], found['plain'][:2], strict=True):
    np.testing.assert_array_equal(late[:, :BLOCK], plain[:, :BLOCK])
    assert np.all(np.isnan(late[:, BLOCK:]))
  for early, plain in zip(found['early'][2:], found['plain'][2:], strict=True):
    np.testing.assert_array_equal(early[:, BLOCK:], plain[:, BLOCK:])
    assert np.all(np.isnan(early[:, :BLOCK]))


def test_the_simulator_catches_a_race(simulated):
  """What registers read of a ring, against what TMA writes there next."""
  if jax.__version_info__ < (0, 12):
    pytest.skip('the simulator of jax 0.11.2 does not see this one')
  assert 'RACE DETECTED' in simulated.said['forgotten fence']


def test_a_whole_block_is_that_of_xla(simulated):
  ours, xlas = (simulated.found[x] for x in ('pallas_hopper', 'xla'))
  for x, want in zip(ours, xlas, strict=True):
    assert np.linalg.norm(x - want) < 0.02 * np.linalg.norm(want)
  # The gradients of the weights, after the result and the input's.
  for x, want in zip(ours[2:], xlas[2:], strict=True):
    np.testing.assert_array_equal(x == 0, want == 0)


lowered = functools.partial(causal.lowered, attention.causal, 'cuda')


@pytest.mark.parametrize('T', [100, 2048])
@pytest.mark.parametrize(
  'heads', [(3, 3, 64), (32, 1, 64), (8, 4, 128), (2, 1, 80)], ids=str
)
def test_lowers_for_a_gpu(T, heads):
  text = lowered(T, heads=heads)
  # Forward, again in the backward pass, and two gradients.
  assert len(re.findall(r'custom_call @mosaic_gpu', text)) == 4


def test_no_array_grows_with_the_square_of_a_text():
  def largest(T):
    shapes = re.findall(r'tensor<([\dx]+)x(?:bf16|f32)>', lowered(T))
    return max(math.prod(map(int, shape.split('x'))) for shape in shapes)

  assert largest(2048) == 32 * 2048 * 64
  assert largest(32768) == 16 * largest(2048)


@pytest.mark.parametrize(
  ('arrays', 'said'),
  [
    (
      draw(8, dtype='float32'),
      'float32, float32, float32; the attention of pallas_hopper takes one',
    ),
    (
      draw(8)[:1] + draw(8, dtype='float16')[1:],
      'bfloat16, float16, float16; the attention of pallas_hopper takes one',
    ),
    (draw(8, H=136), "heads of 136 channels: .* up to 128; use .*'bucket'"),
  ],
  ids=['float32', 'two dtypes', 'too wide'],
)
def test_what_it_does_not_take(arrays, said):
  with pytest.raises(ValueError, match=said):
    attention.causal(*arrays[:3], K)


def test_longer_tiles_are_refused_where_they_would_be_wrong():
  """And where they would spill; the shorter ones are taken everywhere."""
  known = {
    (form, H): [x.tile for x in attention.candidates(form, T, T, H, 'bfloat16')]
    for form in forms.ATTENTION
    for H in (40, 64, 128)
  }
  assert known == {
    ('forward', 40): [128, 64], ('dq', 40): [128, 64], ('dkv', 40): [64],
    ('forward', 64): [128, 64], ('dq', 64): [128, 64], ('dkv', 64): [64],
    ('forward', 128): [128, 64], ('dq', 128): [64], ('dkv', 128): [64],
  }  # fmt: skip
  q, k, v, _ = draw(8)
  long = [None, None, attention.Blocks(128)]
  with pytest.raises(ValueError, match=r'\(tile=128\) of dkv: .* take .*=64\)'):
    attention.causal(q, k, v, K, long)
  for wrong in (('nn', T, T, H), ('dq', T, 2 * T, H), ('dq', T, T, 136)):
    assert attention.candidates(*wrong, 'bfloat16') == []
  assert attention.candidates('dq', T, T, H, 'float32') == []


def test_no_tokens_at_all():
  q, k, v, _ = draw(0)
  assert attention.causal(q, k, v, K).shape == q.shape


def test_another_gpu(monkeypatch):
  device = types.SimpleNamespace(
    platform='gpu', device_kind='NVIDIA A100', compute_capability='8.0'
  )
  monkeypatch.setattr(jax, 'devices', lambda *_: [device])
  q, k, v, _ = draw(8)
  with pytest.raises(ValueError, match=r'needs a Hopper GPU .* a NVIDIA A100'):
    attention.causal(q, k, v, K)
