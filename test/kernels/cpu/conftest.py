"""INT4Q_TEST_EMULATED="program cpu": here ``native`` runs that program under qemu."""

import functools
import os

if emulated := os.environ.get("INT4Q_TEST_EMULATED"):
    import emulate

    from int4q.kernels.cpu import native

    library = emulate.Library(*emulated.split())

    @functools.wraps(native.load.__wrapped__)
    def load():
        return library, None

    native.load = load
    native._features.cache_clear()

    def pytest_sessionfinish():
        library.close()
