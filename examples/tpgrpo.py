# /// script
# requires-python = ">=3.11"
# dependencies = ["peft>=0.19.1", "trl-tpgrpo[testbed]"]
#
# [tool.uv.sources]
# trl-tpgrpo = { path = ".." }
# ///
"""TurningPoint-GRPO in one script, on the bundled toy model. For SD3.5 or FLUX.1-dev change MODEL, SIZE and reward.

python examples/tpgrpo.py                      # one device
accelerate launch examples/tpgrpo.py           # several devices
uv run examples/tpgrpo.py                      # in a clone: uv installs this package and what it needs

On Hugging Face Jobs: the wheel, which `make package` builds, is uploaded to /data with the script.

hf jobs uv run --flavor l4x1 --env UV_NO_SOURCES=1 --env UV_FIND_LINKS=/data examples/tpgrpo.py dist/*.whl
"""

from peft import LoraConfig

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


MODEL, SIZE = TESTBED, PIPELINE_KWARGS  # or "stabilityai/stable-diffusion-3.5-medium", {"height": 512, "width": 512}

trainer = TPGRPOTrainer(
    model=MODEL,
    reward_funcs=shapes_reward,  # any function (images, prompts, **columns) -> list of numbers
    args=TPGRPOConfig(
        output_dir="outputs/tpgrpo",
        guidance_scale=1.0,  # for the toy model; leave it out for the default of another model
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        max_steps=10,
        **SIZE,
    ),
    train_dataset=prompt_dataset("train"),  # any dataset with a column "prompt"
    peft_config=LoraConfig(r=32, lora_alpha=64),
)
trainer.train()
trainer.save_model()  # load the adapter with pipeline.load_lora_weights("outputs/tpgrpo")
