"""UnifiedReward 2.0 (arXiv 2503.05236) behind vLLM: the mean of alignment, coherence and style. docs/rewards.md says
where the question is that it was trained on, which the file of UNIFIED_REWARD_TEMPLATE has, with {prompt} in it.

    pip install '.[judge]'  # in a clone of this repository, as what follows
    vllm serve CodeGoat24/UnifiedReward-2.0-qwen-7b --served-model-name UnifiedReward --port 8080
    UNIFIED_REWARD_TEMPLATE=question.txt trl-tpgrpo train ... \
        --reward_funcs examples/rewards/unified_reward.py:UnifiedReward
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI, OpenAIError

from trl_tpgrpo.rewards import RewardUnavailable
from trl_tpgrpo.rewards.remote import base64_png


LINE = re.compile(r"(Alignment|Coherence|Style) Score \(1-5\): *(5(?:\.0+)?|[1-4](?:\.\d+)?)(?![.\d])")


class UnifiedReward:
    __name__, runs_in = "unified_reward", "thread"

    def __init__(self, base_url="http://127.0.0.1:8080/v1"):
        path = os.environ.get("UNIFIED_REWARD_TEMPLATE", "")
        self.template = Path(path).read_text() if Path(path).is_file() else ""
        if "{prompt}" not in self.template:
            raise ValueError(f"UNIFIED_REWARD_TEMPLATE must name a file with {{prompt}} in it, got {path!r}.")
        self.client = OpenAI(base_url=base_url, api_key="none")

    def check_available(self):
        try:
            self.client.models.list()
        except OpenAIError as error:
            raise RewardUnavailable(f"No UnifiedReward at {self.client.base_url}: {error}") from error

    def __call__(self, images, prompts, **columns):
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self.score, images, prompts))

    def score(self, image, prompt):
        shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_png(image)}"}}
        content = [shown, {"type": "text", "text": self.template.replace("{prompt}", prompt)}]
        asked = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 256}
        said = self.client.chat.completions.create(model="UnifiedReward", **asked).choices[0].message.content
        scores = dict(LINE.findall(said or ""))
        if len(scores) != 3:
            raise ValueError(f"UnifiedReward said {said!r:.300}, without its three scores.")
        return sum(map(float, scores.values())) / 3
