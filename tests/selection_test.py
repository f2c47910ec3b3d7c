"""Selection against a greedy of plain lists, and the schedule's properties."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effllm_jax import budgets
from effllm_jax import errors
from effllm_jax import rules as rules_lib
from effllm_jax import selection
from effllm_jax import structure
from tests import budgets_test
from tests import conftest

FREE = rules_lib.Rules('uniform', (1, 1, 1), (1, 1, 1), price_embedding=True)
RAGGED = rules_lib.Rules('ragged', (0, 0, 1), (1, 1, 1), price_embedding=True)
RULES = {
  'free': FREE,
  'multiples': rules_lib.Rules('uniform', (1, 3, 5), (1, 4, 4), False),
  'odd-multiples': rules_lib.Rules('uniform', (2, 1, 1), (1, 5, 3), True),
  # A block of channels saves more than one of heads.
  'large-multiples': rules_lib.Rules('uniform', (1, 12, 4), (1, 12, 4), True),
  'ragged': RAGGED,
  'ragged-multiples': rules_lib.Rules('ragged', (0, 0, 5), (2, 4, 4), False),
  'ragged-floors': rules_lib.Rules('ragged', (1, 5, 3), (2, 4, 1), True),
}
# A fit may say that heads and channels cost a little even without a stem.
LATENCY = budgets.Cost(
  'ms', 'ms', 10**12,
  budgets.Form(
    head=3 * 10**9, ffn=2 * 10**8, stem=10**10, head_fixed=10**10,
    ffn_fixed=10**7, fixed=4 * 10**11, unpriced_stem=10**10,
  ),
)  # fmt: skip
BUDGETS = {
  'params': budgets.params,
  'bytes': lambda cfg: budgets.stored_bytes(cfg, 'q4_0'),
  'flops': lambda cfg: budgets.flops(cfg, 500),
  'ms': lambda cfg: LATENCY,
}


def greedy(scores, masks, target, final, rules, cost):
  """`select` as a person would write it: lists, Python integers, no rank."""
  plan, other = (
    _Lists(scores, masks, final, rules, cost, by_block)
    for by_block in (False, True)
  )
  for x in (plan, other):
    least = zip(rules.smallest(), x.masks, strict=True)
    x.take(final, [np.minimum(m.sum(-1), n).sum() for n, m in least])
    x.take_back()
  heads, ffn, stem = (int(getattr(masks, t).sum()) for t in structure.TYPES)
  layers = len(masks.heads)
  without = (
    cost.size(heads - layers * rules.multiple_of[0], ffn, stem),
    cost.size(heads, ffn - layers * rules.multiple_of[1], stem),
  )
  large = rules.policy == 'uniform' and without[1] < without[0]
  if large and other.lost() < plan.lost() / 2:
    plan = other
  made = _Lists(scores, masks, final, rules, cost)
  made.take(target, plan.counts())
  heads, ffn, stem = made.masks
  return structure.Groups(heads=heads, ffn=ffn, stem=stem[0])


class _Lists:
  """Masks, and the moves that they have seen."""

  def __init__(self, scores, masks, final, rules, cost, by_block=False):
    self.masks = [
      np.atleast_2d(np.array(getattr(masks, t))) for t in structure.TYPES
    ]
    self.before = [m.copy() for m in self.masks]
    self.by_block = by_block
    self.scores = [
      np.atleast_2d(np.asarray(getattr(scores, t), np.float64))
      for t in structure.TYPES
    ]
    self.final, self.rules, self.cost = final, rules, cost
    # Whether a move takes a whole block of one layer.
    self.blockwise = [rules.policy == 'ragged' and i < 2 for i in range(3)]
    self.made = [[], [], []]

  def counts(self):
    return [int(m.sum()) for m in self.masks]

  def lost(self):
    return sum(
      s[before & ~m].sum()
      for s, before, m in zip(self.scores, self.before, self.masks, strict=True)
    )

  def block_of(self, i):
    """All that goes with the next move of type i, gone already or not."""
    multiple = self.rules.multiple_of[i]
    block = (int(self.masks[i][0].sum()) - 1) // multiple
    found = []
    for n, before in enumerate(self.before[i]):
      live = np.flatnonzero(before)
      live = sorted(live, key=lambda x: -self.scores[i][n][x])
      found += [(n, x) for x in live[block * multiple :][:multiple]]
    return found

  def lowest(self, i, n, count):
    live = np.flatnonzero(self.masks[i][n])
    live = sorted(live, key=lambda x: self.scores[i][n][x])
    return [(n, x) for x in live[:count]]

  def price(self, i, groups):
    counts = self.counts()
    fewer = list(counts)
    fewer[i] -= 1
    saved = self.cost.size(*counts) - self.cost.size(*fewer)
    if i == 2 and not self.rules.price_embedding:
      saved -= self.cost.form.unpriced_stem
    if self.by_block and not self.blockwise[i]:
      groups = self.block_of(i)
    mean = np.mean([self.scores[i][g] for g in groups])
    return mean / saved if saved else 1e300

  def best_move(self, i, least):
    """The groups that one move of type i would take, or None."""
    mask, multiple = self.masks[i], self.rules.multiple_of[i]
    if not self.blockwise[i]:
      groups = [g for n in range(len(mask)) for g in self.lowest(i, n, 1)]
      return groups if mask.sum() > least else None
    if mask.sum() - multiple < least:
      return None
    blocks = [
      self.lowest(i, n, multiple)
      for n in range(len(mask))
      if mask[n].sum() - multiple >= self.rules.smallest()[i]
    ]
    return min(blocks, key=lambda b: self.price(i, b), default=None)

  def take(self, target, least):
    """Until the size is `target`; leaves `least` groups of each type."""
    multiple, size = self.rules.multiple_of, self.cost.size
    while True:
      counts = self.counts()
      widths = [int(m[0].sum()) for m in self.masks]
      layers = [len(m) for m in self.masks]
      is_open = [
        not self.blockwise[i] and widths[i] % multiple[i] for i in range(3)
      ]
      unaligned = any(is_open[i] and counts[i] > least[i] for i in range(3))
      moves = [self.best_move(i, least[i]) for i in range(3)]
      if size(*counts) <= target and not (target == self.final and unaligned):
        return
      landed = list(counts)
      for i in range(3):
        if is_open[i]:
          landed[i] -= layers[i] * (widths[i] % multiple[i])
      blocks = {}
      for i in range(3):
        after = list(landed)
        after[i] -= multiple[i] * (1 if self.blockwise[i] else layers[i])
        room = moves[i] if self.blockwise[i] else after[i] >= least[i]
        if room and size(*after) < size(*landed):
          blocks[i] = size(*after)
      usable = [i for i in range(3) if is_open[i] and moves[i]]
      if size(*landed) > self.final and blocks:
        fitting = [i for i in blocks if blocks[i] >= self.final]
        most = max(blocks.values())
        opens = fitting or [i for i in blocks if blocks[i] == most]
        if self.by_block:
          opens = blocks
        usable += [i for i in opens if not is_open[i]]
      if not usable:
        return
      worth = {i: self.price(i, moves[i]) for i in sorted(usable)}
      for i in worth:
        if self.by_block and not is_open[i]:
          saved = size(*landed) - blocks[i]
          worth[i] *= saved / min(saved, size(*landed) - self.final)
      best = min(worth, key=worth.get)
      for group in moves[best]:
        self.masks[best][group] = False
      self.made[best].append(moves[best])

  def take_back(self):
    """Whole blocks, by the price of the last move, while they fit."""
    while True:
      prices = {}
      for i in range(3):
        n = 1 if self.blockwise[i] else self.rules.multiple_of[i]
        more = self.counts()
        more[i] += sum(len(move) for move in self.made[i][-n:])
        if len(self.made[i]) >= n and self.cost.size(*more) <= self.final:
          prices[i] = self.price(i, self.made[i][-1]), n
      if not prices:
        return
      best = max(sorted(prices), key=lambda i: prices[i][0])
      for _ in range(prices[best][1]):
        for group in self.made[best].pop():
          self.masks[best][group] = True


def varied_scores(cfg, seed):
  """So that now one type is the cheapest, now another."""
  factors = 10.0 ** np.random.default_rng(seed).uniform(-1, 1, 3)
  return jax.tree.map(
    lambda s, f: s * f,
    conftest.make_scores(cfg, seed),
    structure.Groups(*np.float32(factors)),
  )


def least(cfg, rules, cost) -> int:
  heads, ffn, stem = rules.smallest()
  return cost.of_config(dataclasses.replace(cfg, K=heads, F=ffn, D=stem))


def savings(masks, cost) -> structure.Groups:
  """Units that the removal of one live group of each type saves."""
  live = (int(getattr(masks, t).sum()) for t in structure.TYPES)
  return structure.Groups(*cost.form.savings(*live))


@pytest.mark.parametrize('kind', BUDGETS)
def test_costs_are_exactly_what_a_removal_saves(cfg, kind):
  """Invariant 4; for parameters, counted one by one."""
  cost = BUDGETS[kind](cfg)
  masks = conftest.make_masks(cfg)
  costs = savings(masks, cost)
  size = cost.live
  if kind == 'params':
    size = lambda m: budgets_test.count_live(m, cfg)
    assert selection.live_params(masks, cfg) == size(masks)
  before = size(masks)
  for name in structure.TYPES:
    mask = getattr(masks, name)
    for index in np.ndindex(mask.shape):
      fewer = masks.replace(**{name: mask.at[index].set(False)})
      saved = before - size(fewer)
      want = getattr(costs, name) if mask[index] else 0
      assert saved == want, (name, index)


def test_live_params_of_a_whole_model(cfg):
  assert selection.live_params(structure.all_alive(cfg), cfg) == (
    cfg.num_params()
  )


def test_an_extent_ends_at_the_last_live_slot():
  """Whatever is dead in front of it; 0 where nothing is alive."""
  masks = structure.Groups(
    heads=np.array([[0, 1, 0], [0, 0, 0]], bool),
    ffn=np.array([[1, 0, 0, 1], [0, 1, 0, 0]], bool),
    stem=np.array([0, 1, 1, 0, 0], bool),
  )
  found = {t: x.tolist() for t, x in selection.extents(masks).items()}
  assert found == {'heads': [2, 0], 'ffn': [4, 2], 'stem': 3}


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('kind', BUDGETS)
@pytest.mark.parametrize('name', RULES)
def test_equals_the_brute_force_greedy(name, kind, seed):
  cfg = conftest.make_config(K=4, G=2, N=3, F=24, D=16)
  rules, cost = RULES[name], BUDGETS[kind](cfg)
  rng = np.random.default_rng(seed)
  scores = varied_scores(cfg, seed)
  dense = cost.of_config(cfg)
  final = int(rng.integers(least(cfg, rules, cost), dense))
  rules_lib.check_target(cfg, rules, cost, final)
  masks = structure.all_alive(cfg)
  for target in np.linspace(dense, final, 4)[1:]:
    target = final if target == final else int(target)
    want = greedy(scores, masks, target, final, rules, cost)
    after = selection.select(scores, masks, target, final, rules, cost)
    jax.tree.map(np.testing.assert_array_equal, after, want)
    # Invariants 5 and 3.
    assert cost.live(after) <= target
    assert not any(
      jax.tree.leaves(jax.tree.map(lambda a, b: (a & ~b).any(), after, masks))
    )
    masks = after
  # Scores did not change: the prunes went where one cut goes, and no block that
  # was taken has room within the target.
  once = greedy(scores, structure.all_alive(cfg), final, final, rules, cost)
  jax.tree.map(np.testing.assert_array_equal, masks, once)
  blocks = np.array(rules.multiple_of) * (cfg.N, cfg.N, 1)
  if rules.policy == 'ragged':
    blocks[:2] //= cfg.N
  left = [int(getattr(masks, t).sum()) for t in structure.TYPES]
  for i, whole in enumerate((cfg.N * cfg.K, cfg.N * cfg.F, cfg.D)):
    fuller = list(left)
    fuller[i] += int(blocks[i])
    assert fuller[i] > whole or cost.size(*fuller) > final
  widths = selection.live_widths(masks)
  for type_, multiple, floor in zip(
    structure.TYPES, rules.multiple_of, rules.smallest(), strict=True
  ):
    assert (widths[type_] % multiple == 0).all()
    assert (widths[type_] >= floor).all()
  if rules.policy == 'uniform':
    assert len(set(widths['ffn'])) == len(set(widths['heads'])) == 1


def trial(i, scores, masks, saved, rules, cost):
  """Masks without the fewest moves of type `i` that save as much."""
  name = structure.TYPES[i]
  mask = np.atleast_2d(np.array(getattr(masks, name)))
  score = np.atleast_2d(np.asarray(getattr(scores, name), np.float64))
  counts = [int(getattr(masks, t).sum()) for t in structure.TYPES]
  blockwise = rules.policy == 'ragged' and i < 2
  block = rules.multiple_of[i] if blockwise else 1
  floor = rules.smallest()[i]
  one = [x - (j == i) for j, x in enumerate(counts)]
  worth = cost.size(*counts) - cost.size(*one)
  if i == 2 and not rules.price_embedding:
    worth -= cost.form.unpriced_stem
  lowest = lambda n: sorted(np.flatnonzero(mask[n]), key=lambda x: score[n][x])
  won, moved = 0, False
  while (worth > 0 and won < saved) or not moved:
    rooms = [n for n, row in enumerate(mask) if row.sum() - block >= floor]
    if not rooms:
      break
    if blockwise:
      mean = lambda n: np.mean(score[n][lowest(n)[:block]])
      rooms = [min(rooms, key=mean)]
    for n in rooms:
      mask[n][lowest(n)[:block]] = False
    won, moved = won + worth * block * len(rooms), True
  return masks.replace(**{name: mask.reshape(getattr(masks, name).shape)})


@pytest.mark.parametrize('kind', ['params', 'ms'])
@pytest.mark.parametrize('name', RULES)
def test_a_trial_takes_one_type_alone(name, kind):
  cfg = conftest.make_config(K=4, G=2, N=3, F=24, D=16)
  rules, cost = RULES[name], BUDGETS[kind](cfg)
  scores, masks = varied_scores(cfg, 0), structure.all_alive(cfg)
  final = least(cfg, rules, cost)
  for share in (0.001, 0.1, 0.5, 2.0):
    saved = max(int(share * cost.live(masks)), 1)
    tried = selection.trials(scores, masks, saved, rules, cost)
    jax.tree.map(lambda x, m: np.testing.assert_array_equal(x[0], m),
                 tried, masks)  # fmt: skip
    for i in range(3):
      want = trial(i, scores, masks, saved, rules, cost)
      got = jax.tree.map(lambda x, i=i: x[i + 1], tried)
      jax.tree.map(np.testing.assert_array_equal, got, want)
    if share == 0.001:
      # One move of each at least.
      for i, name in enumerate(structure.TYPES):
        assert (getattr(tried, name)[i + 1] != getattr(masks, name)).any()
    # The next ones are of what a prune has left.
    target = max(int(0.8 * cost.live(masks)), final)
    masks = selection.select(scores, masks, target, final, rules, cost)


@pytest.mark.parametrize('name', ['multiples', 'ragged'])
def test_a_trial_of_what_saves_nothing_is_one_move(name):
  """However much a prune would save: no number of heads does."""
  cfg = conftest.make_config(K=4, G=2, N=3, F=24, D=16)
  free = LATENCY.form._replace(head=0, head_fixed=0)
  cost = dataclasses.replace(LATENCY, form=free)
  scores, masks = varied_scores(cfg, 0), structure.all_alive(cfg)
  saved = cost.live(masks) // 2
  tried = selection.trials(scores, masks, saved, RULES[name], cost)
  want = trial(0, scores, masks, saved, RULES[name], cost)
  np.testing.assert_array_equal(tried.heads[1], want.heads)
  moved = cfg.N if RULES[name].policy == 'uniform' else 1
  assert int(want.heads.sum()) == cfg.N * cfg.K - moved


@pytest.mark.parametrize('name', RULES)
def test_the_smallest_target_gives_the_floors(name):
  """And every target above it can be met; nothing is left to take."""
  cfg = conftest.make_config(K=4, G=2, N=3, F=24, D=16)
  rules, cost = RULES[name], budgets.flops(cfg, 100)
  final = least(cfg, rules, cost)
  masks = selection.select(
    varied_scores(cfg, 0), structure.all_alive(cfg), final, final, rules, cost
  )
  assert cost.live(masks) == final
  for widths, floor in zip(
    selection.live_widths(masks).values(), rules.smallest(), strict=True
  ):
    assert set(np.ravel(widths)) == {floor}


def test_ragged_layers_lose_whole_blocks():
  """Floor 0: the layer that nothing depends on goes, the others stay."""
  cfg = conftest.make_config(K=4, G=1, N=3, F=24, D=16)
  rules = dataclasses.replace(RAGGED, multiple_of=(1, 8, 1))
  cost = budgets.params(cfg)
  scores = conftest.make_scores(cfg)
  scores = structure.Groups(
    heads=scores.heads.at[1].multiply(1e-3),
    ffn=scores.ffn.at[2].multiply(1e-3),
    stem=scores.stem * 1e3,
  )
  layer = cfg.D * (cfg.K * cfg.head_rows() + 3 * cfg.F)
  target = cfg.num_params() - layer
  masks = selection.select(
    scores, structure.all_alive(cfg), target, target, rules, cost
  )
  widths = selection.live_widths(masks)
  assert widths['heads'].tolist() == [4, 0, 4]
  assert widths['ffn'].tolist() == [24, 24, 0]
  assert cost.live(masks) == target
  # With floors, the best of these layers stay, in whole blocks.
  rules = dataclasses.replace(rules, floors=(1, 5, 1))
  masks = selection.select(
    scores, structure.all_alive(cfg), target, target, rules, cost
  )
  widths = selection.live_widths(masks)
  assert widths['heads'][1] == 1
  assert widths['ffn'][2] == 8
  best = np.argsort(np.asarray(scores.ffn[2]))[-8:]
  assert np.asarray(masks.ffn[2])[best].all()
  assert masks.heads[1, np.argmax(scores.heads[1])]


def test_ragged_goes_on_after_a_shrink():
  """Arrays whose width is on no multiple, with dead slots in some layers."""
  cfg = conftest.make_config(K=3, G=1, N=2, F=10, D=16)
  rules = dataclasses.replace(RAGGED, multiple_of=(2, 4, 1))
  cost = budgets.params(cfg)
  alive = structure.all_alive(cfg)
  masks = structure.Groups(
    heads=alive.heads.at[:, 1].set(False),
    ffn=alive.ffn.at[0, :2].set(False).at[1, 2:8].set(False),
    stem=alive.stem,
  )
  scores = varied_scores(cfg, 1)
  for share in (0.9, 0.7, 0.5):
    target = int(cost.live(masks) * share)
    want = greedy(scores, masks, target, 0, rules, cost)
    masks = selection.select(scores, masks, target, 0, rules, cost)
    jax.tree.map(np.testing.assert_array_equal, masks, want)
    assert cost.live(masks) <= target


def test_ragged_goes_on_where_a_layer_is_below_its_floor():
  """As from an event whose floor was lower: the others go down to theirs."""
  cfg = conftest.make_config(K=3, G=1, N=2, F=16, D=16)
  rules = dataclasses.replace(RAGGED, floors=(1, 8, 1), multiple_of=(1, 4, 1))
  cost = budgets.params(cfg)
  alive = structure.all_alive(cfg)
  masks = alive.replace(ffn=alive.ffn.at[0, :12].set(False))
  scores = conftest.make_scores(cfg, 1)
  scores = scores.replace(stem=1e3 * scores.stem, heads=1e3 * scores.heads)
  block = 4 * 3 * cfg.D
  for blocks, want in ((0, [4, 16]), (1, [4, 12]), (2, [4, 8])):
    target = cost.live(masks) - blocks * block
    after = selection.select(scores, masks, target, 0, rules, cost)
    wanted = greedy(scores, masks, target, 0, rules, cost)
    jax.tree.map(np.testing.assert_array_equal, after, wanted)
    assert cost.live(after) == target
    assert selection.live_widths(after)['ffn'].tolist() == want
  # The least that it can have is what is left of a prune to nothing.
  after = selection.select(scores, masks, 0, 0, rules, cost)
  least, live = cost.live(after), selection.live_widths(masks)
  assert selection.live_widths(after)['ffn'].tolist() == [4, 8]
  start = cost.live(masks)
  rules_lib.check_target(cfg, rules, cost, least, live, start)
  with pytest.raises(errors.InputError, match=rf'below {least:,} param'):
    rules_lib.check_target(cfg, rules, cost, least - 1, live, start)


@pytest.mark.parametrize('policy', rules_lib.POLICIES)
def test_ties_go_to_the_lower_layer_and_index(policy):
  cfg = conftest.make_config(K=4, N=3, F=8, D=16)
  rules = dataclasses.replace(RAGGED, policy=policy, floors=(1, 1, 1))
  cost = budgets.params(cfg)
  scores = jax.tree.map(
    lambda m, s: jnp.full(m.shape, s),
    structure.all_alive(cfg),
    structure.Groups(heads=1e3, ffn=1.0, stem=1e3),
  )
  target = cfg.num_params() - 9 * 3 * cfg.D
  masks = selection.select(
    scores, structure.all_alive(cfg), target, 0, rules, cost
  )
  assert cost.live(masks) == target
  dead = ~np.asarray(masks.ffn)
  if policy == 'uniform':
    want = [list(range(3))] * 3
  else:
    want = [list(range(7)), [0, 1], []]
  assert [np.flatnonzero(row).tolist() for row in dead] == want


def test_blocks_keep_the_order_of_their_layer():
  """Equal scores: lowest index first, whatever a block's mean rounds to."""
  cfg = conftest.make_config(K=2, N=2, F=48, D=16)
  rules = dataclasses.replace(RAGGED, multiple_of=(1, 12, 1))
  for value in (0.1, 0.3, 1 / 3, 0.7, 1e-7):
    scores = jax.tree.map(
      lambda m, s: jnp.full(m.shape, s, jnp.float32),
      structure.all_alive(cfg),
      structure.Groups(heads=1e9, ffn=value, stem=1e9),
    )
    target = cfg.num_params() - 36 * 3 * cfg.D
    masks = selection.select(
      scores, structure.all_alive(cfg), target, 0, rules, budgets.params(cfg)
    )
    ffn = np.asarray(masks.ffn)
    np.testing.assert_array_equal(ffn[0], np.arange(48) >= 36)
    assert ffn[1].all()


