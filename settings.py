"""Settings of training. Defaults are the paper's (Table 8), or those of the official scripts."""

from dataclasses import dataclass, replace

from infra.config import setting
from infra.run import RunSettings
from rollout import RolloutSettings

DISTIL = ("sft", "kd", "taid", "gkd", "distillm")
REINFORCE = ("ppo", "grpo", "dgpo")
PHASES = ("episodes", *DISTIL, *REINFORCE)
DISTANCES = {"taid": "taid", "gkd": "reverse", "distillm": "skew"}  # of other phases: forward


@dataclass
class TrainSettings(RolloutSettings, RunSettings):
    phase: str = setting("kd", "what to run", choices=PHASES)
    student: str = setting("", "checkpoint to start from (folder or hub id)")
    teacher: str = setting("", "checkpoint that guides (folder or hub id)")
    teacher_dtype: str = setting("float32", "of frozen models", choices=("float32", "bfloat16"))
    questions: str = setting("", "training questions, JSONL")
    val_size: int = setting(256, "training questions set apart to validate, never trained on")
    episodes: str = setting("runs/episodes.jsonl", "teacher episodes; kd makes them when absent")
    num_episode_questions: int = setting(0, "questions the teacher is asked; 0: all")
    # distil (paper Table 8, TAID's defaults)
    epochs: float = setting(5, "passes over the episodes")
    batch_size: int = setting(64, "episodes per optimizer step")
    kd_lr: float = setting(1e-4, "peak learning rate of distillation, cosine to 0")
    kd_warmup_steps: int = setting(0, "linear warm-up of distillation")
    ce_weight: float = setting(1.0, "kd: weight of the cross-entropy in Eq. 1 (official code: 0)")
    kl_weight: float = setting(1.0, "lambda of Eq. 1")
    distance: str = setting("", "from the teacher; empty: reverse (gkd), skew (distillm), forward",
                            choices=("", "forward", "reverse", "skew", "skew_reverse", "jsd"))
    mix: float = setting(0.1, "target's share in a skew divergence (Table 8), teacher's in jsd")
    student_share: float = setting(1.0, "gkd: share of batches the student writes (its lambda)")
    share_tolerance: float = setting(0.0, "distillm: rise in loss for the student to write more")
    buffer_size: int = setting(1000, "distillm: student episodes that batches are drawn from")
    taid_start: float = setting(0.4, "taid: first t (Table 8)")
    taid_end: float = setting(1.0, "taid: last t (Table 8)")
    taid_alpha: float = setting(5e-4, "taid: size of an adaptive change of t (Table 8)")
    taid_beta: float = setting(0.99, "taid: momentum of the loss's relative change (Table 8)")
    until_score: float = setting(0.0, "end kd at this sampled validation score; 0: never")
    # reinforce (paper Table 8; the rest from the official scripts)
    steps: int = setting(1000, "rollout batches; also the updates of gkd")
    prompts_per_step: int = setting(512, "episodes per rollout batch")
    minibatch_size: int = setting(256, "episodes per optimizer step")
    ppo_epochs: int = setting(1, "passes over a rollout batch")
    actor_lr: float = setting(1e-6, "learning rate of the actor")
    critic_lr: float = setting(1e-5, "learning rate of the critic")
    actor_warmup_steps: int = setting(285, "linear warm-up (official: 0.285 of the steps)")
    critic_warmup_steps: int = setting(15, "linear warm-up (official: 0.015 of the steps)")
    critic_only_steps: int = setting(0, "first steps that train the critic alone")
    reward: str = setting("", "FILE.py:FUNCTION that pays for episodes; empty: exact match (Eq. 3)")
    beta: float = setting(0.001, "beta of Eq. 4")
    kl_where: str = setting("", "episodes with KL; empty: wrong for dgpo, else all",
                            choices=("", "wrong", "all", "none"))
    kl_in: str = setting("reward", "where Eq. 4's KL counts: a reward (PPO), or k3 in the loss "
                         "(GRPO's paper)", choices=("reward", "loss"))
    mean_over: str = setting("token", "the policy's loss is a mean over tokens, or over episodes' "
                             "means (GRPO's paper)", choices=("token", "episode"))
    advantage: str = setting("", "gae: from a critic; group: GRPO; empty: group for grpo, else gae",
                             choices=("", "gae", "group"))
    group_size: int = setting(5, "group: episodes of one question")
    gamma: float = setting(1.0, "discount")
    gae_lambda: float = setting(1.0, "lambda of GAE")
    clip_eps: float = setting(0.2, "epsilon of Eq. 2")
    value_clip_eps: float = setting(0.5, "clip of the critic's change")
    entropy_weight: float = setting(0.001, "weight of the entropy bonus")


def with_defaults(settings: TrainSettings) -> TrainSettings:
    """Settings with what the phase implies where they are left open; refuses what cannot work."""
    phase = settings.phase
    if phase == "taid" and settings.distance:
        raise ValueError(f"--distance {settings.distance}: got it for phase taid, which has its "
                         "own target; drop it")
    if settings.reward and phase in ("episodes", *DISTIL):
        raise ValueError(f"--reward {settings.reward}: got it for phase {phase}, which pays for "
                         "nothing; drop it")
    advantage = settings.advantage or ("group" if phase == "grpo" else "gae")
    is_grouped = phase not in ("episodes", *DISTIL) and advantage == "group"
    if is_grouped and not 2 <= settings.group_size <= settings.prompts_per_step:
        raise ValueError(f"--group-size {settings.group_size}: expected at least 2, and at most "
                         f"--prompts-per-step ({settings.prompts_per_step}), which counts episodes")
    return replace(
        settings, advantage=advantage, group_size=settings.group_size if is_grouped else 1,
        run_dir=settings.run_dir or f"runs/{phase}",
        kl_where=settings.kl_where or ("wrong" if phase == "dgpo" else "all"),
        distance=settings.distance or DISTANCES.get(phase, "forward"),
        ce_weight=settings.ce_weight if phase == "kd" else 0.0)
