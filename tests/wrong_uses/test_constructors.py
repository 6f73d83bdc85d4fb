"""Wrong arguments of the constructors: each is refused before a model is loaded, of which none has the name given."""

import functools

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PromptTuningConfig
from transformers import Qwen3ForSequenceClassification
from trl import SFTConfig
from wrong import CONFIGS, NOTHING, assert_clear, config, construct


def table(**columns):
    return Dataset.from_dict({name: [value] * 32 for name, value in columns.items()})


MESSAGES = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def reward_of_too_little(completions):
    return [0.0] * len(completions)


def reward_of_an_answer(completions, answer, **kwargs):
    return [0.0] * len(completions)


# Arguments of transformers' Trainer and of its data, which all four trainers refuse
ALL = [
    ({"model": 3}, "needs a policy, got an int: pass a hub name, a path or a loaded model"),
    ({"model": ["a"]}, "got a list: pass a hub name, a path or a loaded model"),
    ({"args": {"learning_rate": 1e-5}}, "got dict: create it with .*Config"),
    ({"args": SFTConfig("unused", use_cpu=True, bf16=False)}, "SFTConfig.*: create it with .*Config"),
    ({"train_dataset": "org/data"}, r"pass datasets.load_dataset\('org/data', split='train'\)"),
    ({"train_dataset": 3}, "takes a datasets.Dataset as `train_dataset`, got an? int|train_dataset=int"),
    ({"train_dataset": DatasetDict({"train": tiny.prompts()})}, r"pass e.g. dataset\['train'\]"),
    ({"train_dataset": Dataset.from_dict({"prompt": []})}, "`train_dataset` has no rows"),
    ({"train_dataset": table(id="1", question="1+1=")}, r"dataset.rename_column\('question', 'prompt'\)"),
    ({"train_dataset": table(id="1", answer="2")}, "rename the one that holds the prompts to 'prompt'"),
    ({"eval_dataset": table(question="1+1=")}, "but `eval_dataset` has only 'question'"),
    ({"eval_dataset": {"sums": table(question="1")}}, r"but `eval_dataset\['sums'\]` has only 'question'"),
    ({"eval_dataset": []}, "`eval_dataset` has no rows"),
    ({"settings": {"eval_strategy": "steps"}}, "eval_strategy='steps' needs an eval_dataset: pass one"),
    ({"callbacks": print}, "`callbacks` must be a list of TrainerCallback, got a builtin_function_or_method"),
    ({"callbacks": ["progress"]}, "`callbacks` must be TrainerCallback classes or instances, got a str"),
    ({"optimizers": None}, r"got None: pass \(optimizer, None\)"),
    ({"optimizers": torch.optim.SGD([torch.ones(1)])}, r"got a SGD: pass \(optimizer, None\)"),
    ({"peft_config": "lora"}, r"got a str: pass peft.LoraConfig\(...\)"),
    ({"peft_config": {"r": 4}}, r"got a dict: pass peft.LoraConfig\(...\)"),
    ({"processing_class": "org/name"}, r"pass AutoTokenizer.from_pretrained\('org/name'\)"),
    ({"processing_class": 3}, "got an int: pass what AutoTokenizer"),
    ({"no_such_argument": 3}, "unexpected keyword argument 'no_such_argument'"),
]
# Arguments of GRPOTrainer
GRPO = [
    ({"model": NOTHING}, "missing 1 required positional argument: 'model'"),
    ({"model": None}, "needs a policy, got None"),
    ({"train_dataset": table(messages=MESSAGES)}, r"make prompts of the messages before the answer, e.g. dataset.map"),
    ({"train_dataset": table(prompt=3)}, "The first prompt of `train_dataset` is 3, but a prompt must be a text"),
    ({"train_dataset": table(prompt="")}, "The first prompt of `train_dataset` is '', .* and not empty"),
    ({"train_dataset": table(prompt=[])}, r"The first prompt of `train_dataset` is \[\]"),
    (
        {"train_dataset": table(prompt=["a", "b"])},
        r"is \['a', 'b'\], but a prompt must be a text or",
    ),
    ({"train_dataset": table(prompt=None)}, "The first prompt of `train_dataset` is None"),
    ({"reward_funcs": NOTHING}, "needs a reward: pass reward_funcs=..., a function of the completions"),
    ({"reward_funcs": []}, "needs a reward: pass reward_funcs"),
    ({"reward_funcs": 3}, "got an int: pass the function itself, not its result"),
    ({"reward_funcs": [[0.5, 1.0]]}, "got a list: pass the function itself, not its result"),
    ({"reward_funcs": reward_of_too_little}, "does not take completion_ids, .*: give it \\*\\*kwargs"),
    ({"reward_funcs": reward_of_an_answer}, "needs answer, but the columns of `train_dataset` are prompt: add the"),
    ({"settings": {"reward_weights": [1.0, 2.0]}}, "1 reward function.* and 2 reward_weights: give one weight per"),
    ({"tools": print}, "`tools` must be a list of functions"),
    ({"tools": ["search"]}, "`tools` must be functions, got a str: pass the functions themselves"),
    ({"rollout_func": "generate"}, "`rollout_func` must be a function, got a str"),
    ({"environment_factory": 3}, "`environment_factory` must be a function, got an int"),
]
OWN = {
    "drpo": [
        ({"args": config("rlad")}, "RLADConfig, the configuration of another trainer, .*: create it with DRPOConfig"),
        (
            {"train_dataset": table(prompt="1+1=", reward=0.5), "reward_funcs": reward_of_an_answer},
            "needs answer, but the columns of `train_dataset` are prompt, reward: add the",
        ),
        ({"train_dataset": [1, 2]}, "The rows of `train_dataset` must be dictionaries with a 'prompt', got a int"),
        (
            {"train_dataset": IterableDataset.from_generator(lambda: iter([]))},
            "`train_dataset` has no rows: check whether its file is empty",
        ),
    ],
    "rlad": [
        ({"teacher_model": NOTHING}, "needs a teacher: pass teacher_model="),
        ({"args": config("erpd")}, "ERPDConfig, the configuration of another trainer"),
        ({"teacher_model": "base"}, "'base' is the student without its adapter, .*: pass peft_config"),
        (
            {"teacher_model": "http://no-such-server", "settings": {"temperature": 0.7}},
            "scores at temperature 1 only .*: set it to 1.0",
        ),
    ],
    "erpd": [
        ({"args": config("drpo")}, "DRPOConfig, the configuration of another trainer, .*: create it with ERPDConfig"),
        ({"train_dataset": NOTHING}, "pass a datasets.Dataset"),
        (  # of stored rollouts, which have their rewards
            {
                "train_dataset": table(prompt="1+1=", completion="2", reward=0.5),
                "eval_dataset": table(prompt="1+1="),
                "reward_funcs": reward_of_an_answer,
            },
            "needs answer, but the columns of `eval_dataset` are prompt: add the",
        ),
        (
            {"train_dataset": IterableDataset.from_generator(lambda: iter([{"prompt": "1"}]))},
            "pass a datasets.Dataset",
        ),
        ({"train_dataset": table(prompt="1", image="x")}, "cannot use the column 'image': remove it"),
        ({"train_dataset": tiny.prompts(1), "settings": {"per_device_train_batch_size": 32}}, "less than one batch"),
        ({"settings": {"prompts_per_round": 100}}, "set it to 32 or less"),
        ({"settings": {"prompts_per_round": 0}}, "prompts_per_round=0"),
        (
            {"optimizers": (None, torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.ones(1)])))},
            r"pass optimizers=\(optimizer, None\)",
        ),
    ],
    "tropd": [
        ({"model": None}, "needs a student: pass model=..., a hub name, a path or a loaded model"),
        ({"teacher_model": NOTHING}, "needs a teacher: pass teacher_model="),
        ({"args": config("drpo")}, "DRPOConfig.*: create it with TrOPDConfig"),
        ({"teacher_model": "base"}, "'base' is the student without its adapter, .*: pass peft_config"),
        (
            {"teacher_model": "http://no-such-server", "settings": {"temperature": 0.7}},
            "scores at temperature 1 only .*: set it to 1.0",
        ),
        (
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)},
            "PROMPT_TUNING puts its prompt: use another adapter",
        ),
        ({"compute_metrics": print}, "leave them out, and read eval_loss"),
        ({"data_collator": 3}, "`data_collator` must be a function of a list of rows, got an int: leave it out"),
        ({"preprocess_logits_for_metrics": print}, "leave them out, and read eval_loss"),
        ({"formatting_func": print}, "make a 'prompt' column"),
        ({"settings": {"lmbda": 0.5}}, "needs completions, .*: add a 'completion' column, or set lmbda=1.0"),
        ({"settings": {"guidance": "dataset"}}, "needs completions, .*, or set another guidance"),
        (
            {"train_dataset": table(messages=MESSAGES[:1]), "settings": {"lmbda": 0.5}},
            "the first row of `train_dataset` has none: end its messages with",
        ),
        ({"train_dataset": table(prompt="1", image="x")}, "distil with RLADTrainer"),
        ({"train_dataset": table(conversations=MESSAGES)}, r"dataset.rename_column\('conversations', 'messages'\)"),
    ],
}
CASES = [(method, *case) for method, cases in OWN.items() for case in cases]
CASES += [(list(CONFIGS)[i % 4], *case) for i, case in enumerate(ALL)]
CASES += [(("drpo", "rlad", "erpd")[i % 3], *case) for i, case in enumerate(GRPO)]