@pytest.mark.parametrize('policy', rules_lib.POLICIES)
def test_what_is_no_number_costs_most_and_floors_hold(policy):
  cfg = conftest.make_config(K=4, N=3, F=8, D=16)
  rules = dataclasses.replace(RAGGED, policy=policy, floors=(1, 1, 1))
  cost, masks = budgets.params(cfg), structure.all_alive(cfg)
  scores = conftest.make_scores(cfg)
  target = cfg.num_params() // 2
  select = lambda scores: selection.select(
    scores, masks, target, target, rules, cost
  )
  dear = lambda value: scores.replace(heads=scores.heads.at[1, :3].set(value))
  want = select(dear(1e20))
  for value in (np.nan, np.inf):
    jax.tree.map(np.testing.assert_array_equal, select(dear(value)), want)
    alike = jax.tree.map(lambda s, v=value: jnp.full(s.shape, v), scores)
    widths = selection.live_widths(select(alike))
    assert min(x.min() for x in widths.values()) >= 1, widths


def test_scores_of_half_precision_are_priced_in_float32():
  """A head of this size saves more than float16 holds."""
  cfg = conftest.make_config(K=4, H=64, F=64, D=256)
  scores = conftest.make_scores(cfg)
  scores = scores.replace(heads=1e4 * scores.heads)
  masks = selection.select(
    jax.tree.map(lambda s: s.astype(jnp.float16), scores),
    structure.all_alive(cfg),
    cfg.num_params() - 20 * 3 * cfg.D,
    0,
    RAGGED,
    budgets.params(cfg),
  )
  assert masks.heads.all()


