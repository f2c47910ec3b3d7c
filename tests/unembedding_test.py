"""Blocks of logits against all of them at once, and against float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from effllm_jax import distillation
from effllm_jax import sharding
from effllm_jax import steps
from effllm_jax import structure
from effllm_jax import unembedding
from tests import conftest
from tests import steps_test

B, T, V, D = 2, 11, 37, 8
WEIGHTS = {'entropy': 0.7, 'square': 0.3}
# Positions of a block: all; in two and three blocks, of which the last one is
# filled up; one, also where even that is too much.
SIZES = {'one': 11, 'two': 6, 'filled': 4, 'each': 1, 'least': 0}


@pytest.fixture(name='limited')
def _limited(monkeypatch):
  """Sets how many positions of two sequences a device may hold logits of."""

  def limit(positions, vocabulary=V, batch=B):
    most = max(positions * vocabulary * batch, 1)
    monkeypatch.setattr(unembedding, 'MOST_LOGITS', most)

  return limit


def make_params(tied, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  matrix = rng.standard_normal((V, D)).astype(np.float32)
  params = structure.Params(embed=matrix, layers=None, final_norm=None)
  if not tied:
    params = params.replace(unembed=np.ascontiguousarray(matrix.T))
  x = rng.standard_normal((B, T, D))
  labels = rng.integers(0, V, (B, T)).astype(np.int32)
  return params, jnp.asarray(x, dtype), labels


def read(logits, labels):
  return {
    'entropy': optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    'square': jnp.square(logits).mean(-1),
  }


def mean(params, x, labels, mesh=None):
  """A fresh program, as a limit is no argument of one."""
  return jax.jit(
    jax.value_and_grad(
      lambda params, x: unembedding.mean(
        read, WEIGHTS, x, params, mesh, labels
      ),
      argnums=(0, 1),
      has_aux=True,
    )
  )(params, x)


@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize('size', SIZES)
def test_mean_and_gradient_are_those_of_float64(limited, size, tied):
  limited(SIZES[size])
  params, x, labels = make_params(tied)
  (value, means), (dparams, dx) = mean(params, x, labels)
  x64, matrix = np.asarray(x, np.float64), params.embed.astype(np.float64)
  logits = x64 @ matrix.T
  logp = scipy.special.log_softmax(logits, -1)
  hot = np.eye(V)[labels]
  want = {
    'entropy': -(logp * hot).sum(-1).mean(),
    'square': np.square(logits).mean(),
  }
  for name, x in want.items():
    np.testing.assert_allclose(means[name], x, rtol=1e-5)
  total = sum(WEIGHTS[n] * x for n, x in want.items())
  np.testing.assert_allclose(value, total, rtol=1e-5)
  dlogits = WEIGHTS['entropy'] * (np.exp(logp) - hot) / (B * T)
  dlogits += WEIGHTS['square'] * 2 * logits / logits.size
  np.testing.assert_allclose(dx, dlogits @ matrix, rtol=1e-4, atol=1e-6)
  dmatrix = np.einsum('btv,btd->vd', dlogits, x64)
  got = dparams.embed if tied else dparams.unembed.T
  np.testing.assert_allclose(got, dmatrix, rtol=1e-4, atol=1e-6)


def test_the_gradient_takes_a_factor_later(limited):
  """As where the mean is a part of what is minimised."""
  params, x, labels = make_params(True)

  def half(params, x):
    value, means = unembedding.mean(read, WEIGHTS, x, params, None, labels)
    # The means are told, not differentiated.
    return 0.5 * value + means['square']

  found = []
  for size in ('one', 'filled'):
    limited(SIZES[size])
    fresh = jax.grad(lambda params, x: half(params, x), argnums=(0, 1))
    found.append(jax.jit(fresh)(params, x))
  limited(SIZES['one'])
  _, gradients = mean(params, x, labels)
  want = jax.tree.map(lambda x: 0.5 * x, gradients)
  for half_of_it in found:
    conftest.check_close(half_of_it, want, 1e-5, 1e-8)


@pytest.mark.parametrize('size', ['one', 'filled'])
def test_no_row_is_differentiated(limited, size):
  """However many blocks there are."""
  limited(SIZES[size])
  params, x, labels = make_params(True)

  def scaled(scale):
    read_scaled = lambda logits, labels, scale: {
      'entropy': scale * read(logits, labels)['entropy']
    }
    rows = labels, scale
    return unembedding.mean(read_scaled, WEIGHTS, x, params, None, *rows)[0]

  assert not np.any(jax.grad(scaled)(jnp.ones((B, T))))


@pytest.mark.parametrize('size', ['one', 'filled'])
def test_a_gradient_has_the_dtype_of_its_matrix(limited, size):
  limited(SIZES[size])
  params, x, labels = make_params(True)
  params = params.replace(embed=params.embed.astype(jnp.bfloat16))
  _, (dparams, dx) = mean(params, x, labels)
  assert dparams.embed.dtype == jnp.bfloat16 and dx.dtype == jnp.float32


def largest_block(batch, length, vocabulary):
  """Number of logits that are read at a time; nothing is computed."""
  sizes = []

  def recorded(logits, labels):
    sizes.append(logits.size)
    return read(logits, labels)

  array = jax.ShapeDtypeStruct
  jax.eval_shape(
    lambda x, matrix, labels: unembedding.mean(
      recorded, WEIGHTS, x,
      structure.Params(embed=matrix, layers=None, final_norm=None), None,
      labels,
    ),
    array((batch, length, D), jnp.float32),
    array((vocabulary, D), jnp.float32),
    array((batch, length), jnp.int32),
  )  # fmt: skip
  return max(sizes)


def test_no_block_has_more_logits_than_a_device_may_hold(monkeypatch):
  """Also where they do not come out even."""
  for most in range(B * V, B * T * V + 1, 13):
    monkeypatch.setattr(unembedding, 'MOST_LOGITS', most)
    assert largest_block(B, T, V) <= most


def test_a_device_holds_up_to_a_gibibyte_of_logits():
  """As the README has it: one text of SmolLM2 whole, and no eight of them."""
  assert largest_block(1, 2048, 49152) == 2048 * 49152
  assert 2**29 < 4 * largest_block(8, 2048, 49152) <= 2**30


@pytest.mark.parametrize('vocabulary, blocks', [(48, 3), (49, 6)])
def test_a_vocabulary_that_no_mesh_divides_is_whole_on_each(
  monkeypatch, vocabulary, blocks
):
  mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
  matrix = np.zeros((vocabulary, D), np.float32)
  params = structure.Params(embed=matrix, layers=None, final_norm=None)
  # Two of eight sequences, and half of the vocabulary where it is even.
  monkeypatch.setattr(unembedding, 'MOST_LOGITS', 2 * 4 * 49 // 2)
  assert unembedding._blocks(jnp.zeros((8, 12, D)), params, mesh) == blocks


def test_bfloat16_gives_what_it_gives_whole(limited):
  """Products in bfloat16, and sums over blocks in float32."""
  params, x, labels = make_params(True, jnp.bfloat16)
  limited(SIZES['one'])
  want = mean(params, x, labels)
  limited(SIZES['filled'])
  got = mean(params, x, labels)
  assert got[1][1].dtype == jnp.bfloat16 and got[1][0].embed.dtype == np.float32
  conftest.check_close(got, want, 1e-2, 1e-4)


@pytest.mark.parametrize('size', SIZES)
def test_per_token_is_that_of_whole_logits(limited, size):
  """Trees, other rows, and a gradient through them."""
  params, x, labels = make_params(False)

  def tops(logits, labels):
    return {'top': jax.lax.top_k(logits, 3), 'loss': read(logits, labels)}

  def found(x):
    return unembedding.per_token(tops, x, params, None, labels)

  limited(SIZES['one'])
  want = jax.jit(lambda x: found(x))(x)
  loss = lambda x: found(x)['loss']['entropy'].sum()
  gradient = jax.jit(jax.grad(lambda x: loss(x)))(x)
  limited(SIZES[size])
  got = jax.jit(lambda x: found(x))(x)
  assert want['top'][1].shape == (B, T, 3)
  np.testing.assert_array_equal(got['top'][1], want['top'][1])
  conftest.check_close(got, want, 1e-5, 1e-5)
  conftest.check_close(jax.jit(jax.grad(lambda x: loss(x)))(x), gradient)


@pytest.mark.parametrize('shape', [(0, T), (B, 0)], ids=['rows', 'positions'])
def test_of_no_tokens_there_is_nothing(shape):
  params, x, labels = make_params(True)
  x, labels = (y[: shape[0], : shape[1]] for y in (x, labels))
  found = unembedding.per_token(read, x, params, None, labels)
  assert {y.shape for y in found.values()} == {shape}


# A training step whose logits are its largest arrays.
CFG = conftest.make_config(N=1, V=257)
ROWS, LENGTH = 6, 11
PROGRAMS = {
  'train': ('train_step', {'tx': steps_test.KEEP, 'score': True}),
  'teach': ('teach_step', {}),
  'losses': ('sum_losses', {}),
}


def program(name, distill=0.4, saliency='activation'):
  """A step that was not traced before, its arguments and its settings."""
  function, settings = PROGRAMS[name]
  recipe = dataclasses.replace(
    steps_test.RECIPE, distill=distill, saliency=saliency, top_k=3
  )
  state = steps_test.make_state(CFG, steps_test.KEEP, conftest.make_masks(CFG))
  windows = steps_test.one_batch(CFG)
  model = state.params, state.prune.masks
  match name:
    case 'train':
      teacher = steps.teach_step(
        conftest.make_params(CFG, 5), model[1], windows, cfg=CFG, recipe=recipe
      )
      arguments = state, windows, teacher
    case 'teach':
      arguments = *model, windows
    case 'losses':
      weights = np.ones((ROWS, LENGTH), np.float32)
      arguments = *model, windows[0], weights
      settings = {'compute': recipe.compute}
  if name != 'losses':
    settings = settings | {'recipe': recipe}
  wrapped = getattr(steps, function).__wrapped__
  settings = settings | {'cfg': CFG}
  # A new function: jax knows the old one's program.
  return jax.jit(lambda *args: wrapped(*args, **settings)), arguments


@pytest.mark.parametrize('name', PROGRAMS)
def test_steps_in_blocks_are_steps(limited, name):
  """Gradients and norm, scores of activations, what a teacher says."""
  limited(4, CFG.V, ROWS)
  fresh, arguments = program(name)
  got = fresh(*arguments)
  limited(LENGTH, CFG.V, ROWS)
  fresh, arguments = program(name)
  want = fresh(*arguments)
  conftest.check_close(got, want, 1e-4, 1e-6)


@pytest.mark.parametrize('name', PROGRAMS)
def test_no_program_holds_all_logits(limited, name):
  """Nor anything else of that size; with one block it does."""
  held = {}
  for positions in (4, LENGTH):
    limited(positions, CFG.V, ROWS)
    fresh, arguments = program(name)
    text = fresh.lower(*arguments).as_text()
    shapes = re.findall(r'tensor<([\dx]+)x(?:f32|bf16)>', text)
    sizes = [np.prod([*map(int, x.split('x'))]) for x in shapes]
    held[positions] = max(sizes)
  assert held[4] < ROWS * LENGTH * CFG.V <= held[LENGTH]


def test_a_filled_up_block_shows_a_teacher_of_all_tokens(limited):
  """Where nothing is left for the rest, whose logarithm is that of zero."""
  params, x, _ = make_params(True)
  other = x[:, ::-1]

  def divergence(x):
    targets = unembedding.per_token(
      lambda logits: distillation.Targets(
        *jax.lax.top_k(jax.nn.softmax(logits), V)
      ),
      other, params, None,
    )  # fmt: skip
    read = lambda logits, targets: {
      'kl': distillation.divergence(logits, targets, 1.0)
    }
    return unembedding.mean(read, {'kl': 1.0}, x, params, None, targets)[0]

  found = []
  for size in ('one', 'filled'):
    limited(SIZES[size])
    found.append(jax.jit(jax.value_and_grad(lambda x: divergence(x)))(x))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
  conftest.check_close(found[1], found[0], 1e-4, 1e-6)


SCRIPT = """
import json, re
import jax, numpy as np
from effllm_jax import distillation, sharding, unembedding
from tests import conftest, sharding_test, unembedding_test as here

