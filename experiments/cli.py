"""What all commands share: one clear line for a user's mistake."""

from collections.abc import Callable
from collections.abc import Sequence
import os
import sys

from absl import app
from absl import flags
from absl import logging

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
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
      _fail(e)
    except (FileNotFoundError, ImportError, SyntaxError) as e:
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


def _fail(message: object, code: int = 2) -> None:
  # KeyError quotes its message; ml_collections ends some with a full stop.
  text = ' '.join(str(message).strip('\'"').split())
  print(f'error: {text}', file=sys.stderr)
  sys.exit(code)
