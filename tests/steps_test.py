import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effllm_jax import distillation
from effllm_jax import model
from effllm_jax import optimizers
from effllm_jax import repair
from effllm_jax import saliency
from effllm_jax import shrink
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure
from tests import conftest

COMPUTE = model.Compute(remat='none')
B1, B2, CLIP = 0.9, 0.95, 0.85


# One layer, and two shapes of a batch: compiles are what takes time.
CFG = conftest.make_config(N=1)
UNTIED = conftest.make_config(N=1, tied=False)


def micro_batches(cfg, seed=0):
  return conftest.make_tokens(cfg, 6, seed=seed).reshape(3, 2, -1)


def one_batch(cfg, seed=0):
  return conftest.make_tokens(cfg, 6, seed=seed)[None]


def make_state(cfg, tx, masks=None):
  state = state_lib.fresh_state(conftest.make_params(cfg), cfg, tx)
  if masks is not None:
    # A copy: a step donates its state.
    masks = conftest.copied(masks)
    state = state.replace(prune=state.prune.replace(masks=masks))
  return state


@pytest.fixture(scope='module', name='tx')
def _tx():
  rate = optimizers.learning_rate('wsd', 1e-2, 1e-4, 2, 4, 12)
  return optimizers.optimizer(rate, B1, B2, 0.1, CLIP)


RECIPE = steps.Recipe(
  compute=COMPUTE,
  saliency='taylor1',
  decay=0.0,
  b1=B1,
  b2=B2,
  clip=CLIP,
  distill=0.0,
  temperature=1.0,
  top_k=8,
  seed=0,
)


def step(state, tokens, cfg, tx, score=True, teacher=None, **changes):
  return steps.train_step(
    state,
    tokens,
    teacher,
    cfg=cfg,
    tx=tx,
    recipe=dataclasses.replace(RECIPE, **changes),
    score=score,
  )


def test_masks_do_not_retrace(tx):
  """Invariant 6."""
  cfg = CFG
  state = make_state(cfg, tx)
  tokens = micro_batches(cfg)
  before = None
  for seed in range(4):
    masks = conftest.make_masks(cfg, seed)
    state = state.replace(prune=state.prune.replace(masks=masks))
    state, numbers = step(state, tokens, cfg, tx)
    before = before or steps.train_step._cache_size()
  assert steps.train_step._cache_size() == before
  assert int(state.step) == 4
  assert float(numbers['loss']) > 0


def test_scores_come_from_the_training_gradient(tx):
  cfg = CFG
  masks = conftest.make_masks(cfg)
  state = make_state(cfg, tx, masks)
  tokens = conftest.make_tokens(cfg, 6)
  params = jax.tree.map(np.array, state.params)
  loss, grads = conftest.loss_and_grad(params, masks, tokens, cfg=cfg)
  # As three micro-batches: the same mean gradient, the same scores.
  state, numbers = step(state, tokens.reshape(3, 2, -1), cfg, tx)
  conftest.check_close(
    state.prune.scores, saliency.taylor1(params, grads), 1e-3, 1e-6
  )
  np.testing.assert_allclose(numbers['loss'], loss, rtol=1e-5)
  assert int(state.prune.count) == 1
  for name in structure.TYPES:
    scores = np.asarray(getattr(state.prune.scores, name))
    dead = ~np.asarray(getattr(state.prune.masks, name))
    assert dead.any()
    assert (scores[dead] == 0).all()


def test_scores_of_steps_are_averaged_by_the_decay(tx):
  """Each step before counts half as much; the start has no bias."""
  seen = {}
  for decay in (0.0, 0.5):
    state, seen[decay] = make_state(CFG, tx), []
    for seed in range(2):
      state, _ = step(state, one_batch(CFG, seed), CFG, tx, decay=decay)
      seen[decay].append(jax.tree.map(np.array, state.prune.scores))
  (first, second), (start, mean) = seen.values()
  conftest.check_close(start, first, 1e-5)
  want = jax.tree.map(lambda a, b: (a + 2 * b) / 3, first, second)
  conftest.check_close(mean, want, 1e-5)


def test_parts_of_a_step_have_names_in_a_profile(tx):
  """A profiler shows the names that the program has."""
  lowered = steps.train_step.lower(
    make_state(CFG, tx), one_batch(CFG), cfg=CFG, tx=tx, recipe=RECIPE,
    score=True,
  )  # fmt: skip
  text = lowered.as_text(debug_info=True)
  for name in ('embed', 'attention', 'ffn', 'unembed', 'scores', 'update'):
    assert re.search(rf'["/(]{name}[/)]', text), name


