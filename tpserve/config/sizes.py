"""Sizes of memory and files as people read them."""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def size(num_bytes: int) -> str:
    """Bytes with a unit that suits them: "12 B", "3.5 MiB", "80.0 GiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"
