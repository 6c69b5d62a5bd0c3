"""What credit is worth at a fixed policy, without a training run: signal and noise of the policy gradient.

The embedded model samples batches of trajectories with exact completions, and the gradient of the log-probability of each
of their SDE steps is kept as a sketch (Charikar et al., 2002: random signs added up in random places, which keeps inner products). The
gradient of a batch under any credit is then a weighted sum, so that all rules are compared on the same trajectories:

- signal to noise: the squared norm of the mean gradient, from products of different batches, over the variance of one
  trajectory's; 1 / this is how many trajectories make the noise as small as the signal;
- cosine: of the mean gradient with that of the policy gradient, for which `R_K - R_j` is unbiased, unscaled, without a baseline
  but R_j;
- progress: the squared cosine of the policy gradient with the gradient of one batch, as large as the same cost pays for: the
  model evaluations of 64 trajectories with exact completions, one trained transition counting as three; and its ratio to that of
  Flow-GRPO (`outcome`) on the same batches.

For one step alone the batch is 64 trajectories. Intervals are those of a jackknife over batches. Results go to benchmarks/results/gradient_snr/, one file a setting; settings that
have one are not run again.

    python benchmarks/gradient_snr.py
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from ablation import FORWARD_AND_BACKWARD
from matplotlib import pyplot as plt
from models import load_policy
from torch import Tensor

from trl_tpgrpo.credit import CREDITS, CreditRule, RewardTable
from trl_tpgrpo.policies import FlowPolicy, to_images
from trl_tpgrpo.rollout import Rollout, Velocity, Window, roll_out
from trl_tpgrpo.sde import log_prob, transition
from trl_tpgrpo.testbed import prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


ROOT = Path(__file__).parents[1]
BATCH = 64
BASE = {"sde_type": "flow_sde", "noise_level": 0.7, "num_steps": 8, "start": 0, "stop": 3, "group": 8}
SETTINGS = {
    "base": {},
    "window of 7": {"stop": 7},
    "noise 0.3": {"noise_level": 0.3},
    "noise 0.5": {"noise_level": 0.5},
    "noise 1.0": {"noise_level": 1.0},
    "cps 0.7": {"sde_type": "cps"},
    "dance_sde 0.7": {"sde_type": "dance_sde"},
    "window of 1": {"stop": 1},
    "window of 2": {"stop": 2},
    "window of 5": {"stop": 5},
    "window [2, 5)": {"start": 2, "stop": 5},
    "T = 6": {"num_steps": 6},
    "T = 10": {"num_steps": 10},
    "groups of 4": {"group": 4},
    "groups of 16": {"group": 16},
}
"""One factor at a time around the base."""

POLICY_GRADIENT = CreditRule("lambda", 1.0, baseline="completion", scale="none")
REWARD_NOISE = (0.0, 0.05, 0.1, 0.2)
DEADZONES = (0.0, 0.1, 0.2, 0.4)


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    policy = load_policy("sd3")
    args.results.mkdir(parents=True, exist_ok=True)
    for name in args.settings:
        path = args.results / f"{name.replace(' ', '_')}.json"
        if not path.exists():
            found = measure(policy, {**BASE, **SETTINGS[name]}, args.num_batches)
            path.write_text(json.dumps({"setting": name, "num_batches": args.num_batches, "rows": found}, indent=1))
        print(report(json.loads(path.read_text())), flush=True)  # noqa: T201
    draw(
        [json.loads((args.results / f"{name.replace(' ', '_')}.json").read_text()) for name in args.settings],
        args.figure,
    )


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--num_batches", type=int, default=12, help="of 64 trajectories (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/gradient_snr")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/images/gradient_snr.png")
    return parser


def rules() -> dict[str, CreditRule]:
    """Every credit with every baseline, scale and scope, and the switches of turning points."""
    credits = {name: CreditRule(name) for name in ("outcome", "incremental", "turning_point", "consistent")}
    credits |= {f"lambda {value}": CreditRule("lambda", value) for value in (0.5, 0.8, 1.0)}
    credits |= {
        "consistent, unbalanced": CreditRule(balanced=False),
        "consistent, global trend": CreditRule(trend="global"),
        "consistent, not the first step": CreditRule(first_step=False),
    }
    found = {}
    for (name, rule), baseline, scale, scope in product(
        credits.items(), ("group", "completion"), ("group", "batch", "none"), ("step", "joint")
    ):
        if not (rule.credit == "outcome" and baseline == "completion"):
            changed = replace(rule, baseline=baseline, scale=scale, scope=scope)
            found[f"{name} | {baseline} | {scale} | {scope}"] = changed
    return found


def measure(policy: FlowPolicy, setting: dict, num_batches: int) -> list[dict]:
    """Sample the batches and hold all rules against each other on them."""
    num_sde_steps = setting["stop"] - setting["start"]
    prompts = list(prompt_dataset("train").shuffle(seed=0)["prompt"])
    sketch = Sketch(policy.pipeline.transformer)
    batches = []
    for number in range(num_batches):
        per_batch = BATCH // setting["group"]
        chosen = [prompts[(number * per_batch + place) % len(prompts)] for place in range(per_batch)]
        batches.append(
            sample(policy, setting, [prompt for prompt in chosen for _ in range(setting["group"])], number, sketch)
        )
        print(f"{number + 1}/{num_batches} batches", flush=True)  # noqa: T201
    evaluations = batches[0][2]
    reference = gradients(batches, POLICY_GRADIENT, setting["group"])[0]
    budget = BATCH * (evaluations + FORWARD_AND_BACKWARD * num_sde_steps)
    tried = [(name, rule, 0.0) for name, rule in rules().items()]
    tried += [
        (f"consistent, dead zone {deadzone}", CreditRule(deadzone=deadzone), noise)
        for noise, deadzone in product(REWARD_NOISE, DEADZONES)
    ]
    tried += [(name, CreditRule(name), noise) for noise, name in product(REWARD_NOISE[1:], CREDITS[:3])]
    flow: dict[float, np.ndarray] = {}
    rows = []
    for name, rule, noise in sorted(tried, key=lambda one: one[1] != CreditRule("outcome")):  # Flow-GRPO first
        cost = setting["num_steps"] if rule.credit == "outcome" else evaluations
        own, share = gradients(batches, rule, setting["group"], noise)
        cost += FORWARD_AND_BACKWARD * share * num_sde_steps
        values = jackknifed(own, reference, budget / cost)
        flow.setdefault(noise, values[:, 2])
        rows.append({"rule": name, "reward_noise": noise, "evaluations": cost, **summary(values, flow[noise])})
    for position in range(num_sde_steps):
        of_step = [(rewards, sketches * alone(position, num_sde_steps), cost) for rewards, sketches, cost in batches]
        own, _ = gradients(of_step, POLICY_GRADIENT, setting["group"])
        values = jackknifed(own, reference, BATCH)
        rows.append({"rule": f"policy gradient, step {position} alone", "reward_noise": 0.0, "evaluations": evaluations,
            **summary(values, flow[0.0])})  # fmt: skip
    return rows


def alone(position: int, number: int) -> Tensor:
    """(K, 1): 1 for one of the steps."""
    return torch.nn.functional.one_hot(torch.tensor(position), number)[:, None]


class Sketch:
    """Gradients of all weights of a model, in far fewer numbers with about the same inner products."""

    def __init__(self, model: torch.nn.Module, size: int = 8192):
        generator = torch.Generator().manual_seed(0)
        self.weights = [weight for weight in model.parameters() if weight.is_floating_point()]
        number = sum(weight.numel() for weight in self.weights)
        self.places = torch.randint(size, (number,), generator=generator)
        self.signs = torch.randint(2, (number,), generator=generator) * 2.0 - 1.0
        self.size = size

    def of(self, value: Tensor) -> Tensor:
        """The sketch of the gradient of a number: (size,)."""
        parts = torch.autograd.grad(value, self.weights, allow_unused=True, materialize_grads=True)
        flat = torch.cat([part.flatten() for part in parts])
        return torch.zeros(self.size).index_add_(0, self.places, flat * self.signs)


def sample(
    policy: FlowPolicy, setting: dict, prompts: list[str], number: int, sketch: Sketch
) -> tuple[Tensor, Tensor, float]:
    """Rewards (B, K + 1), sketches (B, K, size) and evaluations a trajectory of one batch."""
    conditioning, schedule = policy.encode(prompts), policy.schedule(setting["num_steps"])
    kind = "squared_error" if setting["sde_type"] == "cps" else "gaussian"
    window = Window(setting["start"], setting["stop"], setting["sde_type"], setting["noise_level"], kind)
    generators = [torch.Generator().manual_seed(BATCH * number + row) for row in range(len(prompts))]

    def velocity(latents: Tensor, step: int, rows: Tensor) -> Tensor:
        return policy.velocity(policy.pipeline.transformer, latents, schedule.timesteps[step], conditioning[rows])

    noise = policy.initial_noise(generators)
    run = roll_out(velocity, noise, schedule.sigmas, window, generators, batch_size=128)
    with torch.no_grad():
        images = to_images(policy.decode(run.final_latents, 64))
    rewards = shapes_reward(images=images, prompts=[prompts[row] for row in run.rows])
    sketches = [
        sketch.of(one_log_prob(velocity, run, window, schedule.sigmas, row, position))
        for row, position in product(range(len(prompts)), range(len(window)))
    ]
    of_steps = torch.stack(sketches).unflatten(0, (len(prompts), len(window)))
    return torch.tensor(rewards)[run.image_of], of_steps, run.num_evaluations / len(prompts)


def one_log_prob(velocity: Velocity, run: Rollout, window: Window, sigmas: Tensor, row: int, position: int) -> Tensor:
    """Log-probability of one SDE step of one trajectory, with its gradient."""
    step = window.start + position
    before, after = run.states[row : row + 1, position], run.states[row : row + 1, position + 1]
    predicted = velocity(before, step, torch.tensor([row]))
    drawn = transition(window.sde_type, before, predicted, sigmas[step], sigmas[step + 1], window.noise_level)
    return log_prob(drawn, after, window.log_prob_type).sum()


def gradients(
    batches: list[tuple[Tensor, Tensor, float]], rule: CreditRule, group: int, reward_noise: float = 0.0
) -> tuple[Tensor, float]:
    """The gradient of each batch, (M, size), and the share of transitions that it took."""
    found, shares = [], []
    generator = torch.Generator().manual_seed(1)
    for rewards, sketches, _ in batches:
        noisy = rewards + reward_noise * torch.randn(rewards.shape, generator=generator)
        table = RewardTable(noisy[:, None].float(), torch.ones(1), group, sketches.shape[1], rule)
        found.append(torch.einsum("bk,bkd->d", table.advantages.float(), sketches) / len(rewards))
        shares.append(float((table.advantages != 0).float().mean()))
    return torch.stack(found).double(), float(np.mean(shares))


def jackknifed(own: Tensor, reference: Tensor, num_trajectories: float) -> np.ndarray:
    """Signal to noise, cosine and progress with all batches, and without each: (1 + M, 3)."""
    products, number = (own @ own.T, own @ reference.T, reference @ reference.T), len(own)
    kept = [torch.arange(number)] + [torch.arange(number)[torch.arange(number) != left] for left in range(number)]
    return np.array([statistics(*(one[of][:, of] for one in products), num_trajectories) for of in kept])


def summary(values: np.ndarray, progress_of_flow: np.ndarray) -> dict[str, float]:
    """The statistics (1 + M, 3) and the ratio of progress to Flow-GRPO's (1 + M,), with their standard errors."""
    with_ratio = np.column_stack([values, values[:, 2] / progress_of_flow])
    errors = np.sqrt((len(values) - 2) * with_ratio[1:].var(0))
    names = ("snr", "cosine", "progress", "progress_ratio")
    found = {name: float(value) for name, value in zip(names, with_ratio[0], strict=True)}
    return {**found, **{f"{name}_error": float(error) for name, error in zip(names, errors, strict=True)}}


