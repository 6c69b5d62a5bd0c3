"""What real models take: peak memory and seconds of each phase, NFE a second and FLOP utilisation.

Builds the true architecture of FLUX.1-dev or SD3.5-medium with random weights, saves it, and for each base (bf16, nf4,
int8, fp8; each also compiled) loads and trains it in a process of its own, through the trainer, with the settings of a
recipe and fewer prompts. Memory and time do not depend on what weights say. Results go to benchmarks/results/.

    python benchmarks/gpu.py --quick  # both models in eight minutes on one card of 80 GB, in smaller groups
    python benchmarks/gpu.py --model flux.1-dev --machine 1x80gb --bases bf16 nf4 int8 --compile no yes
    # the same on a CPU: one narrow layer, small images, float32
    python benchmarks/gpu.py --model sd3.5-medium --reduced --bases bf16 int8

FLOPs are those that the mathematics takes, counted on the architecture as `trl-tpgrpo plan` counts them: of an
evaluation; of a transition under LoRA twice that, under full training three times; of the reference's, once. What
activation checkpointing computes again is not counted. Utilisation is relative to a large matrix product in the same
process.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer, T5TokenizerFast
from trl import get_peft_config

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.commands.architectures import FOLDERS, load_architecture
from trl_tpgrpo.commands.hours import GIB, Flops, count_flops
from trl_tpgrpo.commands.plan import PlannedConfig, PlannedModel, estimate
from trl_tpgrpo.commands.train import make_parser
from trl_tpgrpo.policies.base import FlowPolicy
from trl_tpgrpo.policies.embeddings import PromptEmbeddings
from trl_tpgrpo.policies.loading import build_policy, run_dtype


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples/recipes"
ARCHITECTURES = {folder.name: folder for folder in FOLDERS.values()}
BASES = ("bf16", "nf4", "int8", "fp8")
REDUCED = {"num_layers": 1, "num_single_layers": 1, "num_hidden_layers": 1, "dual_attention_layers": [0],
           "num_attention_heads": 4, "caption_projection_dim": 256, "vocab_size": 512, "d_ff": 1024,
           "block_out_channels": [32] * 4, "layers_per_block": 1}  # fmt: skip
SMALL = {"height": 64, "width": 64, "num_generations": 4, "per_device_train_batch_size": 2, "max_sequence_length": 32,
         "num_inference_steps": 3, "sde_window_size": None, "completion": "exact", "use_cpu": True,
         "bf16": False}  # fmt: skip
ROOM = 48 * 2**30
"""Bytes for the weights of FLUX.1-dev with its text encoders, 34 GB, and what drawing them takes."""

QUICK_SECONDS = 480
QUICK = [
    ("sd3.5-medium", "1x80gb", "bf16", False),
    ("flux.1-dev", "1x24gb", "nf4", False),
    ("flux.1-dev", "1x80gb", "bf16", False),
    ("flux.1-dev", "1x80gb", "bf16", True),
    ("sd3.5-medium", "1x80gb", "bf16", True),
]
"""Model, machine of the recipe (`1x24gb` has 8-bit Adam), base, compiled; what time may run out for comes last."""
QUICK_SETTINGS = {"num_generations": 4, "per_device_train_batch_size": 4}

ROLLOUTS = 2
"""The last is measured; the one before it warms up and compiles."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(ARCHITECTURES), default="flux.1-dev", help="(default: %(default)s)")
    parser.add_argument("--machine", default="1x80gb", help="of the recipe (default: %(default)s)")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["bf16", "nf4"], help="(default: %(default)s)")
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no"], help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="both models in groups of 4, in at most eight minutes")
    parser.add_argument("--prompts", type=int, default=1, help="a rollout, of a group of images each (default: 1)")
    parser.add_argument("--reduced", action="store_true", help="a narrow layer and small images in float32, for a CPU")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="of trl-tpgrpo train, over the recipe's"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results", help="folder (default: %(default)s)"
    )
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run_variant(args, **json.loads(args.variant))))  # noqa: T201
        return
    variants = [(args.model, args.machine, base, c == "yes") for base in args.bases for c in args.compile]
    if args.quick:  # on a CPU diffusers refuses NF4, and compiling takes minutes
        variants = [case for case in QUICK if not args.reduced or case[2:] == ("bf16", False)]
    end = time.monotonic() + QUICK_SECONDS if args.quick else None
    rows = [row for _, cases in groupby(variants, lambda case: case[0]) for row in rows_of_a_model(args, cases, end)]
    results = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), **machine(), "rows": rows}
    name = "gpu_quick" if args.quick else f"gpu_{args.model}"
    (args.results / f"{name}.json").write_text(json.dumps(results, indent=1))
    print(report(results))  # noqa: T201


def rows_of_a_model(args: argparse.Namespace, cases: Iterable[tuple], end: float | None) -> list[dict]:
    """Build a model, save it, and try its variants one after another, until the monotonic clock says `end`."""
    names, cases = ("model", "machine", "base", "compiled"), list(cases)
    with tempfile.TemporaryDirectory() as folder:
        build_pipeline(cases[0][0], args.reduced).save_pretrained(folder)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the variants are processes of their own
        return [in_a_process(args, {**dict(zip(names, case, strict=True)), "folder": folder}, end) for case in cases]


