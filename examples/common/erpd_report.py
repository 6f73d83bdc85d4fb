"""What a run of ERPD reports: a line per measured policy while it trains, a table and a picture at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.report import NO_MATPLOTLIB, load_pyplot, markdown_table


NAMES = {"base": "base policy", "teacher": "extreme region policy", "unlearned": "unlearned policy"}
MEASURES = {"reward": "accuracy", "kl_per_sequence": "KL to base, nats per sequence"}
MEASURES |= {"kl_per_token": "nats per token", "entropy": "entropy, nats per token"}
SHOWN = {"reward": "accuracy {:.3f}", "kl_per_sequence": "KL to base {:.2f} nats per sequence"}
SHOWN |= {"entropy": "entropy {:.3f} nats per token"}
COLORS = {1: "tab:orange", 2: "tab:green"}  # of the stages


def measured_policies(log_history: list[dict[str, Any]]) -> list[tuple[int, int, str, dict[str, Any]]]:
    """Round, update, policy and its measures on held-out problems (else on the set), in the order of measuring."""
    policies = []
    for log in log_history:
        for prefix in dict.fromkeys(key.split("/")[0] for key in log):
            if prefix in ("base", "distilled") or prefix.startswith(("teacher_", "unlearned_")):
                values = {name: log.get(f"{prefix}/{name}", log.get(f"{prefix}/set_{name}")) for name in MEASURES}
                policies.append((log["round"], log["step"], prefix, values))
    return policies


def name_of(prefix: str) -> str:
    """`teacher_mse` -> extreme region policy (mse)."""
    kind, _, loss = prefix.partition("_")
    return NAMES.get(kind, f"{kind} policy") + f" ({loss})" * bool(loss)


def boundary_line(log: dict[str, Any]) -> str | None:
    """One line where a policy has been measured."""
    lines = []
    for number, step, prefix, values in measured_policies([{"round": 1, **log}]):
        shown = [form.format(values[name]) for name, form in SHOWN.items() if values[name] is not None]
        lines.append(f"Round {number}, update {step}, {name_of(prefix)}: {', '.join(shown)}")
    return "\n".join(lines) or None


def policies_table(log_history: list[dict[str, Any]]) -> str:
    """A line for the base policy, for each policy of stage 1 and for the distilled one, round by round."""
    rows = [
        [number, name_of(prefix), *("" if values[measure] is None else values[measure] for measure in MEASURES)]
        for number, _, prefix, values in measured_policies(log_history)
    ]
    if not rows and any(log.get("fixed_set/skipped") for log in log_history):
        return "No policy was measured: nothing could be learned from the rewards, and every round was skipped."
    return markdown_table(["round", "policy", *MEASURES.values()], rows)


def draw_stages(log_history: list[dict[str, Any]], path: Path, policies: Sequence[Any] = ()) -> str:
    """
    Accuracy against KL to the base policy, of `policies` (with `name`, `accuracy` and `kl`) or else of those measured
    in the run; and both stages over the updates: KL to the base policy, entropy.
    """
    plt = load_pyplot()
    if plt is None:
        return NO_MATPLOTLIB
    points = [(policy.kl, policy.accuracy, policy.name) for policy in policies] or [
        (values["kl_per_sequence"] or 0.0, values["reward"], f"{name_of(prefix)}, round {number}")
        for number, _, prefix, values in measured_policies(log_history)
        if values["reward"] is not None
    ]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for index, (kl, accuracy, name) in enumerate(points):
        axes[0].plot(kl, accuracy, "o", color=f"C{index % 10}", label=name)
    axes[0].set_title("accuracy on held-out problems", fontsize=10)
    axes[0].set_xlabel("KL to the base policy, nats per sequence")
    if points:
        axes[0].legend(fontsize=8)
    updates = [log for log in log_history if "kl_from_base" in log]
    for axis, key, title in (
        (axes[1], "kl_from_base", "KL from the base policy, nats per token of the fixed set"),
        (axes[2], "entropy", "entropy, nats per token of the fixed set"),
    ):
        for phase in sorted({(log["round"], log["stage"]) for log in updates}):
            steps = [(log["step"], log[key]) for log in updates if (log["round"], log["stage"]) == phase]
            axis.plot(*zip(*steps, strict=True), ".-", color=COLORS[phase[1]], markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("updates (orange: extraction, green: distillation)")
    for axis in axes:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Picture: {path}"
