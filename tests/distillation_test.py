import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from effllm_jax import distillation
from effllm_jax import errors
from effllm_jax import model
from effllm_jax import sharding
from effllm_jax import sources
from effllm_jax import steps
from effllm_jax import structure
from effllm_jax import teacher as teacher_lib
from tests import conftest

# Whole, as a step has it: each small operation would be a program of its own.
DIVERGENCE = jax.jit(distillation.divergence, static_argnums=2)
TARGETS = jax.jit(distillation.targets, static_argnums=(3, 4, 5, 6))


def make_logits(seed, scale=3.0, shape=(2, 5, 23)):
  rng = np.random.default_rng(seed)
  return scale * rng.standard_normal(shape)


def stored(logits, temperature, top_k):
  p = scipy.special.softmax(logits / temperature, -1)
  index = np.argsort(-p, -1)[..., :top_k]
  return distillation.Targets(
    probs=jnp.asarray(np.take_along_axis(p, index, -1), jnp.float32),
    index=jnp.asarray(index, jnp.int32),
  )


def merged(logits, index, temperature):
  """Probabilities of the stored tokens and, last, of all others together."""
  p = scipy.special.softmax(logits / temperature, -1)
  top = np.take_along_axis(p, index, -1)
  return np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('top_k', [1, 4, 22, 23])
def test_equals_the_closed_form_in_float64(top_k, temperature):
  teacher, student = make_logits(0), make_logits(1)
  targets = stored(teacher, temperature, top_k)
  p = merged(teacher, targets.index, temperature)
  q = merged(student, targets.index, temperature)
  want = temperature**2 * scipy.special.rel_entr(p, q).sum(-1)
  if top_k == 23:
    full = (
      scipy.special.softmax(x / temperature, -1) for x in (teacher, student)
    )
    want = temperature**2 * scipy.special.rel_entr(*full).sum(-1)
  got = DIVERGENCE(jnp.asarray(student, jnp.float32), targets, temperature)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_more_stored_tokens_see_more_and_never_more_than_all():
  teacher, student = make_logits(2), make_logits(3)
  means = [
    float(
      DIVERGENCE(
        jnp.asarray(student, jnp.float32), stored(teacher, 1.0, k), 1.0
      ).mean()
    )
    for k in (1, 2, 5, 12, 23)
  ]
  assert means == sorted(means)
  assert means[0] >= 0


@pytest.mark.parametrize('top_k', [2, 23])
def test_the_gradient_is_that_of_the_merged_softmax_and_0_at_the_teacher(top_k):
  teacher = jnp.asarray(make_logits(4), jnp.float32)
  targets = stored(np.asarray(teacher, np.float64), 1.0, top_k)
  grad = jax.jit(jax.grad(lambda x: DIVERGENCE(x, targets, 1.0).sum()))
  np.testing.assert_allclose(grad(teacher), 0, atol=1e-5)
  student = np.asarray(make_logits(5), np.float32)
  eps, at = 1e-2, (0, 1, int(targets.index[0, 1, 0]))
  around = [student.copy() for _ in range(2)]
  around[0][at] += eps
  around[1][at] -= eps
  higher, lower = (
    float(np.asarray(DIVERGENCE(x, targets, 1.0)).sum()) for x in around
  )
  assert float(np.asarray(grad(student))[at]) == pytest.approx(
    (higher - lower) / (2 * eps), rel=2e-2, abs=2e-3
  )


def test_a_sure_student_has_finite_gradients():
  """Where all but one probability underflow, in student or teacher."""
  sure = np.zeros((1, 1, 23), np.float32)
  sure[0, 0, 3] = 200.0
  for teacher in (
    np.asarray(sure, np.float64),
    make_logits(6, shape=(1, 1, 23)),
  ):
    targets = stored(teacher, 1.0, 4)
    value, grad = jax.jit(
      jax.value_and_grad(lambda x, t: DIVERGENCE(x, t, 1.0).sum())
    )(sure, targets)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_targets_are_the_largest_probabilities_of_the_teacher():
  cfg = conftest.make_config()
  params, masks = conftest.make_params(cfg), structure.all_alive(cfg)
  tokens = conftest.make_tokens(cfg)
  compute = model.Compute(remat='none')
  targets = TARGETS(params, masks, tokens, cfg, compute, 2.0, 7)
  logits, _ = conftest.forward(params, masks, tokens, cfg=cfg, compute=compute)
  p = scipy.special.softmax(np.asarray(logits, np.float64) / 2, -1)
  np.testing.assert_allclose(
    targets.probs, np.sort(p, -1)[..., ::-1][..., :7], rtol=1e-4
  )
  np.testing.assert_allclose(
    targets.probs, np.take_along_axis(p, np.asarray(targets.index), -1), 1e-4
  )
  # A model is its own best teacher.
  divergence = DIVERGENCE(logits, targets, 2.0)
  np.testing.assert_allclose(divergence, 0, atol=1e-5)


