"""Peers of our decoders, with our weights: `generate` and prompt lookup of transformers, the block
samplers of diffusers and Fast-dLLM.

Nothing here is needed to train or evaluate. What is not installed is left out, with the reason
(`missing`, `fast_dllm`): pip install transformers diffusers; git clone
https://github.com/NVlabs/Fast-dLLM, and the environment variable FAST_DLLM names that folder.
Every decoder is prompt (N, P), padded on the left -> tokens (N, R), [PAD] after the first [EOS]:
one request, with --trace bound the trace's.
Models are FastGPTs, whose forward says which slots of a cache it writes.
"""
import copy
import importlib.util
import math
import os
import sys
import types
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config import Config
from data import EOS, MASK, PAD
from fast.gpt import SlotCache
from model import ar_decode, causal_hidden, pad_left
from sampler import Threshold, block_decode
from trainer import rule_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: the weights are ours
GUESSES = (4, 10)  # tokens that prompt lookup guesses at once
TIE = 1e-4  # nats: two tokens that are closer are told apart by float32's round-off


def missing(package):
    """Why a package cannot be used, one sentence, or None."""
    try:
        importlib.import_module(package)
    except Exception as error:  # an installed package may fail in ways of its own
        return (f"{package} cannot be imported ({type(error).__name__}: {error}): "
                f"pip install {package}")
    return None


def to_end(out):
    """Tokens (N, R) with [PAD] after the first [EOS]."""
    is_end = out == EOS
    return out.masked_fill(is_end.cumsum(1) - is_end.long() > 0, PAD)


# --- transformers -----------------------------------------------------------------------------

def arcee(model):
    """Our GPT as a stock transformers model: Arcee's layer is ours (RMSNorm before, rotary halves,
    no biases, no gate in the MLP) once the activation is GELU. The head is not tied there, but
    holds the same weights, and a bias that closes [PAD] and [MASK]: cheaper for generate than a
    logits processor."""
    from transformers import ArceeConfig, ArceeForCausalLM
    V, d = model.embed.weight.shape
    n_head, dev = model.layers[0].n_head, model.embed.weight.device
    hf = ArceeForCausalLM(ArceeConfig(
        vocab_size=V, hidden_size=d, intermediate_size=4 * d,
        num_hidden_layers=len(model.layers), num_attention_heads=n_head,
        num_key_value_heads=n_head, hidden_act="gelu", max_position_embeddings=len(model.cos),
        rms_norm_eps=torch.finfo(torch.float32).eps,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)).to(dev)
    hf.lm_head = torch.nn.Linear(d, V, device=dev)
    with torch.no_grad():
        hf.lm_head.bias.zero_()[:EOS] = -1e4
        copies = [(hf.model.embed_tokens, model.embed), (hf.lm_head, model.embed),
                  (hf.model.norm, model.norm)]
        for theirs, ours in zip(hf.model.layers, model.layers):
            attention = theirs.self_attn
            copies += [(theirs.input_layernorm, ours.norm1), (attention.o_proj, ours.out),
                       (theirs.post_attention_layernorm, ours.norm2),
                       (theirs.mlp.up_proj, ours.up), (theirs.mlp.down_proj, ours.down)]
            parts = attention.q_proj, attention.k_proj, attention.v_proj
            for part, weight in zip(parts, ours.qkv.weight.chunk(3)):
                part.weight.copy_(weight)
        for theirs, ours in copies:
            theirs.weight.copy_(ours.weight)
    return hf.eval()


def generate(hf, prompt, max_len, cache=None, guess=None):
    """transformers' greedy generate -> tokens.

    cache: None (grows) | "static"; guess: tokens that prompt lookup proposes at once."""
    out = hf.generate(prompt, attention_mask=(prompt != PAD).long(), max_new_tokens=max_len,
                      do_sample=False, eos_token_id=EOS, pad_token_id=PAD,
                      cache_implementation=cache, prompt_lookup_num_tokens=guess)
    out = out[:, prompt.shape[1]:]
    return to_end(F.pad(out, (0, max_len - out.shape[1]), value=PAD))


# --- Prompt lookup, our own -------------------------------------------------------------------

def look_up(text, n_guess, n_gram=2):
    """What followed the last n_gram tokens of a list where they stood before (the latest place),
    n_guess tokens at most; where they never did, one token less is looked for."""
    for n in range(n_gram, 0, -1):
        for i in range(len(text) - n - 1, -1, -1):
            if text[i:i + n] == text[-n:]:
                return text[i + n:i + n + n_guess]
    return []


