"""HPSv3 (arXiv 2508.03789), served from an environment of its own, as its package pins transformers 4.45.2.
In a clone of this repository:

    pip install hpsv3 matplotlib tensorboard starlette uvicorn  # the package does not name the middle two
    PYTHONPATH=examples/rewards python -m trl_tpgrpo.rewards.serving \
        --reward_funcs hps_v3.HPSv3 --device cuda:0 --port 8000
    trl-tpgrpo train ... --reward_funcs http://127.0.0.1:8000/hps_v3
"""

import torch
from hpsv3 import HPSv3RewardInferencer


class HPSv3:
    __name__, batch_size = "hps_v3", 8

    def __init__(self):
        self.scorer = HPSv3RewardInferencer(device="cpu")

    def to(self, device):
        self.scorer.model.to(device)
        self.scorer.device = device

    @torch.inference_mode()
    def __call__(self, images, prompts, **columns):
        # By name, as the package and its repository have them in different orders.
        return self.scorer.reward(image_paths=images, prompts=prompts)[:, 0].float().tolist()
