"""Training text and held-out text that have nothing in common."""

import array
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import hashlib
import itertools
import re

import numpy as np

from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import ngrams

Document = documents_lib.Document

HELD_OUT = 0.05  # of each domain's bytes
MOST_HELD_OUT = 2**24  # bytes of a domain: more would take memory, to no use
MAX_SHARED = 0.1  # of a held-out document's runs of words
# Each is a file of tokens and an evaluation.
MOST_DOMAINS = 1000
_END = '#end'  # of the id of what was cut off


def paragraphs(text: str) -> tuple[list[str], str]:
  """Paragraphs and what joins them: a blank line, or else a line break."""
  parts = re.split(r'\n\s*\n', text)
  if len(parts) > 1:
    return parts, '\n\n'
  return text.split('\n'), '\n'


def split(
  documents: Iterable[Document],
) -> tuple[dict[str, Iterable[Document]], dict]:
  """Splits documents into `train` and `heldout` with nothing in common.

  Of each domain, documents in the order of their hashed ids are held out until
  they make HELD_OUT of the bytes that may be, or MOST_HELD_OUT. One that shares
  more than MAX_SHARED of its runs of `ngrams.N` words with the training
  documents may not: it is trained on, and the next one takes its place.
  Paragraphs of so many words that stand in a held-out document are then taken
  out of the training documents; shorter ones ("Exit.") are the language's own.
  Where a domain is one document, or one is too large to be held out and the
  others are next to nothing, such a one is cut at a paragraph, within one where
  that alone comes near HELD_OUT.

  Args:
    documents: iterated over four times or more, with the same outcome. Of what
      is trained on one is in memory at a time, and 50 bytes about each other.

  Returns:
    The splits, of which `train` is an iterator, and notes for the manifest,
    complete when that has come to its end.

  Raises:
    errors.InputError: more than MOST_DOMAINS, a domain of which nothing can be
      held out, or, at the end of `train`, nothing else is left.
  """
  text = _Text(documents)
  seen = _Seen(text)
  ends = {}  # of each domain of which a document was to be cut
  unfit = {}  # a set in the order of finding out
  spares = 1
  while True:
    chosen = {x: _hold_out(text, x, unfit, ends) for x in text.domains}
    held = [i for some in chosen.values() for i in some]
    _check(
      text.domains,
      {x for x, all_ in text.domains.items() if not np.isin(all_, held).all()},
      {x for x, some in chosen.items() if some},
    )
    if not seen.documents.keys() >= {*held}:
      # What may take the place of what turns out unfit, twice as much in every
      # round, so that there are few rounds.
      spares *= 2
      spare = [i for x in text.domains for i in _spare(text, x, unfit, spares)]
      seen.add([*held, *spare])
    shares = seen.shares(held)
    shared = [i for i in held if shares[i] > MAX_SHARED]
    if not shared:
      break
    unfit |= dict.fromkeys(shared)
  notes = {
    'dropped': {'duplicate_documents': text.duplicates},
    'cut_documents': [*text.cut_documents],
    'unfit_to_hold_out': [
      f'{d.domain}/{d.id}' for d in map(seen.documents.get, unfit)
    ],
  }
  train = _train(text, seen, held, notes['dropped'])
  return {'train': train, 'heldout': [seen.documents[i] for i in held]}, notes


