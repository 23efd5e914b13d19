"""The examples run as a user would run them: in a process of their own, on tiny models, without network."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.peft_feature("`trl.SFTTrainer(peft_config=...)`")
@pytest.mark.peft_feature("`generate` with cache")
def test_supervised_fine_tuning_lowers_the_loss_and_generates(tmp_path):
    code = """
import json, runpy, sys
example = runpy.run_path(sys.argv.pop(1), run_name="__main__")
from peft import PeftModel
base, tokenizer = example["tiny_llama"]()
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
prompts = [row["prompt"] for row in example["EXAMPLES"]]
print(json.dumps([[prompt, *(example["complete"](model, tokenizer, prompt, cache) for cache in (True, False))]
                  for prompt in prompts]))
"""
    command = [sys.executable, "-c", code, str(EXAMPLES / "sft_causal_lm.py"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.search(r"^loss: (\S+) -> (\S+)$", done.stdout, re.MULTILINE).groups())
    assert last < first / 2
    for prompt, cached, uncached in json.loads(done.stdout.splitlines()[-1]):
        assert cached == uncached
        assert f"{prompt} -> {cached}\n" in done.stdout, "the saved adapter says something else than the trained one"
