"""What credit by step is worth on the testbed: training runs at equal CPU seconds, model evaluations and updates.

For each study (a window, a set of methods) and method, the learning rate is chosen by runs that are scored on the
tuning prompts; with it, one run a seed is scored on the held-out prompts when it reaches each of the three budgets.
Every run has one thread, as many are under way at once as `--num_processes` says, and each leaves a file in
benchmarks/results/ablation/: a second call goes on where the first was stopped. A seed fixes prompts and noise, so
that methods are compared pair by pair.

    python benchmarks/ablation.py --studies window_3 --num_processes 2
    python benchmarks/ablation.py --report
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib import pyplot as plt
from peft import LoraConfig
from scipy import stats
from transformers import PrinterCallback, TrainerCallback

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.commands.demo import IMAGES_PER_PROMPT, SETTINGS, repeated, sample_heldout
from trl_tpgrpo.policies.loading import load_pipeline
from trl_tpgrpo.testbed import TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import score_images, shapes_reward


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/ablation"
CREDITS = {name: {"credit": name} for name in ("outcome", "incremental", "turning_point", "consistent")}
RESCALED = {
    "credit": "lambda",
    "credit_lambda": 0.8,
    "advantage_baseline": "completion",
    "scale_rewards": "batch",
    "advantage_scope": "joint",
    "completion": "at_1_2_3_5",
}
"""The normalisation that benchmarks/gradient_snr.py finds best, with completions that ask the model at four steps."""

CHEAP = {"lambda 0.8, rescaled, cheap": RESCALED}
PUBLISHED = {"advantage_baseline": "group", "scale_rewards": "group", "advantage_scope": "step"}
CONSISTENT = {"credit": "consistent", "credit_lambda": None}

RECIPE = {
    "sde_type": "cps",
    "credit": "outcome",
    "sde_window_range": [1, 2],
    "share_initial_noise": True,
    "scale_rewards": "batch",
}
"""What was tried as one.

With one SDE step and one noise a group, the final reward is the step's own gain and needs no completions.
"""

STUDIES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "window_3": ({"sde_window_size": 3}, CREDITS),
    "window_7": ({}, CREDITS),
    "cps_3": ({"sde_type": "cps", "sde_window_size": 3}, {**CREDITS, **CHEAP}),
    "cps_7": ({"sde_type": "cps"}, {**CREDITS, **CHEAP}),
    "cheap": (
        {"sde_window_size": 3},
        {
            "outcome": {"credit": "outcome"},
            **{
                f"{name}, cheap": {"credit": name, "completion": "at_1_2_3_5"}
                for name in ("incremental", "consistent")
            },
            **CHEAP,
        },
    ),
    "recipe": (
        RECIPE,
        {
            "Flow-GRPO": {
                "sde_type": "flow_sde",
                "sde_window_range": None,
                "sde_window_size": 3,
                "share_initial_noise": False,
                "scale_rewards": "group",
            },
            "step 1, shared noise": {},
            "step 1": {"share_initial_noise": False},
            "steps 1 and 2, shared noise": {"sde_window_range": [1, 3]},
        },
    ),
    "factors": (
        {"sde_type": "cps", **RESCALED},
        {
            "lambda 0.8, rescaled, cheap": {},
            "consistent": CONSISTENT,
            "normalised as published": PUBLISHED,
            "exact completions": {"completion": "exact"},
            "KL 0.0004": {"beta": 4e-4},
            "KL 0.04": {"beta": 0.04},
            "LoRA": {"lora_r": 16},
            "noise level 1.0": {"noise_level": 1.0},
            "groups of 16": {"num_generations": 16},
        },
    ),
    "noisy": (
        {"sde_type": "cps", **RESCALED, **CONSISTENT, "reward_noise": 0.1},
        {
            "consistent": {},
            "dead zone 0.2": {"turning_point_deadzone": 0.2},
            "not balanced": {"turning_point_balance": False},
            "outcome": {"credit": "outcome", "completion": "exact", **PUBLISHED},
        },
    ),
}
"""The settings of each study, and those of its methods: the others are compared with the first."""

AVERAGE = {"ema_decay": 0.9, "ema_update_every": 8}
"""The paper's; training does not see it."""

RATES = (5e-5, 1e-4, 2e-4, 4e-4)

BUDGETS = ("evaluations", "cpu_seconds", "updates")

FORWARD_AND_BACKWARD = 3
"""A transition that is trained on counts as so many evaluations; with a KL term, one more is the reference's."""


