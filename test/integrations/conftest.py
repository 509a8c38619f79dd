"""What the results of these tests are of: the versions, for the matrix of compatibility."""

from importlib.metadata import PackageNotFoundError, version

import pytest

PACKAGES = ("torch", "torchao", "transformers", "peft", "accelerate", "safetensors")


@pytest.fixture(scope="session", autouse=True)
def versions(record_testsuite_property):
    for name in PACKAGES:
        try:
            record_testsuite_property(name, version(name).partition("+")[0])
        except PackageNotFoundError:
            continue
