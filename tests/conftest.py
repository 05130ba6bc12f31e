"""Eight CPU devices for every test, so that a mesh can take one, two or all of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import AxisType, Mesh

from gsm_verifier import sharding
from gsm_verifier.model.config import FAMILIES, ModelConfig

DEVICES = 8

jax.config.update("jax_num_cpu_devices", DEVICES)  # before anything asks for a device
jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time


def make_config(family: str = "gpt3", **changes: Any) -> ModelConfig:
    """A tiny model of a family; V = 128, of which 100 ids are text."""
    keywords = dict(
        text_size=100,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=8,
        mlp_width=48,
        max_length=64,
    )
    return ModelConfig(**keywords | FAMILIES[family] | changes)


MakeMesh = Callable[..., Mesh]


def _mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    sizes = (data, fsdp, tensor)
    return jax.make_mesh(
        sizes,
        sharding.AXES,
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes)],
    )


@pytest.fixture(scope="session")
def make_mesh() -> MakeMesh:
    """`make_mesh(data, fsdp, tensor)`: a mesh over the first of the eight devices."""
    return _mesh


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """The mesh of one device, on which most things are proved."""
    return _mesh()
