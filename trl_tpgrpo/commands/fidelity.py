"""`trl-tpgrpo fidelity`: cost of cheap completions, and their agreement with exact ones."""

import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..algorithm.completion import CompletionRule
from ..algorithm.fidelity import Fidelity, compare
from ..rewards.contract import takes_states_alone
from ..rollouts import NOISE
from ..trainer import TPGRPOTrainer
from .train import build_trainer, make_parser


@dataclass
class FidelityArguments:
    """
    Arguments of `trl-tpgrpo fidelity`, in addition to those of `trl-tpgrpo train`.

    Parameters:
        completions (`list[str]`, *optional*): Rules to compare with `exact`, such as `euler_6`, `ab2_4`, `at_1_2_3_5`,
            `exact_every_2`. `None`: a selection for `num_inference_steps`.
        num_prompts (`int`, *optional*, defaults to `16`): Number of prompts of the dataset, each with
            `num_generations` trajectories.
    """

    _argument_group_name = "Fidelity"

    completions: list[str] | None = None
    num_prompts: int = 16


@dataclass(frozen=True)
class Measured:
    """Cost and fidelity of a completion rule."""

    name: str
    nfe: float  # function evaluations per trajectory
    images: float  # decoded and scored, per trajectory
    fidelity: Fidelity  # agreement with exact completions


def main(argv: list[str]) -> int:
    """Complete the same trajectories with every rule, compare rewards, print a table and save it."""
    parser = make_parser("trl-tpgrpo fidelity", own_types=(FidelityArguments,))
    own, *training = parser.parse_args_and_config(argv, fail_with_unknown_args=True)[:5]
    names = own.completions or selection(training[-1].num_inference_steps)
    for name in names:
        CompletionRule.parse(name)
    trainer = build_trainer(*training)
    if takes_states_alone(trainer.reward_funcs):
        raise ValueError("All reward functions score noisy states: there are no completions to compare.")
    chosen = trainer.train_dataset.take(min(own.num_prompts, len(trainer.train_dataset)))
    measured = measure(trainer, [dict(row) for row in chosen], names)
    print(table(measured))  # noqa: T201
    save(measured, Path(trainer.args.output_dir))
    print(f"Values by step, and a figure: {trainer.args.output_dir}/fidelity.json, fidelity.png")  # noqa: T201
    return 0


def selection(num_inference_steps: int) -> list[str]:
    """Return names of rules to compare for a number of denoising steps."""
    unit = max(1, round(num_inference_steps / 10))
    last = (num_inference_steps - 1) // unit
    dense = [list(range(1, stop)) for stop in range(max(2, last // 2), last + 1)]
    thinned = [[*steps, steps[-1] + 2] for steps in dense if steps[-1] + 2 <= last]
    at = ["at_" + "_".join(str(unit * step) for step in steps) for steps in sorted(dense + thinned)]
    solvers = [f"{kind}_{number}" for kind in ("euler", "ab2") for number in (2, 4, 6)]
    return ["one_step", *solvers, *at, "exact_every_2", "exact_every_3"]


@torch.no_grad()
def measure(trainer: TPGRPOTrainer, prompts: list[dict[str, Any]], names: list[str]) -> list[Measured]:
    """Compare each rule with `exact` on `num_generations` trajectories of each prompt, from the same noise."""
    number = trainer.args.num_generations
    trainer.model.eval()
    rewards: dict[str, list[torch.Tensor]] = {name: [] for name in ["exact", *names]}
    nfe, images = dict.fromkeys(rewards, 0), dict.fromkeys(rewards, 0)
    for (index, prompt), name in tqdm(list(product(enumerate(prompts), rewards)), desc="Prompts x rules"):
        window = trainer.rollouts.windows.draw(index)
        generators = trainer.rollouts.generators(NOISE, index, number)
        with trainer.accelerator.autocast():
            sampled = trainer.sample_and_score([prompt] * number, generators, window, CompletionRule.parse(name))
        weighted = (sampled.rewards * trainer.rollouts.reward_weights[:, None]).nansum(1)
        rewards[name].append(weighted.masked_fill(sampled.failed[:, None], torch.nan))
        nfe[name] += sampled.rollout.nfe
        images[name] += len(sampled.rollout.final_latents)
    total, measured, exact = len(prompts) * number, [], torch.cat(rewards["exact"])
    for name, cheap in ((name, torch.cat(parts)) for name, parts in rewards.items()):
        both = ~(exact.isnan().any(1) | cheap.isnan().any(1))  # a reward function may have failed and been skipped
        fidelity = compare(exact[both], cheap[both], CompletionRule.parse(name), trainer.args.credit_rule)
        measured.append(Measured(name, nfe[name] / total, images[name] / total, fidelity))
    return measured


def table(measured: list[Measured]) -> str:
    """Return a Markdown table of the rules, sorted by NFE."""
    lines = ["| completion | NFE | images | correlation | sign agreement | turning points, F1 |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for one in sorted(measured, key=lambda one: one.nfe):
        values = one.fidelity.overall()
        agreement = " | ".join(f"{values[name]:.3f}" for name in ("correlation", "sign_agreement", "f1"))
        lines.append(f"| `{one.name}` | {one.nfe:.1f} | {one.images:.1f} | {agreement} |")
    return "\n".join(lines)


def save(measured: list[Measured], output_dir: Path) -> None:
    """Write `fidelity.json`, with the numbers of each step, and `fidelity.png`."""
    from ..callbacks.figures import save_pareto  # needs Matplotlib

    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "fidelity.json").write_text(json.dumps([_row(one) for one in measured], indent=1))
    correlations = [one.fidelity.overall()["correlation"] for one in measured]
    nfe = [one.nfe for one in measured]
    save_pareto(output_dir / "fidelity.png", [one.name for one in measured], nfe, correlations)


def _row(one: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {"completion": one.name, "nfe": one.nfe, "images": one.images}
    row |= {name: _number(value) for name, value in one.fidelity.overall().items()}
    by_step = {name: values[:-1].tolist() for name, values in vars(one.fidelity).items()}
    return row | {f"{name}_by_step": list(map(_number, values)) for name, values in by_step.items()}


def _number(value: float) -> float | None:
    """Return a rounded value, or `None` for NaN, which JSON does not know."""
    return None if math.isnan(value) else round(value, 4)
