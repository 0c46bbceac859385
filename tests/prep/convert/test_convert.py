"""Each conversion, against its documented layout; `test_peers.py` has the readers of the projects themselves."""

import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from byte_tokenizer import write_byte_tokenizer
from formats.dataset import PackedDataset
from formats.layout import seqid_to_thd
from prep.cli import main
from prep.inspect.verify import verify

CAPACITY, VOCABULARY = 64, 300


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_thd_to_seqid_and_back_is_exact(packed, rows, converted):
    seqid = PackedDataset(converted("seqid"))
    assert seqid.manifest.kind == "seqid"
    for n, (ids, mask, seq_lens, slots, doc_ids, offsets) in enumerate(rows):
        pack = seqid[n]
        assert len(pack.input_ids) == CAPACITY
        back = seqid_to_thd(pack.input_ids, pack.attention_mask, pack.labels, align=4)
        for got, want in zip((*back, *pack[4:]), (ids, mask, seq_lens, slots, doc_ids, offsets), strict=True):
            np.testing.assert_array_equal(got, want)
    again, original = PackedDataset(converted("thd", converted("seqid"))), PackedDataset(packed)
    assert again.manifest.fingerprint == original.manifest.fingerprint
    for n in range(len(rows)):
        for got, want in zip(again[n], original[n], strict=True):
            np.testing.assert_array_equal(got, want)
    assert verify(converted("seqid"), deep=True).problems == []
    assert verify(again.folder, deep=True).problems == []


def test_hf_is_a_datasets_folder_of_real_tokens(documents, converted):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_from_disk(str(converted("hf")))
    assert loaded.column_names == ["input_ids", "labels", "position_ids", "seq_lengths"]
    for row, pack in zip(loaded, documents, strict=True):
        assert row["input_ids"] == [i for ids, _ in pack for i in ids]
        assert row["labels"] == [i if m else -100 for ids, mask in pack for i, m in zip(ids, mask, strict=True)]
        assert row["position_ids"] == [t for ids, _ in pack for t in range(len(ids))]
        assert row["seq_lengths"] == [len(ids) for ids, _ in pack]


def test_automodel_rows_are_what_its_collater_stacks(rows, documents, converted):
    """Rows of equal length, spans that sum to it, labels at their predecessors."""
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_from_disk(str(converted("automodel")))
    assert loaded.column_names == ["input_ids", "labels", "position_ids", "seq_lens", "seq_lens_padded"]
    for row, (ids, _, _, slots, *_), pack in zip(loaded, rows, documents, strict=True):
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == CAPACITY
        assert sum(row["seq_lens_padded"]) == CAPACITY
        assert row["seq_lens_padded"][:-1] == slots[:-1].tolist()
        assert row["input_ids"][: len(ids)] == ids.tolist()
        at = 0
        for (document, mask), n, span in zip(pack, row["seq_lens"], row["seq_lens_padded"], strict=True):
            assert row["input_ids"][at : at + n] == document
            shifted = [i if m else -100 for i, m in zip(document[1:], mask[1:], strict=True)]
            assert row["labels"][at : at + span] == shifted + [-100] * (span - n + 1)
            assert row["position_ids"][at : at + span] == list(range(span))
            at += span


def test_bridge_trains_the_same_pairs(documents, converted):
    """Megatron-Bridge feeds ids[s:e−1], predicts ids[s+1:e], and weighs with loss_mask[s:e−1] (GPTSFTPackedDataset)."""
    table = pq.read_table(converted("bridge") / "packed.idx.parquet")
    assert table.schema.names == ["input_ids", "loss_mask", "seq_start_id"]
    assert [str(f.type.value_type) for f in table.schema] == ["int32", "int8", "int32"]
    wanted = [[d for d in pack if len(d[0]) > 1] for pack in documents]
    for row, pack in zip(table.to_pylist(), [p for p in wanted if p], strict=True):
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        assert bounds[0] == 0
        for start, end, (ids, mask) in zip(bounds[:-1], bounds[1:], pack, strict=True):
            assert row["input_ids"][start:end] == ids
            assert row["loss_mask"][start : end - 1] == mask[1:]


def test_megatron_documents_by_the_documented_layout(documents, converted):
    folder = converted("megatron")
    data = (folder / "documents.idx").read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, boundaries = struct.unpack("<QBQQ", data[9:34])
    assert (version, code) == (1, 8)
    expected = [ids for pack in documents for ids, _ in pack]
    assert (sequences, boundaries) == (len(expected), len(expected) + 1)
    lengths = np.frombuffer(data, np.int32, sequences, 34)
    pointers = np.frombuffer(data, np.int64, sequences, 34 + 4 * sequences)
    starts = np.frombuffer(data, np.int64, boundaries, 34 + 12 * sequences)
    assert len(data) == 34 + 12 * sequences + 8 * boundaries
    assert starts.tolist() == list(range(boundaries))
    tokens = (folder / "documents.bin").read_bytes()
    for document, length, pointer in zip(expected, lengths, pointers, strict=True):
        assert np.frombuffer(tokens, np.uint16, length, pointer).tolist() == document
    assert len(tokens) == 2 * lengths.sum()


