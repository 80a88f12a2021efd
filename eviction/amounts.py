"""Amounts and words as people read them."""

from __future__ import annotations

_GIB = 1 << 30


def gib_text(count: float) -> str:
    """Bytes, with two or more figures: ``0.15 GiB``, ``1,565 GiB``, ``15 TiB``."""
    gib = count / _GIB
    if gib >= 10_000:
        return f"{gib / 1_024:,.0f} TiB"
    return f"{gib:,.0f} GiB" if gib >= 10 else f"{gib:.2g} GiB"


def number_text(value: float) -> str:
    """Two figures, or all before the point: ``0.21``, ``3.5``, ``114``."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def plain(text: str) -> str:
    """``text`` of strangers, with a question mark for what is no sign that can be seen."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)
