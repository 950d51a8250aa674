"""A plan as one HTML file that needs nothing else: tables, and charts drawn as SVG within it.

Lengths are units of the charts' view boxes, which the page scales.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mugv_ds.plan.memory import GIB
from mugv_ds.plan.report import Plan, machine_line
from mugv_ds.plan.search import MARGIN, Search, Way, why_slower

_TEMPLATE = "page.html"
_WIDTH, _LEFT, _RIGHT = 1000, 330, 60
_BAR, _GAP, _AXIS = 26, 14, 34
_TICKS = 6
# Colours of the parts, in the order in which they are stacked; both schemes' backgrounds show them.
MEMORY = {
    "weights": "#2f6fd6", "optimizer": "#7c5cd6", "averages": "#c04fb0", "gradients": "#d9562b", "buckets": "#a0522d",
    "activations": "#2a9d73", "working": "#8a9a2b",
}  # fmt: skip
TIME = {
    "products": "#2f6fd6", "attention forward": "#2a9d73", "attention backward": "#1d6f5c", "kernels": "#8a9a2b",
    "exchange": "#d9562b", "host": "#5b6472", "pipeline bubble": "#b3261e", "reference": "#a0522d",
    "reduction": "#c04fb0", "gather": "#e08bcb", "optimizer": "#7c5cd6", "offload": "#e0a030", "data": "#7a828e",
}  # fmt: skip
_MOST_OF_LIMIT = 1.6  # that an axis reaches to
_LEAST_SHARE = 1e-3  # of a bar, below which a part is not drawn


def page(plan: Plan) -> str:
    """Returns the page of a plan."""
    environment = Environment(
        loader=PackageLoader("mugv_ds.plan", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["zip"] = zip
    best, planner = plan.search.best, plan.planner
    ways = [
        {
            "layout": _layout(way),
            "level": _level(way),
            "micro": way.micro,
            "figures": planner.figures(way, plan.price),
            "gib": way.memory.peak / GIB,
            "host": way.memory.host / GIB,
            "why": "" if way is best else why_slower(way, best),
        }
        for way in plan.shown
    ]
    drawn = [*plan.shown, *plan.faster]
    return environment.get_template(_TEMPLATE).render(
        plan=plan,
        title=f"{plan.config} on {plan.search.gpus} GPUs",
        machine=machine_line(planner.timing.calibration, planner.timing.cluster, plan.search.gpus),
        ways=ways,
        best=best,
        figures=None if best is None else planner.figures(best, plan.price),
        settings=[] if best is None else best.settings(planner.config),
        would_fit=[] if best is not None else planner.what_would_fit(plan.search),
        faster=[(way.name, way.memory.peak / GIB, way.seconds) for way in plan.faster],
        memory=_bars(
            [(way, _gib(way.memory.parts())) for way in drawn], MEMORY, "GiB",
            "Memory of the fullest device by part", planner.limits.device / GIB / (1 + MARGIN),
        ),
        time=_bars(
            [(way, way.terms) for way in drawn], TIME, "s", "Seconds of the mean step by part", None
        ),
        throughput=_throughput(plan, [*plan.others]),
        memory_colours=MEMORY,
        time_colours={name: c for name, c in TIME.items() if any(way.terms.get(name, 0.0) > 0 for way in drawn)},
    )  # fmt: skip


def _layout(way: Way) -> str:
    layout = way.setup.layout
    return f"{layout.data} × {layout.sequence} × {layout.pipeline}"


def _level(way: Way) -> str:
    return way.setup.level + ("" if way.setup.offload == "none" else f" + {way.setup.offload}")


def _gib(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in parts.items()}


def _bars(
    rows: Sequence[tuple[Way, Mapping[str, float]]],
    colours: Mapping[str, str],
    unit: str,
    title: str,
    limit: float | None,
) -> Markup:
    """Draws a stacked bar for each way. limit: a value that is marked; what is far beyond it is cut off."""
    if not rows:
        return Markup("")
    top = max(sum(parts.values()) for _, parts in rows) * 1.02
    if limit is not None:
        top = min(max(top, limit * 1.02), limit * _MOST_OF_LIMIT)
    inner, height = _WIDTH - _LEFT - _RIGHT, len(rows) * (_BAR + _GAP) + _AXIS
    scale = inner / top
    body = []
    for tick in _ticks(top):
        x = _LEFT + tick * scale
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - _AXIS}"/>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height - _AXIS + 20}">{tick:g}</text>')
    values = []
    for number, (way, parts) in enumerate(rows):
        y = number * (_BAR + _GAP) + _GAP / 2
        label = f"{_layout(way)}, {_level(way)}"
        faded = "" if way.does_fit else ' class="faded"'
        body.append(f'<text class="label" x="{_LEFT - 10}" y="{y + _BAR / 2 + 5:.1f}">{escape(label)}</text><g{faded}>')
        total = sum(parts.values())
        ordered = [(name, parts.get(name, 0.0)) for name in colours]
        for (name, value), end in zip(ordered, accumulate(value for _, value in ordered), strict=True):
            value, end = value - max(end - top, 0.0), min(end, top)
            if value > _LEAST_SHARE * total:
                body.append(
                    f'<rect x="{_LEFT + (end - value) * scale:.1f}" y="{y:.1f}" width="{value * scale:.1f}" '
                    f'height="{_BAR}" fill="{colours[name]}"><title>{escape(label)}: {name} {value:.4g} {unit}</title>'
                    "</rect>"
                )
        x = _LEFT + min(total, top) * scale + 6
        body.append("</g>")
        values.append(f'<text class="value" x="{x:.1f}" y="{y + _BAR / 2 + 5:.1f}">{total:.3g}</text>')
    if limit is not None:
        x = _LEFT + limit * scale
        body.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - _AXIS + 4}"/>')
    return _svg("".join([*body, *values]), height, f"{title}, {unit}")


def _throughput(plan: Plan, searches: Sequence[Search]) -> Markup:
    """Draws tokens a second over GPUs, on logarithmic axes, beside a line in proportion to the fewest."""
    points = [
        (search.gpus, plan.planner.figures(search.best).tokens_per_second)
        for search in searches
        if search.best is not None
    ]
    if len(points) < 2:
        return Markup("")
    left, bottom, height = 110, 60, 380
    (first, base), (last, _) = points[0], points[-1]
    ideal = [(gpus, base * gpus / first) for gpus in (first, last)]
    low, high = math.log(min(y for _, y in points)), math.log(max(y for _, y in [*points, *ideal]))
    across = (_WIDTH - left - 60) / math.log(last / first)

    def place(gpus: int, tokens: float) -> tuple[float, float]:
        y = (math.log(tokens) - low) / max(high - low, 1e-9)
        return left + math.log(gpus / first) * across, 30 + (height - bottom - 30) * (1 - y)

    def line(kind: str, of: Sequence[tuple[int, float]]) -> str:
        return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in of))}"/>'

    body = [line("ideal", ideal), line("line", points)]
    for gpus, tokens in points:
        x, y = place(gpus, tokens)
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{gpus} GPUs: {tokens:,.0f} tokens/s</title></circle>'
        )
        body.append(f'<text class="point" x="{x - 10:.1f}" y="{y - 10:.1f}">{_short(tokens)}</text>')
        body.append(f'<text class="tick" x="{x:.1f}" y="{height - 22}">{gpus}</text>')
    body.append(f'<text class="tick" x="{(_WIDTH + left) / 2}" y="{height - 2}">GPUs</text>')
    body.append('<text class="corner" x="4" y="20">tokens a second; the thin line grows as the GPUs do</text>')
    return _svg("".join(body), height, "Tokens a second over GPUs")


def _short(number: float) -> str:
    for scale, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{suffix}"
    return f"{number:.3g}"


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to the largest."""
    step = 10 ** math.floor(math.log10(top / _TICKS))
    step *= next(times for times in (1, 2, 5, 10) if top / (step * times) <= _TICKS)
    return [n * step for n in range(int(top / step) + 1)]


def _svg(body: str, height: float, title: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )
