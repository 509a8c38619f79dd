"""``int4q doctor``."""
def run() -> None:
    """doctor."""
