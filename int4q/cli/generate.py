"""``int4q generate``."""
def run() -> None:
    """generate."""
