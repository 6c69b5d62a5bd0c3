"""What step-level credit is worth on the toy models: held-out reward of six methods by function evaluations (NFE).

The design is in the constants below, and was committed before the first reported run. The stages "rate" and "noise"
choose the learning rate and the noise for the reference, with seeds and captions of their own; in the stage "heldout"
every method runs once a seed. Each run takes one thread and leaves a file, so that a second call goes on where one was
stopped.

    python benchmarks/study.py --stage rate
    python benchmarks/study.py --stage noise
    python benchmarks/study.py
    python benchmarks/study.py --stage longer
    python benchmarks/study.py --stage critic
    python benchmarks/study.py --report

`--world words` does the same for words that a recogniser reads, with the settings chosen for the shapes.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import critic
import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import stats
from transformers import PrinterCallback, TrainerCallback
from worlds import WORLDS, World

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.commands.demo import SETTINGS
from trl_tpgrpo.policies.loading import load_pipeline


ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks/results", ROOT / "docs/images"

# The instrument
COMMON = {**SETTINGS, "sde_type": "cps", "noise_level": 0.5, "gradient_accumulation_steps": 8}
"""An update takes 512 trajectories, 64 prompts of 8, in micro-batches of 64. All weights are trained, without KL."""

FITTED = {
    "completion": "at_1_2_3_5_from_1", "scale_rewards": "batch", "advantage_scope": "joint", "credit": "lambda",
    "credit_lambda": 0.5, "advantage_baseline": "fitted", "transition_share": 0.4,
}  # fmt: skip

FLOW = {"credit": "outcome", "scale_rewards": "batch"}
METHODS: dict[str, dict[str, Any]] = {
    "Flow-GRPO, first three steps": {**FLOW, "sde_window_size": 3},
    "Flow-GRPO, all steps but the last": {"credit": "outcome"},
    "TP-GRPO as published": {},
    "TP-GRPO, joint scale, cheap completions": {
        "completion": "at_1_2_3_5", "scale_rewards": "batch", "advantage_scope": "joint",
        "advantage_baseline": "completion",
    },
    "fitted credit, transitions drawn": FITTED,
    "fitted credit, transitions drawn, first three steps": {**FITTED, "sde_window_size": 3},
}  # fmt: skip
"""The rows of the design. Step-level credit is in the paper's window, all steps but the last, unless stated."""

INSTRUMENT: dict[str, dict[str, Any]] = {
    **{f"noise level {one}": {**FLOW, "sde_window_size": 3, "noise_level": one} for one in (0.25, 0.4, 0.55, 0.7)},
    "one of the first three steps, shared noise, level 0.7": {
        **FLOW, "sde_window_size": 1, "sde_window_range": [0, 3], "share_initial_noise": True, "noise_level": 0.7,
    },
}  # fmt: skip
"""What was tried, with the reference, so that images of the ODE gain as much as those of the SDE."""

REFERENCE = "Flow-GRPO, first three steps"
CRITIC = {"credit": "critic.credit", "scale_rewards": "batch", "advantage_scope": "joint"}
CRITICS: dict[str, dict[str, Any]] = {
    "linear critic, first three steps": {**CRITIC, "sde_window_size": 3},
    "linear critic, all steps but the last": CRITIC,
}
"""Not in the design, added after three seeds: credit by a critic instead of completions, see critic.py."""

FALLING = {**METHODS[REFERENCE], "lr_scheduler_type": "linear", "max_steps": 96}
LONGER: dict[str, dict[str, Any]] = {
    f"{REFERENCE}, rate falls to 0": FALLING,
    f"{REFERENCE}, rate falls to 0, noise level 0.4": {**FALLING, "noise_level": 0.4},
}
"""The reference with more than twice the budget. At a constant rate it wanders around half of the headroom."""

SETTINGS_OF = METHODS | CRITICS | INSTRUMENT | LONGER
RATE = 2e-4
"""Of all methods: the best for the reference on the tuning captions, the mean of three seeds at noise level 0.7."""

