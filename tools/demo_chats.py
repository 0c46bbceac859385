"""Write the real conversations of two packages as chats, one JSON line each.

    python tools/demo_chats.py OUT.jsonl

`chitchat-dataset` (MIT): people chatting in pairs; what one writes in a row is one message. `chatterbot-corpus`
(BSD-3-Clause): short exchanges in 28 languages. The second speaker is the one whose words are trained.
"""

import json
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import yaml

from formats.shard import atomic_write

ROLES = ("user", "assistant")


def chitchat() -> Iterator[list[str]]:
    """Conversations of two people, as messages in turns. Those in which only one person wrote are left out."""
    text = resources.files("chitchat_dataset").joinpath("dataset.json").read_text(encoding="utf-8")
    for conversation in json.loads(text).values():
        turns, last = [], None
        for message in (m for burst in conversation["messages"] for m in burst):
            words = message["text"].strip()
            if not words:
                continue
            if message["sender"] == last:
                turns[-1] += "\n" + words
            else:
                turns.append(words)
                last = message["sender"]
        yield turns


def chatterbot() -> Iterator[list[str]]:
    """The exchanges of every language, file by file."""
    data = resources.files("chatterbot_corpus").joinpath("data")
    for language in sorted(data.iterdir(), key=lambda entry: entry.name):
        for file in sorted(language.iterdir(), key=lambda entry: entry.name):
            for turns in yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)["conversations"]:
                yield [str(turn).strip() for turn in turns]


def write_chats(path: Path) -> tuple[int, int]:
    """Write all chats that have a question and an answer; returns (chats, bytes)."""
    count = 0
    with atomic_write(path) as file:
        for source, conversations in (("chitchat-dataset", chitchat()), ("chatterbot-corpus", chatterbot())):
            for turns in conversations:
                turns = turns[: len(turns) // 2 * 2]  # a last question without an answer teaches nothing
                if len(turns) < 2 or not all(turns):
                    continue
                messages = [{"role": ROLES[i % 2], "content": turn} for i, turn in enumerate(turns)]
                line = json.dumps({"messages": messages, "source": source}, ensure_ascii=False)
                file.write(line.encode() + b"\n")
                count += 1
        return count, file.bytes


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/demo_chats.py OUT.jsonl")
    chats, size = write_chats(Path(sys.argv[1]))
    print(f"{chats} conversations, {size / 1e6:.1f} MB")
