"""Training text and held-out text that have nothing in common."""

from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Sequence
import itertools
import re

import numpy as np

from effllm_jax import documents as documents_lib
from effllm_jax import errors

Document = documents_lib.Document

HELD_OUT = 0.05  # of each domain's bytes
WINDOW = 13  # words, lower case
MAX_SHARED = 0.1  # of a held-out document's windows
_END = '#end'  # of the id of what was cut off

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


def paragraphs(text: str) -> tuple[list[str], str]:
  """Paragraphs and what joins them: a blank line, or else a line break."""
  parts = re.split(r'\n\s*\n', text)
  if len(parts) > 1:
    return parts, '\n\n'
  return text.split('\n'), '\n'


def windows(text: str) -> np.ndarray:
  """Hashes uint64 of each run of WINDOW words; of all, if there are fewer."""
  ids = np.fromiter(map(hash, _words(text)), np.int64).view(np.uint64)
  length = min(WINDOW, len(ids))
  out = np.zeros(len(ids) - length + 1, np.uint64)
  for k in range(length):
    out *= np.uint64(0x9E3779B97F4A7C15)
    out += ids[k : k + len(out)]
  return out


def _words(text: str) -> Iterator[str]:
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


def split(
  documents: Sequence[Document],
) -> tuple[dict[str, list[Document]], dict]:
  """Splits documents into `train` and `heldout` with nothing in common.

  Of each domain, documents in the order of their hashed ids are held out until
  they make HELD_OUT of the bytes that may be. One that shares more than
  MAX_SHARED of its windows with the training documents may not: it is trained
  on, and the next one takes its place. Paragraphs of WINDOW or more words that
  stand in a held-out document are then taken out of the training documents;
  shorter ones ("Exit.") are the language's own. Where a domain is one document,
  or one is too large to be held out and the others are next to nothing, such a
  one is cut at a paragraph, within one where that alone comes near HELD_OUT.

  Returns:
    The splits, and notes for the manifest.

  Raises:
    errors.InputError: a domain of which nothing can be held out.
  """
  # One of each text, and one of each name: two dumps share an article.
  unique = {d.text: d for d in reversed(documents)}
  unique = {(d.domain, d.id): d for d in unique.values()}
  notes = {
    'dropped': {'duplicate_documents': len(documents) - len(unique)},
    'cut_documents': [],
  }
  domains = {}
  for document in sorted(unique.values(), key=lambda d: (d.domain, d.rank)):
    domains.setdefault(document.domain, []).append(document)
  hashes = {}
  ends = {}  # of each domain of which a document was to be cut
  unfit = {}  # a set in the order of finding out
  while True:
    held = {}
    for members in domains.values():
      held |= dict.fromkeys(_hold_out(members, unfit, ends))
    every = [d for members in domains.values() for d in members]
    for document in every:
      if document not in hashes:
        hashes[document] = windows(document.text)
    train = [d for d in every if d not in held]
    _check(domains, train, held)
    # Sorted once and searched: numpy's isin took 100 s here, this takes 1 s.
    seen = np.sort(np.concatenate([hashes[d] for d in train]))
    shared = [d for d in held if _share(hashes[d], seen) > MAX_SHARED]
    if not shared:
      break
    unfit |= dict.fromkeys(shared)
  # What a held-out document says at length, no training document says.
  said = {
    _normal(p) for d in held for p in paragraphs(d.text)[0] if _is_long(p)
  }
  removed, kept = 0, []
  for document in train:
    parts, joint = paragraphs(document.text)
    rest = [p for p in parts if not (_is_long(p) and _normal(p) in said)]
    removed += len(parts) - len(rest)
    if len(rest) < len(parts):
      document = document._replace(text=joint.join(rest).strip())
    if document.text:
      kept.append(document)
  _check(domains, kept, held)
  notes['dropped']['train_paragraphs_seen_in_heldout'] = removed
  notes['cut_documents'] = [
    f'{d.domain}/{d.id.removesuffix(_END)}' for d in ends.values() if d
  ]
  notes['unfit_to_hold_out'] = [f'{d.domain}/{d.id}' for d in unfit]
  return {'train': kept, 'heldout': list(held)}, notes


def _share(hashes: np.ndarray, seen: np.ndarray) -> float:
  at = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1)
  return (seen[at] == hashes).mean()


def _normal(paragraph: str) -> str:
  return ' '.join(_words(paragraph))


def _is_long(paragraph: str) -> bool:
  return len([*itertools.islice(_words(paragraph), WINDOW)]) == WINDOW


def _hold_out(
  members: list[Document],
  unfit: Collection[Document],
  ends: dict[str, Document | None],
) -> list[Document]:
  """What to hold out of a domain, of which one document may be cut for it.

  Args:
    members: all of its documents, in the order of their ranks. The one that is
      cut is replaced.
    unfit: documents that may not be held out.
    ends: of the documents that were cut, by domain; None where none could be.
  """
  domain = members[0].domain
  left = [d for d in members if d not in unfit]
  end = ends.get(domain)
  if end and end not in unfit:
    return [end]
  picked, large = _pick(left)
  # Of one that alone is left, the others are unfit: so would its end be.
  if not large or domain in ends or len(left) == 1 < len(members):
    return picked
  goal = HELD_OUT * _size(left)
  ends[domain] = None
  for document in reversed(large):
    if parts := _cut(document, goal):
      at = members.index(document)
      members[at : at + 1] = parts
      ends[domain] = parts[1]
      return [parts[1]]
  if not picked and len(left) == len(members):
    kind = 'a single' if len(left) == 1 else 'little but a single'
    raise errors.InputError(
      f'domain {domain!r} is {kind} paragraph ({large[0].id}), so nothing of '
      'it can be held out; add text to it, or ends of lines'
    )
  return picked


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


def _size(members: Sequence[Document]) -> int:
  return sum(d.size for d in members)


def _pick(
  members: Sequence[Document],
) -> tuple[list[Document], list[Document]]:
  """What to hold out, of one domain in the order of ranks.

  Returns:
    Whole documents; and those of which one should rather be cut, if any.
  """
  goal = HELD_OUT * _size(members)
  picked, large, size = [], [], 0
  for document in members:
    if size < goal and size + document.size <= 2 * goal:
      picked.append(document)
      size += document.size
    else:
      large.append(document)
  if size >= goal / 2:
    return picked, []
  # All that fits is next to nothing.
  whole = [min(large, key=lambda d: (d.size, d.rank))] if large[1:] else []
  return whole, large if picked or len(members) == 1 else []


def _check(
  domains,
  train: Sequence[Document],
  held: Sequence[Document],
):
  missing = set(domains) - {d.domain for d in train}
  if missing:
    raise errors.InputError(
      f'domain {min(missing)!r} repeats itself: all of it stands in what would '
      'be held out; add other text to it'
    )
  missing = set(domains) - {d.domain for d in held}
  if missing:
    raise errors.InputError(
      f'domain {min(missing)!r} repeats itself: more than {MAX_SHARED:.0%} of '
      'what could be held out stands in the rest of it, too; take out what its '
      'documents share, a footer perhaps, or add other text to it'
    )
