"""What all commands share: one clear line for a user's mistake."""

from collections.abc import Callable
from collections.abc import Sequence
import difflib
import os
import pathlib
import re
import sys

from absl import app
from absl import flags
from absl import logging
import ml_collections

from effllm_jax import errors

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
      return flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:
      _fail(_unknown_key(argv, str(e.args[0])))
    except (flags.Error, TypeError, ValueError) as e:
      _fail(e)
    except (ImportError, SyntaxError) as e:
      _fail(f'cannot read the config: {e}')

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
    errors.InputError: the file does not exist, or has no `get_config`.
  """
  path = pathlib.Path(flags.FLAGS[flag.name].config_filename)
  if not path.is_file():
    raise errors.InputError(f'{path} is not a file; set --config')
  try:
    # The flag reports a broken file only when its value is used.
    flag.value.to_dict()
    return flag.value
  except (OSError, AttributeError) as e:
    last = str(e).strip().splitlines()[-1]
    raise errors.InputError(f'{path} cannot be read as a config: {last}') from e


def _unknown_key(argv, name) -> str:
  """What to say of an override whose key the config does not have."""
  # The text of the error begins with the key's last part, quoted.
  part = re.search(r'\w+', name)
  overrides = [
    a for a in argv if part and re.match(rf'--config\..*{part.group()}\b', a)
  ]
  if not overrides:
    return name
  key = overrides[0].partition('=')[0].removeprefix('--config.')
  message = f'the config has no key {key!r}'
  known = flags.FLAGS['config'].value
  if isinstance(known, ml_collections.ConfigDict):
    near = difflib.get_close_matches(key, _keys(known), n=1, cutoff=0.5)
    message += f'; did you mean {near[0]!r}?' if near else ''
  return f'{message}; its keys are in the file given as --config'


def _keys(tree: ml_collections.ConfigDict, prefix: str = '') -> list[str]:
  names = []
  for name, value in tree.items():
    names.append(prefix + name)
    if isinstance(value, ml_collections.ConfigDict):
      names += _keys(value, f'{prefix}{name}.')
  return names


def _fail(message: object, code: int = 2) -> None:
  text = ' '.join(str(message).split())
  print(f'error: {text}', file=sys.stderr)
  sys.exit(code)
