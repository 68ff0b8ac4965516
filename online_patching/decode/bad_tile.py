"""Why a tile does not decode, before anybody knows which tile it is."""

from __future__ import annotations


class BadTileError(Exception):
    """Why a tile does not decode; the caller adds which slide, level and tile."""