@pytest.mark.parametrize('policy', ('none', 'Ragged'))
def test_another_policy_is_none_of_those_there_are(policy):
  cfg = conftest.make_config()
  scores, masks = conftest.make_scores(cfg), structure.all_alive(cfg)
  rules = dataclasses.replace(FREE, policy=policy)
  with pytest.raises(ValueError, match=f'policy {policy!r} is not one of'):
    selection.select(scores, masks, 0, 0, rules, budgets.params(cfg))


def test_final_size_wastes_less_than_the_smallest_block():
  """SmolLM2-135M lands at or under any target, and not far under it."""
  cfg = conftest.make_config(V=49152, D=576, N=30, K=3, G=3, H=64, F=1536)
  cost = budgets.params(cfg)
  for policy, layers in (('uniform', cfg.N), ('ragged', 1)):
    rules = rules_lib.Rules(policy, (1, 64, 64), (1, 64, 64), True)
    block = layers * 3 * 64 * cfg.D
    for seed, target in enumerate((128_000_000, 107_600_000, 90_000_000)):
      masks = selection.select(
        conftest.make_scores(cfg, seed),
        structure.all_alive(cfg),
        target,
        target,
        rules,
        cost,
      )
      assert target - block < cost.live(masks) <= target
      assert {
        t: set((w % 64).ravel())
        for t, w in selection.live_widths(masks).items()
        if t != 'heads'
      } == {'ffn': {0}, 'stem': {0}}