@pytest.mark.parametrize(
    ("method", "arguments", "message"), CASES, ids=[f"{m}-{'-'.join(a)}-{i}" for i, (m, a, _) in enumerate(CASES)]
)
def test_a_wrong_argument(method, arguments, message):
    assert_clear(lambda: construct(method, **arguments), message)


# ---- with a policy, because what is wrong is the combination of arguments


def with_policy(method, **arguments):
    return construct(method, **{"model": tiny.policy(), "processing_class": tiny.tokenizer(), **arguments})


@pytest.mark.parametrize("method", ["rlad", "tropd"])
@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: 3, "must be a causal language model, .* got int: load it with AutoModelForCausalLM"),
        (
            lambda: Qwen3ForSequenceClassification(tiny.policy().config),
            "got Qwen3ForSequenceClassification: load it with AutoModelForCausalLM",
        ),
        (lambda: tiny.policy(vocab_size=20), "vocabular|tokenizer"),
    ],
    ids=["a number", "a classifier", "another vocabulary"],
)
def test_a_wrong_teacher(method, teacher, message):
    assert_clear(lambda: with_policy(method, teacher_model=teacher()), message)


@pytest.mark.parametrize("method", ["rlad", "tropd"])
def test_the_student_as_its_own_teacher(method):
    policy = tiny.policy()
    assert_clear(lambda: with_policy(method, model=policy, teacher_model=policy), "pass another model")


def test_a_decorated_reward_is_called_as_its_decorator_is():
    """One that takes everything and passes on what the function wants is not refused, but for a missing column."""

    def filtered(reward):
        @functools.wraps(reward)
        def called(completions, answer=None, **kwargs):
            return reward(completions, answer)

        return called

    @filtered
    def reward(completions, answer):
        return [0.0] * len(completions)

    with_policy("drpo", reward_funcs=reward, train_dataset=table(prompt="1+1=", answer="2"))
    lacking = {"reward_funcs": reward, "train_dataset": table(prompt="1+1=")}
    assert_clear(lambda: with_policy("drpo", **lacking), "needs answer, but the columns of `train_dataset` are prompt")


def test_an_adapter_for_layers_that_are_not_there():
    lora = LoraConfig(r=2, target_modules=["no_such_layer"])
    assert_clear(lambda: with_policy("drpo", peft_config=lora), "no_such_layer.* not found in the base model")
