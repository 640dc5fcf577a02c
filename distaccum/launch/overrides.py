"""Writes overrides as text, quoted for Hydra's grammar and for a shell, whose rules differ."""

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException


def override(key: str, text: str) -> str:
    """Return `key=text` such that Hydra reads exactly this text, quoted only where needed."""
    plain = f"{key}={text}"
    return plain if _reads_as(plain, text) else _quoted(key, text)


def _quoted(key: str, text: str) -> str:
    quote = "'" if "'" in text else '"'
    # Hydra keeps a backslash, unless it precedes a quote or another backslash that does.
    inside = re.sub(
        rf"(\\*)({quote}|$)", lambda found: 2 * found[1] + (f"\\{quote}" if found[2] else ""), text
    )
    return f"{key}={quote}{inside}{quote}"


def shell_word(text: str) -> str:
    """Quote an override for a shell, if possible with other quotes than Hydra's inside it."""
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    if "'" not in text:
        return f"'{text}'"
    return shlex.quote(text) if re.search(r'["$`!]|\\[^\']', text) else f'"{text}"'


def to_paste(key: str, text: str) -> str:
    """Return an override that people can paste into a shell."""
    return shell_word(override(key, text))


def advice(error: BaseException) -> list[str]:
    """Return lines on how to write an override that Hydra could not read; none for other errors."""
    if not isinstance(error, OverrideParseException):
        return []
    message = f"This override cannot be read: {error.override}"
    key, is_there, value = error.override.partition("=")
    quoted = _quoted(key, value)
    if not is_there:
        return [
            message,
            (
                "An override has the form key=value. Quote a value with spaces for the shell: "
                "'key=one two'."
            ),
        ]
    if not _reads_as(quoted, value):
        return [message]
    to_write = f"{shell_word(quoted)} (the outer quotes are for the shell)"
    return [message, f"If its value is exactly this text, write {to_write}."]


def _reads_as(text: str, value: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(text).value() == value)
    except HydraException:
        return False