B, T, V, D = 8, 12, 48, 16
rng = np.random.default_rng(0)
params = here.structure.Params(
  embed=rng.standard_normal((V, D)).astype(np.float32), layers=None,
  final_norm=None,
)
x = rng.standard_normal((B, T, D)).astype(np.float32)
labels = rng.integers(0, V, (B, T)).astype(np.int32)
tops = lambda logits: distillation.largest(logits, 3)
want = here.mean(params, x, labels)
answers = jax.jit(lambda x: unembedding.per_token(tops, x, params, None))(x)
sent = {}
for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)):
  mesh = sharding.make(*sizes)
  rows = [sharding.put_rows(y, mesh) for y in (x, labels)]
  at_rest = sharding.spec('VD', (V, D), mesh, sharding.AT_REST)
  at_rest = jax.sharding.NamedSharding(mesh, at_rest)
  spread = params.replace(embed=sharding.put(params.embed, at_rest))
  unembedding.MOST_LOGITS = B * 4 * V // 8
  step = jax.jit(jax.value_and_grad(
    lambda p, x, y: unembedding.mean(here.read, here.WEIGHTS, x, p, mesh, y),
    argnums=(0, 1), has_aux=True,
  ))
  compiled = step.lower(spread, *rows).compile()
  conftest.check_close(compiled(spread, *rows), want, 1e-4, 1e-6)
  teach = jax.jit(lambda p, x: unembedding.per_token(
    sharding.over_batch(tops, mesh), x, p, mesh))
  conftest.check_close(teach(spread, rows[0]), answers, 1e-4, 1e-6)
  # By computation; the last one is the program, others are its loops.
  *loops, program = [
    sharding_test.exchanged(computation)
    for computation in re.split(r'\\n(?=\\S)', compiled.as_text())
    if 'ENTRY' in computation or 'all-' in computation
  ]
  matrix = [V // sizes[2], D]
  sent['-'.join(map(str, sizes))] = [
    [list(shape) for shape in found].count(matrix)
    for found in (sum(loops, []), program)
  ]
print(json.dumps(sent))
"""


def test_eight_devices_sum_a_gradient_once():
  """It is that of one device; no loop over blocks sends the matrix around."""
  sent, _ = conftest.on_eight_devices(SCRIPT)
  # In loops and outside: gathered over `fsdp`, summed over the batch.
  assert sent == {
    '8-1-1': [0, 1], '1-8-1': [0, 2], '1-1-8': [0, 0], '2-2-2': [0, 2],
  }  # fmt: skip
