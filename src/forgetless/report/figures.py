"""Figures as lines, marks and texts, which are drawn as SVG (for the page, or a file of its own) and as PDF.

The PDF is written here: it needs no more than the figure has, one page of paths and Helvetica.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass, field

from forgetless.report.charts import scale, ticks
from forgetless.report.words import clean, figure

INK, SOFT, RULE = "ink", "soft", "rule"
COLOURS = {
    INK: "#1b1f24", SOFT: "#5b626b", RULE: "#e3e0d8", "card": "#ffffff", "line-0": "#2a6fc9", "line-1": "#d9622b",
    "line-2": "#138a64", "line-3": "#7b4fc4", "line-4": "#b98300", "line-5": "#c83f78", "line-6": "#3d8fa6",
    "line-7": "#7a6a53",
}  # fmt: skip
"""The page's names of colours, and their values in a file of its own."""
SIZE = 12  # of the letters
WIDTHS = dict(
    zip(
        (chr(code) for code in range(32, 127)),
        (
            278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, 556, 556, 556, 556, 556,
            556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556, 1015, 667, 667, 722, 722, 667, 611, 778, 722, 278,
            500, 667, 556, 833, 722, 778, 667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469,
            556, 333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556, 556, 556, 333, 500,
            278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584,
        ),
        strict=True,
    )
)  # fmt: skip
"""Helvetica's, in thousandths of the size; for texts that end at, or lie around, a place."""
ANCHORS = {"start": 0.0, "middle": 0.5, "end": 1.0}


@dataclass
class Drawing:
    """What is drawn, in the order in which it is; y grows downwards."""

    width: int
    height: int
    title: str
    desc: str
    parts: list[dict] = field(default_factory=list)

    def line(
        self, places: list[tuple[float, float]], colour: str = RULE, width: float = 1.0, dashed: bool = False
    ) -> None:
        self.parts.append({"kind": "line", "places": places, "colour": colour, "width": width, "dashed": dashed})

    def mark(self, x: float, y: float, colour: str, full: bool = True, size: float = 4.5, told: str = "") -> None:
        self.parts.append({"kind": "mark", "x": x, "y": y, "colour": colour, "full": full, "size": size, "told": told})

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", colour: str = INK, upright: bool = False
    ) -> None:
        self.parts.append({"kind": "text", "x": x, "y": y, "text": clean(text), "anchor": anchor, "colour": colour,
                           "upright": upright})  # fmt: skip


# ------------------------------------------------------------------------------------------- SVG


def svg(drawing: Drawing, page: bool = False) -> str:
    """SVG text: for a page in its colours, which follow light and dark, else with colours of its own."""
    paint: Callable[[str], str] = "var(--{})".format if page else COLOURS.__getitem__
    body = "\n".join(_svg_part(part, paint) for part in drawing.parts)
    size = f'viewBox="0 0 {drawing.width} {drawing.height}"'
    head = (
        f'<svg class="chart" {size} style="max-width:{drawing.width}px;min-width:440px" role="img">'
        if page
        else f'<svg xmlns="http://www.w3.org/2000/svg" {size} width="{drawing.width}" height="{drawing.height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="{SIZE}">'
    )
    told = f"<title>{html.escape(drawing.title)}</title><desc>{html.escape(drawing.desc)}</desc>"
    return f"{head}\n{told}\n{body}\n</svg>\n"


def _svg_part(part: dict, paint: Callable[[str], str]) -> str:
    colour = paint(part["colour"])
    if part["kind"] == "line":
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in part["places"])
        dashes = ' stroke-dasharray="4 3"' if part["dashed"] else ""
        return f'<path d="{path}" fill="none" style="stroke:{colour}" stroke-width="{part["width"]:g}"{dashes}/>'
    if part["kind"] == "mark":
        fill = colour if part["full"] else paint("card")
        told = f"<title>{html.escape(part['told'])}</title>" if part["told"] else ""
        return (
            f'<circle cx="{part["x"]:g}" cy="{part["y"]:g}" r="{part["size"]:g}" '
            f'style="fill:{fill};stroke:{colour}" stroke-width="1.8">{told}</circle>'
        )
    turned = f' transform="rotate(-90 {part["x"]:g} {part["y"]:g})"' if part["upright"] else ""
    return (
        f'<text x="{part["x"]:g}" y="{part["y"]:g}" text-anchor="{part["anchor"]}" style="fill:{colour}"{turned}>'
        f"{html.escape(part['text'])}</text>"
    )


