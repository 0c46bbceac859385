"""A packed folder, opened: pack i as zero-copy views over memory-mapped shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from formats.manifest import Manifest, read_manifest
from formats.schema import ALIGNMENTS, PACKS_SCHEMA
from formats.shard import FileEntry, Shard, as_numpy, atomic_write, file_digest, pack_digest

INDEX_NAME = "packs.arrow"
REPORT_NAMES = ("report.json", "report.html")
"""Files for people: listed in the manifest, not needed to read the packs."""


class ThdPack(NamedTuple):
    """One THD pack of T tokens in S slots, read-only views: `input_ids` int32[T], `loss_mask` uint8[T], `seq_lens`,
    `seq_lens_padded`, `doc_offsets` int32[S], `doc_ids` int64[S]."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    seq_lens: np.ndarray
    seq_lens_padded: np.ndarray
    doc_ids: np.ndarray
    doc_offsets: np.ndarray


class SeqIdPack(NamedTuple):
    """One sequence-ID pack of S documents, read-only views: the first four columns int32[capacity], `doc_ids` int64[S],
    `doc_offsets` int32[S]."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray
    doc_ids: np.ndarray
    doc_offsets: np.ndarray


class PackIndex:
    """The columns of `packs.arrow` as arrays of length N, in training order; see `formats.schema.PACKS_SCHEMA`."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self.shard = columns["shard"]
        self.row = columns["row"]
        self.documents = columns["documents"]
        self.tokens = columns["tokens"]
        self.target_tokens = columns["target_tokens"]
        self.max_seqlen = columns["max_seqlen"]
        self.sum_sq = columns["sum_sq"]
        self.xxh3 = columns["xxh3"]
        self._padded = {1: self.tokens} | {a: columns[f"padded_{a}"] for a in ALIGNMENTS}

    def __len__(self) -> int:
        return len(self.tokens)

    def padded(self, align: int) -> np.ndarray:
        """Tokens of every pack, int32[N], when its slots are aligned to `align` (1, 2, 4, … 128)."""
        return self._padded[align]


def write_index(path: Path, columns: dict[str, np.ndarray]) -> FileEntry:
    """Write `packs.arrow` atomically from arrays of equal length named as in `PACKS_SCHEMA`."""
    arrays = [pa.array(np.ascontiguousarray(columns[f.name]), type=f.type) for f in PACKS_SCHEMA]
    with atomic_write(path) as file, pa.ipc.new_file(pa.PythonFile(file, mode="w"), PACKS_SCHEMA) as writer:
        # One record batch, so that every column is one contiguous view when mapped.
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=PACKS_SCHEMA))
    return FileEntry(Path(path).name, file.bytes, file.hexdigest())


def read_index(path: Path) -> PackIndex:
    """Open `packs.arrow` over a memory map; the columns are read-only views."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        schema, batch = reader.schema, reader.get_batch(0)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Arrow file ({error}); restore it from a copy or pack again") from None
    if not schema.equals(PACKS_SCHEMA, check_metadata=False):
        raise ValueError(f"{path}: columns {schema.names} are not those of a pack index; pack again")
    return PackIndex({name: as_numpy(batch.column(name)) for name in schema.names})


def damaged_pack(shard: Path, row: int, pack: int) -> ValueError:
    """What to raise when the hash of a pack is not the one in the index."""
    return ValueError(
        f"{shard}: row {row} (pack {pack}) is damaged: its hash is not the one in packs.arrow; "
        "restore the shard from a copy or pack again"
    )


class PackedDataset:
    """A packed folder (THD or sequence-ID): `len(ds)` packs, `ds[i]` pack i in training order.

    Opening reads the manifest and the index, compares the index with its checksum and every other file but the reports
    with its size; shards are mapped when first touched. Views must not outlive the dataset, and are read-only: copy
    what you hand on. ValueError names what is missing, truncated, too many or of another version.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None):
        """`manifest`: one that is not written yet (the folder is being made); by default that of the folder."""
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(folder)
        self._pack_type = ThdPack if self.manifest.kind == "thd" else SeqIdPack
        self._shards: dict[int, Shard] = {}
        self._shard_names = [e.name for e in self.manifest.files if e.name.startswith("shards/")]
        for entry in self.manifest.files:
            if entry.name in REPORT_NAMES:
                continue
            path = self.folder / entry.name
            if not path.is_file():
                raise ValueError(f"{path}: missing, though the manifest lists it; restore it from a copy or pack again")
            if path.stat().st_size != entry.bytes:
                raise ValueError(
                    f"{path}: {path.stat().st_size} bytes, but the manifest says {entry.bytes}; "
                    "restore it from a copy or pack again"
                )
        for path in sorted((self.folder / "shards").glob("*.arrow")):
            if f"shards/{path.name}" not in self._shard_names:
                raise ValueError(f"{path}: not part of these shards, the manifest does not list it; remove it")
        # What counts targets and places packs is small and read by nothing that would notice: it is compared here.
        self._compare(next(entry for entry in self.manifest.files if entry.name == INDEX_NAME))
        self.index = read_index(self.folder / INDEX_NAME)
        if len(self.index) != self.manifest.totals["packs"]:
            raise ValueError(
                f"{self.folder / INDEX_NAME}: {len(self.index)} packs, but the manifest says "
                f"{self.manifest.totals['packs']}; restore it from a copy or pack again"
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shard_paths(self) -> list[Path]:
        """The files of the shards in the order of their numbers."""
        return [self.folder / name for name in self._shard_names]

    def shards(self) -> Iterator[Shard]:
        """All shards in the order of their numbers, each opened for its turn only."""
        for name in self._shard_names:
            yield Shard(self.folder / name, self.manifest.kind)

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            if not 0 <= number < len(self._shard_names):
                raise ValueError(
                    f"{self.folder / INDEX_NAME}: names shard {number} of {len(self._shard_names)}; pack again"
                )
            # Threads may come at once: the first one opened stays, for views and places last as long as their shard.
            shard = Shard(self.folder / self._shard_names[number], self.manifest.kind)
            shard = self._shards.setdefault(number, shard)
        return shard

    def __getitem__(self, index: int) -> ThdPack | SeqIdPack:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        return self._pack_type(*self._shard(int(self.index.shard[index])).row(int(self.index.row[index])))

    def place(self, index: int) -> tuple[int, int]:
        """`Shard.place` of pack `index`; valid while the dataset is."""
        return self._shard(int(self.index.shard[index])).place(int(self.index.row[index]))

    def check(self, index: int) -> None:
        """Compare pack `index` with its hash in the index; ValueError names shard and row when they differ."""
        if pack_digest(self[index]) != int(self.index.xxh3[index]):
            raise damaged_pack(self.shard_paths[int(self.index.shard[index])], int(self.index.row[index]), index)

    def check_files(self, part: int = 0, parts: int = 1) -> None:
        """Compare every file that the manifest lists with its checksum, reading all bytes; ValueError names the first
        that differs. `part` of `parts`: only every parts-th file, so that several processes can share the work."""
        for entry in self.manifest.files[part::parts]:
            self._compare(entry)

    def _compare(self, entry: FileEntry) -> None:
        if file_digest(self.folder / entry.name) != entry.xxh3_128:
            raise ValueError(
                f"{self.folder / entry.name}: damaged, its checksum is not the one in the manifest; "
                "restore it from a copy or pack again"
            )