class _Text:
  """Documents without repetitions, by index, anew in every iteration.

  Attributes:
    domains: indices of the documents of each, in the order of their ranks.
    sizes: bytes of each document.
    duplicates: how many repeat the text or the name of another.
    cut_documents: the names of those that are two now.
  """

  def __init__(self, documents: Iterable[Document]):
    self._documents = documents
    numbers = {}
    domain, sizes = array.array('Q'), array.array('Q')
    texts, names, ranks = bytearray(), bytearray(), bytearray()
    for document in documents:
      data = document.text.encode()
      name = f'{len(document.domain)} {document.domain}{document.id}'
      domain.append(numbers.setdefault(document.domain, len(numbers)))
      if len(numbers) > MOST_DOMAINS:
        raise errors.InputError(
          f'the text has more than {MOST_DOMAINS:,} domains, the last that was '
          f'read is {document.domain!r} of {document.id}: is the key "domain" '
          'a web site? rename the key, or give the texts few domains; where '
          'there is none, the first folder of a path is the domain'
        )
      sizes.append(len(data))
      texts += hashlib.blake2b(data, digest_size=16).digest()
      names += hashlib.blake2b(name.encode(), digest_size=16).digest()
      ranks += document.rank
    domain, ranks = np.array(domain, np.int64), np.frombuffer(ranks, '>u8')
    # One of each text, and one of each name: two dumps share an article.
    unique = _first(texts)
    unique = unique[_first(names, unique)]
    unique = unique[np.lexsort((ranks[unique], domain[unique]))]
    ends = np.searchsorted(domain[unique], np.arange(len(numbers) + 1))
    members = {x: unique[ends[i] : ends[i + 1]] for x, i in numbers.items()}
    self.domains = {
      x: found for x, found in sorted(members.items()) if len(found)
    }
    self.sizes = np.array(sizes, np.int64)
    self.duplicates = len(sizes) - len(unique)
    self.cut_documents = []
    self._kept = np.zeros(len(sizes), bool)
    self._kept[unique] = True
    self._heads, self._ends = {}, []

  def __iter__(self) -> Iterator[tuple[int, Document]]:
    """What a document is, or was cut to, under its index; then the ends."""
    for i, document in enumerate(self._documents):
      if self._kept[i]:
        yield i, self._heads.get(i, document)
    yield from enumerate(self._ends, len(self._kept))

  def cut(self, index: int, parts: Sequence[Document]) -> int:
    """Puts two parts in place of a document; the index of the second."""
    head, end = parts
    self._heads[index] = head
    self._ends.append(end)
    self.sizes[index] = head.size
    self.sizes = np.append(self.sizes, end.size)
    self.cut_documents.append(f'{head.domain}/{head.id}')
    return len(self.sizes) - 1


def _first(keys: bytes, of: np.ndarray | slice = slice(None)) -> np.ndarray:
  """Where each key of 16 bytes stands first, in that order."""
  pairs = np.frombuffer(keys, 'u8,u8')[of]
  return np.sort(np.unique(pairs, return_index=True)[1])


class _Seen:
  """What may be held out, and in how many documents its runs of words stand.

  Attributes:
    documents: that were added, by index.
    met: bool, of each index, whether it has a run of words of one of these.
  """

  def __init__(self, text: _Text):
    self._text = text
    self.documents, self._hashes = {}, {}

  def add(self, indices: Collection[int]) -> None:
    """Reads documents, and those that have been cut since; then all."""
    wanted = {*self.documents, *indices}
    self.documents = {i: d for i, d in self._text if i in wanted}
    self._hashes = {i: ngrams.hashes(d.text) for i, d in self.documents.items()}
    self._index = ngrams.Index(self._hashes.values())
    self._counts = np.zeros(len(self._index), np.int64)
    self.met = np.zeros(len(self._text.sizes), bool)
    for i, document in self._text:
      hashes = self._hashes.get(i)
      if hashes is None:
        hashes = ngrams.hashes(document.text)
      at = self._index.find(hashes)
      self._counts[at] += 1
      self.met[i] = at.size

  def shares(self, held: Collection[int]) -> dict[int, float]:
    """Of the runs of each, the share that stands in one that is not held."""
    counts = self._counts.copy()
    for i in held:
      counts[self._index.find(self._hashes[i])] -= 1
    at = {i: self._index.at(self._hashes[i]) for i in held}
    return {i: (counts[at[i]] > 0).mean() for i in held}


def _train(
  text: _Text, seen: _Seen, held: Collection[int], dropped: dict[str, int]
) -> Iterator[Document]:
  """What is trained on; adds to `dropped` when it has come to its end."""
  # What a held-out document says at length, no training document says.
  said = {
    _normal(p)
    for i in held
    for p in paragraphs(seen.documents[i].text)[0]
    if _is_long(p)
  }
  held, removed, domains = {*held}, 0, set()
  for i, document in text:
    if i in held:
      continue
    # A paragraph of N words is one of its runs, or several.
    if seen.met[i]:
      parts, joint = paragraphs(document.text)
      rest = [p for p in parts if not (_is_long(p) and _normal(p) in said)]
      removed += len(parts) - len(rest)
      if len(rest) < len(parts):
        document = document._replace(text=joint.join(rest).strip())
    if document.text:
      domains.add(document.domain)
      yield document
  _check(text.domains, domains, text.domains)
  dropped['train_paragraphs_seen_in_heldout'] = removed


def _normal(paragraph: str) -> str:
  return ' '.join(ngrams.words(paragraph))


def _is_long(paragraph: str) -> bool:
  first = itertools.islice(ngrams.words(paragraph), ngrams.N)
  return len([*first]) == ngrams.N