SEEDS, BUDGET, LONGEST, MARKS = range(6), 300_000, 800_000, 50_000
STAGES: dict[str, tuple[list[str], tuple[float, ...], Sequence[int], int]] = {
    "rate": ([REFERENCE], (1e-4, 2e-4, 3e-4), (1000, 1001, 1002), BUDGET // 2),
    "noise": (list(INSTRUMENT), (RATE,), (1000, 1001), BUDGET // 2),
    "heldout": (list(METHODS), (RATE,), SEEDS, BUDGET),
    "longer": (list(LONGER), (RATE,), SEEDS[:2], LONGEST),
    "critic": (list(CRITICS), (RATE,), SEEDS[:1], BUDGET),
}
"""Methods, learning rates, seeds and NFE of the stages; all but the first two are on captions of their own."""

MARGIN = 0.1  # of the reference's gain: a difference that is certainly smaller counts as none
FORWARD_AND_BACKWARD = 3  # a transition that is trained on counts as this many function evaluations
IMAGES = {"tuning": 720, "mark": 360, "heldout": 2520}
GROUPS = 90  # of 8 images, for the scores of known prompts and of the SDE


@dataclass(frozen=True)
class Run:
    """One training run; its name is that of its file."""

    method: str
    learning_rate: float
    seed: int
    stage: str
    budget: float
    world: str = "shapes"

    @property
    def path(self) -> Path:
        name = self.method.replace(",", "").replace(" ", "_")
        return Path(self.stage) / f"{name}_{self.learning_rate:g}_{self.seed}.json"

    @property
    def settings(self) -> dict[str, Any]:
        return {"sde_window_size": None, **COMMON, **WORLDS[self.world].pipeline_kwargs, **SETTINGS_OF[self.method]}

    @property
    def split(self) -> str:
        return "tuning" if self.stage in ("rate", "noise") else "heldout"


class Scores(TrainerCallback):
    """Counts what a run spends, and scores the model at the marks and at the end."""

    def __init__(self, run: Run):
        self.run, self.trainer = run, None
        self.spent = dict.fromkeys(("evaluations", "updates", "images", "cpu_seconds"), 0.0)
        self.curve: list[dict[str, Any]] = []
        self.marks: list[dict[str, float]] = []
        self.end: dict[str, dict[str, float]] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()
        if self.run.method in CRITICS:
            critic.recorder.calls.clear()  # of images that were scored

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.spent["cpu_seconds"] += time.process_time() - self._start
        self.spent["updates"] += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "nfe" not in logs:
            return  # the last log, of the whole run
        self.spent["evaluations"] += logs["nfe"] + FORWARD_AND_BACKWARD * logs["nfe_train"]
        self.spent["images"] += logs["num_scored_images"]
        explained = {"explained": critic.recorder.explained[-1]} if self.run.method in CRITICS else {}
        self.curve.append({**self.spent, "reward": logs["reward"], **explained})
        finished = self.spent["evaluations"] >= self.run.budget or state.global_step == state.max_steps
        control.should_training_stop |= finished
        if finished:
            self.end = score_the_end(self.trainer, self.run)
        elif self.spent["evaluations"] >= MARKS * (len(self.marks) + 1) and self.run.split == "heldout":
            found = score(self.trainer.policy.pipeline, WORLDS[self.run.world], "heldout", IMAGES["mark"])
            self.marks.append({**self.spent, **found})


def score_the_end(trainer: TPGRPOTrainer, run: Run) -> dict[str, dict[str, float]]:
    """What the weights are worth: images of the ODE and of the SDE that was trained on, of new and of known prompts.

    Those of learning rates are scored by the ODE alone.
    """
    pipeline, world = trainer.policy.pipeline, WORLDS[run.world]
    own = score(pipeline, world, run.split, IMAGES[run.split])
    if run.stage == "rate":
        return {"new": own}
    return {
        "new": own,
        "new, SDE": score_sde(trainer, world, run.split),
        "train": score(pipeline, world, "train", IMAGES["tuning"]),
        "train, SDE": score_sde(trainer, world, "train"),
    }


def score(pipeline: Any, world: World, split: str, number: int) -> dict[str, float]:
    """Mean scores of so many images, by the pipeline's own call and from noise that never changes."""
    pipeline.set_progress_bar_config(disable=True)
    each, images = world.prompts(split)["prompt"], []
    prompts = [prompt for prompt in each for _ in range(number // len(each))]
    options = {**world.pipeline_kwargs, "guidance_scale": 1.0, "num_inference_steps": COMMON["num_inference_steps"]}
    for start in range(0, len(prompts), 64):
        chunk = prompts[start : start + 64]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(chunk))]
        images += pipeline(chunk, generator=generators, **options).images
    return {**world.means(images, prompts), "num_images": len(images)}


def score_sde(trainer: TPGRPOTrainer, world: World, split: str) -> dict[str, float]:
    """The same of images that are sampled as in training: a group of each prompt, in the first rollout's window."""
    rows = world.prompts(split)
    repeated = [row for row in rows.take(min(GROUPS, len(rows))) for _ in range(COMMON["num_generations"])]
    images, window = [], trainer.rollouts.windows.draw(0)
    trainer.model.eval()
    for start in range(0, len(repeated), 64):
        chunk = repeated[start : start + 64]
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(chunk))]
        sampled = trainer.sample_and_score(chunk, generators, window, None)
        images += [sampled.images[index] for index in sampled.rollout.image_of[:, -1].tolist()]
    trainer.model.train()
    return {**world.means(images, [row["prompt"] for row in repeated]), "num_images": len(images)}


