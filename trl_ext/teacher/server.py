"""A teacher on a vLLM server, through TRL's own client."""

import math
import time
from typing import Any

import requests
import torch
from accelerate.logging import get_logger
from requests.adapters import HTTPAdapter
from transformers import AutoConfig, PreTrainedTokenizerBase
from trl.generation.vllm_client import VLLMClient
from urllib3.util.retry import Retry

from trl_ext.next_token import NextTokens
from trl_ext.teacher.base import Score, Teacher
from trl_ext.teacher.model import ModelTeacher


logger = get_logger(__name__)

RETRIES = 3
# What vLLM says of a request that it refuses, and what to do
REMEDIES = {
    "vocabulary": "choose a teacher of the student's model family",
    "model length": "serve it with a larger --max-model-len, or lower the lengths of prompts and completions",
    "context length": "serve it with a larger --max-model-len, or lower the lengths of prompts and completions",
    "logprobs": "serve it with --max-logprobs {k}",
}


class _Client(VLLMClient):
    """TRL's client with a time limit for all that it does, and fewer retries."""

    def __init__(self, url: str, timeout: float) -> None:
        self.timeout = timeout
        super().__init__(base_url=url, connection_timeout=timeout)
        self.served = self._get(f"{self.base_url}/v1/models")["data"][0]

    def check_server(self, total_timeout: float = 0.0, retry_interval: float = 2.0) -> None:
        """Waits for a healthy server. TRL's own waits without end where something answers that is not one."""
        end = time.monotonic() + total_timeout
        while True:
            left = end - time.monotonic()
            try:
                status = requests.get(f"{self.base_url}/health", timeout=max(left, 0.1)).status_code
                fault = f"/health answered with status {status}"
            except requests.RequestException as error:
                status, fault = 503, f"{type(error).__name__}: {error}"
            if status == 200:
                return
            if status < 500 or left <= 0:  # a server that is starting has no answer, or one of 500 and above
                raise ConnectionError(fault)
            time.sleep(min(retry_interval, max(left, 0.0)))

    def _get(self, url: str, **kwargs: Any) -> dict:
        return super()._get(url, timeout=self.timeout, **kwargs)

    def _post(self, url: str, **kwargs: Any) -> dict:
        retry = Retry(total=RETRIES, backoff_factor=0.5, status_forcelist=[500, 502, 503], allowed_methods=None)
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))
        return super()._post(url, timeout=self.timeout, **kwargs)