@dataclass(frozen=True)
class Run:
    """One training run; its name is that of its file."""

    study: str
    method: str
    learning_rate: float
    seed: int
    split: str
    budgets: dict[str, float]
    num_prompts: int | None

    def path(self, results: Path) -> Path:
        name = self.method.replace(" ", "_").replace(",", "")
        return results / self.study / f"{self.split}_{name}_{self.learning_rate:g}_{self.seed}.json"

    @property
    def settings(self) -> dict[str, Any]:
        of_study, methods = STUDIES[self.study]
        return {**of_study, **methods[self.method]}


class Budgets(TrainerCallback):
    """Scores the model as a run reaches each budget, and stops it at the last."""

    def __init__(self, run: Run, prompts: Dataset):
        self.left = dict(run.budgets)
        self.price = (FORWARD_AND_BACKWARD + 1) / 2 if run.settings.get("beta") else FORWARD_AND_BACKWARD
        self.prompts, self.scores = prompts, {}
        self.spent = {"cpu_seconds": 0.0, "evaluations": 0.0, "updates": 0}
        self.curve: list[dict[str, float]] = []
        self.trainer: TPGRPOTrainer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.spent["cpu_seconds"] += time.process_time() - self._start
        self.spent["updates"] += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "num_evaluations" not in logs:
            return  # the last log, of the whole run
        self.spent["evaluations"] += logs["num_evaluations"] + self.price * logs["num_train_evaluations"]
        self.curve.append({**self.spent, "reward": logs["reward"]})
        reached = [name for name, budget in self.left.items() if self.spent[name] >= budget]
        if reached:
            scores = self.score()
            self.scores |= {name: {"spent": dict(self.spent), **scores} for name in reached}
            self.left = {name: budget for name, budget in self.left.items() if name not in reached}
        control.should_training_stop |= not self.left

    def score(self) -> dict[str, Any]:
        """Mean graded and strict score of each prompt, with the weights as they are and with their moving average."""
        assert self.trainer is not None
        pipeline = self.trainer.policy.pipeline
        found: dict[str, Any] = by_prompt(sample_heldout(pipeline, self.prompts, "Score"), self.prompts)
        with self.trainer.averaged.in_use():
            found["averaged"] = by_prompt(sample_heldout(pipeline, self.prompts, "Score"), self.prompts)
        return found


def by_prompt(images: list, prompts: Dataset) -> dict[str, list[float]]:
    """Mean graded and strict score of each prompt's images."""
    scores = score_images(images, repeated(prompts))
    return {
        name: np.mean(np.reshape([getattr(score, name) for score in scores], (-1, IMAGES_PER_PROMPT)), 1)
        .round(4)
        .tolist()
        for name in ("graded", "strict")
    }


def train(run: Run, results: Path) -> None:
    """Do the run and keep what came of it."""
    torch.set_num_threads(1)
    callback = Budgets(run, prompt_dataset(run.split, run.num_prompts))
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(run, folder, callback).train()
    if callback.left:
        raise InterruptedError(f"{run} has been stopped before it reached {', '.join(callback.left)}.")
    path = run.path(results)
    kept = {
        "run": asdict(run),
        "settings": run.settings,
        "scores": callback.scores,
        "curve": callback.curve,
        "torch": torch.__version__,
    }
    write(path, kept)


