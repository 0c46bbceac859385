"""Fixtures of whole runs of `prep`: a tokenizer folder and a file of chats."""

import pytest
from packing_runs import chats, write_jsonl

from byte_tokenizer import write_byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("source") / "chats.jsonl", chats(300))
