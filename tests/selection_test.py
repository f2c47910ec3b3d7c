import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import errors
from effllm_jax import selection
from effllm_jax import structure
from tests import conftest

FREE = selection.Rules((1, 1, 1), (1, 1, 1), price_embedding=True)


def count_live(masks, cfg) -> int:
  """Counts live parameters one by one, out of the axis table."""
  counts = structure.map_axes(
    lambda letters, leaf: conftest.alive_entries(
      letters, leaf.shape, masks
    ).sum(),
    structure.shapes(cfg),
  )
  return int(sum(jax.tree.leaves(counts)))


def greedy(scores, masks, target, final, cfg, rules):
  """`select` as a person would write it: lists, Python integers, no rank."""
  masks = jax.tree.map(np.array, masks)
  s = jax.tree.map(lambda x: np.asarray(x, np.float64), scores)
  smallest, multiple = rules.smallest(), rules.multiple_of

  def size(w):
    rows = cfg.N * (w[0] * cfg.head_rows() + 3 * w[1]) + cfg.stem_rows()
    return w[2] * rows

  while True:
    w = (
      int(masks.heads[0].sum()),
      int(masks.ffn[0].sum()),
      int(masks.stem.sum()),
    )
    is_open = [x % m != 0 for x, m in zip(w, multiple, strict=True)]
    unaligned = any(
      o and x > f for o, x, f in zip(is_open, w, smallest, strict=True)
    )
    if size(w) <= target and not (target == final and unaligned):
      return masks
    landed = [x - x % m for x, m in zip(w, multiple, strict=True)]
    blocks = {}
    for i in range(3):
      after = list(landed)
      after[i] -= multiple[i]
      if after[i] >= smallest[i]:
        blocks[i] = size(after)
    usable = [i for i in range(3) if is_open[i] and w[i] > smallest[i]]
    if size(landed) > final and blocks:
      fitting = [i for i in blocks if blocks[i] >= final]
      most = max(blocks.values())
      opens = fitting or [i for i in blocks if blocks[i] == most]
      usable += [i for i in opens if not is_open[i]]
    if not usable:
      return masks
    moves = {}
    for i in usable:
      if i == 2:
        live = np.flatnonzero(masks.stem)
        d = live[np.argmin(s.stem[live])]
        rows = size(w) - size((w[0], w[1], w[2] - 1))
        if not rules.price_embedding:
          rows -= cfg.V * (1 if cfg.tied else 2)
        moves[i] = (s.stem[d] / rows, d)
      else:
        mask, score = (masks.heads, s.heads) if i == 0 else (masks.ffn, s.ffn)
        victims, prices = [], []
        for n in range(cfg.N):
          live = np.flatnonzero(mask[n])
          victim = live[np.argmin(score[n][live])]
          cost = w[2] * (cfg.head_rows() if i == 0 else 3)
          victims.append(victim)
          prices.append(score[n][victim] / cost)
        moves[i] = (np.mean(prices), victims)
    best = min(moves, key=lambda i: moves[i][0])
    victims = moves[best][1]
    if best == 2:
      masks.stem[victims] = False
    else:
      mask = masks.heads if best == 0 else masks.ffn
      for n, victim in enumerate(victims):
        mask[n, victim] = False


def run(scores, masks, target, final, cfg, rules):
  return selection.select(
    scores, masks, selection.split(target), selection.split(final), cfg, rules
  )


def test_costs_are_exactly_what_a_removal_saves(cfg):
  """Invariant 4."""
  masks = conftest.make_masks(cfg)
  before = count_live(masks, cfg)
  assert selection.live_params(masks, cfg) == before
  costs = selection.costs(masks, cfg)
  for name in structure.TYPES:
    mask = getattr(masks, name)
    for index in np.ndindex(mask.shape):
      fewer = masks.replace(**{name: mask.at[index].set(False)})
      saved = before - count_live(fewer, cfg)
      assert int(getattr(costs, name)[index]) == saved, (name, index)


