"""Pushing a result to the Hub: the right to write is tried before training, the files go in one commit after it.

The Trainer's own push uploads checkpoints and writes a card of its own. Here the result directory goes, and nothing
else; in one commit, because remote code loads code and weights of one commit.
"""

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError

from .arguments import Eagle3TrainingArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Destination:
    """
    A Hub repository to push to.

    Args:
        repo_id (`str`): With its namespace.
        private (`bool`, *optional*): For a new repository; `None` is the namespace's default.
        revision (`str`, *optional*): An existing branch; `None` is the main one.
        token (`str`, *optional*): `None` is the one of `hf auth login`.
    """

    repo_id: str
    private: bool | None
    revision: str | None
    token: str | None


def claim_destination(args: Eagle3TrainingArguments) -> Destination | None:
    """
    The repository of `--push-to-hub`; finds out who is logged in, and changes nothing there.

    Args:
        args ([`Eagle3TrainingArguments`]):
            Its `hub_model_id` (by default the name of the output directory), `hub_private_repo`, `hub_revision` and
            `hub_token`.

    Returns:
        [`Destination`], or `None` if nothing is to be pushed by this process.

    Raises:
        ValueError: If nobody is logged in.

    **Effects**: `args.push_to_hub` is off afterwards: the Trainer would push checkpoints.
    """
    wants_push, args.push_to_hub = args.push_to_hub, False
    if not wants_push or args.diagnose or not args.should_save:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with refusing(name):
        user = HfApi(token=args.hub_token).whoami()["name"]
    repo_id = name if "/" in name else f"{user}/{name}"
    return Destination(repo_id, args.hub_private_repo, args.hub_revision, args.hub_token)


def open_destination(destination: Destination) -> None:
    """
    Makes the repository, unless it is there, and so finds out whether it can be written to.

    Raises:
        ValueError: If that is not possible.
    """
    api = HfApi(token=destination.token)
    with refusing(destination.repo_id):
        api.create_repo(destination.repo_id, private=destination.private, exist_ok=True)
        if destination.revision is not None:
            api.repo_info(destination.repo_id, revision=destination.revision)


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turns what the Hub says into a `ValueError` with the way out."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"`--push-to-hub` cannot write to {name}: {first_line(error)} Log in with `hf auth login` and a token "
            "that may write, correct `--hub-model-id` or `--hub-revision`, or train without pushing."
        ) from error


def push_result(output_dir: Path, names: list[str], destination: Destination) -> bool:
    """
    Uploads a result in one commit.

    Args:
        output_dir (`Path`): The result directory.
        names (`list[str]`): Its files and folders, from `write_release`; checkpoints stay where they are.
        destination ([`Destination`]): Where to.

    Returns:
        `bool`: Whether that worked. If not, the log says why, and how to push later.
    """
    files = [file for name in names for file in list_files(output_dir / name)]
    operations = [CommitOperationAdd(file.relative_to(output_dir).as_posix(), file) for file in files]
    try:
        commit = HfApi(token=destination.token).create_commit(
            destination.repo_id, operations, commit_message="Upload draft head", revision=destination.revision
        )
    except (HTTPError, OSError, ValueError) as error:
        logger.error(
            "The draft head is complete in %s, but it could not be pushed: %s Push it later with:\n    %s",
            output_dir,
            first_line(error),
            push_command(output_dir, names, destination),
        )
        return False
    logger.info("The draft head is at %s.", commit.commit_url)
    return True


def push_command(output_dir: Path, names: list[str], destination: Destination) -> str:
    """The shell command that uploads the same files."""
    patterns = [f"{name}/*" if (output_dir / name).is_dir() else name for name in names]
    command = ["hf", "upload", destination.repo_id, str(output_dir), "."]
    command += [part for pattern in patterns for part in ("--include", pattern)]
    command += ["--revision", destination.revision] if destination.revision is not None else []
    return shlex.join(command)


def list_files(path: Path) -> list[Path]:
    """The file itself, or all files below a folder but compiled ones."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc")


def first_line(error: Exception) -> str:
    """The error's first line as a sentence."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if line.endswith((".", "!", "?")) else f"{line}."
