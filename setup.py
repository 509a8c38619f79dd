"""The compiled CPU kernels: optional, so that a machine without a C compiler installs the rest."""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel


class PlatformWheel(bdist_wheel):
    """One wheel a platform: the kernels are loaded by ctypes and use nothing of Python's C API."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform of the wheel's name."""
        *_, platform = super().get_tag()
        return self.python_tag, "none", platform


setup(
    cmdclass={"bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "int4q.kernels.cpu._int4_cpu",
            ["int4q/kernels/cpu/int4_cpu.c"],
            extra_compile_args=["-O3", "-g0", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
)
