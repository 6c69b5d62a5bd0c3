"""Training with rewards over HTTP."""

from pathlib import Path

import pytest
from loopback import as_json, request, scripted, serving
from test_trainer import assert_same, brightness, build, logged, trained

from trl_tpgrpo.rewards import RewardError
from trl_tpgrpo.rewards.judge import JudgeUnavailable, VLMJudge
from trl_tpgrpo.rewards.remote import RemoteReward, RemoteRewardError, ServerUnavailable


def test_a_remote_reward_trains_to_the_weights_of_a_local_one(tmp_path: Path) -> None:
    local = build(tmp_path / "local")
    local.train()
    with serving(brightness) as server:
        reward = RemoteReward(f"http://127.0.0.1:{server.port}", "brightness", batch_size=3)
        remote = build(tmp_path / "remote", reward_funcs=reward)
        remote.train()
        health = request(server, "GET", "/health")[1]
    assert_same(trained(remote), trained(local))
    assert logged(remote, "rewards/brightness/mean") == logged(local, "rewards/brightness/mean")
    assert health["rewards"]["brightness"]["num_scored"] > 0


def test_a_judge_that_is_gone_stops_the_run(tmp_path: Path) -> None:
    answer = {
        "choices": [{"message": {"content": '{"score": 3.5}'}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 1},
    }
    with scripted(lambda request, number: as_json(answer)) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", num_retries=0)
        trainer = build(tmp_path / "good", reward_funcs=[judge, brightness])
        trainer.train()
        assert logged(trainer, "rewards/vlm_quality/mean") == [3.5, 3.5]
        assert logged(trainer, "vlm_quality/prompt_tokens_per_image") == [9.0, 9.0]
    bad = build(tmp_path / "bad", reward_funcs=[judge, brightness])
    with pytest.raises(JudgeUnavailable, match="The judge at .* has not answered for the first request"):
        bad.train()
    assert bad.rollouts.metrics["train"].flush() == {}  # nothing has been sampled


def test_a_judge_that_goes_stops_the_run(tmp_path: Path) -> None:
    with scripted(lambda request, number: as_json({}, 503)) as server:
        judge = VLMJudge(f"{server.url}/v1", "a-model", num_retries=0)
        with pytest.raises(RewardError, match=r"'vlm_quality' raised JudgeUnavailable: The judge at .* for row \d:"):
            build(tmp_path, reward_funcs=judge).train()


def test_a_server_that_is_gone_or_lacks_the_reward_is_found_before_anything_is_sampled(tmp_path: Path) -> None:
    with serving(brightness) as server:
        url = f"http://127.0.0.1:{server.port}"
        other = build(tmp_path / "other", reward_funcs=RemoteReward(url, "darkness"))
        with pytest.raises(RemoteRewardError, match=r"has no 'darkness', only \['brightness'\]"):
            other.train()
    gone = build(tmp_path / "gone", reward_funcs=RemoteReward(url, "brightness", num_retries=1))
    with pytest.raises(ServerUnavailable, match=r"does not answer: no connection: .* \(2 attempts\)\. Is it running"):
        gone.train()
    for trainer in (other, gone):
        assert trainer.rollouts.metrics["train"].flush() == {}
