"""Fixtures that every test module may use."""

import gc
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from hub_server import WRITE, HubServer
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http
from tiny import tiny_flux, tiny_sd3


torch.set_num_threads(1)


SLOW = """
    sharded plan checkpoints memory evaluate guard_rails hub families study policies trust_regions benchmarks
""".split()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no worker is left with one; leave out tests for a GPU.

    These are run where there is one, or asked for: `-m gpu`.
    """
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)
    if torch.accelerator.is_available() or config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Keep all that is imported out of garbage collections: each training run begins with one."""
    gc.freeze()


@pytest.fixture(scope="session")
def sd3() -> StableDiffusion3Pipeline:
    """To be left as it is: a test that trains or saves adapters builds its own."""
    return tiny_sd3()


@pytest.fixture(scope="session")
def flux() -> FluxPipeline:
    """To be left as it is: a test that trains or saves adapters builds its own."""
    return tiny_flux()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process takes for the real one, logged in as its user, without pauses between retries."""
    with HubServer.running() as server:
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield server
