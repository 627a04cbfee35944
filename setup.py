"""Builds the C++ module `pr1._C` with CMake and maps the folder kernels/ to the package `pr1.kernels`.

Everything else about the package stands in pyproject.toml. CMake and Ninja come as Python wheels (requirements.txt), so
a C++17 compiler is the only thing the machine has to bring.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake where setuptools would have called the compiler."""

    def build_extension(self, ext):
        import ninja
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        cmake = [sys.executable, "-m", "cmake"]
        configure = [
            *cmake,
            "--fresh",  # a cache copied along with the folder, or made for another Python, must not decide anything
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DOUTPUT_DIR={target.parent}",
            f"-DOUTPUT_NAME={target.name}",
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([*cmake, "--build", str(build), "--parallel"], check=True)


sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*"))
setup(
    packages=["pr1", "pr1.tasks", "pr1.families", "pr1.data", "pr1.rewards", "pr1.kernels"],
    # A top-level package named `kernels` would collide with the PyPI package of that name, which transformers probes.
    package_dir={"pr1.kernels": "kernels"},
    package_data={"pr1": ["assets/**"]},
    ext_modules=[Extension("pr1._C", sources=[s for s in sources if s.endswith(".cpp")], depends=sources)],
    cmdclass={"build_ext": CMakeBuild},
)