def test_live_params_of_a_whole_model(cfg):
  assert selection.live_params(structure.all_alive(cfg), cfg) == (
    cfg.num_params()
  )


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize(
  'rules',
  [
    FREE,
    selection.Rules((1, 3, 5), (1, 4, 4), price_embedding=False),
    selection.Rules((2, 1, 1), (1, 5, 3), price_embedding=True),
  ],
  ids=['free', 'multiples', 'odd-multiples'],
)
def test_equals_the_brute_force_greedy(rules, seed):
  cfg = conftest.make_config(K=3, G=2, N=3, F=24, D=16)
  rng = np.random.default_rng(seed)
  scores = conftest.make_scores(cfg, seed)
  # So that now one type is the cheapest, now another.
  scores = jax.tree.map(
    lambda s, f: s * f,
    scores,
    structure.Groups(*np.float32(10.0 ** rng.uniform(-1, 1, 3))),
  )
  heads, ffn, stem = rules.smallest()
  least = dataclasses.replace(cfg, K=heads, F=ffn, D=stem).num_params()
  final = int(rng.integers(least, cfg.num_params()))
  masks = structure.all_alive(cfg)
  for target in np.linspace(cfg.num_params(), final, 4)[1:]:
    want = greedy(scores, masks, int(target), final, cfg, rules)
    masks = run(scores, masks, int(target), final, cfg, rules)
    jax.tree.map(np.testing.assert_array_equal, masks, want)
    # Invariant 5.
    assert selection.live_params(masks, cfg) <= int(target)
  widths = selection.live_widths(masks)
  for name, multiple, floor in zip(
    structure.TYPES, rules.multiple_of, rules.smallest(), strict=True
  ):
    assert (widths[name] % multiple == 0).all()
    assert (widths[name] >= floor).all()


def test_final_size_wastes_less_than_the_smallest_block():
  """SmolLM2-135M lands at or under any target, and not far under it."""
  cfg = conftest.make_config(V=49152, D=576, N=30, K=3, G=3, H=64, F=1536)
  rules = selection.Rules((1, 64, 64), (1, 64, 64), price_embedding=True)
  block = cfg.N * 3 * 64 * cfg.D
  for seed, target in enumerate((128_000_000, 107_600_000, 90_000_000)):
    masks = run(
      conftest.make_scores(cfg, seed),
      structure.all_alive(cfg),
      target,
      target,
      cfg,
      rules,
    )
    live = selection.live_params(masks, cfg)
    assert target - block < live <= target
    assert {
      t: set((w % 64).ravel())
      for t, w in selection.live_widths(masks).items()
      if t != 'heads'
    } == {'ffn': {0}, 'stem': {0}}


def test_dead_groups_never_revive(cfg):
  """Invariant 3, second half: whatever their score says."""
  masks = conftest.make_masks(cfg, uniform=True)
  scores = jax.tree.map(
    lambda s, m: jnp.where(m, s, 100.0), conftest.make_scores(cfg), masks
  )
  target = int(selection.live_params(masks, cfg) * 0.8)
  after = run(scores, masks, target, target, cfg, FREE)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a & ~b, False), after, masks
  )
  assert selection.live_params(after, cfg) <= target


def test_targets_do_not_retrace(cfg):
  scores, masks = conftest.make_scores(cfg), structure.all_alive(cfg)
  run(scores, masks, cfg.num_params(), 0, cfg, FREE)
  size = selection.select._cache_size()
  for share in (0.9, 0.7, 0.5):
    target = int(share * cfg.num_params())
    masks = run(scores, masks, target, 0, cfg, FREE)
  assert selection.select._cache_size() == size


