"""Handle the differences between the supported versions of transformers.

Versions are compared only here, so that all other code is the same for every version. A published model includes this
file, because it runs with the transformers version of the user who loads it.
"""

import transformers
from packaging.version import Version
from transformers import Cache

CACHE_NAMES = ("past_key_values", "cache")
# transformers 5.24 renamed the key-value cache: as an argument of forward and of generate, and in their outputs.
CACHE_NAME = "cache" if Version(transformers.__version__) >= Version("5.24.0.dev0") else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the key-value cache that a caller passed under either name; None if there is none.

    Raises:
        ValueError: the caller passed both.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Pass the key-value cache once: as past_key_values or as cache, not as both.")
    return cache if past_key_values is None else past_key_values