def train(run: Run, results: Path) -> None:
    """Do the run and keep what came of it."""
    torch.set_num_threads(1)
    scores = Scores(run)
    with tempfile.TemporaryDirectory() as folder:
        scores.trainer = build_trainer(run, folder, scores)
        scores.trainer.train()
    if not scores.end:
        raise InterruptedError(f"{run} has been stopped before its end.")
    write(
        results / run.path,
        {"run": asdict(run), "settings": run.settings, "curve": scores.curve, "marks": scores.marks, "end": scores.end,
         "torch": torch.__version__},
    )  # fmt: skip


def build_trainer(run: Run, folder: str, callback: Scores) -> TPGRPOTrainer:
    """At a constant rate, unless the settings say otherwise, so that a run may be looked at anywhere."""
    args = TPGRPOConfig(
        folder,
        learning_rate=run.learning_rate,
        guard_rails="off",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=run.seed,
        **{"max_steps": 100_000, "lr_scheduler_type": "constant", **run.settings},
    )
    world = WORLDS[run.world]
    trainer = TPGRPOTrainer(world.weights, world.reward, args, world.train_dataset(), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    if run.method in CRITICS:
        critic.attach(trainer.policy.pipeline.transformer, COMMON["num_inference_steps"])
    return trainer


def write(path: Path, kept: dict) -> None:
    """So that the file is there only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(kept))
    unfinished.rename(path)


def score_base(results: Path, world: World) -> None:
    """Score the model that all runs begin with."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(world.weights)
    places = {name: (name, IMAGES[name]) for name in ("heldout", "tuning")}
    places |= {"train": ("train", IMAGES["tuning"]), "mark": ("heldout", IMAGES["mark"])}
    base = {name: score(pipeline, world, *place) for name, place in places.items()}
    write(results / "base.json", {**base, "best": world.best})


Kept = dict[tuple[str, float], list[dict]]
"""Finished runs by method and learning rate."""


def load(results: Path, stage: str) -> Kept:
    """Read the runs of a stage, in the order of the constants above."""
    kept: Kept = defaultdict(list)
    for path in sorted((results / stage).glob("*.json")):
        run = json.loads(path.read_text())
        kept[run["run"]["method"], run["run"]["learning_rate"]].append(run)
    return dict(sorted(kept.items(), key=lambda item: (list(SETTINGS_OF).index(item[0][0]), item[0][1])))


def report(results: Path, figure: Path) -> str:
    """The tables in Markdown; draws the figure."""
    base, kept = json.loads((results / "base.json").read_text()), load(results, "heldout")
    parts = [rate_table(load(results, "rate")), both_currencies(load(results, "noise"), base, "tuning")]
    parts += [single_runs_table(load(results, stage), base) for stage in ("longer", "critic")]
    if kept:
        parts += [
            end_table(kept, base["heldout"]),
            both_currencies(kept, base, "heldout"),
            reaching_table(kept, base),
        ]
        draw(kept, base, figure)
    return "\n\n".join("\n".join(lines) for lines in parts)


def rate_table(kept: Kept) -> list[str]:
    """Reward on the tuning captions, by learning rate."""
    lines = ["| method | learning rate | seeds | updates | reward, mean | by seed |", "|---|---|---|---|---|---|"]
    for (method, rate), runs in kept.items():
        rewards = [run["end"]["new"]["reward"] for run in runs]
        each = ", ".join(f"{reward:.3f}" for reward in rewards)
        columns = (method, f"{rate:g}", len(runs), f"{mean_of(runs, 'updates'):.0f}", f"{np.mean(rewards):.3f}", each)
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return lines


def end_table(kept: Kept, base: dict[str, float]) -> list[str]:
    """What held-out scores have gained at the end, and what that is beside the reference's gain."""
    lines = [
        "| method | learning rate | seeds | updates | images scored | CPU seconds | reward gained | strict gained "
        "| difference to the reference | p, corrected | p of equivalence |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    gains = {
        key: np.array([run["end"]["new"]["reward"] - base["reward"] for run in runs]) for key, runs in kept.items()
    }
    reference = next((gain for (method, _), gain in gains.items() if method == REFERENCE), np.array([]))
    others = {key: gain for key, gain in gains.items() if gain is not reference and min(len(gain), len(reference)) > 1}
    tests = {key: compare(gain, reference) for key, gain in others.items()}
    corrected = holm({key: test["p"] for key, test in tests.items()})
    for key, runs in kept.items():
        strict = [run["end"]["new"]["strict"] - base["strict"] for run in runs]
        spent = [f"{mean_of(runs, name):,.0f}" for name in ("updates", "images", "cpu_seconds")]
        columns = [key[0], f"{key[1]:g}", len(runs), *spent, interval(gains[key]), interval(strict)]
        if key in tests:
            test = tests[key]
            beside = f"{test['difference']:+.3f} \u00b1 {test['half_width']:.3f}"
            columns += [beside, f"{corrected[key]:.3f}", f"{test['p_equivalent']:.3f}"]
        lines.append(f"| {' | '.join(map(str, columns))} |" + " | | |" * (key not in tests))
    return lines


def single_runs_table(kept: Kept, base: dict) -> list[str]:
    """Every run's held-out reward at the marks and at the end, and the gain as a share of the headroom."""
    marks = range(2 * MARKS, LONGEST, 2 * MARKS)
    lines = [
        f"| method | learning rate | seed | {' | '.join(f'{mark // 1000}k' for mark in marks)} | end | at NFE "
        "| share of the headroom | SDE images |",
        "|" + "---|" * (len(marks) + 7),
    ]
    for (method, rate), runs in kept.items():
        for run in runs:
            spent, rewards = mean_curve([run], base)
            cells = [f"{np.interp(mark, spent, rewards):.3f}" if mark < spent[-1] else "" for mark in marks]
            share = (rewards[-1] - base["heldout"]["reward"]) / (base["best"] - base["heldout"]["reward"])
            sde = run["end"]["new, SDE"]["reward"]
            cells += [f"{rewards[-1]:.3f}", f"{spent[-1]:,.0f}", f"{share:.2f}", f"{sde:.3f}"]
            lines.append(f"| {method} | {rate:g} | {run['run']['seed']} | {' | '.join(cells)} |")
    return lines


def both_currencies(kept: Kept, base: dict, split: str) -> list[str]:
    """Rewards of images of the ODE, which count, and of the SDE, which are trained on; of new and known captions."""
    lines = [
        "| method | seeds | new captions, ODE | new, SDE | known, ODE | known, SDE |",
        "|---|---|---|---|---|---|",
    ]
    for (method, _), runs in kept.items():
        cells = [
            f"{np.mean([run['end'][place]['reward'] for run in runs]):.3f}"
            for place in ("new", "new, SDE", "train", "train, SDE")
        ]
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} |")
    lines.append(f"| before training |  | {base[split]['reward']:.3f} |  | {base['train']['reward']:.3f} |  |")
    return lines


