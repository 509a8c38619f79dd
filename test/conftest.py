"""Fixtures: the devices to run on, uninitialised memory that shows, what the results are of."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from helpers import LAYOUTS

PACKAGES = ("torch", "torchao", "transformers", "peft", "accelerate", "safetensors")
"""Whose versions the results name, for the matrix of compatibility."""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def versions(record_testsuite_property):
    for name in PACKAGES:
        try:
            record_testsuite_property(name, version(name).partition("+")[0])
        except PackageNotFoundError:
            continue


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(params=LAYOUTS, ids=lambda c: c.__name__)
def layout(request):
    return request.param


@pytest.fixture(scope="session")
def webgpu():
    """The default WebGPU adapter. Without one a test is skipped, or fails where
    INT4Q_REQUIRE_WEBGPU=1 says that there must be one."""
    from int4q.kernels.webgpu import device as webgpu_device

    if reason := webgpu_device.unavailable():
        required = os.environ.get("INT4Q_REQUIRE_WEBGPU") == "1"
        (pytest.fail if required else pytest.skip)(reason)
    return webgpu_device.default_gpu()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` holds NaN (or the largest integer), so an unwritten output fails."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
