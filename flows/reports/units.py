"""Sizes and times in readable units."""

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def human_bytes(count: float) -> str:
    """Return a size with a decimal unit, such as 12.3 MB."""
    size = float(count)
    for unit in _UNITS:
        if abs(size) < 999.95 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a time in its two largest units, such as 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:,.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24:,} days {hours % 24} h"
