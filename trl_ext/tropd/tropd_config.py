"""Settings of [`TrOPDTrainer`]."""

from dataclasses import dataclass, field

from trl.experimental.gkd import GKDConfig

from trl_ext.arguments import check_values
from trl_ext.teacher.settings import TeacherSettings
from trl_ext.tropd.checks import CHOICES, check_tropd_args
from trl_ext.tropd.objective import OBJECTIVES
from trl_ext.tropd.vllm_settings import VLLMSettings


@dataclass
class TrOPDConfig(VLLMSettings, TeacherSettings, GKDConfig):
    r"""
    Configuration class for the [`TrOPDTrainer`]: all of [`~trl.experimental.gkd.GKDConfig`], whose `lmbda` and
    `temperature` have another default here; the settings of generation with vLLM ([`VLLMSettings`]) and of the teacher
    ([`TeacherSettings`]); and those below.

    Parameters:
        objective (`str`, *optional*, defaults to `"tropd"`):
            `"tropd"`, or one of the baselines `"opd"` (the sampled reverse KL on every token), `"forward_kl"` (that of
            GKD on every token, on the teacher's top-k), `"eopd"`, `"reopold"`.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of the completions that the student samples, drawn for each. The others are the dataset's (with
            `seq_kd`, sampled from the teacher) and minimize the forward KL divergence on the teacher's top-k.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of the samples and of all log-probabilities, the student's and the teacher's.
        num_generations (`int`, *optional*, defaults to `1`):
            Completions per prompt. Batch sizes count completions.
        trust_region (`str`, *optional*, defaults to `"sampled"`):
            For `"tropd"`. `"sampled"`: whether a token is trusted is drawn, as in the paper. `"expected"`: the
            probability takes the place of the draw, which has the same expectation and less variance.
        outlier_loss (`str`, *optional*, defaults to `"forward_kl_everywhere_and_clip"`):
            For `"tropd"`, the loss of outliers: `"forward_kl"` on the teacher's top-k (the paper's), `"clip"` (a
            policy gradient whose reward has a floor), `"forward_kl_and_clip"` (their sum, which is ours),
            `"forward_kl_everywhere_and_clip"` (the same with the forward KL on every token) or `"mask"` (0).
        outlier_top_k (`int`, *optional*, defaults to `64`):
            Number of the teacher's most likely tokens in the forward KL divergence.
        outlier_clip_floor (`float`, *optional*, defaults to `-1.0`):
            For the outlier losses that clip: floor of the reward, in nats. The paper gives no value.
        outlier_clip_coef (`float`, *optional*, defaults to `1.0`):
            For the outlier losses that clip: coefficient of the clipped term. The paper's is 1.
        guidance (`str`, *optional*, defaults to `"none"`):
            Where the prefixes of rollouts come from: `"dataset"` (completions that the teacher wrote), `"teacher"`
            (sampled at every step whose prefixes are longer than 0) or `"none"`.
        guidance_coef (`float`, *optional*, defaults to `1e-3`):
            Coefficient of the negative log-likelihood of a prefix.
        guidance_max_length (`int`, *optional*):
            Longest prefix at the first step, in tokens. Defaults to `max_new_tokens`.
        guidance_schedule (`str`, *optional*, defaults to `"cosine"`):
            How that length falls to 0 over the run: `"cosine"` (the paper's) or `"linear"`; `"constant"` keeps it.
        guidance_prefix (`str`, *optional*, defaults to `"random"`):
            `"random"`: lengths uniform up to the longest that the schedule and the completion allow. `"longest"`:
            always that length. The paper leaves it open. With `"longest"` the student writes next to nothing of the
            first rollouts.
        guidance_share (`float`, *optional*, defaults to `1.0`):
            Share of the rollouts that are guided.
        eopd_top_k (`int`, *optional*, defaults to `16`):
            For `"eopd"`: number of the teacher's most likely tokens in the forward KL divergence.
        eopd_entropy_threshold (`float`, *optional*, defaults to `0.8`):
            For `"eopd"`: entropy of the teacher, in nats, above which the forward KL divergence is added.
        reopold_floor (`float`, *optional*, defaults to `-1.72`):
            For `"reopold"`: floor of the reward, in nats.
        reopold_switch_step (`int`, *optional*):
            For `"reopold"`: optimizer step from which only uncertain tokens count. Defaults to half of the run (the
            paper gives no value).
        reopold_top_entropy_share (`float`, *optional*, defaults to `0.2`):
            For `"reopold"`: share of each step's tokens that then count.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Under ZeRO-3: whether to gather the weights for generation, as in [`~trl.GRPOConfig`].
    """

    objective: str = field(
        default="tropd",
        metadata={
            "help": "; ".join(f"{name!r}: {row.summary}" for name, row in OBJECTIVES.items()) + ".",
            "choices": list(CHOICES["objective"]),
        },
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of the completions that the student samples; the others are the dataset's or, with seq_kd, "
            "sampled from the teacher."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the samples and of all log-probabilities."}
    )
    num_generations: int = field(
        default=1, metadata={"help": "Completions per prompt. Batch sizes count completions."}
    )
    trust_region: str = field(
        default="sampled",
        metadata={
            "help": "'sampled': whether a token is trusted is drawn. 'expected': its probability takes the place of "
            "the draw.",
            "choices": list(CHOICES["trust_region"]),
        },
    )
    outlier_loss: str = field(
        default="forward_kl_everywhere_and_clip",
        metadata={
            "help": "Loss of outliers: 'forward_kl' on the teacher's top-k (the paper's), 'clip' (a policy gradient "
            "whose reward has a floor), 'forward_kl_and_clip' (their sum), 'forward_kl_everywhere_and_clip' (with the "
            "forward KL on every token) or 'mask' (0).",
            "choices": list(CHOICES["outlier_loss"]),
        },
    )
    outlier_top_k: int = field(
        default=64, metadata={"help": "Number of the teacher's most likely tokens in the forward KL divergence."}
    )
    outlier_clip_floor: float = field(
        default=-1.0, metadata={"help": "For the outlier losses that clip: floor of the reward, in nats."}
    )
    outlier_clip_coef: float = field(
        default=1.0, metadata={"help": "For the outlier losses that clip: coefficient of the clipped term."}
    )
    guidance: str = field(
        default="none",
        metadata={
            "help": "Where the prefixes of rollouts come from: 'none', 'dataset' (completions that the teacher "
            "wrote) or 'teacher' (sampled when needed).",
            "choices": list(CHOICES["guidance"]),
        },
    )
    guidance_coef: float = field(
        default=1e-3, metadata={"help": "Coefficient of the negative log-likelihood of a prefix."}
    )
    guidance_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest prefix at the first step, in tokens. Defaults to max_new_tokens."},
    )
    guidance_schedule: str = field(
        default="cosine",
        metadata={
            "help": "How the longest prefix falls to 0 over the run: 'cosine' or 'linear'; 'constant' keeps it.",
            "choices": list(CHOICES["guidance_schedule"]),
        },
    )
    guidance_prefix: str = field(
        default="random",
        metadata={
            "help": "'random': lengths uniform up to the longest. 'longest': always the longest.",
            "choices": list(CHOICES["guidance_prefix"]),
        },
    )
    guidance_share: float = field(default=1.0, metadata={"help": "Share of the rollouts that are guided."})
    eopd_top_k: int = field(
        default=16, metadata={"help": "For 'eopd': number of the teacher's most likely tokens in its forward KL."}
    )
    eopd_entropy_threshold: float = field(
        default=0.8, metadata={"help": "For 'eopd': entropy of the teacher, in nats, above which it is added."}
    )
    reopold_floor: float = field(default=-1.72, metadata={"help": "For 'reopold': floor of the reward, in nats."})
    reopold_switch_step: int | None = field(
        default=None,
        metadata={"help": "For 'reopold': step from which only uncertain tokens count. Defaults to half of the run."},
    )
    reopold_top_entropy_share: float = field(
        default=0.2, metadata={"help": "For 'reopold': share of each step's tokens that then count."}
    )
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "Under ZeRO-3: whether to gather the weights for generation."}
    )

    def __post_init__(self) -> None:
        check_values(self, TrOPDConfig)
        super().__post_init__()
        check_tropd_args(self)
