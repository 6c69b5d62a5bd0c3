"""TRL's trainer with what a run gives to the Hub: weights, card, images, recipe and checkpoints."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from PIL import Image
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.base_trainer import _BaseTrainer

from .config import TPGRPOConfig
from .hub import Contents, HubRepository
from .model_card import sample_prompts, summarize
from .policies.base import FlowPolicy
from .rewards import RewardFunc


class PublishingTrainer(_BaseTrainer):
    """What [`TPGRPOTrainer`] is built on.

    Attributes:
        hub: The repository of the run.
        recipe_settings: What the recipe is made of; `None`: what follows from the trainer's arguments. The command line sets
            its own options.
    """

    args: Any  # a TPGRPOConfig, whose optional settings are set by now
    policy: FlowPolicy
    reward_funcs: list[RewardFunc]
    eval_reward_funcs: list[RewardFunc]

    def __init__(self, *, args: TPGRPOConfig, **kwargs: Any):
        self.hub = HubRepository(args)
        self.recipe_settings: dict[str, Any] | None = None
        self._card_samples: dict[str, Image.Image] = {}
        super().__init__(args=args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository of the run, unless it exists."""
        if self.is_world_process_zero():
            self.hub_model_id = self.hub.create(token, private)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save the trained weights with a card, sample images and the recipe, and push them; to be called on all processes.

        The arguments are those of [`~transformers.Trainer.push_to_hub`]; `kwargs` go to `create_model_card`.

        Returns:
            On the main process what was committed, or without `blocking` its future.

        Raises:
            HubError: On the main process, if the Hub does not take it, or lacks a checkpoint that it should have. All is on
                disk then, and the message has the command that pushes it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        images = self._sample_for_card(self._card_prompts)
        self._card_samples = dict(zip(self._card_prompts, images, strict=True))
        if not self.is_world_process_zero():
            return None
        try:
            if self.hub.repo_id is None:
                self.hub_model_id = self.hub.create(token, private, self._pushed)
        finally:  # whatever the Hub says, the card is on disk
            self.create_model_card(**kwargs)
        return self.hub.push(self._pushed, commit_message, blocking, token, revision)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Write the card, and begin to push what `hub_strategy` asks for at a checkpoint, which must be whole."""
        if self.is_world_process_zero():
            self.create_model_card()
            if self.hub.pushes_checkpoints:
                self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.hub.push_checkpoint(checkpoint, self._is_lora, self.state.global_step)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called in the middle of writing a checkpoint, which `push_checkpoint` pushes when it is whole."""

    def _finish_current_push(self) -> None:
        """At the end of training: wait for pushes, then delete the checkpoints that had to stay for them."""
        self.hub.finish()
        if self.args.should_save:
            run, best = self._get_output_dir(trial=None), self.state.best_model_checkpoint
            rotate_checkpoints(run, self.args.save_total_limit, best, use_mtime=True)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write `README.md`, with the images of the last push if there was one, and `recipe.yaml`."""
        if not self.is_world_process_zero():
            return
        summary = summarize(
            args=self.args,
            state=self.state,
            pipeline=self.policy.pipeline,
            adapter=self.model.peft_config["default"] if self._is_lora else None,
            reward_funcs={"reward_funcs": self.reward_funcs, "eval_reward_funcs": self.eval_reward_funcs},
            recipe_settings=self.recipe_settings,
            repo_id=self.hub_model_id,
            model_name=model_name,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            prompts=self._card_prompts,
            samples=self._card_samples,
        )
        summary.write(Path(self.args.output_dir))

    def _sample_for_card(self, prompts: list[str]) -> list[Image.Image]:
        """An image of each prompt by the trained model; all processes take part, as sharded weights need, and get the same."""
        raise NotImplementedError

    @property
    def _is_lora(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def _card_prompts(self) -> list[str]:
        return sample_prompts([self.eval_dataset, self.train_dataset])

    @property
    def _pushed(self) -> Contents:
        """What is on disk for the repository of a run that has ended."""
        output_dir = Path(self.args.output_dir)
        return Contents.of_run(output_dir, output_dir, self._is_lora)