def test_a_block_that_fits_is_not_taken_whatever_it_costs():
  """Heads of SmolLM2 are the smallest block, and each is worth a thousand."""
  cfg = conftest.make_config(V=49152, D=576, N=30, K=3, G=3, H=64, F=1536)
  cost, alive = budgets.params(cfg), structure.all_alive(cfg)
  scores = conftest.make_scores(cfg)
  cheap = scores.replace(heads=1e3 * scores.heads, stem=1e3 * scores.stem)
  rules = rules_lib.Rules('uniform', (1, 256, 64), (1, 256, 64), False)
  for target, ffn in ((130_000_000, 1280), (118_000_000, 1024)):
    once = selection.select(cheap, alive, target, target, rules, cost)
    masks = alive
    for step in np.linspace(134_515_008, target, 5)[1:]:
      masks = selection.select(cheap, masks, int(step), target, rules, cost)
    for found in (once, masks):
      widths = selection.live_widths(found)
      assert set(widths['heads']) == {3} and widths['stem'] == 576
      assert set(widths['ffn']) == {ffn}
      assert cost.live(found) <= target
  # Where a head of every layer is cheap, it goes: no channel is in the way.
  dear = scores.replace(heads=1e-3 * scores.heads, stem=1e3 * scores.stem)
  masks = selection.select(dear, alive, 126_000_000, 126_000_000, rules, cost)
  assert set(selection.live_widths(masks)['heads']) == {2}
  assert set(selection.live_widths(masks)['ffn']) == {1536}


