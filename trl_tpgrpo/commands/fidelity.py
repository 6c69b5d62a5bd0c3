"""`trl-tpgrpo fidelity`: what cheap completions save, and how well they agree with exact ones, on your model and reward."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..algorithm.completion import CompletionRule
from ..algorithm.credit import CreditRule
from ..algorithm.fidelity import Fidelity, compare
from ..rollouts import NOISE
from ..trainer import TPGRPOTrainer
from .train import build_trainer, make_parser


@dataclass
class FidelityArguments:
    """
    Arguments of `trl-tpgrpo fidelity`, besides those of `trl-tpgrpo train`, which say what is sampled.

    Args:
        completions (`list[str]`, *optional*):
            Rules to compare with `exact`. `None`: a selection for `num_inference_steps`.
        num_prompts (`int`, *optional*, defaults to `16`):
            Prompts of the dataset, each with `num_generations` trajectories.
    """

    _argument_group_name = "Fidelity"

    completions: list[str] | None = field(
        default=None, metadata={"help": "Rules such as euler_6, ab2_4, at_1_2_3_5, exact_every_2. None: a selection."}
    )
    num_prompts: int = field(default=16, metadata={"help": "Prompts, each with num_generations trajectories."})


@dataclass(frozen=True)
class Measured:
    """A rule, what it takes and what it gives.

    Attributes:
        name: The rule's.
        evaluations: Of the model, a trajectory.
        images: Decoded and scored, a trajectory.
        fidelity: Agreement with exact completions.
    """

    name: str
    evaluations: float
    images: float
    fidelity: Fidelity


def main(argv: list[str]) -> int:
    """Sample the same trajectories with every rule, compare their rewards, print a table and save it."""
    parser = make_parser(
        "trl-tpgrpo fidelity", "Measure how faithful cheap completions are.", own_types=(FidelityArguments,)
    )
    own, *training = parser.parse_args_and_config(argv, fail_with_unknown_args=True)[:5]
    names = own.completions or selection(training[-1].num_inference_steps)
    for name in names:
        CompletionRule.parse(name)
    trainer = build_trainer(*training)
    dataset = trainer.train_dataset
    chosen = dataset.select(range(min(own.num_prompts, len(dataset))))
    measured = measure(trainer, [dict(row) for row in chosen], names)
    print(table(measured))  # noqa: T201
    save(measured, Path(trainer.args.output_dir))
    print(f"By step, and as a picture: {trainer.args.output_dir}/fidelity.json, fidelity.png")  # noqa: T201
    return 0


def selection(num_inference_steps: int) -> list[str]:
    """Rules worth a look for so many steps."""
    unit = max(1, round(num_inference_steps / 10))
    last = (num_inference_steps - 1) // unit
    dense = [list(range(1, stop)) for stop in range(max(2, last // 2), last + 1)]
    thinned = [[*places, places[-1] + 2] for places in dense if places[-1] + 2 <= last]
    at = ["at_" + "_".join(str(unit * place) for place in places) for places in sorted(dense + thinned)]
    return ["one_step", *(f"{kind}_{number}" for kind in ("euler", "ab2") for number in (2, 4, 6)), *at,
            "exact_every_2", "exact_every_3"]  # fmt: skip


@torch.no_grad()
def measure(trainer: TPGRPOTrainer, prompts: list[dict[str, Any]], names: list[str]) -> list[Measured]:
    """Compare each rule with `exact` on `num_generations` trajectories of each prompt.

    The trajectories are the same for all rules, since their noise is.
    """
    number = trainer.args.num_generations
    trainer.model.eval()
    rewards: dict[str, list[torch.Tensor]] = {name: [] for name in ["exact", *names]}
    evaluations, images = dict.fromkeys(rewards, 0), dict.fromkeys(rewards, 0)
    progress = tqdm(total=len(prompts) * len(rewards), desc="Prompts x rules")
    for place, prompt in enumerate(prompts):
        window = trainer.rollouts.draw_window(place)
        for name in rewards:
            generators = trainer.rollouts.generators(NOISE, place, number)
            with trainer.accelerator.autocast():
                sampled = trainer.sample_and_score([prompt] * number, generators, window, CompletionRule.parse(name))
            weighted = (sampled.rewards * trainer.rollouts.reward_weights[:, None]).nansum(1)
            rewards[name].append(weighted.masked_fill(sampled.failed[:, None], torch.nan))
            evaluations[name] += sampled.rollout.num_evaluations
            images[name] += len(sampled.images)
            progress.update()
    progress.close()
    total, rule = len(prompts) * number, trainer.args.credit_rule
    exact = torch.cat(rewards["exact"])
    return [
        Measured(name, evaluations[name] / total, images[name] / total, _compare(exact, rewards[name], name, rule))
        for name in rewards
    ]


def _compare(exact: torch.Tensor, rewards: list[torch.Tensor], name: str, rule: CreditRule) -> Fidelity:
    cheap = torch.cat(rewards)
    both = ~(exact.isnan().any(1) | cheap.isnan().any(1))  # a reward function may have failed, if that is skipped
    return compare(exact[both], cheap[both], CompletionRule.parse(name).every, rule)


def table(measured: list[Measured]) -> str:
    """The rules by what they take, as a table in Markdown."""
    lines = [
        "| completion | evaluations | images | correlation | sign agreement | turning points, F1 |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(measured, key=lambda one: one.evaluations):
        values = one.fidelity.overall()
        lines.append(
            f"| `{one.name}` | {one.evaluations:.1f} | {one.images:.1f} | {values['correlation']:.3f} | "
            f"{values['sign_agreement']:.3f} | {values['f1']:.3f} |"
        )
    return "\n".join(lines)


def save(measured: list[Measured], output_dir: Path) -> None:
    """Write `fidelity.json`, with the numbers of each step, and `fidelity.png`."""
    from ..callbacks.figures import save_pareto  # needs Matplotlib

    output_dir.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "completion": one.name,
            "evaluations": one.evaluations,
            "images": one.images,
            **{name: _number(value) for name, value in one.fidelity.overall().items()},
            **{
                f"{name}_by_step": [_number(value) for value in values[:-1].tolist()]
                for name, values in vars(one.fidelity).items()
            },
        }
        for one in measured
    ]
    (output_dir / "fidelity.json").write_text(json.dumps(rows, indent=1))
    save_pareto(
        output_dir / "fidelity.png",
        [one.name for one in measured],
        [one.evaluations for one in measured],
        [one.fidelity.overall()["correlation"] for one in measured],
        "Completions: what they take and how faithful they are",
    )


def _number(value: float) -> float | None:
    """`None` for NaN, which JSON does not know."""
    return None if math.isnan(value) else round(value, 4)
