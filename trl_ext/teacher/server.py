"""A teacher that a vLLM server holds, through TRL's own client."""

import math
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from transformers import PreTrainedTokenizerBase
from trl.generation.vllm_client import VLLMClient
from urllib3.util.retry import Retry

from trl_ext.next_token import NextTokens
from trl_ext.teacher.base import Score, Teacher
from trl_ext.teacher.model import ModelTeacher


RETRIES = 3


class _Client(VLLMClient):
    """TRL's client with a time limit for each request, which it lacks, and fewer retries."""

    def __init__(self, url: str, timeout: float) -> None:
        self.timeout = timeout
        super().__init__(base_url=url, connection_timeout=timeout)

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

    Args:
        url (`str`):
            Base URL, e.g. `"http://localhost:8000"`.
        tokenizer_name (`str`, *optional*):
            Hub name or path of the served model, from which its tokenizer is checked. `None` takes the name that the
            server reports.
        timeout (`float`, defaults to `240.0`):
            Seconds to wait for the server at the start, and for each answer.
    """

    scores_every_token = False
    is_local = False

    def __init__(self, url: str, tokenizer_name: str | None = None, timeout: float = 240.0) -> None:
        self.name = self.url = url.rstrip("/")
        self.tokenizer_name = tokenizer_name
        self.timeout = timeout

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self.tokenizer_name is None:
            return None
        served = ModelTeacher(self.tokenizer_name)
        tokenizer = served.tokenizer()
        self.eos_token_ids = served.eos_token_ids
        return tokenizer

    def prepare(self, trainer: Any) -> None:
        if trainer.args.temperature != 1.0:
            raise ValueError(
                f"The teacher server {self.url} scores at temperature 1 only (vLLM's prompt log-probabilities know no "
                f"other) and cannot judge samples at temperature={trainer.args.temperature}: set it to 1.0, or "
                "load the teacher here."
            )
        self.device = trainer.accelerator.device
        try:
            self.client = _Client(self.url, self.timeout)
        except (ConnectionError, requests.RequestException, KeyError, IndexError, ValueError) as error:
            raise ConnectionError(
                f"The teacher server {self.url} did not answer within {self.timeout:g} s ({error}): start it with "
                "`vllm serve`, or correct the URL."
            ) from error

    def sampled_logps(self, batch: dict[str, Any], score: Score) -> torch.Tensor:
        answer = self._ask(batch, 1)
        return self._padded(batch, [[values[0] for values in row] for row in answer["actual_logprobs"]], math.nan)

    def next_tokens(self, batch: dict[str, Any], k: int, batch_size: int, vocab_size: int | None = None) -> NextTokens:
        answer = self._ask(batch, k)

        def ranked(name: str, fill: float) -> torch.Tensor:
            ranks = [[[position[i] for position in row] for row in answer[name]] for i in range(k)]
            return torch.stack([self._padded(batch, rows, fill) for rows in ranks], dim=-1)

        logps = self._padded(batch, [[values[0] for values in row] for row in answer["actual_logprobs"]], math.nan)
        top_k_logps, top_k_ids = ranked("logprobs", -math.inf), ranked("logprob_token_ids", 0).long()
        if vocab_size is not None:  # a token of the teacher's padding has no column of the student's
            unknown = top_k_ids >= vocab_size
            top_k_logps, top_k_ids = top_k_logps.masked_fill(unknown, -math.inf), top_k_ids.masked_fill(unknown, 0)
        return NextTokens(logps, top_k_logps, top_k_ids, None)

    def _ask(self, batch: dict[str, Any], k: int) -> dict[str, list]:
        """The server's answer, of the right shape and made of log-probabilities, or an error that names the URL."""
        if "pixel_values" in batch:
            raise ValueError(f"The teacher server {self.url} cannot be sent images: load the teacher here.")
        prompts = [i[m.bool()].tolist() for i, m in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        masks = batch["completion_mask"].bool()
        completions = [i[m].tolist() for i, m in zip(batch["completion_ids"], masks, strict=True)]
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
            raise ConnectionError(
                f"The teacher server {self.url} failed, with up to {RETRIES} retries of {self.timeout:g} s "
                f"({type(error).__name__}: {error}): see its log (vLLM gives {k} log-probabilities a token only with "
                f"--max-logprobs {k}), or restart it and resume from the last checkpoint."
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

    def _padded(self, batch: dict[str, Any], rows: list[list[float]], fill: float) -> torch.Tensor:
        """Rows of unequal length at the places of the completion's tokens; `fill` where there is none, or -inf."""
        mask = batch["completion_mask"].bool().cpu()
        padded = torch.full(mask.shape, float(fill))
        padded[mask] = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
        if math.isnan(fill):  # the server has no value: the teacher has no opinion
            padded[padded.isinf()] = math.nan
        return padded.to(self.device)