def reaching_table(kept: Kept, base: dict) -> list[str]:
    """Evaluations until the mean held-out reward of a method's runs is the one that the reference ends at."""
    lines = ["| method | NFE to the reference's end | as a share of its own |", "|---|---|---|"]
    reference = next((runs for (method, _), runs in kept.items() if method == REFERENCE), None)
    if reference is None:
        return lines
    generator = np.random.default_rng(0)
    for (method, _), runs in kept.items():
        drawn = [shares(resampled(runs, generator), resampled(reference, generator), base) for _ in range(2000)]
        share, (low, high) = shares(runs, reference, base), np.percentile(drawn, [2.5, 97.5], method="nearest")
        total = mean_of(reference, "evaluations")
        never = f"not within {mean_of(runs, 'evaluations'):,.0f}" if np.isinf(share) else f"{share * total:,.0f}"
        shown = "" if np.isinf(share) else f"{share:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {method} | {never} | {shown} |")
    return lines


def resampled(runs: list[dict], generator: np.random.Generator) -> list[dict]:
    """As many runs, drawn with replacement."""
    return [runs[index] for index in generator.integers(len(runs), size=len(runs))]


def shares(runs: list[dict], reference: list[dict], base: dict) -> float:
    """Where the mean curve first reaches the reference's mean end, over the reference's NFE; or infinity."""
    spent, rewards = mean_curve(runs, base)
    total, target = (values[-1] for values in mean_curve(reference, base))
    above = np.flatnonzero(rewards >= target)
    if not len(above):
        return float("inf")
    place = above[0]
    part = (target - rewards[place - 1]) / (rewards[place] - rewards[place - 1])
    return float((spent[place - 1] + part * (spent[place] - spent[place - 1])) / total)


