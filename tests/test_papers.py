"""Each config on the page of papers trains: two updates of a tiny model, with its own schedule, SDE and loss."""

import re
from math import inf, isfinite
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, Block, blocks
from test_trainer import brightness, logged, lora, prompts
from tiny import tiny_flux, tiny_sd3

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer


PAGE = ROOT / "docs/papers.md"
METHODS = [
    "Flow-GRPO", "Flow-GRPO-Fast", "DanceGRPO", "Flow-CPS", "MixGRPO", "TP-GRPO", "DenseGRPO", "Stepwise-Flow-GRPO",
    "GCPO", "Flow-DPPO", "GRPO-Guard", "GDPO",
]  # fmt: skip
TINY = {  # nothing but sizes: SDE, credit, loss and rates are the page's
    "use_cpu": True, "fp16": False, "height": 32, "width": 32, "max_sequence_length": 8, "num_generations": 2,
    "generation_batch_size": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2,
    "activation_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def sections() -> dict[str, str]:
    parts = re.split(r"^### (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def redness(images: list[Any], **columns: object) -> list[float]:
    return [float(image.getpixel((8, 8))[0]) for image in images]


def test_every_method_has_its_source_and_a_config() -> None:
    found = sections()
    assert list(found) == METHODS
    for name, text in found.items():
        assert re.search(r"^\*\*(Paper|Source)\*\*: ", text, re.MULTILINE), name
        assert "```python" in text and "What differs" in text, name
    table = re.findall(r"^\| \[(.+?)\]", PAGE.read_text(), re.MULTILINE)
    assert table == METHODS


@pytest.mark.parametrize("block", blocks(PAGE, "python"), ids=str)
def test_config_of_a_paper_trains(block: Block, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"TPGRPOConfig": TPGRPOConfig}
    exec(block.text, namespace)
    settings = namespace["args"].given | TINY | {"output_dir": str(tmp_path)}
    if "noise_calibration_iterations" in settings:
        settings["noise_calibration_iterations"] = 1
    above = PAGE.read_text().split(block.text)[0].split("\n\n")[-2]  # the paragraph that says which model
    trainer = TPGRPOTrainer(
        model=tiny_flux() if "FLUX.1-dev" in above else tiny_sd3(),
        reward_funcs=[brightness, redness],
        args=TPGRPOConfig(**settings),
        train_dataset=prompts(),
        peft_config=None if "all weights" in above else lora(),
    )
    trainer.train()
    assert trainer.state.global_step == len(logged(trainer, "loss")) == 2
    assert all(isfinite(loss) for loss in logged(trainer, "loss"))
    assert all(0 < norm < inf for norm in logged(trainer, "grad_norm"))  # also the second, which is off policy
