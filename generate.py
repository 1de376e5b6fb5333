"""Sample answers from a model folder, in batches, with the chat format that it was trained with.

    python generate.py --model DIR --prompt "What is a preference pair?" --temperature 0
    python generate.py --model DIR --prompts prompts.jsonl --samples 5 --output answers.jsonl
    torchrun --nproc_per_node 8 generate.py --model DIR --prompts prompts.jsonl --output FILE

A line of --prompts is {"prompt": "..." or [turns]}; a line of --output adds the field
`all_generated_responses`. Prompts of AlpacaEval 2 or Arena-Hard become their files of answers
(data/prompts.py).

The prompts are cut into batches. The answers of a batch are kept in the folder OUTPUT.parts once
they are all there, so that a killed command goes on where it was when it is given again. Ranks
take turns at the batches, each with the whole model; answers do not depend on their number.
"""
import argparse
import datetime
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import cpu
import gpu
from checkpoint import model_digest
from command import lock, unlock_all
from data.dialogues import checked_text
from data.files import read_json, write_whole
from data.preference import content_hash
from data.prompts import answers_text, read_prompts
from distributed import from_rank_0, join_ranks, leave_ranks, run_rank, say
from model import checkpoint_tensors, load_model, read_config
from sampler import answer, check_settings, fits, generate
from tokenizer import CHAT_FORMATS, load_chat

SETTINGS = ("samples", "batch_size", "max_new_tokens", "temperature", "top_p", "top_k")
PROGRESS_SECONDS = 10       # between two lines of progress
TIMEOUT_MINUTES = 7 * 24 * 60       # a week: ranks that are done wait for the last one


# --- the plan of a job ----------------------------------------------------------------------------

@dataclass
class Job:
    """A file of prompts to answer, cut into batches. It is the same on every rank."""
    shape: str                  # of the prompts, and so of the answers (data/prompts.py)
    records: list[dict]            # the prompts as read
    prompts: list[list[int]]    # and as ids
    batches: list[list[int]]    # indices of prompts
    settings: dict              # of generate()
    identity: dict              # what must be the same for a killed job to go on
    output: Path
    parts: Path                 # folder of the batches that are done

    def part(self, batch):
        """The file of a batch's answers."""
        return self.parts / f"{batch:06d}.json"


