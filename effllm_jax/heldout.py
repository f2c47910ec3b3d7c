"""Held-out text as windows that score each of its tokens once."""

from collections.abc import Iterable
import dataclasses
import hashlib
import logging
import math
import os

import numpy as np
import tokenizers

from effllm_jax import dataset
from effllm_jax import documents
from effllm_jax import errors
from effllm_jax import tokenizing

# Share of tokens that may stand for lost text without a word.
_MOST_UNKNOWN = 0.01


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Held-out text of one domain.

  windows int32 [n, seq_len + 1]: inputs `[:, :-1]`, targets `[:, 1:]`.
  weight float32 [n, seq_len]: 1 where a target is scored, 0 for separators
  and padding. num_bytes: UTF-8 bytes of the text that is scored, exactly.
  """

  windows: np.ndarray
  weight: np.ndarray
  num_bytes: int


def windows(
  text: str | os.PathLike | Iterable[documents.Document],
  tokenizer: tokenizers.Tokenizer,
  separator_id: int,
  *,
  seq_len: int,
  tokens_per_domain: int,
) -> dict[str, HeldOut]:
  """Windows by domain, for bits per byte.

  Documents follow each other, each after a separator, which is the context of
  its first token. Windows overlap by one token, so every token of the text is a
  target exactly once. Text that the tokenizer has no tokens for is told in a
  warning.

  Args:
    text: folder of `corpus.prepare`, of which the held-out part is read in the
      order of its documents' hashes; or documents of any origin, all of which
      are held in memory, in the order in which they come.
    tokenizer: its special tokens are not looked for in the text.
    separator_id: token between documents, and padding.
    seq_len: targets a window.
    tokens_per_domain: at most this many targets are scored; the last document
      is cut there, or up to a few tokens before it where a token ends inside
      a character. 0 takes all.

  Raises:
    errors.InputError: a number that makes no sense, or what reading the
      documents does.
  """
  _check(seq_len, tokens_per_domain)
  if isinstance(text, str | os.PathLike):
    domains = _held_out(text)
  else:
    domains = {}
    for document in text:
      domains.setdefault(document.domain, []).append(document)
  encoder = tokenizing.encoder(tokenizer)
  found = {
    domain: _score_windows(
      domain, members, encoder, separator_id, seq_len,
      tokens_per_domain or math.inf,
    )
    for domain, members in domains.items()
  }  # fmt: skip
  _warn_of_unknown(found, tokenizer)
  return found


def _held_out(
  data_dir: str | os.PathLike,
) -> dict[str, Iterable[documents.Document]]:
  """What a dataset holds out, by domain, in the order of the hashes."""
  source = dataset.source(data_dir, 'heldout')
  read = lambda i: dataset.as_document(source[i])
  # Not the documents: they would be in the memory of every process.
  ranks = {domain: [] for domain in dataset.domains(data_dir)}
  for i, document in enumerate(dataset.documents(data_dir, 'heldout')):
    ranks[document.domain].append((_rank(document), i))
  return {
    domain: (read(i) for _, i in sorted(members))
    for domain, members in ranks.items()
  }


def _check(seq_len: int, tokens: int) -> None:
  for name, value in (('seq_len', seq_len), ('tokens', tokens)):
    if value < (name == 'seq_len'):
      raise errors.InputError(
        f'held-out {name} {value} is too small; set a positive number'
      )


def _warn_of_unknown(
  found: dict[str, HeldOut], tokenizer: tokenizers.Tokenizer
) -> None:
  """Tells in one line that much of a text is lost between text and tokens."""
  unknown = tokenizing.unknown(tokenizer)
  if unknown is None:
    return
  total = sum(int(held.weight.sum()) for held in found.values())
  lost = sum(
    int(((held.windows[:, 1:] == unknown) & (held.weight > 0)).sum())
    for held in found.values()
  )
  if lost > _MOST_UNKNOWN * total:
    logging.warning(
      '%.1f %% of the held-out tokens are %r, in whose place the text is lost: '
      'it is scored as if it were predicted, so bits per byte look better than '
      'they are and cannot be compared with those of another tokenizer; take a '
      'source with a tokenizer of bytes',
      100 * lost / total, tokenizer.id_to_token(unknown),
    )  # fmt: skip


def _rank(document: documents.Document) -> bytes:
  # The 0 was a seed. Without it other text would be chosen, and runs could not
  # be compared with older ones.
  name = f'0/{document.domain}/{document.id}'
  return hashlib.blake2b(name.encode()).digest()


def _score_windows(
  domain: str, documents: Iterable[documents.Document],
  encoder: tokenizers.Tokenizer, separator_id: int, seq_len: int, budget: float,
) -> HeldOut:  # fmt: skip
  """Windows over the documents of one domain, up to a budget of tokens."""
  tokens, scored, num_bytes = [], [], 0
  for document in documents:
    encoding = encoder.encode(document.text)
    ids, length = _prefix(encoding, document.text, budget)
    if not ids:
      break
    tokens += [separator_id, *ids]
    scored += [0, *[1] * len(ids)]
    num_bytes += length
    budget -= len(ids)
    if budget <= 0 or len(ids) < len(encoding):
      break
  if not tokens:
    raise errors.InputError(
      f'no whole character of domain {domain!r} fits into {budget} held-out '
      'tokens; raise the number'
    )
  n = -(-(len(tokens) - 1) // seq_len)
  padding = n * seq_len + 1 - len(tokens)
  tokens = np.array(tokens + [separator_id] * padding, np.int32)
  weight = np.array(scored[1:] + [0] * padding, np.float32)
  starts = np.arange(n)[:, None] * seq_len
  return HeldOut(
    windows=tokens[starts + np.arange(seq_len + 1)],
    weight=weight.reshape(n, seq_len),
    num_bytes=num_bytes,
  )


def _prefix(
  encoding: tokenizers.Encoding, text: str, budget: float
) -> tuple[list[int], int]:
  """The most tokens within the budget that end with a whole character.

  Returns:
    The tokens, and the bytes of the text that they stand for.
  """
  if len(encoding) <= budget:
    return encoding.ids, len(text.encode())
  end = int(budget)
  # One at a time: `offsets` makes a list of those of all tokens.
  span = encoding.token_to_chars
  # The tokens of one character that was split all carry its offsets.
  while end and span(end)[0] < span(end - 1)[1]:
    end -= 1
  return encoding.ids[:end], len(text[: span(end)[0]].encode())
