"""Learning: one loop distils (sft, kd), one reinforces (ppo, dgpo).

    torchrun train.py --phase kd        cold start: distil the teacher's correct episodes (Eq. 1)
    torchrun train.py --phase dgpo      PPO with a search engine in the loop, teacher on wrong episodes (Eq. 2-4)

Phases
    episodes  the teacher answers training questions; what it answers correctly is kept on disk
    sft       cross-entropy alone, on episodes of any origin (SeqKD: the teacher's)    -> distil
    kd        Eq. 1 against the teacher's full distribution                            -> distil
    taid      KL to a target that moves from the student to the teacher                -> distil
    gkd       reverse KL on what the student writes now                                -> distil
    distillm  skew KL; what the student writes comes in as it is needed, and is kept   -> distil
    ppo       guide = the initial policy, on all episodes (Search-R1)                  -> reinforce
    grpo      the same with advantages within a question's group, no critic            -> reinforce
    dgpo      guide = the teacher, on wrong episodes (Eq. 4)                           -> reinforce
    bard-data a teacher's chains of thought, compressed to several budgets (bard.py)
    bard-sft  sft on them                                                              -> distil
    bard-rl   grpo, rewarded for being right within the budget                         -> reinforce
    qagent    grpo, rewarded for what a frozen generator makes of the passages (qagent.py) -> reinforce

Departures from the official code, with reasons, stand in distil.py and reinforce.py. Weights are fp32 in both: a step
of 1e-6 vanishes in bf16.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import bard
import config
import qagent
from data import Question, draw_budgets
from distil import distil
from episode import Episode, load_episodes, num_thinking_tokens
from model import Critic, Tokenizer, load_decoder
from parallel import end_processes, shard, start_processes, sum_over_processes, whole
from play import split_questions, write_episodes
from reinforce import reinforce
from retriever import Retriever
from rollout import Policy, generate
from run import Collapse, Run, Stop
from settings import DISTIL, SKIPPING, TrainSettings, with_defaults

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "world.toml"
COLLAPSED = 3  # exit status of a run that has collapsed and left its best weights


def load_policy(path: str, device: torch.device, role: str, dtype: torch.dtype = torch.float32) -> Policy:
    if not path:
        raise ValueError(f"--{role}: got no checkpoint, expected a folder or a hub id")
    return Policy(load_decoder(path, dtype=dtype, device=device), Tokenizer.load(path))


def check_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """The teacher scores the student's ids, so every id must mean the same to both."""
    ours, theirs = student.full.get_vocab(), teacher.full.get_vocab()
    if ours != theirs:
        differing = sorted(ours.items() ^ theirs.items(), key=lambda item: item[1])[:3]
        raise ValueError(f"--teacher: got another vocabulary than the student's (for example {differing}), expected "
                         "the same token ids; take both from one model family")


def frozen(policy: Policy) -> Policy:
    policy.decoder.requires_grad_(False)
    return policy


def main(argv: list[str]) -> None:
    settings = config.load(TrainSettings, argv, prog="train.py", description=__doc__.split("\n")[0],
                           default_config=DEFAULT_CONFIG)
    settings = with_defaults(settings)
    run = Run(settings, *start_processes(settings.device, settings.timeout_minutes))
    try:
        with run.signals():
            train(run)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Stop(f"{run.memory()}\n({error})") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # of a CPU
            raise Stop(f"{run.memory()}\n({error})") from error
        if dist.is_initialized() and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise Stop(f"rank {run.rank} of {run.num_processes}: another process ended, or did not answer within "
                       f"{settings.timeout_minutes} minutes; read what it said, then --resume\n({error})") from error
        raise


