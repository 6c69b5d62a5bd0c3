"""The repository of a run on the Hub: pushes, and the command that repeats a failed push.

transformers' push is not used. It pushes all of `output_dir`, but of a checkpoint only files named as for language
models. It reads incomplete files, and errors in the background go unnoticed.
"""

import logging
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import TrainingArguments

from ..policies.weights import LORA_FILE, TRANSFORMER_FOLDER
from .card import CARD_FILES


logger = logging.getLogger(__name__)

REMEDIES = {
    401: "it does not accept the token, which has expired, was revoked or is missing. Make one that may write at "
    "{endpoint}/settings/tokens and log in with `hf auth login`, or set HF_TOKEN or hub_token",
    403: "the token may not write to {repo_id}. Use one with write permission there, or another hub_model_id",
    404: "it does not know {repo_id}, or not this revision of it. See hub_model_id and hub_revision",
}


class HubError(RuntimeError):
    """The Hub could not be reached or returned an error; the message has a remedy."""


@dataclass(frozen=True)
class Upload:
    """Files of one commit: arguments of [`~huggingface_hub.HfApi.upload_folder`]."""

    folder_path: Path
    path_in_repo: str
    revision: str | None
    allow_patterns: list[str] | None = None
    ignore_patterns: list[str] | None = None
    delete_patterns: list[str] | None = None

    def command(self, repo_id: str, private: bool | None) -> str:
        """Return the command for the same push."""
        words = ["hf", "upload", repo_id, str(self.folder_path), self.path_in_repo]
        patterns = (self.allow_patterns, self.ignore_patterns, self.delete_patterns)
        for option, values in zip(("--include", "--exclude", "--delete"), patterns, strict=True):
            words += [word for value in values or () for word in (option, value)]
        words += ["--revision", self.revision] if self.revision else []
        return shlex.join([*words, "--private"] if private else words)


class HubRepository:
    """The repository of a run. Pushes run one after another in another thread."""

    def __init__(self, args: TrainingArguments, is_lora: bool):
        self.args, self.is_lora = args, is_lora  # an adapter is trained, or all weights
        self.repo_id: str | None = None  # owner and name, once it exists
        self._private = args.hub_private_repo
        self._api = HfApi(library_name="trl-tpgrpo")
        self._last_push: Future | None = None
        self._skipped: tuple[Path, int] | None = None

    @property
    def url(self) -> str:
        """Web address of the repository."""
        return f"{self._api.endpoint}/{self.repo_id}"

    @property
    def is_busy(self) -> bool:
        """Whether files on disk are still needed by a push."""
        return self._last_push is not None and not self._last_push.done()

    def create(self, token: str | None = None, private: bool | None = None, is_trained: bool = False) -> str:
        """Create the repository, and the branch `hub_revision`, unless they exist; return the repository's id.

        Raises:
            HubError: If it fails, with the command that pushes the weights if it `is_trained`.
        """
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        token, branch = token or self.args.hub_token, self.args.hub_revision
        self._private = self._private if private is None else private
        upload = self._usable(Path(self.args.output_dir)) if is_trained else None
        with self._explained(f"The repository {name} cannot be created", name, upload):
            repo_id = self._api.create_repo(name, token=token, private=self._private, exist_ok=True).repo_id
            if branch is not None and not branch.startswith("refs/"):
                self._api.create_branch(repo_id, branch=branch, token=token, exist_ok=True)
        self.repo_id = repo_id
        return repo_id

    def push(
        self, message: str, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | Future:
        """Commit weights, card, images and recipe from `output_dir`, after earlier pushes; return the commit.

        Raises:
            HubError: If it fails. Without `blocking`, a future is returned and a failure is a warning.
        """
        upload = self._usable(Path(self.args.output_dir), revision)
        if not blocking:
            return self._push_in_background(upload, message, token)
        self.finish()
        return self._push(upload, message, token)

    def push_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Start to push a complete checkpoint by `hub_strategy`, with the card and recipe in `output_dir`.

        During an earlier push, a checkpoint is skipped; `finish` pushes the last one if it was skipped.
        """
        output_dir = Path(self.args.output_dir)
        for path in [path for pattern in CARD_FILES for path in output_dir.glob(pattern)]:
            target = checkpoint / path.relative_to(output_dir)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)  # files in output_dir may change before the push starts
        if self.is_busy and self.args.hub_strategy != "all_checkpoints" and not self.args.hub_always_push:
            self._skipped = (checkpoint, step)
        else:
            self._push_checkpoint(checkpoint, step)

    def _push_checkpoint(self, checkpoint: Path, step: int) -> None:
        self._skipped, message = None, f"Training in progress, step {step}"
        self._push_in_background(self._usable(checkpoint), message)
        if self.args.hub_strategy in ("checkpoint", "all_checkpoints"):
            name = "last-checkpoint" if self.args.hub_strategy == "checkpoint" else checkpoint.name
            whole = Upload(checkpoint, name, self.args.hub_revision, delete_patterns=["*"])
            self._push_in_background(whole, f"{message}, checkpoint")

    def finish(self) -> None:
        """Wait for all pushes, and push the last checkpoint if it was skipped; failures are in the log."""
        while self._last_push is not None:
            self._api.run_as_future(bool).result()  # after all pushes and their warnings
            self._last_push = None
            if self._skipped is not None:
                self._push_checkpoint(*self._skipped)

    def _usable(self, folder: Path, revision: str | None = None) -> Upload:
        """Return the files that users of the model need."""
        files = [*CARD_FILES, LORA_FILE if self.is_lora else f"{TRANSFORMER_FOLDER}/*"]
        stale = [pattern for pattern in files if "*" in pattern]  # an earlier push may have had more files
        revision = revision or self.args.hub_revision
        return Upload(folder, ".", revision, allow_patterns=files, delete_patterns=stale)

    def _push_in_background(self, upload: Upload, message: str, token: str | None = None) -> Future:
        self._last_push = self._api.run_as_future(self._push, upload, message, token)
        self._last_push.add_done_callback(_warn)
        return self._last_push

    def _push(self, upload: Upload, message: str, token: str | None) -> CommitInfo:
        repo_id, token = str(self.repo_id), token or self.args.hub_token
        with self._explained(f"Pushing to {repo_id} failed", repo_id, upload):
            return self._api.upload_folder(repo_id=repo_id, commit_message=message, token=token, **asdict(upload))

    @contextmanager
    def _explained(self, what: str, repo_id: str, upload: Upload | None) -> Iterator[None]:
        """Raise HubError for errors inside the context, with the command that repeats the push."""
        try:
            yield
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            later = "Nothing has been trained yet."
            if upload is not None:
                command = upload.command(repo_id, self._private)
                later = f"Nothing is lost on this machine. Push it later with\n    {command}"
            raise HubError(f"{what}: {self._cause(error, repo_id)}. {later}") from error

    def _cause(self, error: BaseException, repo_id: str) -> str:
        """Return the reason of a failure and a remedy, without a full stop."""
        while isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        if not isinstance(error, HfHubHTTPError):
            return f"{type(error).__name__}: {str(error).rstrip('.')} ({self._api.endpoint})"
        status, said = error.response.status_code, error.server_message or error.response.reason_phrase
        remedy = REMEDIES.get(status, "").format(endpoint=self._api.endpoint, repo_id=repo_id)
        outage = ". This is a failure of the Hub; try again later" if status >= 500 else ""
        return f"the Hub has answered {status}: {remedy or said.strip().rstrip('.') + outage}"


def _warn(push: Future) -> None:
    if push.exception() is not None:
        logger.warning("%s", push.exception())