def _hold_out(
  text: _Text,
  domain: str,
  unfit: Collection[int],
  ends: dict[str, int | None],
) -> list[int]:
  """What to hold out of a domain, of which one document may be cut for it.

  Args:
    text: of which one document may be cut.
    domain: which one.
    unfit: documents that may not be held out.
    ends: of the documents that were cut, by domain; None where none could be.
  """
  end = ends.get(domain)
  if end is not None and end not in unfit:
    return [end]
  left, goal = _left(text, domain, unfit)
  picked = _pick(text, left, goal)
  if text.sizes[picked].sum() >= goal / 2:
    return picked
  # All that fits is next to nothing.
  large = left[~np.isin(left, picked)]
  whole = [int(large[text.sizes[large].argmin()])] if len(large) > 1 else []
  alone = len(text.domains[domain]) == 1
  # Of one that alone is left, the others are unfit: so would its end be.
  others_unfit = len(left) == 1 and not alone
  may_be_cut = bool(picked) or alone or goal == MOST_HELD_OUT
  if domain in ends or others_unfit or not (len(large) and may_be_cut):
    return whole
  # Of those that can be cut, the last one by rank is.
  ranks = {i: at for at, i in enumerate(large.tolist())}
  last, halves = -1, []
  for i, document in text:
    if i == large[0]:
      name = document.id
    if ranks.get(i, -1) > last and (parts := _cut(document, goal)):
      last, halves = ranks[i], parts
  ends[domain] = None
  if halves:
    ends[domain] = text.cut(int(large[last]), halves)
    return [ends[domain]]
  if not whole and len(left) == len(text.domains[domain]):
    kind = 'a single' if len(left) == 1 else 'little but a single'
    raise errors.InputError(
      f'domain {domain!r} is {kind} paragraph ({name}), so nothing of '
      'it can be held out; add text to it, or ends of lines'
    )
  return whole


def _cut(document: Document, goal: float) -> list[Document]:
  """The beginning and the end, of about `goal` bytes, or nothing."""
  parts, joint = paragraphs(document.text)
  tail = _take(parts, joint, goal)
  size = len(joint.join(tail).encode())
  if tail and not goal <= size <= 2 * goal:
    # The paragraph around the right place is a large one: it is cut at a line.
    short = size < goal
    large = parts.pop() if short else tail.pop(0)
    lines = large.split('\n')
    last = _take(lines, '\n', goal - len(joint.join(tail).encode()))
    if last:
      tail.insert(0, '\n'.join(last))
    if last or short:
      parts.append('\n'.join(lines))
    else:
      tail.insert(0, large)
  head, tail = joint.join(parts).strip(), joint.join(tail).strip()
  if min(len(head.encode()), len(tail.encode())) < goal / 10:
    return []
  return [
    document._replace(text=head),
    Document(document.domain, f'{document.id}{_END}', tail),
  ]


def _take(parts: list[str], joint: str, goal: float) -> list[str]:
  """Takes parts from the end, until they have `goal` bytes or one is left."""
  taken, size = [], -len(joint)
  while len(parts) > 1 and size < goal:
    taken.append(parts.pop())
    size += len(joint) + len(taken[-1].encode())
  return taken[::-1]


def _left(
  text: _Text, domain: str, unfit: Collection[int]
) -> tuple[np.ndarray, float]:
  """What may be held out of a domain, by rank; how many bytes should be."""
  members = text.domains[domain]
  left = members[~np.isin(members, [*unfit])]
  return left, min(HELD_OUT * text.sizes[left].sum(), MOST_HELD_OUT)


def _spare(
  text: _Text, domain: str, unfit: Collection[int], times: int
) -> list[int]:
  """The documents among which one would look for `times` as many bytes."""
  left, goal = _left(text, domain, unfit)
  return _pick(text, left, times * goal)


def _pick(text: _Text, left: np.ndarray, goal: float) -> list[int]:
  """Documents in the order of `left` that make `goal` bytes, to twice that."""
  picked, total = [], 0
  # Not as lists: of millions of documents only the first are looked at.
  for i in map(int, left):
    size = int(text.sizes[i])
    if total >= goal:
      break
    if total + size <= 2 * goal:
      picked.append(i)
      total += size
  return picked


def _check(
  domains: Iterable[str], trained: Collection[str], held: Collection[str]
) -> None:
  missing = {*domains} - {*trained}
  if missing:
    raise errors.InputError(
      f'domain {min(missing)!r} repeats itself: all of it stands in what would '
      'be held out; add other text to it'
    )
  missing = {*domains} - {*held}
  if missing:
    raise errors.InputError(
      f'domain {min(missing)!r} repeats itself: more than {MAX_SHARED:.0%} of '
      'what could be held out stands in the rest of it, too; take out what its '
      'documents share, a footer perhaps, or add other text to it'
    )
