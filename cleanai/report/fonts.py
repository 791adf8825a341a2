"""The fonts of the PDFs."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import reportlab
from anyascii import anyascii
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont


class _Font(TTFont):
    """A font that writes in Latin letters what it would draw as boxes, because it lacks the characters."""

    def stringWidth(self, text: str, size: float, encoding: str = "utf8") -> float:
        return super().stringWidth(self._drawn(text), size, encoding)

    def splitString(self, text: str, doc: Any, encoding: str = "utf-8") -> Any:
        return super().splitString(self._drawn(text), doc, encoding)

    def _drawn(self, text: str) -> str:
        text, glyphs = unicodedata.normalize("NFC", text), self.face.charToGlyph
        return "".join(c if ord(c) in glyphs else _in_latin(c) for c in text)


def _in_latin(character: str) -> str:
    """For example "ya" for я and ":cat:" for the picture of a cat; its number where there is no such name."""
    latin = anyascii(character)
    if latin and latin.isprintable():
        return latin
    invisible = unicodedata.category(character) in ("Cf", "Me", "Mn")  # it joins or changes its neighbours
    return "" if invisible else f"U+{ord(character):04X}"


# They come with reportlab and, unlike the PDF standard ones, have the Turkish letters.
FONT, BOLD = "Vera", "VeraBd"
for _name in (FONT, BOLD):
    pdfmetrics.registerFont(_Font(_name, str(Path(reportlab.__file__).parent / "fonts" / f"{_name}.ttf")))
