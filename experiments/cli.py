"""What all commands share: one clear line for a user's mistake."""

from collections.abc import Callable
from collections.abc import Sequence
import os
import pathlib
import re
import sys

from absl import app
from absl import flags
from absl import logging
import ml_collections

from effllm_jax import errors
from effllm_jax import interrupts

CACHE = flags.DEFINE_string(
  'cache',
  os.path.join('~', '.cache', 'effllm_jax'),
  'Folder for downloaded models and texts, shared by all runs.',
)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Parses flags and runs `main`; the entry point of every command.

  An unknown flag or config key, a value of the wrong type, and every
  `errors.InputError` end in one line on stderr and exit code 2; a signal that
  asked for the end in one line and 128 + its number, as a shell would say it.
  Anything else is a bug and keeps its traceback.
  """

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:
      _fail(_unknown_key(argv, str(e.args[0])))
    except (flags.Error, TypeError, ValueError) as e:
      _fail(e)
    except (ImportError, OSError, SyntaxError) as e:
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
    except interrupts.Stopped as e:
      _end(str(e), 128 + e.signum)
    except KeyboardInterrupt:
      _end('stopped; run the same command again to resume', 130)

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
    raise errors.InputError(
      f'{path} cannot be read as a config: {_last_line(e)}'
    ) from e


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
  return str(error).strip().splitlines()[-1].strip()


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


def _fail(message: object) -> None:
  _end('error: ' + ' '.join(str(message).split()), 2)


def _end(line: str, code: int) -> None:
  print(line, file=sys.stderr)
  sys.exit(code)
