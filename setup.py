"""Maps the top-level folders to rollmill.<folder>, every subpackage found; pyproject.toml has the rest."""

from setuptools import find_packages, setup

FOLDERS = ("engine", "moe", "quant", "weight_sync")

setup(
    package_dir={f"rollmill.{folder}": folder for folder in FOLDERS},
    packages=[f"rollmill.{name}" for f in FOLDERS for name in find_packages(include=[f, f"{f}.*"])],
)
