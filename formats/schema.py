"""Arrow schemas of packed shards and of their index, and the constants both halves agree on."""

import pyarrow as pa

FORMAT_VERSION = 1

IGNORE_INDEX = -100
"""Label of a position that is not trained (the convention of PyTorch and Hugging Face)."""

KINDS = ("thd", "seqid")
ORDERS = ("input", "shuffle", "cost")

ALIGNMENTS = (2, 4, 8, 16, 32, 64, 128)
"""Slot alignments for which `packs.arrow` states every pack's padded length, so a loader that must re-lay
slots for another mesh knows the largest row without reading a shard."""

BATCH_PACKS = 64
"""Packs a record batch. 64 packs of 1 Mi tokens stay far below the 2³¹ offsets of an Arrow list column."""

MAX_CAPACITY = 1 << 24
"""Tokens. 64 packs of this capacity still fit the 2³¹ offsets of one record batch."""

THD_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("seq_lens", pa.list_(pa.int32())),
        ("seq_lens_padded", pa.list_(pa.int32())),
        ("doc_ids", pa.list_(pa.int64())),
        ("doc_offsets", pa.list_(pa.int32())),
    ]
)
"""A row is a pack of T tokens in S slots: `input_ids`, `loss_mask` [T]; the others [S]."""

SEQID_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("attention_mask", pa.list_(pa.int32())),
        ("position_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("doc_ids", pa.list_(pa.int64())),
        ("doc_offsets", pa.list_(pa.int32())),
    ]
)
"""A row is a pack of exactly `capacity` tokens; `doc_ids`, `doc_offsets` [S]."""

SCHEMAS = {"thd": THD_SCHEMA, "seqid": SEQID_SCHEMA}

PACKS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("documents", pa.int32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("target_tokens", pa.int32(), nullable=False),
        pa.field("max_seqlen", pa.int32(), nullable=False),
        pa.field("sum_sq", pa.int64(), nullable=False),
        *[pa.field(f"padded_{a}", pa.int32(), nullable=False) for a in ALIGNMENTS],
        pa.field("xxh3", pa.uint64(), nullable=False),
    ]
)
"""`packs.arrow`: row i is pack i in training order. `tokens`, `max_seqlen` and `sum_sq` (Σ sᵢ²) count real
tokens; `padded_A` is the sum of the slots when each is aligned to A; `xxh3` is `formats.shard.pack_digest`."""

METADATA_KEY = b"meshpack"
"""Key of the schema metadata under which a shard repeats the essentials of its manifest, as JSON."""
