"""Whole documents, and readers that get them out of the files of packages.

A reader maps the files of one package, by name, to (id, text) of each document.
Nothing that was downloaded is ever imported or run.
"""

import ast
import bz2
from collections.abc import Iterable
from collections.abc import Iterator
import gzip
import hashlib
import html
import html.parser
import io
import pathlib
import re
from typing import NamedTuple
import xml.etree.ElementTree as ElementTree

# Of one package, packed or not; the largest here has a tenth of that.
MOST_BYTES = 2**28


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


def in_blocks(
  documents: Iterable[Document], count: int, size: int
) -> Iterator[list[Document]]:
  """So many documents at a time, of `size` bytes unless one alone has more."""
  block, total = [], 0
  for document in documents:
    if (block and total + document.size > size) or len(block) == count:
      yield block
      block, total = [], 0
    block.append(document)
    total += document.size
  if block:
    yield block


def read_plain(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  """One document a file, as it is."""
  for name, data in files.items():
    yield pathlib.PurePath(name).stem, data.decode()


def read_plays(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  """One play a file, in Markdown."""
  for name, data in files.items():
    text = re.sub(r'^#+ ', '', data.decode(), flags=re.M)
    text = re.sub(r'\*\*|(?<!\w)_|_(?!\w)|\\(?=[^\w\s])', '', text)
    yield pathlib.PurePath(name).stem, re.sub(r'[ \t]+$', '', text, flags=re.M)


def read_bible(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
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


def read_wiki(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  """The articles of MediaWiki dumps, as plain text."""
  for data in files.values():
    dump = io.BytesIO(_unpacked(bz2.BZ2File(io.BytesIO(data))))
    for _, page in ElementTree.iterparse(dump):
      if not page.tag.endswith('}page'):
        continue
      title = page.findtext('{*}title')
      if page.findtext('{*}ns') == '0' and page.find('{*}redirect') is None:
        text = wikitext(page.findtext('{*}revision/{*}text') or '')
        yield title, f'{title}\n\n{text}'
      page.clear()


def _unpacked(file: io.BufferedIOBase) -> bytes:
  """What a compressed file holds, if that is not absurdly much."""
  with file:
    text = file.read(MOST_BYTES + 1)
  if len(text) > MOST_BYTES:
    raise ValueError(f'more than {MOST_BYTES:,} bytes, unpacked')
  return text


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

  def close(self):
    super().close()
    self._flush()


def read_html(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  """The prose of HTML and Mallard pages, one document each."""
  for name, data in files.items():
    page = data.decode(errors='replace')
    # Mallard's inner <title> is a heading; HTML's own is inside the head.
    if name.endswith('.page'):
      page = re.sub(r'<(/?)title\b', r'<\1h1', page)
      page = page.replace('</key><key>', '+')
    parser = _Prose()
    parser.feed(page)
    parser.close()
    yield name.removeprefix('usr/share/'), '\n\n'.join(parser.blocks)


def read_foldoc(files: dict[str, bytes]) -> Iterator[tuple[str, str]]:
  """dictd: a head word at the margin, its entry indented; dictzip is gzip."""
  for data in files.values():
    text = _unpacked(gzip.GzipFile(fileobj=io.BytesIO(data))).decode()
    for entry in re.split(r'\n(?=\S[^\n]*\n\n? )', text):
      head, _, body = entry.strip().partition('\n')
      if not head.startswith('00-database'):
        body = re.sub(r'[{}]', '', body)
        yield head, f'{head}\n{re.sub(r"(?m)^ +", "", body)}'
