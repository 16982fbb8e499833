"""Numbers as people read them, the same on every page, in the model card and on the command line."""

from __future__ import annotations

_MINUS = "−"


def count(value: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,}"


def percent(fraction: float) -> str:
    return f"{fraction * 100:.2f} %"


def level(confidence: float) -> str:
    """Of confidence: 0.95 -> "95 %"."""
    return f"{confidence * 100:.4g} %"


def points(fraction: float) -> str:
    """Percentage points of a fraction, with a proper minus sign and no negative zero."""
    return f"{round(fraction * 100, 2) + 0.0:.2f}".replace("-", _MINUS)


def change(fraction: float) -> str:
    """Percentage points with their sign."""
    return f"{round(fraction * 100, 2) + 0.0:+.2f}".replace("-", _MINUS)


def short(value: float) -> str:
    """Three digits, never with an exponent; what is next to nothing shows as 0.000."""
    text = (
        f"{value:.0f}"
        if abs(value) >= 99.95
        else f"{value:.3g}"
        if abs(value) >= 1e-3 or not value
        else f"{value:.3f}"
    )
    return text.replace("-", _MINUS)


def figure(value: float) -> str:
    """To be typed again: six digits, never with an exponent; commas from a million on."""
    if abs(value) >= 999_999.5:
        return f"{value:,.0f}"
    return f"{value:.6g}" if abs(value) >= 1e-4 or not value else f"{value:.9f}"


def engineering(value: float) -> str:
    """1234567 -> "1.23 M", to be followed by a unit or none."""
    prefix = ""
    for following in "kMGTPE":
        if abs(value) < 999.5:
            break
        value, prefix = value / 1000, following
    return f"{short(value)} {prefix}".strip()


def signed(value: float) -> str:
    return ("+" if value >= 0 else "") + engineering(value)


def size(number: float | None) -> str:
    """Of so many bytes."""
    if number is None:
        return "not measured"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor * 0.9995:
            return f"{short(number / factor)} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """0.0209 -> "20.9 ms", 20.9 -> "20.9 s", 321.5 -> "5 min 22 s", 7300 -> "2 h 2 min"."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{short(seconds * 1e3)} ms"
    if seconds < 99.95:
        return f"{short(seconds)} s"
    if (whole := round(seconds)) < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} days {hours % 24} h"


def milliseconds(value: float) -> str:
    return duration(value / 1e3)


def factor(value: float) -> str:
    """3.14159 -> "3.1 ×"; two digits are what such a ratio is worth."""
    return f"{value:.0f} ×" if value >= 9.95 else f"{value:.1f} ×" if value >= 0.995 else f"{value:.2f} ×"


def speed(speedup: float) -> str:
    """Of (time of the original / time of the quantized model); less than 5 % is no difference to speak of."""
    if 0.95 < speedup < 1.05:
        return "as fast"
    return f"{factor(speedup)} faster" if speedup > 1 else f"{factor(1 / speedup)} slower"


def smaller(ratio: float) -> str:
    """Of (size of the original / size of the quantized model)."""
    return f"{factor(ratio)} smaller" if ratio >= 1 else f"{factor(1 / ratio)} larger"


def p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def thousandths(value: float) -> str:
    """0.0123 -> "12.3"."""
    value = 1000 * value
    return engineering(value) if abs(value) >= 1e4 else short(value)


def signal(value: float) -> str:
    """Thousandths with their sign."""
    return ("+" if value >= 0 else "") + thousandths(value)


FILTERS = {
    function.__name__: function
    for function in (
        count, percent, level, points, change, short, engineering, signed, size, duration, milliseconds, factor,
        speed, smaller, p_value, thousandths, signal,
    )
}  # fmt: skip
