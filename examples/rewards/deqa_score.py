"""DeQA-Score (arXiv 2501.11561), served from an environment of its own, as its code needs transformers 4.36.1.
In a clone of this repository:

    pip install transformers==4.36.1 "numpy<2" torch accelerate sentencepiece protobuf icecream starlette uvicorn
    DEQA_REVISION=commit PYTHONPATH=examples/rewards python -m trl_tpgrpo.rewards.serving \
        --reward_funcs deqa_score.DeQAScore --port 8001
    trl-tpgrpo train ... --eval_reward_funcs http://127.0.0.1:8001/deqa_score

The model's code comes from the Hub and is executed: read it, then name the commit that you have read.
"""

import os

import torch
from transformers import AutoModelForCausalLM


class DeQAScore:
    __name__, batch_size = "deqa_score", 8

    def __init__(self):
        options = {"attn_implementation": "eager", "torch_dtype": torch.float16, "device_map": "auto"}
        commit = {"revision": os.environ["DEQA_REVISION"], "trust_remote_code": True}
        self.model = AutoModelForCausalLM.from_pretrained("zhiyuanyou/DeQA-Score-Mix3", **commit, **options)

    @torch.inference_mode()
    def __call__(self, images, prompts, **columns):
        return self.model.score(images).float().tolist()
