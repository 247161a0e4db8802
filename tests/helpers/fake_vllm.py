"""As much of a vLLM server as this package asks for, computed by tiny transformers models in this
process."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import torch
from safetensors.torch import load_file

from tokenenv.agents.rollout.actor import sample


class FakeServer:
    """Serves from when it is built; `stop` and `start` keep its port."""

    def __init__(self, language_model=None, reward_model=None, *, key=None, raw_logprobs=False):
        self.language_model, self.reward_model, self.key, self.raw_logprobs = (
            language_model,
            reward_model,
            key,
            raw_logprobs,
        )
        self.asked: list[tuple[str, dict, dict]] = []
        self.fail: list[int] = []
        """Answers to give before any real one."""
        self.delay = 0.0
        self.spoil = None
        """Changes an answer before it is sent."""
        self.port, self.dead = 0, False
        self._lock = threading.Lock()
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                server._answer(self, {})

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server._answer(self, json.loads(body) if body else {})

        class Quiet(ThreadingHTTPServer):
            daemon_threads, allow_reuse_address = True, True

            def handle_error(self, request, client_address):
                pass

        self._server = Quiet(("127.0.0.1", self.port), Handler)
        self.port, self.dead = self._server.server_address[1], False
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def stop(self):
        self.dead = True  # connections that are open are answered no more either
        self._server.shutdown()
        self._server.server_close()

    def paths(self):
        return [path for path, _, _ in self.asked]

    def _answer(self, handler, body):
        url = urlsplit(handler.path)
        if self.dead:
            handler.close_connection = True
            handler.connection.close()
            return
        with self._lock:
            self.asked.append((url.path, body, dict(parse_qsl(url.query))))
            status = self.fail.pop(0) if self.fail else 200
        time.sleep(self.delay)
        if self.key is not None and handler.headers.get("Authorization") != f"Bearer {self.key}":
            status = 401
        answer, kind = {"error": {"message": "something is wrong"}}, "application/json"
        if status == 200:
            with self._lock:
                answer = getattr(self, "_" + url.path.strip("/").replace("/", "_"))(body)
            answer = self.spoil(answer) if self.spoil else answer
        if isinstance(answer, str):
            kind = "text/plain"
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _v1_models(self, body):
        return {"data": [{"id": "a-model"}]}

    @torch.no_grad()
    def _pooling(self, body):
        assert body["model"] == "a-model"
        assert body["use_activation"] is False
        out = [self.reward_model(torch.tensor([text])).logits for text in body["input"]]
        data = [
            {"index": i, "data": logits[0].reshape(-1, 1).tolist()} for i, logits in enumerate(out)
        ]
        return {"data": data[::-1]}

    def _v1_completions(self, body):
        prompts = body["prompt"]
        if isinstance(prompts[0], int):
            return {"choices": [self._write(body)]}
        return {
            "choices": [
                {"index": i, "prompt_logprobs": self._logprobs(p)} for i, p in enumerate(prompts)
            ][::-1]
        }

    @torch.no_grad()
    def _logprobs(self, text):
        logprobs = torch.log_softmax(self.language_model(torch.tensor([text])).logits[0], -1)
        likeliest = logprobs.argmax(-1).tolist()  # which is there too, as with vLLM
        pairs = enumerate(text[1:])
        return [
            None,
            *(
                {str(likeliest[t]): {"logprob": 9.0}, str(x): {"logprob": float(logprobs[t, x])}}
                for t, x in pairs
            ),
        ]

    @torch.no_grad()
    def _write(self, body):
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        tokens, logprobs, temperature = [], [], body.get("temperature", 1.0)
        while len(tokens) < body["max_tokens"] and not (
            tokens and tokens[-1] in body.get("stop_token_ids", ())
        ):
            logits = self.language_model(torch.tensor([body["prompt"] + tokens])).logits[:, -1]
            if body.get("top_k") == 1:
                kept = logits.masked_fill(logits < logits.max(), -torch.inf)
                token, logprob = kept.argmax(-1), torch.log_softmax(kept, -1).max(-1).values
            else:
                token, logprob = sample(logits, temperature, generator)
            if self.raw_logprobs:
                logprob = torch.log_softmax(logits, -1)[0, token]
            tokens.append(token.item())
            logprobs.append(logprob.item())
        return {"index": 0, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}

    def _pause(self, body):
        return {}

    def _resume(self, body):
        return {}

    def _reset_prefix_cache(self, body):
        return {"success": True}

    def _collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        self.language_model.load_state_dict(
            load_file(f"{body['kwargs']['weights_path']}/model.safetensors")
        )
        return {"results": [None]}

    def _v1_load_lora_adapter(self, body):
        """Merged into the base: W + 2 B A."""
        adapter = load_file(f"{body['lora_path']}/adapter_model.safetensors")
        config = json.loads(Path(body["lora_path"], "adapter_config.json").read_text())
        self.base = getattr(self, "base", None) or {
            k: v.clone() for k, v in self.language_model.state_dict().items()
        }
        merged = dict(self.base)
        for name, a in adapter.items():
            if ".lora_A." in name:
                target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
                scale = config["lora_alpha"] / config["r"]
                merged[target] = (
                    self.base[target] + scale * adapter[name.replace(".lora_A.", ".lora_B.")] @ a
                )
        self.language_model.load_state_dict(merged)
        return "Success: LoRA adapter added."
