"""The one exception for what a user can put right."""


class InputError(ValueError):
  """A mistake in a config, a file or a folder, not in this code.

  The message is one line that names the offending value and the remedy. The
  commands in `experiments` print it without a traceback and exit with 2.
  """
