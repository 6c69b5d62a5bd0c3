"""What credit is worth at a fixed policy, without a training run: signal and noise of the policy gradient.

The toy model samples batches of trajectories with their completions, and the gradient of the log-probability of
each of their SDE steps is kept as a sketch (Charikar et al., 2002: random signs, added up in far fewer places, which
keeps inner products). The gradient of a batch under any credit is then a weighted sum, so that all rules are compared
on the same trajectories:

- signal to noise: the squared norm of the mean gradient, from products of different batches, over the variance of one
  trajectory's; 1 / this is how many trajectories make the noise as small as the signal;
- cosine: of the mean gradient with that of the policy gradient, for which `R_K - R_j` is unbiased, unscaled, without a
  baseline but R_j;
- progress: the squared cosine of the policy gradient with the gradient of one batch, as large as the same cost pays
  for: the function evaluations of 64 trajectories with their completions, one trained transition counting as three;
  and its ratio to that of Flow-GRPO (`outcome`) on the same batches.

For one step alone the batch is 64 trajectories. Intervals are those of a jackknife over batches. Results go to
benchmarks/results/gradient_snr/, one file a setting; settings that have one are not run again.

    python benchmarks/gradient_snr.py

`--world words` does the same for the words world, into gradient_snr_words/. Every report ends with the profile: which
share of the signal each step has.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from critic import centred, explained, fit, predict
from diffusers.utils.torch_utils import randn_tensor
from gradient_report import BATCH, draw, overview, report
from study import FIGURES, FORWARD_AND_BACKWARD, RESULTS
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from worlds import WORLDS, World

from trl_tpgrpo.algorithm.completion import CompletionRule
from trl_tpgrpo.algorithm.credit import CREDITS, CreditRule, RewardTable
from trl_tpgrpo.algorithm.rollout import Window, roll_out
from trl_tpgrpo.algorithm.sde import log_prob, transition
from trl_tpgrpo.policies.base import FlowPolicy, Guidance, to_images
from trl_tpgrpo.policies.loading import build_policy, load_pipeline


BASE = {
    "sde_type": "flow_sde",
    "noise_level": 0.7,
    "num_steps": 8,
    "start": 0,
    "stop": 3,
    "group": 8,
    "share_initial_noise": False,
    "antithetic": False,
    "completion": "exact",
}
CPS = {"sde_type": "cps"}
STEP_1 = {"start": 1, "stop": 2, "share_initial_noise": True}
STEPS_1_AND_2 = {**STEP_1, "stop": 3}
SETTINGS: dict[str, dict] = {
    "flow_sde, steps 0 to 2": {},
    "flow_sde, steps 0 to 6": {"stop": 7},
    "flow_sde, steps 1 and 2, shared noise": STEPS_1_AND_2,
    "flow_sde, step 1, shared noise": STEP_1,
    "flow_sde, step 1, shared noise, level 1.0": {**STEP_1, "noise_level": 1.0},
    "dance_sde, steps 0 to 2": {"sde_type": "dance_sde"},
    "cps, steps 0 to 2": CPS,
    "cps, steps 0 to 6": {**CPS, "stop": 7},
    "cps, steps 0 to 2, at_1_2_3_5": {**CPS, "completion": "at_1_2_3_5"},
    "cps, steps 0 to 6, at_1_2_3_5": {**CPS, "stop": 7, "completion": "at_1_2_3_5"},
    "cps, steps 1 and 2, shared noise": {**CPS, **STEPS_1_AND_2},
    "cps, step 1, shared noise": {**CPS, **STEP_1},
    "cps, step 1, shared noise, antithetic": {**CPS, **STEP_1, "antithetic": True},
    "cps, step 2, shared noise": {**CPS, **STEP_1, "start": 2, "stop": 3},
    "cps, steps 0 to 2, level 0.3": {**CPS, "noise_level": 0.3},
    "cps, steps 0 to 2, level 0.5": {**CPS, "noise_level": 0.5},
    "cps, steps 0 to 2, level 1.0": {**CPS, "noise_level": 1.0},
    "cps, steps 0 and 1": {**CPS, "stop": 2},
    "cps, steps 0 to 4": {**CPS, "stop": 5},
    "cps, steps 0 to 2, T = 6": {**CPS, "num_steps": 6},
    "cps, steps 0 to 2, T = 10": {**CPS, "num_steps": 10},
    "cps, steps 0 to 2, groups of 4": {**CPS, "group": 4},
    "cps, steps 0 to 2, groups of 16": {**CPS, "group": 16},
}
"""The window of three steps, its place, size and SDE, and one factor at a time around that with CPS."""

FITTED = CreditRule("lambda", 0.5, baseline="fitted", scale="batch", scope="joint")
SHARES = (None, 0.6, 0.4, 0.2)
"""The fitted baseline without a completion of the first state, and shares of transitions that are drawn by size."""

ONE_SCALE = CreditRule("lambda", 0.5, baseline="completion", scale="batch", scope="joint")
PREDICTED = [
    (f"lambda {value} | {source} | batch | joint", value, source)
    for source, value in product(("critic", "shrunk completions"), (0.0, 0.5, 0.8, 1.0))
]
"""Rewards of completions replaced by predictions of the final reward: from features, or from these rewards."""

OTHERS, NUM_FITTED = 10_000, 64
"""Number of the first batch that the critic is fitted to, and how many."""

POLICY_GRADIENT = CreditRule("lambda", 1.0, baseline="completion", scale="none")
REWARD_NOISE = (0.0, 0.05, 0.1, 0.2)
DEADZONES = (0.0, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Testbed:
    """Policy, prompts to sample for, and the judge."""

    policy: FlowPolicy
    prompts: list[str]
    reward: Callable[[list, list[str]], list[float]]


class Batch(NamedTuple):
    """A batch of trajectories with the gradients of their log-probabilities."""

    rewards: Tensor  # (B, K + 1)
    sketches: Tensor  # (B, K, size)
    evaluations: float  # a trajectory
    values: Tensor  # of a critic, (B, K); before: the features that it reads, (B, K, F)


def load(world: World) -> Testbed:
    """Load a world's pipeline and prompts."""
    policy = build_policy(load_pipeline(world.weights), Guidance(**world.pipeline_kwargs, guidance_scale=1.0))
    return Testbed(policy, list(world.train_dataset().shuffle(seed=0)["prompt"]), world.reward)


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    folder = "gradient_snr" if args.world == "shapes" else f"gradient_snr_{args.world}"
    results, figure = args.results or RESULTS / folder, args.figure or FIGURES / f"{folder}.png"
    testbed = load(WORLDS[args.world])
    results.mkdir(parents=True, exist_ok=True)
    for name in args.settings:
        path = file_of(name, results)
        if not path.exists():
            setting = {**BASE, **SETTINGS[name]}
            batches = sample_batches(testbed, setting, args.num_batches)
            found = {"rows": compare(batches, setting), "profile": profile(batches, setting)}
            found["explained"] = explained_by_source(batches, setting["group"])
            path.write_text(json.dumps({"setting": name, "num_batches": args.num_batches, **found}) + "\n")
        print(report(json.loads(path.read_text())), flush=True)  # noqa: T201
    found = [json.loads(file_of(name, results).read_text()) for name in args.settings]
    print(overview(found))  # noqa: T201
    draw(found, figure)


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--world", default="shapes", choices=list(WORLDS), help="(default: %(default)s)")
    parser.add_argument("--num_batches", type=int, default=12, help="of 64 trajectories (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="(default: benchmarks/results/gradient_snr, or with _words)")
    parser.add_argument("--figure", type=Path, help="(default: docs/images/gradient_snr.png, or with _words)")
    return parser


def file_of(setting: str, results: Path) -> Path:
    """Where a setting's results are kept."""
    return results / f"{setting.replace(',', '').replace(' ', '_')}.json"


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


def numbered(testbed: Testbed, setting: dict, numbers: range) -> Iterator[tuple[int, list[str]]]:
    """Yield batches' numbers with their prompts, others each time."""
    per_batch = BATCH // setting["group"]
    for number in tqdm(numbers, desc="Sampling", mininterval=10):
        chosen = [testbed.prompts[(number * per_batch + place) % len(testbed.prompts)] for place in range(per_batch)]
        yield number, [prompt for prompt in chosen for _ in range(setting["group"])]


def sample_batches(testbed: Testbed, setting: dict, num_batches: int) -> list[Batch]:
    """Sample batches with gradients, and with the values of a critic that was fitted to other trajectories."""
    group, sketch = setting["group"], Sketch(testbed.policy.pipeline.transformer)
    others = [
        sample_trajectories(testbed, setting, prompts, number, None)
        for number, prompts in numbered(testbed, setting, range(OTHERS, OTHERS + NUM_FITTED))
    ]
    features, rewards = torch.cat([one.features for one in others]), torch.cat([one.rewards[:, -1] for one in others])
    weights = fit(features, rewards, group, penalty=0.1)
    with sdpa_kernel(SDPBackend.MATH):  # the one that vmap can batch
        batches = [
            sample(testbed, setting, prompts, number, sketch)
            for number, prompts in numbered(testbed, setting, range(num_batches))
        ]
    return [one._replace(values=predict(one.values, weights, group)) for one in batches]


def compare(batches: list[Batch], setting: dict) -> list[dict]:
    """Hold all rules against each other on the same batches."""
    num_sde_steps, group, evaluations = setting["stop"] - setting["start"], setting["group"], batches[0].evaluations
    reference = gradients(batches, POLICY_GRADIENT, group)[0]
    budget = BATCH * (evaluations + FORWARD_AND_BACKWARD * num_sde_steps)
    tried = [(name, rule, 0.0) for name, rule in rules().items()]
    tried += [
        (f"consistent, dead zone {deadzone}", CreditRule(deadzone=deadzone), noise)
        for noise, deadzone in product(REWARD_NOISE, DEADZONES)
    ]
    tried += [(name, CreditRule(name), noise) for noise, name in product(REWARD_NOISE[1:], CREDITS[:3])]
    flow: dict[float, np.ndarray] = {}
    rows = []

    def add(name: str, noise: float, cost: float, own: Tensor, num_trajectories: float) -> None:
        values = jackknifed(own, reference, num_trajectories)
        flow.setdefault(noise, values[:, 2])
        rows.append({"rule": name, "reward_noise": noise, "evaluations": cost, **summary(values, flow[noise])})

    for name, rule, noise in sorted(tried, key=lambda one: one[1] != CreditRule("outcome")):  # Flow-GRPO first
        own, share = gradients(batches, rule, group, noise)
        cost = of_sampling(setting) if rule.credit == "outcome" else evaluations
        cost += FORWARD_AND_BACKWARD * share * num_sde_steps
        add(name, noise, cost, own, budget / cost)
    for share in SHARES:
        own, part = gradients(batches, replace(FITTED, share=share), group, first=1)
        cost = evaluations - of_the_first_state(setting) + FORWARD_AND_BACKWARD * part * num_sde_steps
        name = "lambda 0.5 | fitted, from 1 | batch | joint" + (f" | drawn {share}" if share else "")
        add(name, 0.0, cost, own, budget / cost)
    for name, credit_lambda, source in PREDICTED:
        rule = replace(ONE_SCALE, lambda_=credit_lambda)
        own, share = gradients(predicted(batches, group, source), rule, group)
        cost = of_sampling(setting) if source == "critic" else evaluations
        cost += FORWARD_AND_BACKWARD * share * num_sde_steps
        add(name, 0.0, cost, own, budget / cost)
    whole = evaluations + FORWARD_AND_BACKWARD * num_sde_steps
    add("gain over a share of R_j | group | none | step", 0.0, whole, over_a_share(batches, group), BATCH)
    for position in range(num_sde_steps):
        of_step = [one._replace(sketches=one.sketches * alone(position, num_sde_steps)) for one in batches]
        own, _ = gradients(of_step, POLICY_GRADIENT, group)
        add(f"policy gradient, step {position} alone", 0.0, evaluations, own, BATCH)
    return rows


def profile(batches: list[Batch], setting: dict) -> dict[str, list[float]]:
    """Squared norm of the mean policy gradient of each step alone, from products of different batches.

    Beside it, each step's share of their sum, and the share of each step with those after it; jackknife's errors.
    """
    start, number = setting["start"], setting["stop"] - setting["start"]
    products = []
    for position in range(number):
        of_step = [one._replace(sketches=one.sketches * alone(position, number)) for one in batches]
        own = gradients(of_step, POLICY_GRADIENT, setting["group"])[0]
        products.append((own @ own.T).fill_diagonal_(0))
    matrix = torch.stack(products)  # (K, M, M)
    total, of_each = matrix.sum((1, 2)), 2 * matrix.sum(2)
    size = len(batches)
    signals = torch.cat([total[None] / (size * (size - 1)), (total - of_each.T) / ((size - 1) * (size - 2))])
    later = signals.flip(1).cumsum(1).flip(1)
    found = {"step": [float(start + position) for position in range(number)]}
    for name, values in (("signal", signals), ("share", signals / later[:, :1]), ("from_here", later / later[:, :1])):
        found[name] = values[0].tolist()
        found[f"{name}_error"] = ((size - 1) * values[1:].var(0, correction=0)).sqrt().tolist()
    return found


def over_a_share(batches: list[Batch], group: int) -> Tensor:
    """The gradient of each batch, (M, size), if a step is credited with `R_{j+1} - b_j R_j`.

    Both rewards are taken against their group's mean. `b_j` is the slope of the least squares over all batches: what
    of `R_j` lowers the variance, and no more.
    """
    rewards = torch.stack([centred(one.rewards, group) for one in batches])  # (M, B, K + 1)
    before, after = rewards[..., :-1], rewards[..., 1:]
    slopes = (before * after).mean((0, 1)) / before.square().mean((0, 1)).clamp(min=1e-12)
    credits = (after - slopes * before).float()
    return torch.stack(
        [
            torch.einsum("bk,bkd->d", own, batch.sketches) / len(own)
            for own, batch in zip(credits, batches, strict=True)
        ]
    ).double()


def predicted(batches: list[Batch], group: int, source: str) -> list[Batch]:
    """With predictions for the rewards of all latents but the last."""
    rewards = torch.stack([centred(one.rewards, group) for one in batches])
    if source == "critic":
        rewards[..., :-1] = torch.stack([one.values for one in batches])
    else:
        products = (rewards[..., :-1] * rewards[..., -1:]).mean((0, 1))
        rewards[..., :-1] *= products / rewards[..., :-1].square().mean((0, 1)).clamp(min=1e-12)
    return [one._replace(rewards=own) for one, own in zip(batches, rewards, strict=True)]


def explained_by_source(batches: list[Batch], group: int) -> dict[str, list[float]]:
    """Share of the variance of final rewards within groups that predictions explain at each step."""
    final = torch.cat([one.rewards[:, -1] for one in batches])
    values = {
        source: torch.cat([one.rewards[:, :-1] for one in predicted(batches, group, source)])
        for source in ("critic", "shrunk completions")
    }
    return {source: explained(own, final, group) for source, own in values.items()}


def of_sampling(setting: dict) -> float:
    """Function evaluations a trajectory without completions.

    A group with one noise is one trajectory until its first SDE step.
    """
    shared = setting["start"] if setting["share_initial_noise"] else 0
    return setting["num_steps"] - shared + shared / setting["group"]


def of_the_first_state(setting: dict) -> float:
    """Function evaluations a trajectory of the completion of x_0; the first is the trajectory's own."""
    stops = CompletionRule.parse(setting["completion"]).stops(setting["start"], setting["num_steps"])
    return (len(stops) - 2) / (setting["group"] if setting["share_initial_noise"] else 1)


def alone(position: int, number: int) -> Tensor:
    """(K, 1): 1 for one of the steps."""
    return torch.nn.functional.one_hot(torch.tensor(position), number)[:, None]


class Sketch:
    """Gradients of all weights of a model, in far fewer numbers with about the same inner products."""

    def __init__(self, model: torch.nn.Module, size: int = 8191):
        self.weights = {
            name: weight.detach() for name, weight in model.named_parameters() if weight.is_floating_point()
        }
        self.number, self.size = sum(weight.numel() for weight in self.weights.values()), size
        self.flat = torch.zeros(self.number + -self.number % size)
        self.signs = torch.randint(2, self.flat.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0

    def of(self, gradients: dict[str, Tensor]) -> Tensor:
        """The sketches of N gradients: (N, size).

        The size is a prime, which the sizes of the weights' rows do not share.
        """
        sketches = []
        for parts in zip(*gradients.values(), strict=True):
            torch.cat([part.flatten() for part in parts], out=self.flat[: self.number])
            sketches.append(self.flat.mul_(self.signs).view(-1, self.size).sum(0))
        return torch.stack(sketches)


@dataclass
class Sampled:
    """Trajectories of one batch, with what they were sampled from."""

    window: Window
    schedule: Any
    conditioning: Any
    rollout: Any
    rewards: Tensor  # (B, K + 1); without completions of the final images alone, (B, 1)
    features: Tensor  # of the last block at the latents before the steps, mean of the tokens: (B, K, F)


def sample_trajectories(
    testbed: Testbed, setting: dict, prompts: list[str], number: int, completion: CompletionRule | None
) -> Sampled:
    """Sample the trajectories of a batch, their completions and rewards; the noise depends on its number."""
    policy = testbed.policy
    conditioning, schedule = policy.encode(prompts), policy.schedule(setting["num_steps"])
    kind = "squared_error" if setting["sde_type"] == "cps" else "gaussian"
    window = Window(setting["start"], setting["stop"], setting["sde_type"], setting["noise_level"], kind)
    generators = [torch.Generator().manual_seed(BATCH * number + row) for row in range(len(prompts))]
    model = policy.pipeline.transformer

    def velocity(latents: Tensor, step: int, rows: Tensor) -> Tensor:
        return policy.velocity(model, latents, schedule[step], conditioning[rows])

    noise = policy.initial_noise(generators[:: setting["group"] if setting["share_initial_noise"] else 1])
    with patch("trl_tpgrpo.algorithm.rollout.randn_tensor", pairs if setting["antithetic"] else randn_tensor):
        run = roll_out(velocity, noise, schedule.sigmas, window, generators, completion, batch_size=128)
    features: list[Tensor] = []
    hook = model.norm_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].mean(1)))
    with torch.no_grad():
        for place, step in enumerate(range(window.start, window.stop)):
            velocity(run.states[:, place], step, torch.arange(len(prompts)))
        images = to_images(policy.decode(run.final_latents, 64))
    hook.remove()
    rewards = torch.tensor(testbed.reward(images=images, prompts=[prompts[row] for row in run.rows]))[run.image_of]
    return Sampled(window, schedule, conditioning, run, rewards, torch.stack(features, 1))


