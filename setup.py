"""The compiled CPU kernels: optional, so that a machine without a C compiler installs the rest."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "int4q.kernels.cpu._int4_cpu",
            ["int4q/kernels/cpu/int4_cpu.c"],
            extra_compile_args=["-O3", "-g0", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
