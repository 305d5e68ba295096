"""Settings of training. Defaults are the paper's (Table 8), or those of the official scripts."""

from dataclasses import dataclass, replace
from pathlib import Path

from infra.config import in_project, setting
from infra.run import RunSettings
from rollout import RolloutSettings

DISTIL = ("sft", "kd", "taid", "gkd", "distillm")
REINFORCE = ("ppo", "grpo", "dgpo")
# Each with the words by which settings say who reads them (`of`).
PHASES = {"episodes": "teacher asks", **dict.fromkeys(DISTIL, "learn distil teacher asks"),
          **dict.fromkeys(REINFORCE, "learn reinforce")}
PHASES |= {"sft": "learn distil", "dgpo": "learn reinforce teacher"}
DISTANCES = {"taid": "taid", "gkd": "reverse", "distillm": "skew"}  # of other phases: forward


@dataclass
class TrainSettings(RolloutSettings, RunSettings):
    phase: str = setting("kd", "what to run", choices=PHASES)
    plan: str = setting("", "print what it would take, and end: on here, 8x80GB (cards), 1x141GB",
                        of=" ".join((*DISTIL, *REINFORCE)))
    student: str = setting("", "checkpoint to start from", reads="DIR", needed=True, of="learn")
    train_layers: int = setting(0, "train the last N layers alone; 0: all", of="learn", rare=True)
    teacher: str = setting("", "checkpoint that guides", reads="DIR", of="teacher")
    teacher_dtype: str = setting("float32", "of frozen models", choices=("float32", "bfloat16"),
                                 of="teacher", rare=True)
    questions: str = setting("", "training questions, JSONL", reads="FILE")
    val_size: int = setting(256, "training questions set apart to validate, never trained on")
    episodes: str = setting("", "teacher episodes; kd makes them; empty: run_dir/../episodes.jsonl",
                            reads="FILE", made_by="asks", of="episodes distil")
    num_episode_questions: int = setting(0, "questions the teacher is asked; 0: all", of="asks")
    epochs: float = setting(5, "passes over the episodes", above=0, of="sft kd taid distillm",
                            section="distil: distillation (paper Table 8, TAID's defaults)")
    batch_size: int = setting(64, "episodes per optimizer step", at_least=1)
    kd_lr: float = setting(1e-4, "peak learning rate of distillation, cosine to 0")
    kd_warmup_steps: int = setting(0, "linear warm-up of distillation")
    ce_weight: float = setting(1.0, "of the cross-entropy in Eq. 1 (official code: 0)", of="kd")
    kl_weight: float = setting(1.0, "lambda of Eq. 1", of="kd taid gkd distillm")
    distance: str = setting("", "from the teacher; empty: reverse (gkd), skew (distillm), forward",
                            choices=("", "forward", "reverse", "skew", "skew_reverse", "jsd"),
                            of="kd gkd distillm")
    mix: float = setting(0.1, "target's share in a skew divergence (Table 8), teacher's in jsd",
                         at_most=1, of="kd gkd distillm", when="distance skew skew_reverse jsd")
    student_share: float = setting(1.0, "of batches it writes (gkd's lambda)", at_most=1, of="gkd")
    share_tolerance: float = setting(0.0, "rise in loss to write more", of="distillm", at_least=-9)
    buffer_size: int = setting(1000, "student episodes to draw from", at_least=1, of="distillm")
    taid_start: float = setting(0.4, "first t (Table 8)", at_most="taid_end", of="taid")
    taid_end: float = setting(1.0, "last t (Table 8)", at_most=1, of="taid")
    taid_alpha: float = setting(5e-4, "size of an adaptive change of t (Table 8)", of="taid")
    taid_beta: float = setting(0.99, "momentum of t's changes (Table 8)", at_most=1, of="taid")
    until_score: float = setting(0.0, "end at this sampled validation score; 0: never", at_most=1)
    steps: int = setting(1000, "rollout batches; gkd: updates", at_least=1, of="gkd reinforce",
                         section="reinforce: reinforcement (Table 8; else official scripts)")
    prompts_per_step: int = setting(512, "episodes per rollout batch", at_least=1)
    minibatch_size: int = setting(256, "episodes an update", at_least=1, at_most="prompts_per_step")
    ppo_epochs: int = setting(1, "passes over a rollout batch", at_least=1)
    actor_lr: float = setting(1e-6, "learning rate of the actor")
    critic_lr: float = setting(1e-5, "learning rate of the critic", when="advantage gae")
    actor_warmup_steps: int | None = setting(None, "linear warm-up; none: 0.285 of --steps")
    critic_warmup_steps: int | None = setting(None, "linear warm-up; none: 0.015 of --steps",
                                              when="advantage gae")
    critic_only_steps: int = setting(0, "first steps of the critic alone", when="advantage gae")
    reward: str = setting("", "function that pays for episodes; empty: exact match (Eq. 3)",
                          reads="FILE.py:NAME", of="ppo grpo dgpo")
    beta: float = setting(0.001, "beta of Eq. 4", when="kl_in reward loss loss_k2")
    kl_where: str = setting("", "episodes with KL; empty: wrong for dgpo, else all",
                            choices=("", "wrong", "all", "none"))
    kl_in: str = setting("reward", "Eq. 4's KL: a reward, or in the loss: k3, k2, exact",
                         choices=("reward", "loss", "loss_k2", "exact"), when="kl_where wrong all")
    guide_weight: float = setting(1.0, "of the exact KL, in place of beta", when="kl_in exact")
    mean_over: str = setting("token", "what the policy's loss is a mean over",
                             choices=("token", "episode"))
    advantage: str = setting("", "group: as GRPO's; empty: by phase", choices=("", "gae", "group"))
    group_size: int = setting(5, "episodes of one question", when="advantage group")
    gamma: float = setting(1.0, "discount", at_most=1, when="advantage gae")
    gae_lambda: float = setting(1.0, "lambda of GAE", at_most=1, when="advantage gae")
    clip_eps: float = setting(0.2, "epsilon of Eq. 2", above=0)
    importance_cap: float | None = setting(None, "largest weight for what the sampler rounds "
                                           "otherwise; 0: none; none: 2 in bfloat16", at_least=0,
                                           rare=True)
    value_clip_eps: float = setting(0.5, "of the critic's change", above=0, when="advantage gae")
    entropy_weight: float = setting(0.001, "weight of the entropy bonus")

    @property
    def episodes_per_step(self) -> int:
        """Episodes of complete groups in a step of reinforcement."""
        return self.prompts_per_step // self.group_size * self.group_size


