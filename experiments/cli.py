"""What all commands share: one clear line for a user's mistake."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import difflib
import glob
import itertools
import os
import pathlib
import re
import select
import signal
import sys
from typing import TextIO

from absl import app
from absl import flags
from absl import logging
import ml_collections
import rich.console

from effllm_jax import console
from effllm_jax import errors
from experiments import compiled
from experiments.configs import smollm2_135m

# What ml_collections says of a key with a dot.
_DOTS = re.compile(r'ConfigDict does not accept dots .* key (.*) contains.*')
# Flags whose values are files or folders.
_PATHS = ('cache', 'out', 'study', 'text', 'tune', 'workdir', 'workdirs')
CACHE = flags.DEFINE_string(
  'cache',
  os.path.join('~', '.cache', 'effllm_jax'),
  'Folder for downloaded models and texts, shared by all runs.',
)


def tables() -> rich.console.Console:
  """Standard output for tables: a file or a pipe has no width of its own."""
  out = console.plain()
  if not out.is_terminal:
    # Wider than any table of ours; none is drawn wider than it has to be.
    out.width = 200
  return out


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Parses flags and runs `main`; the entry point of every command.

  An unknown flag or config key, a value of the wrong type, and every
  `errors.InputError` end in one line on stderr and exit code 2; a SIGTERM or
  Ctrl-C in one line, once what is unfinished is removed, and 128 + its number,
  as a shell would say it.
  Where nobody reads its output any longer, as after `| head`, it ends without a
  word. Anything else is a bug and keeps its traceback.
  """

  def parse(argv):
    try:
      argv = [_config_at_home(x) for x in argv]
      _check_files(argv)
      rest = flags.FLAGS(argv)
      _localize_paths()
      return rest
    except (AttributeError, KeyError) as e:
      _fail(_unknown_key(argv, str(e.args[0])))
    except (flags.Error, TypeError, ValueError) as e:
      # ml_collections quotes the traceback of a config that fails.
      before, traceback, _ = str(e).partition('Traceback (most recent')
      _fail(f'{before} {_last_line(e)}' if traceback else _with_remedy(str(e)))
    except BrokenPipeError:  # Of --help.
      raise
    except Exception as e:  # The config is a program of the user's.
      _fail(
        f'--config cannot be read: {_last_line(e)}; correct the file, or set '
        '--config to another'
      )

  def guarded(argv):
    if argv[1:]:
      _fail(f'unexpected argument {argv[1]!r}; flags start with --')
    # Orbax, TFDS and jax report their own progress at INFO.
    logging.set_verbosity(logging.WARNING)
    try:
      # After the flags have been parsed: this imports jax, which takes a
      # second.
      from effllm_jax import interrupts

      interrupts.unwind_on_sigterm()
      compiled.keep(CACHE.value)
      main(argv)
    except errors.InputError as e:
      _fail(e)
    # Before what the import that it interrupts would have given.
    except KeyboardInterrupt as e:
      signum = getattr(e, 'signum', signal.SIGINT)
      _end('stopped; run the same command again to resume', 128 + signum)
    except interrupts.Stopped as e:
      _end(str(e), 128 + e.signum)

  try:
    try:
      app.run(guarded, flags_parser=parse)
    finally:
      sys.stdout.flush()
  except BrokenPipeError as e:
    # Also what another process of ours no longer reads.
    if not _is_read(sys.stdout):
      # Python tries to write once more as it ends.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      raise SystemExit(128 + signal.SIGPIPE) from e
    raise


def out_file(path: str) -> pathlib.Path:
  """The file that --out names, before what it will hold takes its time.

  Raises:
    errors.InputError: it is a folder, or in none that can be written.
  """
  out = pathlib.Path(path)
  if out.is_dir():
    raise errors.InputError(f'--out {path!r} is a folder; set --out to a file')
  if not out.absolute().parent.is_dir():
    raise errors.InputError(f'{out.parent} is not a folder; set --out')
  if not os.access(out.parent, os.W_OK):
    raise errors.InputError(f'cannot write to {out.parent}; set --out')
  return out


