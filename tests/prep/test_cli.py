"""The command line as a whole: names, help, exit codes."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from prep.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent.parent


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_help_names_all_commands_and_the_exit_codes():
    shown = run("--help").output
    for name in COMMANDS:
        assert f"\n  {name} " in shown
    for code in ("0  done", "1  something is wrong", "2  the command line", "3  a --gate"):
        assert code in shown
    assert "_PREP_COMPLETE=bash_source" in shown
    assert run("--version").output.startswith("main, version") or "version" in run("--version").output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_every_option_a_word_of_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"\n  prep {name} " in result.output
    command = main.get_command(click.Context(main), name)
    assert command.name == name


def test_wrong_usage_exits_with_2():
    assert run("nonsense").exit_code == 2
    assert run("pack", "--seq-len", "many").exit_code == 2
    assert run("convert", "x", "--to", "nonsense", "--out", "y").exit_code == 2


def test_completion_knows_the_commands():
    result = subprocess.run(
        [sys.executable, "-c", "from prep.cli import main; main(prog_name='prep')"],
        env={"_PREP_COMPLETE": "bash_complete", "COMP_WORDS": "prep ve", "COMP_CWORD": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.stdout.split() == ["plain,verify"], result.stderr


def test_the_help_of_no_command_imports_anything_heavy():
    code = "import sys\nfrom click.testing import CliRunner\nfrom prep.cli import COMMANDS, main\n"
    code += "for name in COMMANDS: CliRunner().invoke(main, [name, '--help'])\n"
    code += "heavy = 'numpy pyarrow numba torch tokenizers jinja2 rich matplotlib'.split()\n"
    code += "sys.exit(' '.join(m for m in heavy if m in sys.modules) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
