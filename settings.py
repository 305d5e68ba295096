"""Settings of training: what each is, its default, and what a phase says where they leave it open.

Defaults are the paper's (Table 8), or those of the official scripts.
"""

from dataclasses import dataclass, replace

import bard
from bard import BardSettings
from config import setting
from data import check_budget
from qagent import QAgentSettings

DISTIL = ("sft", "bard-sft", "kd", "taid", "gkd", "distillm")  # the first two without a teacher
REINFORCE = ("ppo", "grpo", "bard-rl", "qagent", "dgpo")
GROUPED = ("grpo", "bard-rl", "qagent")  # without a critic, unless --advantage says otherwise
SKIPPING = ("bard-rl", "qagent")  # groups whose episodes are all worth the same
PHASES = ("episodes", "bard-data", *DISTIL, *REINFORCE)
DISTANCES = {"taid": "taid", "gkd": "reverse", "distillm": "skew"}  # from the teacher; of every other phase: forward


@dataclass
class TrainSettings(BardSettings, QAgentSettings):
    phase: str = setting("kd", "what to run", choices=PHASES)
    run_dir: str = setting("", "where the run writes; empty: runs/<phase>")
    resume: bool = setting(False, "continue the run in run_dir from its newest state, or start it where there is none")
    overwrite: bool = setting(False, "start again in a run_dir that already holds a run")
    seed: int = setting(0, "order of the data and sampling noise")
    device: str = setting("auto", "cpu, cuda, mps; auto: cuda where there is one")
    student: str = setting("", "checkpoint to start from (folder or hub id)")
    teacher: str = setting("", "checkpoint that guides (folder or hub id)")
    teacher_dtype: str = setting("float32", "dtype of teacher and generator", choices=("float32", "bfloat16"))
    questions: str = setting("", "training questions, JSONL")
    val_size: int = setting(256, "training questions set apart to measure progress; never trained on")
    corpus: str = setting("", "passages, JSONL")
    encoder: str = setting("", "checkpoint of the passage encoder")
    index: str = setting("", "index of the corpus; empty: embed the corpus at the start")
    episodes: str = setting("runs/episodes.jsonl", "teacher episodes; phase kd makes them when absent")
    num_episode_questions: int = setting(0, "questions the teacher is asked; 0: all")
    # distil (paper Table 8, TAID's defaults)
    epochs: float = setting(5, "passes over the episodes")
    batch_size: int = setting(64, "episodes per optimizer step")
    kd_lr: float = setting(1e-4, "peak learning rate of sft and kd, cosine to 0")
    kd_warmup_steps: int = setting(0, "linear warm-up of sft and kd")
    ce_weight: float = setting(1.0, "kd: weight of the cross-entropy in Eq. 1 (official code: 0)")
    kl_weight: float = setting(1.0, "lambda of Eq. 1")
    distance: str = setting("", "from the teacher; empty: forward for kd, reverse for gkd, skew for distillm",
                            choices=("", "forward", "reverse", "skew", "skew_reverse", "jsd"))
    mix: float = setting(0.1, "share of the target in a skew divergence (Table 8), of the teacher in jsd")
    student_share: float = setting(1.0, "gkd: share of batches that the student writes (its lambda)")
    share_tolerance: float = setting(0.0, "distillm: rise of the held-out loss that lets the student write more")
    buffer_size: int = setting(1000, "distillm: newest episodes of the student that batches are drawn from")
    taid_start: float = setting(0.4, "taid: first t (Table 8)")
    taid_end: float = setting(1.0, "taid: last t (Table 8)")
    taid_alpha: float = setting(5e-4, "taid: size of an adaptive change of t (Table 8)")
    taid_beta: float = setting(0.99, "taid: momentum of the loss's relative change (Table 8)")
    until_score: float = setting(0.0, "end kd once the sampled validation score reaches this; 0: never")
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
    beta: float = setting(0.001, "beta of Eq. 4")
    kl_where: str = setting("", "episodes with KL; empty: wrong for dgpo, else all; bard-rl and qagent with 'wrong' "
                            "are guided by the teacher, too",
                            choices=("", "wrong", "all", "none"))
    kl_in: str = setting("reward", "the KL of Eq. 4 is a reward, as in PPO, or a loss (k3), as in GRPO's paper",
                         choices=("reward", "loss"))
    mean_over: str = setting("token", "the policy's loss is a mean over tokens, or over episodes' means (GRPO's paper)",
                             choices=("token", "episode"))
    advantage: str = setting("", "gae: from a critic; group: GRPO; empty: group for grpo, gae for ppo and dgpo",
                             choices=("", "gae", "group"))
    group_size: int = setting(5, "group: episodes of one question")
    gamma: float = setting(1.0, "discount")
    gae_lambda: float = setting(1.0, "lambda of GAE")
    clip_eps: float = setting(0.2, "epsilon of Eq. 2")
    value_clip_eps: float = setting(0.5, "clip of the critic's change")
    entropy_weight: float = setting(0.001, "weight of the entropy bonus")
    stop_on_collapse: bool = setting(True, "end a run whose score has halved, and leave its best weights")
    # both
    weight_decay: float = setting(0.01, "AdamW")
    grad_clip: float = setting(1.0, "largest norm of a gradient")
    micro_batch_tokens: int = setting(16384, "tokens per forward pass; lower it when memory runs out")
    checkpointing: bool = setting(False, "compute activations again in backward: less memory, a third more time")
    eval_every: int = setting(50, "steps between validations; 0: never")
    save_every: int = setting(50, "steps between saved states; 0: only the result")
    max_minutes: float = setting(0.0, "end after this time, as if the steps were done; 0: never")
    shard: str = setting("none", "split weights, gradients and Adam over the processes: of student and critic, or of "
                         "the teacher, too", choices=("none", "student", "all"))
    timeout_minutes: float = setting(60.0, "a process that waits longer for another one ends the job")


