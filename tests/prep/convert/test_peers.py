"""The exports, read by the projects they are made for. `tools/check_exports` installs those and runs these tests.

They are no dependencies of this project (gigabytes of them), so without that command everything here skips.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

CAPACITY, ALIGN = 64, 4


def absent(name: str) -> None:
    """Skip a reader that is not here, or fail where it has just been installed."""
    if "EXPORT_READERS_REQUIRED" in os.environ:
        pytest.fail(f"{name} cannot be imported")
    pytest.skip(f"NOT TESTED, {name} is absent: run tools/check_exports")


def automodel():
    """NeMo AutoModel's packer, its collater, and what its models do with a collated batch."""
    if importlib.util.find_spec("nemo_automodel") is None:
        absent("nemo-automodel")
    from nemo_automodel.components.datasets.llm.packed_sequence import pack_dataset
    from nemo_automodel.components.datasets.utils import packed_sequence_thd_collater
    from nemo_automodel.components.distributed.thd_utils import process_input_for_thd

    return pack_dataset, packed_sequence_thd_collater, process_input_for_thd


def test_automodel_packs_the_same_rows_itself(documents, converted):
    """AutoModel's own packer makes the row that we export when it is given the documents of that pack, their labels
    shifted as its datasets shift them."""
    from datasets import load_from_disk

    pack_dataset, *_ = automodel()
    for row, pack in zip(load_from_disk(str(converted("automodel"))), documents, strict=True):
        samples = []
        for ids, mask in pack:
            shifted = [i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)] + [-100]
            samples.append({"input_ids": ids, "labels": shifted})
        (theirs,) = pack_dataset(samples, None, CAPACITY, cp_size=ALIGN // 2)
        assert {name: row[name] for name in theirs} == theirs


def test_automodel_reads_every_document(documents, converted):
    """Through the collater and on to the segments that attention gets: each document whole, alone, with its targets."""
    from datasets import load_from_disk

    _, collate, process = automodel()
    loaded = load_from_disk(str(converted("automodel")))
    for first in range(0, len(loaded), 7):
        batch = process(collate([loaded[n] for n in range(first, first + 7)]))
        assert batch["qkv_format"] == "thd"
        real, padded = batch["cu_seqlens"].tolist(), batch["cu_seqlens_padded"].tolist()
        expected = [d for pack in documents[first : first + 7] for d in pack]
        assert len(real) == len(padded) == len(expected) + 1
        for n, (ids, mask) in enumerate(expected):
            at = padded[n]
            assert real[n + 1] - real[n] == len(ids)
            assert batch["input_ids"][at : at + len(ids)].tolist() == ids
            assert batch["position_ids"][at : at + len(ids)].tolist() == list(range(len(ids)))
            assert not batch["padding_mask"][at : at + len(ids)].any()
            assert batch["padding_mask"][at + len(ids) : padded[n + 1]].all()
            shifted = [i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)]
            tail = padded[n + 1] - at - len(shifted)
            assert batch["labels"][at : padded[n + 1]].tolist() == shifted + [-100] * tail


def test_megatron_reads_every_document(documents, converted):
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        absent("megatron-core")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = str(converted("megatron") / "documents")
    assert IndexedDataset.exists(prefix)
    expected = [ids for pack in documents for ids, _ in pack]
    for mapped in (True, False):
        dataset = IndexedDataset(prefix, mmap=mapped)
        assert len(dataset) == len(expected)
        assert dataset.document_indices.tolist() == list(range(len(expected) + 1))
        assert dataset.sequence_lengths.tolist() == [len(ids) for ids in expected]
        for n, ids in enumerate(expected):
            assert dataset[n].tolist() == ids
            assert dataset.get(n, offset=len(ids) // 2).tolist() == ids[len(ids) // 2 :]


@pytest.fixture
def bridge_dataset(monkeypatch):
    """Megatron-Bridge's class of packed datasets. The package imports Transformer Engine at once, which needs a GPU.
    Its reader does not, so the packages above it are entered without running their `__init__`."""
    found = importlib.util.find_spec("megatron")
    folders = [Path(folder) for folder in found.submodule_search_locations] if found else []
    if not any((folder / "bridge").is_dir() for folder in folders):
        absent("megatron-bridge")
    for name in ("bridge", "bridge.data", "bridge.data.datasets", "bridge.training", "bridge.training.tokenizers"):
        package = ModuleType(f"megatron.{name}")
        package.__path__ = [str(folder.joinpath(*name.split("."))) for folder in folders]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    from megatron.bridge.data.datasets.sft import GPTSFTPackedDataset

    return GPTSFTPackedDataset


def test_bridge_collates_every_document(documents, converted, bridge_dataset):
    """Its collater, on rows as its Parquet reader hands them on (`seq_boundaries`: the begins and the end)."""
    import pyarrow.parquet as pq

    reader = object.__new__(bridge_dataset)
    reader.answer_only_loss, reader.pad_to_max_length, reader.max_seq_length = True, True, CAPACITY
    reader.return_cu_seqlen, reader.pad_cu_seqlens, reader._pad_seq_to_mult = True, False, 1
    reader.tokenizer = SimpleNamespace(eos_id=-1)
    items = [
        {
            "input_ids": np.array(row["input_ids"]),
            "loss_mask": np.array(row["loss_mask"]),
            "seq_boundaries": [*row["seq_start_id"], len(row["input_ids"])],
        }
        for row in pq.read_table(converted("bridge") / "packed.idx.parquet").to_pylist()
    ]
    expected = [[d for d in pack if len(d[0]) > 1] for pack in documents]
    expected = [pack for pack in expected if pack]
    batch = reader.collate_fn(items)
    assert len(batch["tokens"]) == len(expected)
    for n, pack in enumerate(expected):
        at = 0
        for d, (ids, mask) in enumerate(pack):
            end = at + len(ids) - 1
            assert batch["cu_seqlens"][n, d : d + 2].tolist() == [at, end]
            assert batch["tokens"][n, at:end].tolist() == ids[:-1]
            assert batch["labels"][n, at:end].tolist() == ids[1:]
            assert batch["loss_mask"][n, at:end].tolist() == mask[1:]
            assert batch["position_ids"][n, at:end].tolist() == list(range(len(ids) - 1))
            at = end
        assert not batch["loss_mask"][n, at:].any()