@pytest.fixture(scope='module', name='history')
def _history(tx):
  """Three steps by hand: parameters, gradients, Adam's moments, float64.

  One of the three gradients is small and is not clipped.
  """
  cfg, masks = CFG, conftest.make_masks(CFG)
  tokens = [micro_batches(cfg, seed) for seed in range(3)]
  state = make_state(cfg, tx, masks)
  rows, mu, nu = [], 0.0, 0.0
  for count, windows in enumerate(tokens, 1):
    params = jax.tree.map(np.array, state.params)
    micro = [
      as64(conftest.loss_and_grad(params, masks, w, cfg=cfg)[1])
      for w in windows
    ]
    grads = jax.tree.map(lambda *g: sum(g) / len(g), *micro)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    factor = min(1.0, CLIP / norm)
    clipped = jax.tree.map(lambda g, f=factor: f * g, grads)
    mu = jax.tree.map(
      lambda g, m: B1 * m + (1 - B1) * g, clipped, mu or zeros(grads)
    )
    nu = jax.tree.map(
      lambda g, v: B2 * v + (1 - B2) * g**2, clipped, nu or zeros(grads)
    )
    rows.append(
      dict(
        params=params,
        micro=micro,
        grads=grads,
        norm=norm,
        mu=jax.tree.map(lambda m, c=count: m / (1 - B1**c), mu),
        nu=jax.tree.map(lambda v, c=count: v / (1 - B2**c), nu),
      )
    )
    state, _ = step(state, windows, cfg, tx)
  norms = [row['norm'] for row in rows]
  assert min(norms) < CLIP < max(norms), norms
  return cfg, masks, tokens, rows


def as64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def zeros(tree):
  return jax.tree.map(np.zeros_like, tree)


def whole(function, *arrays):
  """As a step has it: each small operation would be a program of its own."""
  return jax.jit(function)(*arrays)


def want_scores(kind, row, cfg, masks, windows):
  """The scores of one step from what was computed by hand."""
  params = row['params']
  n, n_micro = windows[..., 1:].size, windows[0, :, 1:].size
  match kind:
    case 'taylor1':
      return whole(saliency.taylor1, params, row['grads'])
    case 'taylor1_momentum':
      return whole(saliency.taylor1, params, row['mu'], masks)
    case 'taylor1_group':
      return whole(saliency.taylor1_group, params, row['grads'])
    case 'taylor2':
      scale = n * max(1.0, row['norm'] / CLIP) ** 2
      h = jax.tree.map(lambda v: scale * v, row['nu'])
      return whole(saliency.taylor2, params, row['grads'], h, 1.0, masks)
    case 'obd':
      scale = n * max(1.0, row['norm'] / CLIP) ** 2
      h = jax.tree.map(lambda v: scale * v, row['nu'])
      return whole(saliency.obd, params, h, 1.0, masks)
    case 'taylor2_micro':
      h = jax.tree.map(
        lambda *g: n_micro * sum(x**2 for x in g) / len(g), *row['micro']
      )
      return whole(saliency.taylor2, params, row['grads'], h, 1.0)
    case 'fisher':
      each = [whole(saliency.fisher, params, g, n_micro) for g in row['micro']]
      return jax.tree.map(lambda *s: sum(s) / len(s), *each)
    case 'magnitude':
      return whole(saliency.magnitude, params, masks)
    case 'activation':
      each = [
        whole(
          saliency.activation,
          conftest.forward(params, masks, w[:, :-1], cfg=cfg, taps=True)[1],
          params,
          masks,
        )
        for w in windows
      ]
      return jax.tree.map(lambda *s: sum(s) / len(s), *each)


@pytest.mark.parametrize('kind', sorted(set(saliency.KINDS) - {'random'}))
def test_every_kind_equals_its_formula_over_three_steps(history, tx, kind):
  cfg, masks, tokens, rows = history
  state = make_state(cfg, tx, masks)
  for windows, row in zip(tokens, rows, strict=True):
    state, numbers = step(state, windows, cfg, tx, saliency=kind)
    want = want_scores(kind, row, cfg, masks, windows)
    want = jax.tree.map(np.asarray, want)
    largest = jax.tree.map(lambda s: 1e-4 * abs(s).max(), want)
    jax.tree.map(
      lambda a, b, atol: np.testing.assert_allclose(a, b, 1e-3, atol),
      state.prune.scores,
      want,
      largest,
    )
    np.testing.assert_allclose(numbers['grad_norm'], row['norm'], rtol=1e-4)
  jax.tree.map(
    lambda s, m: np.testing.assert_array_equal(s != 0, m),
    state.prune.scores,
    masks,
  )


