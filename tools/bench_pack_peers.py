"""The packers that `tools/bench_pack.py` compares with: adapters around other projects' own code.

Each adapter takes (lengths int32[N], capacity) and returns a function without arguments that plans once; what only
converts the input to the peer's form happens before, outside the measured time. The result is a list of bins (lists
of document numbers) or None where the peer hands back packed rows instead.

To install the peers beside the project (torch is needed by AutoModel's module, which imports it):

    pip install trl lightbinpack seqpacker ai2-olmo-core && pip install --no-deps nemo-automodel
"""

from collections import defaultdict
from collections.abc import Callable

import numpy as np

Plan = Callable[[], list[list[int]] | None]


class _PlanOnly:
    """pyarrow.compute without the gathers: TRL's function plans and moves tokens in one, and only the plan is timed."""

    def __init__(self, compute) -> None:
        self.compute = compute

    def __getattr__(self, name: str):
        return getattr(self.compute, name)

    def take(self, table, indices):
        return table

    def filter(self, values, mask):
        return values


def _trl(strategy: str) -> Callable:
    import pyarrow as pa
    from trl import data_utils

    data_utils.pc = _PlanOnly(data_utils.pc)

    def prepare(lengths: np.ndarray, capacity: int) -> Plan:
        # Tokens of type null have no bytes; the function hands back rows, so only their number can be checked.
        offsets = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        rows = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.nulls(int(offsets[-1])))})

        def plan() -> None:
            plan.bins = len(data_utils._pack_bfd(rows, capacity))

        return plan

    return prepare


def _lightbinpack(strategy: str) -> Callable:
    from lightbinpack import packing

    def prepare(lengths: np.ndarray, capacity: int) -> Plan:
        values = lengths.tolist()
        return lambda: packing.pack(values, capacity, strategy=strategy)

    return prepare


def _automodel(strategy: str) -> Callable:
    from nemo_automodel.components.datasets.llm.neat_packing import greedy_knapsack

    def prepare(lengths: np.ndarray, capacity: int) -> Plan:
        values = lengths.tolist()
        return lambda: greedy_knapsack(values, capacity)

    return prepare


def _olmo(strategy: str) -> Callable:
    from olmo_core.data.utils import InstancePacker

    def prepare(lengths: np.ndarray, capacity: int) -> Plan:
        ends = np.cumsum(lengths.astype(np.int64))
        spans = np.stack([ends - lengths, ends], axis=1)
        order = np.argsort(-1 * lengths.astype(np.int64))  # the packer numbers documents in its own sorted order

        def plan() -> list[list[int]]:
            bins = InstancePacker(capacity).pack_documents(spans)[0]
            return [order[members].tolist() for members in bins] if plan.convert else bins

        plan.convert = False
        return plan

    return prepare


def _seqpacker(strategy: str) -> Callable:
    import seqpacker

    def prepare(lengths: np.ndarray, capacity: int) -> Plan:
        values = lengths.tolist()
        return lambda: seqpacker.pack_sequences(values, capacity, strategy=strategy).bins

    return prepare


# name: (module family, adapter, strategy, most documents it is asked to pack)
PEERS = {
    "trl bfd": (_trl, "bfd", 10**5),
    "automodel neat": (_automodel, "", 10**6),
    "olmo-core": (_olmo, "", 10**5),
    "lightbinpack obfd": (_lightbinpack, "obfd", 10**6),
    "lightbinpack bfd": (_lightbinpack, "bfd", 10**6),
    "seqpacker obfd": (_seqpacker, "obfd", 10**6),
}


def available() -> tuple[dict[str, tuple[Callable, int]], dict[str, str]]:
    """({name: (prepare, most documents)}, {name: why it is missing})."""
    found, missing = {}, {}
    for name, (adapter, strategy, most) in PEERS.items():
        try:
            found[name] = adapter(strategy), most
        except Exception as error:  # whatever another project's import raises is the reason to print
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def lpfhp(histogram: np.ndarray, capacity: int) -> dict[tuple[int, ...], int]:
    """Longest-pack-first histogram packing, written from the description of Krell et al. (arXiv 2107.02027, sec. 3).

    histogram: int64[capacity + 1], documents of each length. Lengths go in decreasing order, all documents of one
    length together and as many to a pack as fit, to the packs with the least room; packs are split where only some
    are needed. Returns {lengths in the pack: packs}.
    """
    by_room: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for length in range(capacity, 0, -1):
        left = int(histogram[length])
        while left > 0:
            room = next((r for r in range(length, capacity) if by_room[r]), capacity)
            packs, content = by_room[room].pop() if room < capacity else (left, ())
            repeat = min(room // length, left)
            used = min(packs, left // repeat)
            if room < capacity and packs > used:
                by_room[room].append((packs - used, content))
            by_room[room - length * repeat].append((used, content + (length,) * repeat))
            left -= used * repeat
    out: dict[tuple[int, ...], int] = defaultdict(int)
    for groups in by_room.values():
        for packs, content in groups:
            out[content] += packs
    return out
