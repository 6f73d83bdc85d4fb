"""DRPOTrainer on tiny models: the loss it takes, what it measures, what it refuses."""

import math
from functools import partial

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from trl_ext import DRPOConfig, DRPOTrainer
from trl_ext.arguments import as_config, changed_settings
from trl_ext.losses import dppo_loss, drpo_loss, ppo_clip_loss, spo_loss


REGION_METRICS = {
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "probability_shift/mean",
    "probability_shift/max",
    "outside_region/positive",
    "outside_region/negative",
}
REGULARIZER_METRICS = REGION_METRICS | {"gradient_weight/mean", "gradient_weight/min", "regularizer"}
MASK_METRICS = REGION_METRICS | {"masked/positive", "masked/negative"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_policy(tmp_path_factory.mktemp("policy"))


def make_trainer(path, tmp_path, config_class=DRPOConfig, trainer_class=DRPOTrainer, eval_dataset=None, **kwargs):
    trainer_arguments = ("peft_config", "rollout_func", "callbacks")
    arguments = {name: kwargs.pop(name) for name in trainer_arguments if name in kwargs}
    args = config_class(**tiny.grpo_settings(tmp_path, **kwargs))
    return trainer_class(path, tiny.digits_reward, args, tiny.prompts(), eval_dataset, **arguments)


def region_metrics(log):
    return {name for name in log if name in REGULARIZER_METRICS | MASK_METRICS}


# ---- the loss


def stale_batch(trainer, sampler=False):
    """A rollout batch whose old policy, and sampler, are some way off the current policy."""
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])
    generator = torch.Generator().manual_seed(0)
    shape = inputs["completion_ids"].shape
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        shape[1],
    )
    inputs["old_per_token_logps"] = logps.detach() + 0.5 * torch.randn(shape, generator=generator)
    if sampler:
        inputs["sampling_per_token_logps"] = logps.detach() + 0.5 * torch.randn(shape, generator=generator)
        inputs["sampling_per_token_logps"][:, 1] = math.nan
    return inputs


def expected_loss(trainer, inputs, behaviour_logps):
    """DRPO on full logits, aggregated over all tokens as `dapo` does: what the trainer must equal."""
    logps = tiny.naive_logps(trainer.model, inputs, trainer.args.temperature)
    mu = torch.where(behaviour_logps.isnan(), logps.detach(), behaviour_logps).exp()
    ratio = logps.exp() / mu
    advantages = inputs["advantages"][:, None]
    objective = ratio * advantages - advantages.abs() * mu * (ratio - 1) ** 2 / (2 * 0.15)
    return -(objective * inputs["completion_mask"]).sum() / inputs["completion_mask"].sum()


@pytest.mark.parametrize("source", ["sampler", "old", "current"])
def test_loss_and_gradient_of_the_objective(path, tmp_path, source):
    trainer = make_trainer(path, tmp_path, temperature=0.8)
    inputs = stale_batch(trainer, sampler=source == "sampler")
    if source == "current":
        del inputs["old_per_token_logps"]
    trainer.current_gradient_accumulation_steps = 1
    ours = trainer.compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(ours, list(trainer.model.parameters()))

    behaviour_logps = {
        "sampler": inputs.get("sampling_per_token_logps"),
        "old": inputs.get("old_per_token_logps"),
        "current": torch.full_like(inputs["completion_ids"], math.nan, dtype=torch.float32),
    }[source]
    theirs = expected_loss(trainer, inputs, behaviour_logps)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(theirs, list(trainer.model.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "loss_function"),
    [
        ({"trust_region": "drpo", "trust_region_radius": 0.02}, partial(drpo_loss, radius=0.02)),
        ({"trust_region": "spo"}, partial(spo_loss, radius=0.2)),
        ({"trust_region": "dppo_tv", "trust_region_radius": 0.01}, partial(dppo_loss, radius=0.01, divergence="tv")),
        ({"trust_region": "dppo_kl", "trust_region_radius": 0.01}, partial(dppo_loss, radius=0.01, divergence="kl")),
        (
            {"trust_region": "dppo_kl", "trust_region_radius": 0.5, "dppo_ratio_cap": 1.1},
            partial(dppo_loss, radius=0.5, divergence="kl", ratio_cap=1.1),
        ),
    ],
)
def test_settings_reach_the_loss(path, tmp_path, settings, loss_function):
    trainer = make_trainer(path, tmp_path, **settings)
    inputs = stale_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    logps = trainer.score_completions(trainer.model, inputs)
    mask = inputs["completion_mask"]
    expected = loss_function(logps, inputs["old_per_token_logps"], inputs["advantages"][:, None], mask)
    torch.testing.assert_close(loss, expected.loss.sum() / mask.sum())
    others = {
        round(f(logps, inputs["old_per_token_logps"], inputs["advantages"][:, None], mask).loss.sum().item(), 4)
        for f in (partial(drpo_loss, radius=0.15), ppo_clip_loss)
    }
    assert round(expected.loss.sum().item(), 4) not in others


