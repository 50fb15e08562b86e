#!/usr/bin/env python3
"""How far bfloat16 takes transformers and PEFT from their own answers in float32.

    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 gguf
    python3 bench/oracle/bf16_of_transformers.py GGUF_FOLDER

GGUF_FOLDER holds the demo's base model, SmolLM2-135M-Instruct.Q4_1.gguf. Two things are printed:
- of the demo, given the tokens before, the largest margin at which the model in bfloat16 prefers another token than
  the model in float32 did;
- of the fixture `llama-fp8`, the largest error of a case's logits (the norm of their difference by their norm) if nothing
  but the outputs of its linear layers is rounded to bfloat16.
"""
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures"
LARGEST_E4M3 = 448.0


def demo(folder):
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32)
    weights = base.to(torch.bfloat16).state_dict()
    cases = json.loads((FIXTURES / "demo-expected.json").read_text())
    for dtype in (torch.float32, torch.bfloat16):
        for adapter in (None, "pirate", "json", "sql", "shout"):
            model = AutoModelForCausalLM.from_config(base.config)
            model.load_state_dict(weights)
            if adapter:
                model = PeftModel.from_pretrained(model, ROOT / "demo/adapters" / adapter)
            of_adapter = [case for case in cases if case["adapter"] == adapter]
            cast_parameters(model, dtype)
            worst = max(largest_lost_margin(model.eval(), case) for case in of_adapter)
            print(f"demo, {adapter or 'base'} in {dtype}: other tokens up to a margin of {worst}", flush=True)


def cast_parameters(model, dtype):
    """As loading in that dtype does: frequencies of rotations are no parameters, and stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    frequencies = [buffer.dtype for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and all(kept == torch.float32 for kept in frequencies)


def largest_lost_margin(model, case):
    prompt, answer = case["prompt_ids"], case["greedy"]
    preferred = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
    lost = [m for token, wanted, m in zip(preferred.tolist(), answer, case["margin"]) if token != wanted]
    return max(lost, default=0.0)


def e4m3(x, scale):
    return (x / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).float() * scale


class Fp8Linear(torch.nn.Linear):
    """A linear layer of e4m3, whose output is rounded to `output`."""

    def forward(self, x):
        return super().forward(e4m3(x, self.input_scale)).to(self.output).float()


def fp8_cache(module, query, key, value, *args, **kwargs):
    return sdpa_attention_forward(module, query, e4m3(key, 1.0), e4m3(value, 1.0), *args, **kwargs)


def fp8_model(output):
    folder = FIXTURES / "models/llama-fp8"
    tensors = load_file(folder / "model.safetensors")
    config = LlamaConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="fp8_cache").eval()
    weights = {name: t.float() for name, t in tensors.items() if not name.endswith("_scale")}
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in tensors:
            module.__class__, module.output = Fp8Linear, output
            module.input_scale = tensors[f"{name}.input_scale"].item()
            weights[f"{name}.weight"] *= tensors[f"{name}.weight_scale"]
    model.load_state_dict(weights)
    return model


def fp8_fixture():
    expected = load_file(FIXTURES / "logits.safetensors")
    cases = [case for case in json.loads((FIXTURES / "cases.json").read_text()) if case["model"] == "llama-fp8"]
    for output in (torch.float32, torch.bfloat16):
        worst = max(error(fp8_model(output), case, expected[case["id"]]) for case in cases)
        print(f"llama-fp8, outputs of linear layers in {output}: error of {worst:.1e}", flush=True)


def error(model, case, expected):
    if case["adapter"]:
        # The adapters of this fixture are those of its model before it was rounded.
        model = PeftModel.from_pretrained(model, FIXTURES / "adapters" / case["adapter"]).float().eval()
    logits = model(torch.tensor([case["prompt"]])).logits[0]
    return ((logits - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    AttentionInterface.register("fp8_cache", fp8_cache)
    AttentionMaskInterface.register("fp8_cache", sdpa_mask)
    with torch.no_grad():
        fp8_fixture()
        demo(sys.argv[1])
