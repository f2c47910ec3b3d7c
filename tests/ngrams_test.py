import numpy as np
import pytest

from effllm_jax import documents as documents_lib
from effllm_jax import ngrams
from tests import conftest

N = 13


def runs_of(text: str) -> list[tuple[str, ...]]:
  """Of a text in English: its runs of words themselves, not their hashes."""
  words = text.lower().split()
  length = min(N, len(words))
  return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def document(domain: str, text: str) -> documents_lib.Document:
  return documents_lib.Document(domain, text[:40], text)


def test_words_are_those_between_spaces():
  """Also where a text is split in several parts."""
  many = ' '.join(f'word{i}' for i in range(30_000))
  text = f'{many}\u3000X\x1fy  Ärger\n'
  assert [*ngrams.words(text)] == text.lower().split()
  mixed = ['ein', '日', '本', '語', 'wort']
  assert [*ngrams.words('ein 日本語Wort')] == mixed


def test_hashes_are_equal_where_the_runs_are():
  text = ' '.join(conftest.real_text()[:3])
  runs, hashes = runs_of(text), ngrams.hashes(text)
  assert ngrams.N == N and len(runs) == len(hashes) > len({*runs})
  assert len({*zip(runs, hashes.tolist(), strict=True)}) == len({*runs})
  assert len({*hashes.tolist()}) == len({*runs})
  for short in ('', 'one', ' '.join(map(str, range(N)))):
    assert len(ngrams.hashes(short)) == 1


@pytest.mark.parametrize('size', [1, 2, 3000])
def test_an_index_finds_what_it_has(size):
  rng = np.random.default_rng(size)
  draw = lambda n: rng.integers(0, 2**64, n, np.uint64, endpoint=False)
  parts = [draw(size), draw(size)]
  parts.append(parts[0][::2])
  index = ngrams.Index(parts)
  known = np.unique(np.concatenate(parts))
  assert len(index) == len(known) <= 2 * size
  np.testing.assert_array_equal(
    index.at(known[::-1]), np.arange(len(known))[::-1]
  )
  # Beside others, of which some begin as one of these does.
  others = np.concatenate([draw(500), known[::3], known + np.uint64(1)])
  found = index.find(rng.permutation(others))
  np.testing.assert_array_equal(found, np.arange(0, len(known), 3))
  assert index.find(draw(500)).size == index.find(draw(0)).size == 0


def test_what_two_texts_share_is_counted_by_domain():
  first, second, third, *rest = conftest.real_text()
  others = [document('x', t) for t in (second, third[: len(third) // 2], *rest)]
  mine = [
    document('new', first),
    document('half', third),
    document('half', 'Too short to share more than itself.'),
    document('known', second),
    document('known', 'Word for word.'),
    document('short', 'Word for word.'),
    document('short', ' '.join(second.split()[:12])),
  ]
  others.append(document('y', 'word  for word.'))
  known = {run for other in others for run in runs_of(other.text)}
  want = {}
  for domain in ('new', 'half', 'known', 'short'):
    found = [
      x in known for d in mine if d.domain == domain for x in runs_of(d.text)
    ]
    want[domain] = sum(found) / len(found)
  assert want['known'] == 1 > want['half'] > 0.4 > 0.1 > want['new']
  # What is short is compared whole.
  assert want['short'] == 0.5
  # In any order, and of others that can be read but once.
  for order in (others, others[::-1]):
    assert ngrams.shared(iter(mine), iter(order)) == want