@pytest.mark.parametrize('kind', sorted(set(saliency.KINDS) - {'random'}))
def test_scores_are_the_same_before_a_shrink_and_after_it(history, tx, kind):
  """Weights and moments of what has died count for nothing."""
  cfg, masks, (first, then, _), _ = history
  alive, _ = step(make_state(cfg, tx), first, cfg, tx)
  dead = alive.prune.replace(masks=conftest.copied(masks))
  pruned = alive.replace(prune=dead)
  small = shrink.shrunk_config(
    masks, cfg, structure.Groups(heads=1, ffn=1, stem=1)
  )
  assert small.F < cfg.F and small.D < cfg.D
  shrunk, kept = steps.shrink_step(pruned, cfg=small, tx=tx)
  pruned, _ = step(pruned, then, cfg, tx, saliency=kind)
  if kind not in ('taylor2_micro', 'fisher'):
    # The mean of one micro-batch is that of three, and compiles sooner.
    then = then.reshape(1, 6, -1)
  shrunk, _ = step(shrunk, then, small, tx, saliency=kind)
  want = conftest.take_groups(pruned.prune.scores, kept)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-4 * abs(b).max()),
    shrunk.prune.scores,
    jax.tree.map(np.asarray, want),
  )


@pytest.mark.parametrize('kind', ['taylor1_momentum', 'obd'])
def test_a_skipped_step_is_none_of_the_moments(tx, kind):
  """What they lack of an average is by their own steps."""
  good = micro_batches(CFG)
  bad = good.at[0, 0, -1].set(CFG.V)  # There is no such token.
  found = []
  for batches in ((good, bad, good), (good, good)):
    state = make_state(CFG, tx)
    for tokens in batches:
      state, _ = step(state, tokens, CFG, tx, saliency=kind)
    assert int(state.skipped) == len(batches) - 2
    found.append(state.prune.scores)
  conftest.check_close(*found)


def test_random_scores_depend_on_step_and_seed_only(tx):
  cfg, seen = CFG, []
  for text, seed in ((0, 0), (1, 0), (0, 1)):
    state, scores = make_state(cfg, tx, conftest.make_masks(cfg)), []
    for n in range(2):
      state, _ = step(
        state, one_batch(cfg, text + n), cfg, tx, saliency='random', seed=seed
      )
      scores.append(jax.tree.map(np.asarray, state.prune.scores))
    seen.append(scores)
  for a, b in zip(*seen[:2], strict=True):
    conftest.check_close(a, b, rtol=0, atol=0)
  for a, b in (seen[0], (seen[0][0], seen[2][0])):
    assert all(
      (x != y).all()
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Keeps the gradient that it gets as its state, and updates nothing.
KEEP = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda grads, state, params=None: (
    jax.tree.map(jnp.zeros_like, grads), grads,
  ),
)  # fmt: skip


@pytest.fixture(scope='module', name='taught')
def _taught():
  """A batch, and what a teacher of another shape says of it."""
  cfg, big = CFG, conftest.make_config(N=1, D=20, K=3, G=1, F=24)
  tokens = micro_batches(cfg)
  params, masks = conftest.make_params(big, 5), structure.all_alive(big)
  recipe = dataclasses.replace(RECIPE, distill=0.3, temperature=2.0)
  teacher = steps.teach_step(params, masks, tokens, cfg=big, recipe=recipe)
  return cfg, big, params, tokens, recipe, teacher


def test_teach_step_equals_targets_one_by_one(taught):
  _, big, params, tokens, recipe, teacher = taught
  targets = jax.jit(distillation.targets, static_argnums=(3, 4, 5, 6))
  for a, windows in enumerate(tokens):
    want = targets(
      params, structure.all_alive(big), windows[:, :-1], big, recipe.compute,
      recipe.temperature, recipe.top_k,
    )  # fmt: skip
    np.testing.assert_array_equal(teacher.index[a], want.index)
    np.testing.assert_allclose(teacher.probs[a], want.probs, rtol=1e-5)
    assert want.index.shape == (2, 11, recipe.top_k)


