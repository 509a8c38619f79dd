"""``int4q inspect``."""
def run() -> None:
    """inspect."""
