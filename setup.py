"""Static on purpose: nothing is computed, probed or imported here. Metadata stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=["mtpkern", "mtpkern.kernels", "mtpkern.train", "mtpkern.bench"],
    # The four folders of the house lie side by side in the repository and form one package when installed.
    package_dir={
        "mtpkern": "mtpkern",
        "mtpkern.kernels": "kernels",
        "mtpkern.train": "train",
        "mtpkern.bench": "bench",
    },
    package_data={"mtpkern": ["py.typed", "assets/**"], "mtpkern.train": ["configs/*.yaml"]},
)