def test_distillation_at_weight_0_changes_nothing(tx, taught):
  cfg, *_, tokens, _, teacher = taught
  joined = lambda x: x.reshape(1, 6, *x.shape[2:])
  tokens, teacher = jax.tree.map(joined, (tokens, teacher))
  with_teacher, numbers = step(
    make_state(cfg, tx), tokens, cfg, tx, teacher=teacher
  )
  without, plain = step(make_state(cfg, tx), tokens, cfg, tx)
  conftest.check_close(with_teacher.params, without.params, 1e-4, 1e-5)
  np.testing.assert_allclose(numbers['loss'], plain['loss'], rtol=1e-5)
  assert float(numbers['divergence']) > 0
  assert 'divergence' not in plain


def test_a_teacher_that_is_silent_changes_no_bit(tx):
  """As before the recovery: the loss has its whole weight."""
  tokens = one_batch(CFG)
  found = [
    step(make_state(CFG, tx), tokens, CFG, tx, distill=weight)
    for weight in (0.0, 0.3)
  ]
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_distillation_mixes_the_gradients_by_its_weight(taught):
  """Against the formula on the teacher's own logits, not on what is stored."""
  cfg, big, teacher_params, tokens, recipe, teacher = taught
  masks = conftest.make_masks(cfg)
  state, numbers = step(
    make_state(cfg, KEEP, masks), tokens, cfg, KEEP, teacher=teacher,
    distill=0.3, temperature=2.0,
  )  # fmt: skip
  T, k = recipe.temperature, recipe.top_k
  inputs, labels = tokens[..., :-1].reshape(6, -1), tokens[..., 1:]
  logits, _ = conftest.forward(
    teacher_params, structure.all_alive(big), inputs, cfg=big
  )
  p = jax.nn.softmax(logits / T)
  top = jnp.argsort(-p, axis=-1)[..., :k]

  def merged(probs):
    stored = jnp.take_along_axis(probs, top, axis=-1)
    return jnp.concatenate([stored, 1 - stored.sum(-1, keepdims=True)], -1)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def objective(params):
    logits, _ = model.forward(params, masks, inputs, cfg, COMPUTE)
    log_q = jax.nn.log_softmax(logits)
    own = labels.reshape(6, -1, 1)
    ce = -jnp.take_along_axis(log_q, own, axis=-1).mean()
    p_m, q_m = merged(p), merged(jax.nn.softmax(logits / T))
    kl = T**2 * (p_m * (jnp.log(p_m) - jnp.log(q_m))).sum(-1).mean()
    return 0.7 * ce + 0.3 * kl, (ce, kl)

  (_, (ce, kl)), want = jax.jit(objective)(conftest.make_params(cfg))
  conftest.check_close(state.opt_state, want, 1e-3, 1e-6)
  np.testing.assert_allclose(numbers['loss'], ce, rtol=1e-4)
  np.testing.assert_allclose(numbers['divergence'], kl, rtol=1e-3)
  # What is scored is that very gradient.
  conftest.check_close(
    state.prune.scores,
    saliency.taylor1(conftest.make_params(cfg), want),
    1e-3,
    1e-6,
  )


DAMPING = 1e-2


def repaired(params, masks, new_masks, tokens, cfg, damping=DAMPING):
  """`repair_step` on two micro-batches, as numpy; it donates what it gets."""
  params, fits = steps.repair_step(
    conftest.copied(params), masks, new_masks,
    tokens.reshape(2, -1, tokens.shape[-1]), cfg=cfg, damping=damping,
  )  # fmt: skip
  return jax.tree.map(np.asarray, params), fits


def chosen_by_hand(flat, x, old, gone, read):
  """Fitted to the first of two micro-batches, judged by the second."""
  fitted, others = np.split(x, 2)
  errors = []
  for damping in repair.CANDIDATES:
    out = conftest.refitted(flat, fitted, ~gone, damping, old)
    errors.append(np.square(others @ (out - flat)[:, read]).sum())
  return repair.CANDIDATES[np.argmin(errors)]


def repaired_by_hand(flat, x, old, new, read, damping):
  """A matrix over the tokens of a batch; damping 0: the chosen one.

  Returns:
    The matrix, the mean squared change of an output vector when its inputs are
    only masked, that when it is repaired, and the damping.
  """
  flat, x = flat.astype(np.float64), as64(x).reshape(-1, len(flat))
  gone = old & ~new
  if not gone.any():
    return flat, 0.0, 0.0, 0.0
  damping = damping or chosen_by_hand(flat, x, old, gone, read)
  out = conftest.refitted(flat, x, ~gone, damping, old)
  change = lambda out: np.square(x @ (out - flat)).sum(-1).mean()
  return out, change(np.where(gone[:, None], 0, flat)), change(out), damping