# ------------------------------------------------------------------------------------------- PDF


def pdf(drawing: Drawing) -> bytes:
    """A PDF of one page as large as the figure; the same drawing gives the same bytes."""
    commands = "\n".join(_pdf_part(part, drawing.height) for part in drawing.parts).encode("cp1252", "replace")
    box = f"[0 0 {drawing.width} {drawing.height}]"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Contents 4 0 R ".encode()
        + b"/Resources << /Font << /F 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(commands), commands),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    out, starts = b"%PDF-1.4\n", []
    for number, told in enumerate(objects, start=1):
        starts.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, told)
    table = b"".join(b"%010d 00000 n \n" % start for start in starts)
    many = len(objects) + 1
    return out + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
        % (many, table, many, len(out))
    )


def _pdf_part(part: dict, height: int) -> str:
    """Drawing commands; PDF's y grows upwards."""
    rgb = _rgb(part["colour"])
    if part["kind"] == "line":
        (x, y), *rest = part["places"]
        path = f"{x:g} {height - y:g} m " + " ".join(f"{a:g} {height - b:g} l" for a, b in rest)
        return f"{rgb} RG {part['width']:g} w [{'4 3' if part['dashed'] else ''}] 0 d {path} S"
    if part["kind"] == "mark":
        fill = rgb if part["full"] else _rgb("card")
        return f"{rgb} RG {fill} rg 1.8 w [] 0 d {_circle(part['x'], height - part['y'], part['size'])} B"
    text, x, y = part["text"], part["x"], height - part["y"]
    back = ANCHORS[part["anchor"]] * text_width(text)
    place = f"0 1 -1 0 {x:g} {y - back:g}" if part["upright"] else f"1 0 0 1 {x - back:g} {y:g}"
    safe = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").replace("−", "-")
    return f"BT {rgb} rg /F {SIZE} Tf {place} Tm ({safe}) Tj ET"


def _rgb(name: str) -> str:
    value = COLOURS[name]
    return " ".join(f"{int(value[i : i + 2], 16) / 255:.3g}" for i in (1, 3, 5))


def _circle(x: float, y: float, r: float) -> str:
    """Four Bézier curves; k = 4 (√2 - 1) / 3."""
    k = 0.5523 * r
    return (
        f"{x + r:g} {y:g} m {x + r:g} {y + k:g} {x + k:g} {y + r:g} {x:g} {y + r:g} c "
        f"{x - k:g} {y + r:g} {x - r:g} {y + k:g} {x - r:g} {y:g} c "
        f"{x - r:g} {y - k:g} {x - k:g} {y - r:g} {x:g} {y - r:g} c "
        f"{x + k:g} {y - r:g} {x + r:g} {y - k:g} {x + r:g} {y:g} c"
    )


def text_width(text: str) -> float:
    """In the unit of the drawing.

    >>> text_width("ab")
    13.344
    """
    return sum(WIDTHS.get(letter, 556) for letter in text) * SIZE / 1000


# ------------------------------------------------------------------------------------------- axes


def axes(
    drawing: Drawing, across: list[float], upwards: list[float], x_name: str, y_name: str, right: int
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Draws ruled axes and returns the places of values on them; `right`: room for names beside the box."""
    box = {"left": 64, "top": 16, "right": drawing.width - right, "bottom": drawing.height - 56}
    x_ticks, y_ticks = ticks(min(across), max(across)), ticks(min(upwards), max(upwards))
    x = scale(x_ticks[0], x_ticks[-1], box["left"] + 14, box["right"] - 14)
    y = scale(y_ticks[0], y_ticks[-1], box["bottom"], box["top"])
    for tick in y_ticks:
        drawing.line([(box["left"], y(tick)), (box["right"], y(tick))])
        drawing.text(box["left"] - 8, y(tick) + 4, figure(tick), "end", SOFT)
    for tick in x_ticks:
        drawing.text(x(tick), box["bottom"] + 20, figure(tick), "middle", SOFT)
    drawing.text((box["left"] + box["right"]) / 2, drawing.height - 12, x_name, "middle", SOFT)
    drawing.text(18, (box["top"] + box["bottom"]) / 2, y_name, "middle", SOFT, upright=True)
    return x, y