def test_an_interrupted_loss_leaves_no_trace(path, tmp_path):
    trainer = make_trainer(path, tmp_path, delta=1.5)
    inputs = stale_batch(trainer)
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer.compute_loss(trainer.model, inputs)
    with pytest.raises(KeyError):  # an out-of-memory error, say, which the user catches
        trainer.compute_loss(trainer.model, {k: v for k, v in inputs.items() if k != "num_items_in_batch"})
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (0.2, 0.2, 1.5)
    assert trainer._loss_inputs is None
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), expected)


def test_the_rollout_batch_is_left_as_it_was(path, tmp_path):
    trainer = make_trainer(path, tmp_path, beta=0.1, delta=1.5)
    inputs = stale_batch(trainer, sampler=True)
    trainer.current_gradient_accumulation_steps = 1
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    trainer.compute_loss(trainer.model, inputs)
    assert set(before) == {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(7), inputs[name].nan_to_num(7)), name
    assert (trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta) == (0.2, 0.2, 1.5)


def test_off_policy_mask_judges_by_the_advantages(path, tmp_path):
    """It drops sequences of negative advantage that drifted; those of positive advantage stay, however far."""
    trainer = make_trainer(path, tmp_path, off_policy_mask_threshold=1e-6)
    inputs = stale_batch(trainer)
    inputs["old_per_token_logps"] += 1.0  # drifted: log old - log current is about 1
    trainer.current_gradient_accumulation_steps = 1
    trainer.off_policy_mask_threshold = None
    inputs["advantages"] = torch.tensor([1.0, -1.0] * 4)
    half = dict(inputs, advantages=torch.tensor([1.0, 0.0] * 4))
    kept = trainer.compute_loss(trainer.model, half)
    trainer.off_policy_mask_threshold = 1e-6
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), kept)


@pytest.mark.parametrize("trust_region", ["drpo", "spo", "dppo_tv", "dppo_kl"])
def test_hostile_rollout_scores_keep_the_run_alive(path, tmp_path, trust_region):
    trainer = make_trainer(path, tmp_path, trust_region=trust_region, beta=0.1)
    inputs = stale_batch(trainer, sampler=True)
    inputs["sampling_per_token_logps"][:, 2] = -math.inf
    inputs["sampling_per_token_logps"][:, 3] = -1e4
    inputs["completion_mask"][3] = 0
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_infinite_scores_count_as_missing_in_the_kl_term_too(path, tmp_path, value):
    reference = tiny.save_policy(tmp_path / "other", seed=5)
    trainer = make_trainer(path, tmp_path, beta=0.1)
    trainer.ref_model = make_trainer(reference, tmp_path).model
    inputs = stale_batch(trainer, sampler=True)
    trainer.current_gradient_accumulation_steps = 1
    expected = trainer.compute_loss(trainer.model, inputs)
    inputs["sampling_per_token_logps"] = inputs["sampling_per_token_logps"].nan_to_num(nan=value)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), expected)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("in_the_loss", [0, 1])
def test_an_impossible_token_does_not_make_the_loss_nan(path, tmp_path, monkeypatch, in_the_loss, on_policy):
    trainer = make_trainer(path, tmp_path)
    inputs = stale_batch(trainer)
    if on_policy:
        del inputs["old_per_token_logps"]
    inputs["completion_mask"][0, 0] = in_the_loss
    score = GRPOTrainer._get_per_token_logps_and_entropies

    def with_an_impossible_token(self, *args, **kwargs):
        logps, *others = score(self, *args, **kwargs)
        return torch.cat(
            [logps[:, :1].masked_fill(torch.arange(8)[:, None] == 0, -math.inf), logps[:, 1:]], 1
        ), *others

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", with_an_impossible_token)
    trainer.current_gradient_accumulation_steps = 1
    assert trainer.compute_loss(trainer.model, inputs).isfinite()