def statistics(own: Tensor, both: Tensor, reference: Tensor, num_trajectories: float) -> tuple[float, float, float]:
    """From products of batches' gradients (M, M): signal to noise of a trajectory, cosine, progress; a squared norm below 0 is none."""
    apart = ~torch.eye(len(own), dtype=torch.bool)
    signal, along, true = (float(products[apart].mean()) for products in (own, both, reference))
    noise = BATCH * (float(own.diagonal().mean()) - signal)
    signal, true = max(signal, 1e-30), max(true, 1e-30)
    return signal / noise, along / (signal * true) ** 0.5, along**2 / ((signal + noise / num_trajectories) * true)


def report(found: dict) -> str:
    """The rules, best progress first, in Markdown."""
    lines = [
        f"**{found['setting']}**, {found['num_batches']} batches of {BATCH} trajectories",
        "",
        "| credit, baseline, scale, scope | reward noise | evaluations | signal / noise, times 1000 | cosine | progress, "
        "times 1000 | progress / outcome's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["rows"], key=lambda row: (row["reward_noise"], -row["progress"])):
        snr, cosine, progress, ratio = (
            f"{scale * row[name]:.2f} \u00b1 {1.96 * scale * row[f'{name}_error']:.2f}"
            for name, scale in (("snr", 1000), ("cosine", 1), ("progress", 1000), ("progress_ratio", 1))
        )
        if row["snr"] <= max(1.96 * row["snr_error"], 1e-9):
            cosine = "-"  # of a direction that is not told from noise
        rule = row["rule"].replace(" | ", ", ")
        columns = (rule, row["reward_noise"], f"{row['evaluations']:.0f}", snr, cosine, progress, ratio)
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines) + "\n"


def draw(found: list[dict], path: Path) -> None:
    """Progress at equal cost against Flow-GRPO's: every credit as the paper normalises it, and with the best of the others."""
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 3.6), squeeze=False, sharey=True)
    credits = ["incremental", "turning_point", "consistent", "lambda 0.5", "lambda 0.8", "lambda 1.0"]
    for axis, one in zip(axes[0], found, strict=True):
        rows = {row["rule"]: row for row in one["rows"] if row["reward_noise"] == 0}
        for shift, how in enumerate(("group | group | step", "group | group | joint", "completion | batch | joint")):
            of_credits = [rows[f"{name} | {how}"] for name in credits]
            places = [place + 0.2 * (shift - 1) for place in range(len(credits))]
            values, errors = ([row[key] for row in of_credits] for key in ("progress_ratio", "progress_ratio_error"))
            axis.errorbar(
                values, places, xerr=1.96 * np.array(errors), fmt="o", capsize=3, label=how.replace(" | ", ", ")
            )
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(credits)), credits)
        axis.set(title=one["setting"], xlabel="progress at equal cost / Flow-GRPO's")
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(
        handles, labels, fontsize=8, ncols=3, loc="lower center", title="baseline, scale, scope", title_fontsize=8
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
