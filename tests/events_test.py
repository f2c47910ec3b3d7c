import dataclasses
import json

import numpy as np
import pytest

from effllm_jax import events
from effllm_jax import structure
from tests import conftest


def make_events():
  a = conftest.make_config(N=2, K=3, F=5, D=4)
  b = dataclasses.replace(a, K=2, F=4, D=4)
  c = dataclasses.replace(b, K=1, F=2, D=3)
  first = structure.Groups(
    heads=[[2, 0], [1, 2]],
    ffn=[[4, 3, 1, 0], [0, 1, 2, 3]],
    stem=[3, 2, 1, 0],
  )
  second = structure.Groups(
    heads=[[1], [0]], ffn=[[0, 2], [3, 1]], stem=[0, 3, 1]
  )
  return [
    events.ShrinkEvent(
      0, 10, 640, a, b, structure.Groups([2, 1], [4, 4], 4), first, 3.5, 3.5
    ),
    events.ShrinkEvent(
      1, 20, 1280, b, c, structure.Groups([1, 1], [2, 2], 3), second, 3.25, 3.25
    ),
  ]


def test_lineage_names_survivors_in_the_source():
  origin = events.lineage(make_events())
  np.testing.assert_array_equal(origin.heads, [[0], [1]])
  np.testing.assert_array_equal(origin.ffn, [[4, 1], [3, 1]])
  np.testing.assert_array_equal(origin.stem, [3, 0, 2])


def test_json_round_trip():
  for event in make_events():
    text = json.dumps(event.to_json())
    assert events.ShrinkEvent.from_json(json.loads(text)) == event


def test_lineage_refuses_gaps():
  first, second = make_events()
  with pytest.raises(ValueError, match='does not follow'):
    events.lineage([second])
  with pytest.raises(ValueError, match='does not follow'):
    events.lineage([first, dataclasses.replace(second, before=first.before)])
  with pytest.raises(ValueError, match='no shrink events'):
    events.lineage([])


@pytest.mark.parametrize('name', ['index', 'step', 'tokens'])
def test_numbers_of_an_event_are_counts(name):
  record = make_events()[0].to_json()
  for value in (-1, 1.0, '1', True):
    with pytest.raises(ValueError, match=name):
      events.ShrinkEvent.from_json(record | {name: value})