@torch.no_grad()
def lookup_decode(model, prompt, max_len, n_guess=10):
    """Greedy AR decoding of one prompt (1, P) that guesses by looking up
    (https://github.com/apoorvumang/prompt-lookup-decoding): one forward reads the guessed tokens
    too, and those that it would have written itself are kept. The text is that of ar_decode.

    -> tokens (1, max_len), forwards."""
    dev, text, P = prompt.device, prompt[0].tolist(), prompt.shape[1]
    n_slots = P + max_len + n_guess
    cache, slot = SlotCache(model, 1, n_slots), torch.arange(n_slots, device=dev)
    stored, forwards = 0, 0
    while EOS not in text[P:] and len(text) < P + max_len:
        guess = look_up(text, n_guess) if stored else []
        n = len(text) + len(guess)
        here = slot[None, stored:n]
        unread = torch.tensor([text[stored:] + guess], device=dev)
        mask = (slot[:n] <= here[..., None])[:, None]
        hidden = model(unread, here, mask, cache, slice(stored, n), n, last=len(guess) + 1)
        best = model.logits(hidden)[0].argmax(-1).tolist()  # what follows the text, and each guess
        right = 0
        while right < len(guess) and guess[right] == best[right]:
            right += 1
        stored, forwards = len(text) + right, forwards + 1
        text += best[:right + 1]
    out = text[P:P + max_len]
    out = out[:out.index(EOS) + 1] if EOS in out else out
    return torch.tensor([out + [PAD] * (max_len - len(out))], device=dev), forwards


# --- diffusers --------------------------------------------------------------------------------

class Student(torch.nn.Module):
    """Our GPT as other samplers call a network. The block mask and the token shift are applied
    here, and two habits of our sampler, so that both follow one rule: a block's first slot is
    committed at once, what comes after [EOS] never."""

    def __init__(self, model, block_size):
        super().__init__()
        self.model, self.B = model, block_size
        self.P, self.forwards = 0, 0  # P: where the response starts

    @property
    def device(self):
        return self.model.embed.weight.device

    def view(self, tokens):
        """Positions (1, T) and mask (1, 1, T, T) of sequences (1, T)."""
        slot = torch.arange(tokens.shape[1], device=tokens.device)
        pad = pad_left(tokens[:, :self.P])                        # (1, 1)
        block_end = self.P + (slot - self.P) // self.B * self.B + self.B - 1
        last = torch.where(slot < self.P, slot, block_end)        # the last slot that each sees
        real = slot >= pad[..., None]                             # (1, 1, T)
        mask = (slot <= last[:, None]) & real | (slot == slot[:, None])
        return (slot - pad).clamp(min=0), mask[:, None]

    def logits(self, hidden, block):
        """Logits (n, B, V) of blocks (n, B) from what predicts them, hidden (n, B, d); sure of the
        first slot where all is [MASK]."""
        logits = self.model.logits(hidden)
        sure = 1e4 * F.one_hot(logits[:, 0].argmax(-1), logits.shape[-1])
        opens = (block == MASK).all(1, keepdim=True)
        logits[:, 0] = torch.where(opens, sure, logits[:, 0])
        return logits


class Uncached(Student):
    """As LLaDA2Pipeline calls a network: the whole sequence in, logits of its last block out; no
    cache, every forward computes everything again (the pipeline has none to offer)."""

    def forward(self, tokens, attention_mask, position_ids):
        self.forwards += 1
        block, (positions, mask) = tokens[:, -self.B:], self.view(tokens)
        hidden = self.model(tokens, positions, mask, last=self.B + 1)[:, :-1]
        ended = (block == EOS).cumsum(1) > 0
        # After [EOS]: as unsure as can be.
        logits = self.logits(hidden, block).masked_fill(ended[..., None], 0.0)
        return types.SimpleNamespace(logits=logits)


