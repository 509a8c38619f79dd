"""``python -m int4q``: the command, for ``torchrun -m int4q quantize ...``."""

from int4q.cli import main

if __name__ == "__main__":
    main()
