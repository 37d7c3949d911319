"""Texts that went through the wrong encoding on their way here, mended without touching any other."""

import re

LOST = "\ufffd"  # stands where a decoder gave up; what was there is not known any more


def _byte_of() -> dict[str, int]:
    """Character -> byte of Windows-1252, its five holes filled as browsers fill them: with C1 controls."""
    table = {}
    for byte in range(0x80, 0x100):
        try:
            table[bytes([byte]).decode("cp1252")] = byte
        except UnicodeDecodeError:
            table[chr(byte)] = byte
    return table


_CP1252 = _byte_of()
# The controls U+0080 to U+009F come from bytes of Windows-1252 read as Latin-1; as text they mean nothing.
_CONTROLS = {control: char for char, byte in _CP1252.items() if (control := chr(byte)) != char and byte < 0xA0}
_BYTES = _CP1252 | {control: ord(control) for control in _CONTROLS}
_TAIL = "[" + re.escape("".join(char for char, byte in _BYTES.items() if byte < 0xC0)) + "]"
_LEADS = {2: range(0xC2, 0xE0), 3: range(0xE0, 0xF0)}
_MISREAD = re.compile("|".join(f"[{chr(lead[0])}-{chr(lead[-1])}]{_TAIL}{{{n - 1}}}" for n, lead in _LEADS.items()))


def repair(text: str) -> tuple[str, int]:
    """`text` with broken encodings mended, and how many replacements that took.

    Two kinds are: UTF-8 that was read as Windows-1252 or Latin-1 (a curly apostrophe is three odd characters then), and
    Windows-1252 read as Latin-1 (a curly apostrophe is U+0092). A sequence is taken for misread UTF-8 only where what
    comes of it is itself a character of Windows-1252: of other text hardly any would be.
    """
    if text.isascii():
        return text, 0
    mended = 0

    def reread(match: re.Match[str]) -> str:
        nonlocal mended
        try:
            char = bytes(_BYTES[one] for one in match[0]).decode()
        except UnicodeDecodeError:
            return match[0]
        if char not in _BYTES:
            return match[0]
        mended += 1
        return char

    before = ""
    while before != text:  # some text was misread twice
        before, text = text, _MISREAD.sub(reread, text)
    controls = sum(char in _CONTROLS for char in text)
    return "".join(_CONTROLS.get(char, char) for char in text), mended + controls