def llada2(model, block_size, tau):
    """LLaDA2Pipeline with BlockRefinementScheduler, threshold rule -> decode(prompt (1, P),
    max_len) -> tokens (1, R), and the network, which counts its forwards. One row at a time: a
    batch would wait for rows that ended inside a block."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
    net = Uncached(model, block_size)
    pipe = LLaDA2Pipeline(net, BlockRefinementScheduler(block_length=block_size))
    pipe.set_progress_bar_config(disable=True)

    def decoder(prompt, max_len):
        # Its grid of blocks starts at the prompt, ours after it.
        prompt = F.pad(prompt, (-prompt.shape[1] % block_size, 0), value=PAD)
        net.P, R = prompt.shape[1], math.ceil(max_len / block_size) * block_size
        out = pipe(input_ids=prompt, attention_mask=(prompt != PAD).long(), gen_length=R,
                   block_length=block_size, num_inference_steps=block_size,
                   sampling_method="greedy", threshold=tau, editing_threshold=None,
                   eos_token_id=EOS, mask_token_id=MASK, output_type="seq")
        return to_end(out.sequences)
    return decoder, net


# --- Fast-dLLM --------------------------------------------------------------------------------

class Cached(Student):
    """As Fast-dLLM's LLaDA samplers call a network: at every block the whole sequence in, logits
    and cache out, then with that cache the block alone. They fill every slot: those after [EOS]
    get [PAD] at once, which is read as [MASK]."""

    def forward(self, x, use_cache, past_key_values=None, replace_position=None):
        self.forwards += 1
        if past_key_values is None:
            cache, (positions, mask) = SlotCache(self.model, 1, x.shape[1]), self.view(x)
            start, given = 0, self.P                              # given: slots of the prompt
        else:
            cache, positions, mask = past_key_values
            start, given = int(replace_position[0].int().argmax()), 0
        end = start + x.shape[1]
        response = x[:, given:]
        tokens = torch.cat((x[:, :given], response.masked_fill(response == PAD, MASK)), dim=1)
        hidden = self.model(tokens, positions[:, start:end], mask[:, :, start:end, :end], cache,
                            slice(start, end), end)
        hidden = hidden.roll(1, dims=1)                           # the token shift
        blocks = tokens[:, given:].unflatten(1, (-1, self.B)).flatten(0, 1)  # (n, B)
        of_blocks = hidden[:, given:].unflatten(1, (-1, self.B)).flatten(0, 1)
        logits = self.logits(of_blocks, blocks)                   # (n, B, V)
        pad = F.one_hot(torch.tensor(PAD, device=x.device), logits.shape[-1])
        logits[(blocks == EOS).cumsum(1) > 0] = 1e4 * pad.to(logits)
        logits = logits.reshape(1, -1, logits.shape[-1])
        logits = F.pad(logits, (0, 0, given, 0))                  # nobody asks about the prompt
        return types.SimpleNamespace(logits=logits, past_key_values=(cache, positions, mask))


def dual_cache(model, block_size, tau):
    """Fast-dLLM's generate_with_dual_cache, threshold rule -> decode(prompt (1, P), max_len) ->
    tokens (1, R), and the network."""
    path = os.path.join(os.environ["FAST_DLLM"], "llada", "generate.py")
    # The file imports its own network, which is not used.
    sys.modules["model.modeling_llada"] = types.SimpleNamespace(LLaDAModelLM=None)
    spec = importlib.util.spec_from_file_location("fast_dllm_generate", path)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    net = Cached(model, block_size)

    def decoder(prompt, max_len):
        net.P, R = prompt.shape[1], math.ceil(max_len / block_size) * block_size
        out, _ = theirs.generate_with_dual_cache(
            net, prompt, steps=R, gen_length=R, block_length=block_size, mask_id=MASK,
            threshold=tau)
        return to_end(out[:, net.P:])
    return decoder, net


def fast_dllm():
    """Why Fast-dLLM cannot be used, one sentence, or None."""
    where = os.environ.get("FAST_DLLM", "")
    if not os.path.exists(os.path.join(where, "llada", "generate.py")):
        return ("Fast-dLLM is not there: clone https://github.com/NVlabs/Fast-dLLM and set "
                "FAST_DLLM to its folder")
    return missing("transformers")  # which its file imports


# --- The comparison ---------------------------------------------------------------------------

@dataclass
class Bench:
    """What the comparisons share. measure({name: decode(prompt)}, batch) -> timings of them in
    turn, and what they wrote {name: [tokens]}, the prompts among it; ratio(timings, a, b): the
    time of a over that of b."""
    cfg: Config
    max_len: int
    teacher: torch.nn.Module
    student: torch.nn.Module
    measure: callable
    ratio: callable

    def ar(self, prompt):
        return ar_decode(self.teacher, prompt, self.max_len)[0]

    def agreement(self, texts, a, b):
        """Of the timed responses of AR: how many are the same, how many of the others part at a
        tie."""
        apart = []
        for prompt, x, y in zip(texts["prompt"], texts[a], texts[b]):
            apart += gaps(self.teacher, prompt, x, y)
        n = sum(len(x) for x in texts[a])
        return {"n": n, "identical": 1 - len(apart) / n, "differ": len(apart),
                "ties": sum(gap < TIE for gap in apart), "largest_gap": max(apart, default=0.0)}


@torch.no_grad()
def gaps(model, prompt, ours, theirs):
    """For every row (N, R) that differs: |log p(our token) - log p(theirs)| where they part, by
    our model in float64 -> list."""
    model, found = copy.deepcopy(model).double(), []
    for row in (ours != theirs).any(1).nonzero()[:, 0].tolist():
        at = int((ours[row] != theirs[row]).nonzero()[0])
        hidden = causal_hidden(model, prompt[row:row + 1], ours[row:row + 1, :at + 1])[0, -1]
        logp = model.logits(hidden).log_softmax(-1)
        found.append(float((logp[ours[row, at]] - logp[theirs[row, at]]).abs()))
    return found


def against_transformers(bench, hf):
    """AR against generate with the faster of its caches, at two batches."""
    import transformers
    transformers.logging.set_verbosity_error()
    caches = {"dynamic": lambda prompt: generate(hf, prompt, bench.max_len),
              "static": lambda prompt: generate(hf, prompt, bench.max_len, "static")}
    out = {"model": "ArceeForCausalLM", "version": transformers.__version__}
    for batch in (1, 64):
        taken, texts = bench.measure({"ours": bench.ar, **caches}, batch)
        best = max(caches, key=lambda name: bench.ratio(taken, "ours", name))
        out[f"ratio_b{batch}"] = bench.ratio(taken, best, "ours")
        out[f"cache_b{batch}"] = best
        out[f"agreement_b{batch}"] = bench.agreement(texts, "ours", best)
    return out | {"identical": out["agreement_b64"]["identical"]}


def against_lookup(bench, hf):
    """The student against prompt lookup of AR, ours and transformers' (hf: None without it)."""
    def own(n):
        return lambda prompt: lookup_decode(bench.teacher, prompt, bench.max_len, n)[0]

    def theirs(n):
        return lambda prompt: generate(hf, prompt, bench.max_len, guess=n)

    def student(prompt):
        return block_decode(bench.student, prompt, bench.max_len, bench.cfg.block_size,
                            rule_of(bench.cfg)).tokens

    jobs = {f"own, {n} guessed": own(n) for n in GUESSES}
    if hf:
        jobs |= {f"transformers, {n} guessed": theirs(n) for n in GUESSES}
    taken, texts = bench.measure({"student": student, "ar": bench.ar, **jobs}, 1)
    of = {}
    for name in jobs:
        of[name] = {"ratio": bench.ratio(taken, name, "student"),
                    "speedup_over_ar": bench.ratio(taken, "ar", name),
                    **bench.agreement(texts, "ar", name)}
    best = min(of, key=lambda name: of[name]["ratio"])
    return {"ratio": of[best]["ratio"], "fastest": best, "of": of}


