"""What a person sees of a run: every line as it was said."""

import logging

import pytest

from effllm_jax import console
from experiments import cli

# Markup of rich: a style that goes, a closing tag that is refused, an emoji.
LINES = ('resuming runs/[draft] after step 3', "tokens '[/v2]'", '[red]a :car:')


@pytest.mark.parametrize('line', LINES)
def test_brackets_are_no_markup(capsys, line):
  with console.Progress(2, 0) as progress:
    progress.say(line)
    logging.warning('of %s', line)
  assert capsys.readouterr().err.splitlines()[:2] == [
    line,
    f'warning: of {line}',
  ]


@pytest.mark.parametrize('line', LINES)
def test_brackets_are_no_markup_beside_tables(capsys, line):
  cli.tables().print(line, soft_wrap=True)
  assert capsys.readouterr().out == f'{line}\n'
