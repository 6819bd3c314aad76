"""Peak memory that saving a live model takes on top of the model itself.

    python benchmarks/live_memory.py [--bits 16|4] [--layers 16]

Anonymous and shared memory count (not the page cache of the files that are written): their peak while the model is
saved, less what the process had just before.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
import warnings
from pathlib import Path

import psutil
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

import loraweld

# The shape of Llama 3.2 1B.
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
METHODS = ("merged_16bit", "merged_4bit")


def build(layers: int, bits: int, folder: Path) -> torch.nn.Module:
    """Return the model with random weights; in 4 bit by way of a folder, as users load it."""
    config = tf.LlamaConfig(**SHAPE, num_hidden_layers=layers)
    torch.set_default_dtype(torch.bfloat16)
    model = tf.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if bits == 4:
        model.save_pretrained(folder / "base")
        settings = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        del model
        model = tf.AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
        )
    peft = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return loraweld.attach(peft.eval())


def anonymous_bytes() -> int:
    """Return what of this process's memory is not a file's; shared memory is that of the buffers."""
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in status if line.startswith(("RssAnon:", "RssShmem:")))


class Watch:
    """The largest anonymous memory while it is open."""

    def __enter__(self) -> Watch:
        self.start = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *args: object) -> None:
        self._done.set()
        self._thread.join()


def main() -> None:
    """Build, save by each method, print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, choices=(16, 4), default=16)
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tf.utils.logging.disable_progress_bar()
    place = Path(tempfile.mkdtemp(prefix="live-memory-"))
    os.chdir(place)
    try:
        model = build(options.layers, options.bits, place)
        shutil.rmtree(place / "base", ignore_errors=True)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        total = psutil.virtual_memory().total
        print(f"{options.bits}-bit model of {weights / 2**20:.0f} MiB, {os.cpu_count()} cores, {total / 2**30:.0f} GiB")
        for method in METHODS:
            started = time.monotonic()
            with Watch() as watch:
                model.save_pretrained_merged("out", save_method=method)
            taken = time.monotonic() - started
            size = sum(path.stat().st_size for path in Path("out").iterdir())
            extra = (watch.peak - watch.start) / 2**20
            print(f"{method:13} {extra:6.0f} MiB above the model, {taken:5.1f} s, {size / 2**20:.0f} MiB written")
            shutil.rmtree("out")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