def train(run: Run) -> None:
    settings, rank, num_processes, device = run.settings, run.rank, run.num_processes, run.device
    torch.manual_seed(settings.seed)
    teacher_dtype = getattr(torch, settings.teacher_dtype)
    acts = settings.phase not in ("sft", "bard-sft") or settings.eval_every > 0
    if settings.phase == "bard-data" and settings.chains:
        acts = False
    retriever, questions, val_questions = None, [], []
    if acts:
        searches = settings.max_turns > 0
        if not settings.questions or searches and not (settings.corpus and settings.encoder):
            raise ValueError(
                f"phase {settings.phase}: got questions {settings.questions!r}, corpus {settings.corpus!r} and encoder "
                f"{settings.encoder!r}, expected all three; give --questions, --corpus and --encoder (the last two are "
                "not needed with --max-turns 0)"
            )
        questions, val_questions = split_questions(settings.questions, settings.val_size)
        if searches:
            retriever = Retriever.load(settings.corpus, settings.encoder, index=settings.index or None, device=device)

    if settings.phase == "episodes":
        teacher = frozen(load_policy(settings.teacher, device, "teacher", teacher_dtype))
        return write_episodes(run, teacher, retriever, questions, settings.episodes)
    if settings.phase == "bard-data":
        return compress_chains(run, retriever, questions, teacher_dtype)

    run.prepare_folder()
    student = load_policy(settings.student, device, "student")
    student.decoder.checkpointing = settings.checkpointing  # the critic is a copy and inherits it
    teacher = None
    is_guided = settings.phase in SKIPPING and settings.kl_where == "wrong"
    if settings.phase in DISTIL[2:] or (settings.phase == "dgpo" and settings.kl_where != "none") or is_guided:
        teacher = frozen(load_policy(settings.teacher, device, "teacher", teacher_dtype))
        check_same_tokens(student.tokenizer, teacher.tokenizer)

    score = make_score(student.tokenizer, settings, device)

    def validate(step: int, num_steps: int) -> dict[str, float]:
        """Sampled score on the questions set apart: greedy looks fine long before sampling does."""
        if not (settings.eval_every and (step % settings.eval_every == 0 or step == num_steps)):
            return {}
        at, end = (len(val_questions) * (rank + k) // num_processes for k in (0, 1))
        with whole(student.decoder):
            asked = draw_budgets(val_questions, settings.budgets, 0)[at:end]
            episodes = generate(student, retriever, asked, settings, seed=settings.seed + 1, first_episode=at)
        kept = [num_thinking_tokens(e, student.tokenizer) <= e.question.budget for e in episodes if settings.budgets]
        reward = sum(score(episodes)) if settings.phase in SKIPPING else 0.0
        correct, adhered, reward, n = sum_over_processes(*map(torch.tensor, (
            sum(e.score for e in episodes), sum(kept), reward, len(episodes))))
        result = {"eval/score": correct / max(1, n)}
        result |= {"eval/reward": reward / max(1, n)} if settings.phase in SKIPPING else {}
        return result | ({"eval/adherence": adhered / max(1, n)} if settings.budgets else {})

    if settings.phase in DISTIL:
        episodes = []
        if settings.phase != "gkd" or settings.student_share < 1:
            if not run.agree(Path(settings.episodes).exists()):
                if not teacher:
                    phase = "bard-data" if settings.phase == "bard-sft" else "episodes"
                    raise ValueError(f"--episodes: got {settings.episodes}, which is not there, expected episodes to "
                                     f"learn from; --phase {phase} makes the teacher's")
                write_episodes(run, teacher, retriever, questions, settings.episodes)
            episodes = load_episodes(settings.episodes, student.tokenizer, prompt=settings.prompt,
                                     budget_text=settings.budget_text)
            if settings.phase == "bard-sft" and any(e.question.budget is None for e in episodes):
                raise ValueError(f"--episodes {settings.episodes}: got episodes without a budget, expected those that "
                                 "--phase bard-data writes")
        if settings.shard != "none":
            shard(student.decoder)
        if settings.shard == "all" and teacher:
            shard(teacher.decoder)
        distil(run, student, teacher, episodes, retriever, questions, validate)
    else:
        critic = Critic.from_decoder(student.decoder) if settings.advantage == "gae" else None
        guide = teacher
        if teacher is None and settings.kl_where != "none":
            guide = frozen(load_policy(settings.student, device, "student"))  # Eq. 5: the initial policy
        if settings.shard != "none":
            shard(student.decoder)
            if critic is not None:
                shard(critic)
        if settings.shard == "all" and guide:
            shard(guide.decoder)
        reinforce(run, student, critic, guide, retriever, questions, validate, score)


def make_score(
    tokenizer: Tokenizer, settings: TrainSettings, device: torch.device
) -> Callable[[list[Episode]], list[float]]:
    """What episodes are worth in a phase: Eq. 3, right within the budget, or what was found for a generator."""
    if settings.phase == "bard-rl":
        return lambda episodes: [bard.reward(e, tokenizer, settings) for e in episodes]
    if settings.phase == "qagent":
        dtype = getattr(torch, settings.teacher_dtype)
        generator = qagent.load_generator(settings, device, dtype) if settings.stage == 2 else None
        return lambda episodes: qagent.rewards(episodes, tokenizer, generator, settings)
    return lambda episodes: [e.score for e in episodes]


def compress_chains(run: Run, retriever: Retriever | None, questions: list[Question], dtype: torch.dtype) -> None:
    """Phase bard-data: chains of a file or of the teacher, asked by all processes; the first compresses them."""
    settings, chains = run.settings, run.settings.chains
    if not settings.student:
        raise ValueError("--student: got no checkpoint, expected one: budgets count its tokens")
    teacher = frozen(load_policy(settings.teacher, run.device, "teacher", dtype)) if settings.teacher else None
    if not chains:
        chains = str(Path(settings.episodes).with_suffix(".chains.jsonl"))
        if run.agree(Path(chains).exists()):
            run.say(f"{chains} is there already: its chains are taken; remove it to ask the teacher again")
        elif teacher is None:
            raise ValueError("--teacher: got no checkpoint and no --chains, expected either to reason from")
        else:
            write_episodes(run, teacher, retriever, questions, chains)
    if run.rank == 0:  # the others have nothing to wait for
        rules = settings.compressor == "trails"
        compressor = None if rules else frozen(load_policy(settings.compressor, run.device, "compressor", dtype))
        checker = None if rules else teacher  # rules say the answer; who has seen natural chains alone may misread them
        run.say(bard.write_versions(settings.episodes, chains, Tokenizer.load(settings.student), compressor, checker,
                                    settings, seed=settings.seed))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, Stop) as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)  # at once: torchrun soon ends what outlives a process
        sys.exit(COLLAPSED if isinstance(error, Collapse) else 1)
    except KeyboardInterrupt:
        sys.exit("train.py: stopped at once; --resume continues from the last state")
    finally:
        end_processes()
