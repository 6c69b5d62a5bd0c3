"""Soft-TIFA by a judge, and the rewards of `examples/rewards`: servers and packages stand in for the real ones."""

import asyncio
import importlib
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from loopback import Reply, as_json, scripted, serving
from test_judge import ask, completion, shade, short_pauses  # noqa: F401  # a fixture is among them

from trl_tpgrpo.commands.rewards import load_reward
from trl_tpgrpo.rewards import RewardUnavailable
from trl_tpgrpo.rewards.judge import NUMBERS, VLMJudge, VLMJudgeError
from trl_tpgrpo.rewards.remote import RemoteReward
from trl_tpgrpo.rewards.serving.functions import find_function


EXAMPLES = Path(__file__).parents[1] / "examples"
PAIRS = [["How many cups are in the image?", "four"], ["Is the cup red?", "Yes"], ["Is the cup left?", "Yes"]]
PUBLISHED = {"prompt": "four red cups", "atom_count": 3, "vqa_list": PAIRS, "skills": ["count", "attribute", "object"]}
QUESTIONS = [{"question": text, "answer": answer.lower()} for text, answer in PAIRS]
TOKENS = {
    "How many": {"four": 0.5, " 4": 0.2, "Four": 0.1, "three": 0.1},
    "red": {"Yes": 0.6, " yes": 0.1, "No": 0.3},
    "left": {"No": 0.9, "yes": 0.05},
}
PROBABILITIES = [0.8, 0.7, 0.05]


def with_logprobs(tokens: dict[str, float]) -> Reply:
    first = max(tokens, key=tokens.__getitem__)
    likely = [{"token": one, "logprob": math.log(chance), "bytes": None} for one, chance in tokens.items()]
    content = [{"token": first, "logprob": math.log(tokens[first]), "bytes": None, "top_logprobs": likely}]
    choice = {"index": 0, "message": {"role": "assistant", "content": first}, "finish_reason": "length"}
    return as_json({"choices": [choice | {"logprobs": {"content": content}}]})


def by_question(request: dict[str, Any], number: int) -> Reply:
    body = request["body"]
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0, True, 20)
    assert "response_format" not in body
    text = body["messages"][0]["content"][1]["text"]
    return with_logprobs(next(tokens for word, tokens in TOKENS.items() if word in text))


@pytest.mark.parametrize(
    ("template", "expected"),
    [("soft_tifa_am", sum(PROBABILITIES) / 3), ("soft_tifa_gm", math.prod(PROBABILITIES) ** (1 / 3))],
)
def test_soft_tifa_is_the_mean_probability_of_the_right_answers(template: str, expected: float) -> None:
    with scripted(by_question) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", template)
        scores = ask(judge, [shade(0)] * 3, questions=[QUESTIONS, None, ["Is it red?"]])
    assert judge.__name__ == f"vlm_{template}"
    assert scores == [pytest.approx(expected, rel=1e-12), None, pytest.approx(0.7, rel=1e-12)]


def test_an_answer_that_is_not_among_the_likely_ones_has_no_probability() -> None:
    with scripted(lambda *_: with_logprobs({"No": 1.0})) as server:
        for template, expected in (("soft_tifa_am", 0.5), ("soft_tifa_gm", 0.0)):
            questions = ["Is it red?", {"question": "Is it blue?", "answer": "no"}]
            assert ask(VLMJudge(server.url, "m", template), [shade(0)], questions=[questions]) == [expected]
    assert [NUMBERS.index(word) for word in ("zero", "one", "seven", "ten")] == [0, 1, 7, 10]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (completion("Yes"), "sent no `logprobs` for the first token.*Does the server support `logprobs`?"),
        (with_logprobs({"<think>": 0.9, "Yes": 0.1}), "it starts with '<think>', not a word: does the model"),
        (with_logprobs({"Yes": 0.9, "yes": 0.9}), "its first token sum up to 1.8"),
    ],
)
def test_a_server_without_probabilities_is_an_error_and_never_a_hard_answer(reply: Reply, message: str) -> None:
    with scripted(lambda *_: reply) as server, pytest.raises(VLMJudgeError, match=message):
        ask(VLMJudge(server.url, "m", "soft_tifa_gm", num_retries=1), [shade(0)], questions=[["Red?"]])


def test_wrong_questions_and_arguments_are_refused() -> None:
    judge = VLMJudge("http://127.0.0.1:1/v1", "m", "soft_tifa_am")
    with pytest.raises(ValueError, match="vlm_soft_tifa_am needs the column 'questions'"):
        ask(judge, [shade(0)])
    for wrong in ({"question": "Red?", "answer": ""}, {"question": "Red?", "answer": "dark red"}, PAIRS[0]):
        with pytest.raises(ValueError, match="The column 'questions' has .* in row 0"):
            ask(judge, [shade(0)], questions=[[wrong]])
    with pytest.raises(ValueError, match="max_tokens has no effect on soft_tifa_gm"):
        VLMJudge("http://127.0.0.1:1/v1", "m", "soft_tifa_gm", max_tokens=512)


