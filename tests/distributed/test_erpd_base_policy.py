"""The base policy comes back to the bit where FSDP shards it."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from trl_ext.erpd.base_policy import save_whole_policy


def test_restoring_under_fsdp():
    """FSDP1 and FSDP2, after forward passes without gradients, which leave weights gathered."""
    script = Path(__file__).with_name("restore_sharded.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    result = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert result.stdout.count("all restored") == 2, "\n".join(result.stderr.splitlines()[-60:])


def test_teachers_are_saved_whole_where_checkpoints_are_shards():
    """Trainer.save_model writes nothing under SHARDED_STATE_DICT."""
    plugin, seen = SimpleNamespace(state_dict_type="SHARDED_STATE_DICT"), []
    trainer = SimpleNamespace(
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        save_model=lambda folder, _internal_call: seen.append((folder, plugin.state_dict_type)),
    )
    save_whole_policy(trainer, "teacher")
    assert seen == [("teacher", "FULL_STATE_DICT")]
    assert plugin.state_dict_type == "SHARDED_STATE_DICT"