def plan_job(args, model, chat, dropped):
    """Reads and encodes the prompts and cuts them into batches. Prompts that are left out are
    counted in `dropped`. ValueError names a setting, or the bad lines."""
    # Settings are checked first, because reading and encoding may take minutes.
    settings = {name: getattr(args, name) for name in SETTINGS}
    check_settings(model, **settings)

    def encode(turns):
        prompt = chat.encode_prompt(turns)
        if not fits(model, prompt, args.max_new_tokens):
            raise ValueError(f"the prompt has {len(prompt)} tokens; expected, with max_new_tokens "
                             f"= {args.max_new_tokens}, at most the {model.config.max_positions} "
                             "positions of the model")
        return prompt

    shape, records, prompts = read_prompts(
        args.prompts, encode, dropped, args.skip_bad_lines, args.as_it_stands)
    if shape == "alpaca_eval" and args.samples > 1:
        raise ValueError(
            f"samples = {args.samples}; expected 1, AlpacaEval has one answer a prompt")

    # A batch holds four times the prompts that run at once, so that places are refilled within
    # it, and prompts of about one length. Batches do not depend on the number of ranks.
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    size = max(1, 4 * args.batch_size // args.samples)
    batches = [by_length[i:i + size] for i in range(0, len(prompts), size)]

    # Weights are identified by size and time of change: hashing takes as long as loading.
    weights = []
    for file in sorted(Path(args.model).glob("*.safetensors")):
        stat = file.stat()
        weights.append([file.name, stat.st_size, stat.st_mtime_ns])
    identity = settings | {
        "seed": args.seed,
        "prompts": content_hash([args.prompts]),
        "weights": weights,
        "config and tokenizer": model_digest(args.model),
        "chat_format": type(chat).__name__,
        "date": chat.date,
        "device": model.device.type,
        "skip_bad_lines": args.skip_bad_lines,
        "as_it_stands": args.as_it_stands,
    }
    return Job(shape, records, prompts, batches, settings, identity, Path(args.output),
               parts_folder(args))


def parts_folder(args):
    """The folder of the batches that are done."""
    return Path(f"{args.output}.parts")


def claim_output(output):
    """Locks the file to write, and makes its folder. ValueError if it exists or another process is
    at work on it, OSError if it cannot be written. Rank 0 only."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock(f"{output}.lock")
    if output.exists():
        raise ValueError(f"{output}: exists already; name another file, or remove it")


def claim_parts(job):
    """The numbers of the batches that are still to do. Makes the folder of parts, or takes it over
    from the same job, killed before; damaged parts are named and count as still to do. ValueError
    if it is another job's. Rank 0 only."""
    job.parts.mkdir(parents=True, exist_ok=True)
    before = read_identity(job.parts)
    if before is None:
        # The folder is removed at the end: it must not be somebody's.
        for file in job.parts.iterdir():
            if not file.name.endswith(".tmp.json"):     # of a job that was killed as it began
                raise ValueError(f"{job.parts}: holds {file.name} but no job.json, which says "
                                 "whose it is; remove the folder, or name another output")
        before = job.identity
    # Answers of other settings must not be joined to these.
    for name in before.keys() | job.identity.keys():
        found = before.get(name)
        value = job.identity.get(name)
        if found != value:
            raise ValueError(
                f"{job.parts}: holds answers with {name} = {found!r}, found {value!r} now; go on "
                "with the same command, or remove the folder to begin anew")
    content = job.identity | {"sha256": checksum(job.identity)}
    write_whole(job.parts / "job.json", json.dumps(content, indent=1))

    todo = []
    for b in range(len(job.batches)):
        try:
            read_part(job, b)
        except FileNotFoundError:
            todo.append(b)
        except ValueError as e:
            print(f"resume   {e}; its {len(job.batches[b])} prompts are answered again",
                  flush=True)
            todo.append(b)
    return todo


def read_identity(parts):
    """What job.json of a folder of parts holds, None without it. ValueError if it is damaged."""
    file = parts / "job.json"
    if not file.exists():
        return None
    advice = f"remove the folder {parts} to begin anew"
    try:
        identity = read_json(file)
    except ValueError as e:
        raise ValueError(f"{e}; {advice}") from None
    if identity.pop("sha256", None) != checksum(identity):
        raise ValueError(f"{file}: damaged, or of an earlier version of this command; {advice}")
    return identity


def first_day(args):
    """The date for chat templates that write today's: the one given, else that of the killed job
    that goes on, else today's. Rank 0 only."""
    if args.date:
        return args.date
    if args.output:
        identity = read_identity(parts_folder(args))
        if identity and identity.get("date"):
            return identity["date"]
    return datetime.date.today().isoformat()


# --- the answers of a batch -----------------------------------------------------------------------

class Answer(NamedTuple):
    """An answer as it is kept in a part."""
    text: str
    n_tokens: int           # sampled, without the end token
    encodes_back: bool      # the text encodes to the sampled ids. It may not: a model can sample
                            # "a" and "b" where encoding gives "ab"


def checksum(*values):
    """In hexadecimal, of values that JSON has."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def write_part(job, b, answers):
    """Keeps the answers of batch b: a list of Answers for each of its prompts."""
    # The checksum covers whose answers they are: no other job's can be taken for them.
    sha256 = checksum(job.identity, b, answers)
    write_whole(job.part(b), json.dumps({"answers": answers, "sha256": sha256}))


def read_part(job, b):
    """What write_part wrote. FileNotFoundError without the file, ValueError if it is damaged."""
    file = job.part(b)
    if not file.exists():
        raise FileNotFoundError(f"{file}: not found")
    content = read_json(file)
    answers = content.get("answers")
    if content.get("sha256") != checksum(job.identity, b, answers):
        raise ValueError(f"{file}: damaged")
    return [[Answer(*fields) for fields in some] for some in answers]


def kept_answer(chat, ids, max_new_tokens):
    """The Answer of sampled ids."""
    text = chat.decode_response(ids)
    try:
        again = chat.encode_response(text)
    except ValueError:
        again = []          # a text that cannot be trained on; whoever reads the pairs is told
    if len(ids) == max_new_tokens:
        encodes_back = again[:len(ids)] == ids      # cut short: it had no end yet
    else:
        encodes_back = again[:-1] == ids
    return Answer(text, len(ids), encodes_back)


class Progress:
    """Says how far rank 0 is, its tokens a second, and the time left at its rate of answers."""

    def __init__(self, n_answers):
        self.n_answers = n_answers      # of this rank
        self.n_done = 0
        self.n_tokens = 0
        self.began = time.monotonic()
        self.said = self.began

    def __call__(self, tokens, answers):
        """To be called after each step of the sampler, with the numbers of tokens sampled and of
        answers ended in it."""
        self.n_tokens += tokens
        self.n_done += answers
        now = time.monotonic()
        # The time left is told from the first answer on, and always at the end.
        is_due = now - self.said > PROGRESS_SECONDS or self.n_done == self.n_answers
        if self.n_done and is_due:
            self.said = now
            seconds = now - self.began
            left = seconds / self.n_done * (self.n_answers - self.n_done)
            say(f"answers  {self.n_done}/{self.n_answers} on rank 0 of {dist.get_world_size()}  "
                f"{self.n_tokens / seconds:.0f} tokens/s  {left / 60:.1f} min left")


def answer_batches(job, mine, model, chat):
    """Samples the answers of this rank's batches and writes each batch to its part."""
    max_new_tokens = job.settings["max_new_tokens"]
    n_prompts = sum(len(job.batches[b]) for b in mine)
    progress = Progress(n_prompts * job.settings["samples"])
    for b in mine:
        prompts = []
        seeds = []
        for i in job.batches[b]:
            prompts.append(job.prompts[i])
            seeds.append((job.identity["seed"], i))
        answers = generate(model, prompts, seeds=seeds, stop_ids=chat.stop_ids,
                           progress=progress, **job.settings)
        part = []
        for some in answers:
            part.append([kept_answer(chat, ids, max_new_tokens) for ids in some])
        write_part(job, b, part)


# --- jobs -----------------------------------------------------------------------------------------

def run_job(args, model, chat):
    """Answers a file of prompts, on all ranks."""
    # 1. Plan: what is to do, and what was done before this command was killed.
    dropped = Counter()
    job = plan_job(args, model, chat, dropped)
    todo = from_rank_0(lambda: claim_parts(job))
    say(f"prompts  {describe_plan(job, todo)}")
    for reason, n in dropped.most_common():
        say(f"         - {n} dropped: {reason}")

    # 2. Sample.
    mine = todo[dist.get_rank()::dist.get_world_size()]
    answer_batches(job, mine, model, chat)
    dist.barrier()          # rank 0 may not join the parts before all are there

    # 3. Join the parts.
    name = args.name or Path(args.model).resolve().name
    from_rank_0(lambda: join_parts(job, name))


def describe_plan(job, todo):
    """How many prompts of which lengths there are, and how many batches are done already."""
    lengths = [len(prompt) for prompt in job.prompts]
    n_batches = len(job.batches)
    return (f"{len(lengths)} of {min(lengths)} to {max(lengths)} tokens in {n_batches} batches, "
            f"{n_batches - len(todo)} of them done before")


def join_parts(job, name):
    """Writes the output from the parts, removes them, and says how many answers were cut short or
    read otherwise. name: the model's, for the files of AlpacaEval and Arena-Hard. Rank 0 only."""
    max_new_tokens = job.settings["max_new_tokens"]
    answers = [None] * len(job.prompts)     # of each prompt, (text, number of tokens) of each
    n_answers = 0
    n_cut = 0           # ended by max_new_tokens
    n_other = 0         # encode to other ids than were sampled
    for b, batch in enumerate(job.batches):
        try:
            part = read_part(job, b)
        except (ValueError, OSError) as e:
            # Since this command began: nothing is lost but this part.
            raise ValueError(f"{e}; all other parts are kept. Give the same command again, which "
                             "makes this one anew") from None
        for i, some in zip(batch, part):
            answers[i] = []
            for kept in some:
                answers[i].append((kept.text, kept.n_tokens))
                n_answers += 1
                n_cut += kept.n_tokens == max_new_tokens
                n_other += not kept.encodes_back
    write_whole(job.output, answers_text(job.shape, job.records, answers, name))
    shutil.rmtree(job.parts)
    say(f"written  {job.output}; {n_cut} of {n_answers} answers did not come to their end within "
        f"max_new_tokens = {max_new_tokens}; {n_other} encode to other tokens "
        "than were sampled, which read the same, and are trained on as those")


# --- the command ----------------------------------------------------------------------------------

def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Sample answers from a Hugging Face model folder.")
    flag = parser.add_argument
    # What to answer.
    flag("--model", required=True, help="folder")
    flag("--prompt", help="one prompt; its answers are printed")
    flag("--prompts", help="file of prompts: JSON Lines, a JSON array, ...")
    flag("--output", help="file to write; its shape follows that of the prompts")
    # How to sample: see sampler.generate.
    flag("--samples", type=int, default=1, help="answers a prompt")
    flag("--temperature", type=float, default=0.8, help="0 is greedy")
    flag("--top_p", type=float, default=0.95)
    flag("--top_k", type=int, default=0, help="0: all tokens")
    flag("--max_new_tokens", type=int, default=512)
    flag("--batch_size", type=int, default=16, help="answers at once")
    flag("--seed", type=int, default=0)
    # How prompts are read and laid out.
    flag("--chat_format", choices=CHAT_FORMATS,
         help="instead of the chat template of the model's folder")
    flag("--date", help="2026-01-31, for chat templates that write it; that of the job's first "
         "day if not given")
    flag("--skip_bad_lines", action="store_true",
         help="drop and count bad lines, and prompts too long to answer, instead of stopping")
    flag("--as_it_stands", action="store_true",
         help="take prompts that are laid out already as they stand")
    # How answers are written.
    flag("--name", help="of the model in AlpacaEval's and Arena-Hard's files; its folder's if not "
         "given")
    args = parser.parse_args(argv)
    one_prompt = bool(args.prompt)
    if one_prompt == bool(args.prompts) or bool(args.prompts) != bool(args.output):
        parser.error("give --prompt, or --prompts with --output")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}; expected 0 or more")
    return args


def run(args, device):
    if args.prompt:
        checked_text(args.prompt, "--prompt", args.as_it_stands)

    # 1. What is no model folder is told so before anything else.
    read_config(args.model)
    checkpoint_tensors(args.model)
    if args.output:
        from_rank_0(lambda: claim_output(args.output))

    # 2. Chat format and model.
    date = from_rank_0(lambda: first_day(args))
    chat = load_chat(args.model, args.chat_format, date)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(args.model, dtype, device)
    if device.type == "cpu":
        cpu.speed_up(model)
    else:
        gpu.speed_up(model, dtype)

    # 3. Answers, to a file or to the terminal.
    if args.prompts:
        run_job(args, model, chat)
        return
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["batch_size"] = args.samples       # there is one prompt
    texts = answer(model, chat, [args.prompt], seed=args.seed, **settings)
    say("\n---\n".join(texts[0]))


def main(argv):
    args = parse_args(argv)
    device = join_ranks(TIMEOUT_MINUTES)
    try:
        run(args, device)
    finally:
        unlock_all()
        leave_ranks()


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