def sample(testbed: Testbed, setting: dict, prompts: list[str], number: int, sketch: Sketch) -> Batch:
    """Sample one batch, and sketch the gradients of its steps."""
    sampled = sample_trajectories(testbed, setting, prompts, number, CompletionRule.parse(setting["completion"]))
    policy, model, window = testbed.policy, testbed.policy.pipeline.transformer, sampled.window
    schedule, states = sampled.schedule, sampled.rollout.states

    def one_log_prob(weights: dict[str, Tensor], before: Tensor, after: Tensor, row: Tensor, step: int) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, weights, args, kwargs)

        predicted = policy.velocity(call, before[None], schedule[step], sampled.conditioning[row[None]])
        sigmas = schedule.sigmas[step : step + 2]
        drawn = transition(window.sde_type, before[None], predicted, *sigmas, window.noise_of(step))
        return log_prob(drawn, after[None], window.log_prob_type).sum()

    of_each = vmap(grad(one_log_prob), in_dims=(None, 0, 0, 0, None))
    of_steps = [
        torch.cat([
            sketch.of(of_each(sketch.weights, *(states[rows, place + after] for after in (0, 1)), rows, step))
            for rows in torch.arange(len(prompts)).split(16)
        ])
        for place, step in enumerate(range(window.start, window.stop))
    ]  # fmt: skip
    evaluations = sampled.rollout.nfe / len(prompts)
    return Batch(sampled.rewards, torch.stack(of_steps, 1), evaluations, sampled.features)


