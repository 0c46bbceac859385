"""`prep lint` and `prep plan` read raw files as `prep encode` does."""

import json

import pytest
from packing_runs import run, write_jsonl

COMMANDS = {"lint": [], "plan": ["--seq-len", 256, "--cp", 1, "--algo", "bfd"]}
UNSTABLE = "{% for m in messages %}{{ messages | length }}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("command", COMMANDS)
def test_raw_files_are_read_as_the_options_say(command, tokenizer, tmp_path):
    write_jsonl(tmp_path / "data", [{"body": "one"}, {"body": "two"}, {"something": "else"}])
    given = [command, tmp_path / "data", "--tokenizer", tokenizer, *COMMANDS[command], "--json"]
    assert "line 1: no known field" in run(*given).output
    assert "line 3: column body, which --column names, is missing" in run(*given, "--column", "text=body").output
    result = run(*given, "--column", "text=body", "--on-error", "skip")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["lengths"] if command == "plan" else found[str(tmp_path / "data")])["documents"] == 2
    as_text = json.loads(run(*given, "--input-format", "text").output)
    assert (as_text["lengths"] if command == "plan" else as_text[str(tmp_path / "data")])["documents"] == 3


def test_a_chat_template_that_is_given_is_the_one_that_is_looked_at(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    (tmp_path / "unstable.jinja").write_text(UNSTABLE)
    given = ["lint", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--json"]
    checks = []
    for more in ([], ["--chat-template", tmp_path / "unstable.jinja"]):
        result = run(*given, *more)
        assert result.exit_code == 0, result.output
        checks.append(
            {finding["check"] for finding in json.loads(result.output)[str(tmp_path / "a.jsonl")]["findings"]}
        )
    assert checks[1] - checks[0] >= {"template-prefix-unstable"}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_encoded_is_read_as_it_is(command, source, tokenizer, tmp_path):
    store = tmp_path / "s"
    assert run("encode", source, "--out", store, "--tokenizer", tokenizer, "--quiet").exit_code == 0
    result = run(command, store, *COMMANDS[command], "--train-role", "user", "--text-by", "line")
    assert result.exit_code == 1
    left_out = "leave out --text-by, --train-role, or name the raw files"
    assert result.output == f"Error: {store} is encoded already: {left_out}\n"
