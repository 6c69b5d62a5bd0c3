"""What users plug in from files of their own, by the command line and in Python: credit rules and policy classes."""

import copy
import dataclasses
import functools
import inspect
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusion3PAGPipeline
from test_cli import ROOT, SMALL, recipe
from test_model_card import parsed
from test_trainer import assert_same, build, config, logged, trained
from tiny import tiny_flux, tiny_sd3
from torch import Tensor

from trl_tpgrpo import TPGRPOConfig, cli
from trl_tpgrpo.algorithm.credit import (
    AGGREGATIONS,
    CreditRule,
    RewardTable,
    assign_credit,
    normalize,
    step_rewards,
    turning_point_credit,
)  # fmt: skip
from trl_tpgrpo.commands import sample
from trl_tpgrpo.hub.card import to_yaml
from trl_tpgrpo.policies.base import FlowPolicy, Guidance
from trl_tpgrpo.policies.loading import build_policy
from trl_tpgrpo.policies.sd3 import SD3Policy


PARTS = inspect.signature(StableDiffusion3PAGPipeline.__init__).parameters.keys() & tiny_sd3().components.keys()
POLICIES = """
from diffusers import StableDiffusion3PAGPipeline
from trl_tpgrpo.policies.sd3 import SD3Policy

class MyPolicy(SD3Policy):
    pipeline_class = StableDiffusion3PAGPipeline

class Nameless(SD3Policy):
    pipeline_class = None

class Unguided(SD3Policy):
    default_guidance = 4.5
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's modules `my_rules` and `my_policies`, which is the current one."""
    shutil.copy(ROOT / "examples/discounted_credit.py", tmp_path / "my_rules.py")
    (tmp_path / "my_policies.py").write_text(POLICIES)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_rules", "my_policies"):
        sys.modules.pop(name, None)


def final_reward(rewards: Tensor, rule: CreditRule) -> Tensor:
    assert rewards.shape[1] == 1
    return rewards.clone()


final_reward.needs_completions = False  # type: ignore[attr-defined]


def by_everything(rewards: Tensor, rule: CreditRule) -> Tensor:
    """Read all that a rule may read."""
    batch = rule.batch
    assert batch is not None and batch.prompts[:: batch.num_generations] == list(dict.fromkeys(batch.prompts))
    assert batch.sigmas.shape == rewards.shape[1:] and (batch.sigmas.diff() < 0).all()
    assert batch.log_probs.shape == (len(batch.prompts), rewards.shape[1] - 1) and batch.log_probs.isfinite().all()
    return rewards.diff(dim=1) * rule.lambda_


def takes_rewards_alone(rewards: Tensor) -> Tensor:
    return rewards


# Credit


def test_a_credit_of_a_file_by_the_command_line(files: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--credit", "./my_rules.py:discounted", "--save_strategy", "steps", "--save_steps", "1"]
    assert cli.main(["train", "--config", recipe(files, max_steps=1), *SMALL, *options]) == 0
    assert "credit: my_rules.discounted" in "".join(capsys.readouterr())
    assert "- `credit`: my_rules.discounted\n" in (files / "out/README.md").read_text()
    assert yaml.safe_load((files / "out/recipe.yaml").read_text())["credit"] == "my_rules.discounted"
    assert parsed(files / "out/recipe.yaml", "--output_dir", "again")[3].credit_rule.function is not None


def test_a_credit_in_python_and_what_becomes_of_its_config(files: Path) -> None:
    sys.path.insert(0, str(files))
    import my_rules

    sys.path.remove(str(files))
    trainer = build(files / "run", credit=my_rules.discounted, max_steps=1, beta=0.0)
    trainer.train()
    table = trainer._buffered_inputs[0].table
    gains = step_rewards(table.rewards) * 0.9 ** torch.arange(3)
    assert torch.equal(table.advantages, normalize(gains, 2, table.rule)) and table.advantages.any()
    assert logged(trainer, "turning_points/rate") == [0.0]
    args = trainer.args
    assert args.credit == args.to_dict()["credit"] == trainer.describe_run()["settings"]["credit"]
    assert args.credit == dataclasses.replace(args, epsilon=0.1).credit == "my_rules.discounted"
    assert pickle.loads(pickle.dumps(args)).credit_rule.function is my_rules.discounted
    args.credit = final_reward
    args.settle_changes()
    assert args.credit == "test_from_outside.final_reward" and args.completion_rule is None


def test_a_rollout_in_a_checkpoint_keeps_its_credit_and_names_no_code(tmp_path: Path) -> None:
    options = {
        "credit": by_everything, "credit_lambda": 0.5, "turning_point_trend": "global", "steps_per_generation": 2,
        "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 3,
    }  # fmt: skip
    whole = build(tmp_path / "whole", **options)
    whole.train()
    assert pickle.loads(pickle.dumps(whole._buffered_inputs[0].table.rule)).function is None
    resumed = build(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))
    assert_same(trained(whole), trained(resumed))
    other = build(tmp_path / "whole", **{**options, "credit": "incremental", "credit_lambda": None})
    with pytest.raises(ValueError, match=r"credit \(test_from_outside.by_everything before, incremental now\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-1"))


