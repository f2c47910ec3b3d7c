"""What all commands share: one clear line for a user's mistake."""

from collections.abc import Callable
from collections.abc import Sequence
import itertools
import os
import pathlib
import re
import sys

from absl import app
from absl import flags
from absl import logging
import ml_collections

from effllm_jax import errors
from experiments.configs import smollm2_135m

CACHE = flags.DEFINE_string(
  'cache',
  os.path.join('~', '.cache', 'effllm_jax'),
  'Folder for downloaded models and texts, shared by all runs.',
)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Parses flags and runs `main`; the entry point of every command.

  An unknown flag or config key, a value of the wrong type, and every
  `errors.InputError` end in one line on stderr and exit code 2. Anything else
  is a bug and keeps its traceback.
  """

  def parse(argv):
    try:
      _check_files(argv)
      return flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:
      _fail(_unknown_key(argv, str(e.args[0])))
    except (flags.Error, TypeError, ValueError) as e:
      _fail(e)
    except Exception as e:  # The config is a program of the user's.
      _fail(f'--config cannot be read: {_last_line(e)}')

  def guarded(argv):
    if argv[1:]:
      _fail(f'unexpected argument {argv[1]!r}; flags start with --')
    # Orbax, TFDS and jax report their own progress at INFO.
    logging.set_verbosity(logging.WARNING)
    try:
      main(argv)
    except errors.InputError as e:
      _fail(e)
    except KeyboardInterrupt:
      _fail('stopped; run the same command again to resume', code=130)

  app.run(guarded, flags_parser=parse)


def config(flag: flags.FlagHolder) -> ml_collections.ConfigDict:
  """The config of a `config_flags` flag.

  Raises:
    errors.InputError: the file does not exist, has no `get_config`, or that
      returns something else than a config with all keys, see `check`.
  """
  path = pathlib.Path(flags.FLAGS[flag.name].config_filename)
  if not path.is_file():
    raise errors.InputError(f'{path} is not a file; set --config')
  try:
    # The flag reports a broken file only when its value is used.
    flag.value.to_dict()
  except Exception as e:  # A program of the user's.
    raise errors.InputError(
      f'{path} cannot be read as a config: {_last_line(e)}'
    ) from e


  check(flag.value, path)
  return flag.value


def check(config: ml_collections.ConfigDict, file: str | os.PathLike) -> None:
  """Raises InputError unless a config has the keys and types of the shipped.

  Args:
    config: of a user.
    file: named in errors.
  """

  def compare(have, base, at=''):
    for key in sorted({*base} ^ {*have}):
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


def _check_files(argv: Sequence[str]) -> None:
  """Raises ValueError where --config is a pipe or a device, which block."""
  for flag, value in itertools.pairwise([*argv, '']):
    name, equals, given = flag.partition('=')
    path = given if equals else value
    if name in ('--config', '-config') and os.path.exists(path):
      if not os.path.isfile(path):
        raise ValueError(f'{path} is not a file; set --config')


def _last_line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[-1].strip() if lines else type(error).__name__


def _unknown_key(argv: Sequence[str], text: str) -> str:
  """What to say of an override whose key the config does not have."""
  # ml_collections quotes the key's last part, then a similar one if any.
  part, near = re.search(r'\w+', text), re.search(r'mean "(\w+)"', text)
  wrong = [
    a for a in argv if part and re.match(rf'--config\..*{part.group()}\b', a)
  ]
  if not wrong:
    return text
  key = wrong[0].partition('=')[0].removeprefix('--config.')
  hint = f'did you mean {near.group(1)!r}? All' if near else 'all'
  return (
    f'the config has no key {key!r}; {hint} keys are in the file given as '
    '--config'
  )


def _fail(message: object, code: int = 2) -> None:
  print(f'error: {errors.InputError(str(message))}', file=sys.stderr)
  sys.exit(code)
