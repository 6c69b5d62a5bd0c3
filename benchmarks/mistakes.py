"""What the command line says of mistakes: a table of message, status and CPU seconds, a process each."""

import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


FILES = {
    "prompts.csv": "prompt,kind\na red circle,single\ntwo blue squares,count\n",
    "captions.csv": "captoin,kind\na red circle,single\ntwo blue squares,count\n",
    "numbers.csv": "prompt\n1\n2\n",
    "empty.txt": "\n",
    "broken.jsonl": '{"prompt": "a red circle"\n',
    "my_rewards.py": "def mine(images, **columns):\n    return [0.0] * len(images)\n\n\n"
    "def of_a_target(images, target, **columns):\n    return target\n",
    "broken_rewards.py": "import math\nscale = maths.pi\n",
    "key.yaml": "lerning_rate: 1.0e-4\n",
    "broken.yaml": "seed: [1, 2\n",
    "list.yaml": "- seed: 1\n",
    "word.yaml": "completion: true\n",
    "number.yaml": "max_steps: many\n",
    "flux1-dev-Q4_0.gguf": "GGUF",
    "weights.safetensors": "not weights",
    "folder/notes.txt": "no model",
    "used/checkpoint-5/trainer_state.json": "{}",
}
"""Files that the calls name, with their text."""