def write(path: Path, kept: dict) -> None:
    """So that the file is there only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(kept))
    unfinished.rename(path)


def score_base(results: Path, num_prompts: int | None) -> None:
    """Score the model that all runs begin with."""
    torch.set_num_threads(1)
    prompts = prompt_dataset("heldout", num_prompts)
    images = sample_heldout(load_pipeline(TESTBED), prompts, "Score the base model")
    write(results / "base.json", by_prompt(images, prompts))


def build_trainer(run: Run, folder: str, callback: Budgets) -> TPGRPOTrainer:
    """The demo's settings at a constant learning rate, so that a run may be looked at anywhere."""
    settings = {**SETTINGS, **AVERAGE, **run.settings}
    rank, noise = settings.pop("lora_r", None), settings.pop("reward_noise", 0.0)
    args = TPGRPOConfig(
        folder,
        max_steps=100_000,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant",
        guard_rails="off",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=run.seed,
        **settings,
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank) if rank else None
    trainer = TPGRPOTrainer(
        TESTBED, noisy(noise, run.seed), args, prompt_dataset("train"), callbacks=[callback], peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer
    return trainer


def noisy(level: float, seed: int) -> Callable[..., list[float]]:
    """The reward with normal noise of this standard deviation, fresh for every image that is scored."""
    generator = np.random.default_rng(abs(seed))

    def reward(images: list, prompts: list[str], **columns: Any) -> list[float]:
        clean = shapes_reward(images, prompts, **columns)
        return [
            value + level * noise for value, noise in zip(clean, generator.standard_normal(len(clean)), strict=True)
        ]

    return reward if level else shapes_reward


def main() -> None:
    args = make_parser().parse_args()
    if args.report:
        print(report(args))  # noqa: T201
        draw(args)
        return
    if not (args.results / "base.json").exists():
        score_base(args.results, args.num_prompts)
    for study in args.studies:
        methods = [name for name in STUDIES[study][1] if args.methods is None or name in args.methods]
        tuning = [
            plan(args, study, method, rate, -1, "tuning")
            for method in methods
            for rate in args.learning_rates or RATES
        ]
        do(tuning, args)
        best = {method: rate for method, rate in chosen(tuned(args)[study]).items() if method in methods}
        print(study, "learning rates:", best, flush=True)  # noqa: T201
        do(
            [
                plan(args, study, method, best[method], seed, "heldout")
                for seed in args.seeds or range(5)
                for method in methods
            ],
            args,
        )


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    add("--methods", nargs="+", help="of these studies (default: all)")
    add("--seeds", type=int, nargs="+", help="of the runs (default: 0 to 4) or of the report (default: all)")
    add(
        "--learning_rates",
        type=float,
        nargs="+",
        help="to choose from (default: 5e-5 to 4e-4), or those reported (default: all)",
    )
    add("--cpu_seconds", type=float, default=80, help="the first budget, 0: none (default: %(default)s)")
    add(
        "--evaluations",
        type=float,
        default=68_000,
        help="the second: of the model, one training step on a transition counting as three (default: %(default)s)",
    )
    add("--updates", type=int, default=32, help="the third (default: %(default)s)")
    add("--num_prompts", type=int, default=160, help="to score, 4 images each (default: %(default)s)")
    add("--num_processes", type=int, default=2, help="at once (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="(default: benchmarks/results/ablation)")
    add("--report", action="store_true", help="print the tables and draw the figure of what is there")
    add("--figure", type=Path, default=ROOT / "docs/images/ablation.png", help="(default: docs/images/ablation.png)")
    return parser


def plan(args: argparse.Namespace, study: str, method: str, rate: float, seed: int, split: str) -> Run:
    """A run of the study; learning rates are tuned at equal evaluations alone, with a seed that is not reported."""
    budgets = {"cpu_seconds": args.cpu_seconds, "evaluations": args.evaluations, "updates": args.updates}
    budgets = {
        name: budget for name, budget in budgets.items() if budget and (split != "tuning" or name == "evaluations")
    }
    return Run(study, method, rate, 1000 if seed < 0 else seed, split, budgets, args.num_prompts)


def do(runs: list[Run], args: argparse.Namespace) -> None:
    """Those that have no file yet; if several at once, each in a process of its own."""
    missing = [(run, args.results) for run in runs if not run.path(args.results).exists()]
    if args.num_processes == 1:
        for run, results in missing:
            train(run, results)
        return
    with multiprocessing.get_context("spawn").Pool(args.num_processes, maxtasksperchild=1) as pool:
        pool.starmap(train, missing, chunksize=1)


def tuned_reward(kept: dict) -> float:
    """Of a run that was scored once."""
    (scores,) = kept["scores"].values()
    return mean_reward(scores)


def mean_reward(scores: dict) -> float:
    """The mean of graded and strict score, which is what is trained on."""
    return (np.mean(scores["graded"]) + np.mean(scores["strict"])) / 2


Found = dict[str, dict[tuple[str, float], list[dict]]]
"""The runs by study, and by method and learning rate."""


def load(args: argparse.Namespace, split: str) -> Found:
    """What has been kept of the studies, learning rates and (if not of tuning) seeds that were asked for."""
    found: Found = {}
    base = json.loads((args.results / "base.json").read_text())
    for path in sorted(args.results.glob(f"*/{split}_*.json")):
        kept = {"base": base, **json.loads(path.read_text())}
        run = kept["run"]
        asked = run["study"] in args.studies and (
            not args.learning_rates or run["learning_rate"] in args.learning_rates
        )
        if asked and (split == "tuning" or not args.seeds or run["seed"] in args.seeds):
            found.setdefault(run["study"], {}).setdefault((run["method"], run["learning_rate"]), []).append(kept)
    return found


def tuned(args: argparse.Namespace) -> dict[str, dict[str, dict[float, float]]]:
    """By study and method: reward on the tuning prompts by learning rate."""
    rewards: dict[str, dict[str, dict[float, float]]] = {}
    for study, methods in load(args, "tuning").items():
        for (method, rate), (run,) in sorted(methods.items()):
            rewards.setdefault(study, {}).setdefault(method, {})[rate] = tuned_reward(run)
    return rewards


def chosen(rewards: dict[str, dict[float, float]]) -> dict[str, float]:
    """By method: the learning rate with the highest reward on the tuning prompts."""
    return {method: max(by_rate, key=by_rate.__getitem__) for method, by_rate in rewards.items()}


def report(args: argparse.Namespace) -> str:
    """Tables in Markdown: learning rates, and gains over the base model with 95% intervals and paired tests."""
    rewards = tuned(args)
    lines = ["| study | method | reward on tuning prompts by learning rate |", "|---|---|---|"]
    for study, methods in rewards.items():
        for method, by_rate in methods.items():
            lines.append(f"| {study} | {method} | {', '.join(f'{r:g}: {v:.3f}' for r, v in by_rate.items())} |")
    for study, runs in load(args, "heldout").items():
        method = next(iter(STUDIES[study][1]))
        lines += ["", f"**{study}**", "", *table(runs, method, chosen(rewards[study]).get(method, 0.0))]
    return "\n".join(lines)


def table(methods: dict[tuple[str, float], list[dict]], reference: str, rate: float) -> list[str]:
    """By budget, method and weights: what held-out scores have gained, and what that is above the reference's gain."""
    lines = [
        "| equal | method | learning rate | seeds | updates | weights | reward gained | strict gained "
        f"| against {reference} | p |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    others = methods.get((reference, rate), [])
    for budget, (method, runs), weights in product(BUDGETS, sorted(methods.items()), ("last", "averaged")):
        own, compared = gains(runs, budget, weights), gains(others, budget, weights)
        if not own:
            continue
        pairs = [own[seed][0] - compared[seed][0] for seed in sorted(set(own) & set(compared))]
        against, p = ("", "") if runs is others else (interval(pairs), p_value(pairs))
        reward, strict = (interval([gain[place] for gain in own.values()]) for place in (0, 1))
        updates = np.mean([run["scores"][budget]["spent"]["updates"] for run in runs if budget in run["scores"]])
        columns = (budget, method[0], f"{method[1]:g}", len(own), f"{updates:.0f}", weights, reward, strict)
        lines.append(f"| {' | '.join(map(str, (*columns, against, p)))} |")
    return lines


def gains(runs: list[dict], budget: str, weights: str) -> dict[int, tuple[float, float]]:
    """By seed: what reward and strict score have gained over the base model.

    Only of runs that were scored with such weights.
    """
    found = {}
    for run in runs:
        scores, base = run["scores"].get(budget, {}), run["base"]
        if weights == "averaged":
            scores = scores.get("averaged", {})
        if scores:
            strict = float(np.mean(scores["strict"]) - np.mean(base["strict"]))
            found[run["run"]["seed"]] = (mean_reward(scores) - mean_reward(base), strict)
    return found


def interval(values: list[float]) -> str:
    """Mean with the half width of its 95% interval."""
    return f"{np.mean(values):+.3f} \u00b1 {half_width(values):.3f}" if values else ""


def half_width(values: list[float]) -> float:
    """Of the 95% interval of the mean (Student's t over seeds); NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def p_value(pairs: list[float]) -> str:
    """Of the paired t-test."""
    if len(pairs) < 2:
        return ""
    p = stats.ttest_1samp(pairs, 0).pvalue
    return "< 0.005" if p < 0.005 else f"{p:.2f}"


def draw(args: argparse.Namespace) -> None:
    """Reward gained at equal evaluations with 95% intervals, one panel a study."""
    studies = load(args, "heldout")
    rows = -(-len(studies) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 0.8 + 2.4 * rows), squeeze=False, sharex=True)
    for axis, (study, found) in zip(axes.flat, studies.items(), strict=False):
        rates = Counter(method for method, _ in found)
        order = sorted(found, key=lambda one: (list(STUDIES[study][1]).index(one[0]), one[1]))
        methods = {
            f"{method}, {rate:g}" if rates[method] > 1 else method: found[method, rate] for method, rate in order
        }
        for place, runs in enumerate(methods.values()):
            for shift, weights in enumerate(("last", "averaged")):
                values = [gain[0] for gain in gains(runs, "evaluations", weights).values()]
                if values:
                    where = place + 0.2 * (shift - 0.5)
                    axis.errorbar(
                        np.mean(values), where, xerr=half_width(values), fmt="o", color=f"C{shift}", capsize=3
                    )
        axis.set_yticks(range(len(methods)), methods, fontsize=8)
        axis.set_title(study, fontsize=10)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.tick_params(labelbottom=True, labelsize=8)
    for axis in axes.flat[len(studies) :]:
        axis.set_axis_off()
    figure.supxlabel("reward gained on held-out prompts", fontsize=10)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    handles = [plt.Line2D([], [], color=f"C{shift}", marker="o") for shift in (0, 1)]
    figure.legend(handles, ["last weights", "averaged weights"], fontsize=8, loc="lower right")
    figure.savefig(args.figure, dpi=110)


if __name__ == "__main__":
    main()