def test_a_policy_loss_may_score_again(path, tmp_path):
    class Twice(DRPOTrainer):
        def policy_loss(self, per_token_logps, behaviour_logps, advantages, mask, inputs):
            again = self.score_completions(self.model, inputs)
            torch.testing.assert_close(again, per_token_logps)
            return super().policy_loss(again, behaviour_logps, advantages, mask, inputs)

    make_trainer(path, tmp_path, trainer_class=Twice).train()


def test_off_policy_mask_can_be_overridden_as_in_trl(path, tmp_path):
    seen = []

    class Masked(DRPOTrainer):
        @staticmethod
        def get_off_policy_mask(advantages, per_token_logps, sampling_per_token_logps, mask, off_policy_threshold):
            seen.append(advantages)
            return torch.ones_like(advantages)

    make_trainer(path, tmp_path, trainer_class=Masked, off_policy_mask_threshold=0.1, max_steps=1).train()
    assert seen[0].shape == (8, 1)
    assert seen[0].sum().abs() < 1e-3  # normalised in groups
    arguments = (torch.ones(1, 1), torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), 0.1)
    assert DRPOTrainer.get_off_policy_mask(*arguments) == 1


# ---- rollout functions that return something else than a score a token


def test_scores_of_another_length_are_refused(path, tmp_path):
    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        return {**output, "logprobs": [scores[:-1] for scores in output["logprobs"]]}

    with pytest.raises(ValueError, match="one log-probability per token"):
        make_trainer(path, tmp_path, rollout_func=rollout).train()


def test_scores_that_are_placeholders_bring_a_warning(path, tmp_path, caplog):
    def rollout(prompts, trainer):
        output = tiny.rollout(prompts, trainer)
        return {**output, "logprobs": [[0.0] * len(scores) for scores in output["logprobs"]]}

    make_trainer(path, tmp_path, rollout_func=rollout).train()
    assert "or logprobs=None for the trainer to compute them" in caplog.text


# ---- forward passes


def count_passes(trainer):
    """Scoring passes (not generation) of the policy, and of the reference where it is another model."""
    counts = {"policy": 0, "reference": 0}

    def hook(name):
        def count(module, args, kwargs):
            counts[name] += bool(kwargs.get("fused_lm_head"))

        return count

    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    model.register_forward_pre_hook(hook("policy"), with_kwargs=True)
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_pre_hook(hook("reference"), with_kwargs=True)
    return counts


def unscored_rollout(prompts, trainer):
    return {**tiny.rollout(prompts, trainer), "logprobs": None}


@pytest.mark.parametrize(
    ("trainer_class", "rollout_func", "lora", "beta", "expected"),
    [
        # 4 updates, 2 rollout batches
        (GRPOTrainer, tiny.rollout, False, 0.0, {"policy": 4 + 2, "reference": 0}),
        (DRPOTrainer, tiny.rollout, False, 0.0, {"policy": 4, "reference": 0}),
        (DRPOTrainer, unscored_rollout, False, 0.0, {"policy": 4 + 2, "reference": 0}),
        (DRPOTrainer, None, False, 0.0, {"policy": 4 + 2, "reference": 0}),
        (DRPOTrainer, tiny.rollout, False, 0.1, {"policy": 4, "reference": 2}),
        (DRPOTrainer, tiny.rollout, True, 0.0, {"policy": 4, "reference": 0}),
        # the reference is the same model without its adapter
        (GRPOTrainer, tiny.rollout, True, 0.1, {"policy": 4 + 2 + 2, "reference": 0}),
        (DRPOTrainer, tiny.rollout, True, 0.1, {"policy": 4 + 2, "reference": 0}),
    ],
)
def test_no_pass_for_old_logps_where_the_sampler_scored(
    path, tmp_path, trainer_class, rollout_func, lora, beta, expected
):
    peft_config = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    trainer = make_trainer(
        path, tmp_path, GRPOConfig, trainer_class, rollout_func=rollout_func, peft_config=peft_config, beta=beta
    )
    counts = count_passes(trainer)
    trainer.train()
    assert counts == expected


