"""XML from strangers, as events: no tree, no entities, no DTD, nothing fetched."""

from __future__ import annotations

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser, ParseError

_PIECE_CHARS = 2**16


def feed(text: str, target: object) -> None:
    """Parse XML into a target's start, end and data; ends quietly at whatever is wrong with it."""
    parser = DefusedXMLParser(target=target, forbid_dtd=True)
    try:
        for at in range(0, len(text), _PIECE_CHARS):
            parser.feed(text[at : at + _PIECE_CHARS])
    except (StopReadingError, ParseError, DefusedXmlException, ValueError, LookupError):
        return  # malformed or hostile XML says nothing


class StopReadingError(Exception):
    """Enough of the XML was seen."""
