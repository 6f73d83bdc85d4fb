"""In a process that knows nothing of the training: loads every adapter of a folder, as it is and merged."""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
torch.set_num_threads(1)

from greedy import greedy  # noqa: E402


root = Path(sys.argv[1])
said = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    loaded = greedy(model, tokenizer)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    merged = type(merged).from_pretrained(folder / "merged")
    said[folder.name] = {"loaded": tuple(loaded), "merged": tuple(greedy(merged, tokenizer))}
torch.save(said, root / "said.pt")
