"""What jax compiles is kept between processes, by processor."""

import hashlib
import os
import pathlib
import platform
import re
import tempfile
import zlib

from absl import logging

# Of the folder of compiled programs; a run of the quickstart makes 2 MB.
_MOST_BYTES = 2**30


def keep(cache: str | os.PathLike) -> None:
  """Lets jax keep what it compiles in `<cache>/compiled/<this processor>`.

  A later process with the same program, jax and processor loads it: the result
  has the same bits. Without effect where the user has set jax's own
  `JAX_COMPILATION_CACHE_DIR` (or `JAX_ENABLE_COMPILATION_CACHE=false`); a
  folder that cannot be written costs a warning and nothing else.
  """
  # After the flags have been parsed: this import takes a second.
  import jax

  if (
    jax.config.jax_compilation_cache_dir is not None
    or not jax.config.jax_enable_compilation_cache
  ):
    return
  # What XLA compiles for a CPU is for the instructions of this one; jax's key
  # does not promise to tell two of them apart.
  try:
    about = pathlib.Path('/proc/cpuinfo').read_text('utf-8')
  except OSError:
    about = platform.processor()
  features = re.findall(r'^(?:flags|Features|model name).*', about, re.M)
  kind = f'{platform.machine()} {sorted({*features}) or about}'
  name = hashlib.sha256(kind.encode()).hexdigest()[:16]
  folder = pathlib.Path(cache) / 'compiled' / name
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
    tidy(folder)
  except OSError as e:
    logging.warning(
      'cannot write %s (%s): what is compiled is not kept; set --cache',
      folder,
      e.strerror,
    )
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  # All of them: jax's own threshold of a second leaves out half of what a small
  # model compiles, and what is quick to compile is small.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)


def tidy(folder: pathlib.Path) -> None:
  """Deletes damaged programs, then what was used longest ago.

  jax writes its files in place and never again: what a killed process has left
  unfinished would be warned of, and compiled anew, for ever. Its own limit of
  the size breaks on the same remains, and needs a package.

  Args:
    folder: of `*-cache` files; at most `_MOST_BYTES` of them stay.
  """
  stamp = folder / '.tidy'
  since = stamp.stat().st_mtime if stamp.exists() else 0.0
  entries = []
  for path in folder.glob('*-cache'):
    try:
      stat = path.stat()
      whole = stat.st_mtime < since or _is_whole(path)
    except FileNotFoundError:
      continue  # A process that started with this one has deleted it.
    if not whole:
      path.unlink(missing_ok=True)
    else:
      used = max(stat.st_atime, stat.st_mtime)
      entries.append((used, stat.st_size, path))
  stamp.touch()
  size = sum(entry[1] for entry in entries)
  for _, own, path in sorted(entries):
    if size <= _MOST_BYTES:
      break
    path.unlink(missing_ok=True)
    size -= own


def _is_whole(path):
  data = path.read_bytes()
  # Where the package zstandard is installed, jax uses that instead.
  if data and not data.startswith(b'\x78'):
    return True
  try:
    return bool(zlib.decompress(data))
  except zlib.error:
    return False
