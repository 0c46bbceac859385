"""How the layers of a model are cut into the stages of a pipeline: what the trainer does and `prep plan` foresees."""

EMBEDDING_OVER_HEAD = 0.1
"""Time of the embedding over that of the head, per training step. It multiplies nothing, but its dense gradient passes
through memory some four times in each microbatch: a tenth of the head's products at 8192 tokens, 300 FLOPs a byte."""


def split_by_cost(costs: list[float], stages: int, before: float, after: float) -> list[int]:
    """Layers of each stage such that the dearest stage costs least, and the others are as even as they can be then.

    `costs` are those of the layers, `before` and `after` what the first and the last stage have besides. Every stage
    has a layer. O(stages · layers²) by dynamic programming over prefixes.
    """
    count = len(costs)
    assert 0 < stages <= count
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    infinite = (float("inf"), float("inf"))
    best = [[infinite] * (count + 1) for _ in range(stages + 1)]
    cut = [[0] * (count + 1) for _ in range(stages + 1)]
    best[0][0] = (0.0, 0.0)
    for s in range(1, stages + 1):
        extra = before * (s == 1) + after * (s == stages)
        for stop in range(s, count - (stages - s) + 1):
            for start in range(s - 1, stop):
                highest, squares = best[s - 1][start]
                cost = sums[stop] - sums[start] + extra
                value = (max(highest, cost), squares + cost * cost)
                if value < best[s][stop]:
                    best[s][stop], cut[s][stop] = value, start
    sizes, stop = [], count
    for s in range(stages, 0, -1):
        sizes.append(stop - cut[s][stop])
        stop = cut[s][stop]
    return sizes[::-1]