def in_a_process(args: argparse.Namespace, variant: dict, end: float | None) -> dict:
    """The result of a variant, or what it failed with, which must not keep the others from running."""
    command = [sys.executable, *sys.argv, "--variant", json.dumps(variant)]
    if "--options" in command:  # takes all that follows it
        place = command.index("--options")
        command = [*command[:place], "--variant", json.dumps(variant), *command[place:-2]]
    shown = {name: value for name, value in variant.items() if name != "folder"}
    left = None if end is None else max(end - time.monotonic(), 0.0)
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {**shown, "failed": "out of time"}
    if run.returncode:
        return {**shown, "failed": f"exit status {run.returncode}, see the output above"}
    return {**shown, **json.loads(run.stdout.splitlines()[-1]), "planned_gib": planned(args, **variant)}


def machine() -> dict:
    """Where this runs, and on what versions."""
    packages = ("torch", "diffusers", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "torchao")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"device": device, "versions": {name: version(name) for name in packages}}


# ------------------------------------------------------------------------------------------------------- the models


def build_pipeline(model: str, reduced: bool) -> DiffusionPipeline:
    """The architecture with random weights in bfloat16 and tokenizers that know letters."""
    folder = ARCHITECTURES[model]
    with tempfile.TemporaryDirectory() as copied:
        if reduced:
            folder = shutil.copytree(folder, Path(copied) / model)
            for part in folder.glob("*/config.json"):
                config = json.loads(part.read_text())
                part.write_text(json.dumps(config | {key: REDUCED[key] for key in REDUCED.keys() & config.keys()}))
        with torch.device(builder()):
            return load_architecture(folder, torch.bfloat16, **tokenizers(folder))


def builder() -> str:
    """Where random weights are drawn: on a GPU in seconds, if it holds them all, else on the CPU in minutes."""
    has_room = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > ROOM
    return "cuda" if has_room else "cpu"


def tokenizers(folder: Path) -> dict[str, object]:
    index = json.loads((folder / "model_index.json").read_text())
    makers = {"CLIPTokenizer": clip_tokenizer, "T5TokenizerFast": t5_tokenizer}
    return {name: makers[part[1]]() for name, part in index.items() if name.startswith("tokenizer")}


def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    return T5TokenizerFast(vocab=special + [(letter, -1.0) for letter in letters], extra_ids=0)


# ------------------------------------------------------------------------------------------------------ the variants


def run_variant(args: argparse.Namespace, model: str, machine: str, base: str, compiled: bool, folder: str) -> dict:
    """Train for `ROLLOUTS` rollouts and say what the last one took."""
    phases = Phases()
    model_args, config = settings(args, model, machine, base, compiled)
    dataset = Dataset.from_dict({"prompt": [f"a {letter}" for letter in "abcdefghijklmnop"[: args.prompts]]})
    PromptEmbeddings.precompute = phases.measuring("precompute", PromptEmbeddings.precompute)
    with phases.measure("load"):
        trainer = TPGRPOTrainer(folder, brightness, config, dataset, peft_config=get_peft_config(model_args))
    trainer._metrics["train"].seconds = phases.recording(trainer._metrics["train"].seconds)
    trainer.train()
    phases.peaks["encode"] = phases.peaks.pop("precompute")  # not the look-ups, with the transformer beside them
    last = [entry for entry in trainer.state.log_history if "seconds/train" in entry][-updates_of(config) :]
    seconds = {
        phase: sum(entry.get(f"seconds/{phase}", 0.0) for entry in last)
        for phase in ("rollout", "decode", "score", "train")
    }
    counts = {name: sum(entry.get(name, 0.0) for entry in last) for name in ("nfe", "nfe_train")}
    flops = flops_on_meta(folder, trainer.policy, config_uses_lora(model_args))
    transitions, available = config.generation_batch_size * config.num_sde_steps, matmul_flops(config.device)
    of_training = transitions * flops.transition + (counts["nfe_train"] - transitions) * flops.evaluation
    return {
        "seconds": seconds,
        "peak_gib": phases.peaks,
        "ratio_deviation_before_the_first_update": trainer.state.log_history[0]["ratio/max_deviation"],
        **counts,
        "evaluations_per_second": counts["nfe"] / seconds["rollout"],
        "tflops_of_an_evaluation": flops.evaluation / 1e12,
        "matmul_tflops_per_second": available / 1e12,
        "rollout_utilisation": counts["nfe"] * flops.evaluation / seconds["rollout"] / available,
        "train_utilisation": of_training / seconds["train"] / available,
        "loss_is_finite": all(np.isfinite(entry["loss"]) for entry in last),
        "settings": {name: getattr(config, name) for name in (
            "height", "num_inference_steps", "num_generations", "optim", "per_device_train_batch_size",
            "generation_batch_size", "activation_checkpointing", "beta",
        )},
    }  # fmt: skip


