"""
Each trainer trains each form of adapter, and what it saves says the same in a fresh process, as an adapter and merged.
"""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
import tropd_runs
from fixed_rollouts import rollout
from greedy import Greedy, greedy
from peft import LoraConfig, get_peft_model
from tiny_erpd import right_or_wrong
from tiny_erpd import settings as erpd_settings
from transformers import AutoModelForCausalLM

from trl_ext import (
    DRPOConfig,
    DRPOTrainer,
    ERPDConfig,
    ERPDTrainer,
    RLADConfig,
    RLADTrainer,
    TrOPDConfig,
    TrOPDTrainer,
)


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
FORMS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "modules_to_save": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "existing": None,  # an adapter that the model comes with
    "beside_teacher": None,  # that, and another one beside it, which is the teacher
}
TITLES = {  # of docs/support.md
    "lora": "LoRA (all-linear)",
    "dora": "DoRA",
    "rslora": "rsLoRA",
    "modules_to_save": "LoRA, modules_to_save",
    "existing": "LoRA, an existing adapter",
    "beside_teacher": "LoRA, an adapter as teacher",
}
CASES = [
    pytest.param((trainer, form), marks=pytest.mark.supports(trainer, TITLES[form]), id=f"{trainer}-{form}")
    for trainer in ("drpo", "rlad", "tropd", "erpd")
    for form in FORMS
    if form != "beside_teacher" or trainer in ("rlad", "tropd")
]
COMMON = {"learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 1e9}


def make_trainer(name: str, form: str, path: str, out: Path):
    model, teacher = path, tiny.policy(seed=1)
    if FORMS[form] is None:
        torch.manual_seed(0)
        own = LoraConfig(**LORA, init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), own)
        if form == "beside_teacher":
            model.add_adapter("expert", own)
            teacher = "expert"
    if name == "tropd":
        trainer = TrOPDTrainer(
            model,
            teacher,
            TrOPDConfig(**tropd_runs.settings(out, **COMMON, max_steps=2)),
            train_dataset=tropd_runs.sums(16),
            processing_class=tiny.tokenizer(),
            peft_config=FORMS[form],
        )
        tropd_runs.hash_rollouts(trainer)
        return trainer
    trainer_class, config_class = {
        "drpo": (DRPOTrainer, DRPOConfig),
        "rlad": (RLADTrainer, RLADConfig),
        "erpd": (ERPDTrainer, ERPDConfig),
    }[name]
    if name == "erpd":
        settings = erpd_settings(out, **COMMON, prompts_per_round=2, extraction_passes=2, distillation_passes=2)
    else:
        settings = tiny.grpo_settings(out, **COMMON, max_steps=2, beta=0.05)
    return trainer_class(
        model,
        right_or_wrong if name == "erpd" else tiny.digits_reward,
        config_class(**settings),
        tiny.prompts(16),
        processing_class=tiny.tokenizer(),
        peft_config=FORMS[form],
        rollout_func=rollout,
        **({"teacher_model": teacher} if name == "rlad" else {}),
    )


class Saved(NamedTuple):
    """What one training run left behind."""

    trained: Greedy  # said by the trained model before it was saved
    moved: set[str]  # the parameters that training has changed
    folder: Path


def train(case: tuple[str, str], path: str, out: Path, folder: Path) -> Saved:
    trainer = make_trainer(*case, path, out)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p.detach(), start[name])}
    trained = greedy(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class)
    trainer.save_model(str(folder))
    return Saved(trained, moved, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """Of the selected cases: what was saved (or the error), what a fresh process says, and the untrained model."""
    path = tiny.save_policy(tmp_path_factory.mktemp("policy"))
    root = tmp_path_factory.mktemp("saved")
    saved = {}
    for case in {item.callspec.params["case"] for item in request.session.items if item.path == request.path}:
        try:
            saved[case] = train(case, path, tmp_path_factory.mktemp("run"), root / "-".join(case))
        except Exception as error:  # which is the error of this case alone
            saved[case] = error
    script = Path(__file__).with_name("load_saved.py")
    result = subprocess.run([sys.executable, str(script), str(root)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    untrained = greedy(AutoModelForCausalLM.from_pretrained(path), tiny.tokenizer())
    return saved, torch.load(root / "said.pt"), untrained


@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_says_the_same_in_a_fresh_process(runs, case):
    saved, said, untrained = runs
    run, (_, form) = saved[case], case
    if isinstance(run, Exception):
        raise run
    assert (run.trained.logits - untrained.logits).abs().max() > 1e-3  # else the base model would say the same
    kinds = {"lora_A", "lora_B"} | {"dora": {"lora_magnitude_vector"}, "modules_to_save": {"lm_head"}}.get(form, set())
    assert all(any(kind in parameter for parameter in run.moved) for kind in kinds)
    assert not any("expert" in parameter or "base_layer" in parameter for parameter in run.moved)
    assert not (run.folder / "expert").exists()
    for how in ("loaded", "merged"):
        ours = Greedy(*said["-".join(case)][how])
        torch.testing.assert_close(ours.logits, run.trained.logits, rtol=1e-4, atol=1e-4)
        assert ours.texts == run.trained.texts
