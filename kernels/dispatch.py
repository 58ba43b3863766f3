"""How an op with several implementations picks one: by asking each what it cannot do, never by trying and catching.

Every op keeps a table `name -> Implementation` and, per platform, the names from fastest to slowest as measured. A call is
described by the op's own spec (a frozen dataclass of static facts: shapes, dtypes, features, platform); `supports(spec)`
returns None, or the reason the implementation cannot run that call.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op: `run` does it, `supports(spec)` says why it cannot (None: it can), `about` says what it is."""

    run: Callable[..., Any]
    supports: Callable[[Any], str | None]
    about: str


def anything(spec: Any) -> None:
    """`supports` of an implementation that can run every call."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs (`name`), why (`reason`), and for every other implementation why it does not (`others`)."""

    name: str
    reason: str
    others: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {self.reason}", *(f"  not {name}: {why}" for name, why in self.others.items())])


def choose(
    op: str,
    table: Mapping[str, Implementation],
    preference: Sequence[str],
    spec: Any,
    name: str | None,
    told: Collection[str] = (),
) -> Choice:
    """Pick from `table` for `spec`: the implementation called `name`, or the first in `preference` that supports the call.

    That one of `told` comes earlier in `preference` and cannot run the call is logged, once for each reason.

    Raises:
      ValueError: `name` is not in the table, or names an implementation that cannot run this call (the message says why), or
        nothing in `preference` can.
    """
    if name is not None and not (isinstance(name, str) and name in table):
        raise ValueError(
            f"{op}: implementation={shown(name)} does not exist; use one of {sorted(table)}, or None for the fastest"
        )
    reasons = {key: implementation.supports(spec) for key, implementation in table.items()}
    if name is not None and reasons[name] is not None:
        raise ValueError(f"{op}: implementation={name!r} cannot run this call: {reasons[name]}; able: {_able(reasons)}")
    chosen = name or next((key for key in preference if reasons[key] is None), None)
    if chosen is None:
        raise ValueError(f"{op}: none of {list(preference)} can run this call: {reasons}; by name: {_able(reasons)}")
    for earlier in [] if name else preference[: preference.index(chosen)]:
        if earlier in told:
            _log_once(f"{op}: {chosen}, not {earlier}: {reasons[earlier]}")
    why = "asked for by name" if name else f"the first of {list(preference)} that supports this call"
    others = {key: _why_not(key, reason, preference, name) for key, reason in reasons.items() if key != chosen}
    return Choice(chosen, f"{why} ({table[chosen].about})", others)


@functools.lru_cache(maxsize=1024)
def _log_once(line: str) -> None:
    logging.getLogger(__name__).info(line)


def shown(value: Any) -> str:
    """A wrong argument's value in an error: one short line, whatever it is; of an array, type and shape."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype} {value.shape}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _able(reasons: Mapping[str, str | None]) -> list[str]:
    return sorted(key for key, reason in reasons.items() if reason is None)


def _why_not(key: str, reason: str | None, preference: Sequence[str], name: str | None) -> str:
    if reason is not None:
        return f"cannot: {reason}"
    if name is not None:
        return "can, but another was asked for by name"
    return "can, but comes later in that order" if key in preference else "can, but runs only when asked for by name"