def norm_factor_by_hand(x, scale, old, new, cfg):
  """By which a norm without some channels comes nearest to what it was."""
  if (old == new).all():
    return 1.0
  before, after = (
    x[..., new] / np.sqrt(
      np.square(x[..., mask]).mean(-1, keepdims=True) + cfg.norm_eps
    ) * as64(scale)[new]
    for mask in (old, new)
  )  # fmt: skip
  (factor,), *_ = np.linalg.lstsq(
    after.reshape(-1, 1), before.reshape(-1), rcond=None
  )
  return factor


def norms_repaired_by_hand(params, taps, masks, new_masks, tokens, cfg):
  """The scales of all norms; the stem is added up from the taps."""
  params, old, new = jax.tree.map(np.asarray, (params, masks, new_masks))
  layers, stems = params.layers, (old.stem, new.stem)
  x = as64(params.embed)[tokens[:, :-1]] * old.stem
  attn_norm, ffn_norm = np.copy(layers.attn_norm), np.copy(layers.ffn_norm)
  for n in range(cfg.N):
    attn_norm[n] *= norm_factor_by_hand(x, attn_norm[n], *stems, cfg)
    heads = as64(taps.heads[n])
    x = x + np.einsum('btkgh,kghd->btd', heads, layers.wo[n]) * old.stem
    ffn_norm[n] *= norm_factor_by_hand(x, ffn_norm[n], *stems, cfg)
    x = x + as64(taps.ffn[n]) @ layers.w_down[n] * old.stem
  factor = norm_factor_by_hand(x, params.final_norm, *stems, cfg)
  return params.replace(
    final_norm=params.final_norm * np.float32(factor),
    layers=layers.replace(attn_norm=attn_norm, ffn_norm=ffn_norm),
  )


def model_repaired_by_hand(params, masks, new_masks, tokens, cfg, damping):
  """Every matrix on the inputs that it has in the model before the prune.

  Returns:
    The parameters, and by input the three numbers of `repaired_by_hand`: sums
    of all layers, and the damping of each.
  """
  _, taps = conftest.forward(params, masks, tokens[:, :-1], cfg=cfg, taps=True)
  params = norms_repaired_by_hand(params, taps, masks, new_masks, tokens, cfg)
  params, old, new = jax.tree.map(np.asarray, (params, masks, new_masks))
  layers, numbers = jax.tree.map(np.copy, params.layers), {}

  def fix(name, weights, n, x, old, new, *read):
    matrices = [getattr(layers, matrix)[n] for matrix in weights]
    # Rows first: wo has three axes of inputs, the others one.
    flat = [w.reshape(len(old), -1) for w in matrices]
    out, *found = repaired_by_hand(
      np.concatenate(flat, 1), x, old, new, np.concatenate(read), damping
    )
    ends = np.cumsum([w.shape[1] for w in flat])[:-1]
    for w, part in zip(matrices, np.split(out, ends, 1), strict=True):
      w[...] = part.reshape(w.shape)
    numbers.setdefault(name, []).append(found)

  wide = lambda mask: np.repeat(mask, cfg.G * cfg.H)
  for n in range(cfg.N):
    heads, ffn, stem = new.heads[n], new.ffn[n], (old.stem, new.stem)
    keys = np.repeat(heads, cfg.H)
    fix('attn_in', ('wq', 'wk', 'wv'), n, taps.attn_in[n], *stem,
        wide(heads), keys, keys)  # fmt: skip
    fix('heads', ('wo',), n, taps.heads[n], wide(old.heads[n]), wide(heads),
        new.stem)  # fmt: skip
    fix('ffn_in', ('w_gate', 'w_up'), n, taps.ffn_in[n], *stem, ffn, ffn)
    fix('ffn', ('w_down',), n, taps.ffn[n], old.ffn[n], ffn, new.stem)
  params = params.replace(layers=layers)
  if params.unembed is not None:
    unembed, *found = repaired_by_hand(
      params.unembed, taps.final, old.stem, new.stem, np.ones(cfg.V, bool),
      damping,
    )  # fmt: skip
    numbers['final'] = [found]
    params = params.replace(unembed=unembed)
  return params, {
    name: (*np.sum(found, 0)[:2], [x[2] for x in found])
    for name, found in numbers.items()
  }