@pytest.mark.parametrize('rules', [FREE, RAGGED], ids=rules_lib.POLICIES)
def test_dead_groups_never_revive(cfg, rules):
  """Invariant 3, second half: whatever their score says."""
  masks = conftest.make_masks(cfg, uniform=rules.policy == 'uniform')
  scores = jax.tree.map(
    lambda s, m: jnp.where(m, s, 100.0), conftest.make_scores(cfg), masks
  )
  target = int(selection.live_params(masks, cfg) * 0.8)
  after = selection.select(
    scores, masks, target, target, rules, budgets.params(cfg)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a & ~b, False), after, masks
  )
  assert selection.live_params(after, cfg) <= target


def test_targets_do_not_retrace_and_callers_keep_their_types(cfg):
  scores, masks = conftest.make_scores(cfg), structure.all_alive(cfg)
  cost = budgets.params(cfg)
  masks = selection.select(scores, masks, cfg.num_params(), 0, FREE, cost)
  size = selection._select._cache_size()
  for share in (0.9, 0.7, 0.5):
    target = int(share * cfg.num_params())
    # The program is that of every budget.
    cost = budgets.flops(cfg, 64) if share == 0.5 else budgets.params(cfg)
    masks = selection.select(scores, masks, target, 0, FREE, cost)
  assert selection._select._cache_size() == size
  assert not jax.config.jax_enable_x64
  assert {m.dtype for m in jax.tree.leaves(masks)} == {jnp.dtype(bool)}
  assert {s.dtype for s in jax.tree.leaves(scores)} == {jnp.dtype('float32')}
  assert jnp.arange(3).dtype == masks.ffn.sum().dtype == jnp.int32


