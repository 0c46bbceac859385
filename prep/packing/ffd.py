"""First-fit decreasing, exact: the assignment of the textbook loop, from the histogram.

Documents by decreasing length (stable), each into the first bin with room (Johnson, 1973). Bins are kept as *runs* of
consecutive identical bins. When a size comes up, the first run with room takes as many documents per bin as fit, bin
by bin, which is what the loop does one document at a time; at most one bin of a run ends up different, so a size adds
at most three runs and there are never more than 3·D + 1.

Runs are found through a tree of maxima over the bin numbers. A leaf covers 2^k bins (k = 0 unless there are millions)
and holds the largest room of the runs that begin in it.
"""

import numpy as np
from numba import njit

from prep.packing.lengths import Histogram
from prep.packing.placing import Plan

MOST_LEAVES = 1 << 20


def ffd(h: Histogram, max_docs: int) -> Plan:
    """The plan of first-fit decreasing; `max_docs`: most documents in a bin."""
    # No two bins of a first-fit packing are both at most half full, except where `max_docs` closed one.
    total = int(h.sizes @ h.counts)
    most_bins = min(h.num_docs, 2 * (total // h.capacity) + 2 + h.num_docs // max_docs)
    leaf_bits = 0
    while (most_bins >> leaf_bits) + 1 > MOST_LEAVES:
        leaf_bits += 1
    leaves = 1 << max(0, (most_bins >> leaf_bits).bit_length())
    tree = np.zeros(2 * leaves, np.int32)
    head = np.full(leaves, -1, np.int32)
    runs = np.empty((3 * h.sizes.size + 2, 5), np.int32)
    room = 4 * h.sizes.size + 16
    while True:
        placements = np.empty((room, 3), np.int32)
        ptr = np.empty(h.sizes.size + 1, np.int64)
        used, num_bins = _first_fit(
            h.sizes, h.counts, h.capacity, max_docs, leaf_bits, tree, head, runs, placements, ptr
        )
        if used >= 0:
            placements = placements[:used]
            start, bins, per_bin = np.ascontiguousarray(placements.T)
            return Plan(ptr, start, bins, per_bin, num_bins)
        room *= 4
        tree[:] = 0
        head[:] = -1


START, BINS, ROOM, DOCS, NEXT = range(5)


@njit(cache=True, nogil=True)
def _first_fit(sizes, counts, capacity, max_docs, leaf_bits, tree, head, runs, placements, ptr):
    """Returns (placements used, bins), or (−1, −1) when `placements` is too small.

    One function on purpose: numba counts a reference for every array that is handed on.
    """
    leaves = head.size
    num_runs, num_bins, used = 0, np.int64(0), 0
    last_run = np.int64(-1)
    for i in range(sizes.size):
        size, left = sizes[i], counts[i]
        ptr[i] = used
        while left > 0:
            if used == placements.shape[0]:
                return -1, -1
            run = np.int64(-1)
            if tree[1] >= size:
                # The first run with room.
                node = 1
                while node < leaves:
                    node *= 2
                    if tree[node] < size:
                        node += 1
                run = np.int64(head[node - leaves])
                while runs[run, ROOM] < size:
                    run = np.int64(runs[run, NEXT])
            else:
                # As many new bins as this size needs, as one run that is then filled like any other.
                fresh = -(-left // min(capacity // size, max_docs))
                run = np.int64(num_runs)
                num_runs += 1
                runs[run, START] = num_bins
                runs[run, BINS] = fresh
                runs[run, ROOM] = capacity
                runs[run, DOCS] = 0
                runs[run, NEXT] = -1
                leaf = num_bins >> leaf_bits
                if last_run >= 0:
                    runs[last_run, NEXT] = run
                if last_run < 0 or runs[last_run, START] >> leaf_bits != leaf:
                    head[leaf] = run
                last_run = run
                num_bins += fresh
            per_bin = min(runs[run, ROOM] // size, max_docs - runs[run, DOCS])
            full = min(np.int64(runs[run, BINS]), left // per_bin)
            if full == 0:
                per_bin, full = left, np.int64(1)
            placements[used, 0] = runs[run, START]
            placements[used, 1] = full
            placements[used, 2] = per_bin
            used += 1
            left -= full * per_bin
            rest = np.int64(-1)
            if full < runs[run, BINS]:
                # The bins that took nothing become a run behind this one.
                rest = np.int64(num_runs)
                num_runs += 1
                runs[rest, START] = runs[run, START] + full
                runs[rest, BINS] = runs[run, BINS] - full
                runs[rest, ROOM] = runs[run, ROOM]
                runs[rest, DOCS] = runs[run, DOCS]
                runs[rest, NEXT] = runs[run, NEXT]
                runs[run, BINS] = full
                runs[run, NEXT] = rest
                if runs[run, START] >> leaf_bits != runs[rest, START] >> leaf_bits:
                    head[runs[rest, START] >> leaf_bits] = rest
                if last_run == run:
                    last_run = rest
            runs[run, ROOM] -= per_bin * size
            runs[run, DOCS] += per_bin
            if runs[run, DOCS] == max_docs:
                runs[run, ROOM] = 0
            for changed in (run, rest):
                if changed < 0:
                    continue
                # The leaf of the run and the path above it.
                leaf = np.int64(runs[changed, START]) >> leaf_bits
                at, most = np.int64(head[leaf]), 0
                while at >= 0 and runs[at, START] >> leaf_bits == leaf:
                    most = max(most, runs[at, ROOM])
                    at = np.int64(runs[at, NEXT])
                node = leaves + leaf
                tree[node] = most
                node >>= 1
                while node > 0:
                    larger = max(tree[2 * node], tree[2 * node + 1])
                    if tree[node] == larger:
                        break
                    tree[node] = larger
                    node >>= 1
    ptr[sizes.size] = used
    return used, num_bins
