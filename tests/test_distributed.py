"""Two processes train as one does at the same global batch."""

import json
from pathlib import Path

import torch
from processes import CPU, LAUNCH, run_python


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from test_trainer import build, prompts, trained
from test_trainer_cost import coarse

out, world, options = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1)), json.loads(sys.argv[2])
shown = {"report_to": "tensorboard", "log_images_steps": 1, "log_completions": True} if world > 1 else {}
trainer = build(
    out / "run", max_steps=4, num_generations=4, per_device_train_batch_size=12 // world, steps_per_generation=2,
    gradient_accumulation_steps=1, sde_window_range=[0, 3], optim="sgd", eval_dataset=prompts(4),
    num_generations_eval=2, per_device_eval_batch_size=4, reward_funcs=coarse, **options, **shown,
)
if world > 1:
    trainer.evaluate()  # must not keep the gradients from being exchanged
trainer.train()
torch.save((trained(trainer), trainer.state.log_history), out / f"{world}-{os.environ.get('RANK', 0)}.pt")
"""


OPTIONS = {"beta": 0.0, "learning_rate": 4.0, "sde_window_share": 0.9, "completion": "at_2"}
OPTIONS |= {"noise_calibration_iterations": 2, "noise_calibration_step": 0.1}


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    """Under DDP, with transitions left out, unevenly, calibrated noise, and a measured window.

    test_sharded.py has the other cases. Groups of 4 straddle the processes' micro-batches of 6.

    Gradients are sums in another order and batches of another size, so weights agree to float32 rounding: 1e-5 of
    updates of 1e-3, with plain SGD, whose steps are proportional to the gradients. Rewards come in steps, as rounding
    moves single pixels by a 255th. Two processes also send pictures and print samples, on the main process alone,
    which changes nothing.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for launch in ([], LAUNCH):
        ended = run_python(*launch, script, tmp_path, json.dumps(OPTIONS), cwd=tmp_path, env=CPU)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("Samples of update 1:") == 1 and ended.stdout.count("finished after update 4") == 1
    assert len(list(tmp_path.rglob("events.out*"))) == 1
    saved = {name: torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("1-0", "2-0", "2-1")}
    (one, history), (first, other_history), (second, _) = saved.values()
    assert max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name) > 1e-3
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)
    for metric in ("reward", "nfe", "turning_points/rate", "advantages/frac_zero"):
        values = [[entry[metric] for entry in entries if metric in entry] for entries in (history, other_history)]
        assert len(values[0]) >= 2
        torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]), rtol=0, atol=1e-5)
    left_out = [entry["advantages/frac_zero"] for entry in history if "advantages/frac_zero" in entry]
    assert min(left_out) > 0.1