def settings(
    args: argparse.Namespace, model: str, machine: str, base: str, compiled: bool, kind: type = TPGRPOConfig
) -> tuple:
    """Of the recipe, but for what a variant and the number of prompts change."""
    recipe: dict = {}
    for name in (model, f"{model}_{machine}"):
        recipe |= yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    recipe |= {"quantization": None if base == "bf16" else base, "prompt_embeds_dir": None}
    recipe |= {"compile_backend": "inductor" if compiled else None, "save_strategy": "no", "disable_tqdm": True}
    recipe |= QUICK_SETTINGS if args.quick else {}
    recipe |= SMALL if args.reduced else {}
    recipe |= {"generation_batch_size": args.prompts * recipe["num_generations"], "report_to": "none"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in recipe.items() if value is not None}))
        arguments = ["--config", str(path), "--output_dir", str(Path(folder) / "run"), *args.options]
        parser = make_parser()
        if kind is PlannedConfig:  # which has a field more
            parser.dataclass_types[-1] = kind
            parser.set_defaults(num_processes=1)
        parsed = parser.parse_args_and_config(arguments, fail_with_unknown_args=False)
    config = parsed[3]
    dtype = "float32" if args.reduced else "bfloat16"  # a CPU without products in bfloat16 takes ten minutes for them
    config.model_init_kwargs = {"dtype": dtype}
    config.max_steps = ROLLOUTS * updates_of(config)
    return parsed[1], config


def planned(args: argparse.Namespace, folder: str, **variant: object) -> dict[str, float]:
    """What `trl-tpgrpo plan` says of each phase, in GiB, but for CUDA's own, which is not PyTorch's to count."""
    model_args, config = settings(args, **variant, kind=PlannedConfig)
    memory = estimate(config, PlannedModel(Path(folder), config, get_peft_config(model_args), run_dtype(config)))
    return {phase: (sum(items.values()) - items["CUDA context"]) / GIB for phase, items in memory.items()}


def updates_of(config: TPGRPOConfig) -> int:
    return config.steps_per_generation * config.num_iterations // config.gradient_accumulation_steps


def config_uses_lora(model_args: object) -> bool:
    return get_peft_config(model_args) is not None


def brightness(images: list, **columns: object) -> list[float]:
    return [float(np.asarray(image, dtype=np.float32).mean() / 255) for image in images]


class Phases:
    """Peak memory of each phase: GiB allocated on the GPU; without one, of the process so far."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        yield
        self.peaks[phase] = max(self.peaks[phase], peak_bytes() / 2**30)

    def measuring(self, phase: str, function: Callable) -> Callable:
        """`function` with its peak measured."""

        def measured(*args: object, **kwargs: object) -> object:
            with self.measure(phase):
                return function(*args, **kwargs)

        return measured

    def recording(self, seconds: object) -> object:
        """`Metrics.seconds`, which marks the phases of a run, with their peaks measured."""

        @contextmanager
        def both(phase: str) -> Iterator[None]:
            with self.measure(phase), seconds(phase):
                yield

        return both


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops_on_meta(folder: str, policy: FlowPolicy, is_adapter: bool) -> Flops:
    """Of the policy's architecture without its weights, and without what checkpointing computes again."""
    with torch.device("meta"):
        pipeline = load_architecture(folder, scheduler=policy.pipeline.scheduler)
        like = build_policy(pipeline, policy.guidance)
    like.device = torch.device("cpu")
    return count_flops(like, is_adapter, recomputes=False)


def matmul_flops(device: torch.device) -> float:
    """FLOPs a second of the best of some matrix products in bfloat16 (float32 on a CPU)."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        if cuda:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def report(results: dict) -> str:
    """A row for each variant, in Markdown; memory as measured and, after the stroke, as planned."""
    phases = ("encode", "rollout", "decode", "train")
    columns = [
        "model", "base", "compiled", *(f"GiB: {phase}" for phase in phases), "seconds: rollout", "decode", "train",
        "NFE/s", "utilisation: rollout", "train", "ratio - 1",
    ]  # fmt: skip
    rows = [columns, ["---"] * len(columns)]
    for row in results["rows"]:
        shown = [row["model"], row["base"], "yes" if row["compiled"] else "no"]
        if "failed" in row:
            rows.append([*shown, row["failed"]])
            continue
        shown += [f"{row['peak_gib'][phase]:.1f} / {row['planned_gib'][phase]:.1f}" for phase in phases]
        shown += [f"{row['seconds'][phase]:.1f}" for phase in ("rollout", "decode", "train")]
        shown += [f"{row['evaluations_per_second']:.2f}", f"{row['rollout_utilisation']:.0%}"]
        shown += [f"{row['train_utilisation']:.0%}", f"{row['ratio_deviation_before_the_first_update']:.1e}"]
        rows.append(shown)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{results['device']}, {results['date']}; memory as measured / planned\n\n{table}"


if __name__ == "__main__":
    main()
