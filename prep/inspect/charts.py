"""The pictures of the report, drawn by matplotlib as inline SVG.

matplotlib, because it is the best-kept plotting library, needs neither a browser nor the network, and writes the same
bytes again: ids are hashed with a fixed salt, text stays text. It knows one set of colours, a page has two (light and
dark), so charts are drawn in the stand-in colours of `PALETTE`, which become CSS variables afterwards. Marks carry a
`<title>`, which browsers show on hover.
"""

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

PALETTE = {"ink": "#010101", "grid": "#020202", "a": "#0a0a01", "b": "#0a0a02", "c": "#0a0a03", "d": "#0a0a04"}
STYLE = {
    "svg.hashsalt": "meshpack",
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["grid"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": PALETTE["ink"],
    "ytick.color": PALETTE["ink"],
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
WIDTH = 4.8
SAMPLE_TITLES = 400
"""Documents of sample packs that get a title of their own; more would make the page heavy."""


def human(value: float, _=None) -> str:
    """1500 → 1.5k."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def chart(name: str, label: str, draw: Callable[[Axes], dict[str, str]], height: float = 2.3) -> str:
    """One picture as an `<svg>`. `draw(axes)` returns {gid of a mark: its title}; `label` describes it for readers who
    do not see it."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        titles = draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _finish(file.getvalue(), name, label, titles)


def _finish(svg: str, name: str, label: str, titles: dict[str, str]) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for variable, color in PALETTE.items():
        svg = svg.replace(color, f"var(--{variable})")
    # Ids are unique in a picture; on a page with many they need its name.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', svg)
    for gid, title in titles.items():
        svg = svg.replace(f'<g id="{name}-{gid}">', f"<g><title>{escape(title)}</title>", 1)
    # Sizes come from the page, so that a phone can shrink the picture.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}" id="{name}"', 1)


def histogram(edges: Sequence[float], counts: Sequence[int], *, xlabel: str, ylabel: str, title, color: str = "a"):
    """A drawing of bars between edges; `title(low, high, count)` is what hovering says."""

    def draw(axes: Axes) -> dict[str, str]:
        titles = {}
        widths = [high - low for low, high in pairwise(edges)]
        bars = axes.bar(edges[:-1], counts, widths, align="edge", color=PALETTE[color], linewidth=0)
        for i, (bar, count) in enumerate(zip(bars, counts, strict=True)):
            if count:
                bar.set_gid(f"bar{i}")
                titles[f"bar{i}"] = title(edges[i], edges[i + 1], count)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.yaxis.set_major_formatter(FuncFormatter(human))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return titles

    return draw


def length_chart(histograms: dict, capacity: int) -> str:
    edges, counts = histograms["length"]["edges"], histograms["length"]["documents"]
    bars = histogram(
        edges,
        counts,
        xlabel="document length in tokens (log scale)",
        ylabel="documents",
        title=lambda low, high, count: f"{count:,} documents of {low:,} to {high - 1:,} tokens",
    )

    def draw(axes: Axes) -> dict[str, str]:
        titles = bars(axes)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else human(value)))
        axes.set_ylim(top=1.18 * max(counts))
        axes.axvline(capacity, color=PALETTE["c"], linewidth=1.5)
        axes.annotate(
            f"capacity {capacity:,}",
            (capacity, 1),
            (-4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            color=PALETTE["c"],
        )
        return titles

    return chart("lengths", "Histogram of document lengths", draw)


def fill_chart(histograms: dict) -> str:
    edges, counts = histograms["fill"]["edges"], histograms["fill"]["packs"]
    first = next(i for i, count in enumerate(counts) if count)
    first = min(first, len(counts) - 5)
    bars = histogram(
        [100 * e for e in edges[first:]],
        counts[first:],
        xlabel="fill of a pack (real tokens, % of the capacity)",
        ylabel="packs",
        title=lambda low, high, count: f"{count:,} packs filled {low:.0f} to {high:.0f} %",
        color="b",
    )
    return chart("fill", "Histogram of the fill of packs", bars)


def documents_chart(histograms: dict) -> str:
    h = histograms["documents_per_pack"]
    edges = [h["first"] + h["width"] * i for i in range(len(h["packs"]) + 1)]

    def name(low: int, high: int, count: int) -> str:
        return f"{count:,} packs of {low:,}" + (f" to {high - 1:,}" if high - low > 1 else "") + " documents"

    bars = histogram(
        [e - 0.5 for e in edges],
        h["packs"],
        xlabel="documents in a pack",
        ylabel="packs",
        title=lambda low, high, count: name(int(low + 0.5), int(high + 0.5), count),
        color="b",
    )

    def draw(axes: Axes) -> dict[str, str]:
        titles = bars(axes)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return titles

    return chart("documents", "Histogram of documents per pack", draw)


def flow_chart(steps: Sequence[tuple[str, Sequence[tuple[str, int, str]]]]) -> str:
    """Rows of stacked bars: (row, [(part, tokens, colour)]); every row starts at 0 on one common scale."""

    def draw(axes: Axes) -> dict[str, str]:
        titles = {}
        for r, (_, parts) in enumerate(steps):
            left, whole = 0, sum(tokens for _, tokens, _ in parts)
            for p, (part, tokens, color) in enumerate(parts):
                (bar,) = axes.barh(r, tokens, 0.62, left, color=PALETTE[color])
                bar.set_gid(f"flow{r}-{p}")
                titles[f"flow{r}-{p}"] = f"{part}: {tokens:,} tokens, {tokens / max(1, whole):.2%}"
                left += tokens
        axes.set_yticks(range(len(steps)), [row for row, _ in steps])
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(FuncFormatter(human))
        axes.set_xlabel("tokens")
        return titles

    return chart("flow", "Where every token went", draw, height=0.42 * len(steps) + 0.7)


def cost_chart(balance: dict) -> str:
    def draw(axes: Axes) -> dict[str, str]:
        for key, color, label in (("cost_random", "d", "random order"), ("cost_in_order", "a", "this order")):
            axes.plot(range(len(balance[key])), balance[key], color=PALETTE[color], linewidth=1.3, label=label)
        axes.set_xlabel("packs in training order (a sample)")
        axes.set_ylabel("cost / mean")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.9), max(high, 1.1))
        axes.set_xticks([])
        axes.legend(loc="upper right", ncols=2, labelcolor=PALETTE["ink"])
        return {}

    return chart("cost", "Cost of the packs in training order", draw)


