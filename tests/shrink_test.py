import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effllm_jax import optimizers
from effllm_jax import shrink
from effllm_jax import state as state_lib
from effllm_jax import steps
from effllm_jax import structure
from tests import conftest

ONE = structure.Groups(heads=1, ffn=1, stem=1)


def make_optimizer():
  rate = optimizers.learning_rate('cosine', 1e-2, 1e-3, 2, 0, 10)
  return optimizers.optimizer(rate, 0.9, 0.95, 0.1, 0.5)


def test_survivors_are_ordered_by_descending_score(cfg):
  masks, scores = conftest.make_masks(cfg), conftest.make_scores(cfg)
  small = shrink.shrunk_config(masks, cfg, ONE)
  kept = conftest.kept_indices(masks, scores, small)
  for n in range(cfg.N):
    alive = np.flatnonzero(np.asarray(masks.ffn[n]))
    want = alive[np.argsort(-np.asarray(scores.ffn[n])[alive])]
    got = np.asarray(kept.ffn[n])
    np.testing.assert_array_equal(got[: len(alive)], want)
    # A narrower layer is filled up with slots that are dead.
    assert not np.asarray(masks.ffn[n])[got[len(alive) :]].any()
  assert int(masks.ffn.sum(-1).max()) == small.F


def test_quantum_rounds_up_and_never_grows():
  cfg = conftest.make_config(F=20, D=16)
  masks = structure.all_alive(cfg)
  masks = masks.replace(
    ffn=masks.ffn.at[:, 9:].set(False), stem=masks.stem.at[13:].set(False)
  )
  quantum = structure.Groups(heads=1, ffn=4, stem=128)
  small = shrink.shrunk_config(masks, cfg, quantum)
  assert (small.F, small.D, small.K) == (12, 16, cfg.K)


def test_where_every_layer_lost_a_block_a_dead_slot_stays():
  """No array has an axis of nothing."""
  cfg = conftest.make_config()
  alive = structure.all_alive(cfg)
  masks = alive.replace(
    heads=jnp.zeros_like(alive.heads), ffn=jnp.zeros_like(alive.ffn)
  )
  small = shrink.shrunk_config(masks, cfg, ONE)
  assert (small.K, small.F, small.D) == (1, 1, cfg.D)


def test_survivors_of_one_score_keep_their_order(cfg):
  masks = conftest.make_masks(cfg)
  equal = jax.tree.map(lambda m: jnp.ones(m.shape), masks)
  small = shrink.shrunk_config(masks, cfg, ONE)
  kept = conftest.kept_indices(masks, equal, small)
  for name in structure.TYPES:
    rows = (np.atleast_2d(getattr(x, name)) for x in (masks, kept))
    for alive, got in zip(*rows, strict=True):
      want = np.flatnonzero(alive)
      np.testing.assert_array_equal(got[: len(want)], want)


@pytest.mark.parametrize('score', [np.nan, -np.inf, np.inf])
def test_what_is_alive_stays_whatever_its_score(cfg, score):
  """A score of a user's own may be no number; its group is alive."""
  masks = conftest.make_masks(cfg)
  scores = jax.tree.map(
    lambda m: jnp.where(jnp.arange(m.shape[-1]) % 2, score, 1.0) + 0 * m, masks
  )
  small = shrink.shrunk_config(masks, cfg, ONE)
  kept = conftest.kept_indices(masks, scores, small)
  taken = shrink.take_groups(masks, kept)
  for name in structure.TYPES:
    before, after = (getattr(x, name).sum(-1) for x in (masks, taken))
    np.testing.assert_array_equal(before, after)


def test_numpy_takes_what_jax_takes_and_compiles_nothing(cfg):
  masks, params = conftest.make_masks(cfg), conftest.make_params(cfg)
  small = shrink.shrunk_config(masks, cfg, ONE)
  kept = conftest.kept_indices(masks, conftest.make_scores(cfg), small)
  host = jax.tree.map(np.asarray, (params, masks))
  with conftest.counted_programs() as programs:
    got = shrink.take_params(host[0], kept), shrink.take_groups(host[1], kept)
  assert not programs
  want = conftest.take_params(params, kept), conftest.take_groups(masks, kept)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))


