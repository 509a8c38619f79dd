"""``int4q convert``."""
def run() -> None:
    """convert."""