@pytest.mark.parametrize("to", ["seqid", "thd"])
def test_any_number_of_workers_writes_the_same_bytes(packed, converted, tmp_path, to):
    source = packed if to == "seqid" else converted("seqid")
    contents = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert run("convert", source, "--to", to, "--out", out, "--workers", workers).exit_code == 0
        contents.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert len(contents[0]) > 4
    assert contents[0] == contents[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_pack_is_not_converted(packed, tmp_path, workers):
    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    shard = folder / "shards" / "00001.arrow"
    data = bytearray(shard.read_bytes())
    data[data.find(PackedDataset(packed)[67].input_ids.tobytes()) + 4] ^= 1
    shard.write_bytes(data)
    result = run("convert", folder, "--to", "seqid", "--out", tmp_path / "x", "--workers", workers)
    assert result.exit_code == 1
    assert "00001.arrow: row 1 (pack 67) is damaged" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def test_refusals_leave_nothing(packed, tmp_path):
    result = run("convert", packed, "--to", "thd", "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert "is thd already" in result.output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    assert "already exists" in run("convert", packed, "--to", "hf", "--out", tmp_path / "full").output
    for inside, why in (
        (packed, "is converted; name a folder outside it"),
        (packed / "deep" / "x", "holds packed shards and nothing else; name another folder"),
    ):
        result = run("convert", packed, "--to", "hf", "--out", inside)
        assert result.output == f"Error: --out {inside} lies inside {packed}, which {why}\n"
        assert not (packed / "deep").exists()
    assert run("convert", tmp_path / "none", "--to", "hf", "--out", tmp_path / "x").exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation="sdpa").double().eval()


def test_stock_models_leak_with_a_mask_and_isolate_with_positions(model, rows, documents, converted):
    """Change one token of the first document: with the document numbers as `attention_mask` later documents feel it,
    with `position_ids`, no mask and use_cache=False none does."""
    import torch
    from datasets import load_from_disk

    def moved(ids, start, **arguments):
        other = list(ids)
        other[1] = (other[1] + 7) % VOCABULARY
        with torch.no_grad():
            a, b = (model(torch.tensor(x)[None], use_cache=False, **arguments).logits[0] for x in (ids, other))
        return float((a[start:] - b[start:]).abs().max())

    n = next(i for i, r in enumerate(rows) if len(r[2]) > 2 and r[2][0] > 3)
    pack = PackedDataset(converted("seqid"))[n]
    mask = torch.tensor(pack.attention_mask)[None]
    assert moved(pack.input_ids.tolist(), int(rows[n][3][0]), attention_mask=mask) > 1e-3
    row = load_from_disk(str(converted("hf")))[n]
    positions = torch.tensor(row["position_ids"])[None]
    assert moved(row["input_ids"], int(rows[n][2][0]), position_ids=positions) == 0


def test_trl_trains_the_same_loss(model, documents, converted, tiny_llama_dir, tmp_path):
    """One step of TRL's SFTTrainer on the converted folder: its loss is that of the documents one at a time."""
    trl = pytest.importorskip("trl", reason="NOT TESTED, TRL is absent: pip install trl")
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer, LlamaForCausalLM

    total, targets = 0.0, 0
    for ids, mask in (d for pack in documents[:4] for d in pack):
        with torch.no_grad():
            logits = model(torch.tensor(ids)[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(ids[1:], dtype=torch.long), reduction="none"
        )
        total += float(losses[torch.tensor(mask[1:]).bool()].sum())
        targets += sum(mask)
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        padding_free=True,
        max_length=None,
        report_to=[],
        logging_steps=1,
        learning_rate=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    stock = LlamaForCausalLM.from_pretrained(tiny_llama_dir, attn_implementation="sdpa", use_cache=False)
    trainer = trl.SFTTrainer(
        stock,
        args=config,
        train_dataset=load_from_disk(str(converted("hf"))).select(range(4)),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama_dir),
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert loss == pytest.approx(total / targets, rel=2e-4)


@pytest.mark.parametrize("to", ["thd", "seqid", "hf", "automodel", "bridge"])
def test_packs_are_never_read_as_documents(packed, converted, tmp_path, to):
    """As raw input each pack would be one document, whose parts see each other."""
    (tmp_path / "tokenizer").mkdir()
    write_byte_tokenizer(tmp_path / "tokenizer")
    folder = packed if to == "thd" else converted(to)
    shards = sorted((folder / "shards").glob("*.arrow")) if to in ("thd", "seqid") else []
    for source in (folder, *(shards[:1] and [shards[0].parent, shards[0]])):
        for command in (["pack", "--seq-len", 64], ["encode"], ["plan", "--seq-len", 64]):
            if source == folder and shards and command[0] == "plan":
                continue  # that knows them
            out = [] if command[0] == "plan" else ["--out", tmp_path / "out"]
            result = run(*command, source, *out, "--tokenizer", tmp_path / "tokenizer")
            assert result.exit_code == 1
            sentence = "holds packed shards|is a packed shard, whose rows are several|a pack of several documents, as"
            assert re.search(f"^Error: .*({sentence})", result.output), result.output
            assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer"]
