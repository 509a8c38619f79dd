"""The compiled CPU kernels and the C++ core: optional; without compilers the rest installs."""

import runpy
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

VERSION = runpy.run_path("int4q/_version.py")["__version__"]
SOURCES = "int4q/kernels/cpu/csrc"
CORE = "int4q/kernels/core"
KERNELS = sorted(glob(f"{SOURCES}/*.c"))
# Products and sums are fused where the kernels say so, and nowhere else.
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off"]
# A compiler may come with a static C++ library only. That must stay private: where half of its
# symbols are those of the shared one that torch has loaded, the first error message crashes.
PRIVATE = ["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []
BUILD = {
    "depends": glob(f"{SOURCES}/*.h"),
    "extra_compile_args": FLAGS,
    "extra_link_args": ["-fopenmp", *PRIVATE],
    "optional": True,
}


class PlatformWheel(bdist_wheel):
    """One wheel a platform: the libraries use nothing of Python's C API."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform of the wheel's name."""
        *_, platform = super().get_tag()
        return self.python_tag, "none", platform


def core() -> list[Extension]:
    """The C++ core, where the torch that is installed can be built against.

    It needs torch's stable ABI of 2.10, whichever torch from 2.10 on has the headers.
    """
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        return []
    return [
        Extension(
            "int4q.kernels.core._int4_core",
            [*sorted(glob(f"{CORE}/*.cpp")), *KERNELS],
            include_dirs=[SOURCES, *include_paths()],
            library_dirs=library_paths(),
            libraries=["torch_cpu"],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),
                ("INT4Q_VERSION", f'"{VERSION}"'),
            ],
            language="c++",
            **{**BUILD, "depends": [*BUILD["depends"], *glob(f"{CORE}/*.h")]},
        )
    ]


setup(
    cmdclass={"bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension("int4q.kernels.cpu._int4_cpu", KERNELS, **BUILD),
        *core(),
    ],
)