MODEL, REWARD, DATA = "--model_name_or_path testbed", "--reward_funcs brightness", "--dataset_name testbed"
SIZES = (
    "--height 32 --width 32 --max_sequence_length 0 --num_inference_steps 3 --num_generations 2 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --max_steps 1 --use_cpu --use_peft"
)
RUN = f"train {MODEL} {REWARD} {DATA} {SIZES}"
MISTAKES = {
    "trian": "there is no command 'trian': did you mean train?",
    f"{RUN} --lerning_rate 1e-4": "Unknown option --lerning_rate: did you mean --learning_rate?",
    f"{RUN} --num-generation 4": "Unknown option --num_generation: did you mean --num_generations?",
    f"{RUN} --config key.yaml": "Unknown key of a recipe lerning_rate: did you mean learning_rate?",
    f"{RUN} --config keys.yaml": "There is no recipe keys.yaml: did you mean key.yaml?",
    f"{RUN} --config broken.yaml": "The recipe broken.yaml is not valid YAML",
    f"{RUN} --config list.yaml": "The recipe list.yaml must be a mapping of options to values, got list.",
    f"{RUN} --config word.yaml": "completion must be 'exact'",
    f"{RUN} --config number.yaml": "argument --max_steps/--max-steps: invalid int value: 'many'",
    f"{RUN} --learning_rate": "argument --learning_rate/--learning-rate: expected one argument",
    f"train {REWARD} {DATA}": "--model_name_or_path is missing: a Hub id, a folder, a file, or 'testbed'.",
    f"train --model_name_or_path testbd {REWARD} {DATA}": "is not a folder, file or Hub id (owner/name): did you "
    "mean testbed?",
    f"train --model_name_or_path folder {REWARD} {DATA}": "folder is not a diffusers pipeline",
    f"train --model_name_or_path ./models/sd3.safetensors {REWARD} {DATA}": "sd3.safetensors is not a folder, file or",
    f"train --model_name_or_path flux1-dev-Q4_0.gguf {REWARD} {DATA} {SIZES}": "a single file must be .safetensors",
    f"train --model_name_or_path weights.safetensors {REWARD} {DATA} {SIZES}": "weights.safetensors",
    f"{RUN} --dtype bf16": "argument --dtype: invalid choice: 'bf16' (choose from",
    f"{RUN} --load_in_4bit": "load_in_4bit is for language models: use --quantization nf4.",
    f"{RUN} --attn_implementation eager": "use --attention_backend.",
    f"{RUN} --auto_find_batch_size true": "auto_find_batch_size is not supported by TP-GRPO",
    f"train {MODEL} {DATA}": "--reward_funcs is missing: any of ['aesthetic_score'",
    f"train {MODEL} {DATA} --reward_funcs brightnes": "No reward function 'brightnes': did you mean brightness?",
    f"train {MODEL} {DATA} --reward_funcs my_reward.mine": "No module named 'my_reward'",
    f"train {MODEL} {DATA} --reward_funcs my_rewards.py:mien": "no reward function 'mien': did you mean mine?",
    f"train {MODEL} {DATA} --reward_funcs broken_rewards.mine": "fails on import: NameError: name 'maths' is not",
    f"train {MODEL} {DATA} --reward_funcs http://127.0.0.1:9/pick_score": "127.0.0.1:9/pick_score cannot be reached",
    f"train {MODEL} {REWARD}": "--dataset_name is missing: a Hub id, a folder, a file, or 'testbed'",
    f"train {MODEL} {REWARD} --dataset_name promts.csv": "no file or folder promts.csv: did you mean prompts.csv?",
    f"train {MODEL} {REWARD} --dataset_name captions.csv": "no column 'prompt', only ['captoin', 'kind']",
    f"train {MODEL} {REWARD} --dataset_name captions.csv --prompt_column caption": "no column 'caption', only "
    "['captoin', 'kind']: did you mean captoin?",
    f"train {MODEL} {REWARD} --dataset_name numbers.csv": "'prompt' must contain strings, but has the type int64",
    f"train {MODEL} {REWARD} --dataset_name empty.txt": "empty.txt is empty",
    f"train {MODEL} {REWARD} --dataset_name broken.jsonl": "broken.jsonl cannot be read: JSON parse error",
    f"train {MODEL} {REWARD} --dataset_name my_rewards.py": "my_rewards.py must end in one of .csv, .json",
    f"train {MODEL} {REWARD} --dataset_name prompts.csv --eval_strategy steps": "no split 'test', only ['train']: "
    "hold out prompts by --test_split_size 0.1",
    f"train {MODEL} {REWARD} --dataset_name prompts.csv {SIZES} --generation_batch_size 8": "train_dataset has 2 "
    "prompts, but one rollout needs 4",
    f"{RUN} --credit turningpoint": "got 'turningpoint': did you mean turning_point?",
    f"{RUN} --credit my_rule.mine": "The module of the credit 'my_rule.mine' cannot be imported",
    f"{RUN} --credit my_rewards.py:mien": "has no credit 'mien': did you mean mine?",
    f"{RUN} --credit my_rewards.py:mine": "my_rewards.mine must be a function of (rewards, rule), not a class",
    f"{RUN} --policy_class my_rewards.mine": "policy_class must be a subclass of trl_tpgrpo.policies.base.FlowPolicy",
    f"{RUN} --noise_level 0": "noise_level must be at least 0.0001, got 0.0.",
    f"{RUN} --learning_rate nan": "learning_rate must be a finite number (at least 0), got nan.",
    f"{RUN} --adam_beta2 1": "adam_beta2 must be at least 0 and below 1, got 1.0.",
    f"{RUN} --beta 0 1": "--beta accepts one value, got 2: 0 1.",
    f"{RUN} --lr_scheduler_kwargs steps": "lr_scheduler_kwargs must be a dict, or one in JSON",
    f"{RUN} --seed 1.5": "argument --seed: invalid int value: '1.5'",
    f"{RUN} --bf16 maybe": "argument --bf16",
    f"{RUN} --generation_batch_size 10": "must be a multiple of per_device_train_batch_size x processes (4).",
    f"{RUN} --reward_weights 1 2": "reward_weights has 2 entries for 1 reward functions.",
    f"{RUN} --lora_dropout 0.1": "peft_config.lora_dropout must be 0, got 0.1",
    f"{RUN} --output_dir nothing --resume_from_checkpoint true": "there is none (output_dir: nothing).",
    f"{RUN} --output_dir used": "used has checkpoints of an earlier run (checkpoint-5): resume it by",
    f"{RUN} --resume_from_checkpoint out/checkpoint-5": "out/checkpoint-5: there is none",
    "sample --model_name_or_path testbed": "There is no prompt: use --prompt or --prompts_file.",
    "sample --model_name_or_path testbed --prompt x --adapter folder": "folder has neither a LoRA",
    "sample --model_name_or_path testbed --prompt x --adapter foldr": "there is no folder foldr: did you mean folder?",
    f"plan {MODEL} --dataset_name prompts.csv {SIZES} --generation_batch_size 8": "The dataset has 2 prompts, but one "
    "rollout needs 4.",
    f"{RUN} --dataset_name captions.csv --prompt_column captoin --reward_funcs my_rewards.of_a_target": "missing a "
    "required argument: 'target': the dataset has prompts and the columns ['kind'].",
    f"plan {MODEL} {SIZES} --gpu large": "--gpu must be one of 3090, 4090, 5090",
    "serve-reward --reward_funcs brightnes": "No reward function 'brightnes': did you mean brightness?",
}
"""Calls as users type them, with a part of what they are told."""


def write_files(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def main() -> None:
    print(f"`train ...` is `{RUN}`.\n\n| call | message | status | CPU seconds |\n|---|---|---|---|")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        for call in MISTAKES:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-m", "trl_tpgrpo", *shlex.split(call)]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            after, message = resource.getrusage(resource.RUSAGE_CHILDREN), run.stderr.strip().splitlines()[-1]
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            shown = call.replace(RUN, "train ...")
            print(f"| `{shown}` | {message} | {run.returncode} | {seconds:.1f} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