def further(cfg, masks, only=None):
  """Removes more from masks, of every type or of one; ragged by layer."""
  more = jax.tree.map(jnp.logical_and, masks, conftest.make_masks(cfg, 9))
  return more if only is None else masks.replace(**{only: getattr(more, only)})


@pytest.fixture(scope='module', params=list(conftest.CONFIGS), name='prune')
def _prune(request):
  cfg = conftest.make_config(**conftest.CONFIGS[request.param])
  # The first layer keeps all heads: there is something to remove.
  masks = conftest.make_masks(cfg, 3)
  masks = masks.replace(heads=masks.heads.at[0].set(True))
  return cfg, conftest.make_params(cfg), masks, conftest.make_tokens(cfg, 4)


def test_a_repair_of_nothing_keeps_every_bit(prune):
  cfg, params, masks, tokens = prune
  for some in (masks, structure.all_alive(cfg)):
    got, fits = repaired(params, some, some, tokens, cfg)
    conftest.check_close(got, params, rtol=0, atol=0)
    assert not any(x.any() for x in jax.tree.leaves(fits))


@pytest.mark.parametrize('damping', [DAMPING, 0.0])
@pytest.mark.parametrize('only', [None, *structure.TYPES])
def test_repair_step_equals_the_closed_form_of_every_matrix(
  prune, only, damping
):
  cfg, params, masks, tokens = prune
  new_masks = further(cfg, masks, only)
  got, fits = repaired(params, masks, new_masks, tokens, cfg, damping)
  want, errors = model_repaired_by_hand(
    params, masks, new_masks, tokens, cfg, damping
  )
  conftest.check_close(got, want, 5e-3, 5e-4)
  assert fits.keys() == errors.keys()
  assert ('final' in fits) == (not cfg.tied)
  reads = {
    'heads': {'heads'},
    'ffn': {'ffn'},
    'stem': {'attn_in', 'ffn_in', 'final'},
  }
  for name, (without, error, used) in errors.items():
    fit = {key: x.tolist() for key, x in fits[name].items()}
    assert fit['error_without'] == pytest.approx(without, rel=1e-3)
    assert fit['error_with'] == pytest.approx(
      error, rel=1e-2, abs=1e-3 * without
    )
    assert fit['error_with'] <= fit['error_without']
    touched = only is None or name in reads[only]
    assert (fit['error_without'] > 0) == touched
    assert fit['damping'] == pytest.approx(used)
    assert any(used) == touched
  if only in ('heads', 'ffn'):
    same = 'w_down' if only == 'heads' else 'wo'
    for name in ('wq', 'wk', 'wv', 'w_gate', 'w_up', same):
      before, after = getattr(params.layers, name), getattr(got.layers, name)
      np.testing.assert_array_equal(before, after)
  np.testing.assert_array_equal(got.embed, params.embed)


def test_norms_give_what_they_gave_though_the_stem_is_narrower(prune):
  """As near as one factor for all tokens brings them, of one that all read."""
  cfg, params, masks, tokens = prune
  # A channel that every token has much of: what is left is divided by less.
  big = int(np.argmax(masks.stem))
  params = params.replace(embed=params.embed.at[:, big].set(1.0))
  new_masks = masks.replace(stem=masks.stem.at[big].set(False))
  got, _ = repaired(params, masks, new_masks, tokens, cfg)

  def normed(params, masks):
    x = jnp.asarray(params.embed)[tokens] * masks.stem
    scale = params.layers.attn_norm[0]
    given = model.rms_norm(x, scale, masks.stem, cfg.norm_eps)
    return as64(given)[..., np.asarray(new_masks.stem)]

  want = normed(params, masks)
  error = lambda params: np.square(normed(params, new_masks) - want).mean()
  assert error(got) < 0.2 * error(params)
  factor = as64(got.layers.attn_norm[0]) / as64(params.layers.attn_norm[0])
  assert (factor < 0.9).all() and np.ptp(factor) < 1e-5
  assert (got.final_norm < params.final_norm).all()


@pytest.mark.parametrize('damping', [DAMPING, 0.0])
def test_a_repair_commutes_with_a_shrink(prune, damping):
  """Dead slots, of which a narrow layer has many, weigh nothing in it."""
  cfg, params, masks, tokens = prune
  new_masks = further(cfg, masks)
  small = shrink.shrunk_config(
    masks, cfg, structure.Groups(heads=1, ffn=1, stem=1)
  )
  assert small.F < cfg.F and small.D < cfg.D
  kept = conftest.kept_indices(masks, conftest.make_scores(cfg), small)
  got, fits = repaired(
    conftest.take_params(params, kept),
    *(conftest.take_groups(x, kept) for x in (masks, new_masks)),
    tokens,
    small,
    damping,
  )
  whole, want = repaired(params, masks, new_masks, tokens, cfg, damping)
  conftest.check_close(got, conftest.take_params(whole, kept), 1e-4, 1e-5)
  # Errors are those of all outputs, dead ones too.
  for name, fit in fits.items():
    used = want[name]['damping']
    np.testing.assert_allclose(fit['damping'], used, rtol=1e-6)


