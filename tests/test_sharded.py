"""Whole runs on two processes under DDP, FSDP2 and ZeRO-2, against one process.

The configs are those of examples/accelerate. The processes are on the CPU and made to believe that they have GPUs
(emulated_gpus.py); what they run is in sharded_runs.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from processes import run_python
from safetensors.torch import load_file
from test_trainer import build
from tiny import tiny_flux, tiny_sd3

from trl_tpgrpo.commands.train import make_parser, split_options


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "accelerate"
KINDS = ("multi_gpu", "fsdp2", "zero2")


def launch(kind: str | None, folder: Path) -> Path:
    """Run sharded_runs.py on two processes, or on one without a kind."""
    config = ["--config_file", str(CONFIGS / f"{kind}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    launcher = ["-m", "accelerate.commands.launch", *config] if kind else []
    ended = run_python(*launcher, TESTS / "sharded_runs.py", folder)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(None, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module", params=KINDS)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    yield request.param, launch(request.param, tmp_path_factory.mktemp(request.param))


def load(folder: Path, run: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{run}-{rank}.pt", weights_only=False)


def series(result: dict[str, Any], metric: str) -> torch.Tensor:
    return torch.tensor([entry[metric] for entry in result["history"] if metric in entry])


@pytest.mark.parametrize("run", ["lora", "full", "flux"])
def test_two_processes_give_the_weights_of_one(run: str, one: Path, two: tuple[str, Path]) -> None:
    """Gradients are sums in another order and batches of another size, so weights agree to float32 rounding.

    Measured is 1e-7 of updates of 3e-3, with an optimizer whose steps are proportional to the gradients. Both
    processes have the same weights.
    """
    expected, results = load(one, run), [load(two[1], run, rank) for rank in (0, 1)]
    start = expected.get("before", {})
    changed = {name: value - start[name] if start else value for name, value in expected["weights"].items()}
    assert max(float(value.abs().max()) for name, value in changed.items() if start or "lora_B" in name) > 1e-3
    for name, value in expected["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=0, atol=1e-6)
        assert torch.equal(results[0]["weights"][name], results[1]["weights"][name])
    for metric in ("reward", "turning_points/rate", "advantages/frac_zero", "eval_reward", "nfe"):
        torch.testing.assert_close(series(results[0], metric), series(expected, metric), rtol=0, atol=1e-5)
    torch.testing.assert_close(series(results[0], "grad_norm"), series(expected, "grad_norm"), rtol=1e-4, atol=1e-7)


def test_each_run_tests_what_it_is_for(one: Path) -> None:
    """Gradients are clipped, transitions left out, evaluations uneven and the best model not the last."""
    assert series(load(one, "lora"), "grad_norm").min() > 1e-3
    flux = load(one, "flux")
    assert series(flux, "advantages/frac_zero").min() > 0.5
    assert len(series(flux, "eval_reward")) >= 3 and flux["best"] < 3


def test_a_run_stopped_by_sigterm_and_resumed_equals_the_uninterrupted_one(two: tuple[str, Path]) -> None:
    """SIGTERM reaches one process, inside a rollout; the moving average is on."""
    for rank in (0, 1):
        result = load(two[1], "lora", rank)
        for name, value in result["weights"].items():
            assert torch.equal(result["resumed"][name], value)
    whole, resumed = (load_file(two[1] / name / "pytorch_lora_weights.safetensors") for name in ("lora", "resumed"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())  # the average


def test_what_is_saved_loads_into_a_plain_pipeline(one: Path, two: tuple[str, Path]) -> None:
    for run, family in {"lora": tiny_sd3, "flux": tiny_flux}.items():
        pipelines = [family(), family()]
        for pipeline, folder in zip(pipelines, (one, two[1]), strict=True):
            pipeline.load_lora_weights(folder / run)
        expected = pipelines[0].transformer.state_dict()
        assert any("lora_B" in name and value.abs().max() > 1e-4 for name, value in expected.items())
        for name, value in pipelines[1].transformer.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    saved = SD3Transformer2DModel.from_pretrained(two[1] / "full" / "transformer").state_dict()
    for name, value in load(two[1], "full")["weights"].items():
        assert torch.equal(saved[name], value)


def test_weights_are_shared_out(two: tuple[str, Path], one: Path) -> None:
    whole, held = load(one, "lora")["held"], load(two[1], "lora")["held"]
    assert held == whole if two[0] in ("multi_gpu", "zero2") else held < 0.52 * whole


def test_half_precision_does_not_reach_the_timesteps(one: Path, two: tuple[str, Path]) -> None:
    """bfloat16 has every fourth number between 512 and 1000 only; FSDP2's own policy would round to those."""
    assert load(two[1], "half")["timesteps"] == load(one, "half")["timesteps"]
    assert series(load(two[1], "half"), "kl").tolist() == [0]  # the reference computes as what is trained
    norms = [series(load(folder, "half"), "grad_norm") for folder in (one, two[1])]
    torch.testing.assert_close(norms[1], norms[0], rtol=2e-2, atol=0)


def test_what_cannot_work_is_refused(two: tuple[str, Path]) -> None:
    said = load(two[1], "refused")
    names = {
        "multi_gpu": set(),
        "fsdp2": {"compile_backend", "rollout_batch_size", "offload_reference"},
        "zero2": {"compile_backend"},
    }[two[0]] | {"split_batches", "even_batches"}
    assert {name for name, reason in said.items() if reason} == names
    assert all(name in said[name] for name in names)


def test_loading_on_the_first_process_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL's own fsdp2.yaml asks for."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading must be false"):
        build(tmp_path)


def test_zero3_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="zero_stage must be 1 or 2.*got 3.*fsdp2.yaml"):
        build(tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_line_takes_the_configs(path: Path) -> None:
    arguments = ["--model_name_or_path", "testbed", "--accelerate_config", str(path), "--num_processes", "4"]
    options, own = split_options(make_parser(), arguments)
    assert options == ["--config_file", str(path), "--num_processes", "4"]
    assert own == ["--model_name_or_path", "testbed"]


def test_each_block_is_shared_out_by_itself() -> None:
    """The class names that accelerate looks for, so that one config serves all models."""
    assert SD3Transformer2DModel._no_split_modules == ["JointTransformerBlock"]
    assert FluxTransformer2DModel._no_split_modules == ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