def test_an_optimizer_step_commutes_with_shrinking(cfg):
  """Invariant 2: clip, AdamW with decay, moments that are not zero."""
  masks = conftest.make_masks(cfg)
  scores = conftest.make_scores(cfg)
  tx = make_optimizer()
  params = conftest.make_params(cfg)
  small = shrink.shrunk_config(masks, cfg, ONE)
  kept = conftest.kept_indices(masks, scores, small)
  small_masks = conftest.take_groups(masks, kept)

  @jax.jit
  def update(params, opt_state, grads):
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, opt_state, params, norm=norm)
    return optax.apply_updates(params, updates), opt_state

  def grad(params, masks, cfg, seed):
    tokens = conftest.make_tokens(cfg, seed=seed)
    return conftest.loss_and_grad(params, masks, tokens, cfg=cfg)[1]

  # Two steps with everything alive, so that dead groups have moments.
  opt_state = tx.init(params)
  for seed in range(2):
    grads = grad(params, structure.all_alive(cfg), cfg, seed)
    params, opt_state = update(params, opt_state, grads)

  small_params = conftest.take_params(params, kept)
  letters = state_lib.axes(state_lib.abstract_state(cfg, tx), tx).opt_state
  small_opt = shrink.take(letters, opt_state, kept)
  for seed in range(2, 4):
    params, opt_state = update(
      params, opt_state, grad(params, masks, cfg, seed)
    )
    small_params, small_opt = update(
      small_params, small_opt, grad(small_params, small_masks, small, seed)
    )
  # Adam divides by the root of tiny second moments: 1e-2 is the step size.
  conftest.check_close(
    conftest.take_params(params, kept), small_params, 1e-3, 2e-5
  )
  conftest.check_close(
    shrink.take(letters, opt_state, kept), small_opt, 5e-3, 1e-5
  )


def test_shrink_step_takes_everything_along(cfg):
  tx = make_optimizer()
  state = state_lib.fresh_state(conftest.make_params(cfg), cfg, tx)
  masks, scores = conftest.make_masks(cfg), conftest.make_scores(cfg)
  state = state.replace(
    prune=state.prune.replace(masks=masks, scores=scores, count=jnp.int32(5))
  )
  small = shrink.shrunk_config(masks, cfg, ONE)
  after, kept = steps.shrink_step(state, cfg=small, tx=tx)
  want = state_lib.abstract_state(small, tx)
  jax.tree.map(
    lambda x, w: np.testing.assert_equal(
      (x.shape, x.dtype), (w.shape, w.dtype)
    ),
    after,
    want,
  )
  # The origin names the source group whose parameters sit in each slot.
  conftest.check_close(after.prune.origin, kept)
  conftest.check_close(
    after.prune.scores.stem, scores.stem[after.prune.origin.stem]
  )
  np.testing.assert_array_equal(
    after.params.embed, state.params.embed[:, np.asarray(kept.stem)]
  )
  assert int(after.prune.count) == 5


@pytest.mark.parametrize('letters', ['NDKGH', 'NKGHD', 'NFD', 'VD', 'DV'])
def test_take_equals_plain_indexing(letters):
  cfg = conftest.make_config(N=2, K=3, F=6, D=5, G=2, H=2, V=7)
  rng = np.random.default_rng(0)
  kept = structure.Groups(
    heads=jnp.array([[2, 0], [1, 2]]),
    ffn=jnp.array([[5, 1, 0], [2, 3, 4]]),
    stem=jnp.array([4, 0, 2]),
  )
  x = rng.standard_normal([getattr(cfg, a) for a in letters])
  got = np.asarray(shrink.take(letters, jnp.asarray(x), kept))
  for index in np.ndindex(got.shape):
    at = dict(zip(letters, index, strict=True))
    source = tuple(
      int(kept.stem[i]) if a == 'D'
      else int(kept.heads[at['N'], i]) if a == 'K'
      else int(kept.ffn[at['N'], i]) if a == 'F'
      else i
      for a, i in zip(letters, index, strict=True)
    )  # fmt: skip
    assert got[index] == np.float32(x[source])
