"""`prep encode` as a user runs it: what it prints, what it leaves behind, Ctrl-C."""

import json
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from encoding_runs import chats, digest, run, write_jsonl

from prep.cli import main
from prep.encode.builtin import BUILTIN
from prep.encode.command import encode as command

ROOT = Path(__file__).parents[3]


def test_a_process_that_ends_while_it_loads_a_tokenizer_ends_as_any_other(byte_level):
    """The thread that loads is waited for: torn off in native code, it aborted the process now and then."""
    code = "import sys, time; from prep.encode import preload\n"
    code += "preload._read = lambda text: (time.sleep(0.5), print('loaded', flush=True))\n"
    code += "preload.begin_fast(sys.argv[1]); sys.exit(1)"
    result = subprocess.run(
        [sys.executable, "-c", code, byte_level], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert (result.returncode, result.stdout) == (1, "loaded\n")


def test_an_address_of_ray_without_ray_is_refused(tmp_path):
    arguments = ["no.jsonl", "--out", str(tmp_path / "s"), "--tokenizer", "no", "--ray-address", "x"]
    result = CliRunner().invoke(main, ["encode", *arguments])
    assert result.output == "Error: --ray-address is for --engine ray; give both, or none\n"


def test_too_many_bad_records_leave_their_list_behind(tmp_path, byte_level):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{\n{\n')
    given = ["--tokenizer", byte_level, "--on-error", "skip", "--max-errors", "1", "--quiet"]
    encode_it = ["encode", path, "--out", tmp_path / "b.store"]
    for arguments in (encode_it, ["pack", path, "--out", tmp_path / "a", "--seq-len", 64]):
        result = CliRunner().invoke(main, [str(a) for a in [*arguments, *given]])
        assert result.exit_code == 1
        assert "max-errors" in result.output
    for name in ("a.store", "b.store"):
        assert len((tmp_path / name / "units" / "00000.rejects.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "a").exists()


def test_the_command(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(5), {"text": ""}])
    result = CliRunner().invoke(command, [str(path), "--out", str(tmp_path / "s"), "--tokenizer", str(byte_level)])
    assert result.exit_code == 0, result.output
    assert "5 documents" in result.output
    assert "dropped, empty: 1 documents" in result.output
    result = CliRunner().invoke(command, ["--out", "x", "--tokenizer", "y"])
    assert result.exit_code == 2
    assert "either INPUTS or --mix" in result.output
    for useless in (["--column", "text=body"], ["--input-format", "csv"], ["--text-by", "document"]):
        result = CliRunner().invoke(command, ["--mix", "m.yaml", "--out", "x", "--tokenizer", "y", *useless])
        assert result.exit_code == 2
        assert "with --mix each source has its own columns, format and text_by, in the file" in result.output


def test_a_built_in_template_wants_its_tokens(tmp_path, byte_level):
    """As text they would end no turn: none would be trained."""
    path = write_jsonl(tmp_path / "a.jsonl", chats(2))
    given = [str(path), "--tokenizer", str(byte_level), "--chat-template"]
    refused = {"llama3": "<|start_header_id|>", "gemma": "<start_of_turn>", "phi": "<|end|>", "deepseek": "<｜User｜>"}
    for name in BUILTIN:
        result = CliRunner().invoke(main, ["encode", *given, name, "--out", str(tmp_path / name)])
        assert result.exit_code == (name in refused), result.output
        assert (tmp_path / name).exists() == (result.exit_code == 0)
        if name in refused:
            assert f"has no token {refused[name]}, which the built-in chat template {name} writes" in result.output


def test_turns_that_cannot_be_trained_stand_in_ledger_summary_and_lint(tmp_path, byte_level):
    """A template that never closes a turn, and answers without words: nothing of it is silent."""
    (tmp_path / "open.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    answerless = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    path = write_jsonl(tmp_path / "a.jsonl", [*chats(5), answerless])
    turns = sum(len(record["messages"]) // 2 for record in chats(5))
    given = [path, "--out", tmp_path / "s", "--tokenizer", byte_level, "--chat-template", tmp_path / "open.jinja"]
    result = CliRunner().invoke(main, ["encode", *map(str, given), "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    notes = {"turns_without_a_trained_end": turns, "turns_without_words": 1}
    assert notes.items() <= summary["ledger"]["total"]["notes"].items()
    assert summary["ledger"] == json.loads((tmp_path / "s" / "ledger.json").read_text())
    assert (summary["rows"], summary["finished"]) == (5, True)
    again = CliRunner().invoke(main, ["encode", *map(str, given)])  # a finished store is summed up as well
    assert f"turns without a trained end: {turns}" in again.output
    linted = json.loads(CliRunner().invoke(main, ["lint", str(tmp_path / "s"), "--json"]).stdout)
    assert {"turns-without-a-trained-end", "turns-without-words"} <= {f["check"] for f in _findings(linted)}


def _findings(linted):
    return linted["findings"] if "findings" in linted else next(iter(linted.values()))["findings"]


CTRL_C_AFTER_THREE_UNITS = """
import os, signal
from prep.encode.command import encode
from prep.engine.local import Workers

real, done = Workers.run, []

def interrupted(self, function, units, on_done):
    def note(unit, result):
        done.append(unit)
        if on_done:
            on_done(unit, result)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
    return real(self, function, units, note)

if __name__ == "__main__":
    # A suite that was started in the background hands its children an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Workers.run = interrupted
    encode()
"""


CTRL_C_WHILE_WORKERS_START = """
import os, signal, time
from prep.encode.command import encode
from prep.engine.local import Workers

def interrupted(self):
    time.sleep(0.2)  # the process that workers come from imports meanwhile
    os.killpg(0, signal.SIGINT)  # as a terminal does: to all processes at once
    signal.pause()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Workers.setup_result = interrupted
    encode()
"""


def test_ctrl_c_before_the_first_unit(tmp_path, byte_level, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", chats(5))
    given = [path, "--out", tmp_path / "s", "--tokenizer", byte_level, "--workers", "2", "--unit-bytes", "200"]
    (tmp_path / "program.py").write_text(CTRL_C_WHILE_WORKERS_START)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", *given],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    message = f"Error: stopped; what is finished is kept in {tmp_path / 's'}: go on with --resume\n"
    assert (done.returncode, done.stderr) == (1, message)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prep.encode.sources.as_sources", stop)
    for words in (["encode"], ["pack", "--seq-len", "64"]):
        result = CliRunner().invoke(main, [*words, *map(str, given[:5])])
        assert (result.exit_code, result.output) == (1, message)
    monkeypatch.setattr("prep.cli.importlib.import_module", stop)
    result = CliRunner().invoke(main, ["lint", str(tmp_path)])
    assert (result.exit_code, result.output) == (1, "Error: stopped; run the same command once more\n")
    assert CliRunner().invoke(command_of(monkeypatch), [*map(str, given), "--resume"]).exit_code == 0


def command_of(monkeypatch):
    """`prep encode`, no longer interrupted."""
    monkeypatch.undo()
    return command


def test_values_of_options_that_are_none(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", chats(5))
    given = ["encode", path, "--out", tmp_path / "s", "--tokenizer", byte_level, "--quiet"]
    for option, value, reason in (
        ("--max-errors", "3", "--max-errors is for --on-error skip"),
        ("--ray-address", "auto", "--ray-address is for --engine ray"),
        ("--column", "txet=body", "column txet is no field of a record here; known are input_ids"),
        ("--max-errors", "nan%", "max_errors is 'nan%'; give a count"),
        ("--max-errors", "inf%", "max_errors is 'inf%'; give a count"),
        ("--max-errors", "-1", "max_errors is '-1'; give a count"),
        ("--unit-range", "²/3", "--unit-range ²/3: expected I/N"),
        ("--template-date", "tomorrow", "template_date is 'tomorrow'; give a day as YYYY-MM-DD"),
    ):
        result = CliRunner().invoke(main, list(map(str, [*given, option, value])))
        assert reason in result.output
        assert result.exit_code in (1, 2)
        assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "store.json").write_text("[]")
    result = CliRunner().invoke(main, list(map(str, given)))
    assert "store.json: holds no store's description; remove the store" in result.output


def test_a_higher_max_errors_goes_on_where_too_many_stopped(tmp_path, byte_level):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{\n{\n')
    given = ["encode", path, "--out", tmp_path / "s", "--tokenizer", byte_level, "--on-error", "skip", "--quiet"]
    failed = CliRunner().invoke(main, list(map(str, [*given, "--max-errors", "1"])))
    assert "more than --max-errors 1 allows" in failed.output
    raised = CliRunner().invoke(main, list(map(str, [*given, "--max-errors", "2", "--resume"])))
    assert raised.exit_code == 0, raised.output
    run(path, tmp_path / "whole", byte_level, on_error="skip", max_errors="80%")
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")


def test_ctrl_c_ends_cleanly_and_can_be_resumed(tmp_path, byte_level):
    path = write_jsonl(tmp_path / "a.jsonl", chats(500))
    (tmp_path / "program.py").write_text(CTRL_C_AFTER_THREE_UNITS)
    program = [sys.executable, tmp_path / "program.py", path, "--out", tmp_path / "s"]
    program += ["--tokenizer", byte_level, "--workers", "2", "--unit-bytes", "2000"]
    done = subprocess.run(
        program, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "go on with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "s").rglob("*.tmp"))
    run(path, tmp_path / "whole", byte_level, unit_bytes=2000)
    run(path, tmp_path / "s", byte_level, unit_bytes=2000, resume=True)
    assert digest(tmp_path / "s") == digest(tmp_path / "whole")
