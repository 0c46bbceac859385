"""The command line as a whole: names, help, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import prep.inspect.facts
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


def test_summaries_are_whole_sentences_of_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "prep.cli", "--help"], capture_output=True, text=True, cwd=ROOT, env={"COLUMNS": "80"}
    )
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first = lines.index("Commands:") + 1
    summaries = dict(line.strip().split(maxsplit=1) for line in lines[first : first + len(COMMANDS)])
    assert list(summaries) == list(COMMANDS)
    for name, summary in summaries.items():
        assert summary[0].isupper(), name
        assert summary.endswith("."), name
        assert "..." not in summary, name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_every_option_a_word_of_help(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"\n  prep {name} " in result.output
    command = main.get_command(click.Context(main), name)
    assert command.name == name
    options = {parameter.opts[0]: parameter for parameter in command.params if isinstance(parameter, click.Option)}
    assert [option for option, parameter in options.items() if not parameter.help] == []
    assert options["--quiet"].help == "Print errors only."
    assert options["--json"].help == "Print the facts as JSON."


@pytest.mark.parametrize("command", ["encode", "pack", "convert", "view"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(command, tmp_path, monkeypatch):
    """Neither input nor tokenizer is there: it is not even looked for."""
    option, kind = ("--html", "file") if command == "view" else ("--out", "folder")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "locked")  # as for all but root
    needed = {"encode": ["--tokenizer", "no"], "pack": ["--seq-len", 64], "convert": ["--to", "hf"], "view": []}
    cases = {
        "": " is empty; name a ",
        tmp_path / "file" / "x": f": {tmp_path / 'file'} is a file; name another ",
        tmp_path / "locked" / "x": f": nothing may be written in {tmp_path / 'locked'}; name another ",
        tmp_path / "link" / "x": f": there is no folder {tmp_path / 'link'}; name another ",
    }
    if command == "view":
        cases[tmp_path] = " is a folder; name a "
        cases[tmp_path / "none" / "x.html"] = f": there is no folder {tmp_path / 'none'}; name another "
    else:
        cases[tmp_path / "locked" / "deep" / "x"] = f": nothing may be written in {tmp_path / 'locked'}; name another "
    if command in ("convert", "view"):
        cases["s3://bucket/x"] = ": name a folder of this machine, and copy it from there".replace("folder", kind)
    for place, sentence in cases.items():
        result = run(command, tmp_path / "no-input", option, place, *needed[command])
        ending = "" if "://" in str(place) else kind
        assert result.output == f"Error: {option}{' ' if str(place) else ''}{place}{sentence}{ending}\n"
        assert result.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "locked"]


def test_an_error_of_the_system_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(prep.inspect.facts, "packed_folders", lambda folder: (folder / "gone").read_bytes())
    assert run("verify", tmp_path).output == f"Error: {tmp_path / 'gone'}: No such file or directory\n"


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