@pytest.mark.parametrize('damping', [DAMPING, 0.0])
def test_a_repair_holds_the_activations_of_one_micro_batch(damping):
  """As a training step does, however many it fits."""

  def temporaries(count):
    params, masks = conftest.make_params(CFG), structure.all_alive(CFG)
    windows = jax.ShapeDtypeStruct((count, 4, 65), jnp.int32)
    compiled = steps.repair_step.lower(
      params, masks, masks, windows, cfg=CFG, damping=damping
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # A choice of damping takes two at least.
  assert temporaries(8) < 1.5 * temporaries(1 if damping else 2)


def test_one_compile_repairs_after_every_prune(prune):
  cfg, params, masks, tokens = prune
  repaired(params, masks, masks, tokens, cfg)
  size = steps.repair_step._cache_size()
  for only in structure.TYPES:
    repaired(params, masks, further(cfg, masks, only), tokens, cfg)
  assert steps.repair_step._cache_size() == size


def test_a_user_may_have_switched_float64_on(tx):
  """The state stays float32, and nothing is of two types."""
  cfg = UNTIED
  state, masks = make_state(cfg, tx), conftest.make_masks(cfg)
  tokens = micro_batches(cfg)
  wanted = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  with jax.enable_x64(True):
    for kind in ('fisher', 'random'):
      train = functools.partial(step, cfg=cfg, tx=tx, saliency=kind)
      got, _ = jax.eval_shape(train, state, tokens)
      assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == wanted, kind
    for damping in (DAMPING, 0.0):
      again = functools.partial(steps.repair_step, cfg=cfg, damping=damping)
      alive = state.prune.masks
      got, _ = jax.eval_shape(again, state.params, alive, masks, tokens)
      assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype('float32')}


def test_accumulation_equals_one_large_batch(tx):
  cfg = CFG
  one, numbers = step(make_state(cfg, tx), one_batch(cfg), cfg, tx)
  three, same = step(make_state(cfg, tx), micro_batches(cfg), cfg, tx)
  conftest.check_close(one.params, three.params, 1e-3, 1e-4)
  # An update of Adam hides much of a wrong gradient.
  conftest.check_close(one.opt_state, three.opt_state, 1e-3, 1e-5)
  conftest.check_close(numbers, same, 1e-4)


def test_more_micro_batches_are_no_larger_program(tx):
  """All go through one loop: to compile them costs what one does."""
  state = make_state(CFG, tx)
  products = [
    str(
      steps.train_step.trace(
        state, batch, cfg=CFG, tx=tx, recipe=RECIPE, score=True
      ).jaxpr
    ).count('dot_general[')
    for batch in (one_batch(CFG), micro_batches(CFG))
  ]
  assert products[0] == products[1] > 10


def test_without_scoring_the_update_is_the_same(tx):
  cfg = UNTIED
  tokens = micro_batches(cfg)
  scored, _ = step(make_state(cfg, tx), tokens, cfg, tx)
  plain, _ = step(make_state(cfg, tx), tokens, cfg, tx, score=False)
  conftest.check_close(scored.params, plain.params, 1e-5, 1e-6)
  assert int(plain.prune.count) == 0


def test_training_lowers_the_loss(tx):
  cfg = CFG
  tokens = one_batch(cfg)
  state = make_state(cfg, tx)
  losses = []
  for _ in range(12):
    state, numbers = step(state, tokens, cfg, tx)
    losses.append(float(numbers['loss']))
  assert losses[-1] < 0.9 * losses[0]


def test_sum_losses_counts_weighted_tokens_only():
  cfg = CFG
  params, masks = conftest.make_params(cfg), structure.all_alive(cfg)
  tokens = conftest.make_tokens(cfg)
  weight = np.zeros((2, 11), np.float32)
  weight[0, 3] = weight[1, 10] = 1
  losses = jax.jit(model.token_losses, static_argnums=3)(
    params, masks, tokens, cfg
  )
  got = steps.sum_losses(
    params, masks, tokens, weight, cfg=cfg, compute=COMPUTE
  )
  np.testing.assert_allclose(got, losses[0, 3] + losses[1, 10], rtol=1e-5)