def straggler_chart(balance: dict) -> str:
    def draw(axes: Axes) -> dict[str, str]:
        titles = {}
        for k, (key, color, label) in enumerate(
            (("straggler_random", "d", "random order"), ("straggler", "a", "this order"))
        ):
            extra = [100 * (value - 1) for value in balance[key]]
            places = [i + (k - 0.5) * 0.38 for i in range(len(extra))]
            bars = axes.bar(places, extra, 0.36, color=PALETTE[color], label=label)
            for i, (bar, value) in enumerate(zip(bars, balance[key], strict=True)):
                bar.set_gid(f"straggler{k}-{i}")
                titles[f"straggler{k}-{i}"] = f"{label}, {balance['widths'][i]} ranks: {value:.4f}"
        axes.set_xticks(range(len(balance["widths"])), balance["widths"])
        axes.set_xlabel("data-parallel ranks")
        axes.set_ylabel("waited, % of a step")
        axes.margins(y=0.25)
        axes.legend(loc="upper left", ncols=2, labelcolor=PALETTE["ink"])
        return titles

    return chart("stragglers", "How much longer the slowest rank takes than the mean", draw)


def samples_chart(samples: Sequence[dict], capacity: int, align: int) -> str:
    def draw(axes: Axes) -> dict[str, str]:
        titles, named = {}, 0
        for r, sample in enumerate(samples):
            left = 0
            for i, (length, doc) in enumerate(zip(sample["lengths"], sample["documents"], strict=True)):
                slot = -(-length // align) * align
                (bar,) = axes.barh(r, length, 0.7, left, color=PALETTE["ab"[i % 2]], linewidth=0)
                if named < SAMPLE_TITLES:
                    named += 1
                    bar.set_gid(f"slot{r}-{i}")
                    titles[f"slot{r}-{i}"] = f"pack {sample['pack']}: document {doc}, {length:,} tokens"
                left += slot
        axes.set_yticks(range(len(samples)), [f"pack {s['pack']:,}" for s in samples])
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlim(0, capacity)
        axes.xaxis.set_major_formatter(FuncFormatter(human))
        axes.set_xlabel("tokens; what is empty is padding")
        return titles

    return chart("samples", "Documents in sample packs", draw, height=0.22 * len(samples) + 0.7)
