"""The repository of a run on the Hub: what goes there, in the background or at the end, and what is said if it cannot."""

import copy
import logging
import shlex
from concurrent.futures import Future, wait
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import HubStrategy

from .config import TPGRPOConfig
from .model_card import CARD_FILE, RECIPE_FILE, SAMPLE_FILES
from .policies.weights import LORA_FILE, TRANSFORMER_FOLDER


logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
TRAINING_ARGS = "training_args.bin"
"""Never pushed: nobody needs it to use or resume a run, unpickling it runs code, and it names folders of this machine."""

REMEDIES = {
    401: "it does not accept the token, which has expired, was revoked or is missing. Make one that may write at "
    "{endpoint}/settings/tokens and log in with `hf auth login`, or set HF_TOKEN or hub_token",
    403: "the token may not write to {repo_id}. Take one with write permission there, or another hub_model_id",
    404: "it does not know {repo_id}, or not this revision of it. See hub_model_id and hub_revision",
    413: "something is too large for it",
    429: "there were too many requests. Wait some minutes",
}


class HubError(RuntimeError):
    """The Hub could not be reached or has refused something; the message says what to do."""


@dataclass(frozen=True)
class Contents:
    """Files that are pushed together.

    Attributes:
        files: By their place in the repository: where each is on disk, or its bytes if it may change there.
        later: By place in the repository, the folder on disk that holds what belongs there, and the options of `hf upload`
            that choose it.
    """

    files: dict[str, Path | bytes]
    later: dict[str, tuple[Path, list[str]]]

    @classmethod
    def of_run(cls, output_dir: Path, weights: Path, is_lora: bool) -> "Contents":
        """The card, its images, the recipe and the trained weights, which are in the folder `weights`."""
        beside = [output_dir / CARD_FILE, output_dir / RECIPE_FILE, *sorted(output_dir.glob(SAMPLE_FILES))]
        trained = [weights / LORA_FILE] if is_lora else sorted((weights / TRANSFORMER_FOLDER).iterdir())
        files: dict[str, Path | bytes] = {path.relative_to(weights).as_posix(): path for path in trained}
        files.update({path.relative_to(output_dir).as_posix(): path.read_bytes() for path in beside if path.exists()})
        patterns = [LORA_FILE if is_lora else f"{TRANSFORMER_FOLDER}/*"]
        if weights == output_dir:
            patterns = [CARD_FILE, RECIPE_FILE, SAMPLE_FILES, *patterns]
        return cls(files, {".": (weights, [item for pattern in patterns for item in ("--include", pattern)])})

    def with_checkpoint(self, checkpoint: Path, place: str) -> "Contents":
        """Also all that a resumed run needs, in the folder `place`."""
        found = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != TRAINING_ARGS]
        files: dict[str, Path | bytes] = {f"{place}/{path.relative_to(checkpoint).as_posix()}": path for path in found}
        return Contents(self.files | files, self.later | {place: (checkpoint, ["--exclude", TRAINING_ARGS])})


@dataclass(frozen=True)
class _Push:
    contents: Contents
    future: Future