@pytest.mark.parametrize('policy', rules_lib.POLICIES)
def test_select_is_exact_above_two_to_the_32(policy):
  """An 8B model: the target is met to one channel."""
  cfg = conftest.make_config(
    V=128256, D=4096, N=32, K=8, G=4, H=128, F=14336, tied=False
  )
  rules = dataclasses.replace(RAGGED, policy=policy, floors=(1, 1, 1))
  assert cfg.num_params() > 2**32
  scores = jax.tree.map(
    lambda m, s: jnp.full(m.shape, s),
    structure.all_alive(cfg),
    structure.Groups(heads=1e9, ffn=1.0, stem=1e9),
  )
  layers = cfg.N if policy == 'uniform' else 1
  for cost in (budgets.params(cfg), budgets.stored_bytes(cfg, 'q4_0')):
    channels = cost.form.ffn * cfg.D * layers
    target = cost.of_config(cfg) - 5 * channels
    masks = selection.select(
      scores, structure.all_alive(cfg), target, target, rules, cost
    )
    assert cost.live(masks) == target
    # One unit less takes one channel more.
    masks = selection.select(scores, masks, target - 1, 0, rules, cost)
    assert cost.live(masks) == target - channels


def test_what_saves_nothing_stays():
  """A latency fit may say that heads are free: they are never taken."""
  cfg = conftest.make_config(K=4, G=1, N=3, F=24, D=16)
  free = LATENCY.form._replace(head=0, head_fixed=0)
  cost = dataclasses.replace(LATENCY, form=free)
  scores = conftest.make_scores(cfg).replace(heads=jnp.zeros((3, 4)))
  for name, above in itertools.product(('multiples', 'ragged'), (0, 1, 10**9)):
    rules = dataclasses.replace(RULES[name], multiple_of=(1, 4, 4))
    final = least(cfg, rules, cost) + above
    masks = selection.select(
      scores, structure.all_alive(cfg), final, final, rules, cost
    )
    assert masks.heads.all()
    assert cost.live(masks) <= final
    prices = selection.mean_prices(
      scores, structure.all_alive(cfg), rules, cost
    )
    assert prices.heads == np.inf and np.isfinite(prices.ffn)