@pytest.mark.parametrize(
    ("lora", "expected"), [(True, {"policy": 4 + 4, "reference": 0}), (False, {"policy": 4, "reference": 4})]
)
def test_the_reference_is_scored_where_there_is_no_old_pass_to_skip(path, tmp_path, lora, expected):
    """Each update has its own rollouts, so that TRL makes no pass for old log-probabilities."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj"]) if lora else None
    trainer = make_trainer(
        path, tmp_path, rollout_func=tiny.rollout, peft_config=peft_config, beta=0.1, num_iterations=1
    )
    counts = count_passes(trainer)
    trainer.train()
    assert counts == expected


def test_the_reference_is_the_base_model_when_the_old_pass_is_skipped(path, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    trainer = make_trainer(path, tmp_path, rollout_func=tiny.rollout, peft_config=lora, beta=0.1)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i // 4] for i in range(8)])
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with trainer.model.disable_adapter(), torch.no_grad():
        expected, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, inputs["completion_ids"].shape[1]
        )
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["ref_per_token_logps"][mask], expected[mask])
    assert "old_per_token_logps" not in inputs


# ---- vLLM, whose engine cannot run here: its place is taken by a stub with the same two methods


class StubEngine:
    def __init__(self, trainer):
        self.trainer = trainer

    def sync_weights(self):
        pass

    def generate(self, prompts, images=None, num_generations=1, **kwargs):
        texts = self.trainer.processing_class.batch_decode(prompts)
        output = tiny.rollout(texts, self.trainer)
        logprobs = [[[math.nan if x is None else x] for x in scores] for scores in output["logprobs"]]
        return output["prompt_ids"], output["completion_ids"], logprobs, None


@pytest.mark.parametrize("correction", [True, False])
def test_vllm_is_corrected_once(path, tmp_path, monkeypatch, correction):
    """Its log-probabilities are the ratio's denominator, so that no importance sampling weight comes on top."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", lambda **kwargs: None)
    trainer = make_trainer(
        path, tmp_path, use_vllm=True, vllm_mode="colocate", vllm_importance_sampling_correction=correction
    )
    trainer.vllm_generation = StubEngine(trainer)
    counts = count_passes(trainer)
    batches = []
    compute = trainer.policy_loss

    def record(logps, behaviour_logps, advantages, mask, inputs):
        batches.append((behaviour_logps, inputs))
        return compute(logps, behaviour_logps, advantages, mask, inputs)

    trainer.policy_loss = record
    trainer.train()
    assert len(batches) == 4
    for behaviour_logps, inputs in batches:
        assert "importance_sampling_ratio" not in inputs
        assert (behaviour_logps is inputs["sampling_per_token_logps"]) == correction
        assert torch.equal(behaviour_logps, inputs["old_per_token_logps"]) == (not correction)
    assert counts["policy"] == (4 if correction else 4 + 2)
    assert ("sampling/missing_logps" in trainer.state.log_history[0]) == correction
    if correction:
        assert trainer.state.log_history[0]["sampling/missing_logps"] == pytest.approx(0.2, abs=0.08)


# ---- metrics


@pytest.mark.parametrize(
    ("trust_region", "names"),
    [
        ("drpo", REGULARIZER_METRICS),
        ("spo", REGULARIZER_METRICS),
        ("dppo_tv", MASK_METRICS),
        ("dppo_kl", MASK_METRICS),
    ],
)
def test_metrics_of_each_trust_region(path, tmp_path, trust_region, names):
    radius = {"spo": 0.1, "dppo_kl": 1e-3}.get(trust_region, 0.01)
    trainer = make_trainer(
        path, tmp_path, trust_region=trust_region, trust_region_radius=radius, rollout_func=tiny.rollout, max_steps=6
    )
    trainer.train()
    logs = trainer.state.log_history[:-1]
    for log in logs:
        assert region_metrics(log) == names
        assert not any(name.startswith("clip_ratio") for name in log)
        assert log["ratio/min"] <= log["ratio/mean"] <= log["ratio/max"]
        assert 0 <= log["probability_shift/mean"] <= log["probability_shift/max"] <= 1
    for name in names:
        assert any(log[name] != 0 for log in logs), f"{name} is always 0"


