"""What quantization costs: perplexity and mean KL(bf16 || quantized) a token, through the engine.

Model: SmolLM2-135M upcycled to 4 experts, top-2, with 10 % noise. Texts: the heads of 6 Wikipedia articles, 256 tokens
each. Static scales come from `quantize_checkpoint(texts=...)` over other texts: 8 articles, 8 news items, one sequence
of word problems. `static_half` halves every input_scale: it clips as scales do that weights have outgrown.
Limit: the bar. Peer: an emulation in float32 over the same kind of model and texts, whose noise and cleaning of texts
differ; its rows at half the scale saw 4 of the 6 articles, on which BF16 has perplexity 22.5.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import msgspec
import texts
import torch
from record import Result, make_result, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from rollmill.engine import EngineConfig, LanguageEngine, quantize_checkpoint
from rollmill.engine.demo.model import build_model
from rollmill.engine.env import cache_home
from rollmill.engine.export import QuantFormat
from rollmill.quant import QuantName

PEER = "float32 emulation"
HALF_PEER = "float32 emulation, 4 of 6 articles"


class Variant(msgspec.Struct, frozen=True):
    """One way to quantize; bars and the emulation's figures for KL and perplexity."""

    name: str
    quant: QuantName
    scales: str  # "none" | "per_token" | "static" | "static_half"
    bars: tuple[float | None, float | None] = (None, None)
    peers: tuple[float, float] = (0.0, 0.0)


VARIANTS = (
    Variant("nvfp4_w4a16", "nvfp4_w4a16", "none", peers=(0.1936, 24.03)),
    Variant("nvfp4_per_token", "nvfp4", "per_token", (0.42, 30.5), (0.3799, 28.65)),
    Variant("nvfp4_static", "nvfp4", "static", peers=(0.3839, 28.48)),
    Variant("nvfp4_static_half", "nvfp4", "static_half", peers=(0.9500, 54.15)),
    Variant("fp8_per_token", "fp8", "per_token", (0.04, 21.2), (0.0326, 20.66)),
    Variant("fp8_static", "fp8", "static", peers=(0.0395, 20.72)),
    Variant("fp8_static_half", "fp8", "static_half", peers=(0.5364, 37.29)),
)


class Measured(msgspec.Struct):
    """Sums over windows, and what the drift meter saw."""

    kl: list[float] = []
    nll: list[float] = []
    clipped: float = 0.0  # the layers' mean share
    clipped_most: float = 0.0
    seconds: float = 0.0

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)

    @property
    def ppl(self) -> float:
        return math.exp(sum(self.nll) / len(self.nll))


def token_logprobs(engine: LanguageEngine, window: Sequence[int]) -> Tensor:
    """float32 [len - 1, vocab]: the distribution of every token after the first."""
    (logits,) = engine.logits([list(window)])
    return logits[:-1].log_softmax(-1)


def measure(folder: Path, config: EngineConfig, windows: list[list[int]], references: list[Tensor]) -> Measured:
    """With an empty `references`, fill it: the BF16 run."""
    start, found, fill = time.perf_counter(), Measured(), not references
    with LanguageEngine(folder, config) as engine:
        for index, window in enumerate(windows):
            logq = token_logprobs(engine, window)
            found.nll += (-logq.gather(-1, torch.tensor(window[1:])[:, None])[:, 0]).tolist()
            if fill:
                references.append(logq)
            logp = references[index]
            found.kl.append((logp.exp() * (logp - logq)).sum(-1).mean().item())
        shares = list(engine.info()["clipping"].values())
    if shares:
        found.clipped, found.clipped_most = sum(shares) / len(shares), max(shares)
    found.seconds = time.perf_counter() - start
    return found


