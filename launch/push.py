"""Upload of an exported folder to the Hub: private by default, picked up where it stopped, the token never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from configs.errors import UserError


def check_repository(name: str) -> None:
    """Refuse names that are not USER/REPO.

    Raises:
        UserError: such a name.
    """
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it has no user")
    except HFValidationError as error:
        raise UserError(f"--push {name}: not a repository name USER/REPO ({error})", exit_code=2) from None


def files_of(folder: Path) -> dict[str, int]:
    """What an upload consists of: names inside the folder, and bytes."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def push(folder: Path, repository: str, private: bool = True, dry_run: bool = False) -> dict[str, Any]:
    """Create the repository if it is not there and upload the folder in one commit; returns what went where.

    Large files go first, one by one, under their SHA-256: after an interruption the same command sends only those that the Hub does
    not have. The token is huggingface_hub's (HF_TOKEN or `hf auth login`); it is neither printed nor written.

    Raises:
        UserError: no token, no permission, no network, or a repository that is public already where a private one is wanted.
    """
    files = files_of(folder)
    for name, size in files.items():
        print(f"{size:>14,}  {name}")
    if dry_run:
        kind = "private" if private else "public"
        print(f"{len(files)} files, {sum(files.values()):,} bytes would go to {repository} ({kind}); nothing was sent")
        return {"repository": repository, "private": private, "files": files, "sent": False}
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        found = bool(api.repo_info(repository).private)  # one that was there before stays what it is
        if private and not found:
            raise UserError(
                f"--push {repository}: everybody can read this repository; add --public if that is meant", exit_code=2
            )
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload exported model")
    except UserError:
        raise
    except Exception as error:  # the network, the Hub's refusals, files that change: all the same to the user
        public = "" if private else " --public"
        raise UserError(
            f"--push {repository}: {_reason(error, api)}; {folder} is complete, and mesokurt export {folder} --push {repository}{public} "
            "goes on where it stopped"
        ) from None
    kind = "private" if found else "public"
    stays = ", as it was: --public changes no repository that is there" if found and not private else ""
    print(f"uploaded {len(files)} files, {sum(files.values()):,} bytes, to {repository} ({kind}{stays})")
    return {"repository": repository, "private": found, "files": files, "sent": True, "commit": commit.oid}


def _reason(error: Exception, api: HfApi) -> str:
    """The first line of a failure, without the token should it be in there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    token = api.token if isinstance(api.token, str) else None
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        text = text.replace(secret, "***") if secret else text
    return text