def test_a_rule_that_needs_no_completions_costs_what_flow_grpo_does(tmp_path: Path) -> None:
    counts = {}
    for credit in ("outcome", final_reward):
        trainer = build(tmp_path, credit=credit, max_steps=1)
        trainer.train()
        counts[credit] = logged(trainer, "nfe"), logged(trainer, "advantages/std"), trained(trainer)
    assert counts["outcome"][:2] == counts[final_reward][:2]
    assert_same(counts["outcome"][2], counts[final_reward][2])
    with pytest.raises(ValueError, match="credit='test_from_outside.final_reward' uses no completions: leave out"):
        config(tmp_path, credit=final_reward, completion="euler_4")


def test_a_function_of_the_script_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def discounted(rewards: Tensor, rule: CreditRule) -> Tensor:
        return rewards.diff(dim=1)

    discounted.__module__, discounted.__qualname__ = "__main__", "discounted"
    monkeypatch.setattr(sys.modules["__main__"], "discounted", discounted, raising=False)
    made = config(tmp_path, credit=discounted)
    assert made.credit == "__main__.discounted" and made.credit_rule.function is discounted
    text = to_yaml(made.given)
    assert yaml.safe_load(text)["credit"] == "__main__.discounted"  # which nothing else takes for the default


def test_a_rule_may_build_on_turning_points(tmp_path: Path) -> None:
    rewards = torch.tensor([[0.0, -1.0, 2.0, 3.0], [1.0, 2.0, 0.0, -1.0]])
    doubled = dataclasses.replace(
        CreditRule(), credit="a.b", function=lambda rewards, rule: 2 * turning_point_credit(rewards, rule)
    )
    expected = assign_credit(rewards, CreditRule(), 3)[0]
    assert torch.equal(assign_credit(rewards, doubled, 3)[0], 2 * expected)
    assert not torch.equal(expected, rewards.diff(dim=1)) and copy.deepcopy(doubled).function is doubled.function


class Callable_:
    def __call__(self, rewards: Tensor, rule: CreditRule) -> Tensor:
        return rewards


@pytest.mark.parametrize(
    ("credit", "message"),
    [
        (lambda rewards, rule: rewards, "cannot be imported as .*<lambda>: define it at the top level of a module"),
        (functools.partial(final_reward), "credit: functools.partial.* cannot be imported as"),
        (Callable_(), "cannot be imported as"),
        ("turning", r"credit must be one of \('outcome', .*\), or an import path .*: did you mean turning_point\?"),
        ("my_rules.discount", "'my_rules' has no credit 'discount': did you mean discounted"),
        ("my_rules:GAMMA", "credit: my_rules.GAMMA must be a function or a class, got 0.9"),
        ("no_rules.discounted", "The module of the credit 'no_rules.discounted' cannot be imported"),
        (
            takes_rewards_alone,
            r"credit: test_from_outside.takes_rewards_alone must be a function of \(rewards, rule\), not a class: too",
        ),
    ],
)
def test_a_credit_that_cannot_be_found_is_refused(credit: Any, message: str, files: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(files, credit=credit)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda rewards, rule: rewards, r"must return a float32 tensor of \(4, 3\), got torch.float32 of \(4, 4\)"),
        (lambda rewards, rule: rewards[:, :1], r"of \(4, 3\), got torch.float32 of \(4, 1\)"),
        (lambda rewards, rule: rewards.diff(dim=1).double(), r"got torch.float64 of \(4, 3\)"),
        (lambda rewards, rule: rewards.tolist(), r"got list"),
        (lambda rewards, rule: rewards.diff(dim=1).log(), "returned nan for trajectory 1, step 2, whose rewards are"),
        (lambda rewards, rule: rewards.nope, "raised AttributeError: 'Tensor' object has no attribute 'nope'"),
    ],
)
def test_a_wrong_credit_is_an_error_that_names_the_rule(rule: Callable, message: str) -> None:
    rewards = torch.tensor([[[0.0, 1, 2, 3]], [[0, 1, 2, 1]], [[torch.nan] * 4], [[0, 1, 2, 3]]])
    table = RewardTable(rewards, torch.ones(1), 2, 3, CreditRule("my.rule", function=rule))
    with pytest.raises(ValueError, match=f"^The credit rule 'my.rule' .*{message}") as caught:
        _ = table.advantages
    assert ("raised" in message) == isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_rule_is_called_for_each_function_or_the_sum_and_changes_no_reward(aggregation: str) -> None:
    seen = []

    def rule(rewards: Tensor, rule: CreditRule) -> Tensor:
        seen.append(rewards.clone())
        rewards.fill_(7.0)
        return seen[-1].diff(dim=1).nan_to_num(5.0)

    rewards, options = torch.rand(6, 2, 4), {"aggregation": aggregation}
    rewards[1] = torch.nan
    before = copy.deepcopy(rewards)
    own = RewardTable(rewards, torch.ones(2), 3, 3, CreditRule("my.rule", function=rule, **options))
    built_in = RewardTable(before, torch.ones(2), 3, 3, CreditRule("incremental", **options))
    assert torch.equal(own.advantages, built_in.advantages) and not own.advantages[1].any()
    assert torch.equal(own.rewards.nan_to_num(9), built_in.rewards.nan_to_num(9))
    assert len(seen) == (1 if aggregation == "sum_then_normalize" else 2)
    assert assign_credit(own.rewards, own.rule, 3)[0][1].isnan().all()


