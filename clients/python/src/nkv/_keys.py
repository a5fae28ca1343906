"""What is a key, what is a pattern, and which keys a pattern covers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ._errors import InvalidKey

KEY_LEN_MAX = 1024

# White space (the property White_Space) and control characters (the category Cc), neither of which `\s` is exactly.
_FORBIDDEN = re.compile("[\x00-\x20\x7f-\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


def check_key(key: str) -> str:
    """Returns the key, or raises `InvalidKey`."""
    _check(key, "key")
    if "*" in key:
        raise InvalidKey(f"invalid key: {key[:64]!r}: '*' is for patterns")
    return key


def check_pattern(pattern: str) -> str:
    """Returns the pattern, or raises `InvalidKey`."""
    _check(pattern, "pattern")
    if "*" in pattern and pattern != "*" and not (pattern.endswith(".*") and pattern.count("*") == 1):
        raise InvalidKey(f"invalid pattern: {pattern[:64]!r}: '*' is alone or the last segment")
    return pattern


def _check(key: str, what: str) -> None:
    if not isinstance(key, str):
        raise InvalidKey(f"invalid {what}: a str is needed, not {type(key).__name__}")
    try:
        length = len(key.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InvalidKey(f"invalid {what}: {key[:64]!r}: no Unicode character at {error.start}") from None
    if length > KEY_LEN_MAX:
        raise InvalidKey(f"invalid {what}: {length} bytes; the limit is {KEY_LEN_MAX}")
    if "" in key.split("."):
        raise InvalidKey(f"invalid {what}: {key[:64]!r}: empty segment")
    if found := _FORBIDDEN.search(key):
        raise InvalidKey(f"invalid {what}: {key[:64]!r}: white space or control character at {found.start()}")


def covers(pattern: str, exact: bool, key: str) -> bool:
    """Whether a subscription to the pattern is notified of the key."""
    if pattern == "*":
        return True
    if pattern.endswith(".*"):
        return key.startswith(pattern[:-1])
    return key == pattern or (not exact and key.startswith(pattern) and key[len(pattern)] == ".")


def disjoint(patterns: str | Iterable[str], exact: bool) -> list[str]:
    """Returns those of the patterns, or the one, that no other includes, so that no key is covered twice. Raises `InvalidKey`."""
    kept: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        pattern = check_key(pattern) if exact else check_pattern(pattern)
        # What a pattern covers of another's text, it covers of all that the other does.
        if not any(covers(other, exact, pattern) for other in kept):
            kept = [other for other in kept if not covers(pattern, exact, other)]
            kept.append(pattern)
    if not kept:
        raise InvalidKey("invalid pattern: there is none")
    return kept


def covering(key: str) -> list[str]:
    """All patterns that cover the key."""
    patterns = ["*", key]
    end = key.find(".")
    while end >= 0:
        patterns += (key[:end], key[:end] + ".*")
        end = key.find(".", end + 1)
    return patterns
