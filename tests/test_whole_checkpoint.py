"""Half-written and damaged checkpoints are passed over or named; whole ones are resumed from."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file

from trl_ext import DRPOConfig, DRPOTrainer, RLADConfig, RLADTrainer
from trl_ext.whole_checkpoint import check_checkpoint, fault_of, is_write_error, newest_whole_checkpoint


def checkpoint(folder):
    """What a checkpoint consists of, in small."""
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(8)}, folder / "model.safetensors")
    save_file({"0/ids": torch.ones(8)}, folder / "rollouts_0.safetensors", {"step": "1"})
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": torch.ones(8)}, folder / name)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 8}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 8}))
    (folder / "README.md").write_text("a model card")
    return folder


FILES = ["model.safetensors", "rollouts_0.safetensors", "optimizer.pt", "rng_state.pth", "training_args.bin"]
FILES += ["config.json", "trainer_state.json"]


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def test_a_whole_checkpoint_has_no_fault(tmp_path):
    assert fault_of(checkpoint(tmp_path / "checkpoint-8")) is None


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_short_is_named(tmp_path, name, share):
    folder = checkpoint(tmp_path / "checkpoint-8")
    cut(folder / name, share)
    assert fault_of(folder) == f"{name} is cut short or damaged"
    with pytest.raises(ValueError, match=f"{name} is cut short.*name another checkpoint, or pass resume_from_"):
        check_checkpoint(str(folder))


def test_a_shard_that_is_missing_is_named(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-8")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fault_of(folder) == "model-2.safetensors is missing"


def test_rollouts_may_be_deleted(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-8")
    cut(folder / "rollouts_0.safetensors", 0.5)
    with pytest.raises(ValueError, match="or delete that file to sample new rollouts"):
        check_checkpoint(str(folder))
    (folder / "rollouts_0.safetensors").unlink()
    check_checkpoint(str(folder))


def test_the_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    for step in (2, 9, 10, 11):
        checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-12").write_text("not a folder")
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    cut(tmp_path / "checkpoint-10" / "optimizer.pt", 0.9)
    assert newest_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    messages = [record.message for record in caplog.records]
    assert "checkpoint-11 is passed over, because trainer_state.json is missing" in messages[0]
    assert "checkpoint-10 is passed over, because optimizer.pt is cut short" in messages[1]
    with pytest.raises(ValueError, match=r"no whole checkpoint .* train from the start"):
        newest_whole_checkpoint(str(tmp_path), required=["fixed_set_0.safetensors"])
    with pytest.raises(ValueError, match="no whole checkpoint"):
        newest_whole_checkpoint(str(tmp_path / "no such folder"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(30, "Read-only file system"), True),
        (ConnectionError("the Hub is not reachable"), False),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_only_the_disks_errors_are_taken_for_the_disks(error, expected):
    assert is_write_error(error) == expected


# ---- in a run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def make_trainer(path, output_dir, trainer_class=DRPOTrainer, config_class=DRPOConfig, **arguments):
    args = config_class(**tiny.grpo_settings(output_dir, max_steps=4, save_strategy="steps", save_steps=1))
    torch.manual_seed(0)
    return trainer_class(path, tiny.digits_reward, args, tiny.prompts(), **arguments)


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(DRPOTrainer, DRPOConfig), (RLADTrainer, RLADConfig)], ids=["drpo", "rlad"]
)
def test_a_run_resumes_from_the_last_whole_checkpoint(path, tmp_path, caplog, trainer_class, config_class):
    arguments = {"teacher_model": tiny.policy(seed=1)} if trainer_class is RLADTrainer else {}
    whole = make_trainer(path, tmp_path, trainer_class, config_class, **arguments)
    whole.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    cut(tmp_path / "checkpoint-3" / "rollouts_0.safetensors", 0.5)
    with pytest.raises(ValueError, match=r"because rollouts_0.safetensors is cut short"):
        make_trainer(path, tmp_path, trainer_class, config_class, **arguments).train(
            resume_from_checkpoint=tmp_path / "checkpoint-3"
        )
    resumed = make_trainer(path, tmp_path, trainer_class, config_class, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert sum("is passed over" in record.message for record in caplog.records) == 2
    assert resumed.state.global_step == 4
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_checkpoint_that_cannot_be_written(path, tmp_path):
    """A plain file is in the third checkpoint's place. The run stops, and continues once it is gone."""
    (tmp_path / "checkpoint-3").write_text("in the way")
    trainer = make_trainer(path, tmp_path)
    with pytest.raises(OSError, match=r"checkpoint-3 could not be written .*: make room .* from .*checkpoint-2"):
        trainer.train()
    (tmp_path / "checkpoint-3").unlink()
    resumed = make_trainer(path, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_folder_that_is_used_again_is_not_whole_until_it_is_rewritten(path, tmp_path, monkeypatch):
    """Otherwise the state of an earlier run would be taken for that of the one that was killed."""
    make_trainer(path, tmp_path).train()
    trainer = make_trainer(path, tmp_path)

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert fault_of(tmp_path / "checkpoint-1").startswith("trainer_state.json is missing")
