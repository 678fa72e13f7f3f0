"""What the figures are drawn with: boxes, arrows and labels on a light panel, in centimetres, origin bottom left.

What a box is can be seen by its colour, and is always said in words too: BLUE has pretrained weights, ORANGE weights
that start new, GREEN holds position embeddings, GREY is an operation without weights, WHITE is data, and PINK data to
look at. Every text, box and arrow is kept in a list, so that a test can look for overlaps.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon
from matplotlib.patches import PathPatch as Line
from matplotlib.path import Path as Curve
from matplotlib.text import Text

from prefcls_lib.runtime.files import write_whole

Point = tuple[float, float]

# fill, edge, line width: tints of Okabe and Ito's colours, which colour-blind people distinguish. In grey print BLUE is
# the darkest, and ORANGE has the heaviest edge.
Color = tuple[str, str, float]
BLUE, ORANGE, GREEN = ("#b9d8ef", "#0a5d94", 0.9), ("#ffe8bb", "#a86400", 1.7), ("#cdebdb", "#00694d", 0.9)
PINK, GREY, WHITE = ("#f4d9e8", "#97406f", 0.9), ("#ececea", "#5c5c5c", 0.9), ("#ffffff", "#5c5c5c", 0.9)
INK, MUTED, PAPER, PANEL = "#161616", "#4d4d4d", "#fcfcfa", "#f4f5f5"
TITLE, NAME, NOTE = 11.0, 9.5, 8.5  # points
WIDTH = 16.0  # cm, of every figure
POINT = 2.54 / 72  # cm
CAPITAL, PITCH = 0.73, 1.32  # of the type size: height of a capital letter, distance of two baselines
CORNER, HEAD, COPY = 0.12, 0.19, 0.11  # cm: radius of corners, length of an arrow head, distance of copies
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # the first comes with matplotlib; Verdana is as wide
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "none",  # text stays text: outlines of small letters are drawn unevenly spaced on a screen
    "svg.hashsalt": "prefcls",  # else the ids in an SVG are random
    "text.parse_math": True,
    "path.snap": False,
}


@dataclass
class Box:
    """A rectangle (or circle) with its centre (x, y), and the texts in it."""

    x: float
    y: float
    width: float
    height: float
    copies: int = 0
    texts: list[Text] = field(default_factory=list)

    def left(self, shift: float = 0) -> Point:
        """Middle of the left edge, moved up by `shift`; `right` likewise."""
        return self.x - self.width / 2, self.y + shift

    def right(self, shift: float = 0) -> Point:
        return self.x + self.width / 2, self.y + shift

    def top(self, shift: float = 0) -> Point:
        """Middle of the top edge (of the last copy), moved right by `shift`; `bottom` likewise."""
        return self.x + shift, self.y + self.height / 2 + COPY * self.copies

    def bottom(self, shift: float = 0) -> Point:
        return self.x + shift, self.y - self.height / 2


class Canvas:
    """One figure: a light panel of its own, so that it reads on any page, and a title."""

    def __init__(self, height: float, title: str):
        self.title, self.height = title, height
        self.texts: list[Text] = []
        self.boxes: list[Box] = []
        with matplotlib.rc_context(STYLE):
            self.figure = Figure(figsize=(WIDTH / 2.54, height / 2.54))
            self.axes = self.figure.add_axes((0, 0, 1, 1))
            self.axes.set(xlim=(0, WIDTH), ylim=(0, height))
            self.axes.set_axis_off()
        width, tall = WIDTH - 0.04, height - 0.04
        self._rectangle(WIDTH / 2, height / 2, width, tall, PAPER, "#d2d2ce", 0.6, corner=0.25, zorder=0)
        self.write(0.45, height - 0.78, title, size=TITLE, bold=True)

    def write(
        self, x: float, y: float, text: str, size: float = NOTE, align: str = "left", bold: bool = False,
        color: str = INK,
    ) -> Text:  # fmt: skip
        """One line of text, its baseline at y."""
        with matplotlib.rc_context(STYLE):
            weight = "bold" if bold else "normal"
            drawn = self.axes.text(x, y, text, size=size, ha=align, va="baseline", weight=weight, color=color, zorder=5)
        self.texts.append(drawn)
        return drawn

    def box(
        self, x: float, y: float, width: float, height: float, name: str, *notes: str,
        color: Color = GREY, bold: bool = False, copies: int = 0,
    ) -> Box:  # fmt: skip
        """A rounded box with a name and notes below it, centred; `copies` more stand behind it."""
        for copy in range(copies, 0, -1):
            self._rectangle(x + COPY * copy, y + COPY * copy, width, height, *color)
        self._rectangle(x, y, width, height, *color)
        box = Box(x, y, width, height, copies)
        lines = [(name, NAME)] * bool(name) + [(note, NOTE) for note in notes]
        pitches = [
            PITCH * size * POINT * (1.3 if "_" in above else 1)  # an index hangs low
            for (above, _), (_, size) in pairwise(lines)
        ]
        baseline = y + sum(pitches) / 2 - CAPITAL * NAME * POINT / 2
        for number, (text, size) in enumerate(lines):
            baseline -= pitches[number - 1] if number else 0
            is_name = size == NAME
            drawn = self.write(x, baseline, text, size, "center", bold and is_name, INK if is_name else MUTED)
            box.texts.append(drawn)
        self.boxes.append(box)
        return box

    def circle(self, x: float, y: float, sign: str, radius: float = 0.24) -> Box:
        """An operation of one sign: "+" or "×"."""
        self.axes.add_patch(Circle((x, y), radius, facecolor="#ffffff", edgecolor=GREY[1], linewidth=0.9, zorder=2))
        for dx, dy in ((0.6, 0), (0, 0.6)) if sign == "+" else ((0.42, 0.42), (0.42, -0.42)):
            dx, dy = dx * radius, dy * radius
            self._line([(x - dx, y - dy), (x + dx, y + dy)], INK, 1.1)
        box = Box(x, y, 2 * radius, 2 * radius)
        self.boxes.append(box)
        return box

    def panel(self, left: float, bottom: float, right: float, top: float, title: str = "", copies: int = 0) -> None:
        """A light area behind boxes that belong together, its title in the top left corner; copies as of a box."""
        x, y = (left + right) / 2, (bottom + top) / 2
        for copy in range(copies, 0, -1):
            dx = x + COPY * copy
            self._rectangle(dx, y + COPY * copy, right - left, top - bottom, PANEL, "#b9bcbc", 0.6, 0.18, zorder=1)
        line = 0.6 if copies else 0
        self._rectangle(x, y, right - left, top - bottom, PANEL, "#b9bcbc", line, corner=0.18, zorder=1)
        if title:
            self.write(left + 0.25, top - 0.5, title, NAME, bold=True)

    def arrow(
        self, *points: Point, label: str = "", at: float = 0.5, side: str = "auto", dashed: bool = False,
        head: bool = True,
    ) -> None:  # fmt: skip
        """A line through the points with rounded corners; its head ends exactly at the last one.

        Args:
            points: corners; every piece should be level or upright.
            label: the tensor that passes, written beside the longest piece: above it if level, right of it if upright.
            at: where along that piece, 0 to 1.
            side: "below" or "left" puts the label there.
            dashed: for a relation that carries no tensor.
            head: whether there is one.
        """
        (x0, y0), (x1, y1) = points[-2:]
        length = abs(x1 - x0) + abs(y1 - y0)
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        neck = (x1 - ux * HEAD * 0.8, y1 - uy * HEAD * 0.8) if head else (x1, y1)
        self._line([*points[:-1], neck], INK, 1.0, dashed)
        if head:
            base, half = (x1 - ux * HEAD, y1 - uy * HEAD), HEAD * 0.4
            corners = [(x1, y1), (base[0] - uy * half, base[1] + ux * half), (base[0] + uy * half, base[1] - ux * half)]
            self.axes.add_patch(Polygon(corners, closed=True, facecolor=INK, edgecolor="none", zorder=4))
        if label:
            pieces = list(pairwise(points))
            (x0, y0), (x1, y1) = max(pieces, key=lambda p: abs(p[0][0] - p[1][0]) + abs(p[0][1] - p[1][1]))
            x, y, gap = x0 + at * (x1 - x0), y0 + at * (y1 - y0), 0.11
            if abs(x1 - x0) > abs(y1 - y0):
                self.write(x, y - gap - 0.24 if side == "below" else y + gap, label, align="center", color=MUTED)
            else:
                left = side == "left"
                self.write(x - gap if left else x + gap, y - 0.1, label, align="right" if left else "left", color=MUTED)

    def dot(self, point: Point) -> None:
        """Where a line forks."""
        self.axes.add_patch(Circle(point, 0.065, facecolor=INK, edgecolor="none", zorder=4))

    def key(self, y: float, *entries: tuple[Color, str], x: float = 0.45) -> None:
        """The legend of the colours, in one row: (color, words), ..."""
        for color, words in entries:
            self._rectangle(x + 0.17, y + 0.1, 0.34, 0.24, *color, corner=0.05)
            drawn = self.write(x + 0.46, y, words, color=MUTED)
            x += 0.46 + self.extent(drawn).width + 0.5

    def extent(self, text: Text):
        """The smallest box around a drawn text, in cm."""
        with matplotlib.rc_context(STYLE):
            return text.get_window_extent().transformed(self.axes.transData.inverted())

    def save(self, stem: Path) -> None:
        """Write STEM.svg and STEM.png; the same figure gives the same bytes."""
        with matplotlib.rc_context(STYLE):
            words = {"Title": self.title, "Date": None, "Creator": None}
            with write_whole(stem.with_suffix(".svg")) as path:
                self.figure.savefig(path, format="svg", metadata=words, transparent=True)
            with write_whole(stem.with_suffix(".png")) as path:
                self.figure.savefig(path, format="png", dpi=220, metadata={"Software": None}, transparent=True)

    def _rectangle(self, x, y, width, height, fill, edge, line, corner=CORNER, zorder=2) -> None:
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2), width, height, boxstyle=f"round,pad=0,rounding_size={corner}",
                facecolor=fill, edgecolor=edge, linewidth=line, zorder=zorder,
            )
        )  # fmt: skip

    def _line(self, points: list[Point], color: str, width: float, dashed: bool = False) -> None:
        vertices, codes = [points[0]], [Curve.MOVETO]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            vertices += [_towards(corner, before), corner, _towards(corner, after)]
            codes += [Curve.LINETO, Curve.CURVE3, Curve.CURVE3]
        style = (0, (3, 2)) if dashed else "-"
        patch = Line(
            Curve([*vertices, points[-1]], [*codes, Curve.LINETO]), facecolor="none", edgecolor=color, linewidth=width,
            linestyle=style, capstyle="butt", joinstyle="round", zorder=3,
        )  # fmt: skip
        self.axes.add_patch(patch)


def _towards(corner: Point, point: Point) -> Point:
    """The point on the way from a corner where its rounding begins."""
    (x0, y0), (x1, y1) = corner, point
    length = abs(x1 - x0) + abs(y1 - y0)
    step = min(CORNER, length / 2) / length
    return x0 + step * (x1 - x0), y0 + step * (y1 - y0)
