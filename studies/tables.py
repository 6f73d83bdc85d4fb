"""From result lines to table rows: mean and range over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from common.report import markdown_table
from studies.runs import RESULTS, Run, identity, load_results


@dataclass(frozen=True)
class Summary:
    """The results of one run over its seeds."""

    results: Sequence[dict[str, Any]]

    def values(self, measure: str, split: str = "test") -> list[float]:
        return [result[split][measure] for result in self.results]

    def mean(self, measure: str, split: str = "test") -> float:
        return statistics.fmean(self.values(measure, split))

    def spread(self, measure: str, split: str = "test", digits: int = 3) -> str:
        """Mean, and the least and the greatest where there are several seeds."""
        values = self.values(measure, split)
        text = f"{statistics.fmean(values):.{digits}f}"
        return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    def spent(self, what: str) -> int:
        return self.results[0][what]

    def between_the_stages(self, prefix: str) -> list[str]:
        """
        Accuracy and KL of an ERPD policy of the last round, as the trainer itself measures them: on 400 validation
        problems, with one completion each.
        """
        policies = [
            [p for p in result["stages"][0]["policies"] if p["policy"].startswith(prefix)][-1:]
            for result in self.results
        ]
        if not all(policies):
            return ["", ""]
        means = [statistics.fmean(p[-1][name] for p in policies) for name in ("reward", "kl_per_sequence")]
        return [f"{means[0]:.3f}", f"{means[1]:.2f}"]

    def worst_dip(self) -> float:
        """The greatest fall of the rollouts' mean reward below what it has been before; mean over the seeds."""
        dips = []
        for result in self.results:
            rewards = [reward for stage in result["stages"] for _, reward in stage["rewards"]]
            dips.append(max(max(rewards[: i + 1]) - reward for i, reward in enumerate(rewards)))
        return statistics.fmean(dips)

    @property
    def seeds(self) -> int:
        return len(self.results)


def without_seed(description: dict[str, Any]) -> str:
    return identity(description, ("seed", "group", "curve_every", "final"))


@cache
def results_by_run(study: str, folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """One result per seed: where a run was made for the search and again for the report, the latter."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for result in load_results(study, folder):
        of_run = runs.setdefault(without_seed(result["run"]), {})
        if result["run"]["seed"] not in of_run or "test" in result:
            of_run[result["run"]["seed"]] = result
    return {key: [of_run[seed] for seed in sorted(of_run)] for key, of_run in runs.items()}


def summary(study: str, run: Run, split: str = "test", folder: Path = RESULTS) -> Summary | None:
    """Of those seeds that were measured on `split`; `None` where there is none."""
    results = [
        result for result in results_by_run(study, folder).get(without_seed(asdict(run)), []) if split in result
    ]
    return Summary(results) if results else None


def of_one_seed(study: str, run: Run, split: str, measure: str = "accuracy") -> str:
    """As text: the result of just this run, or nothing."""
    found = summary(study, run, split)
    values = [r[split][measure] for r in found.results if r["run"]["seed"] == run.seed] if found else []
    return f"{values[0]:.3f}" if values else ""


COLUMNS = {
    "accuracy": ("accuracy, sampled", 3),
    "accuracy_greedy": ("greedy", 3),
    "kl_to_base": ("KL to base, nats per sequence", 2),
    "kl_to_teacher": ("KL to teacher, nats per token", 3),
    "entropy": ("entropy, nats per token", 3),
}
SPENT = {"rollouts": "rollouts", "sampling_phases": "sampling phases", "updates": "updates"}


def table(
    study: str,
    rows: Mapping[str, Run | Summary | None],
    split: str = "test",
    measures: Sequence[str] = ("accuracy", "accuracy_greedy", "kl_to_base", "entropy"),
    spent: Sequence[str] = (),
    first: str = "run",
    extra: Mapping[str, Callable[[Summary], str]] | None = None,
) -> str:
    """A line for each of `rows` of which there is a result; `extra` has further columns."""
    extra = extra or {}
    header = [first, *(SPENT[name] for name in spent), *(COLUMNS[name][0] for name in measures)]
    header += [*extra, "seeds"]
    lines = []
    for name, row in rows.items():
        found = summary(study, row, split) if isinstance(row, Run) else row
        if found:
            cells = [found.spread(measure, split, COLUMNS[measure][1]) for measure in measures]
            cells += [text(found) for text in extra.values()]
            lines.append([name, *(f"{found.spent(what):,}" for what in spent), *cells, str(found.seeds)])
    return markdown_table(header, lines)
