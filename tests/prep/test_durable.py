"""A machine that goes down: what is named last names nothing that is not on the disk."""

import os
from pathlib import Path

import pytest
from packing_runs import packed


@pytest.fixture
def events(monkeypatch):
    """What is made durable and what gets its name, in order: ("sync" or "name", path). Files sync under the name that
    they have then."""
    seen, fsync, replace = [], os.fsync, os.replace

    def log_fsync(descriptor):
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        return fsync(descriptor)

    def log_replace(source, target):
        seen.append(("name", Path(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    return seen


def durable_before(events, path: Path, moment: int) -> bool:
    """Whether the bytes of `path` and its name in its folder were synced before event number `moment`."""
    named = next(n for n, event in enumerate(events) if event == ("name", path))
    before = path.with_name(path.name + ".tmp")
    bytes_synced = ("sync", before) in events[:named] or ("sync", path) in events[named:moment]
    return bytes_synced and ("sync", path.parent) in events[named:moment]


@pytest.mark.parametrize("parts", [(), ("train", "eval")])
def test_the_last_file_takes_its_name_when_all_others_are_on_the_disk(events, parts, source, tokenizer, tmp_path):
    more = ["--eval-fraction", 0.1] if parts else []
    out = packed(
        source, tmp_path / "out", tokenizer, "--shard-size", "16K", "--unit-bytes", "8K", *more, page=True
    ).resolve()
    store = tmp_path.resolve() / "out.store"
    wholes = {store: "store.json", **{out / part: "manifest.json" for part in parts or ("",)}}
    for folder, last in wholes.items():
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) >= 5
        moment = next(n for n, event in enumerate(events) if event == ("name", folder / last))
        for path in files:
            assert durable_before(events, path, moment if path.name != last else len(events)), path
        after = [path for kind, path in events[moment + 1 :] if kind == "name" and path.is_relative_to(folder)]
        assert after == [], "nothing is written behind what makes the folder count"