def bits(tree):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize('cause', ['loss', 'gradient'])
@pytest.mark.parametrize('score', [True, False])
def test_a_step_that_is_not_finite_changes_nothing(tx, cause, score):
  """And is counted; one good step ends the row."""
  cfg = UNTIED
  state, batch = make_state(cfg, tx), micro_batches(cfg)
  step = functools.partial(
    steps.train_step, cfg=cfg, tx=tx, recipe=RECIPE, score=score
  )
  state, _ = step(state, batch)
  bad = batch
  if cause == 'loss':
    bad = batch.at[0, 0, -1].set(cfg.V)  # There is no such token.
  else:
    # The logits are what they were, their gradient's square overflows.
    scale = lambda p, by: p.replace(
      final_norm=p.final_norm * by, unembed=p.unembed / by
    )
    state = state.replace(params=scale(state.params, 2.0**80))
  kept = bits((state.params, state.opt_state, state.prune))
  for count in (1, 2):
    state, numbers = step(state, bad)
    assert bool(jnp.isfinite(numbers['loss'])) == (cause == 'gradient')
    assert bool(jnp.isfinite(numbers['grad_norm'])) == (cause == 'loss')
    assert bits((state.params, state.opt_state, state.prune)) == kept
    assert int(state.step) == 1 + count
    assert int(state.skipped) == int(state.in_a_row) == count
  if cause == 'gradient':
    state = state.replace(params=scale(state.params, 2.0**-80))
  after, _ = step(state, batch)
  assert [int(after.step), int(after.skipped), int(after.in_a_row)] == [4, 2, 0]

  # What was skipped leaves no trace in what follows.
  never = make_state(cfg, tx)
  for _ in range(2):
    never, _ = step(never, batch)
  same = lambda s: bits((s.params, s.opt_state, s.prune))
  assert same(after) == same(never)


def test_what_a_step_gets_is_not_kept_beside_what_it_gives(tx):
  state = make_state(CFG, tx)
  step(state, one_batch(CFG), CFG, tx)
  given = jax.tree.leaves((state.params, state.opt_state))
  assert all(x.is_deleted() for x in given)
  # A program of `repaired`.
  cfg = conftest.make_config(**conftest.CONFIGS['mha-tied-1'])
  params = conftest.copied(conftest.make_params(cfg))
  steps.repair_step(
    params, structure.all_alive(cfg), conftest.make_masks(cfg),
    conftest.make_tokens(cfg, 4).reshape(2, 2, -1), cfg=cfg, damping=DAMPING,
  )  # fmt: skip
  assert all(x.is_deleted() for x in jax.tree.leaves(params))


def test_the_newest_quarter_chooses_the_damping_of_an_output_matrix():
  """Of eight micro-batches two choose; then all of them fit it."""
  cfg = conftest.make_config(**conftest.CONFIGS['gqa-untied-3-biases-norms'])
  params, masks = conftest.make_params(cfg), structure.all_alive(cfg)
  new = conftest.make_masks(cfg, 9)
  tokens = conftest.make_tokens(cfg, 8, seed=2)
  got, fits = steps.repair_step(
    conftest.copied(params), masks, new, tokens.reshape(8, 1, -1),
    cfg=cfg, damping=0.0,
  )  # fmt: skip
  _, taps = conftest.forward(params, masks, tokens[:, :-1], cfg=cfg, taps=True)
  x, w = (np.asarray(a, np.float64) for a in (taps.final, params.unembed))
  keep = np.asarray(new.stem)
  older, newest, both = (a.reshape(-1, cfg.D) for a in (x[:6], x[6:], x))

  def error(damping):
    change = conftest.refitted(w, older, keep, damping) - w
    return np.square(newest @ change).sum()

  chosen = min(repair.CANDIDATES, key=error)
  fit = fits['final']
  assert float(fit['damping'][0]) == pytest.approx(chosen)
  want = conftest.refitted(w, both, keep, chosen)
  np.testing.assert_allclose(got.unembed, want, rtol=5e-3, atol=5e-4)
  lost = lambda m: np.square(both @ (m - w)).sum(-1).mean()
  assert float(fit['error_with']) == pytest.approx(lost(want), rel=1e-2)
  masked = np.where(keep[:, None], w, 0)
  assert float(fit['error_without']) == pytest.approx(lost(masked), rel=1e-3)
