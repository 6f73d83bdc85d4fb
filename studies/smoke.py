"""A tiny run of every trainer, to see that everything works: `python -m studies.run smoke --problems 20`."""

from studies.runs import Run, Stage, run


TINY = {"per_device_train_batch_size": 16, "max_steps": 2}
ERPD = {"per_device_train_batch_size": 64, "prompts_per_round": 16, "extraction_passes": 1, "distillation_passes": 1}

RUNS = [
    run("grpo", TINY, curve_every=1, group="quick"),
    run("drpo", {**TINY, "num_iterations": 2}, sampler="8 bits", group="quick", final=False),
    run("erpd", {**ERPD, "extraction_loss": "mse"}, group="quick"),
    run("gkd", {**TINY, "lmbda": 1.0}, teacher="pupil", group="quick", final=False),  # its own teacher: none to make
    Run((Stage("sft", {**TINY, "teacher_samples": 32}), Stage("grpo", TINY)), teacher="teacher", group="taught"),
    run("grpo_corrected", {**TINY, "vllm_importance_sampling_mode": "token_truncate"}, sampler="4 bits"),
    run("rlad", TINY, teacher="teacher", group="taught"),
    run("tropd", TINY, teacher="places", group="taught"),
    run("drpo", TINY, task="puzzles", group="puzzles"),
]
