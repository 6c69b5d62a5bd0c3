"""Fixtures that every test module may use."""

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from tiny import tiny_flux, tiny_sd3


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd3() -> StableDiffusion3Pipeline:
    """To be left as it is: a test that trains or saves adapters builds its own."""
    return tiny_sd3()


@pytest.fixture(scope="session")
def flux() -> FluxPipeline:
    """To be left as it is: a test that trains or saves adapters builds its own."""
    return tiny_flux()
