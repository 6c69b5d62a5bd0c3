"""Costs of a rollout with rewards along its trajectories: the plain way, the sweep, and Flow-GRPO without completions.

All ways run side by side in one process with one thread, on the testbed ("sd3") and on a FLUX.1 of its size with
random weights ("flux"), from the same noise. Ratios are those of CPU seconds in a turn, and the median over turns. The
largest batch runs with the shorter schedules only. Results go to benchmarks/results/ and docs/images/;
docs/performance.md shows them.

    python benchmarks/rollout.py
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from models import load_policy
from plain import plain_rollout

from trl_tpgrpo.algorithm.completion import CompletionRule
from trl_tpgrpo.algorithm.rollout import EXACT, Velocity, Window, fastest_batch_size, roll_out
from trl_tpgrpo.policies.base import FlowPolicy, to_images
from trl_tpgrpo.testbed import prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


ROOT = Path(__file__).parents[1]
PHASES = ("rollout", "decode", "score")
MODELS = ("sd3", "flux")


class Setting:
    """B trajectories of T steps of one model, the first K of them SDE steps, and the ways to sample and score them."""

    def __init__(self, policy: FlowPolicy, batch: int, steps: int, window: int, chunks: dict[str, int]):
        self.policy, self.batch, self.chunks = policy, batch, chunks
        prompts = list(prompt_dataset("train")["prompt"][:])
        self.prompts = [prompts[row % len(prompts)] for row in range(batch)]
        self.conditioning = policy.encode(self.prompts)
        self.schedule = policy.schedule(steps)
        self.window = Window(0, window, "cps", 0.7, "squared_error")

    def velocity(self) -> Velocity:
        def velocity(latents: torch.Tensor, step: int, rows: torch.Tensor) -> torch.Tensor:
            model = self.policy.pipeline.transformer
            return self.policy.velocity(model, latents, self.schedule[step], self.conditioning[rows])

        return velocity

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(self.batch)]

    def noise(self) -> torch.Tensor:
        return self.policy.initial_noise(self.generators())

    def plain(self) -> dict:
        clock = Clock()
        run = plain_rollout(self.velocity(), self.noise(), self.schedule.sigmas, self.window, self.generators())
        clock.stop("rollout")
        images = {number: to_images(self.policy.decode(latents)) for number, latents in run.ends.items()}
        clock.stop("decode")
        rewards = [shapes_reward(images=images[number], prompts=self.prompts) for number in sorted(images)]
        shapes_reward(images=images[len(self.window)], prompts=self.prompts)  # the final image a second time
        clock.stop("score")
        counts = {"evaluations": run.nfe, "calls": run.num_calls, "decodes": len(images) * self.batch}
        return {**clock.seconds, **counts, "scored": (len(images) + 1) * self.batch, "rewards": np.array(rewards).T}

    def sweep(self, completion: CompletionRule | None = EXACT) -> dict:
        clock = Clock()
        run = roll_out(
            self.velocity(),
            self.noise(),
            self.schedule.sigmas,
            self.window,
            self.generators(),
            completion,
            self.chunks["model"],
        )
        clock.stop("rollout")
        images = to_images(self.policy.decode(run.final_latents, self.chunks["vae"]))
        clock.stop("decode")
        rewards = shapes_reward(images=images, prompts=[self.prompts[row] for row in run.rows])
        clock.stop("score")
        counts = {"evaluations": run.nfe, "calls": run.num_calls, "decodes": len(images)}
        return {**clock.seconds, **counts, "scored": len(images), "rewards": np.array(rewards)[run.image_of]}

    def ways(self) -> dict[str, Callable[[], dict]]:
        return {
            "plain": self.plain,
            "sweep": self.sweep,
            "flow": lambda: self.sweep(None),
        }


class Clock:
    """CPU seconds of each phase, and wall seconds of all."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"wall": 0.0}
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, phase: str) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self.seconds[phase] = cpu - self._cpu
        self.seconds["wall"] += wall - self._wall
        self._cpu, self._wall = cpu, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 10, 20, 40])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="sd3, flux, or folders of pipelines")
    parser.add_argument("--turns", type=int, default=3, help="of all ways for a setting (default: %(default)s)")
    parser.add_argument("--name", default="rollout", help="of the result files (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, chunks = [], {}
    for model in args.models:
        policy = load_policy(model)
        chunks[model] = measured_chunks(policy)
        for steps in args.steps:
            for window in sorted({1, 3, steps // 2, steps - 1}):
                for batch in (batch for batch in args.batches if batch * steps <= 640):
                    rows += measure(model, Setting(policy, batch, steps, window, chunks[model]), steps, args.turns)
    results = {"chunks": chunks, "threads": 1, "torch": torch.__version__, "rows": rows, "memory": measure_memory()}
    results["prediction"] = {model: predict([row for row in rows if row["model"] == model]) for model in args.models}
    path = ROOT / "benchmarks/results" / f"{args.name}.json"
    path.write_text(json.dumps(results, indent=1))
    print(report(results))  # noqa: T201
    draw(results, ROOT / "docs/images" / f"{args.name}.png")


def measured_chunks(policy: FlowPolicy) -> dict[str, int]:
    """Measure the batch sizes that `per_device_rollout_batch_size="auto"` would choose for the model and the VAE."""
    setting = Setting(policy, 1, 10, 9, {})
    noise, velocity = setting.noise(), setting.velocity()

    def predict(size: int) -> object:
        return velocity(noise.expand(size, *noise.shape[1:]), 0, torch.zeros(size, dtype=torch.long))

    def decode(size: int) -> object:
        return policy.decode(noise.expand(size, *noise.shape[1:]))

    return {part: fastest_batch_size(timed(run), 256) for part, run in (("model", predict), ("vae", decode))}


def timed(run: Callable[[int], object]) -> Callable[[int], float]:
    @torch.no_grad()
    def seconds(size: int) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            run(size)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds


def measure(model: str, setting: Setting, steps: int, turns: int) -> list[dict]:
    """Run every way in turns; return ratios of each turn to the plain way, and the fastest seconds of each phase."""
    runs: dict[str, list[dict]] = {name: [] for name in setting.ways()}
    for _ in range(turns):
        for name, way in setting.ways().items():
            runs[name].append(way())
    key = {"model": model, "batch": setting.batch, "steps": steps, "window": len(setting.window)}
    exact = runs["plain"][0]["rewards"]
    rows = [{**key, "way": name, **summary(found, runs["plain"], exact)} for name, found in runs.items()]
    print(key, {row["way"]: round(row["ratio"], 2) for row in rows}, flush=True)  # noqa: T201
    return rows


def summary(runs: list[dict], plain: list[dict], exact: np.ndarray) -> dict:
    """Return counts, seconds and ratios of a way's turns."""
    rewards = runs[0]["rewards"]
    seconds = {key: min(run[key] for run in runs) for key in (*PHASES, "wall")}
    counts = {key: runs[0][key] for key in ("evaluations", "calls", "decodes", "scored")}
    ratios = [
        sum(run[p] for p in PHASES) / sum(other[p] for p in PHASES) for run, other in zip(runs, plain, strict=True)
    ]
    rollout_ratios = [run["rollout"] / other["rollout"] for run, other in zip(runs, plain, strict=True)]
    wall_ratios = [run["wall"] / other["wall"] for run, other in zip(runs, plain, strict=True)]
    same = None if rewards.shape != exact.shape else float((rewards == exact).mean())
    measured = {"ratio": ratios, "rollout_ratio": rollout_ratios, "wall_ratio": wall_ratios}
    medians = {name: float(np.median(values)) for name, values in measured.items()}
    return {**seconds, **counts, **medians, "same_rewards": same}


def peak_memory(window: int) -> float:
    """Measure the megabytes that a sweep without a model adds: 16 trajectories, 40 steps, SD3.5's latent size."""
    latents, sigmas = torch.zeros(16, 16, 64, 64), torch.linspace(1, 0, 41)
    generators = [torch.Generator() for _ in latents]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    roll_out(
        lambda x, step, rows: 0.1 * x,
        latents,
        sigmas,
        Window(0, window, "cps", 0.7, "gaussian"),
        generators,
        batch_size=16,
    )
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure_memory() -> list[dict]:
    """Measure peak memory by K, each in a process of its own."""
    rows = []
    for window in (1, 10, 20, 30, 39):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append({"window": window, "megabytes": pool.apply(peak_memory, (window,))})
    return rows


def predict(rows: list[dict]) -> dict:
    """Fit seconds of the sweep's model calls as `a * calls + b * evaluations`, and measure the errors."""
    sweeps = [row for row in rows if row["way"] == "sweep"]
    counts = np.array([[row["calls"], row["evaluations"]] for row in sweeps], float)
    seconds = np.array([row["rollout"] for row in sweeps])
    scale = 1 / seconds[:, None]  # relative errors
    coefficients = np.linalg.lstsq(counts * scale, np.ones(len(seconds)), rcond=None)[0]
    errors = counts @ coefficients / seconds - 1
    for row, error in zip(sweeps, errors, strict=True):
        row["prediction_error"] = float(error)
    return {
        "seconds_a_call": float(coefficients[0]),
        "seconds_an_evaluation": float(coefficients[1]),
        "largest_error": float(np.abs(errors).max()),
        "median_error": float(np.median(np.abs(errors))),
        "share_within_10_percent": float((np.abs(errors) <= 0.1).mean()),
    }


def report(results: dict) -> str:
    """Return the ratios of CPU seconds, as a table in Markdown."""
    by_setting = {(r["model"], r["steps"], r["window"], r["batch"], r["way"]): r for r in results["rows"]}
    lines = [
        "| model | T | K | batch | CPU, sweep / plain | model calls alone | wall | plain / Flow-GRPO "
        "| sweep / Flow-GRPO | NFE a trajectory | decoded | scored |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, steps, window, batch, way), plain in by_setting.items():
        if way != "plain":
            continue
        sweep, flow = (by_setting[model, steps, window, batch, name] for name in ("sweep", "flow"))
        counts = " | ".join(
            f"{plain[key] // batch} -> {sweep[key] // batch}" for key in ("evaluations", "decodes", "scored")
        )
        lines.append(
            f"| {model} | {steps} | {window} | {batch} | {sweep['ratio']:.2f} | {sweep['rollout_ratio']:.2f} | "
            f"{sweep['wall_ratio']:.2f} | {1 / flow['ratio']:.1f} | {sweep['ratio'] / flow['ratio']:.1f} | {counts} |"
        )
    lines += ["", f"chunks: {results['chunks']}"]
    lines += [f"{model}: {values}" for model, values in results["prediction"].items()]
    lines += [f"K = {one['window']}: {one['megabytes']:.0f} MB" for one in results["memory"]]
    return "\n".join(lines)


def draw(results: dict, path: Path) -> None:
    """Plot ratios over the batch, and measured against predicted seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    by_setting = {(r["model"], r["steps"], r["window"], r["batch"], r["way"]): r for r in results["rows"]}
    for model in results["chunks"]:
        steps = 10 if any(p[:3] == (model, 10, 9) for p in by_setting) else max(p[1] for p in by_setting)
        batches = sorted({p[3] for p in by_setting if p[:3] == (model, steps, steps - 1)})
        for way, style in (("sweep", "-"), ("flow", ":")):
            ratios = [by_setting[model, steps, steps - 1, batch, way]["ratio"] for batch in batches]
            left.plot(batches, ratios, style, marker="o", label=f"{'Flow-GRPO' if way == 'flow' else way}, {model}")
        fit = results["prediction"][model]
        sweeps = [r for r in results["rows"] if r["model"] == model and r["way"] == "sweep"]
        predicted = [
            fit["seconds_a_call"] * r["calls"] + fit["seconds_an_evaluation"] * r["evaluations"] for r in sweeps
        ]
        right.loglog(predicted, [r["rollout"] for r in sweeps], "o", markersize=3, label=model)
    left.set(
        xscale="log", xlabel="batch", ylabel="CPU seconds / those of the plain way", ylim=(0, 1), title="T = 10, K = 9"
    )
    right.axline((1e-2, 1e-2), (1, 1), color="grey", linewidth=0.8)
    right.set(xlabel="CPU seconds predicted from calls and NFE", ylabel="measured", title="All settings")
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