def pairs(shape: torch.Size, generators: list[torch.Generator], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Noise of which every second row is the one before with the other sign."""
    noise = randn_tensor((shape[0] // 2, *shape[1:]), generators[::2], device, dtype)
    return torch.stack([noise, -noise], 1).flatten(0, 1)


def gradients(
    batches: list[Batch],
    rule: CreditRule,
    group: int,
    reward_noise: float = 0.0,
    first: int = 0,
) -> tuple[Tensor, float]:
    """The gradient of each batch, (M, size), and the share of transitions that it took.

    With `first` = 1, as if the first state had no completion.
    """
    found, shares = [], []
    generator = torch.Generator().manual_seed(1)
    for number, (rewards, sketches, *_) in enumerate(batches):
        noisy = (rewards + reward_noise * torch.randn(rewards.shape, generator=generator))[:, None, first:].float()
        table = RewardTable(noisy, torch.ones(1), group, sketches.shape[1], rule, first=first, seed=number)
        found.append(torch.einsum("bk,bkd->d", table.trained_advantages.float(), sketches) / len(rewards))
        shares.append(float((table.trained_advantages != 0).float().mean()))
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
    """From products of batches' gradients (M, M): signal to noise of a trajectory, cosine, progress.

    A squared norm below 0 is none, and where nothing happens both are none.
    """
    apart = ~torch.eye(len(own), dtype=torch.bool)
    signal, along, true = (float(products[apart].mean()) for products in (own, both, reference))
    noise = max(BATCH * (float(own.diagonal().mean()) - signal), 1e-30)
    signal, true = max(signal, 1e-30), max(true, 1e-30)
    return signal / noise, along / (signal * true) ** 0.5, along**2 / ((signal + noise / num_trajectories) * true)


if __name__ == "__main__":
    main()