def with_defaults(settings: TrainSettings, *, reinforces: bool | None = None) -> TrainSettings:
    """Fill in what the phase implies; refuse what cannot work. reinforces: None: by the phase."""
    s, phase = settings, settings.phase
    reinforces = phase in REINFORCE if reinforces is None else reinforces
    distance = s.distance or DISTANCES.get(phase, "forward")
    advantage = (s.advantage or ("group" if phase == "grpo" else "gae")) if reinforces else ""
    is_grouped = advantage == "group"
    from infra.checks import check_together  # here, because `import train` should load little
    check_together(s, distance, reinforces=reinforces, is_grouped=is_grouped)
    warm_ups = {"actor_warmup_steps": 0.285, "critic_warmup_steps": 0.015}  # official shares
    warm_ups = {k: round(x * s.steps) for k, x in warm_ups.items() if getattr(s, k) is None}
    run_dir = s.run_dir or in_project(f"runs/{phase}")
    return replace(
        s, advantage=advantage, group_size=s.group_size if is_grouped else 1, distance=distance,
        run_dir=run_dir, episodes=s.episodes or str(Path(run_dir).parent / "episodes.jsonl"),
        eval_every=s.eval_every * (phase != "episodes"),
        kl_where=s.kl_where or ("wrong" if phase == "dgpo" else "all"),
        ce_weight=s.ce_weight if phase == "kd" else 0.0, **warm_ups)


def guide_of(settings: TrainSettings) -> str:
    """The setting that names the guide: Eq. 4's teacher, Eq. 5's initial policy; "": none."""
    if settings.phase in REINFORCE and settings.kl_where == "none":
        return ""
    return {"sft": "", "ppo": "student", "grpo": "student"}.get(settings.phase, "teacher")
