"""Small inputs for `encode`, a run over them, and what stands in its store."""

import hashlib
import json
import random

from prep.encode.options import EncodeOptions
from prep.encode.run import encode

WORDS = ["the", "quick", "brown", "fox", "naïve", "日本語", "emigrés", "😀", "x" * 30, "\n", "line\nbreak"]


def texts(count, seed=0, longest=40):
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))} for _ in range(count)]


def chats(count, seed=0):
    draw = random.Random(seed)

    def words():
        return " ".join(draw.choices(WORDS[:-2], k=draw.randint(1, 12)))

    return [
        {
            "messages": [
                {"role": ("user", "assistant")[k % 2], "content": words()} for k in range(2 * draw.randint(1, 4))
            ]
        }
        for _ in range(count)
    ]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def documents(store):
    return [tuple(part.tolist() for part in store.document(i)) for i in range(len(store))]


def digest(folder):
    """A hash over all names and bytes below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def run(inputs, out, tokenizer, *, workers=1, resume=False, **options):
    inputs = inputs if isinstance(inputs, list) else [inputs]
    return encode(inputs, out, EncodeOptions(str(tokenizer), **options), workers=workers, resume=resume)
