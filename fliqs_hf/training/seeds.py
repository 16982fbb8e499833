"""Seeds that depend on nothing but what they are for."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A seed that depends on nothing but `parts`. Returns: 0 to 2⁶³ − 1."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
