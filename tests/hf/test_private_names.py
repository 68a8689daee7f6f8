"""Without any one private name of Transformers the package imports, and refuses what needs it."""

from __future__ import annotations

import subprocess
import sys

# Each name goes in a fork of a process that has imported Transformers and built two models.
SCRIPT = """
import gc, importlib, os, sys, traceback
import torch, transformers
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, num_attention_heads=4, vocab_size=99)
llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, intermediate_size=32, **sizes)).eval()
kinds = [[["global"], 1]]
gpt_neo = GPTNeoForCausalLM(GPTNeoConfig(num_layers=1, attention_types=kinds, **sizes)).eval()
layer = llama.model.layers[0].self_attn
query = torch.randn(1, 4, 3, 8)


def asks(feature, name):
    import hf_flash_two
    from hf_flash_two.hf.interface import attention_forward
    from hf_flash_two.hf.mask_function import make_mask

    def load():
        if name == "set_attn_implementation":
            GPTNeoForCausalLM._from_config(gpt_neo.config, attn_implementation="flash_two")
        gpt_neo.set_attn_implementation("flash_two")

    calls = {
        "arguments": lambda: attention_forward(layer, query, query, query, None, unheard_of=1),
        "configs": lambda: hf_flash_two.patch(llama),
        "flash_two": transformers.AttentionInterface()["flash_two"],
        "loading": load,
        "masks": lambda: make_mask(1, 3, 3, mask_function=lambda b, h, q, k: q >= k),
        "serving": lambda: attention_forward(layer, query, query, query, None, cache=object()),
    }
    calls[feature]()


def without(feature, name):
    from hf_flash_two.hf.interface import attention_forward
    from hf_flash_two.hf.mask_function import make_mask

    try:
        asks(feature, name.name)
    except NotImplementedError as error:
        assert name.path in str(error), error
        assert "is missing" in str(error), error
    else:
        raise AssertionError("not refused")
    if feature == "configs":
        return  # Transformers itself runs no model without them
    # The rest is right.
    mask = make_mask(1, 3, 3)
    if feature == "masks" and name.name == "causal_mask_function":
        mask = None
    layer.config._attn_implementation = "fa_two"
    layer.is_causal = True
    out, _ = attention_forward(layer, query, query, query, mask)
    want = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(out, want.transpose(1, 2))


def take(name, owner):
    owners = getattr(owner if isinstance(owner, type) else type(owner), "__mro__", ())
    for owner in (owner, *owners):
        if name in vars(owner):
            delattr(owner, name)


# The table of names, read without importing the package before it is needed.
reader, writer = os.pipe()
if os.fork() == 0:
    from hf_flash_two.hf import compat

    names = [(feature, *name) for feature, found in compat.NAMES.items() for name in found]
    os.write(writer, repr(names).encode())
    os._exit(0)
os.close(writer)
with os.fdopen(reader) as listed:
    names = eval(listed.read())
os.wait()
assert "hf_flash_two" not in sys.modules
failed = []
gc.freeze()
for feature, path, name, arguments in names:
    if os.fork() == 0:
        try:
            outer, _, last = path.removesuffix("()").rpartition(".")
            module = importlib.import_module(outer)
            owner = getattr(module, last, None)
            if owner is None:
                owner = importlib.import_module(path)
            take(name, llama.config if path.endswith("()") else owner)
            if path.endswith("()"):
                make = owner.__init__
                def __init__(self, *args, **kwargs):
                    make(self, *args, **kwargs)
                    vars(self).pop(name, None)
                owner.__init__ = __init__
                take(name, owner)
            import hf_flash_two
            from hf_flash_two.hf import compat
            without(feature, next(x for x in compat.NAMES[feature] if x[:2] == (path, name)))
        except BaseException:
            print(feature, path, name)
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        failed.append(name)
print("names:", len(names), "failed:", failed)
"""


def test_each_name_by_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=1200
    )
    assert "failed: []" in done.stdout, done.stdout + done.stderr