def test_what_saves_only_the_unpriced_goes_last():
  """A stem channel has no price once nothing else is left, but has a size."""
  cfg = conftest.make_config(K=2, G=1, N=2, F=8, D=16)
  cost = budgets.flops(cfg, 64)
  rules = dataclasses.replace(RAGGED, price_embedding=False)
  # The last channel is dear, so the stem is untouched until blocks are gone.
  scores = conftest.make_scores(cfg)
  scores = scores.replace(stem=scores.stem * 1e6)
  target = 9 * 2 * cfg.V
  masks = selection.select(
    scores, structure.all_alive(cfg), target, target, rules, cost
  )
  assert not masks.heads.any() and not masks.ffn.any()
  assert int(masks.stem.sum()) == 9


def test_prices_are_scores_per_saved_unit(cfg):
  masks, scores = conftest.make_masks(cfg), conftest.make_scores(cfg)
  for make in BUDGETS.values():
    cost = make(cfg)
    prices = selection.prices(scores, masks, FREE, cost)
    jax.tree.map(
      lambda p, s, c, m: np.testing.assert_allclose(
        np.asarray(p)[np.asarray(m)],
        np.asarray(s)[np.asarray(m)] / c,
        rtol=1e-6,
      ),
      prices,
      scores,
      savings(masks, cost),
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
    means = selection.mean_prices(scores, masks, FREE, cost)
    assert means.ffn.dtype == jnp.float32
    assert float(means.ffn) == pytest.approx(
      float(np.asarray(prices.ffn)[np.asarray(masks.ffn)].mean()), rel=1e-5
    )


def test_a_floor_above_what_is_alive_is_refused():
  """Arrays are wider after an event with a quantum, or between two shrinks.

  No prune could finish a width that lies between the floor and a multiple
  below it; with the floors that are accepted every target is reached.
  """
  cfg = conftest.make_config(K=2, G=1, N=2, F=32, D=16)
  cost, alive = budgets.params(cfg), structure.all_alive(cfg)
  masks = alive.replace(ffn=alive.ffn.at[:, 20:].set(False))
  live = selection.live_widths(masks)
  scores = conftest.make_scores(cfg, 1)
  for floor in (1, 15, 16, 17, 20, 25):
    rules = rules_lib.Rules('uniform', (1, floor, 8), (1, 16, 8), True)
    smallest = dataclasses.replace(cfg, K=1, F=rules.smallest()[1], D=8)
    targets = range(cost.of_config(smallest), cost.live(masks), 97)
    assert targets
    for target in targets:
      if floor > 16:
        with pytest.raises(errors.InputError, match=r"is 32, above .*'s 20;"):
          rules_lib.check_target(cfg, rules, cost, target, live)
        continue
      rules_lib.check_target(cfg, rules, cost, target, live)
      left = selection.select(scores, masks, target, target, rules, cost)
      assert cost.live(left) <= target, (floor, target)


@pytest.mark.parametrize('kind', BUDGETS)
def test_the_embedding_can_be_left_out_of_the_stem_price(kind):
  cfg = conftest.make_config()
  cost = BUDGETS[kind](cfg)
  masks, scores = conftest.make_masks(cfg), conftest.make_scores(cfg)
  without = selection.prices(
    scores, masks, dataclasses.replace(FREE, price_embedding=False), cost
  )
  counted = selection.prices(scores, masks, FREE, cost)
  saved = savings(masks, cost).stem
  alive = np.asarray(masks.stem)
  np.testing.assert_allclose(
    np.asarray(without.stem)[alive] / np.asarray(counted.stem)[alive],
    saved / (saved - cost.form.unpriced_stem),
    rtol=1e-5,
  )
  conftest.check_close(without.ffn, counted.ffn)
