"""TurningPoint-GRPO in one script, on the bundled toy model.

For SD3.5 or FLUX.1-dev, change MODEL, SIZE and the reward.

python examples/tpgrpo.py                          # one device
accelerate launch examples/tpgrpo.py               # several
"""

from peft import LoraConfig

from trl_tpgrpo import TPGRPOConfig, TPGRPOTrainer
from trl_tpgrpo.testbed import PIPELINE_KWARGS, TESTBED, prompt_dataset
from trl_tpgrpo.testbed.checker import shapes_reward


MODEL, SIZE = TESTBED, PIPELINE_KWARGS  # or "stabilityai/stable-diffusion-3.5-medium", {"height": 512, "width": 512}

trainer = TPGRPOTrainer(
    model=MODEL,
    reward_funcs=shapes_reward,  # any function (images, prompts, **columns) -> one number per image
    args=TPGRPOConfig(
        output_dir="outputs/tpgrpo",
        guidance_scale=1.0,  # no guidance for the toy model; the defaults are 4.5 for SD3.5 and 3.5 for FLUX.1-dev
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
trainer.save_model()  # then: pipeline.load_lora_weights("outputs/tpgrpo")
