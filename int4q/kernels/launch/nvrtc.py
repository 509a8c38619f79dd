"""Compile CUDA C++ at run time (NVRTC) and keep the binaries on disk.

    module = load(source, {"WARPS": 8}, device_index)  # compiled once, loaded once a device
    function = module.function("kernel", shared_bytes)  # for `cuLaunchKernelEx`

Binaries live in ``$INT4Q_CACHE_DIR``, else ``$XDG_CACHE_HOME/int4q``, else ``~/.cache/int4q``,
under a hash of the source, the definitions, the architecture and the versions of NVRTC and the
driver. Nothing else is written.
"""

import ctypes
import glob
import hashlib
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from int4q.kernels.launch import driver, images

_FUNCTION_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_guard = threading.Lock()
_key_locks: dict[object, threading.Lock] = {}
_modules: dict[object, "Module"] = {}
_libraries: dict[str, ctypes.CDLL] = {}


def _nvrtc() -> ctypes.CDLL:
    library = _libraries.get("nvrtc")
    if library is not None:
        return library
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    site = Path(torch.__file__).resolve().parents[1]
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    candidates = [
        *sorted(glob.glob(str(site / "nvidia" / "*" / "lib" / f"{name}*"))),
        *sorted(glob.glob(str(Path(torch.__file__).parent / "lib" / f"libnvrtc*.so*{major}*"))),
        name,
        *(str(Path(home) / "lib64" / name) for home in homes if home),
    ]
    for candidate in candidates:
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        _libraries["nvrtc"] = library
        return library
    raise RuntimeError(
        f"{name} was not found (looked for {candidates}): install nvidia-cuda-nvrtc for "
        f"CUDA {major} or set CUDA_HOME"
    )


def unavailable() -> str | None:
    """The reason why kernels cannot be compiled and launched here; None if they can."""
    if reason := driver.unavailable():
        return reason
    try:
        _nvrtc()
    except RuntimeError as error:
        return str(error)
    return None


def _versions() -> str:
    version = ctypes.c_int()
    driver.call("cuDriverGetVersion", ctypes.byref(version))
    return f"{_nvrtc_version()};{version.value}"


def _nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def cache_dir() -> Path:
    if override := os.environ.get("INT4Q_CACHE_DIR"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "int4q"


def compile_cubin(source: str, defines: Mapping[str, int], arch: str) -> bytes:
    """CUDA C++ -> cubin for `arch` ("sm_90"). No files and no include paths are needed."""
    nvrtc = _nvrtc()

    def check(status: int, what: str) -> None:
        if status:
            raise RuntimeError(f"{what} failed: {nvrtc.nvrtcGetErrorString(status).decode()}")

    program = ctypes.c_void_p()
    check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        ),
        "nvrtcCreateProgram",
    )
    try:
        options = [
            f"--gpu-architecture={arch}",
            "--std=c++17",
            *(f"-D{name}={value}" for name, value in defines.items()),
        ]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        if status:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(
                f"NVRTC could not compile for {arch} with {dict(defines)}:\n"
                f"{log.value.decode(errors='replace')}"
            )
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        binary = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, binary), "nvrtcGetCUBIN")
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cached_cubin(source: str, defines: Mapping[str, int], arch: str) -> bytes:
    """`compile_cubin` through the disk cache. A cache that fails costs time, never the result."""
    text = "\0".join([source, repr(sorted(defines.items())), arch, _versions()])
    path = cache_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    binary = compile_cubin(source, defines, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, path)  # other processes see all of the file or none of it
    except OSError:
        pass
    return binary


class Module:
    """A compiled source, loaded on one device."""

    def __init__(self, cubin: bytes, device: int):
        torch.cuda.init()
        self._cubin = cubin
        self._context = driver.context(device)
        self._handle = ctypes.c_void_p()
        self._functions: dict[str, tuple[ctypes.c_void_p, int]] = {}
        # Relaxed, so that the first call may come inside a graph capture.
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        with driver.current(self._context):
            driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            try:
                driver.call("cuModuleLoadData", ctypes.byref(self._handle), cubin)
            finally:
                driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def function(self, name: str, shared_bytes: int = 0) -> int:
        """The kernel `name`, allowed to use `shared_bytes` of dynamic shared memory."""
        function, allowed = self._functions.get(name, (ctypes.c_void_p(), 48 * 1024))
        with driver.current(self._context):
            if not function:
                reference = ctypes.byref(function)
                driver.call("cuModuleGetFunction", reference, self._handle, name.encode())
                images.note(function.value or 0, self._cubin, name)
            if shared_bytes > allowed:
                more = _FUNCTION_MAX_DYNAMIC_SHARED, shared_bytes
                driver.call("cuFuncSetAttribute", function, *more)
        self._functions[name] = (function, max(allowed, shared_bytes))
        return function.value or 0


def load(source: str, defines: Mapping[str, int], device: int, suffix: str = "") -> Module:
    """The module of `source` with `defines` on `device`; the same object on every call.

    `suffix` "a" compiles for the instructions of this one architecture (sm_90a).
    """
    key = (source, tuple(sorted(defines.items())), device, suffix)
    module = _modules.get(key)
    if module is not None:
        return module
    with _guard:
        lock = _key_locks.setdefault(key, threading.Lock())
    with lock:  # one compilation a key; different keys compile side by side
        if key not in _modules:
            major, minor = torch.cuda.get_device_capability(device)
            arch = f"sm_{major}{minor}{suffix}"
            _modules[key] = Module(cached_cubin(source, defines, arch), device)
        return _modules[key]