def against_sampler(bench, peer):
    """The student under the threshold rule against another sampler of it. peer(model, block size,
    tau): see llada2."""
    cfg, max_len, forwards = bench.cfg, bench.max_len, []
    theirs, net = peer(bench.student, cfg.block_size, cfg.tau)

    def ours(prompt, model=bench.student):
        decoded = block_decode(model, prompt, max_len, cfg.block_size, Threshold(cfg.tau))
        forwards.append(int(decoded.forwards[0]))
        return decoded.tokens

    jobs = {"ours": ours, "theirs": lambda prompt: theirs(prompt, max_len)}
    taken, texts = bench.measure(jobs, 1)
    counted = {"ours": sum(forwards) / len(forwards), "theirs": net.forwards / len(forwards)}
    apart = [prompt for prompt, x, y in zip(texts["prompt"], texts["ours"], texts["theirs"])
             if not torch.equal(x, y)]
    # A difference that vanishes in float64 was one of round-off.
    double = copy.deepcopy(bench.student).double()
    again, _ = peer(double, cfg.block_size, cfg.tau)
    equal = sum(torch.equal(ours(prompt, double), again(prompt, max_len)) for prompt in apart)
    n = len(texts["ours"])
    return {"rule": "threshold", "tau": cfg.tau, "forwards": counted,
            "ratio_b1": bench.ratio(taken, "theirs", "ours"), "n": n,
            "identical": 1 - len(apart) / n, "differ": len(apart), "equal_in_float64": equal}


def compare(cfg, max_len, models, measure, ratio):
    """What speed.json holds about peers: {"ar_vs_transformers", "sampler_vs_peers",
    "vs_prompt_lookup"}, None where a package is missing, and "missing", the reasons.

    models: teacher and student; measure, ratio: see Bench. Every ratio says how many times as
    fast ours is."""
    why = {package: missing(package) for package in ("transformers", "diffusers")}
    why["fast_dllm"] = fast_dllm()
    for reason in filter(None, why.values()):
        print(f"no comparison: {reason}")
    bench, samplers = Bench(cfg, max_len, *models, measure, ratio), {}
    hf = None if why["transformers"] else arcee(bench.teacher)
    if not why["diffusers"]:
        import diffusers
        name = f"diffusers {diffusers.__version__} LLaDA2Pipeline, no cache"
        samplers[name] = against_sampler(bench, llada2)
    if not why["fast_dllm"]:
        samplers["Fast-dLLM generate_with_dual_cache"] = against_sampler(bench, dual_cache)
    return {"ar_vs_transformers": against_transformers(bench, hf) if hf else None,
            "sampler_vs_peers": samplers or None,
            "vs_prompt_lookup": against_lookup(bench, hf),
            "missing": [reason for reason in why.values() if reason]}
