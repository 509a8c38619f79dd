"""Compile CUDA C++ at run time (NVRTC), keep the binaries on disk, launch with little host work.

    module = load(source, {"WARPS": 8}, device_index)  # compiled once, loaded once a device
    launch = module.prepare("kernel", grid, block, shared_bytes, params, dependent=True)
    launch(stream)  # `params` is the one (struct) argument of the kernel

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
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_FUNCTION_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_LAUNCH_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_INVALID_CONTEXT = 201

_guard = threading.Lock()
_key_locks: dict[object, threading.Lock] = {}
_modules: dict[object, "Module"] = {}
_libraries: dict[str, ctypes.CDLL] = {}


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


def _driver() -> ctypes.CDLL:
    library = _libraries.get("cuda")
    if library is None:
        library = _libraries["cuda"] = ctypes.CDLL("libcuda.so.1")
    return library


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
    try:
        _driver()
        _nvrtc()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(
            f"{what} failed: CUDA driver error {status} ({(text.value or b'unknown').decode()})"
        )


def driver_unavailable() -> str | None:
    """The reason why the CUDA driver cannot be called; None if it can."""
    try:
        _driver()
    except OSError as error:
        return str(error)
    return None


def driver_call(name: str, *arguments) -> None:
    """Calls a function of the CUDA driver; raises RuntimeError with its text on an error."""
    if status := getattr(_driver(), name)(*arguments):
        _check(status, name)


def _make_current(device: int) -> None:
    """Makes the primary context of `device`, which torch uses, the calling thread's current one."""
    driver, context, handle = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _check(
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain"
    )
    _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def _versions() -> str:
    driver = ctypes.c_int()
    _driver().cuDriverGetVersion(ctypes.byref(driver))
    return f"{_nvrtc_version()};{driver.value}"


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


class Launch:
    """One kernel with its grid and its parameters; called with a raw stream handle.

    `params` holds one ctypes object a parameter. The driver copies them during the call, so they
    may be refilled right after.
    The caller serialises refill and call (one lock around both).
    """

    def __init__(
        self,
        function,
        device: int,
        grid: int,
        block: int,
        shared_bytes: int,
        params: Sequence,
        dependent: bool,
    ):
        self._device = device
        self._config = _LaunchConfig(
            grid=(grid, 1, 1), block=(block, 1, 1), shared_bytes=shared_bytes
        )
        if (
            dependent
        ):  # may start before the kernel in front of it on the stream ends; it waits inside
            self._attribute = _LaunchAttribute(id=_LAUNCH_PROGRAMMATIC_SERIALIZATION, value=1)
            self._config.attributes = ctypes.pointer(self._attribute)
            self._config.attribute_count = 1
        self._params = params  # their memory lives as long as the addresses do
        self._pointers = (ctypes.c_void_p * len(params))(*map(ctypes.addressof, params))
        self._function = function
        self._reference = ctypes.byref(self._config)
        self._call = _driver().cuLaunchKernelEx

    def __call__(self, stream: int) -> None:
        self._config.stream = stream
        status = self._call(self._reference, self._function, self._pointers, None)
        if status == _INVALID_CONTEXT:  # a thread that has not used CUDA yet has no current context
            _make_current(self._device)
            status = self._call(self._reference, self._function, self._pointers, None)
        if status:
            _check(status, "cuLaunchKernelEx")


class Module:
    """A compiled source, loaded on one device."""

    def __init__(self, cubin: bytes, device: int):
        self._device = device
        self._handle = ctypes.c_void_p()
        self._functions: dict[str, tuple[ctypes.c_void_p, int]] = {}
        driver = _driver()
        torch.cuda.init()
        with torch.cuda.device(device):
            _make_current(device)
            mode = ctypes.c_int(
                _CAPTURE_RELAXED
            )  # so that the first call may come inside a graph capture
            driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
            try:
                _check(
                    driver.cuModuleLoadData(ctypes.byref(self._handle), cubin), "cuModuleLoadData"
                )
            finally:
                driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def function(self, name: str, shared_bytes: int = 0) -> ctypes.c_void_p:
        """The kernel `name`, allowed to use `shared_bytes` of dynamic shared memory."""
        function, allowed = self._functions.get(name, (None, 48 * 1024))
        if function is None:
            function = ctypes.c_void_p()
            _check(
                _driver().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode()),
                f"cuModuleGetFunction({name})",
            )
        if shared_bytes > allowed:
            what = f"{shared_bytes} bytes of shared memory for {name}"
            _check(
                _driver().cuFuncSetAttribute(function, _FUNCTION_MAX_DYNAMIC_SHARED, shared_bytes),
                what,
            )
        self._functions[name] = (function, max(allowed, shared_bytes))
        return function

    def prepare(
        self,
        name: str,
        grid: int,
        block: int,
        shared_bytes: int,
        params: ctypes.Array,
        dependent: bool,
    ) -> Launch:
        return Launch(
            self.function(name, shared_bytes),
            self._device,
            grid,
            block,
            shared_bytes,
            [params],
            dependent,
        )


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