class HubRepository:
    """Pushes to the Hub, one commit after another in a thread of its own, and keeps account of what has failed.

    Args:
        args: The settings of the run, of which `hub_*` and `output_dir` are read.

    Attributes:
        repo_id: Of the repository, once it exists.
    """

    def __init__(self, args: TPGRPOConfig):
        self.args = args
        self.repo_id: str | None = None
        self._private = args.hub_private_repo
        self._api = HfApi(library_name="trl-tpgrpo")
        self._pushes: list[_Push] = []
        self._waiting: tuple[Contents, str] | None = None
        self._failed: dict[str, tuple[Contents, BaseException]] = {}  # by place in the repository

    @property
    def url(self) -> str:
        """Where a person finds the repository."""
        return f"{self._api.endpoint}/{self.repo_id}"

    def create(self, token: str | None = None, private: bool | None = None, contents: Contents | None = None) -> str:
        """Create the repository, and the branch `hub_revision`, unless they exist; return its id.

        Args:
            token: With write permission. `None`: `hub_token`, or that of the login.
            private: `None`: `hub_private_repo`.
            contents: What would be lost to the person if this failed.

        Raises:
            HubError: If that cannot be done.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self._private = self._private if private is None else private
        created = self._api.run_as_future(self._create, name, token or self.args.hub_token, self._private)
        if (error := created.exception()) is not None:
            where = "Nothing has been trained yet." if contents is None else self._kept(contents, name)
            raise HubError(f"The repository {name} cannot be created: {self._cause(error, name)}. {where}") from error
        self.repo_id = created.result()
        return self.repo_id

    def _create(self, name: str, token: str | None, private: bool | None) -> str:
        repo_id = self._api.create_repo(name, token=token, private=private, exist_ok=True).repo_id
        branch = self.args.hub_revision
        if branch is not None and not branch.startswith("refs/"):
            self._api.create_branch(repo_id, branch=branch, token=token, exist_ok=True)
        return repo_id

    def push(
        self,
        contents: Contents,
        message: str,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo | Future:
        """Commit what the finished run has made, after all that is under way.

        Returns:
            What was committed, or without `blocking` its future.

        Raises:
            HubError: If it cannot be done, or a checkpoint could not be pushed before; nothing is deleted here.
        """
        self.finish()
        future = self._submit(contents, message, token, revision)
        if not blocking:
            return future
        self.finish(warn=False)
        if self._failed:
            raise HubError(self._account()) from next(iter(self._failed.values()))[1]
        return future.result()

    def push_checkpoint(self, checkpoint: Path, is_lora: bool, step: int) -> None:
        """Begin to push what `hub_strategy` asks for at a checkpoint that is whole."""
        self._look_at_pushes()
        strategy = self.args.hub_strategy
        if not self.pushes_checkpoints:
            return
        contents = Contents.of_run(Path(self.args.output_dir), checkpoint, is_lora)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = LAST_CHECKPOINT if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            contents = contents.with_checkpoint(checkpoint, place)
        message = f"Training in progress, step {step}"
        if self.is_busy and strategy != HubStrategy.ALL_CHECKPOINTS and not self.args.hub_always_push:
            self._waiting = (contents, message)  # unless a later one takes its place
        else:
            self._submit(contents, message)

    @property
    def pushes_checkpoints(self) -> bool:
        """Whether anything is pushed before the end."""
        return self.repo_id is not None and self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END

    @property
    def is_busy(self) -> bool:
        """Whether files on disk are still being pushed, and must stay."""
        return not all(push.future.done() for push in self._pushes)

    def finish(self, warn: bool = True) -> None:
        """Wait for all pushes that are under way or waiting."""
        if self._waiting is not None:
            self._submit(*self._waiting)
        wait([push.future for push in self._pushes])
        self._look_at_pushes(warn)

    def _submit(
        self, contents: Contents, message: str, token: str | None = None, revision: str | None = None
    ) -> Future:
        self._waiting = None
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        future = self._api.run_as_future(self._commit, contents.files, message, token, revision)
        self._pushes.append(_Push(contents, future))
        return future

    def _commit(
        self, files: dict[str, Path | bytes], message: str, token: str | None, revision: str | None
    ) -> CommitInfo:
        """One commit of `files`, whose folders replace those of the same name in the repository."""
        assert self.repo_id is not None
        folders = tuple({f"{path.split('/')[0]}/" for path in files if "/" in path})
        present = self._api.list_repo_files(self.repo_id, revision=revision, token=token)
        stale = [path for path in present if path.startswith(folders) and path not in files]
        return self._api.create_commit(
            self.repo_id,
            [*(CommitOperationDelete(path) for path in stale), *(CommitOperationAdd(*item) for item in files.items())],
            commit_message=message,
            token=token,
            revision=revision,
        )

    def _look_at_pushes(self, warn: bool = True) -> None:
        """Take note of pushes that have ended; a later success at the same place makes up for a failure."""
        for push in [push for push in self._pushes if push.future.done()]:
            self._pushes.remove(push)
            error = push.future.exception()
            for place in push.contents.later:
                self._failed.pop(place, None)
                if error is not None:
                    self._failed[place] = (push.contents, error)
            if error is not None and warn:
                logger.warning(
                    "Pushing to %s failed: %s. Training goes on; what is missing there is said at the end.",
                    self.repo_id,
                    self._cause(error, str(self.repo_id)),
                )

    def _account(self) -> str:
        """What is missing in the repository, why, and how to bring it there."""
        missing = [place for place in self._failed if place != "."]
        what = "" if "." in self._failed else f" {', '.join(missing)} is not there; the trained weights are."
        causes = {self._cause(error, str(self.repo_id)): None for _, error in self._failed.values()}
        contents = Contents({}, {place: item[0].later[place] for place, item in self._failed.items()})
        return (
            f"Pushing to {self.repo_id} failed: {'; '.join(causes)}.{what} {self._kept(contents, str(self.repo_id))}"
        )

    def _kept(self, contents: Contents, repo_id: str) -> str:
        """Where everything is on disk, and the commands that push it from there."""
        lines = []
        for place, (folder, options) in contents.later.items():
            if not folder.exists():
                lines.append(f"({folder}, for {place}, has been deleted meanwhile: see save_total_limit)")
                continue
            branch = ["--revision", self.args.hub_revision] if self.args.hub_revision else []
            private = ["--private"] if self._private else []
            lines.append(shlex.join(["hf", "upload", repo_id, str(folder), place, *options, *branch, *private]))
        return "Nothing is lost on this machine. Push it later with\n    " + "\n    ".join(lines)

    def _cause(self, error: BaseException, repo_id: str) -> str:
        """Why something failed and what helps, in a sentence without a full stop."""
        while isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        if not isinstance(error, HfHubHTTPError):
            return f"{type(error).__name__}: {str(error).rstrip('.')} ({self._api.endpoint})"
        status = error.response.status_code
        said = (error.server_message or "").strip().rstrip(".")
        remedy = REMEDIES.get(
            status, f"{said}. This is a failure of the Hub; try again later" if status >= 500 else said
        )
        return f"the Hub has answered {status}: {remedy.format(endpoint=self._api.endpoint, repo_id=repo_id)}"


def without_tokens(args: Any) -> Any:
    """A copy of settings that may be written to disk."""
    kept = copy.copy(args)
    for field in fields(args):
        if field.name.endswith("_token"):
            setattr(kept, field.name, None)
    return kept