def test_metrics_are_means_over_all_tokens_of_the_step(path, tmp_path):
    """Of unequal micro-batches, every token weighs the same; padding and masked tokens do not count."""
    trainer = make_trainer(
        path,
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=2,
        num_iterations=2,
        max_steps=2,
        logging_steps=1,
    )
    seen = []
    compute = trainer.policy_loss

    def record(logps, behaviour_logps, advantages, mask, inputs):
        seen.append(((logps.detach() - behaviour_logps).exp(), mask.bool(), advantages))
        return compute(logps, behaviour_logps, advantages, mask, inputs)

    trainer.policy_loss = record
    trainer.train()
    ratios = torch.cat([ratio[mask] for ratio, mask, _ in seen[2:4]])
    log = trainer.state.log_history[1]
    assert log["ratio/mean"] == pytest.approx(ratios.mean().item(), rel=1e-5)
    assert log["ratio/min"] == pytest.approx(ratios.min().item(), rel=1e-5)
    assert log["ratio/max"] == pytest.approx(ratios.max().item(), rel=1e-5)
    assert log["ratio/max"] > 1 > log["ratio/min"]


def test_on_policy_updates_log_no_constants(path, tmp_path, caplog):
    trainer = make_trainer(path, tmp_path, num_iterations=1)
    assert "raise num_iterations or steps_per_generation" in caplog.text
    trainer.train()
    assert region_metrics(trainer.state.log_history[0]) == set()
    assert "reward" in trainer.state.log_history[0]


