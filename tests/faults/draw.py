"""What a fault leaves open: the step it comes at, the file and the byte it hits, the size of the disk, the length of the jump."""

import random
from collections.abc import Sequence
from typing import Any


class Draw:
    """The documented values, of which the table is made; or those of a seed.

    key: says which random ones: the same key draws the same. made: what was drawn, by name.
    """

    def __init__(self, key: str | None = None):
        self._random = None if key is None else random.Random(key)
        self.made: dict[str, Any] = {}

    def __call__(self, name: str, documented: Any, among: Sequence[Any]) -> Any:
        self.made[name] = documented if self._random is None else self._random.choice(among)
        return self.made[name]
