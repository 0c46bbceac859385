"""For the Megatron family: packed Parquet of Megatron-Bridge, and the indexed documents (.bin/.idx) of Megatron-LM."""

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from formats.dataset import PackedDataset
from formats.shard import atomic_write
from prep.convert.packs import Row, rows
from prep.convert.saved import list_array

BRIDGE_SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.int8())), ("seq_start_id", pa.list_(pa.int32()))]
)
ROW_GROUP = 500
"""Packs a row group: Megatron-Bridge keeps one row group in memory."""

INDEX_MAGIC = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def write_bridge(dataset: PackedDataset, out: Path) -> None:
    """`packed.idx.parquet`: `input_ids`, `loss_mask`, `seq_start_id` (begin of every document), real tokens only.

    Megatron-Bridge trains position t of a document towards token t + 1 where `loss_mask[t]` is 1: its mask stands at
    the token that predicts, ours at the one that is predicted. Documents of one token have nothing to predict and are
    left out. It cuts the last token of every document off (it only is a label), so slots for context parallelism must
    be made there.
    """
    out.mkdir(parents=True)
    with (
        atomic_write(out / "packed.idx.parquet") as file,
        pq.ParquetWriter(pa.PythonFile(file, mode="w"), BRIDGE_SCHEMA, compression="zstd") as writer,
    ):
        held: list[tuple] = []
        for n, row in enumerate(rows(dataset)):
            if (fields := _bridge_row(row)) is not None:
                held.append(fields)
            if len(held) == ROW_GROUP or (held and n == len(dataset) - 1):
                columns = [
                    list_array(list(c), f.type.value_type)
                    for c, f in zip(zip(*held, strict=True), BRIDGE_SCHEMA, strict=True)
                ]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=BRIDGE_SCHEMA))
                held = []


def _bridge_row(row: Row) -> tuple | None:
    ids, mask = row.without_padding()
    trained = np.repeat(row.seq_lens > 1, row.seq_lens)
    seq_lens = row.seq_lens[row.seq_lens > 1]
    if len(seq_lens) == 0:
        return None
    ids, mask = ids[trained], mask[trained]
    predicts = np.append(mask[1:], 0).astype(np.int8)
    starts = np.cumsum(seq_lens) - seq_lens
    predicts[starts + seq_lens - 1] = 0
    return ids, predicts, starts.astype(np.int32)


def write_megatron(dataset: PackedDataset, out: Path) -> None:
    """`documents.bin` and `documents.idx`: every slot is a document, in the order of the packs, real tokens only.

    Layout of the index: magic (9 bytes), version uint64 = 1, dtype code uint8, sequences uint64, document boundaries
    uint64; then lengths int32[sequences], byte offsets int64[sequences], first sequence of each document and the end
    int64[boundaries]. Megatron's GPT dataset joins and cuts documents itself and has no loss mask: packs and targets
    are not kept, so use it for texts.
    """
    m = dataset.manifest
    dtype = np.dtype(np.uint16 if max(m.vocab_size, m.largest_id + 1) < 65500 else np.int32)
    out.mkdir(parents=True)
    lengths = []
    with atomic_write(out / "documents.bin") as file:
        for row in rows(dataset):
            file.write(np.ascontiguousarray(row.without_padding()[0], dtype).data)
            lengths.append(row.seq_lens)
    sizes = np.concatenate(lengths).astype(np.int32)
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * dtype.itemsize
    with atomic_write(out / "documents.idx") as file:
        file.write(INDEX_MAGIC + struct.pack("<QBQQ", 1, DTYPE_CODES[dtype], len(sizes), len(sizes) + 1))
        for array in (sizes, pointers, np.arange(len(sizes) + 1, dtype=np.int64)):
            file.write(array.data)