def with_defaults(settings: TrainSettings) -> TrainSettings:
    """What the phase says where the settings leave it open."""
    phase = settings.phase
    if settings.phase == "taid" and settings.distance:
        raise ValueError(f"--distance {settings.distance}: got it for phase taid, whose target is its own; drop it")
    if phase.startswith("bard"):
        bard.check_settings(settings)
    for budget in settings.budgets:
        check_budget(budget, settings.max_context_tokens)
    episodes = settings.episodes
    if phase in ("bard-data", "bard-sft") and episodes == TrainSettings.episodes:
        episodes = "runs/versions.jsonl"  # not those of kd
    advantage = settings.advantage or ("group" if phase in GROUPED else "gae")
    if phase == "qagent" and settings.stage not in (1, 2):
        raise ValueError(f"--stage {settings.stage}: expected 1 or 2")
    spoken = {"qagent": "qagent", "bard-sft": "search-r1", "bard-rl": "search-r1"}.get(phase, settings.protocol)
    if settings.protocol != spoken:
        raise ValueError(f"--protocol {settings.protocol}: got it for phase {phase}, whose reward reads the tags of "
                         f"{spoken}; give --protocol {spoken}")
    if phase in SKIPPING and settings.kl_where == "wrong" and advantage == "group" and settings.kl_in == "reward":
        raise ValueError("--kl-in reward: got it with --kl-where wrong and advantages of groups, which would blow "
                         "the KL of a group that is all wrong up to the size of a right answer; give --kl-in loss")
    if phase in REINFORCE and advantage == "group" and not 2 <= settings.group_size <= settings.prompts_per_step:
        raise ValueError(f"--group-size {settings.group_size}: expected at least 2, and at most --prompts-per-step "
                         f"({settings.prompts_per_step}), which counts episodes")
    return replace(
        settings, run_dir=settings.run_dir or f"runs/{phase}", episodes=episodes,
        kl_where=settings.kl_where or ("wrong" if phase == "dgpo" else "all"),
        advantage=advantage,
        distance=settings.distance or ("forward" if phase not in DISTANCES else DISTANCES[phase]),
    )
