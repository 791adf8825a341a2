"""The styles, tables and pages of the PDFs."""

from __future__ import annotations

import base64
import io
from typing import Any

from reportlab.lib import colors
from reportlab.lib.enums import TA_CENTER, TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.platypus import CondPageBreak, Flowable, Image, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

from cleanai.report.drawing import DARK, GREY, LINES, MARGIN, PADDING, WIDTH
from cleanai.report.fonts import BOLD, FONT

_HEIGHT = A4[1] - 2 * MARGIN - 2 * PADDING - 1  # of a page's text

_TEXT = ParagraphStyle("text", fontName=FONT, fontSize=8.5, leading=12, spaceBefore=4)
_LEAD = ParagraphStyle("lead", parent=_TEXT, fontSize=10, leading=14, spaceAfter=3)
_HEADLINE = ParagraphStyle("headline", parent=_LEAD, fontName=BOLD)
_CELL = ParagraphStyle("cell", parent=_TEXT, fontSize=8, leading=10.5)
_NUMBER = ParagraphStyle("number", parent=_CELL, alignment=TA_RIGHT)
_TITLE = ParagraphStyle("title", parent=_TEXT, fontName=BOLD, fontSize=17, leading=21, textColor=DARK, spaceBefore=0)
_WARNING = ParagraphStyle("warning", parent=_TEXT, fontName=BOLD, spaceBefore=5, textColor=colors.HexColor("#b00020"))
_HEADING = ParagraphStyle("heading", parent=_TITLE, fontSize=11, leading=14, spaceBefore=10)
_SMALL = ParagraphStyle("small", parent=_TEXT, fontSize=7, leading=9.5)
_CAPTION = ParagraphStyle("caption", parent=_TEXT, fontSize=6.5, leading=8, alignment=TA_CENTER)


class _Document(SimpleDocTemplate):
    """Adds each section to the outline beside the pages."""

    def afterFlowable(self, flowable: Flowable) -> None:
        if isinstance(flowable, Paragraph) and flowable.style.name == _HEADING.name:
            heading = flowable.getPlainText()
            self.canv.bookmarkPage(heading)
            self.canv.addOutlineEntry(heading, heading)


def build_pdf(scenario: str, title: str, story: list[Any]) -> bytes:
    """A PDF of a title and `story`, with the scenario's name and the page number at the foot, and an outline."""

    def draw_footer(canvas: Any, document: Any) -> None:
        canvas.setFillColor(GREY)
        canvas.setFont(FONT, min(7, 0.85 * WIDTH / stringWidth(scenario, FONT, 1)))
        canvas.drawString(MARGIN + PADDING, MARGIN / 2, scenario)
        canvas.setFont(FONT, 7)
        canvas.drawRightString(A4[0] - MARGIN - PADDING, MARGIN / 2, f"Page {document.page}")

    file = io.BytesIO()
    margins = dict.fromkeys(("leftMargin", "rightMargin", "topMargin", "bottomMargin"), MARGIN)
    document = _Document(file, pagesize=A4, title=f"{scenario}: {title}", author="CleanAI", **margins)
    document.build([Paragraph(_escaped(title), _TITLE), *story], onFirstPage=draw_footer, onLaterPages=draw_footer)
    return file.getvalue()


def text(content: str) -> Paragraph:
    """A paragraph of plain text."""
    return Paragraph(_escaped(content), _TEXT)


def lead(content: str) -> Paragraph:
    """A paragraph of the main result."""
    return Paragraph(_escaped(content), _LEAD)


def headline(content: str) -> Paragraph:
    """The one sentence that answers all."""
    return Paragraph(_escaped(content), _HEADLINE)


def small(content: str) -> Paragraph:
    """A paragraph of details and commands."""
    return Paragraph(_escaped(content), _SMALL)


def warning(content: str) -> Paragraph:
    """A conspicuous paragraph."""
    return Paragraph(_escaped(f"Warning: {content}"), _WARNING)


def section(heading: str, *content: Any) -> list[Any]:
    """A heading and its content: on one page if they fit on one, otherwise from the top of a page on."""
    flowables = [Paragraph(_escaped(heading), _HEADING), Spacer(1, 4), *content]
    height, gap = 0.0, 0.0
    for flowable in flowables:
        height += flowable.wrap(WIDTH, _HEIGHT)[1] + max(gap, flowable.getSpaceBefore())
        gap = flowable.getSpaceAfter()
    return [CondPageBreak(min(height, _HEIGHT)), *flowables]


def table(rows: list[list[str]], widths: list[float]) -> Table:
    """A table whose first row is its heading. All columns but the first are numbers."""
    rows = [[_escaped(cell) for cell in row] for row in rows]
    rows[0] = [f"<font name='{BOLD}' color='white'>{cell}</font>" for cell in rows[0]]
    cells = [[Paragraph(cell, _NUMBER if column else _CELL) for column, cell in enumerate(row)] for row in rows]
    style = [
        ("BACKGROUND", (0, 0), (-1, 0), DARK),
        ("ROWBACKGROUNDS", (0, 1), (-1, -1), [colors.white, colors.HexColor("#f1f4f8")]),
        ("LINEBELOW", (0, -1), (-1, -1), 0.6, DARK),
        ("TOPPADDING", (0, 0), (-1, -1), 2),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 3),
    ]
    return Table(cells, colWidths=widths, style=TableStyle(style), repeatRows=1, splitInRow=1)


def pictures(rows: list[tuple[str, str]], abreast: int) -> Table:
    """Small pictures, as PNG in base64, each above its caption, `abreast` of them in a row."""
    cells = [[_picture(content), Paragraph(_escaped(caption), _CAPTION)] for content, caption in rows]
    cells += [[]] * (-len(cells) % abreast)
    lines = [cells[start : start + abreast] for start in range(0, len(cells), abreast)]
    style = [("VALIGN", (0, 0), (-1, -1), "TOP"), ("ALIGN", (0, 0), (-1, -1), "CENTER")]
    return Table(lines, colWidths=[WIDTH / abreast] * abreast, style=TableStyle(style))


def _picture(content: str) -> Image:
    side = 16 * mm
    return Image(io.BytesIO(base64.b64decode(content)), width=side, height=side, kind="proportional")


def pairs(rows: list[tuple[str, str]], numbers: bool = False, abreast: int = 1) -> Table:
    """A table of labels and values, `abreast` of them in a row, in reading order downwards."""
    height = -(-len(rows) // abreast)
    rows = [*rows, *[("", "")] * (height * abreast - len(rows))]
    cells = [
        [
            Paragraph(_escaped(text), style)
            for label, value in rows[line::height]
            for text, style in ((label, _CELL), (value, _NUMBER if numbers else _CELL))
        ]
        for line in range(height)
    ]
    style = [
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LINEBELOW", (0, 0), (-1, -1), 0.25, LINES),
        ("TOPPADDING", (0, 0), (-1, -1), 1.5),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 2.5),
    ]
    widths = [WIDTH * 0.4 / abreast, WIDTH * (0.2 if numbers else 0.6) / abreast] * abreast
    return Table(cells, colWidths=widths, style=TableStyle(style), hAlign="LEFT", splitInRow=1)


def _escaped(text: str) -> str:
    for sign in "=<":  # no line ends within "p = 0.05"
        text = text.replace(f" {sign} ", f"\xa0{sign}\xa0")
    return text.replace("&", "&amp;").replace("<", "&lt;")
