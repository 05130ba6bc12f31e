"""Eight CPU devices for every test, so that a mesh can take one, two or all of them."""

import math
from collections.abc import Callable

import jax
import pytest
from jax.sharding import AxisType, Mesh

from gsm_verifier import sharding

DEVICES = 8

jax.config.update("jax_num_cpu_devices", DEVICES)  # before anything asks for a device
jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time

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
