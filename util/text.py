"""Text that others wrote (names of files and classes, commands, devices) as it may be shown."""

import os
import re

# Control characters of both kinds, halves of surrogate pairs, and what turns the direction of a line of text.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str | bytes | os.PathLike) -> str:
    """The text or path in one line: control characters, and bytes that are no UTF-8, as escapes like \\n and \\xff."""
    return UNPRINTABLE.sub(lambda found: _escaped(found[0]), os.fsdecode(text))


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # a byte, as os.fsdecode gives one that is no UTF-8
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def in_markdown(text: str) -> str:
    """The text in one line of Markdown that shows it as it is, within a table, too: no markup, no HTML."""
    shown = re.sub(r"([\\`*\[\]|])", r"\\\1", printable(text))
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^(\s*)([#+~=-])", r"\1\\\2", shown)
