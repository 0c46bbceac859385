"""A document store as its readers see it."""

import numpy as np
from encoding_runs import run, texts, write_jsonl


def test_a_store_is_read_only_views(tmp_path, byte_level):
    store = run(write_jsonl(tmp_path / "a.jsonl", texts(5)), tmp_path / "s", byte_level)
    ids, mask = store.document(3)
    assert not ids.flags.writeable
    assert not mask.flags.writeable
    assert ids.dtype == np.int32
    assert mask.dtype == np.uint8
    assert [len(store.document(i)[0]) for i in range(5)] == store.lengths.tolist()
    assert [int(store.document(i)[1].sum()) for i in range(5)] == store.target_tokens.tolist()
