"""Datasets by name or local path, as `datasets` finds them: `hf:name[:config]#split`."""

import json

import datasets
import fsspec
import huggingface_hub
import pytest

from prep.encode import hub
from prep.encode.options import EncodeOptions
from prep.encode.run import encode


def test_files_beside_the_data_are_no_matter(tmp_path, byte_level):
    """Most repositories of the hub have a licence, pictures, a second form of the same data: `datasets` takes the files
    of one kind, and tells of all of them."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    (folder / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n")
    for name in ("LICENSE", "README.md", "0.csv"):
        (folder / name).write_text("text\nnone of the dataset\n")
    store = encode([f"hf:{folder}"], tmp_path / "s", EncodeOptions(str(byte_level)))
    assert len(store) == 2
    (folder / "LICENSE").write_text("another")
    assert len(encode([f"hf:{folder}"], tmp_path / "s", EncodeOptions(str(byte_level)))) == 2, "the same input"


def test_a_dataset_that_was_saved_to_disk_is_named_without_hf(tmp_path, byte_level):
    data = datasets.Dataset.from_dict({"text": ["one", "two"]})
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    for name in ("one", "splits#train"):
        with pytest.raises(ValueError, match=rf"hf:.*/{name}: was written by save_to_disk.*without hf:"):
            encode([f"hf:{tmp_path / name}"], tmp_path / "s", EncodeOptions(str(byte_level)))
        assert len(encode([str(tmp_path / name)], tmp_path / f"of-{name}", EncodeOptions(str(byte_level)))) == 2


def test_without_the_hub_what_datasets_keeps_of_it_is_read(tmp_path, byte_level, monkeypatch):
    """The nodes of a cluster often reach nothing outside: somebody calls `load_dataset` before, on one that does."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kept = tmp_path / "cache" / "somebody___chats" / "default" / "0.0.0" / "0123"
    kept.mkdir(parents=True)
    with datasets.arrow_writer.ArrowWriter(path=str(kept / "chats-train.arrow")) as writer:
        writer.write({"text": "one"})
        writer.write({"text": "two"})
        writer.finalize()
    split = {"name": "train", "num_bytes": 0, "num_examples": 2, "dataset_name": "chats"}
    datasets.DatasetInfo(
        config_name="default", dataset_name="chats", version="0.0.0", splits={"train": split}
    ).write_to_directory(str(kept))
    assert len(encode(["hf:somebody/chats"], tmp_path / "s", EncodeOptions(str(byte_level)))) == 2
    with pytest.raises(ValueError, match="no split 'test'; name one as hf:NAME#SPLIT, of train"):
        encode(["hf:somebody/chats#test"], tmp_path / "t", EncodeOptions(str(byte_level)))


def test_files_of_the_hub_are_known_by_address_and_revision(monkeypatch):
    """Their bytes are read once, to be encoded: another commit is another input."""
    filesystem, seen = fsspec.filesystem("memory"), set()
    filesystem.pipe("/hub/a.jsonl", b"12345")
    for files, told in ((["memory://hub/a.jsonl"], "one"), (["memory://hub/a.jsonl"], "two"), ([], "two")):
        monkeypatch.setattr(hub, "_files", lambda path, found=(files, told): found)
        size, digest = hub.describe("hf:somebody/chats")
        assert size == 5 * len(files)
        seen.add((digest, hub.stamp("hf:somebody/chats")))
    assert len({digest for digest, _ in seen}) == len({stamp for _, stamp in seen}) == 3