def write_calibration_texts(path: Path, articles: list[str], news: list[str], model: Path, length: int) -> None:
    """Documents cut to `length` tokens each, as .jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = "".join(str(tokenizer.apply_chat_template(c, tokenize=False)) for c in texts.read_problems(308)[300:])
    lines = []
    for document in [*articles[40:48], *news[:8], problems]:
        ids = tokenizer(document, add_special_tokens=False).input_ids[:length]
        lines.append(json.dumps({"text": tokenizer.decode(ids)}))
    path.write_text("\n".join(lines) + "\n")


def halve_scales(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint with every input_scale halved."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        scales = {name: value / 2 for name, value in tensors.items() if name.endswith(".input_scale")}
        save_file({**tensors, **scales}, out / file.name, metadata={"format": "pt"})
    return out


def prepare(model: Path, calibration: Path, work: Path, quant: QuantFormat, length: int) -> dict[str, Path]:
    """Folder by kind of scales for one format."""
    static = work / f"{quant}_static"
    report = quantize_checkpoint(
        model, static, quant, texts=calibration, tokens_per_sequence=length, sequences=64, device="cpu"
    )
    print(f"{quant}: {report.calibration_tokens} tokens, {report.seconds:.0f} s, {report.bytes_out / 1e6:.0f} MB")
    half = halve_scales(static, work / f"{quant}_static_half")
    return {"none": model, "per_token": model, "static": static, "static_half": half}


def results_of(variant: Variant, found: Measured, bf16: Measured, per_token: Measured | None) -> list[Result]:
    """KL and perplexity of one variant; `per_token` is the run that half a scale is held against."""
    (kl_bar, ppl_bar), (kl_peer, ppl_peer) = variant.bars, variant.peers
    half = variant.scales == "static_half"
    note = f"{len(found.kl)} articles, {len(found.nll)} tokens; BF16 perplexity {bf16.ppl:.2f}; "
    note += f"KL by article {min(found.kl):.3f}..{max(found.kl):.3f}"
    if variant.scales.startswith("static"):
        note += f"; clipped {found.clipped * 1e6:.1f} ppm, {found.clipped_most * 1e6:.0f} ppm in the worst layer"
    if half and per_token is not None:
        kl_bar = 2 * per_token.mean_kl
        note += f"; {found.mean_kl / per_token.mean_kl:.1f} x the KL per token, the limit is a lower one: 2 x"
    peer_name = HALF_PEER if half else PEER
    print(
        f"{variant.name}: KL {found.mean_kl:.4f}, perplexity {found.ppl:.2f}, {found.seconds:.0f} s; {note}", flush=True
    )
    rows = (("kl", found.mean_kl, "nats/token", kl_bar, kl_peer), ("ppl", found.ppl, "perplexity", ppl_bar, ppl_peer))
    return [
        make_result(f"acc_{metric}_{variant.name}", value, unit, limit=bar, peer=peer, peer_name=peer_name, note=note)
        for metric, value, unit, bar, peer in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cache = Path(cache_home()) / "rollmill"
    model = build_model(cache, print, noise=0.1)
    folder = texts.fetch(cache)
    articles, news = texts.read_articles(folder), texts.read_news(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = [
        tokenizer(article, add_special_tokens=False).input_ids[: arguments.tokens]
        for article in articles[: arguments.articles]
    ]
    references: list[Tensor] = []
    bf16 = measure(model, EngineConfig(quant="bf16", device="cpu"), windows, references)
    print(f"bf16: perplexity {bf16.ppl:.2f}, {bf16.seconds:.0f} s", flush=True)
    results = []
    with tempfile.TemporaryDirectory(dir=cache, prefix="accuracy-") as work:
        calibration = Path(work) / "calibration.jsonl"
        write_calibration_texts(calibration, articles, news, model, arguments.tokens)
        for quant in get_args(QuantFormat):
            folders = prepare(model, calibration, Path(work), quant, arguments.tokens)
            found: dict[str, Measured] = {}
            for variant in (v for v in VARIANTS if v.quant.startswith(quant)):
                wish = {} if variant.scales.startswith("static") else {"quant": variant.quant}
                config = EngineConfig(**wish, device="cpu")
                found[variant.scales] = measure(folders[variant.scales], config, windows, references)
                results += results_of(variant, found[variant.scales], bf16, found.get("per_token"))
            for static in ("static", "static_half"):
                shutil.rmtree(folders[static])
    save("accuracy", results)


if __name__ == "__main__":
    main()