class ServerTeacher(Teacher):
    """
    A teacher behind the URL of a vLLM server (`vllm serve`).

    What the server cannot score is NaN: tokens beyond its context length (`--max-model-len`, less the one token that
    it must be asked to generate) and beyond its vocabulary, as far as the latter is known here.

    Args:
        url (`str`):
            Base URL, e.g. `"http://localhost:8000"`. A `/v1` at its end is left out.
        tokenizer_name (`str`, *optional*):
            Hub name or path of the served model, from which its tokenizer is checked. `None` takes the one that the
            server reports.
        timeout (`float`, defaults to `240.0`):
            Seconds to wait for the server at the start, and for each answer.
        init_kwargs (`dict[str, Any]`, *optional*):
            `revision` and `trust_remote_code`, with which its tokenizer and configuration are loaded here.
    """

    scores_every_token = False
    is_local = False

    def __init__(
        self,
        url: str,
        tokenizer_name: str | None = None,
        timeout: float = 240.0,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.name = self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer_name = tokenizer_name
        self.timeout = timeout
        self.init_kwargs = init_kwargs or {}
        self.vocab_size: int | None = None
        self.max_length: int | None = None
        self._client: _Client | None = None

    @property
    def client(self) -> _Client:
        """Connected when it is first needed, which is before any model is loaded here."""
        if self._client is None:
            try:
                self._client = _Client(self.url, self.timeout)
            except Exception as error:  # TRL raises a bare Exception for an HTTP status
                raise ConnectionError(
                    f"The teacher server {self.url} was not ready within {self.timeout:g} s ({error}): start it with "
                    "`vllm serve`, correct the URL, or raise teacher_server_timeout."
                ) from error
            self.max_length = self._client.served.get("max_model_len")
        return self._client

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        reported = self.client.served.get("root") or self.client.served["id"]
        served = ModelTeacher(self.tokenizer_name or reported, self.init_kwargs)
        try:
            tokenizer = served.tokenizer()
            config = AutoConfig.from_pretrained(served.source, **self.init_kwargs)
            self.vocab_size = config.get_text_config().vocab_size
        except (OSError, ValueError) as error:
            if self.tokenizer_name is not None:
                raise
            logger.warning(
                f"The teacher server {self.url} serves {reported!r}, which could not be read here "
                f"({str(error).splitlines()[0]}), so that nothing checks that its tokenizer is the student's: set "
                "teacher_model_name_or_path to a hub name or path of that model."
            )
            return None
        self.eos_token_ids = served.eos_token_ids
        return tokenizer

    def prepare(self, trainer: Any) -> None:
        self.device = trainer.accelerator.device

    def sampled_logps(self, batch: dict[str, Any], score: Score) -> torch.Tensor:
        return self._sampled(batch, self._ask(batch, 1))

    def next_tokens(self, batch: dict[str, Any], k: int, batch_size: int, vocab_size: int | None = None) -> NextTokens:
        answer = self._ask(batch, k)

        def ranked(name: str, fill: float) -> torch.Tensor:
            ranks = [[[position[i] for position in row] for row in answer[name]] for i in range(k)]
            return torch.stack([self._padded(batch, rows, fill) for rows in ranks], dim=-1)

        top_k_logps, top_k_ids = ranked("logprobs", -math.inf), ranked("logprob_token_ids", 0).long()
        if vocab_size is not None:  # a token of the teacher's padding has no column of the student's
            unknown = top_k_ids >= vocab_size
            top_k_logps, top_k_ids = top_k_logps.masked_fill(unknown, -math.inf), top_k_ids.masked_fill(unknown, 0)
        return NextTokens(self._sampled(batch, answer), top_k_logps, top_k_ids, None)

    def _sampled(self, batch: dict[str, Any], answer: dict[str, list]) -> torch.Tensor:
        """Log-probabilities of the completion's tokens, NaN where the server has none."""
        rows = [[values[0] for values in row] for row in answer["actual_logprobs"]]
        logps = self._padded(batch, rows, math.nan)
        unknown = logps.isinf()
        if self.vocab_size is not None:
            unknown |= batch["completion_ids"] >= self.vocab_size
        return logps.masked_fill(unknown, math.nan)

    def _ask(self, batch: dict[str, Any], k: int) -> dict[str, list]:
        """The server's answer, of the right shape and made of log-probabilities, or an error that names the URL."""
        if "pixel_values" in batch:
            raise ValueError(f"The teacher server {self.url} cannot be sent images: load the teacher here.")
        prompts = [i[m.bool()].tolist() for i, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        masks = batch["completion_mask"].bool()
        completions = [i[m].tolist() for i, m in zip(batch["completion_ids"], masks, strict=True)]
        completions = [self._scorable(prompt, ids) for prompt, ids in zip(prompts, completions, strict=True)]
        # Completions that are masked whole (truncated ones, say) have nothing to score
        asked = [i for i, completion in enumerate(completions) if completion]
        if not asked:
            return {name: [[] for _ in completions] for name in ("logprobs", "logprob_token_ids", "actual_logprobs")}
        try:
            answer = self.client.get_sequence_logprobs(
                sequences=[prompts[i] + completions[i] for i in asked],
                prompt_lengths=[len(prompts[i]) for i in asked],
                top_logprobs=k,
            )
        except Exception as error:  # TRL raises a bare Exception for an HTTP status, and what parsing meets otherwise
            text = str(error)
            remedy = next((remedy for part, remedy in REMEDIES.items() if part in text.lower()), "see its log")
            raise ConnectionError(
                f"The teacher server {self.url} failed, with up to {RETRIES} retries of {self.timeout:g} s "
                f"({type(error).__name__}: {text}): {remedy.format(k=k)}, or restart it, and resume from the last "
                "checkpoint."
            ) from error
        for row, i in enumerate(asked):
            values = [value for position in answer["actual_logprobs"][row] for value in position]
            if len(values) != len(completions[i]) or max(values) > 1e-3 or not any(map(math.isfinite, values)):
                raise ConnectionError(
                    f"The teacher server {self.url} answered {len(values)} values such as {values[:3]}, which are not "
                    f"the log-probabilities of a completion of {len(completions[i])} tokens: serve the teacher with "
                    "the vLLM that TRL supports."
                )
        empty: dict[str, list] = {name: [[] for _ in completions] for name in answer}
        for name, rows in answer.items():
            for row, i in zip(rows, asked, strict=True):
                empty[name][i] = row
        return empty

    def _scorable(self, prompt: list[int], completion: list[int]) -> list[int]:
        """As much of a completion as fits the server's context; tokens beyond its vocabulary are replaced."""
        if self.max_length is not None and len(prompt) + len(completion) >= self.max_length:
            logger.warning_once(
                f"The teacher server {self.url} scores sequences of up to {self.max_length - 1} tokens; those "
                "beyond have no teacher score: serve it with a larger --max-model-len."
            )
            completion = completion[: max(self.max_length - 1 - len(prompt), 0)]
        return completion if self.vocab_size is None else [min(i, self.vocab_size - 1) for i in completion]

    def _padded(self, batch: dict[str, Any], rows: list[list[float]], fill: float) -> torch.Tensor:
        """Rows of unequal length at the places of the completion's tokens, `fill` where there is no value."""
        mask = batch["completion_mask"].bool().cpu()
        padded = torch.full(mask.shape, float(fill))
        for values, row, tokens in zip(padded, rows, mask, strict=True):
            values[tokens.nonzero().squeeze(1)[: len(row)]] = torch.tensor(row, dtype=torch.float32)
        return padded.to(self.device)