def test_evaluation_and_logged_completions(path, tmp_path):
    trainer = make_trainer(
        path,
        tmp_path,
        eval_dataset=tiny.prompts(8),
        rollout_func=tiny.rollout,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        log_completions=True,
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(evaluations) == 2
    assert evaluations[0]["eval_ratio/max"] > 1  # against the sampler
    assert (tmp_path / "completions" / "completions_00001.parquet").exists()


def test_evaluation_of_its_own_samples_logs_no_constants(path, tmp_path):
    trainer = make_trainer(path, tmp_path, eval_dataset=tiny.prompts(8), per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert "eval_reward" in metrics
    assert not any(("ratio/" in name and "clipped" not in name) or "shift" in name for name in metrics)


# ---- what moves


def parameters_that_moved(trainer):
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("trust_region", ["drpo", "spo", "dppo_tv", "dppo_kl"])
def test_every_parameter_moves(path, tmp_path, trust_region):
    trainer = make_trainer(path, tmp_path, trust_region=trust_region)
    assert parameters_that_moved(trainer) == {name for name, _ in trainer.model.named_parameters()}


def test_lora_moves_only_the_adapter(path, tmp_path):
    trainer = make_trainer(path, tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    moved = parameters_that_moved(trainer)
    assert moved == {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    assert len(moved) == 8
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_reward_rises(path, tmp_path):
    trainer = make_trainer(path, tmp_path, max_steps=40, per_device_train_batch_size=32, num_iterations=4)
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.2


# ---- configurations


def test_a_plain_grpo_config_has_the_defaults(path, tmp_path):
    args = GRPOConfig(**tiny.grpo_settings(tmp_path, temperature=0.7))
    trainer = DRPOTrainer(path, tiny.digits_reward, args, tiny.prompts())
    assert isinstance(trainer.args, DRPOConfig)
    assert type(args) is GRPOConfig  # the user's own object stays what it is
    assert (trainer.args.trust_region, trainer.trust_region_radius, trainer.args.temperature) == ("drpo", 0.15, 0.7)
    assert trainer.args.to_dict()["trust_region"] == "drpo"
    trainer.train()


def test_a_users_own_subclass_of_grpo_config(path, tmp_path):
    class TheirConfig(GRPOConfig):
        pass

    trainer = make_trainer(path, tmp_path, config_class=TheirConfig)
    assert isinstance(trainer.args, TheirConfig)
    assert trainer.trust_region_radius == 0.15


def test_no_config_at_all_takes_trls_output_directory(path):
    assert as_config(None, str, "org/model", "DRPO") == "model-DRPO"
    assert as_config(None, str, tiny.policy(), "DRPO") == "policy-DRPO"


@pytest.mark.parametrize(
    ("trust_region", "radius"), [("drpo", 0.15), ("spo", 0.2), ("dppo_tv", 0.15), ("dppo_kl", 0.05)]
)
def test_default_radius(path, tmp_path, trust_region, radius):
    trainer = make_trainer(path, tmp_path, trust_region=trust_region)
    assert trainer.trust_region_radius == radius


def test_the_model_card_names_the_paper(path, tmp_path):
    trainer = make_trainer(path, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "2606.09821" in card
    assert "drpo" in card


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_sampling_level": "sequence"}, "set it to 'token'"),
        ({"loss_type": "cispo"}, "set it to one of 'grpo'"),
        ({"loss_type": "sapo"}, "set it to one of 'grpo'"),
        ({"loss_type": "vespo"}, "set it to one of 'grpo'"),
        ({"trust_region": "kl"}, "set it to one of 'drpo'"),
        ({"trust_region_radius": 0.0}, "set a positive number"),
        ({"trust_region_radius": -0.1}, "set a positive number"),
        ({"trust_region_radius": math.nan}, "set a positive number"),
        ({"dppo_ratio_cap": 5.0}, "set trust_region to 'dppo_tv'"),
        ({"trust_region": "dppo_tv", "dppo_ratio_cap": 0.5}, "set it to 1 or more"),
    ],
)
def test_refusals_come_before_the_model(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        DRPOConfig(**tiny.grpo_settings(tmp_path, **settings))
    assert str(error.value).count(". ") == 0  # one sentence
    if set(settings) & {"importance_sampling_level", "loss_type"}:  # a plain config reaches the trainer
        with pytest.raises(ValueError, match=message):
            make_trainer("no such model", tmp_path, GRPOConfig, **settings)


def test_a_wrong_config_class_is_refused(tmp_path):
    from trl import SFTConfig

    with pytest.raises(TypeError, match="create it with DRPOConfig"):
        DRPOTrainer("no such model", tiny.digits_reward, SFTConfig(str(tmp_path), use_cpu=True), tiny.prompts())


def test_a_dataset_without_prompts_is_refused(tmp_path):
    args = DRPOConfig(**tiny.grpo_settings(tmp_path))
    sums = Dataset.from_dict({"question": ["1+1="], "answer": ["2"]})
    with pytest.raises(ValueError, match="'question', 'answer': rename yours"):
        DRPOTrainer("no such model", tiny.digits_reward, args, sums)
    with pytest.raises(
        ValueError, match=r"one split as `train_dataset`, got all of them: pass e.g. dataset\['train'\]"
    ):
        DRPOTrainer("no such model", tiny.digits_reward, args, DatasetDict({"train": tiny.prompts()}))
    with pytest.raises(ValueError, match=r"eval_dataset\['sums'\]"):
        DRPOTrainer("no such model", tiny.digits_reward, args, tiny.prompts(), {"sums": sums})


def test_prompts_made_by_a_transform_are_found(path, tmp_path):
    sums = Dataset.from_dict({"a": list(range(8))})
    sums.set_transform(lambda rows: {"prompt": [f"{a}+{a}=" for a in rows["a"]]})
    args = DRPOConfig(**tiny.grpo_settings(tmp_path))
    DRPOTrainer(path, tiny.digits_reward, args, sums).train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_kwargs": {"top_p": 0.5}}, "sample with top_p=1.0"),
        ({"epsilon": 0.1, "epsilon_high": 0.28}, "epsilon=0.1, epsilon_high=0.28 has no effect"),
        ({"delta": 1.5}, "delta=1.5 has no effect"),
        ({"trust_region_radius": 12.5}, "never binds"),
        ({"top_p": 0.9}, "sample with top_p=1.0"),
    ],
)
def test_settings_without_effect_bring_one_warning(path, tmp_path, caplog, settings, message):
    make_trainer(path, tmp_path, rollout_func=tiny.rollout, **settings)
    warnings = [record.message for record in caplog.records if record.name.startswith("trl_ext")]
    assert len(warnings) == 1
    assert message in warnings[0]


def test_a_good_configuration_brings_no_warning(path, tmp_path, caplog):
    make_trainer(path, tmp_path, loss_type="dr_grpo", beta=0.1)
    make_trainer(path, tmp_path, rollout_func=tiny.rollout, top_k=None, min_p=0.0)
    assert not [record for record in caplog.records if record.name.startswith("trl_ext")]


def test_a_setting_that_was_set_to_none_was_set(tmp_path):
    args = DRPOConfig(**tiny.grpo_settings(tmp_path, vllm_importance_sampling_clip_max=None))
    names = ("vllm_importance_sampling_clip_max", "epsilon_high", "no_such_setting")
    assert changed_settings(args, names) == {"vllm_importance_sampling_clip_max": None}
