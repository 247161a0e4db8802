"""A stand-in for the hub, beneath the HTTP client of huggingface_hub: it serves folders, counts
requests, and can be out of reach."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fakes
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from tokenenv.models import hub


def folders_of(
    models: dict[tuple[str, str], Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Path]]:
    """Save models, each by its id and revision, with a tokenizer; return what a `FakeHub` serves."""
    found: dict[str, dict[str, Path]] = {}
    for (name, revision), model in models.items():
        folder = tmp_path_factory.mktemp("hub")
        fakes.saved(model, folder)
        fakes.tokenizer().save_pretrained(folder)
        found.setdefault(name, {})[revision] = folder
    return found


class FakeHub:
    """Serves `folders[id][revision]`, a directory; "main" is the default branch."""

    def __init__(self, folders: dict[str, dict[str, Path]]) -> None:
        self.folders = folders
        self.reachable = True
        self.status: int | None = None
        """With which every request is answered; None: as it should be."""
        self.requests: list[str] = []
        # httpx, or httpx2 in later versions of huggingface_hub.
        self.http = sys.modules[type(get_session()).__module__.split(".")[0]]

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> "FakeHub":
        """Stand in for the hub until the test ends, with an empty cache of its files."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the shell says
        # Nobody waits for the network of a test.
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits for another try"))
        transport = self.http.MockTransport(self.answer)
        client = self.http.Client(transport=transport, follow_redirects=True)
        monkeypatch.setattr(huggingface_hub.utils._http, "_GLOBAL_CLIENT", client)
        hub._answer.cache_clear()
        return self

    def answer(self, request: Any) -> Any:
        """The response to a request."""
        path = unquote(request.url.path).strip("/")
        if path == "api/agent-harnesses":  # what huggingface_hub asks once a day about itself
            return self.http.Response(404)
        self.requests.append(f"{request.method} {path}")
        if not self.reachable:
            raise self.http.ConnectError("Name or service not known")
        if self.status is not None:
            return self.http.Response(self.status)
        api = path.startswith("api/models/")
        path = path.removeprefix("api/models/")
        name = next((name for name in self.folders if f"{path}/".startswith(f"{name}/")), None)
        if name is None:
            return self._refuse("RepoNotFound")
        what, _, rest = path.removeprefix(name).strip("/").partition("/")
        revision, _, file = rest.partition("/") if what else ("main", "", "")
        by_commit = {self._commit(name, one): one for one in self.folders[name]}
        revision = by_commit.get(revision, revision)
        if revision not in self.folders[name]:
            return self._refuse("RevisionNotFound")
        folder, commit = self.folders[name][revision], self._commit(name, revision)
        if api:
            files = [path.name for path in sorted(folder.iterdir())]
            if what == "tree":
                listed = [{"type": "file", "path": file, "size": 1, "oid": file} for file in files]
                return self.http.Response(200, json=[] if file else listed)
            siblings = [{"rfilename": file} for file in files]
            return self.http.Response(200, json={"id": name, "sha": commit, "siblings": siblings})
        if not (folder / file).is_file():
            return self._refuse("EntryNotFound", {"X-Repo-Commit": commit})
        content = (folder / file).read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if request.method == "HEAD":
            return self.http.Response(200, headers={**headers, "Content-Length": str(len(content))})
        return self.http.Response(200, headers=headers, content=content)

    def _commit(self, name: str, revision: str) -> str:
        return hashlib.sha1(json.dumps([name, revision]).encode()).hexdigest()

    def _refuse(self, code: str, headers: dict[str, str] | None = None) -> Any:
        return self.http.Response(404, headers={"X-Error-Code": code, **(headers or {})})
