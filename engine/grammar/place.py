"""Where in a JSON text its next byte is: in a string, in a name, in a number. Knows no schema; the text is JSON."""

from __future__ import annotations

from collections.abc import Iterable

QUOTE, BACKSLASH, COMMA, COLON = b'"\\,:'
OPEN_OBJECT, CLOSE_OBJECT, OPEN_ARRAY, CLOSE_ARRAY = b"{}[]"
_ZERO, _NINE, _PLUS, _MINUS, _POINT, _SMALL_E, _LARGE_E, _SMALL_U = b"09+-.eEu"


class JSONPlace:
    """Fed bytes; says what they leave open."""

    __slots__ = (
        "_escape", "_expects_name", "_open", "digits", "in_exponent", "in_fraction", "in_name", "in_string", "mantissa"
    )  # fmt: skip

    def __init__(self) -> None:
        self.in_string = False
        self.in_name = False
        """Of the string that is open or was last: whether it is a property's name."""
        self.digits = 0
        """How many digits the text ends with, outside of strings."""
        self.mantissa = 0
        """How many digits the number has that the text ends with, those of its exponent not counted."""
        self.in_fraction = False
        self.in_exponent = False
        self._escape = 0  # characters of an escape sequence that are missing
        self._expects_name = False
        self._open = bytearray()

    @property
    def in_plain_string(self) -> bool:
        """In a string that is a value, and not in an escape sequence."""
        return self.in_string and not self.in_name and not self._escape

    def copy(self) -> JSONPlace:
        """Another one at the same place."""
        twin = JSONPlace.__new__(JSONPlace)
        twin.in_string, twin.in_name, twin.digits = self.in_string, self.in_name, self.digits
        twin.mantissa, twin.in_fraction, twin.in_exponent = self.mantissa, self.in_fraction, self.in_exponent
        twin._escape, twin._expects_name = self._escape, self._expects_name
        twin._open = self._open.copy()
        return twin

    def feed(self, data: Iterable[int]) -> None:
        """Take the next bytes."""
        for byte in data:
            if self.in_string:
                self._feed_string(byte)
            else:
                self._feed_structure(byte)

    def _feed_string(self, byte: int) -> None:
        if self._escape:
            self._escape += 3 if byte == _SMALL_U and self._escape == 1 else -1
        elif byte == BACKSLASH:
            self._escape = 1
        elif byte == QUOTE:
            self.in_string = False

    def _feed_structure(self, byte: int) -> None:
        if _ZERO <= byte <= _NINE:
            self.digits += 1
            self.mantissa += not self.in_exponent
            return
        self.digits = 0
        self.in_fraction = byte == _POINT
        self.in_exponent = byte in (_SMALL_E, _LARGE_E) or (self.in_exponent and byte in (_PLUS, _MINUS))
        if not (self.in_fraction or self.in_exponent):
            self.mantissa = 0
        if byte == QUOTE:
            self.in_string = True
            self.in_name = self._expects_name
        elif byte in (OPEN_OBJECT, OPEN_ARRAY):
            self._open.append(byte)
            self._expects_name = byte == OPEN_OBJECT
        elif byte in (CLOSE_OBJECT, CLOSE_ARRAY):
            del self._open[-1:]
            self._expects_name = False
        elif byte == COMMA:
            self._expects_name = self._open[-1:] == b"{"
        elif byte == COLON:
            self._expects_name = False
