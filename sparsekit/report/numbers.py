"""Numbers as a person reads them: three significant digits, units, words."""

from __future__ import annotations

import math
from collections.abc import Sequence


def significant(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, thousands separators and no exponent."""
    if value == 0:
        return "0"
    # Round first: 9.996 has one digit before the point, and reads 10.0.
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def count(value: int) -> str:
    """Write a count: up to 9,999 in full, then with k, M, G or T."""
    return f"{value:,}" if value < 10_000 else _scaled(value, ("", "k", "M", "G", "T"))


def size(value: float) -> str:
    """Write a number of bytes with a decimal unit."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def milliseconds(value: float) -> str:
    """Write milliseconds with three significant digits."""
    return f"{significant(value)} ms"


def duration(value: float) -> str:
    """Write a number of seconds as seconds, minutes and seconds, or hours and minutes."""
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    return f"{int(value // 60)} min {int(value % 60)} s" if value >= 60 else f"{value:.1f} s"


def fraction(value: float) -> str:
    """Write an accuracy or a share with four decimals."""
    return f"{value:.4f}"


def tiny(value: float) -> str:
    """Write a difference by its order of magnitude; 0 if there is none."""
    return f"{value:.1e}" if value else "0"


def change(ratio: float, less: str, more: str) -> str:
    """Write `ratio` = dense / pruned in words: "2.50× fewer", "1.10× more", or "the same"."""
    shown, word = (ratio, less) if ratio >= 1 else (1 / ratio, more)
    return "the same" if f"{shown:.2f}" == "1.00" else f"{significant(shown)}× {word}"


def plural(count: int, noun: str, ending: str = "s") -> str:
    """Write a number of things: "1 image", "2 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"


def _scaled(value: float, units: Sequence[str]) -> str:
    step = 0
    while step + 1 < len(units) and float(f"{value:.2e}") >= 1000:
        value, step = value / 1000, step + 1
    return f"{significant(value)} {units[step]}".strip()