def check_model(
  workdir: str | None, event: int | None, model: str | None
) -> None:
  """Checks that a command that asks a model is told which.

  Raises:
    errors.InputError: both a run and a model are named, or none, or an event
      that is of no run.
  """
  if (workdir is None) == (model is None):
    raise errors.InputError(
      'this takes a run or a model; set one of --workdir and --model'
    )
  if model is not None and event is not None:
    raise errors.InputError(
      f'--event {event} is that of a run; set --workdir, or set --model to the '
      "run's events/<index>"
    )


def config(flag: flags.FlagHolder) -> ml_collections.ConfigDict:
  """The config of a `config_flags` flag.

  Raises:
    errors.InputError: the file does not exist, has no `get_config`, or that
      returns something else than a config with all keys, see `check`.
  """
  path = program(flags.FLAGS[flag.name].config_filename, '--config')
  with reading(path):
    # The flag reports a broken file only when its value is used.
    flag.value.to_dict()
  check(flag.value, path)
  return flag.value


def program(path: str | os.PathLike, flag: str) -> pathlib.Path:
  """A config or a study of the user's, which `flag` names.

  Raises:
    errors.InputError: no such file; the nearest name beside it is told.
  """
  given = os.fspath(path) or "''"
  path = pathlib.Path(path)
  # Unlike pathlib, these two raise nothing where a path is too long.
  if os.path.isfile(path):
    return path
  names = glob.glob('*.py', root_dir=path.parent)
  meant = suggestion(path.name, names, path.with_name)
  raise errors.InputError(f'{given} is not a file; set {flag}{meant}')


def suggestion(
  word: str, known: Sequence[str], say: Callable[[str], object] = repr
) -> str:
  """The end of an error: which known word may be meant, as `say` has it."""
  found = difflib.get_close_matches(word, known, n=1)
  return f'; did you mean {say(found[0])}?' if found else ''


@contextlib.contextmanager
def reading(file: str | os.PathLike, what: str = 'a config') -> Iterator[None]:
  """Refuses a program of the user's, by default a config, if it raises.

  Raises:
    errors.InputError: instead of any other exception.
  """
  try:
    yield
  except Exception as e:
    raise errors.InputError(
      f'{file} cannot be read as {what}: {type(e).__name__}: {_last_line(e)}; '
      'correct the file'
    ) from e


def check(config: ml_collections.ConfigDict, file: str | os.PathLike) -> None:
  """Raises InputError unless a config has the keys and types of the shipped.

  Args:
    config: of a user.
    file: named in errors.
  """

  def compare(have, base, at=''):
    for key in sorted({*base} ^ {*have}, key=str):
      raise errors.InputError(
        f'{file}: the config {"lacks" if key in base else "has no"} key '
        f'{at}{key}; import a shipped config and change lines'
      )
    for key, value in base.items():
      kind, found = type(value), have[key]
      if kind is ml_collections.ConfigDict and isinstance(found, kind):
        # Weights of domains have the names of domains.
        if value or not found:
          compare(found, value, f'{at}{key}.')
          continue
        for name in found:
          if not isinstance(name, str):
            raise errors.InputError(
              f'{file}: {at}{key} has {name!r} for a domain; domains have names'
            )
          if '.' in name:
            raise errors.InputError(f'{file}: {at}{key}: {_dotted(name)}')
        kind = float
        values = found.values()
      else:
        values = [found]
      for x in values:
        right = isinstance(x, (int, float) if kind is float else kind)
        if not right or (isinstance(x, bool) and kind is not bool):
          raise errors.InputError(
            f'{file}: {at}{key} = {x!r} is no {kind.__name__}; set '
            f'--config.{at}{key}'
          )

  compare(config, smollm2_135m.get_config())


def _localize_paths() -> None:
  """Puts the home folder in the place of ~, which no shell does after a =.

  Raises:
    ValueError: a path is the address of a bucket. As a path it is a folder on
      the disk of this machine, which a pod loses.
  """
  for name in _PATHS:
    if name in flags.FLAGS and flags.FLAGS[name].value is not None:
      value = flags.FLAGS[name].value
      listed = value if isinstance(value, list) else [value]
      for path in listed:
        if '://' in path:
          raise ValueError(
            f'--{name}: {path} is no folder of this machine; mount it, and '
            'name the folder where it is mounted'
          )
      listed = [os.path.expanduser(path) for path in listed]
      flags.FLAGS[name].value = listed if isinstance(value, list) else listed[0]