# Policy classes


def unknown_pipeline() -> StableDiffusion3PAGPipeline:
    return StableDiffusion3PAGPipeline(**{name: tiny_sd3().components[name] for name in PARTS})


def test_a_policy_class_of_a_file_by_the_command_line(files: Path, capsys: pytest.CaptureFixture) -> None:
    unknown_pipeline().save_pretrained(files / "model")
    path = recipe(files, max_sequence_length=8, max_steps=1, model_name_or_path="model")
    call = ["--config", path, *SMALL, "--save_strategy", "steps", "--save_steps", "1"]
    assert cli.main(["train", *call]) == 2
    assert "StableDiffusion3PAGPipeline is not supported" in (said := capsys.readouterr().err)
    assert "For another pipeline, write a policy_class" in said
    assert cli.main(["train", *call, "--policy_class", "my_policies.py:MyPolicy"]) == 0
    assert "policy_class: my_policies.MyPolicy" in "".join(capsys.readouterr())
    assert "- `policy_class`: my_policies.MyPolicy\n" in (files / "out/README.md").read_text()
    assert yaml.safe_load((files / "out/recipe.yaml").read_text())["policy_class"] == "my_policies.MyPolicy"
    assert cli.main(["plan", *call, "--policy_class", "my_policies.MyPolicy"]) == 0
    options = ["--model_name_or_path", "model", "--prompt", "a red circle", "--height", "32", "--width", "32"]
    options += ["--num_inference_steps", "1", "--guidance_scale", "1"]
    assert cli.main(["sample", *options, "--policy_class", "my_policies.MyPolicy"]) == 0


class OwnPolicy(SD3Policy):
    pipeline_class = StableDiffusion3PAGPipeline


def test_a_policy_class_in_python(tmp_path: Path) -> None:
    trainer = build(tmp_path, unknown_pipeline(), policy_class=OwnPolicy, max_steps=1)
    assert trainer.args.policy_class == "test_from_outside.OwnPolicy" and type(trainer.policy) is OwnPolicy
    trainer.train()
    known = build(tmp_path, max_steps=1)
    known.train()
    assert_same(trained(trainer), trained(known))


def test_a_policy_class_that_does_not_fit_is_refused(files: Path, tmp_path: Path) -> None:
    for path, message in {
        "my_rules.discounted": "policy_class must be a subclass of trl_tpgrpo.policies.base.FlowPolicy, got <function",
        "my_policies.Nameless": "Nameless must set pipeline_class to the class of its pipelines",
        "my_policies.Unguided": "Unguided.default_guidance must be a dict of options of the pipeline",
        "my_policies.MyPolicy": "MyPolicy is for StableDiffusion3PAGPipeline, and the pipeline is a FluxPipeline",
        "test_from_outside.FlowPolicy": "FlowPolicy must set pipeline_class to the class of its pipelines",
    }.items():
        with pytest.raises(ValueError, match=message):
            build(tmp_path, tiny_flux(), policy_class=path)
    with pytest.raises(ValueError, match="is for StableDiffusion3PAGPipeline, and the pipeline is a Flux"):
        sample.input_options(tiny_flux(), [], 32, 32, OwnPolicy)
    assert issubclass(OwnPolicy, FlowPolicy) and type(build_policy(tiny_sd3(), Guidance(32, 32))) is SD3Policy
    with pytest.raises(ValueError, match="my_policies' has no policy_class 'Mine'"):
        TPGRPOConfig(str(tmp_path), use_cpu=True, policy_class="my_policies.Mine")
