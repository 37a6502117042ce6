"""Numbers as people read them: three significant digits and a decimal prefix."""


def format_bytes(count: float) -> str:
    """Such as "590 kB"; prefixes are powers of 1000."""
    return _with_prefix(count, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_count(count: float) -> str:
    """Such as "1.37 M"; whole numbers below 1000 are kept."""
    return _with_prefix(count, ("", "k", "M", "G", "T", "P", "E"))


def format_seconds(seconds: float) -> str:
    """Such as "48 s", "5 min 12 s" or "3 h 4 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _with_prefix(count: float, prefixes: tuple[str, ...]) -> str:
    size = float(count)
    # 999.5 would be printed as 1000 with three digits.
    for prefix in prefixes[:-1]:
        if abs(size) < 999.5:
            return _three_digits(size, prefix)
        size /= 1000
    return _three_digits(size, prefixes[-1])


def _three_digits(size: float, prefix: str) -> str:
    if size == int(size) or abs(size) >= 99.95:
        number = f"{size:.0f}"
    elif abs(size) >= 9.995:
        number = f"{size:.1f}"
    else:
        number = f"{size:.2f}"
    return f"{number} {prefix}".rstrip()
