"""The quickstart scripts, executed as they are, with tiny models and problems in place of those that they load."""

import runpy
from pathlib import Path

import datasets
import pytest
import tiny
import torch

import trl_ext


SCRIPTS = sorted((Path(__file__).parents[2] / "examples" / "quickstart").glob("*.py"))
# In place of what a script asks for, where its configuration has such a setting
SMALL = {
    "max_steps": 2,
    "prompts_per_round": 4,
    "extraction_passes": 1,
    "distillation_passes": 1,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "max_completion_length": 6,
    "max_new_tokens": 6,
    "outlier_top_k": 8,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}
HERE = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False}


def problems(path, split):
    """As `trl-lib/DeepMath-103K` has them."""
    assert (path, split) == ("trl-lib/DeepMath-103K", "train")
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}"}], "solution": f"${2 * i}$"} for i in range(160)]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_quickstart(script, tmp_path, monkeypatch):
    name = {"drpo": "DRPO", "erpd": "ERPD", "rlad": "RLAD", "tropd": "TrOPD"}[script.stem]
    config_class, trainer_class = getattr(trl_ext, f"{name}Config"), getattr(trl_ext, f"{name}Trainer")
    made = {}

    def config(**settings):
        config_class(**settings | HERE)  # the script's own settings are accepted
        small = {setting: value for setting, value in SMALL.items() if setting in config_class.__dataclass_fields__}
        if name == "ERPD":
            del small["max_steps"]
        return config_class(**settings | small | HERE)

    def trainer(model, teacher_model=None, **arguments):
        models = [tiny.save_policy(tmp_path / f"model{i}", seed=i) for i in range(1 if teacher_model is None else 2)]
        made["start"] = tiny.policy(seed=0).state_dict()
        arguments |= {} if teacher_model is None else {"teacher_model": models[1]}
        made["trainer"] = trainer_class(model=models[0], **arguments)
        return made["trainer"]

    monkeypatch.setattr(trl_ext, f"{name}Config", config, raising=False)
    monkeypatch.setattr(trl_ext, f"{name}Trainer", trainer, raising=False)
    monkeypatch.setattr("datasets.load_dataset", problems)
    monkeypatch.setattr("trl.rewards.accuracy_reward", tiny.digits_reward)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    assert (tmp_path / f"{script.stem}_quickstart" / "model.safetensors").exists()
    trained = made["trainer"].model.state_dict()
    assert any(not torch.equal(trained[name].cpu(), value) for name, value in made["start"].items())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_quickstart_is_short_enough_to_copy(script):
    assert len(script.read_text().splitlines()) <= 40
