"""The studies' runner: what it skips, what it measures, and that a tiny run of it works."""

import json
import os
import sys
import warnings

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies import measures, report, runs, smoke
from studies.low_precision import SAMPLERS
from studies.run import main, missing_runs, parse_flags
from studies.tasks import TASKS


def test_a_run_is_the_same_after_a_round_trip_through_its_result(tmp_path):
    first, second = smoke.RUNS[0], smoke.RUNS[3]
    runs.append_result("smoke", {"run": json.loads(first.key) | {"group": "another"}, "updates": 2}, tmp_path)
    done = runs.finished("smoke", tmp_path)
    assert first.key in done
    assert second.key not in done
    assert runs.with_seeds([first], [1])[0].key not in done


def test_another_copy_of_a_policy_is_not_mixed_with_the_first(tmp_path):
    first, elsewhere = runs.run("grpo"), runs.run("grpo", copy="second")
    assert first.key == runs.identity({**json.loads(first.key), "copy": ""})  # results older than this field
    assert first.key != elsewhere.key
    runs.append_result("smoke", {"run": json.loads(first.key), "weights": "a"}, tmp_path)
    runs.check_copy("smoke", first, "a", tmp_path)
    runs.check_copy("smoke", elsewhere, "b", tmp_path)
    with pytest.raises(ValueError, match="Name a new copy"):
        runs.check_copy("smoke", first, "b", tmp_path)


def test_a_result_on_the_test_problems_is_one_on_the_validation_problems_too(tmp_path):
    chosen, reported = runs.run("grpo", final=False), runs.run("grpo")
    runs.append_result("smoke", {"run": json.loads(reported.key)}, tmp_path)
    assert {chosen.key, reported.key} <= runs.finished("smoke", tmp_path)
    runs.append_result("other", {"run": json.loads(chosen.key)}, tmp_path)
    assert chosen.key in runs.finished("other", tmp_path)
    assert reported.key not in runs.finished("other", tmp_path)


def test_a_seed_or_a_group_narrows_what_is_missing(tmp_path):
    def missing(*flags):
        return missing_runs("smoke", parse_flags(["smoke", "--results", str(tmp_path), *flags]))

    assert len(missing()) == len(missing("--seed", "0")) == len(smoke.RUNS)
    assert missing("--seed", "1", "2") == []
    assert {run.group for run in missing("--seed", "0", "--group", "quick")} == {"quick"}


PAGES = sorted(report.DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(report.DOCS)))
def test_the_tables_of_the_documentation_are_those_of_the_results(page):
    text = page.read_text()
    assert report.with_tables(text) == text, "run python -m studies.report"


def test_only_so_many_slots_and_one_process_for_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(runs.time, "sleep", lambda seconds: pytest.fail("waits") if seconds < 1 else None)
    run = smoke.RUNS[0]
    with runs.slot(2), runs.slot(2), runs.claimed("smoke", run) as ours, runs.claimed("smoke", run) as theirs:
        assert (ours, theirs) == (True, False)
        with pytest.raises(pytest.fail.Exception, match="waits"), runs.slot(2):
            pass
    with runs.slot(1):  # free again
        pass


@pytest.mark.parametrize(("task", "for_validation", "for_test"), [("sums", 700, 1000), ("sums_2_3", 600, 1000)])
def test_problems_to_choose_and_to_report_on_are_not_trained_on(task, for_validation, for_test):
    problems = TASKS[task].problems()
    splits = [
        {frozenset(prompt.rstrip("=").split("+")) for prompt in split["prompt"]}  # a+b and b+a are the same
        for split in (problems.train, problems.validation, problems.test)
    ]
    assert (len(problems.validation), len(problems.test)) == (for_validation, for_test)
    assert len(splits[0] | splits[1] | splits[2]) == sum(map(len, splits))


def test_divergence_to_another_policy_is_the_sum_over_the_vocabulary(tmp_path):
    one, other = (tiny.save_policy(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))
    model, base = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (one, other))
    pad = AutoTokenizer.from_pretrained(one).pad_token_id
    torch.manual_seed(0)
    tokens = torch.randint(5, model.config.vocab_size, (2, 6))
    tokens[1, 5] = pad
    with torch.no_grad():
        to_base, to_teacher, entropy, count = measures.compare(model, tokens, 2, base, None)
        expected = torch.zeros(2)
        for row, length in zip(tokens, (6, 5), strict=True):
            own = model(row[None, :length]).logits[0, 1:-1].log_softmax(-1)
            others = base(row[None, :length]).logits[0, 1:-1].log_softmax(-1)
            expected += torch.stack([(own.exp() * (own - others)).sum(), -(own.exp() * own).sum()])
    assert count == 7
    assert to_teacher == 0
    torch.testing.assert_close(torch.tensor([to_base, entropy]), expected, rtol=1e-4, atol=1e-5)


def test_rounding_has_as_many_levels_as_the_bits_say():
    values = torch.linspace(-1, 1, 1001)[None]
    assert len(SAMPLERS["4 bits"](values).unique()) == 15
    assert SAMPLERS["8 bits"](values).sub(values).abs().max() <= 0.5 / 127 + 1e-6
    assert SAMPLERS["bfloat16"](torch.tensor([1.001])).item() == 1.0


def test_runs_are_made_once_and_measured(tmp_path, cache, monkeypatch, capfd):
    monkeypatch.setenv("TRL_EXT_CACHE", str(cache))
    monkeypatch.setattr(runs.tempfile, "gettempdir", lambda: str(tmp_path))  # slots of its own
    monkeypatch.setattr(os, "nice", lambda increment: None)
    flags = ["smoke", "--group", "quick", "--problems", "20", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["studies.run", *flags])

    def start():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as ending:
                main()
        assert ending.value.code == 0, capfd.readouterr().out[-3000:]
        assert not [warning for warning in caught if "is deprecated" in str(warning.message)]

    start()
    grpo, drpo, erpd, gkd = runs.load_results("smoke", tmp_path)
    assert [point["update"] for point in grpo["stages"][0]["curve"]] == [1, 2]
    assert grpo["test"].keys() == drpo["validation"].keys() == {
        "accuracy", "accuracy_greedy", "kl_to_base", "entropy", "length"
    }  # fmt: skip
    assert "test" not in drpo
    validation = gkd["validation"]  # its teacher is its base: one KL per sequence, the other per token
    assert 0 < validation["kl_to_base"] == pytest.approx(validation["kl_to_teacher"] * validation["length"], rel=0.02)
    assert [run["rollouts"] for run in (grpo, drpo, erpd, gkd)] == [32, 16, 256, 32]
    assert [run["sampling_phases"] for run in (grpo, drpo, erpd, gkd)] == [2, 1, 1, 2]
    policies = [policy["policy"] for policy in erpd["stages"][0]["policies"]]
    assert policies == ["base", "teacher_mse", "unlearned_mse", "distilled"]
    assert erpd["validation"]["kl_to_base"] > 0
    start()
    assert len(runs.load_results("smoke", tmp_path)) == 4
