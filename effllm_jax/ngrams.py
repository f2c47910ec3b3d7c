"""Runs of words that stand in two texts.

Thirteen words, as GPT-3 was decontaminated by (Brown et al. 2020, appendix C):
the language says few of these twice by itself.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import itertools
import re

import numpy as np

from effllm_jax import documents as documents_lib

N = 13  # words, lower case

# Letters of scripts that put no spaces between words: those of Thai, Lao,
# Tibetan, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = (
  r'\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff'
  r'\uff66-\uff9f\U00020000-\U0003ffff'
)
_LETTER = re.compile(f'[{_UNSPACED}]')
_BORDER = re.compile(f'[\\s{_UNSPACED}]')
# Characters whose words are in memory at a time.
_BLOCK = 2**16


def hashes(text: str) -> np.ndarray:
  """Hashes uint64 of each run of N words; of all, if there are fewer.

  They are those of this process: another one has others.
  """
  ids = np.fromiter(map(hash, words(text)), np.int64).view(np.uint64)
  length = min(N, len(ids))
  out = np.zeros(len(ids) - length + 1, np.uint64)
  for k in range(length):
    out *= np.uint64(0x9E3779B97F4A7C15)
    out += ids[k : k + len(out)]
  return out


def words(text: str) -> Iterator[str]:
  """What is between white space, and each letter of _UNSPACED; lower case."""
  return itertools.chain.from_iterable(_blocks(text))


def _blocks(text: str) -> Iterator[list[str]]:
  """The words of one part of the text after another."""
  start = 0
  while start < len(text):
    border = _BORDER.search(text, start + _BLOCK)
    end = border.start() if border else len(text)
    block = text[start:end].lower()
    if not block.isascii():
      block = _LETTER.sub(r' \g<0> ', block)
    # Twice as fast as a search for words.
    yield block.split()
    start = end


class Index:
  """Hashes, each once, among which those of other texts are looked for."""

  def __init__(self, found: Iterable[np.ndarray]):
    """Of arrays of `hashes`, one or more."""
    self._hashes = np.unique(np.concatenate([*found]))
    # Few others begin as one of these does: the rest need no search, which took
    # half of the time. At most 128 MB.
    bits = min(3 + len(self).bit_length(), 27)
    self._begins, self._shift = np.zeros(2**bits, bool), np.uint64(64 - bits)
    self._begins[self._hashes >> self._shift] = True

  def __len__(self) -> int:
    return len(self._hashes)

  def find(self, others: np.ndarray) -> np.ndarray:
    """Which of these are among `others`: indices int64, each once, sorted."""
    others = others[self._begins[others >> self._shift]]
    at = self.at(others)
    return np.unique(at[self._hashes[at] == others])

  def at(self, known: np.ndarray) -> np.ndarray:
    """The index int64 of each of `known`; any, of one that is not here."""
    # Searched in what is sorted: numpy's isin took 100 s here, this takes 1 s.
    at = np.searchsorted(self._hashes, known)
    return np.minimum(at, len(self) - 1)


def shared(
  documents: Iterable[documents_lib.Document],
  others: Iterable[documents_lib.Document],
) -> dict[str, float]:
  """How much of a text stands in another one.

  A document of fewer than N words is found where it is one of `others`, whole,
  and not where it stands within one.

  Args:
    documents: of which all hashes are in memory, 8 bytes a word.
    others: of which one is in memory at a time.

  Returns:
    By domain of `documents`, of its runs of N words the share that `others`
    have too, of any domain.
  """
  parts = {}
  for document in documents:
    parts.setdefault(document.domain, []).append(hashes(document.text))
  found = {domain: np.concatenate(some) for domain, some in parts.items()}
  index = Index(found.values())
  seen = np.zeros(len(index), bool)
  for document in others:
    seen[index.find(hashes(document.text))] = True
  return {x: float(seen[index.at(some)].mean()) for x, some in found.items()}
