"""Charts of a report as SVG within the page: no scripts, colours of the page's style sheet, a text for who cannot see.

Lengths are units of the view box, which the page scales.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from mugv_ds.prepare.summary import Histogram

_WIDTH, _HEIGHT = 360, 130
_LEFT, _RIGHT, _TOP, _BOTTOM = 6, 6, 16, 20
_BARS, _POINTS = 50, 200


@dataclass(frozen=True)
class Mark:
    """A value that is marked in a chart. kind: present or published."""

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
    return _svg(body, title, spread(histogram))


def curve_chart(histogram: Histogram, shares: np.ndarray, title: str, text: str, marks: Sequence[Mark]) -> Markup:
    """Draws the share of clips kept, from 0 to the largest, over the value of a bound.

    Args:
        histogram: whose edges the shares belong to. shares: [edges]. text: what it says, in words.
    """
    inner, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    shares = shares[:: max(1, len(shares) // _POINTS)]
    top = max(float(shares.max()), 1e-9)
    places = np.linspace(0, inner, len(shares))
    points = [f"{_LEFT + x:.1f},{_TOP + height * (1 - y / top):.1f}" for x, y in zip(places, shares, strict=True)]
    base = _TOP + height
    body = (
        f'<polygon class="area" points="{_LEFT},{base} {" ".join(points)} {_LEFT + inner},{base}"/>'
        f'<polyline class="line" points="{" ".join(points)}"/>'
        f"{_axis(histogram)}{_marks(histogram, marks)}"
    )
    return _svg(body, title, text)


def number(value: float | None) -> str:
    """Returns a number as people write it, to four digits."""
    if value is None:
        return "–"
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.2g}"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"


def _svg(body: str, title: str, text: str) -> Markup:
    label = escape(f"{title}: {text}")
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" class="chart">'
    return Markup(f"{head}<title>{label}</title>{body}</svg>")


def spread(histogram: Histogram) -> str:
    """Returns in words where the values of a histogram lie."""
    if not histogram.total:
        return "no values"
    low, middle, high = (number(histogram.quantile(share)) for share in (0.05, 0.5, 0.95))
    return f"{histogram.total:,} values, median {middle}, 5% below {low}, 5% above {high}"


def _axis(histogram: Histogram) -> str:
    inner, y = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM
    drawn = [f'<path class="axis" d="M{_LEFT} {y}h{inner}"/>']
    for value in _ticks(histogram):
        share = histogram.place(value)
        x, anchor = _LEFT + inner * share, "start" if share < 0.02 else "end" if share > 0.98 else "middle"
        drawn.append(f'<path class="axis" d="M{x:.1f} {y}v3"/>')
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{y + 14}" text-anchor="{anchor}">{number(value)}</text>')
    return "".join(drawn)


def _ticks(histogram: Histogram) -> list[float]:
    """Returns the values that are written below: powers of ten on a logarithmic scale, else quarters."""
    low, high = histogram.low, histogram.high
    if not histogram.log:
        return [low + (high - low) * quarter / 4 for quarter in range(5)]
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1)]


def _marks(histogram: Histogram, marks: Sequence[Mark]) -> str:
    """Draws marks, which are told apart by shape too: a triangle above is the present value, below the published."""
    drawn, bottom = [], _HEIGHT - _BOTTOM
    for mark in marks:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * histogram.place(mark.value)
        tip = f"M{x - 5:.1f} {_TOP - 9}h10l-5 7z" if mark.kind == "present" else f"M{x - 5:.1f} {bottom + 7}h10l-5 -7z"
        drawn.append(f'<path class="mark {mark.kind}" d="M{x:.1f} {_TOP - 2}V{bottom}"/>')
        drawn.append(f'<path class="tip {mark.kind}" d="{tip}"/>')
    return "".join(drawn)