def _config_at_home(flag: str) -> str:
  """As `_localize_paths`, for a file that is read while flags are parsed."""
  name, equals, path = flag.partition('=')
  if name not in ('--config', '-config'):
    return flag
  return f'{name}{equals}{os.path.expanduser(path)}'


def _check_files(argv: Sequence[str]) -> None:
  """Raises InputError where --config is no file; a pipe or a device blocks."""
  for flag, value in itertools.pairwise([*argv, '']):
    name, equals, given = flag.partition('=')
    # What follows a colon is an argument of `get_config`.
    path = (given if equals else value).partition(':')[0]
    if name in ('--config', '-config') and (path or equals):
      program(path, '--config')


def join() -> None:
  """Joins the processes of this run, started by whatever runs the cluster.

  Raises:
    errors.InputError: no cluster is found, or its processes do not meet.
  """
  import jax

  try:
    jax.distributed.initialize()
  except (RuntimeError, ValueError) as e:
    raise errors.InputError(
      f'--distributed: {_last_line(e)}; start the command on every host '
      'through srun, mpirun, GKE or the TPU pod, or leave the flag out'
    ) from e


def _last_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return _plain(lines[-1].strip()) if lines else type(error).__name__


def _plain(text: str) -> str:
  """A line of ml_collections; of a key with a dot, what can be done there."""
  return _DOTS.sub(lambda found: _dotted(found[1]), text)


def _dotted(name: str) -> str:
  return (
    f'{name!r} has a dot, which no key of a config may have; a domain needs '
    'another name in the text: that of its folder, or "domain" in its .jsonl '
    'lines'
  )


def _unknown_key(argv: Sequence[str], text: str) -> str:
  """What to say of an override whose key the config does not have."""
  # ml_collections quotes the key's last part, then a similar one if any.
  part, near = re.search(r'\w+', text), re.search(r'mean "(\w+)"', text)
  wrong = [
    a for a in argv if part and re.match(rf'--config\..*{part.group()}\b', a)
  ]
  if not wrong:
    return text
  if any(a.startswith('--config.data.weights.') for a in wrong):
    return (
      'the weights of all domains are one value; set them as in '
      """--config.data.weights="{'drama': 2.0, 'wiki': 1.0}\""""
    )
  key = wrong[0].partition('=')[0].removeprefix('--config.')
  hint = 'all'
  if near:
    parts = (near.group(1) if x == part.group() else x for x in key.split('.'))
    hint = f'did you mean {".".join(parts)!r}? All'
  return (
    f'the config has no key {key!r}; {hint} keys are in the file given as '
    '--config'
  )


def _with_remedy(text: str) -> str:
  """What absl says of a flag; what to write where it is none, or no number."""
  text = _plain(text)
  missing = re.search(r'Flag (--\w+) must have a value other than None', text)
  if missing:
    return f'{missing[1]} is not given; set it, --help says to what'
  for said, remedy in (
    ("flag 'config.", 'set --config too, of a command that has it'),
    ('Unknown command line', '--help lists what there is'),
    ('to float', 'write a number, such as 0.5 or 200e6'),
    ('for int()', 'write a whole number in digits, such as 200000'),
    ('Non-boolean', 'write true or false'),
  ):
    if said in text:
      return f'{text}; {remedy}'
  return text


def _is_read(file: TextIO) -> bool:
  """Whether a file is none but a pipe whose other end is closed."""
  found = select.poll()
  found.register(file, 0)
  return not any(event & select.POLLERR for _, event in found.poll(0))


def _fail(message: object) -> None:
  _end(f'error: {errors.InputError(str(message))}', 2)


def _end(line: str, code: int) -> None:
  print(line, file=sys.stderr)
  sys.exit(code)
