"""How alike the structures are that runs came to: which groups they share.

Of two runs from one source and of one pruning type let A and B be the sets of
groups that are alive, named as in that source, M all groups that there were.
Their overlap is

    J = |A and B| / |A or B|                                 (Jaccard 1912)

1 where they are equal, 0 where they share nothing. Runs that keep most groups
share most of them whatever they do, so J stands beside the J of chance: every
layer keeps as many groups as it did, drawn evenly from those of the layer, by
each run for itself. Then what a layer shares is hypergeometric, what all share,
S, has the convolution of these distributions, and J = S / (|A| + |B| - S) is a
function of S alone. With the exact distribution of S

    above chance = (J - E[J]) / (1 - E[J])       0: as by chance, 1: equal
    z = (S - E[S]) / sd[S]

The width of every layer is given to chance: it is under policy `uniform`, where
all have the same. Under `ragged` it is a result, and that two runs agree on
which layers are narrow is not counted here. Sets of different sizes cannot be
equal: their J stays below 1.

Of what was removed the same: it shares |M| - |A or B| groups, and has the same
z, since that is S and a constant.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from scipy import stats

from effllm_jax import amounts
from effllm_jax import checkpoints
from effllm_jax import errors
from effllm_jax import events
from effllm_jax import runlog
from effllm_jax import sources
from effllm_jax import state
from effllm_jax import structure
from effllm_jax import tables

# What is less likely than this is left out of a distribution: no sum of float64
# would show it, and without it a model of 1.7B takes no time.
_NEGLIGIBLE = 1e-25

# By pruning type: a set for each layer; the stem has one.
Sets = Mapping[str, Sequence[frozenset[int]]]


@dataclasses.dataclass(frozen=True)
class Structure:
  """Which groups are alive in a run, by their index in its first source.

  Attributes:
    workdir: of the run.
    step: that this is of.
    source: name and digest of the first source of its family of runs.
    start: the groups that the run started with.
    alive: those of them that are left.
  """

  workdir: str
  step: int
  source: tuple[str, str]
  start: Sets
  alive: Sets


def read(workdir: str | os.PathLike, event: int | None = None) -> Structure:
  """The structure that a run has come to, or had right after one shrink.

  Of a run that went on from another one's event too: indices are those of the
  model that the first run of the family started from.

  Raises:
    errors.InputError: there is no such run or event, or it cannot be read.
  """
  workdir = pathlib.Path(workdir)
  log = runlog.read(workdir)
  source = sources.load_saved(workdir / 'source')
  fresh = state.fresh_prune_state(source.cfg)
  removed = structure.Groups(
    **{t: (x > 0) & np.isfinite(x) for t, x in log.removed.items()}
  )
  start = _sets(fresh.masks, fresh.origin)
  if source.origin is None and event is None:
    # The trace says it all, also where the checkpoints have been deleted.
    step = int(log.train['step'][-1])
    alive = _sets(jax.tree.map(np.logical_not, removed), fresh.origin)
  else:
    moment = checkpoints.choose(workdir, event)
    prune = checkpoints.read_prune(moment)
    step = moment.step
    alive = _sets(prune.masks, events.compose(source.origin, prune.origin))
    if source.origin is not None:
      # Arrays that a run goes on from may hold what was dead before it began.
      gone = _sets(removed, source.origin)
      start = {
        t: [x | y for x, y in zip(alive[t], gone[t], strict=True)]
        for t in alive
      }
  return Structure(
    workdir=str(workdir),
    step=step,
    source=(source.name, source.sha256),
    start=start,
    alive=alive,
  )


def _sets(masks, origin) -> Sets:
  """The indices in the source of what is alive, layer by layer."""
  return {
    t: [
      frozenset(sits[mask].tolist())
      for mask, sits in zip(
        np.atleast_2d(getattr(masks, t)),
        np.atleast_2d(getattr(origin, t)),
        strict=True,
      )
    ]
    for t in structure.TYPES
  }


def compare(structures: Sequence[Structure]) -> dict[str, Any]:
  """Every pair of structures, type by type; plain numbers, None: undefined.

  Chance draws from the groups that a pair started with. Where one of the two
  went on from an event, it is those of the other one, which had more.

  Returns:
    `source`; `runs`, each with its workdir, step and number of live groups;
    `pairs`, each with the positions of two runs, a type, how many groups there
    were (`of`), z, and of what is `alive` and what was `removed`: how many
    groups of each run (`groups`), `shared`, `jaccard`, `by_chance` (the mean)
    and `above_chance`.

  Raises:
    errors.InputError: they are not of one source.
  """
  pairs = []
  for i, j in itertools.combinations(range(len(structures)), 2):
    a, b = structures[i], structures[j]
    pool = _pool(a, b)
    for t in structure.TYPES:
      found = overlap(a.alive[t], b.alive[t], pool[t])
      pairs.append({'runs': [i, j], 'type': t, **found})
  return {
    'source': structures[0].source[0],
    'runs': [
      {
        'workdir': x.workdir,
        'step': x.step,
        'alive': {t: sum(map(len, x.alive[t])) for t in structure.TYPES},
      }
      for x in structures
    ],
    'pairs': pairs,
  }


def _pool(a: Structure, b: Structure) -> Sets:
  """What both can be said to have been drawn from."""
  if a.source[1] != b.source[1] or len(a.start['ffn']) != len(b.start['ffn']):
    raise errors.InputError(
      f'{a.workdir} started from {_said(a)}, {b.workdir} from {_said(b)}; set '
      '--workdirs to runs from one source'
    )
  for large, small in ((a.start, b.start), (b.start, a.start)):
    if all(
      x >= y
      for t in structure.TYPES
      for x, y in zip(large[t], small[t], strict=True)
    ):
      return large
  raise errors.InputError(
    f'{a.workdir} and {b.workdir} went on from events of different runs, '
    'neither of which holds all groups of the other; set --workdirs to runs '
    'from one source, or from events of one run'
  )


def _said(x: Structure) -> str:
  name, digest = x.source
  return f'{name} ({len(x.start["ffn"])} layers, sha256 {digest[:12]})'


def overlap(
  a: Sequence[frozenset[int]],
  b: Sequence[frozenset[int]],
  pool: Sequence[frozenset[int]],
) -> dict[str, Any]:
  """The overlap of two choices from a pool, each given layer by layer.

  Returns:
    A pair of `compare`, without its runs and its type.
  """
  layers = [tuple(map(len, x)) for x in zip(pool, a, b, strict=True)]
  shared = sum(len(x & y) for x, y in zip(a, b, strict=True))
  least, chance = shared_by_chance(layers)
  counts = least + np.arange(len(chance))
  mean = float(counts @ chance)
  deviation = float(np.sqrt(np.square(counts - mean) @ chance))
  of, left, right = (sum(x) for x in zip(*layers, strict=True))
  # Removed in both is what neither has.
  rest = of - left - right
  gone = of - left, of - right
  return {
    'of': of,
    'z': (shared - mean) / deviation if len(chance) > 1 else None,
    'alive': _part(left, right, shared, counts, chance),
    'removed': _part(*gone, shared + rest, counts + rest, chance),
  }


def _part(left, right, shared, counts, chance) -> dict[str, Any]:
  jaccard = by_chance = above = None
  # Of two empty sets there is no overlap to speak of.
  if left + right:
    jaccard = shared / (left + right - shared)
    by_chance = float(counts / (left + right - counts) @ chance)
    if by_chance < 1:
      above = (jaccard - by_chance) / (1 - by_chance)
  return {
    'groups': [left, right],
    'shared': shared,
    'jaccard': jaccard,
    'by_chance': by_chance,
    'above_chance': above,
  }


def shared_by_chance(
  layers: Sequence[tuple[int, int, int]],
) -> tuple[int, np.ndarray]:
  """The distribution of the number of groups that two random choices share.

  Args:
    layers: (groups, those that one choice has, those that the other has).

  Returns:
    The least number, and the probabilities of that one and the following ones,
    float64; what is left out has less than 1e-25 each.
  """
  least, total = 0, np.ones(1)
  for of, left, right in layers:
    low, high = max(0, left + right - of), min(left, right)
    # Further from the mean is negligible, by Hoeffding's bound: of 8,192 groups
    # a fifth of the counts is left, each of which takes scipy 40 us.
    reach = math.sqrt(-high * math.log(_NEGLIGIBLE) / 2)
    mean = left * right / of if of else 0
    low = max(low, math.floor(mean - reach))
    high = min(high, math.ceil(mean + reach))
    chance = np.ones(1)
    if low < high:
      counts = np.arange(low, high + 1)
      chance = stats.hypergeom.pmf(counts, of, left, right)
    low, chance = _likely(low, chance)
    least, total = _likely(least + low, np.convolve(total, chance))
  return least, total / total.sum()


def _likely(least: int, chance: np.ndarray) -> tuple[int, np.ndarray]:
  """A distribution without its negligible ends."""
  (found,) = np.nonzero(chance > _NEGLIGIBLE)
  return least + int(found[0]), chance[found[0] : found[-1] + 1]


def table(record: Mapping[str, Any], part: str) -> tables.Table:
  """A row for each pair and type.

  Args:
    record: of `compare`.
    part: 'alive' or 'removed'.
  """
  names = runlog.names([x['workdir'] for x in record['runs']])
  number = lambda x, digits: amounts.NONE if x is None else f'{x:.{digits}f}'
  rows = []
  for pair in record['pairs']:
    found = pair[part]
    rows.append(
      (
        f'{", ".join(names[i] for i in pair["runs"])}: {pair["type"]}',
        *(f'{x:,}' for x in (*found['groups'], pair['of'], found['shared'])),
        *(
          number(found[x], 3) for x in ('jaccard', 'by_chance', 'above_chance')
        ),
        number(pair['z'], 1),
      )
    )
  return tables.Table(
    title=f'Overlap of what {"is alive" if part == "alive" else "was removed"}',
    columns=(
      'runs', 'one', 'other', 'of', 'shared', 'Jaccard', 'by chance',
      'above chance', 'z',
    ),
    rows=tuple(rows),
  )  # fmt: skip