@pytest.mark.parametrize(
  'count', [0, 1, 2**15 - 1, 2**15, 134_515_008, 2**31, 8_030_261_248]
)
def test_floor_div_is_exact_beyond_32_bits(count):
  for divisor in (1, 2, 3, 576, 4095, 4096, 32767):
    got = selection._floor_div(
      jnp.asarray(selection.split(count)), jnp.int32(divisor)
    )
    assert int(got) == min(count // divisor, 2**31 - 1)


def test_select_is_exact_above_two_to_the_31():
  """An 8B model: int32 would overflow; the target is met to one channel."""
  cfg = conftest.make_config(
    V=128256, D=4096, N=2, K=8, G=4, H=128, F=14336, tied=False
  )
  cfg = dataclasses.replace(cfg, N=32)
  assert cfg.num_params() > 2**32
  target = cfg.num_params() - 5 * cfg.N * 3 * cfg.D
  masks = run(
    jax.tree.map(
      lambda m, s: jnp.full(m.shape, s),
      structure.all_alive(cfg),
      structure.Groups(heads=1e9, ffn=1.0, stem=1e9),
    ),
    structure.all_alive(cfg),
    target,
    target,
    cfg,
    FREE,
  )
  assert selection.live_params(masks, cfg) == target


def test_the_schedule_is_a_line_in_tokens():
  line = selection.Schedule(begin=100, end=300, start=1000, target=400)
  sizes = [line.at(t) for t in (0, 100, 200, 299, 300, 10_000)]
  assert sizes == [1000, 1000, 700, 403, 400, 400]


def test_prices_are_scores_per_saved_parameter(cfg):
  masks, scores = conftest.make_masks(cfg), conftest.make_scores(cfg)
  prices = selection.prices(scores, masks, cfg, FREE)
  costs = selection.costs(masks, cfg)
  jax.tree.map(
    lambda p, s, c, m: np.testing.assert_allclose(
      np.asarray(p)[np.asarray(m)], (s / jnp.maximum(c, 1))[m], rtol=1e-6
    ),
    prices,
    scores,
    costs,
    masks,
  )
  # Scores linger in the running average; the dead have no price.
  jax.tree.map(
    lambda p, m: np.testing.assert_array_equal(
      np.asarray(p)[~np.asarray(m)], 0
    ),
    prices,
    masks,
  )
  means = selection.mean_prices(scores, masks, cfg, FREE)
  assert float(means.ffn) == pytest.approx(
    float(np.asarray(prices.ffn)[np.asarray(masks.ffn)].mean()), rel=1e-5
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(target=10**9), 'is not below the source model'),
    (dict(target=1), r'is below [\d,]+, the size at the floors'),
    (dict(floors=(0, 1, 1)), 'prune.floors.heads 0 is not between 1 and'),
    (dict(multiple_of=(1, 64, 1)), 'prune.multiple_of.ffn 64 is not between'),
  ],
)
def test_impossible_targets_are_refused(change, message):
  cfg = conftest.make_config()
  arguments = dict(
    target=3000,
    floors=(1, 1, 1),
    multiple_of=(1, 1, 1),
    price_embedding=True,
  )
  arguments |= change
  target = arguments.pop('target')
  with pytest.raises(errors.InputError, match=message):
    selection.check_target(cfg, selection.Rules(**arguments), target)


def test_the_embedding_can_be_left_out_of_the_stem_price():
  cfg = conftest.make_config()
  masks, scores = conftest.make_masks(cfg), conftest.make_scores(cfg)
  without = selection.prices(
    scores, masks, cfg, dataclasses.replace(FREE, price_embedding=False)
  )
  counted = selection.prices(scores, masks, cfg, FREE)
  cost = np.asarray(selection.costs(masks, cfg).stem, np.float64)
  alive = np.asarray(masks.stem)
  np.testing.assert_allclose(
    np.asarray(without.stem / counted.stem)[alive],
    (cost / (cost - cfg.V))[alive],
    rtol=1e-5,
  )
  conftest.check_close(without.ffn, counted.ffn)
