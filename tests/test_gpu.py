"""What only a GPU can tell, at tiny size: `pytest -m gpu`.

Without one they are left out, and run on the CPU if they are asked for in that way.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from test_memory import folder, nf4_on_cpu, quantized  # noqa: F401 - two fixtures
from test_policies import CASES, NUM_STEPS, call_pipeline, fresh, seeded, velocity_of
from test_trainer import assert_same, build, logged, trained
from tiny import PROMPTS, tiny_flux, tiny_sd3
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_tpgrpo.algorithm.rollout import roll_out


pytestmark = pytest.mark.gpu

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HERE = {"use_cpu": not ON_GPU, "bf16": True}
OFFLOADING = [{"offload_between_phases": True}, {"offload_trajectories": True}]


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fast kernels of attention add in any order in the backward pass, also where that is only warned of."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["sd3-cfg-bf16", "flux-bf16"])
def test_a_rollout_without_noise_is_the_pipelines_in_bfloat16(name: str) -> None:
    pipeline = fresh(CASES[name].family, **CASES[name].build).to(DEVICE)
    policy = CASES[name].policy(pipeline)
    policy.device = DEVICE
    expected = call_pipeline(pipeline, policy, output_type="latent")
    schedule = policy.schedule(NUM_STEPS)
    velocity = velocity_of(policy, pipeline.transformer, schedule, policy.encode(list(PROMPTS)))
    computed = roll_out(velocity, policy.initial_noise(seeded()), schedule.sigmas).final_latents
    assert computed.device.type == expected.device.type == DEVICE.type
    assert torch.equal(computed.to(expected.dtype), expected)


@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("full", [False, True])
def test_an_update_moves_the_weights_from_a_ratio_near_one(family, full: bool, tmp_path: Path) -> None:
    trainer = build(tmp_path, family(), full=full, learning_rate=1e-3, **HERE)
    start = trained(trainer)
    trainer.train()
    assert {value.device.type for value in trained(trainer).values()} == {DEVICE.type}
    assert any(not torch.equal(start[name], value) for name, value in trained(trainer).items())
    assert np.isfinite(logged(trainer, "loss")).all()
    assert logged(trainer, "ratio/max_deviation")[0] < 1e-3


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_gradients_of_attention_are_right(width: int, in_pieces: bool, tmp_path: Path) -> None:
    """cuDNN's are not where the output is concatenated with something, as in FLUX's single blocks."""
    build(tmp_path, tiny_flux(), **HERE)  # chooses the kernels
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, 2, 200, 4, width, generator=generator).to(DEVICE, torch.bfloat16)
    weight = torch.randn(5 * width, 4 * width, generator=generator).to(DEVICE, torch.bfloat16)

    def gradients(dtype: torch.dtype) -> torch.Tensor:
        leaf = numbers.to(dtype).requires_grad_()
        attended = functional.scaled_dot_product_attention(*leaf.transpose(2, 3)).transpose(1, 2).flatten(2)
        rest = attended.new_ones(2, 200, width)
        out = torch.cat([attended, rest], 2) @ weight.to(dtype) if in_pieces else attended @ weight[width:].to(dtype)
        return torch.autograd.grad(out.square().mean(), leaf)[0].double()

    expected = gradients(torch.float32)
    for computed, right in zip(gradients(torch.bfloat16), expected, strict=True):  # of queries, keys and values
        assert (computed - right).norm() < 0.02 * right.norm()


@pytest.mark.usefixtures("deterministic")
def test_a_base_in_nf4_trains_with_8_bit_states_and_resumes(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if not ON_GPU:
        request.getfixturevalue("nf4_on_cpu")
    whole = quantized(folder, tmp_path / "whole", "nf4", save_strategy="steps", save_steps=2, **HERE)
    whole.train()
    assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in whole.policy.pipeline.transformer.modules())
    states = [state["state1"] for state in whole.optimizer.optimizer.state.values()]
    assert any(state.dtype == torch.uint8 for state in states)
    assert {state.device.type for state in states} == {DEVICE.type}
    assert logged(whole, "ratio/max_deviation")[0] < whole.args.epsilon

    resumed = quantized(folder, tmp_path / "resumed", "nf4", **HERE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert_same(trained(whole), trained(resumed))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("family", [tiny_sd3, tiny_flux])
@pytest.mark.parametrize("option", OFFLOADING, ids=lambda option: next(iter(option)))
def test_offloading_changes_no_weight(family, option: dict, tmp_path: Path) -> None:
    weights = []
    for changes in ({}, option):
        trainer = build(tmp_path, family(), beta=0.1, num_iterations=2, max_steps=4, **HERE, **changes)
        trainer.train()
        weights.append(trained(trainer))
    assert_same(*weights)
