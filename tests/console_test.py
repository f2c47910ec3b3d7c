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


def test_what_goes_by_is_shown(capsys, monkeypatch):
  """Lines in place of a bar, of bytes; what goes by is as it was."""
  monkeypatch.setattr(console, '_LINE_INTERVAL', 0.0)
  texts = ['a' * 200_000, 'b' * 300_000]
  assert [*console.passing('reading [b]', texts, len)] == texts
  assert [*console.passing('reading', texts, len, 500_000)] == texts
  assert capsys.readouterr().err.replace('\N{NO-BREAK SPACE}', ' ') == (
    'reading [b]: 0.2 MB\nreading [b]: 0.5 MB\n'
    'reading: 0.2 MB of 0.5 MB\nreading: 0.5 MB of 0.5 MB\n'
  )


def test_what_goes_by_quickly_is_not_shown(capsys):
  assert [*console.passing('reading', range(1000), int)] == [*range(1000)]
  assert capsys.readouterr().err == ''


def test_a_bar_shows_what_has_gone_by(capsys, monkeypatch):
  """On a terminal, where it is gone when all has."""
  monkeypatch.setenv('FORCE_COLOR', '1')
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setattr(console, '_BAR_INTERVAL', 0.0)
  passing = console.passing('reading', ['a' * 10**6] * 3, len, 3 * 10**6)
  assert len([*passing]) == 3
  shown = capsys.readouterr().err
  assert '3.0/3.0 MB' in shown
  # The line is cleared.
  assert shown.rstrip().endswith('\x1b[2K')
