"""Halve the KV cache of a language model without training it: perplexity before and after, and a text that it writes.

python examples/language_model.py                                     (a tiny random model on bytes: offline, nonsense)
python examples/language_model.py HuggingFaceTB/SmolLM2-135M-Instruct --text book.txt --cache 0.5
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import vit_tucker
from vit_tucker.inference.perplexity import perplexity

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="folder or hub name of a transformers model")
parser.add_argument("--text", type=Path, default=Path(__file__), help="UTF-8 text to calibrate on and to predict")
parser.add_argument("--cache", type=float, default=0.5, help="share of the KV cache to keep")
args = parser.parse_args()

torch.manual_seed(0)
if args.model is None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)).eval()
    encode, decode = (lambda text: list(text.encode())), (lambda ids: bytes(ids).decode(errors="replace"))
else:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    encode, decode = (lambda text: tokenizer(text, verbose=False).input_ids), tokenizer.decode

window = 256 if args.model else 64
ids = torch.tensor(encode(args.text.read_text()))[:24576]
evaluated, calibration = ids[: len(ids) // 4], ids[len(ids) // 4 :].unfold(0, window, window)  # other text for each
before = perplexity(model, evaluated, window=window).perplexity
config = vit_tucker.TuckerConfig(ranks={"cache": args.cache})
print(vit_tucker.patch(model, config, calibration=calibration.split(2)))
after = perplexity(model, evaluated, window=window).perplexity
print(f"perplexity {before:.2f} before, {after:.2f} after")
print(decode(model.generate(evaluated[None, :32], max_new_tokens=32, do_sample=False)[0].tolist()))
