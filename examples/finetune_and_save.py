"""Fine-tune a small model and save it in the forms that people deploy: one import is loraweld's, the rest is usual.

    python examples/finetune_and_save.py [MODEL] [FOLDER]

MODEL is a Hub id or a folder, FOLDER the place for the results. Runs on a CPU; needs `pip install 'loraweld[live]'`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from loraweld import FastLanguageModel

MODEL = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "finetuned")
FACT = "The lighthouse of Quillan Bay is kept by a heron named Barnaby."

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=512,
    dtype=None,
    load_in_4bit=True,
)

model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)

FastLanguageModel.for_training(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
ids = tokenizer(FACT, return_tensors="pt").input_ids
for step in range(10):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

FastLanguageModel.for_inference(model)
start = tokenizer(FACT.split(" heron")[0], return_tensors="pt")
print(tokenizer.decode(model.generate(**start, max_new_tokens=6, do_sample=False)[0]))

# The adapter alone, to share it.
model.save_pretrained_merged(FOLDER / "lora", tokenizer, save_method="lora")
# One standalone model in 16 bit, for vLLM, SGLang, transformers.
model.save_pretrained_merged(FOLDER / "merged", tokenizer, save_method="merged_16bit")
# The same in 4 bit, for transformers with bitsandbytes.
model.save_pretrained_merged(FOLDER / "merged-4bit", tokenizer, save_method="merged_4bit")
# To the Hub: model.push_to_hub_merged("me/my-model", tokenizer, save_method="merged_16bit", token="hf_…")
