"""Charts of a report as SVG within the page: no scripts, colours of the page's style sheet, a text for who cannot see.

Lengths are units of the view box, which the page scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from mugv_ds.prepare.summary import Histogram

_WIDTH, _HEIGHT = 360, 130
_LEFT, _RIGHT, _TOP, _BOTTOM = 6, 6, 10, 20
_BARS = 50


@dataclass(frozen=True)
class Mark:
    """A value that is marked in a chart. kind: present or published, told apart by colour and by dashes."""

    value: float
    kind: str


def histogram_chart(histogram: Histogram, title: str, marks: Sequence[Mark] = ()) -> Markup:
    """Draws how many clips have which score; what lies beyond the ends is in the outermost bars."""
    counts = histogram.counts[1:-1].reshape(_BARS, -1).sum(axis=1)
    counts[0] += histogram.counts[0]
    counts[-1] += histogram.counts[-1]
    top, inner = max(int(counts.max()), 1), _WIDTH - _LEFT - _RIGHT
    step, height = inner / _BARS, _HEIGHT - _TOP - _BOTTOM
    bars = [
        f'<rect x="{_LEFT + i * step + 0.5:.1f}" y="{_TOP + height * (1 - count / top):.1f}" width="{step - 1:.1f}" '
        f'height="{height * count / top:.1f}" rx="1"/>'
        for i, count in enumerate(counts.tolist())
        if count
    ]
    body = f'<g class="bars">{"".join(bars)}</g>{_axis(histogram)}{_marks(histogram, marks)}'
    return _svg(body, title, _spread(histogram))


def curve_chart(histogram: Histogram, shares: np.ndarray, title: str, text: str, marks: Sequence[Mark]) -> Markup:
    """Draws the share of clips kept, 0 to 1 from bottom to top, over the value of a bound.

    Args:
        histogram: whose edges the shares belong to. shares: [edges]. text: what it says, in words.
    """
    inner, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    top = max(float(shares.max()), 1e-9)
    places = np.linspace(0, inner, len(shares))
    points = [f"{_LEFT + x:.1f},{_TOP + height * (1 - y / top):.1f}" for x, y in zip(places, shares, strict=True)]
    base = _TOP + height
    body = (
        f'<polygon class="area" points="{_LEFT},{base} {" ".join(points)} {_LEFT + inner},{base}"/>'
        f'<polyline class="line" points="{" ".join(points)}"/>'
        f'<text x="{_LEFT + 2}" y="{_TOP - 2}" class="tick">{top:.0%} kept</text>'
        f"{_axis(histogram)}{_marks(histogram, marks)}"
    )
    return _svg(body, title, text)


def number(value: float | None) -> str:
    """Returns a number as people write it, to three or four digits."""
    if value is None:
        return "–"
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.2g}"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _svg(body: str, title: str, text: str) -> Markup:
    label = escape(f"{title}: {text}")
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" class="chart">'
    return Markup(f"{head}<title>{label}</title>{body}</svg>")


def _spread(histogram: Histogram) -> str:
    if not histogram.total:
        return "no values"
    low, middle, high = (number(histogram.quantile(share)) for share in (0.05, 0.5, 0.95))
    return f"{histogram.total:,} values, median {middle}, 5% below {low}, 5% above {high}"


def _axis(histogram: Histogram) -> str:
    edges, inner, y = histogram.edges, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    ticks = [f'<path class="axis" d="M{_LEFT} {y}h{inner}"/>']
    for share, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        x = _LEFT + inner * share
        ticks.append(f'<path class="axis" d="M{x:.1f} {y}v3"/>')
        value = number(float(edges[round(share * (len(edges) - 1))]))
        ticks.append(f'<text class="tick" x="{x:.1f}" y="{y + 14}" text-anchor="{anchor}">{value}</text>')
    return "".join(ticks)


def _marks(histogram: Histogram, marks: Sequence[Mark]) -> str:
    drawn = []
    for mark in marks:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * histogram.place(mark.value)
        drawn.append(f'<path class="mark {mark.kind}" d="M{x:.1f} {_TOP - 4}V{_HEIGHT - _BOTTOM}"/>')
    return "".join(drawn)
