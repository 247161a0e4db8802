"""A running vLLM server, by URL: what it is asked, and what happens when it does not answer."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from tokenenv.errors import InvalidArgument, ServerError
from tokenenv.safety.shown import without_user

BUSY = (429, 502, 503, 504)
"""Answers after which it is worth asking again."""
TEXTS = 64
"""Of one request: a time-out should mean that something is wrong, not that much was asked."""


class VLLMServer:
    """A client of one vLLM server.

    Args:
        url: where it listens, such as "http://127.0.0.1:8000".
        api_key: what `vllm serve --api-key` was given; by default the environment variable
            VLLM_API_KEY, if there is one.
        timeout: seconds that one answer may take, above 0.
        retries: how often a request that failed (no connection, no answer in time, 429, 502 to 504)
            is sent again, after 0, 1, 2, 4, ... seconds; 0 or more.
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
        # Errors name the address: what opens it stays with the session.
        self.url, self.timeout, self.retries = (
            without_user(url).rstrip("/").removesuffix("/v1"),
            timeout,
            retries,
        )
        self._key = api_key or os.environ.get("VLLM_API_KEY")
        self._session = self._make_session(self._key)
        found = urlsplit(url)
        if found.username is not None:
            self._session.auth = (unquote(found.username), unquote(found.password or ""))
        self._model: str | None = None

    def _make_session(self, api_key: str | None) -> Any:
        # Imported here: most uses of the package know no server.
        import requests
        from urllib3 import Retry

        retry = Retry(
            self.retries,
            backoff_factor=0.5,
            status_forcelist=BUSY,
            allowed_methods=None,
            respect_retry_after_header=False,
        )
        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(
                scheme, requests.adapters.HTTPAdapter(pool_maxsize=256, max_retries=retry)
            )
        session.trust_env = (
            False  # a proxy would stand between this process and a server that is usually beside it
        )
        if api_key:
            session.headers["Authorization"] = f"Bearer {api_key}"
        return session

    def ask(self, path: str, body: Any = None, *, method: str = "POST", **query: str) -> Any:
        """The answer's JSON; None if it is none.

        Raises:
            ServerError: no answer after all tries, or one that says what is wrong.
        """
        import requests

        try:
            answer = self._session.request(
                method, self.url + path, json=body, params=query, timeout=self.timeout
            )
        except requests.RequestException as error:
            raise ServerError(
                f"the vLLM server at {self.url} did not answer {path} in {self.retries + 1} tries "
                f"of {self.timeout:g} s each "
                f"at most ({_reason(error)}). Is it running?"
            ) from error
        if not answer.ok:
            raise ServerError(
                f"the vLLM server at {self.url} refused {path} ({answer.status_code}): "
                f"{self._said(answer)}"
            )
        return answer.json() if "json" in answer.headers.get("Content-Type", "") else None

    def _said(self, answer: Any) -> str:
        """What is wrong, in the server's words, which may repeat what it was sent."""
        message = _message(answer)
        return message.replace(self._key, "***") if self._key else message

    @property
    def model(self) -> str:
        """The name of the model that it serves."""
        if self._model is None:
            with self.reading("/v1/models"):
                self._model = self.ask("/v1/models", method="GET")["data"][0]["id"]
        return self._model

    def token_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The raw output of a token-classification model with one label for every token of each
        text, float32."""
        return self._pooled(
            texts,
            {"task": "token_classify", "use_activation": False},
            [len(text) for text in texts],
        )

    def text_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The raw output (1,) of a sequence-classification model with one label for each text,
        float32."""
        return self._pooled(texts, {"task": "classify", "use_activation": False}, [1] * len(texts))

    def prompt_logprobs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """log p of every token of each text but its first, in nats at temperature 1: (len(text) -
        1,) float32."""
        found = []
        for some in _chunks(texts):
            body = {
                "model": self.model,
                "prompt": some,
                "max_tokens": 1,
                "temperature": 1.0,
                "prompt_logprobs": 0,
            }
            with self.reading("/v1/completions"):
                choices = sorted(
                    self.ask("/v1/completions", body)["choices"], key=lambda choice: choice["index"]
                )
                for text, choice in zip(some, choices, strict=True):
                    pairs = zip(choice["prompt_logprobs"][1:], text[1:], strict=True)
                    found.append(
                        np.asarray(
                            [known[str(token)]["logprob"] for known, token in pairs], np.float32
                        )
                    )
        return found

    def _pooled(
        self, texts: Sequence[Sequence[int]], options: dict[str, Any], sizes: Sequence[int]
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for some in _chunks(texts):
            body = {"model": self.model, "input": some, **options}
            with self.reading("/pooling"):
                data = sorted(self.ask("/pooling", body)["data"], key=lambda one: one["index"])
                wanted = sizes[len(found) : len(found) + len(some)]
                pairs = zip(data, wanted, strict=True)
                found += [np.asarray(one["data"], np.float32).reshape(size) for one, size in pairs]
        return found

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Within it, an answer that holds something else than expected is an error of the
        server."""
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
    """The innermost reason that requests gives, without the addresses of objects."""
    reason = getattr(error.args[0] if error.args else error, "reason", None) or error
    return f"{type(reason).__name__}: {str(reason).rpartition('>: ')[2] or reason}"[:200]


def _message(answer: Any) -> str:
    try:
        found = answer.json()
    except ValueError:
        return answer.text[:300]
    error = found.get("error", found) if isinstance(found, dict) else found
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
