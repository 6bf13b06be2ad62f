"""Where a text ends, and its pieces while it grows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for a character of which bytes are missing


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the `stop` texts begins; None where there is none."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)


def text_pieces(texts: Iterable[str], *, stop: Sequence[str]) -> Iterator[str]:
    """What each text adds to the one before. Joined, the pieces are the last text up to its stop
    text, stripped; what may still become part of a stop text or a character is held back.

    >>> list(text_pieces([" a", " a b", " a b\\n", " a b\\nc"], stop=["\\nc"]))
    ['a', ' b']
    """
    shown, text = "", ""
    for text in texts:
        piece = _settled(text, stop).strip()[len(shown) :]
        if piece:
            yield piece
            shown += piece
    rest = text[: find_stop(text, stop)].strip()[len(shown) :]
    if rest:
        yield rest


def _settled(text: str, stop: Sequence[str]) -> str:
    """The part of a text that no later token changes."""
    place = find_stop(text, stop)
    if place is not None:
        return text[:place]
    held = max(
        (size for end in stop for size in range(1, len(end)) if text.endswith(end[:size])),
        default=0,
    )
    return text[: len(text) - held].rstrip(UNFINISHED)
