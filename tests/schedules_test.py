import dataclasses
import fractions
import itertools

import hypothesis
from hypothesis import strategies as st
import pytest

from effllm_jax import errors
from effllm_jax import schedules


def make_schedule(**changes) -> schedules.Schedule:
  fields = dict(
    begin=100, end=300, start=1000, target=400,
    kind='linear', stages=1, rest=0.0,
  )  # fmt: skip
  return schedules.Schedule(**fields | changes)


def test_a_linear_schedule_is_a_line_in_tokens():
  line = make_schedule()
  sizes = [line.at(t) for t in (0, 100, 200, 299, 300, 10_000)]
  assert sizes == [1000, 1000, 700, 403, 400, 400]


def test_a_cubic_schedule_is_fast_at_first():
  cubic = make_schedule(kind='cubic')
  for tokens in range(100, 301):
    remaining = 400 + 600 * (1 - (tokens - 100) / 200) ** 3
    assert cubic.at(tokens) - 1 < remaining + 1e-9 <= cubic.at(tokens) + 1e-6


def test_oneshot_goes_at_the_first_prune():
  oneshot = make_schedule(kind='oneshot')
  assert [oneshot.at(t) for t in (0, 100, 101, 300)] == [1000, 1000, 400, 400]
  twice = make_schedule(kind='oneshot', stages=2, rest=0.5)
  assert [twice.at(t) for t in (100, 101, 233, 234)] == [1000, 700, 700, 400]


def test_stages_fall_and_rest():
  """Three falls of 40 tokens and two rests of 40: 200 tokens."""
  staged = make_schedule(stages=3, rest=0.5)
  sizes = [staged.at(100 + 20 * i) for i in range(11)]
  assert sizes == [1000, 900, 800, 800, 800, 700, 600, 600, 600, 500, 400]
  rests = [not staged.falls(t, t + 20) for t in range(100, 300, 20)]
  assert [i for i, rest in enumerate(rests) if rest] == [2, 3, 6, 7]


SCHEDULES = st.builds(
  lambda begin, span, target, drop, kind, stages, rest: schedules.Schedule(
    begin, begin + span, target + drop, target, kind, stages, rest
  ),
  begin=st.integers(0, 10**12),
  span=st.integers(1, 10**12),
  target=st.integers(1, 2**62),
  drop=st.integers(1, 2**62),
  kind=st.sampled_from(schedules.SCHEDULES),
  stages=st.integers(1, 6),
  rest=st.floats(0, 1, exclude_max=True),
)


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(SCHEDULES, st.lists(st.floats(-0.1, 1.1), max_size=8))
def test_a_schedule_falls_from_start_to_target(schedule, times):
  span = schedule.end - schedule.begin
  tokens = sorted(schedule.begin + int(t * span) for t in times)
  sizes = [schedule.at(t) for t in tokens]
  assert all(isinstance(s, int) for s in sizes)
  assert all(
    schedule.target <= b <= a <= schedule.start
    for a, b in itertools.pairwise([schedule.start, *sizes])
  )
  assert schedule.at(0) == schedule.at(schedule.begin) == schedule.start
  assert schedule.at(schedule.end) == schedule.target
  assert schedule.at(schedule.end + span) == schedule.target
  if schedule.kind != 'oneshot':
    # Never before the end.
    assert schedule.at(schedule.end - 1) > schedule.target


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(SCHEDULES)
def test_a_stage_takes_an_equal_share_of_the_curve(schedule):
  """After k of n stages the size is that of the curve at k / n."""
  plain = dataclasses.replace(
    schedule, begin=0, end=schedule.stages, stages=1, rest=0.0
  )
  stage = (schedule.end - schedule.begin) / (
    schedule.stages - fractions.Fraction(schedule.rest)
  )
  falling = stage * (1 - fractions.Fraction(schedule.rest))
  for k in range(schedule.stages - 1):
    last = schedule.begin + k * stage + falling
    rest = range(-(-last // 1), schedule.begin + (k + 1) * stage // 1 + 1)
    if schedule.kind == 'oneshot' or not rest:
      continue
    assert {schedule.at(rest[0]), schedule.at(rest[-1])} == {plain.at(k + 1)}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(kind='square'), "prune.schedule 'square' is not one of linear"),
    (dict(stages=0), 'prune.stages 0 is not at least 1'),
    (dict(rest=1.0), r'prune.rest 1.0 is not in \[0, 1\); set --config.prune'),
    (dict(rest=float('nan')), 'prune.rest nan is not in'),
  ],
)  # fmt: skip
def test_what_a_schedule_refuses(change, message):
  with pytest.raises(errors.InputError, match=message):
    make_schedule(**change)
