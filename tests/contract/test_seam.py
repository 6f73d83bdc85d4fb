"""Which files know GRPO's private methods and attributes: where to look when TRL's version is raised."""

import ast
import inspect
import re
from pathlib import Path

from transformers import Trainer
from trl import GRPOTrainer
from trl.trainer.base_trainer import _BaseTrainer

import trl_ext


PACKAGE = Path(trl_ext.__file__).parent
SEAM = {"policy_loss_trainer.py", "rollout_checkpoint.py"}
# What ERPD needs of TRL beyond a loss, and GKD's own seam (tests/contract/test_gkd_contract.py)
OTHER_SEAMS = {"erpd/trainer_host.py", "tropd/tropd_trainer.py", "tropd/sampling.py"}
ALLOWED = {"erpd/sampling.py": {"_tokenizer"}, "erpd/measures.py": {"_metrics"}, "losses/tropd.py": {"_metrics"}}


def attributes(owner):
    """Private names that a class defines or assigns."""
    return {name for name in vars(owner) if re.match("_[a-z]", name)} | set(
        re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(owner))
    )


GRPO_ONLY = attributes(GRPOTrainer) - attributes(Trainer) - attributes(_BaseTrainer)


def private_names(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return (used | {node.name for node in nodes if isinstance(node, ast.FunctionDef)}) & GRPO_ONLY


def test_the_names_are_found():
    assert {"_compute_loss", "_generate", "_calculate_rewards", "_buffered_inputs", "_tokenizer"} <= GRPO_ONLY
    assert {"_compute_loss", "_generate", "_calculate_rewards"} <= private_names(PACKAGE / "policy_loss_trainer.py")


def test_no_file_beside_the_seam_knows_grpos_private_names():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        if name not in SEAM | OTHER_SEAMS and (names := private_names(path) - ALLOWED.get(name, set())):
            found[name] = names
    assert not found, "give PolicyLossTrainer a public method for what is needed there"
