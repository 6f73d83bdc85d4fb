"""Trains, copies and restores a sharded policy on two processes: run by test_erpd_base_policy.py."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


sys.path[:0] = [str(Path(__file__).parents[1] / "support")]
torch.set_num_threads(1)

import tiny  # noqa: E402

from trl_ext.erpd.base_policy import WeightsCopy  # noqa: E402


def fsdp1(model, keeps_gathered):
    strategy = "SHARD_GRAD_OP" if keeps_gathered else "FULL_SHARD"
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Qwen3DecoderLayer}),
        sharding_strategy=getattr(torch.distributed.fsdp.ShardingStrategy, strategy),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )


def fsdp2(model, keeps_gathered):
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=not keeps_gathered)
    return fully_shard(model, reshard_after_forward=not keeps_gathered)


def main():
    distributed.init_process_group("gloo")
    tokens = torch.arange(3, 19)[None] + distributed.get_rank()
    for shard in (fsdp1, fsdp2):
        for keeps_gathered in (False, True):
            case = f"{shard.__name__}, units stay gathered: {keeps_gathered}"
            plain = tiny.policy()
            model = shard(tiny.policy(), keeps_gathered)
            trainer = SimpleNamespace(
                is_deepspeed_enabled=False,
                is_fsdp_enabled=True,
                model=model,
                model_wrapped=model,
                accelerator=SimpleNamespace(is_main_process=distributed.get_rank() == 0, num_processes=2),
            )

            def score(model):
                with torch.no_grad():  # which leaves units gathered
                    return model(input_ids=tokens).logits

            expected = score(plain)
            torch.testing.assert_close(score(model), expected)
            base = WeightsCopy(trainer).take()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            for _ in range(2):
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert (score(model) - expected).abs().max() > 0.1, case
            base.restore()
            torch.testing.assert_close(score(model), expected, msg=case)
            assert all(map(torch.equal, WeightsCopy(trainer).take().tensors, base.tensors)), case
            model(input_ids=tokens, labels=tokens).loss.backward()  # and it can be trained from there
            optimizer.step()
            assert (score(model) - expected).abs().max() > 0.1, case
    distributed.barrier()
    print("all restored")


if __name__ == "__main__":
    main()