def mean_curve(runs: list[dict], base: dict) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations and held-out reward at the start, the marks and the end: the means of runs.

    Marks are scored on fewer images than the end. What the base model gets for these, less or more, is made up for.
    """
    total, start = mean_of(runs, "evaluations"), base["heldout"]["reward"]
    shift = start - base["mark"]["reward"]
    spent, curves = np.append(np.arange(0, total - MARKS / 2, MARKS), total), []
    for run in runs:
        marks = [(mark["evaluations"], mark["reward"] + shift) for mark in run["marks"]]
        points = [(0.0, start), *marks, (run["curve"][-1]["evaluations"], run["end"]["new"]["reward"])]
        curves.append(np.interp(spent, *zip(*points, strict=True)))
    return spent, np.mean(curves, 0)


def compare(gains: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Welch's test of the difference of two means, and of the two that it lies beyond the margin on either side."""
    test, margin = stats.ttest_ind(gains, reference, equal_var=False), MARGIN * reference.mean()
    low, high = test.confidence_interval(0.95)
    sides = [stats.ttest_ind(gains + margin, reference, equal_var=False, alternative="greater").pvalue,
             stats.ttest_ind(gains - margin, reference, equal_var=False, alternative="less").pvalue]  # fmt: skip
    return {"difference": gains.mean() - reference.mean(), "half_width": (high - low) / 2, "p": test.pvalue,
            "p_equivalent": max(sides)}  # fmt: skip


def holm(p_values: dict[Any, float]) -> dict[Any, float]:
    """Correct p-values for their number (Holm, 1979)."""
    corrected, highest = {}, 0.0
    for place, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[key]))
        corrected[key] = highest
    return corrected


def mean_of(runs: list[dict], name: str) -> float:
    """Mean of what runs have spent."""
    return float(np.mean([run["curve"][-1][name] for run in runs]))


def interval(values: Any) -> str:
    """Mean with the half width of its 95% interval (Student's t over seeds)."""
    if len(values) < 2:
        return f"{np.mean(values):+.3f}"
    half_width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):+.3f} \u00b1 {half_width:.3f}"


def draw(kept: Kept, base: dict, path: Path) -> None:
    """Held-out reward by NFE, a line a method, with every run's end."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for place, ((method, _), runs) in enumerate(kept.items()):
        spent, rewards = mean_curve(runs, base)
        axis.plot(spent / 1000, rewards, color=f"C{place}", marker="o", markersize=3, label=f"{method} ({len(runs)})")
        ends = [(run["curve"][-1]["evaluations"] / 1000, run["end"]["new"]["reward"]) for run in runs]
        axis.scatter(*zip(*ends, strict=True), color=f"C{place}", s=8, alpha=0.4)
    axis.set(xlabel="function evaluations (NFE), thousands", ylabel="reward of held-out captions, ODE")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, title="method (seeds)", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = make_parser().parse_args()
    folder = "study" if args.world == "shapes" else f"study_{args.world}"
    results, figure = args.results or RESULTS / folder, args.figure or FIGURES / f"{folder}.png"
    if args.report:
        print(report(results, figure))  # noqa: T201
        return
    if not (results / "base.json").exists():
        score_base(results, WORLDS[args.world])
    methods, rates, seeds, budget = STAGES[args.stage]
    chosen = product(args.seeds or seeds, args.learning_rates or rates, args.methods or methods)
    budget = args.evaluations or budget
    runs = [Run(method, rate, seed, args.stage, budget, args.world) for seed, rate, method in chosen]
    missing = [(run, results) for run in runs if not (results / run.path).exists()]
    with multiprocessing.get_context("spawn").Pool(args.num_processes, maxtasksperchild=1) as pool:
        pool.starmap(train, missing, chunksize=1)


def make_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--world", default="shapes", choices=list(WORLDS), help="(default: %(default)s)")
    add("--stage", default="heldout", choices=list(STAGES), help="(default: %(default)s)")
    add("--methods", nargs="+", choices=list(SETTINGS_OF), help="(default: those of the stage)")
    add("--learning_rates", type=float, nargs="+", help="(default: those of the stage)")
    add("--seeds", type=int, nargs="+", help="(default: those of the stage)")
    add("--evaluations", type=float, help="function evaluations of a run (default: those of the stage)")
    add("--num_processes", type=int, default=2, help="runs at once (default: %(default)s)")
    add("--results", type=Path, help="(default: benchmarks/results/study, or study_words)")
    add("--report", action="store_true", help="print the tables and draw the figure of what is there")
    add("--figure", type=Path, help="(default: docs/images/study.png, or study_words.png)")
    return parser


if __name__ == "__main__":
    main()
