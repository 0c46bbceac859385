"""Folders as `datasets.save_to_disk` writes them, for Hugging Face TRL, Axolotl and NeMo AutoModel.

A folder is Arrow IPC *stream* files, a `state.json` that names them and a `dataset_info.json` with the features. It is
written with pyarrow alone, so `datasets` need not be installed here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from formats.dataset import PackedDataset
from formats.layout import position_ids, shift_labels
from formats.schema import BATCH_PACKS, IGNORE_INDEX
from formats.shard import atomic_write, write_json
from prep.convert.packs import Row, rows

FILE_BYTES = 512 << 20

Fields = dict[str, np.ndarray]


def write_hf(dataset: PackedDataset, out: Path) -> None:
    """`input_ids, labels, position_ids, seq_lengths`: real tokens only, no padding.

    TRL's padding-free collator derives positions from `seq_lengths`, so these sum to the row's length. There is no
    `attention_mask`: stock transformers models read one as 0 / not 0, and documents leak into each other; they are kept
    apart by `position_ids`, with `use_cache=False`.
    """

    def fields(row: Row) -> Fields:
        ids, mask = row.without_padding()
        labels = np.where(mask.view(bool), ids, np.int32(IGNORE_INDEX))
        positions = position_ids(row.seq_lens)
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "seq_lengths": row.seq_lens}

    _write(dataset, out, fields)


def write_automodel(dataset: PackedDataset, out: Path) -> None:
    """`input_ids, labels, position_ids, seq_lens, seq_lens_padded`, rows of exactly the capacity, as NeMo AutoModel's
    `packed_sequence_thd_collater` reads them.

    Labels are shifted already (the token to predict stands at its predecessor, as AutoModel's own datasets do), and the
    row's tail padding belongs to the padded span of its last document, so that the spans sum to the row.
    """
    capacity, pad_id = dataset.manifest.capacity, dataset.manifest.pad_id

    def fields(row: Row) -> Fields:
        used = len(row.input_ids)
        ids, labels = np.full(capacity, pad_id, np.int32), np.full(capacity, IGNORE_INDEX, np.int32)
        ids[:used], labels[:used] = row.input_ids, shift_labels(row.input_ids, row.loss_mask)
        spans = row.slots.copy()
        spans[-1] += capacity - used
        positions = position_ids(spans)
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "seq_lens": row.seq_lens,
            "seq_lens_padded": spans,
        }

    _write(dataset, out, fields)


def _write(dataset: PackedDataset, out: Path, fields: Callable[[Row], Fields]) -> None:
    out.mkdir(parents=True)
    batches = _batches(dataset, fields)
    first = next(batches)
    names, batch, more, total, count = [], first, True, 0, 0
    # Names carry the number of files, which is known at the end: they are renamed then.
    while more:
        path, written = out / f"part-{len(names):05d}.arrow", 0
        with atomic_write(path) as file, pa.ipc.new_stream(pa.PythonFile(file, mode="w"), first.schema) as writer:
            while more and written < FILE_BYTES:
                writer.write_batch(batch)
                written += batch.nbytes
                count += batch.num_rows
                batch = next(batches, None)
                more = batch is not None
        names.append(path)
        total += written
    final = [f"data-{n:05d}-of-{len(names):05d}.arrow" for n in range(len(names))]
    for path, name in zip(names, final, strict=True):
        path.rename(out / name)
    feature = {"_type": "List", "feature": {"_type": "Value", "dtype": "int32"}}
    write_json(
        out / "dataset_info.json",
        {"citation": "", "description": "", "features": {n: feature for n in first.schema.names}, "license": ""},
    )
    mark = f"{dataset.manifest.fingerprint} {first.schema.names}".encode()
    write_json(
        out / "state.json",
        {
            "_data_files": [{"filename": name} for name in final],
            "_fingerprint": xxhash.xxh3_64(mark).hexdigest(),
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )


def _batches(dataset: PackedDataset, fields: Callable[[Row], Fields]) -> Iterator[pa.RecordBatch]:
    held: list[Fields] = []
    for n, row in enumerate(rows(dataset)):
        held.append(fields(row))
        if len(held) == BATCH_PACKS or n == len(dataset) - 1:
            arrays = {name: list_array([f[name] for f in held], pa.int32()) for name in held[0]}
            yield pa.RecordBatch.from_pydict(arrays)
            held = []


def list_array(values: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    """A list column from one array a row."""
    offsets = np.append(0, np.cumsum([len(v) for v in values])).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values), kind))