@pytest.mark.parametrize('shape, k', [((2, 3, 1000), 7), ((4, 515), 1)])
def test_the_largest_are_those_of_top_k_ties_included(shape, k):
  x = np.asarray(make_logits(7, shape=shape), np.float32)
  x[0, ..., 5:400] = -np.inf
  for some in (x, np.round(x), np.zeros_like(x), np.full_like(x, -np.inf)):
    want, have = jax.lax.top_k(some, k), distillation.largest(some, k)
    for a, b in zip(have, want, strict=True):
      np.testing.assert_array_equal(a, b)


def test_never_is_all_of_a_vocabulary_sorted():
  """As a GPU and a TPU do to find the largest of it."""
  V, k = 128_256, 64
  text = (
    jax.jit(distillation.largest, static_argnums=1)
    .lower(jax.ShapeDtypeStruct((2, V), np.float32), k)
    .as_text()
  )
  sizes = re.findall(r'chlo.top_k.* : tensor<2x(\d+)xf32>', text)
  assert len(sizes) == 2 and sum(map(int, sizes)) < V / 16


def test_a_teacher_is_traced_once(tmp_path, monkeypatch):
  """However often the student is compiled anew."""
  source = sources.load(conftest.write_model_folder(tmp_path / 'model'), '')
  mesh = sharding.make(1, 1, 1)
  recipe = steps.Recipe(
    compute=model.Compute(mesh=mesh), saliency='taylor1', decay=0.9, b1=0.9,
    b2=0.95, clip=1.0, distill=0.5, temperature=1.0, top_k=4, seed=0,
  )  # fmt: skip
  teacher = teacher_lib.Teacher(source, recipe)
  rows = np.asarray(conftest.make_tokens(source.cfg))
  windows_ABT = sharding.put_batch(rows, 1, mesh)
  shapes = teacher.compile(windows_ABT)
  answer = teacher(windows_ABT)
  # Another step cannot be lowered.
  monkeypatch.setattr(teacher_lib.steps, 'teach_step', None)
  assert teacher.compile(windows_ABT) is shapes
  for want, have in zip(*map(jax.tree.leaves, (shapes, answer)), strict=True):
    assert (have.shape, have.dtype) == (want.shape, want.dtype)


def test_in_bfloat16_a_teacher_is_cast_as_a_student(tmp_path):
  """Norm scales and biases stay float32 in both."""
  cfg = conftest.make_config(qkv_bias=True, qk_norm=True)
  params, masks = conftest.make_params(cfg), structure.all_alive(cfg)
  source = dataclasses.replace(
    sources.load(conftest.write_model_folder(tmp_path / 'model'), ''),
    cfg=cfg, params=params,
  )  # fmt: skip
  mesh = sharding.make(1, 1, 1)
  compute = model.Compute(dtype='bfloat16', remat='none', mesh=mesh)
  recipe = steps.Recipe(
    compute=compute, saliency='taylor1', decay=0.9, b1=0.9, b2=0.95, clip=1.0,
    distill=0.5, temperature=1.0, top_k=4, seed=0,
  )  # fmt: skip
  windows_BT = np.asarray(conftest.make_tokens(cfg))
  teacher = teacher_lib.Teacher(source, recipe)
  windows_ABT = sharding.put_batch(windows_BT, 1, mesh)
  teacher.compile(windows_ABT)
  want = TARGETS(params, masks, windows_BT[:, :-1], cfg, compute, 1.0, 4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5),
    teacher(windows_ABT), want,
  )  # fmt: skip


@pytest.mark.parametrize('tied', [True, False])
def test_a_teacher_says_nothing_of_rows_that_the_student_lacks(tmp_path, tied):
  """Rows without a token fill up a vocabulary, in large models further."""
  cfg = conftest.make_config(V=300, tied=tied)
  student = sources.load(
    conftest.write_model_folder(tmp_path / 'model', cfg), ''
  )
  large = dataclasses.replace(cfg, V=320)
  params, tokens = conftest.make_params(large), conftest.make_tokens(cfg)
  teacher = dataclasses.replace(student, cfg=large, params=params)
  fitted = teacher_lib.fitted(teacher, student, seq_len=cfg.context)
  masks = structure.all_alive(cfg)
  logits, _ = conftest.forward(fitted.params, masks, tokens, cfg=fitted.cfg)
  whole, _ = conftest.forward(params, masks, tokens, cfg=large)
  np.testing.assert_allclose(
    logits, np.asarray(whole)[..., :300], rtol=1e-5, atol=1e-5
  )
  # All of them, where those of 320 would name rows that do not exist.
  targets = TARGETS(
    fitted.params, masks, tokens, fitted.cfg, model.Compute(), 1.0, 300
  )
  divergence = DIVERGENCE(np.asarray(whole)[..., :300] + 1, targets, 1.0)
  np.testing.assert_allclose(divergence, 0, atol=1e-5)
  with pytest.raises(errors.InputError, match='exceeds the context 128 of'):
    teacher_lib.fitted(teacher, student, seq_len=129)
  with pytest.raises(errors.InputError, match='has 300 logits, the source 320'):
    teacher_lib.fitted(student, teacher, seq_len=8)
