"""A client of a running vLLM server: what it is asked, and what happens when it does not answer."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from tokenenv.errors import InvalidArgument, ServerError
from tokenenv.safety.shown import without_user

BUSY = (429, 502, 503, 504)
"""Status codes after which a request is sent again: the server is busy, or not there yet."""
TEXTS = 64
"""The most texts of one request, so that a time-out means that something is wrong, and not that
much was asked."""


class VLLMServer:
    """A client of one vLLM server.

    Args:
        url: where the server listens, such as "http://127.0.0.1:8000".
        api_key: the key that `vllm serve --api-key` was given; by default the environment variable
            VLLM_API_KEY, if there is one.
        timeout: the seconds that one answer may take, above 0.
        retries: how many times a request that failed is sent again, after 0, 1, 2, 4, ... seconds;
            0 or more. A failure is no connection, no answer in time, or status 429 or 502 to 504.

    Raises:
        InvalidArgument: an argument is not allowed.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 60.0, retries: int = 3
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument(
                f"url={without_user(url)!r} is not allowed; give http://HOST:PORT of a vLLM server."
            )
        if not timeout > 0 or retries < 0:
            raise InvalidArgument(
                f"timeout={timeout} must be above 0 and retries={retries} at least 0."
            )
        # Errors name this address, so the user and password are taken out. The session has them.
        self.url = without_user(url).rstrip("/").removesuffix("/v1")
        self.timeout, self.retries = timeout, retries
        self._key = api_key or os.environ.get("VLLM_API_KEY")
        self._session = self._make_session(self._key)
        found = urlsplit(url)
        if found.username is not None:
            self._session.auth = (unquote(found.username), unquote(found.password or ""))
        self._model: str | None = None

    def _make_session(self, api_key: str | None) -> Any:
        # Imported here, because most uses of the package know no server.
        import requests
        from urllib3 import Retry

        # `allowed_methods=None` means all: asking the same again does no harm at any route used.
        retry = Retry(
            self.retries,
            backoff_factor=0.5,
            status_forcelist=BUSY,
            allowed_methods=None,
            respect_retry_after_header=False,
        )
        session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=256, max_retries=retry)
        for scheme in ("http://", "https://"):
            session.mount(scheme, adapter)
        # Proxies of the environment are left out: the server is usually beside this process.
        session.trust_env = False
        if api_key:
            session.headers["Authorization"] = f"Bearer {api_key}"
        return session

    def ask(self, path: str, body: Any = None, *, method: str = "POST", **query: str) -> Any:
        """Send one request, again where it fails, and return the JSON of the answer; None where the
        answer is no JSON.

        Args:
            path: the route, such as "/pooling".
            body: what is sent as JSON.
            method: "POST" or "GET".
            **query: of the URL.

        Raises:
            ServerError: there was no answer after all tries, or an answer that refuses.
        """
        import requests

        try:
            answer = self._session.request(
                method, self.url + path, json=body, params=query, timeout=self.timeout
            )
        except requests.RequestException as error:
            raise ServerError(
                f"the vLLM server at {self.url} did not answer {path} in {self.retries + 1} tries "
                f"of {self.timeout:g} s each at most ({_reason(error)}). Is it running?"
            ) from error
        if not answer.ok:
            raise ServerError(
                f"the vLLM server at {self.url} refused {path} ({answer.status_code}): "
                f"{self._said(answer)}"
            )
        return answer.json() if "json" in answer.headers.get("Content-Type", "") else None

    def _said(self, answer: Any) -> str:
        """Return what is wrong, in the server's words."""
        # They may repeat what the server was sent, the key included.
        message = _message(answer)
        return message.replace(self._key, "***") if self._key else message

    @property
    def model(self) -> str:
        """The name of the model that the server serves, asked once."""
        if self._model is None:
            with self.reading("/v1/models"):
                self._model = self.ask("/v1/models", method="GET")["data"][0]["id"]
        return self._model

    def token_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the raw output of a token-classification model with one label, for every token of
        each text: (len(text),) float32 each."""
        return self._pooled(texts, "token_classify", [len(text) for text in texts])

    def text_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the raw output of a sequence-classification model with one label, for each text:
        (1,) float32 each."""
        return self._pooled(texts, "classify", [1] * len(texts))

    def prompt_logprobs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return log p of every token of each text except its first, in nats at temperature 1:
        (len(text) - 1,) float32 each."""
        found = []
        # The server has to write one token, which is left aside. `prompt_logprobs` of 0 asks for
        # the tokens that are there, and for no likelier ones.
        options = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
        for some in _chunks(texts):
            body = {"model": self.model, "prompt": some, **options}
            with self.reading("/v1/completions"):
                answer = self.ask("/v1/completions", body)
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                for text, choice in zip(some, choices, strict=True):
                    pairs = zip(choice["prompt_logprobs"][1:], text[1:], strict=True)
                    logprobs = [known[str(token)]["logprob"] for known, token in pairs]
                    found.append(np.asarray(logprobs, np.float32))
        return found

    def _pooled(
        self, texts: Sequence[Sequence[int]], task: str, sizes: Sequence[int]
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for some in _chunks(texts):
            # Without its activation: vLLM's default squashes scores to 0..1.
            body = {"model": self.model, "input": some, "task": task, "use_activation": False}
            with self.reading("/pooling"):
                data = sorted(self.ask("/pooling", body)["data"], key=lambda one: one["index"])
                wanted = sizes[len(found) : len(found) + len(some)]
                pairs = zip(data, wanted, strict=True)
                found += [np.asarray(one["data"], np.float32).reshape(size) for one, size in pairs]
        return found

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Turn errors of reading an answer to `path` into `ServerError`: the answer holds something
        else than expected."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"[:200]
            raise ServerError(
                f"the vLLM server at {self.url} answered {path} with something unexpected ({what})."
            ) from error


def _chunks(texts: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    lists = [[int(token) for token in text] for text in texts]
    return [lists[start : start + TEXTS] for start in range(0, len(lists), TEXTS)]


def _reason(error: Exception) -> str:
    """Return the innermost reason that requests gives, without the addresses of objects."""
    reason = getattr(error.args[0] if error.args else error, "reason", None) or error
    return f"{type(reason).__name__}: {str(reason).rpartition('>: ')[2] or reason}"[:200]


def _message(answer: Any) -> str:
    try:
        found = answer.json()
    except ValueError:
        return answer.text[:300]
    error = found.get("error", found) if isinstance(found, dict) else found
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
