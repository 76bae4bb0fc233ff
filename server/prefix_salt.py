"""Who shares cached prompt prefixes with whom.

A cached prefix makes the first token sooner, which tells that somebody sent that prefix before. So
requests share them only under the same API key and the same salt. Knows nothing of the cache.
"""

from __future__ import annotations

import hashlib

from .errors import bad_request
from .settings import MAX_CACHE_SALT_CHARS

_FORBIDDEN = frozenset("@/\\\0")


def cache_salt(given: str | None, tenant: bytes) -> str:
    """The engine's salt for a request with `cache_salt` `given`, let in by the key of digest
    `tenant` (empty where no key is asked for); empty if neither sets it apart.

    Raises:
        ApiError: 400, `given` is empty, too long or has a character that is not allowed.
    """
    if given is None:
        if not tenant:
            return ""
    elif not 0 < len(given) <= MAX_CACHE_SALT_CHARS or not _FORBIDDEN.isdisjoint(given):
        raise bad_request(
            "cache_salt", f"must have 1 to {MAX_CACHE_SALT_CHARS} characters and no @ / \\ or NUL"
        )
    return hashlib.blake2b((given or "").encode(), key=tenant, digest_size=16).hexdigest()