def test_the_published_file_becomes_a_dataset_that_a_judge_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "datasets"))
    write, source = importlib.import_module("geneval2").main, tmp_path / "geneval2_data.jsonl"
    source.write_text(2 * f"{json.dumps(PUBLISHED)}\n")
    monkeypatch.setattr("sys.argv", ["geneval2.py", "--source", str(source), "--output_dir", str(tmp_path / "data")])
    write()
    rows = load_dataset(str(tmp_path / "data"))["test"]
    assert rows[0] == {"prompt": "four red cups", "questions": QUESTIONS, "atom_count": 3} and len(rows) == 2
    with scripted(by_question) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", "soft_tifa_am")
        score = ask(judge, [shade(0)], prompts=rows["prompt"][:1], **{name: rows[name][:1] for name in ("questions",)})
    assert score == [pytest.approx(sum(PROBABILITIES) / 3)]
    source.write_text(json.dumps({**PUBLISHED, "vqa_list": []}))
    with pytest.raises(ValueError, match="Line 1 has not GenEval 2's keys"):
        write()


# ---------------------------------------------------------------------------------------------------- examples/rewards


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES / "rewards"))
    return find_function


def served(function: Callable[..., Any], name: str) -> list[float]:
    with serving(function) as server:
        reward = RemoteReward(f"http://127.0.0.1:{server.port}", name)
        return asyncio.run(reward([shade(level) for level in (0, 100)], ["one", "three"]))


class Inferencer:
    """HPSv3's, as far as it is called: two numbers an image, of which the first is the score."""

    def __init__(self, device: str):
        self.device, self.model = device, torch.nn.Linear(1, 1)

    def reward(self, *, image_paths: list, prompts: list[str]) -> torch.Tensor:
        assert torch.is_inference_mode_enabled() and self.device == "cpu"
        scores = [image.getpixel((0, 0))[0] + len(text) for image, text in zip(image_paths, prompts, strict=True)]
        return torch.tensor([[float(score), -1.0] for score in scores], dtype=torch.bfloat16)


def test_hps_v3_is_served(example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hpsv3", types.SimpleNamespace(HPSv3RewardInferencer=Inferencer))
    reward = example("hps_v3.HPSv3")()
    reward.to("cpu")
    assert served(reward, "hps_v3") == [3.0, 105.0]


def test_deqa_score_is_served(example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, revision: str, trust_remote_code: bool, **options: Any) -> Any:
        assert (name, revision, trust_remote_code) == ("zhiyuanyou/DeQA-Score-Mix3", "abc", True)
        assert options["torch_dtype"] == torch.float16
        return types.SimpleNamespace(score=lambda images: torch.tensor([1.5, 4.5][: len(images)]).half())

    monkeypatch.setenv("DEQA_REVISION", "abc")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    assert served(example("deqa_score.DeQAScore")(), "deqa_score") == [1.5, 4.5]


def test_unified_reward_asks_with_the_users_template(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = "Alignment Score (1-5): 2.5\nCoherence Score (1-5): 3.000{0}\nStyle Score (1-5): 5"
    said = iter([lines.format(""), "Final", lines.replace("2.5", "5.5").format("")])
    (tmp_path / "template.txt").write_text("A form {a} of {prompt}.")
    (tmp_path / "no_prompt.txt").write_text("A form.")
    for wrong in ("", str(tmp_path / "none.txt"), str(tmp_path / "no_prompt.txt")):
        monkeypatch.setenv("UNIFIED_REWARD_TEMPLATE", wrong)
        with pytest.raises(ValueError, match="UNIFIED_REWARD_TEMPLATE must name a file with {prompt} in it"):
            example("unified_reward.UnifiedReward")()
    monkeypatch.setenv("UNIFIED_REWARD_TEMPLATE", str(tmp_path / "template.txt"))
    with scripted(lambda *_: completion(next(said))) as server:
        reward = example("unified_reward.UnifiedReward")(f"{server.url}/v1")
        assert reward([shade(1)], ["{prompt} dog"]) == [pytest.approx(3.5)]
        content = server.requests[0]["body"]["messages"][0]["content"]
        assert content[1]["text"] == "A form {a} of {prompt} dog."
        assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
        for _ in range(2):  # no score, and one out of the range
            with pytest.raises(ValueError, match="without its three scores"):
                reward([shade(1)], ["a dog"])
    with pytest.raises(RewardUnavailable, match="No UnifiedReward at http.*: Connection error"):
        reward.check_available()
    monkeypatch.chdir(EXAMPLES.parent)
    assert type(load_reward("examples/rewards/unified_reward.py:UnifiedReward")).__name__ == "UnifiedReward"


@pytest.mark.parametrize("file", sorted((EXAMPLES / "rewards").glob("*.py")), ids=lambda file: file.name)
def test_examples_stay_short(file: Path) -> None:
    assert sum(bool(line.strip()) for line in file.read_text().splitlines()) <= 40
